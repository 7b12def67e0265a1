"""Tables and figures of docs/claim.md, from files of results."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from bench.claims import grid

SCORES = {
    "accuracy": "accuracy", "tar_at_far_0.01": "TAR@1e-2", "tar_at_far_0.001": "TAR@1e-3", "rank1": "rank-1",
}  # fmt: skip


COLOURS = {"conventional": "#c8553d", "sst": "#0b6e4f"}
MAIN = "tar_at_far_0.001"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the 95 % confidence interval of it (Student's t); NaN for fewer than two values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(half)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, percent."""
    if not values:
        return ""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of runs paired by seed: mean and its 95 % confidence interval, percentage points."""
    if len(ours) != len(theirs) or len(ours) < 2:
        return ""
    mean, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
    return f"{100 * mean:+.1f} [{100 * (mean - half):+.1f}, {100 * (mean + half):+.1f}]"


def values(results: Sequence[grid.Result], name: str, **wanted: object) -> list[float]:
    """A score of the runs with these settings, by seed."""
    chosen = [r for r in results if all(r[key] == value for key, value in wanted.items())]
    return [max(0.0, grid.score(r, name)) for r in sorted(chosen, key=lambda r: r["seed"])]


def summary(results: Sequence[grid.Result], stage: str, **wanted: object) -> list[str]:
    """Markdown: for each loss conventional training, SST and their difference."""
    lines = ["| loss | | " + " | ".join(SCORES.values()) + " |", "|---|---|" + "---|" * len(SCORES)]
    chosen = [r for r in results if r["stage"] == stage and all(r[key] == value for key, value in wanted.items())]
    for loss in dict.fromkeys(r["loss"] for r in chosen):
        cells: dict[str, list[list[float]]] = {}
        for method in ("conventional", "sst"):
            cells[method] = [values(chosen, score, method=method, loss=loss) for score in SCORES]
            if cells[method][0]:
                lines.append(f"| {loss} | {method} | " + " | ".join(map(spread, cells[method])) + " |")
        gains = [difference(a, b) for a, b in zip(cells["sst"], cells["conventional"], strict=True)]
        if any(gains):
            lines.append(f"| | difference | {' | '.join(gains)} |")
    return lines


def row(cells: Sequence[str]) -> str:
    """Of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; nothing without rows."""
    return [row(head), row(["---"] * len(head)), *map(row, rows), ""] if rows else []


def progress(results: dict[str, grid.Result], config: grid.Config, data: str) -> list[str]:
    """How much of the grid is done, and on what."""
    stages = list(grid.stages(config, data, results))
    waiting = [name for name, runs in stages if runs is None]
    known = [(name, runs) for name, runs in stages if runs is not None]
    done = sum(run.key in results for _, runs in known for run in runs)
    total = sum(len(runs) for _, runs in known)
    hours = sum(r["seconds"] for r in results.values()) / 3600
    first = next(iter(results.values()))["versions"]
    text = (
        f"{len(results)} runs, {hours:.1f} hours of one processor core; torch {first['torch']}, {first['threads']} thread, "
        f"{first['date']}, configuration {grid.digest(config, data)}."
    )
    if waiting or done < total:
        missing = [name for name, runs in known if any(run.key not in results for run in runs)] + waiting
        text += f" **The grid is not complete**. Runs are missing of: {', '.join(missing)}. Tables hold what there is."
    return [text, ""]


def tuned(results: dict[str, grid.Result], config: grid.Config, data: str) -> list[str]:
    """For each method the scores of its configurations on the validation identities, and the best one."""
    rows = []
    for method, loss in grid.methods(config):
        chosen = grid.best(config, data, method, loss, results)
        if chosen is None:
            continue
        scores = [
            max(0.0, grid.score(results[run.key], config["tuning"]["score"]))
            for run in grid.tuning(config, data, method, loss)
        ]
        settings = f"lr {chosen.lr:g}, weight decay {chosen.weight_decay:g}"
        if method != "metric" or loss == "n-pairs":
            settings += f", scale {chosen.scale:g}"
        if chosen.margin:
            settings += f", margin {chosen.margin:g}"
        if method in grid.HAS_QUEUE:
            settings += f", queue {chosen.queue}, momentum {chosen.momentum:g}"
        numbers = [f"{100 * value:.1f}" for value in (min(scores), statistics.median(scores), max(scores))]
        rows.append([f"{method}, {loss}", *numbers, settings])
    return table(["", "worst", "median", "best", "its settings"], rows)


def others(results: Sequence[grid.Result]) -> list[str]:
    """The methods beside the two."""
    rows = []
    for method, loss in dict.fromkeys((r["method"], r["loss"]) for r in results if r["stage"] == "test"):
        if method not in COLOURS:
            found = [values(results, name, stage="test", method=method, loss=loss) for name in SCORES]
            rows.append([loss if method == "metric" else f"{method}, {loss}", *map(spread, found)])
    return table(["", *SCORES.values()], rows)


def by(stage: str, title: str, results: Sequence[grid.Result]) -> list[str]:
    """Both methods with AM-softmax by what a stage changes: 'depth' (images per training identity) or 'length' (of training)."""
    rows = []
    for value in sorted({r[stage] for r in results if r["stage"] == stage}):
        found = [values(results, MAIN, stage=stage, method=method, **{stage: value}) for method in COLOURS]
        rows.append([str(value), *map(spread, found), difference(found[1], found[0])])
    return table([title, *COLOURS, "difference"], rows)


def ablations(results: dict[str, grid.Result], config: grid.Config, data: str) -> list[str]:
    """SST's best configuration, and with one setting changed."""
    chosen = grid.best(config, data, "sst", "am-softmax", results)
    if chosen is None:
        return []
    own, rows = [], []
    for name, value in grid.ablations(config):
        runs = grid.ablated(config, chosen, name, value)
        found = [results[run.key] for run in runs if run.key in results]
        if runs[0].stage == "test":
            own.append(f"{name} {value}")
        elif found:
            rows.append([f"{name} {value}", *(spread(values(found, score)) for score in SCORES)])
    tested = [results[run.key] for run in grid.seeds(config, "test", chosen, "best") if run.key in results]
    unchanged = [", ".join(own), *(spread(values(tested, score)) for score in SCORES)]
    return table(["", *SCORES.values()], [unchanged, *rows] if rows else [])


def diagnosis(results: Sequence[grid.Result]) -> list[str]:
    """Effective rank and mean cosines of the last state, on training and on unseen features."""
    rows = []
    for method, loss in dict.fromkeys((r["method"], r["loss"]) for r in results if r["stage"] == "test"):
        chosen = [
            r for r in results if r["stage"] == "test" and (r["method"], r["loss"]) == (method, loss) and r["scores"]
        ]
        cells = []
        for part in ("train", "test"):
            for name, digits in (("effective_rank", 0), ("intra_class_cosine", 2), ("inter_class_cosine", 2)):
                cells.append(f"{statistics.fmean(r[part][name] for r in chosen):.{digits}f}" if chosen else "")
        rows.append([f"{method}, {loss}", *cells])
    head = [f"{part}: {name}" for part in ("training", "unseen") for name in ("rank", "within", "between")]
    return table(["", *head], rows)


def figures(results: Sequence[grid.Result], folder: Path, data: str) -> list[str]:
    """Draws what the results suffice for; Markdown that shows it."""
    tested = [r for r in results if r["stage"] == "test" and r["scores"] and r["method"] in COLOURS]
    if not tested:
        return []
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = data  # the same numbers give the same file
    matplotlib.rcParams["figure.constrained_layout.use"] = True
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    shown = []

    def save(name: str, title: str) -> None:
        path = folder / f"{data}_{name}.svg"
        names = dict(zip(*pyplot.gcf().axes[0].get_legend_handles_labels()[::-1], strict=True))
        pyplot.gcf().legend(
            list(names.values()), list(names), loc="outside upper center", ncols=2, frameon=False, fontsize=8
        )
        pyplot.savefig(path, metadata={"Date": None})
        pyplot.close()
        shown.append(f"![{title}]({folder.name}/{path.name})")

    methods_of = {r["loss"]: {other["method"] for other in tested if other["loss"] == r["loss"]} for r in tested}
    losses = [loss for loss, found in methods_of.items() if len(found) == len(COLOURS)] or list(
        methods_of
    )  # bars to compare
    pyplot.figure(figsize=(1.5 + 1.4 * len(losses), 3.2))
    for i, (method, colour) in enumerate(COLOURS.items()):
        for j, loss in enumerate(losses):
            found = [100 * v for v in values(tested, MAIN, method=method, loss=loss)]
            if found:
                pyplot.bar(j + 0.38 * (i - 0.5), statistics.fmean(found), 0.36, color=colour, alpha=0.35)
                pyplot.plot(
                    [j + 0.38 * (i - 0.5)] * len(found), found, "o", color=colour, label=method if not j else None
                )
    pyplot.xticks(range(len(losses)), losses)
    pyplot.ylabel("TAR at FAR 1e-3, %")
    save("losses", "TAR at FAR 1e-3 on unseen identities by loss and method")

    am = [r for r in tested if r["loss"] == "am-softmax"]
    if am:
        quantities = {
            "effective_rank": "effective rank",
            "intra_class_cosine": "cosine within",
            "inter_class_cosine": "cosine between",
        }
        _, axes = pyplot.subplots(1, 3, figsize=(10, 3))
        for ax, (name, title) in zip(axes, quantities.items(), strict=True):
            for method, colour in COLOURS.items():
                for part, style in (("train", "--"), ("test", "-")):
                    curves = [[point[f"{part}_{name}"] for point in r["curve"]] for r in am if r["method"] == method]
                    if curves:
                        steps = [point["step"] for point in am[0]["curve"]]
                        label = f"{method}, {'training' if part == 'train' else 'unseen'}"
                        ax.plot(
                            steps,
                            [statistics.fmean(at) for at in zip(*curves, strict=True)],
                            style,
                            color=colour,
                            label=label,
                        )
            ax.set_xlabel("step")
            ax.set_title(title, fontsize=10)
        save("curves", "rank and cosines while training, AM-softmax")
        pyplot.figure(figsize=(5, 3.2))
        for method, colour in COLOURS.items():
            for part, style in (("train", "--"), ("test", "-")):
                spectra = [r[part]["spectrum"] for r in am if r["method"] == method]
                if spectra:
                    label = f"{method}, {'training' if part == 'train' else 'unseen'}"
                    pyplot.semilogy(
                        [statistics.fmean(at) for at in zip(*spectra, strict=True)], style, color=colour, label=label
                    )
        pyplot.xlabel("singular value")
        pyplot.ylabel("share of their sum")
        save("spectrum", "spectrum of the features, AM-softmax")
    return [*shown, ""]


def section(title: str, lines: Sequence[str]) -> list[str]:
    """With its title; nothing without lines."""
    return [f"### {title}", "", *lines] if lines else []


def headline(results: Sequence[grid.Result]) -> str:
    """What was found with AM-softmax and two images per identity, in a sentence; empty without runs of both methods."""
    tested = [r for r in results if r["stage"] == "test" and r["loss"] == "am-softmax" and r["method"] in COLOURS]
    found = {method: values(tested, MAIN, method=method) for method in COLOURS}
    if not all(found.values()):
        return ""
    versions = tested[0]["versions"]
    seeds = min(map(len, found.values()))
    return (
        f"With Semi-Siamese Training **{spread(found['sst'])} %** of the pairs of one identity are accepted, with conventional "
        f"training **{spread(found['conventional'])} %**, at a threshold that accepts one in 1,000 pairs of two identities "
        f"(AM-softmax, {seeds} seed{'s' if seeds > 1 else ''}; CPU, {versions['threads']} thread, torch {versions['torch']}, "
        f"{versions['date']})."
    )


def in_short(results: Sequence[grid.Result], config: grid.Config, data: str) -> dict[str, Any] | None:
    """For the demo's report: of each loss with all seeds of both methods mean and standard deviation of MAIN, percent, and the sentence.
    None without such a loss."""
    losses, seeds = {}, config["seeds"]["test"]
    for loss in dict.fromkeys(r["loss"] for r in results if r["stage"] == "test"):
        found = {method: values(results, MAIN, stage="test", loss=loss, method=method) for method in COLOURS}
        if seeds > 1 and all(len(some) == seeds for some in found.values()):
            losses[loss] = {
                method: [round(100 * statistics.fmean(some), 1), round(100 * statistics.stdev(some), 1)]
                for method, some in found.items()
            }
    if not losses:
        return None
    identities = grid.of_set(config, data)["data"]["identities"]
    sentence = headline(results).replace("**", "")
    return {"data": data, "identities": identities, "seeds": seeds, "sentence": sentence, "losses": losses}


def fill(text: str, name: str, content: str) -> str | None:
    """``text`` with ``content`` between ``<!-- name -->`` and ``<!-- end -->``; None where it has no such place."""
    found = re.search(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", text, re.DOTALL)
    return None if found is None else text[: found.end(1)] + content + text[found.start(2) :]


def write(page: Path, files: Sequence[Path], config: grid.Config) -> None:
    """Fills in what stands between ``<!-- NAME -->`` and ``<!-- end -->`` for each data set NAME that has results, and, between
    ``<!-- claim: NAME -->`` and ``<!-- end -->`` in the README above the page's folder, the main result in a sentence. What the
    demo's report shows of it goes into the package beside that README.

    Raises:
        ValueError: the page has no such place, or there are no results.
    """
    text, sets = page.read_text(encoding="utf-8"), {}
    readme = page.parent.parent / "README.md"
    for path in files:
        for key, result in grid.read_results(path).items():
            if result["protocol"] == grid.digest(config, result["data"]) and result["stage"] != "quick":
                sets.setdefault(result["data"], {})[key] = result
    if not sets:
        raise ValueError("there are no results of this configuration")
    for data, results in sets.items():
        listed: list[Any] = list(results.values())
        lines = [
            *progress(results, config, data),
            *section(
                "Both methods, by loss",
                [*summary(listed, "test"), ""] if any(r["stage"] == "test" for r in listed) else [],
            ),
            *figures(listed, page.with_suffix(""), data),
            *section("Other methods", others(listed)),
            *section("Tuning: TAR@1e-3 on the validation identities, %", tuned(results, config, data)),
            *section("Longer training: TAR@1e-3, AM-softmax", by("length", "times as many steps", listed)),
            *section("Images per identity: TAR@1e-3, AM-softmax", by("depth", "images", listed)),
            *section("Ablations of SST, AM-softmax", ablations(results, config, data)),
            *section("Features: effective rank, mean cosine within and between identities", diagnosis(listed)),
        ]
        filled = fill(text, data, "\n".join(lines))
        if filled is None:
            raise ValueError(f"{page} has no place for the results of {data!r}: <!-- {data} --> ... <!-- end -->")
        text = filled
        if readme.exists() and (sentence := headline(listed)):
            shown = fill(readme.read_text(encoding="utf-8"), f"claim: {data}", sentence + "\n")
            if shown is not None:
                readme.write_text(shown, encoding="utf-8")
                short = readme.parent / "sst_fast" / "train" / "claim.json"
                told = in_short(listed, config, data)
                if told and short.parent.exists():
                    short.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    page.write_text(text, encoding="utf-8")
