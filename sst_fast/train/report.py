"""One self-contained HTML page about the comparison of training methods."""

from __future__ import annotations

import base64
import io
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


def table(results: Mapping[Method, list[Result]]) -> dict[str, dict[str, tuple[float, float]]]:
    """method -> figure -> (mean, standard deviation over folds; 0 for one fold)."""
    out: dict[str, dict[str, tuple[float, float]]] = {}
    for method, folds in results.items():
        rows = [figures_of(fold.scores) for fold in folds]
        out[method] = {
            name: (
                statistics.mean(r[name] for r in rows),
                statistics.stdev(r[name] for r in rows) if len(rows) > 1 else 0.0,
            )
            for name in rows[0]
        }
    return out


def text_table(results: Mapping[Method, list[Result]]) -> str:
    """The table for a terminal."""
    rows = table(results)
    names = list(next(iter(rows.values())))
    lines = [f"{'':<38}" + "".join(f"{name:>21}" for name in names)]
    for method, row in rows.items():
        lines.append(f"{NAMES[method]:<38}" + "".join(f"{f'{m:.1f} ± {s:.1f}':>21}" for m, s in row.values()))
    return "\n".join(lines)


def write(
    path: Path,
    results: Mapping[Method, list[Result]],
    samples: list[Sample],
    settings: dict[str, object],
    notes: list[str],
) -> None:
    """Writes the report to ``path``, replacing it in one step."""
    pages.render(
        "report.html",
        path,
        rows={NAMES[m]: row for m, row in table(results).items()},
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
