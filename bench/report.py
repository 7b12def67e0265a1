"""Tables, plots and comparisons from what ``pytest bench --benchmark-json=FILE`` wrote.

python -m bench.report run.json                        # Markdown to the terminal
python -m bench.report run.json --out docs/benchmarks  # report.md and plots (SVG and PNG)
python -m bench.report run.json --compare older.json   # what became slower beyond the noise; status 1 if anything did
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # tables do not need it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BARE = "bare products"
OURS = "ours"
# One colour per contender, in every plot.
COLOURS = [
    "#0b6e4f",
    "#c8553d",
    "#3d5a80",
    "#e09f3e",
    "#7b2d8b",
    "#8d99ae",
    "#5f0f40",
    "#577590",
    "#90be6d",
    "#b5838d",
    "#264653",
]


def is_ours(provider: str) -> bool:
    """The fused loss or the queue, not their references."""
    return provider.startswith(OURS) and "reference" not in provider


@dataclass(frozen=True)
class Row:
    """A contender's result: seconds of each round and what it computed."""

    suite: str
    group: str
    provider: str
    problem: dict[str, Any]
    data: tuple[float, ...]
    extra_mib: float | None
    error: float | None
    counts: dict[str, int]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.data)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, seconds."""
        if len(self.data) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.data, n=4)
        return (high - low) / 2

    @property
    def is_ours(self) -> bool:
        """The fused loss, not its reference."""
        return is_ours(self.provider)


@dataclass(frozen=True)
class Run:
    """One JSON file."""

    machine: dict[str, Any]
    rows: list[Row]

    @staticmethod
    def read(path: Path) -> Run:
        """ValueError if the file is not what ``pytest bench --benchmark-json`` writes."""
        content = json.loads(path.read_text())
        try:
            rows = [
                Row(
                    b["extra_info"]["suite"], b["group"], b["extra_info"]["provider"], b["extra_info"]["problem"],
                    tuple(b["stats"]["data"]), b["extra_info"].get("extra_mib"), b["extra_info"].get("error"),
                    b["extra_info"].get("counts", {}),
                )
                for b in content["benchmarks"]
            ]  # fmt: skip
            return Run(content["machine_info"], rows)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the JSON of these benchmarks: {error!r} is missing") from error

    def groups(self, suite: str) -> dict[str, list[Row]]:
        """Rows of a suite by problem, in order."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.suite == suite:
                found.setdefault(row.group, []).append(row)
        return found


def about(run: Run) -> str:
    """Device, versions, date."""
    m = run.machine
    cuda = f", CUDA {m['cuda']}" if m.get("cuda") else f", {m['threads']} threads, {m['instruction set']}"
    rate = f"copies {m['bytes per second'] / 1e9:.1f} GB/s"
    return (
        f"{m['device']}{cuda}; torch {m['torch']}, Python {m['python']}, sst-fast {m['sst-fast']}, {m['date']}; {rate}"
    )


def milliseconds(seconds: float) -> str:
    """Three digits."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def quotient(a: float, b: float | None) -> str:
    """Two digits at least; nothing where there is nothing to divide by."""
    return "" if not b else f"{a / b:.2f}" if a >= 0.1 * b else f"{a / b:.1g}"


def table(rows: list[Row], limit: str, whole: str = OURS) -> list[str]:
    """Markdown: time with spread, ratio to the limit and to the fastest of ours (or to ``whole``), memory, error."""
    bound = next((row.median for row in rows if row.provider == limit), None)
    mine = min((row.median for row in rows if row.provider == whole or (whole == OURS and row.is_ours)), default=None)
    lines = [
        f"| | ms (± half the quartiles) | / {limit} | / {whole} | extra MiB | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.median):
        cells = [
            row.provider,
            f"{milliseconds(row.median)} ± {milliseconds(row.spread)}",
            quotient(row.median, bound),
            quotient(row.median, mine),
            "" if row.extra_mib is None else f"{row.extra_mib:.1f}",
            "" if row.error is None else f"{row.error:.0e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def added(rows: list[Row]) -> str:
    """What the method adds to networks and loss kernel is too little to be seen in the difference of the whole, so it is what a
    step costs around networks that cost nothing, less the kernel, and the update of a real gallery."""
    of = {row.provider: row.median for row in rows}
    seconds = of["step around free networks"] - of["loss kernel"] + of["gallery update"]
    return (
        f"Added by the method: {milliseconds(seconds)} ms, {100 * seconds / of['whole step']:.2f} % of the whole step."
    )


def rates(rows: list[Row]) -> str:
    """Identities per second of all processes together."""
    world, batch = rows[0].problem["world"], rows[0].problem["batch"]
    parts = [f"{row.provider} {world * batch / row.median:,.0f}" for row in rows if row.is_ours]
    return f"Identities/s: {', '.join(parts)}."


def host(rows: list[Row]) -> str:
    """Microseconds of every contender, and what it asks PyTorch for."""
    parts = [
        f"{row.provider} {1e6 * row.median:,.0f} us"
        + (f" ({', '.join(f'{number} {name}' for name, number in row.counts.items())})" if row.counts else "")
        for row in rows
    ]
    return f"{'; '.join(parts)}."


# suite -> title, limit, what 'ours' is, a line under each table
SUITES: dict[str, tuple[str, str, str, Callable[[list[Row]], str] | None]] = {
    "loss": ("Loss", BARE, OURS, None),
    "heads": ("Heads with learned class weights", BARE, OURS, None),
    "partial_fc": ("Partial FC, optimizer included", BARE, "ours", None),
    "queue": ("Queue and gallery update", "copy of the bytes", OURS, None),
    "queues": ("Losses over queues, pairs and both sides of a batch", BARE, OURS, None),
    "step": ("Training step", "networks", "whole step", added),
    "host": ("Host", "eager", OURS, host),
    "evaluation": ("Comparing all pairs of images", "bare products, M x M", OURS, None),
    "scaling": ("Several processes", BARE, OURS, rates),
    "data": ("Reading images", "Pillow's decoding", OURS, None),
    "opening": ("Opening data sets", "ours (with its index)", "ours (with its index)", None),
}


def markdown(run: Run) -> str:
    """The whole report."""
    lines = ["# Results", "", f"{about(run)}.", ""]
    for suite, (title, limit, whole, note) in SUITES.items():
        groups = run.groups(suite)
        lines += [f"## {title}", ""] if groups else []
        for group, rows in groups.items():
            lines += [f"### {group}", "", *table(rows, limit, whole), ""]
            lines += [note(rows), ""] if note else []
    return "\n".join(lines)


def summary(run: Run) -> str:
    """The short table of the README: Semi-Siamese Training's loss, and the one with trainable prototypes."""
    others = (BARE, "eager", "torch.compile")
    lines = [
        f"{about(run)}.",
        "",
        "| dtype, N, K | task | ours | " + " | ".join(others) + " |",
        "|---|---|---|---|---|---|",
    ]
    for rows in run.groups("loss").values():
        p = rows[0].problem
        mine = min((row.median for row in rows if row.is_ours), default=None)
        usual = p["margin"] == "am" and p["d"] == 512 and p["n"] >= 256 and not p["threads"]
        if mine is None or not usual or p["sst"] == (p["task"] == "prototypes"):
            continue
        cells = []
        for name in others:
            found = next((row.median for row in rows if row.provider == name), None)
            cells.append("" if found is None else f"{milliseconds(found)} ({found / mine:.2f})")
        lines.append(
            f"| {p['dtype']}, {p['n']:,}, {p['k']:,} | {p['task']} | **{milliseconds(mine)}** | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def compare(new: Run, old: Run) -> tuple[list[str], bool]:
    """Rows of both runs, and whether anything became slower beyond the noise.

    A change counts if it is over 5 % and over three times the spread of both medians together. The bare products of the same
    problem say how fast the machine was: the ratio to them is what is compared, where there is one.
    """

    def relative(run: Run) -> dict[tuple[str, str], tuple[float, float]]:
        found = {}
        for suite, (_, limit, *_) in SUITES.items():
            for group, rows in run.groups(suite).items():
                bound = next((row for row in rows if row.provider == limit), None)
                for row in rows:
                    noise = row.spread / row.median / len(row.data) ** 0.5
                    if bound is None:
                        found[group, row.provider] = row.median, noise
                    elif row is not bound:
                        found[group, row.provider] = (
                            row.median / bound.median, noise + bound.spread / bound.median / len(bound.data) ** 0.5
                        )  # fmt: skip
        return found

    before, after = relative(old), relative(new)
    lines = [
        f"new: {about(new)}",
        f"old: {about(old)}",
        "",
        "| problem | contender | new / old | |",
        "|---|---|---|---|",
    ]
    regressed = False
    for key in after.keys() & before.keys():
        ratio = after[key][0] / before[key][0]
        noise = max(0.05, 3 * (after[key][1] + before[key][1]))
        if abs(ratio - 1) <= noise:
            continue
        slower = ratio > 1 and is_ours(key[1])
        regressed |= slower
        verdict = "REGRESSION" if slower else "slower" if ratio > 1 else "faster"
        lines.append(f"| {key[0]} | {key[1]} | {ratio:.2f} | {verdict} |")
    lines[5:] = sorted(lines[5:])
    return lines, regressed


# --- plots ---------------------------------------------------------------------------------------------------------------


def plots(run: Run) -> dict[str, Figure]:
    """By name; those for which the run has at least two points."""
    colours: dict[str, str] = {}
    for row in run.rows:
        if row.suite == "loss" and row.provider != BARE:
            colours.setdefault(row.provider, COLOURS[len(colours) % len(COLOURS)])
    made = {
        "time_over_k": _over(run, "k", lambda r: 1e3 * r.median, "milliseconds", "queue slots K", colours),
        "time_over_n": _over(run, "n", lambda r: 1e3 * r.median, "milliseconds", "probes N", colours),
        "memory_over_k": _over(
            run,
            "k",
            lambda r: None if r.provider == BARE else r.extra_mib,
            "extra MiB at the peak",
            "queue slots K",
            colours,
        ),
        "roofline": _roofline(run, colours),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def _series(rows: Iterable[Row], axis: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows that differ in ``axis`` alone, by what they have in common."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        rest = tuple(f"{k}={v}" for k, v in sorted(row.problem.items()) if k != axis)
        found.setdefault(rest, []).append(row)
    return found


def _over(
    run: Run, axis: str, value: Callable[[Row], float | None], ylabel: str, xlabel: str, colours: dict[str, str]
) -> Figure | None:
    """One panel per dtype, of Semi-Siamese Training's loss with gradient: the line with most points."""
    loss = [r for r in run.rows if r.suite == "loss" and r.problem["sst"] and r.problem["task"] == "gradient"]
    panels = []
    for dtype in ("float32", "bfloat16"):
        series = _series((r for r in loss if r.problem["dtype"] == dtype and not r.problem["threads"]), axis)
        longest = max(series.values(), key=lambda rows: len({r.problem[axis] for r in rows}), default=[])
        if len({r.problem[axis] for r in longest}) > 1:
            panels.append((dtype, longest))
    if not panels:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for axes, (dtype, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for provider in dict.fromkeys(r.provider for r in rows):
            points = sorted(
                (r.problem[axis], value(r)) for r in rows if r.provider == provider and value(r) is not None
            )
            if points:
                limit = provider == BARE
                axes.plot(
                    *zip(*points, strict=True), label=provider, linewidth=1.2 if limit else 1.8, marker="" if limit else "o",
                    markersize=3.5, linestyle="--" if limit else "-", color="black" if limit else colours[provider],
                    zorder=4 if provider.startswith(OURS) else 3,
                )  # fmt: skip
        _log(axes, sorted({r.problem[axis] for r in rows}))
        fixed = rows[0].problem
        given = ", ".join(f"{name.upper()} = {fixed[name]:,}" for name in ("n", "k", "d") if name != axis)
        axes.set_title(f"{dtype}, {fixed['margin']}, {given}", loc="left", fontsize=9)
        axes.set(xlabel=xlabel, ylabel=ylabel)
    _legend(figure)
    return figure


def _roofline(run: Run, colours: dict[str, str]) -> Figure | None:
    """Operations that the task needs per second over operations per byte that must move; roofs: the fastest bare products of
    the run and the copy's bandwidth."""
    rows = [r for r in run.rows if r.suite == "loss" and r.problem["sst"] and not r.problem["threads"]]
    if not rows:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    sides = {"float32": 4, "bfloat16": 2}
    for axes, (dtype, size) in zip(figure.subplots(1, 2), sides.items(), strict=True):
        points: dict[str, list[tuple[float, float]]] = {}
        for r in (r for r in rows if r.problem["dtype"] == dtype):
            n, k, d = (r.problem[name] for name in ("n", "k", "d"))
            products = {"forward": 1, "gradient": 2, "prototypes": 4}[r.problem["task"]]
            work, moved = 2 * products * n * k * d, size * d * (n + k) * max(1, products // 2)
            points.setdefault(r.provider, []).append((work / moved, work / r.median / 1e9))
        if not points:
            continue
        roof = max((rate for _, rate in points.get(BARE, [(0, 1.0)])))
        slope = run.machine["bytes per second"] / 1e9
        span = [min(x for p in points.values() for x, _ in p) / 2, max(x for p in points.values() for x, _ in p) * 2]
        knee = min(max(roof / slope, span[0]), span[1])
        axes.plot(
            [span[0], knee, span[1]],
            [min(slope * x, roof) for x in (span[0], knee, span[1])],
            color="black",
            linewidth=1,
            linestyle="--",
            label="copies, fastest bare products",
        )
        for provider, found in points.items():
            if provider != BARE:
                axes.scatter(
                    *zip(*found, strict=True),
                    s=16,
                    color=colours[provider],
                    label=provider,
                    linewidths=0,
                    zorder=4 if is_ours(provider) else 3,
                )
        axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="useful GFLOP/s")
        axes.set_title(dtype, loc="left", fontsize=9)
        _quiet(axes)
    _legend(figure)
    return figure


def _log(axes: Axes, ticks: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set(xscale="log", yscale="log")
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{int(x):,}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    _quiet(axes)


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)


def _legend(figure: Figure) -> None:
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=2 * len(figure.axes),
        frameon=False,
        fontsize=8,
    )


def keep(sources: list[Path], target: Path) -> None:
    """The runs of one machine together, without what the report does not read: pytest-benchmark's own statistics of the rounds."""
    content, *more = (json.loads(source.read_text()) for source in sources)
    for other in more:
        for what in ("device", "threads", "torch", "python"):
            if other["machine_info"][what] != content["machine_info"][what]:
                raise SystemExit(f"{what} differs: {content['machine_info'][what]}, {other['machine_info'][what]}")
        content["benchmarks"] += other["benchmarks"]
    for row in content["benchmarks"]:
        row["stats"] = {"data": [float(f"{seconds:.5g}") for seconds in row["stats"]["data"]]}
        row.pop("options", None)
    target.write_text(json.dumps(content) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="later files replace what they measured again")
    parser.add_argument("--out", type=Path, help="folder for report.md and the plots")
    parser.add_argument("--summary", action="store_true", help="the README's short table instead")
    parser.add_argument("--keep", type=Path, help="a file for what the report reads, which is a third of it")
    parser.add_argument("--compare", type=Path, help="an earlier run")
    options = parser.parse_args(arguments)
    if options.keep:
        keep(options.run, options.keep)
        return 0
    run = Run.read(options.run[0])
    for path in options.run[1:]:
        more = Run.read(path)
        again = {row.group for row in more.rows}
        run = Run(more.machine, [row for row in run.rows if row.group not in again] + more.rows)
    if options.compare:
        lines, regressed = compare(run, Run.read(options.compare))
        print("\n".join(lines))
        return int(regressed)
    text = summary(run) if options.summary else markdown(run)
    if options.out is None or options.summary:
        print(text)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.md").write_text(text)
    for name, figure in plots(run).items():
        figure.savefig(options.out / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
