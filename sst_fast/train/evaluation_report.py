"""The HTML report of ``sst-fast eval``: tables, error curves, and whether the features have collapsed."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from sst_fast.evaluation.targets import shown
from sst_fast.train import pages
from sst_fast.train.pages import COLOURS, CURVES
from sst_fast.train.progress import SPECTRUM

OVERVIEW = ("accuracy", "balanced accuracy", "equal error rate", "TAR at FAR 0.001", "rank-1")
LOGGED = {  # columns of metrics.csv
    "loss": "Loss", "target_cosine": "Cosine with the target prototype", "hardest_cosine": "Cosine with the hardest negative",
    "effective_rank": "Effective rank", "intra_class_cosine": "Mean cosine within identities",
    "inter_class_cosine": "Mean cosine between identities", "alignment": "Alignment (lower: closer)",
    "uniformity": "Uniformity (lower: more uniform)", "accuracy": "Balanced accuracy on the test identities",
}  # fmt: skip
DET_TICKS = (1e-6, 1e-4, 1e-2, 0.05, 0.2, 0.5, 0.8, 0.95)
Target = Mapping[str, Any]  # what JSON holds of one


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the page to ``path``, replacing it in one step.

    Args:
        content: what ``evaluation.json`` holds; the training's curves are added if its ``run`` is a folder that has them.
    """
    results = content["results"]
    pages.render(
        "evaluation.html",
        path,
        run=content["run"],
        targets=[
            {
                "name": result["target"], "protocol": result["protocol"], "rows": rows(result), "figures": figures(result),
                "intervals": result["details"].get("interval"), "skipped": result["skipped"],
            }
            for result in results
        ],
        overview=overview(results),
        training=training(Path(content["run"])),
        options=content["options"],
        versions=content["versions"],
    )  # fmt: skip


def rows(result: Target) -> list[list[str]]:
    """Of the table: a figure, its value and, where there are any, its interval and threshold."""
    details = result["details"]
    table = []
    for name, value in result["figures"].items():
        row = [name, shown(name, value)]
        if "interval" in details:
            low, high = details["intervals"].get(name, ("", ""))
            threshold = details["thresholds at FAR"].get(name.removeprefix("TAR at FAR "))
            row += [f"{shown(name, low)} to {shown(name, high)}" if name in details["intervals"] else ""]
            row += [f"{threshold:.4f}" if threshold is not None else ""]
        table.append(row)
    return table


def overview(results: Sequence[Target]) -> dict[str, Any]:
    """Several targets beside each other."""
    names = [name for name in OVERVIEW if any(name in result["figures"] for result in results)]
    table = [[shown(n, r["figures"][n]) if n in r["figures"] else "" for n in names] for r in results]
    curves = {result["target"]: result for result in results if "roc" in result["details"]}
    several = len(results) > 1 and curves
    drawn = [pages.figure(title, partial(draw, curves)) for title, draw in ERRORS.items()] if several else []
    return {"names": names, "rows": table, "figures": drawn}


def figures(result: Target) -> list[Markup]:
    """Everything of a target that can be drawn."""
    details, drawn = result["details"], []
    if "roc" in details:
        drawn += [pages.figure(title, partial(draw, {"": result})) for title, draw in ERRORS.items()]
    for name, (title, draw) in DETAILS.items():
        if len(details.get(name, ())) > 1:
            drawn.append(pages.figure(title, partial(draw, result)))
    return drawn


def _errors(result: Target) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true accept rates, down to the FAR of one impostor pair."""
    far, tar = (np.array(result["details"]["roc"][name]) for name in ("far", "tar"))
    seen = far * result["details"]["impostor pairs"] >= 1 - 1e-9
    return far[seen], tar[seen]


def _roc(results: Mapping[str, Target], axes: Axes) -> None:
    for colour, (name, result) in zip(CURVES * len(results), results.items(), strict=False):
        axes.plot(*_errors(result), color=colour, label=_short(name))
    axes.set(xscale="log", xlim=(None, 1), ylim=(0, 1.02), xlabel="false accept rate", ylabel="true accept rate")
    _named(axes, results)


def _det(results: Mapping[str, Target], axes: Axes) -> None:
    """Both errors on the scale of normal deviates, on which normally distributed scores give a straight line."""
    accepts, rejects = [0.6], [0.6]
    for colour, (name, result) in zip(CURVES * len(results), results.items(), strict=False):
        far, tar = _errors(result)
        inside = (far < 1) & (tar < 1) & (tar > 0)
        far, frr = far[inside].tolist(), (1 - tar[inside]).tolist()
        axes.plot(_deviates(far), _deviates(frr), color=colour, label=_short(name), marker=".", markersize=3)
        accepts, rejects = accepts + far, rejects + frr
    axes.axline((0, 0), slope=1, color=COLOURS["muted"], linewidth=0.8, linestyle=":", zorder=0)  # equal error rate
    for axis, rates in ((axes.xaxis, accepts), (axes.yaxis, rejects)):
        low, high = _deviates([0.7 * min(rates), min(0.995, 1.05 * max(rates))])
        ticks = [tick for tick in DET_TICKS if low <= _deviates([tick])[0] <= high]
        (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(low, high)
        axis.set_major_locator(FixedLocator(_deviates(ticks)))
        axis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
        axis.set_minor_locator(NullLocator())
    axes.set(xlabel="false accept rate", ylabel="false reject rate")
    _named(axes, results)


ERRORS = {"Receiver operating characteristic": _roc, "Detection error trade-off": _det}


def _deviates(shares: Sequence[float]) -> list[float]:
    return [NormalDist().inv_cdf(share) for share in shares]


def _short(name: str) -> str:
    """The end of a path, for a legend."""
    return name if len(name) < 28 else f"…{name[-26:]}"


def _named(axes: Axes, results: Mapping[str, Target]) -> None:
    if len(results) > 1:
        pages.legend(axes)


def _histogram(result: Target, axes: Axes) -> None:
    counts = result["details"]["histogram"]
    for kind, colour in (("impostor", COLOURS["gray"]), ("genuine", COLOURS["green"])):
        density = np.array(counts[kind]) / max(1, sum(counts[kind])) / np.diff(counts["edges"])
        axes.stairs(density, counts["edges"], fill=True, alpha=0.6, color=colour, label=kind)
    for name, colour in (("inter-class cosine", COLOURS["gray"]), ("intra-class cosine", COLOURS["green"])):
        if name in result["figures"]:
            axes.axvline(result["figures"][name], color=colour, linestyle="--", linewidth=1.2, label=f"mean {name}")
    axes.set(xlabel="cosine", ylabel="density", yticks=[])
    pages.legend(axes)


def _folds(result: Target, axes: Axes) -> None:
    accuracies = 100 * np.array(result["details"]["fold accuracies"])
    axes.plot(range(1, len(accuracies) + 1), accuracies, "o", color=COLOURS["green"])
    axes.axhline(100 * result["figures"]["accuracy"], color=COLOURS["muted"], linewidth=1, linestyle="--")
    axes.set(xlabel="fold", ylabel="accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _cmc(result: Target, axes: Axes) -> None:
    rates = result["details"]["cmc"]
    axes.plot(range(1, len(rates) + 1), rates, color=COLOURS["green"])
    axes.set(xscale="log", xlabel="rank", ylabel="share found")
    ticks = [rank for rank in (1, 2, 5, 10, 20, 50, 100) if rank <= len(rates)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([str(tick) for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())


def _distractors(result: Target, axes: Axes) -> None:
    found = result["details"]["distractors"]
    axes.plot([int(n) for n in found], list(found.values()), "o-", color=COLOURS["green"])
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="distractors", ylabel="rank-1")


def _spectrum(result: Target, axes: Axes) -> None:
    shares = result["details"]["singular spectrum"]
    rank = result["figures"]["effective rank"]
    axes.plot(range(1, len(shares) + 1), shares, color=COLOURS["green"])
    axes.axvline(rank, color=COLOURS["red"], linestyle="--", linewidth=1.2, label=f"effective rank {rank:.1f}")
    axes.axhline(1 / len(shares), color=COLOURS["muted"], linewidth=0.8, linestyle=":", label="all equal")
    _shares(axes, max(shares))
    pages.legend(axes)


def _shares(axes: Axes, largest: float) -> None:
    axes.set(yscale="log", ylim=(1e-4 * largest, 2 * largest), xlabel="singular value", ylabel="share of their sum")


DETAILS = {
    "histogram": ("Cosines of genuine and impostor pairs", _histogram),
    "fold accuracies": ("Accuracy of each fold", _folds),
    "cmc": ("Cumulative match characteristic", _cmc),
    "distractors": ("Rank-1 among distractors", _distractors),
    "singular spectrum": ("Singular spectrum of the centred embeddings", _spectrum),
}


def training(run: Path) -> list[Markup]:
    """What a run's folder has logged, by epoch."""
    drawn = []
    if (file := run / "metrics.csv").is_file():
        with file.open(encoding="utf-8", newline="") as opened:
            logged = list(csv.DictReader(opened))
        for name, title in LOGGED.items():
            points = [(float(row["epoch"]), float(row[name])) for row in logged if row.get(name)]
            if points:
                drawn.append(pages.figure(title, partial(_by_epoch, points)))
    if (file := run / SPECTRUM).is_file():
        with file.open(encoding="utf-8", newline="") as opened:
            spectra = {
                int(row[0]): [float(value) for value in row[1:] if value] for row in list(csv.reader(opened))[1:]
            }
        if spectra:
            drawn.append(pages.figure("Singular spectrum", partial(_spectra, spectra)))
    return drawn


def _by_epoch(points: list[tuple[float, float]], axes: Axes) -> None:
    axes.plot(*zip(*points, strict=True), color=COLOURS["green"], marker="" if len(points) > 12 else "o", markersize=3)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _spectra(spectra: dict[int, list[float]], axes: Axes) -> None:
    """First and last epoch and two between."""
    epochs = sorted(spectra)
    chosen = sorted({epochs[math.floor(share * (len(epochs) - 1))] for share in (0, 1 / 3, 2 / 3, 1)})
    for epoch, colour in zip(
        chosen, [COLOURS[name] for name in ("gray", "ochre", "red", "green")][-len(chosen) :], strict=True
    ):
        axes.plot(range(1, len(spectra[epoch]) + 1), spectra[epoch], color=colour, label=f"epoch {epoch}")
    _shares(axes, max(max(spectra[epoch]) for epoch in chosen))
    pages.legend(axes)
