"""One self-contained HTML page about the comparison of training methods."""

from __future__ import annotations

import base64
import io
import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from sst_fast import data
from sst_fast.evaluation import PairScores, Scores
from sst_fast.train import pages
from sst_fast.train.config import Method

COLOURS: dict[str, str] = {"sst": pages.COLOURS["green"], "conventional": pages.COLOURS["red"]}
NAMES: dict[str, str] = {"sst": "Semi-Siamese Training", "conventional": "Conventional (learned class weights)"}
CURVES = {
    "loss": "Loss",
    "target_cosine": "Cosine with the target prototype",
    "hardest_cosine": "Cosine with the hardest negative",
    "effective_rank": "Effective rank of the test embeddings",
    "intra_class_cosine": "Mean cosine of test images of one identity",
    "inter_class_cosine": "Mean cosine of test images of two identities",
    "alignment": "Alignment of the test embeddings (lower: closer)",
    "uniformity": "Uniformity of the test embeddings (lower: more uniform)",
}


@dataclass
class Result:
    """One fold of one method: its metrics by epoch and its scores."""

    history: list[dict[str, float]]
    scores: Scores


@dataclass
class Sample:
    """A pair of test images with the cosine of each method."""

    images: tuple[Tensor, Tensor]
    genuine: bool
    cosines: Mapping[Method, float]


def figures_of(scores: Scores) -> dict[str, float]:
    """The numbers of the table. Names end in their unit; the effective rank has none."""
    tar = {f"TAR at FAR {far:g}, %": 100 * value for far, value in scores.tar.items()}
    return {
        "accuracy, %": 100 * scores.accuracy,
        **tar,
        "rank-1, %": 100 * scores.rank1,
        "effective rank": scores.effective_rank,
    }


@dataclass
class Row:
    """One figure over the folds."""

    name: str
    methods: dict[str, tuple[float, float]]  # by method: mean, standard deviation over folds (0 for one fold)
    difference: tuple[float, float] | None  # SST less conventional, by fold: mean, standard error; None for one fold


def table(results: Mapping[Method, list[Result]]) -> list[Row]:
    """What both methods reach, and how far they are apart: folds are the same for both, so differences are taken fold by fold."""
    found = {method: [figures_of(fold.scores) for fold in folds] for method, folds in results.items()}
    rows = []
    for name in found["sst"][0]:
        values = {method: [figures[name] for figures in folds] for method, folds in found.items()}
        apart = [a - b for a, b in zip(values["sst"], values["conventional"], strict=True)]
        several = len(apart) > 1
        rows.append(
            Row(
                name,
                {m: (statistics.mean(v), statistics.stdev(v) if several else 0.0) for m, v in values.items()},
                (statistics.mean(apart), statistics.stdev(apart) / len(apart) ** 0.5) if several else None,
            )
        )
    return rows


# Not TAR at FAR 0.001, which rests on a handful of pairs, and not the effective rank, which is no merit in itself.
JUDGED = ("accuracy, %", "TAR at FAR 0.1, %", "TAR at FAR 0.01, %", "rank-1, %")
LEVEL = 0.05  # how often chance alone may name a better method


def verdict(rows: list[Row], folds: int) -> str:
    """In a sentence or two, in which of the figures JUDGED the methods differ by more than chance would move them: by a t-test over folds,
    at LEVEL for all of them together (Bonferroni)."""
    if folds == 1:
        return "One fold does not tell how far chance moves the differences."
    from scipy.stats import t as student

    most = float(student.ppf(1 - LEVEL / len(JUDGED) / 2, folds - 1))
    better: dict[Method, list[str]] = {"sst": [], "conventional": []}
    for row in rows:
        if row.name in JUDGED and row.difference is not None:
            mean, error = row.difference
            if error > 0 and abs(mean) > most * error:
                better["sst" if mean > 0 else "conventional"].append(row.name.removesuffix(", %"))
    told = [f"{NAMES[method]} is better in {', '.join(names)}." for method, names in better.items() if names]
    test = f"{folds} folds, t-test, {100 * LEVEL:g} % for {len(JUDGED)} figures together"
    if not told:
        return f"No difference in accuracy, TAR at FAR 0.1 and 0.01, or rank-1 is more than chance may make ({test})."
    return " ".join(
        [*told, f"That is more than chance may make ({test}); the other figures do not tell which method is better."]
    )


def shown(value: tuple[float, float] | None, sign: str = "") -> str:
    """Mean and spread."""
    return "" if value is None else f"{value[0]:{sign}.1f} ± {value[1]:.1f}"


def text_table(results: Mapping[Method, list[Result]]) -> str:
    """The table for a terminal."""
    rows = table(results)
    lines = [f"{'':<22}" + "".join(f"{NAMES[m]:>39}" for m in results) + f"{'difference':>15}"]
    for row in rows:
        values = "".join(f"{shown(row.methods[m]):>39}" for m in results)
        lines.append(f"{row.name:<22}{values}{shown(row.difference, '+'):>15}")
    folds = len(results["sst"])
    about = "Mean ± standard deviation over folds; differences: mean ± standard error."
    return "\n".join([*lines, about, verdict(rows, folds)])


def claim() -> dict[str, Any]:
    """What ``bench.claims`` has found on a larger set: of each loss and method mean and standard deviation, and a sentence."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("claim.json").read_text(encoding="utf-8"))
    return found


def write(
    path: Path,
    results: Mapping[Method, list[Result]],
    samples: list[Sample],
    settings: dict[str, object],
    notes: list[str],
) -> None:
    """Writes the report to ``path``, replacing it in one step."""
    rows, found = table(results), claim()
    pages.render(
        "report.html",
        path,
        rows=rows,
        verdict=verdict(rows, len(results["sst"])),
        names=[NAMES[m] for m in results],
        shown=shown,
        claim=found,
        claim_page=_page_of_claim(path),
        claim_figure=pages.figure(f"{found['data'].capitalize()}: true accept rate at a false accept rate of 0.001, %", partial(_claim, found["losses"])),
        training=[
            *(pages.figure(title, partial(_by_epoch, results, name)) for name, title in CURVES.items()),
            pages.figure("Singular spectrum of the test embeddings", partial(_spectra, results)),
        ],
        verification=[
            pages.figure("Receiver operating characteristic", partial(_roc, results)),
            *(pages.figure(NAMES[method], partial(_histogram, method, folds)) for method, folds in results.items()),
        ],
        samples=[
            {"a": _image(s.images[0]), "b": _image(s.images[1]), "genuine": s.genuine,
             "cosines": {NAMES[m]: c for m, c in s.cosines.items()}}
            for s in samples
        ],
        settings=settings,
        versions=pages.versions(),
        notes=notes,
        folds=len(next(iter(results.values()))),
    )  # fmt: skip


def _by_epoch(results: Mapping[Method, list[Result]], name: str, axes: Axes) -> None:
    for method, folds in results.items():
        values = np.array([[row.get(name, np.nan) for row in fold.history] for fold in folds])
        _line_and_band(axes, method, np.arange(1, values.shape[1] + 1), values)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if name == next(iter(CURVES)):
        pages.legend(axes)


def _spectra(results: Mapping[Method, list[Result]], axes: Axes) -> None:
    for method, folds in results.items():
        values = np.array([fold.scores.spectrum for fold in folds])
        _line_and_band(axes, method, np.arange(1, values.shape[1] + 1), values)
    axes.set(yscale="log", ylim=(1e-5, 1), xlabel="singular value", ylabel="share of their sum")


def _page_of_claim(report: Path) -> str:
    """From the report to docs/claim.md; empty where the package lies without its source."""
    page = Path(__file__).parents[2] / "docs" / "claim.md"
    try:
        return Path(os.path.relpath(page, report.parent)).as_posix() if page.exists() else ""
    except ValueError:  # on another drive
        return ""


def _claim(found: Mapping[str, Mapping[str, tuple[float, float]]], axes: Axes) -> None:
    for i, method in enumerate(("conventional", "sst")):
        places = [j + 0.38 * (i - 0.5) for j in range(len(found))]
        means, deviations = zip(*(methods[method] for methods in found.values()), strict=True)
        axes.bar(
            places,
            means,
            0.36,
            yerr=deviations,
            color=COLOURS[method],
            ecolor=pages.COLOURS["ink"],
            label=NAMES[method],
        )
    axes.set_xticks(range(len(found)), list(found))
    axes.grid(False, axis="x")
    pages.legend(axes)


def _roc(results: Mapping[Method, list[Result]], axes: Axes) -> None:
    grid = np.logspace(-3, 0, 200)
    for method, folds in results.items():
        _line_and_band(axes, method, grid, np.array([np.interp(grid, *fold.scores.roc()) for fold in folds]))
    axes.set(xscale="log", xlabel="false accept rate", ylabel="true accept rate", ylim=(0, 1.02))
    pages.legend(axes)


def _line_and_band(axes: Axes, method: Method, x: NDArray[Any], values: NDArray[Any]) -> None:
    """Mean of the folds (rows), and from the smallest to the largest."""
    axes.plot(x, values.mean(0), color=COLOURS[method], label=NAMES[method])
    axes.fill_between(x, values.min(0), values.max(0), color=COLOURS[method], alpha=0.15, linewidth=0)


def _histogram(method: Method, folds: list[Result], axes: Axes) -> None:
    pairs = PairScores.together([fold.scores.pairs for fold in folds])
    bins = np.linspace(-0.6, 1, 60).tolist()
    for kind, colour in (("impostor", pages.COLOURS["gray"]), ("genuine", COLOURS[method])):
        axes.hist(pairs.scores, bins, weights=getattr(pairs, kind), density=True, alpha=0.7, color=colour, label=kind)
    axes.set(xlabel="cosine", yticks=[])
    pages.legend(axes)


def _image(image: Tensor) -> str:
    from PIL import Image

    pixels = (image * data.STD + data.MEAN).clamp(0, 255).byte().cpu().numpy()
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
