"""One self-contained HTML page about the comparison of training methods."""

from __future__ import annotations

import base64
import io
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib import resources
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import sst_fast
from sst_fast import data
from sst_fast.evaluation import PairScores, Scores
from sst_fast.train.checkpoint import replacing
from sst_fast.train.config import Method

COLOURS: dict[str, str] = {"sst": "#0b6e4f", "conventional": "#c8553d"}
NAMES: dict[str, str] = {"sst": "Semi-Siamese Training", "conventional": "Conventional (learned class weights)"}


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
    """The numbers of the table, in percent but for the rank."""
    tar = {f"TAR at FAR {100 * far:g}%": 100 * value for far, value in scores.tar.items()}
    return {
        "accuracy": 100 * scores.accuracy,
        **tar,
        "rank-1": 100 * scores.rank1,
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
    lines = [f"{'':<38}" + "".join(f"{name:>18}" for name in names)]
    for method, row in rows.items():
        lines.append(f"{NAMES[method]:<38}" + "".join(f"{f'{m:.1f} ± {s:.1f}':>18}" for m, s in row.values()))
    return "\n".join(lines)


def write(
    path: Path,
    results: Mapping[Method, list[Result]],
    samples: list[Sample],
    settings: dict[str, object],
    notes: list[str],
) -> None:
    """Writes the report to ``path``, replacing it in one step."""
    matplotlib.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
    )
    curves = {
        "loss": "Loss",
        "target_cosine": "Cosine with the target prototype",
        "hardest_cosine": "Cosine with the hardest negative",
        "effective_rank": "Effective rank of the test embeddings",
        "intra_class_cosine": "Mean cosine of test images of one identity",
        "uniformity": "Uniformity of the test embeddings (lower: more uniform)",
    }
    template = jinja2.Template(
        resources.files("sst_fast.train").joinpath("templates/report.html").read_text(), autoescape=True
    )
    html = template.render(
        rows={NAMES[m]: row for m, row in table(results).items()},
        training=_picture(lambda axes: _training(axes, results, curves), 3, 2, (9, 8.4)),
        roc=_picture(lambda axes: _roc(axes[0], results), 1, 1, (4.6, 3.8)),
        histograms=_picture(lambda axes: _histograms(axes, results), 1, len(results), (9, 3)),
        samples=[
            {"a": _image(s.images[0]), "b": _image(s.images[1]), "genuine": s.genuine,
             "cosines": {NAMES[m]: c for m, c in s.cosines.items()}}
            for s in samples
        ],
        settings=settings,
        versions=versions(),
        notes=notes,
        folds=len(next(iter(results.values()))),
        date=date.today().isoformat(),
    )  # fmt: skip
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def versions() -> dict[str, str]:
    """What ran this: versions, device, backends."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    chosen = ", ".join(f"{name}: {choice.chosen}" for name, choice in sst_fast.backends().items())
    return {
        "sst-fast": sst_fast.__version__, "Python": platform.python_version(), "PyTorch": torch.__version__,
        "numpy": np.__version__, "device": device, "backends": chosen, "platform": platform.platform(),
    }  # fmt: skip


def _training(axes: list[Axes], results: Mapping[Method, list[Result]], curves: dict[str, str]) -> None:
    for axis, (key, title) in zip(axes, curves.items(), strict=True):
        for method, folds in results.items():
            values = np.array([[row.get(key, np.nan) for row in fold.history] for fold in folds])
            x = np.arange(1, values.shape[1] + 1)
            axis.plot(x, values.mean(0), color=COLOURS[method], label=NAMES[method])
            axis.fill_between(x, values.min(0), values.max(0), color=COLOURS[method], alpha=0.15, linewidth=0)
        axis.set_title(title, loc="left")
        axis.set_xlabel("epoch")
    axes[0].legend(frameon=False)


def _roc(axis: Axes, results: Mapping[Method, list[Result]]) -> None:
    grid = np.logspace(-3, 0, 200)
    for method, folds in results.items():
        curves = [np.interp(grid, *fold.scores.roc()) for fold in folds]
        axis.plot(grid, np.mean(curves, 0), color=COLOURS[method], label=NAMES[method])
        axis.fill_between(grid, np.min(curves, 0), np.max(curves, 0), color=COLOURS[method], alpha=0.15, linewidth=0)
    axis.set(xscale="log", xlabel="false accept rate", ylabel="true accept rate", ylim=(0, 1.02))
    axis.legend(frameon=False, loc="lower right")


def _histograms(axes: list[Axes], results: Mapping[Method, list[Result]]) -> None:
    bins = np.linspace(-0.6, 1, 60).tolist()
    for axis, (method, folds) in zip(axes, results.items(), strict=True):
        for kind, colour in (("impostor", "#8d99ae"), ("genuine", COLOURS[method])):
            pairs = PairScores.together([f.scores.pairs for f in folds])
            axis.hist(
                pairs.scores,
                bins,
                weights=getattr(pairs, kind),
                density=True,
                alpha=0.7,
                color=colour,
                label=kind,
            )
        axis.set_title(NAMES[method], loc="left")
        axis.set_xlabel("cosine")
        axis.set_yticks([])
        axis.legend(frameon=False)


def _picture(draw: Callable[[list[Axes]], None], rows: int, columns: int, size: tuple[float, float]) -> str:
    figure = Figure(figsize=size, layout="constrained")
    draw(list(np.ravel(figure.subplots(rows, columns, squeeze=False))))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _image(image: Tensor) -> str:
    from PIL import Image

    pixels = (image * data.STD + data.MEAN).clamp(0, 255).byte().cpu().numpy()
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
