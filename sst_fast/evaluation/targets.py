"""Evaluating a network on whatever a user points at: which protocol a file or folder asks for, and what comes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from sst_fast import data
from sst_fast.data import lists
from sst_fast.data.formats import opener
from sst_fast.evaluation import identification, templates
from sst_fast.evaluation.binfile import read_bin
from sst_fast.evaluation.blocked import pair_scores
from sst_fast.evaluation.collapse import collapse
from sst_fast.evaluation.distribution import FARS, PairScores
from sst_fast.evaluation.folds import Rule, is_pair_list, read_pairs, verify_in_folds
from sst_fast.evaluation.verification import evaluate

# Where insightface's detector puts eyes, nose and corners of the mouth in a crop of 112 pixels.
LANDMARKS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)  # fmt: skip


@dataclass
class Options:
    """How targets are evaluated.

    Attributes:
        flip: the features of an image and of its mirror image are added (flip test).
        size: side of the network's input in pixels; 0: that of its training. Few backbones take another.
        images: folder of the images of a list of pairs, of BLUFR or of IJB. Without it they are beside the list or BLUFR's file, and
            in loose_crop of IJB's folder.
        aligned: IJB's images are aligned crops already. Without it they are aligned by their landmarks.
        distractors: folder of images, in any sub-folder, among which each identity's images are searched for (MegaFace).
        on_error: what happens if an image cannot be read: 'stop', or 'skip', which leaves it out and names it.
        rule: how a fold's threshold is chosen, 'accuracy' or 'facexzoo'.
        folds: number of folds; 0: what the list says, or 10.
        batch: images at a time.
        workers: processes that read images; 0: this one.
        device: where the network runs; 'auto': a GPU if there is one.
        json: file for the results (.json). The report is written beside it (.html). Without it: evaluation.json in the run's
            folder, or beside the run's file.
    """

    flip: bool = False
    size: int = 0
    images: str = ""
    aligned: bool = False
    distractors: str = ""
    on_error: Literal["stop", "skip"] = "stop"
    rule: Literal["accuracy", "facexzoo"] = "accuracy"
    folds: int = 0
    batch: int = 256
    workers: int = 0
    device: str = "auto"
    json: str = ""


@dataclass
class Result:
    """What came of one target: rates as fractions; curves and intervals for whoever reads the JSON."""

    target: str
    protocol: str
    figures: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def table(self) -> str:
        """Lines for a terminal; rates in percent."""
        lines = [f"{self.target}: {self.protocol}"]
        intervals = self.details.get("intervals", {})
        for name, value in self.figures.items():
            line = f"  {name:<34}{shown(name, value):>10}"
            if name in intervals:
                low, high = intervals[name]
                line += f"  [{100 * low:.3f}, {100 * high:.3f}]"
            lines.append(line)
        if self.skipped:
            more = f" and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
            lines.append(f"  skipped, unreadable: {', '.join(self.skipped[:5])}{more}")
        return "\n".join(lines)


# Figures that are no shares.
PLAIN = {"effective rank", "intra-class cosine", "inter-class cosine", "alignment", "uniformity"}
BINS = 80  # of the histograms


def shown(name: str, value: float) -> str:
    """A figure for people: rates in percent."""
    return f"{value:.4f}" if name in PLAIN else f"{100 * value:.3f}%"


Source = str | Path | bytes
Evaluator = Callable[["Embedder", Path, Options], Result]


class Embedder:
    """A network with its input's size and channels."""

    def __init__(self, network: nn.Module, size: int, channels: int, options: Options) -> None:
        if options.device == "auto":
            options = replace(options, device="cuda" if torch.cuda.is_available() else "cpu")
        self.network, self.size, self.channels = network.to(options.device).eval(), options.size or size, channels
        self.options, self.device = options, options.device

    @torch.no_grad()
    def features(
        self, sources: Sequence[Source], names: Sequence[str], landmarks: NDArray[np.float32] | None = None
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """Features [M, D], not normalised, on the device, and which images were unreadable, bool [M] (zeros there)."""
        pictures = _Pictures(sources, names, landmarks, self.size, self.channels, self.options.on_error == "skip")
        loader = torch.utils.data.DataLoader(
            pictures, self.options.batch, num_workers=self.options.workers, generator=torch.Generator()
        )
        parts, bad = [], []
        with tqdm(total=len(sources), desc="embedding", unit="image", disable=not sys.stderr.isatty()) as bar:
            for images, unreadable in loader:
                batch = images.to(self.device)
                try:
                    found = self.network(batch).float()
                    if self.options.flip:
                        found = found + self.network(batch.flip(3)).float()
                except RuntimeError as error:
                    if not self.options.size:
                        raise
                    raise ValueError(f"size: the network cannot take {self.size} pixels ({error})") from error
                found[unreadable] = 0
                parts.append(found)
                bad.append(unreadable.clone())  # each tensor that a worker has sent keeps a file open
                bar.update(len(images))
        missing = torch.cat(bad).numpy()
        if missing.all():
            raise ValueError("no image could be read")
        return torch.cat(parts), missing

    def embed(self, sources: Sequence[Source], names: Sequence[str]) -> tuple[Tensor, NDArray[np.bool_]]:
        """As :meth:`features`, unit embeddings."""
        features, missing = self.features(sources, names)
        return nn.functional.normalize(features), missing


class _Pictures(torch.utils.data.Dataset[tuple[Tensor, bool]]):
    """Images by path or as encoded bytes; zeros and True for one that cannot be read, if those are skipped."""

    def __init__(
        self,
        sources: Sequence[Source],
        names: Sequence[str],
        landmarks: NDArray[np.float32] | None,
        size: int,
        channels: int,
        skip: bool,
    ) -> None:
        encoded = (
            [source for source in sources if isinstance(source, bytes)]
            if not isinstance(sources, data.Selected)
            else []
        )
        self.sources = encoded or data.Selected.of(sources)
        self.names, self.landmarks = names, landmarks
        self.size, self.channels, self.skip = size, channels, skip

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        try:
            return data.to_tensor(self._image(index)), False
        except data.DataError:
            if not self.skip:
                raise
            return torch.zeros(self.channels, self.size, self.size), True

    def _image(self, index: int) -> Image.Image:
        if isinstance(self.sources, data.Selected):
            image = self.sources.load(index, self.channels)
        else:
            image = data.decode(self.sources[index], self.names[index], self.channels)
        if self.landmarks is not None:
            return align(image, self.landmarks[index], self.size)
        return data.square(image, self.size)


def align(image: Image.Image, landmarks: NDArray[np.float32], size: int) -> Image.Image:
    """The crop of ``size`` pixels in which the five ``landmarks`` [5, 2] of ``image`` lie where networks expect them: by the
    similarity of least squares (Umeyama, PAMI 1991)."""
    wanted, given = LANDMARKS * size / 112, landmarks.astype(np.float64)
    a, b = given - given.mean(0), wanted - wanted.mean(0)
    # Plane similarities are multiplications by a complex number; this one maps the crop to the image.
    crop, source = b[:, 0] + 1j * b[:, 1], a[:, 0] + 1j * a[:, 1]
    factor = (crop.conj() * source).sum() / (crop.conj() * crop).sum().real
    shift = complex(*given.mean(0)) - factor * complex(*wanted.mean(0))
    numbers = (factor.real, -factor.imag, shift.real, factor.imag, factor.real, shift.imag)
    return image.transform((size, size), Image.Transform.AFFINE, numbers, Image.Resampling.BILINEAR)


def evaluate_targets(
    network: nn.Module, size: int, channels: int, targets: Sequence[str], options: Options
) -> list[Result]:
    """Evaluates a network on each target, by what it is (see :func:`protocol_of`).

    Args:
        network: maps images [B, channels, size, size] to features [B, D].
        size, channels: of its input.
        targets: files, folders or 'orl'.
        options: how.

    Raises:
        ValueError: a target is nothing known, or not as its protocol wants it. FileNotFoundError: it does not exist.
    """
    protocols = [protocol_of(target) for target in targets]  # all are known before the first takes its time
    embedder = Embedder(network, size, channels, options)
    return [run(embedder, Path(target), options) for target, run in zip(targets, protocols, strict=True)]


def protocol_of(target: str) -> Evaluator:
    """How a target is evaluated, by what it is:

    - ``.bin``: insightface's verification set; a text file of pairs: verification in folds;
    - ``.mat``: BLUFR's configuration;
    - a folder with ``*_face_tid_mid.txt`` (or with ``meta`` that has it): IJB-B or IJB-C;
    - anything that :func:`sst_fast.data.faces` opens: all pairs, identification.

    Raises:
        FileNotFoundError: it does not exist. ValueError: it is nothing of these.
    """
    path = Path(target)
    if path.is_dir() and templates.meta_folder(path):
        return _ijb
    if path.is_file():
        if path.suffix in (".bin", ".mat"):
            return _bin if path.suffix == ".bin" else _blufr
        if path.suffix.lower() in lists.SUFFIXES and is_pair_list(path):
            return _pair_list
    try:
        opener(target)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"target: {error}") from None
    return _identities


def as_json(run: str, results: Sequence[Result], options: Options) -> dict[str, Any]:
    """Everything that was found, in what JSON knows: numbers that are not finite become None."""
    return _plain({"run": run, "options": asdict(options), "results": [asdict(result) for result in results]})  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


def _identities(embedder: Embedder, path: Path, options: Options) -> Result:
    paths, labels = data.flat(data.faces(str(path)))
    x, missing = embedder.embed(paths, [str(p) for p in paths])
    kept = torch.from_numpy(~missing)
    x, labels = x[kept.to(x.device)], labels[kept]
    scores = evaluate(x, labels, FARS, progress=sys.stderr.isatty())
    rates, details = _rates(scores.pairs)
    features = collapse(x, labels, scores.spectrum)
    figures = {"balanced accuracy": scores.accuracy, **rates, "rank-1": scores.rank1, "rank-5": scores.rank5}
    if options.distractors:
        root = Path(options.distractors)
        others = data.images_below(root)
        if not others:
            raise ValueError(f"distractors: no image below {root}")
        far, bad = embedder.embed(others, [str(p) for p in others])
        far = far[torch.from_numpy(~bad).to(far.device)]
        found = identification.rank1_among_distractors(x, labels, far, progress=sys.stderr.isatty())
        figures |= {f"rank-1 among {n:,} distractors": rate for n, rate in found.items()}
        details["distractors"] = found
        details["skipped distractors"] = _names(others, bad)
    details |= {"images": len(x), "cmc": scores.cmc.tolist(), "singular spectrum": features.spectrum.tolist()}
    return Result(str(path), "all pairs, identification", figures | features.figures(), details, _names(paths, missing))


def _bin(embedder: Embedder, path: Path, options: Options) -> Result:
    found = read_bin(path)
    names = [f"{path}, image {i}" for i in range(len(found.images))]
    x, missing = embedder.embed(found.images, names)
    rows = np.arange(len(found.images)).reshape(-1, 2)
    return _folds(path, x, missing, (rows[:, 0], rows[:, 1]), found.genuine, 10, options, names)


def _pair_list(embedder: Embedder, path: Path, options: Options) -> Result:
    found = read_pairs(path)
    root = Path(options.images) if options.images else path.parent
    paths = [root / name for name in found.paths]
    x, missing = embedder.embed(paths, [str(p) for p in paths])
    return _folds(path, x, missing, (found.first, found.second), found.genuine, found.folds, options, paths)


def _folds(
    path: Path,
    x: Tensor,
    missing: NDArray[np.bool_],
    rows: tuple[NDArray[np.int64], NDArray[np.int64]],
    genuine: NDArray[np.bool_],
    folds: int,
    options: Options,
    names: Sequence[object],
) -> Result:
    kept = ~(missing[rows[0]] | missing[rows[1]])
    scores = pair_scores(x, *(torch.from_numpy(r[kept]) for r in rows))
    genuine, rule = genuine[kept], options.rule
    found = verify_in_folds(scores, genuine, folds=options.folds or folds, rule=rule)
    rates, details = _rates(PairScores.of(scores[genuine], scores[~genuine]))
    details |= {
        "pairs": len(scores),
        "fold accuracies": found.accuracy.tolist(),
        "thresholds": found.thresholds.tolist(),
    }
    protocol = f"{len(found.accuracy)}-fold verification of {len(scores)} pairs, threshold by {_RULES[rule]}"
    figures = {"accuracy": found.mean, "standard error": found.standard_error, **rates}
    return Result(str(path), protocol, figures, details, _names(names, missing))


_RULES: dict[Rule, str] = {"accuracy": "accuracy", "facexzoo": "FaceX-Zoo's rule"}


def _blufr(embedder: Embedder, path: Path, options: Options) -> Result:
    config = identification.read_blufr(path)
    root = Path(options.images) if options.images else path.parent
    paths = [root / name for name in config.images]
    # LFW's folders have the person's name, which is the file's without its number.
    paths = [p if p.exists() else root / p.stem.rpartition("_")[0] / p.name for p in paths]
    x, missing = embedder.embed(paths, [str(p) for p in paths])
    kept = {name: [rows[~missing[rows]] for rows in getattr(config, name)] for name in ("test", "gallery", "probe")}
    found = identification.blufr(x, identification.Blufr(config.images, config.labels, **kept))
    details = {
        "verification": {f"{far:g}": rates.tolist() for far, rates in found.verification.items()},
        "identification": {f"{far:g}": rates.tolist() for far, rates in found.identification.items()},
    }
    protocol = f"BLUFR, {len(config.test)} trials, mean - standard deviation"
    return Result(str(path), protocol, found.figures(), details, _names(paths, missing))


def _ijb(embedder: Embedder, path: Path, options: Options) -> Result:
    ijb = templates.read_ijb(path)
    root = Path(options.images) if options.images else path / "loose_crop"
    paths = [root / name for name in ijb.images]
    x, missing = embedder.features(paths, [str(p) for p in paths], None if options.aligned else ijb.landmarks)
    ijb = ijb.without(missing)
    names, pooled = templates.pool_templates(x, ijb)
    rates, details = _rates(templates.template_verification(names, pooled, ijb))
    figures, found = dict(rates), templates.template_identification(names, pooled, ijb)
    if found is not None:
        figures |= {f"1:N rank-{k}": float(found.cmc[k - 1]) for k in (1, 5, 10)}
        figures |= {f"1:N DIR at FAR {far:g}, rank 1": rate for far, rate in found.dir.items()}
        details["cmc"] = found.cmc.tolist()
    protocol = f"IJB, {len(names)} templates, {len(ijb.first)} pairs"
    return Result(str(path), protocol, figures, details, _names(paths, missing))


def _rates(pairs: PairScores) -> tuple[dict[str, float], dict[str, Any]]:
    """Equal error rate and TAR at every FAR that allows at least one impostor pair; intervals, ROC and histograms."""
    impostors = int(pairs.check().impostor.sum())
    rates = {far: rate for far, rate in pairs.tar_at(FARS).items() if far * impostors >= 1}
    figures = {"equal error rate": pairs.eer()} | {f"TAR at FAR {far:g}": rate.value for far, rate in rates.items()}
    grid = [float(far) for far in np.logspace(-6, 0, 61)]
    details = {
        "genuine pairs": int(pairs.genuine.sum()),
        "impostor pairs": impostors,
        "interval": "Wilson, 95 %, pairs taken as independent",
        "intervals": {f"TAR at FAR {far:g}": [rate.low, rate.high] for far, rate in rates.items()},
        "thresholds at FAR": {f"{far:g}": rate.threshold for far, rate in rates.items()},
        "roc": {"far": grid, "tar": [rate.value for rate in pairs.tar_at(grid).values()]},
        "histogram": _histogram(pairs),
    }
    return figures, details


def _histogram(pairs: PairScores) -> dict[str, list[float]]:
    """How many pairs of each kind have a cosine between two ``edges``."""
    edges = np.linspace(min(-0.2, float(pairs.scores[0])), max(1.0, float(pairs.scores[-1])), BINS + 1)
    kinds = {
        kind: np.histogram(pairs.scores, edges, weights=getattr(pairs, kind))[0] for kind in ("genuine", "impostor")
    }
    return {"edges": edges.tolist()} | {kind: counts.tolist() for kind, counts in kinds.items()}


def _names(names: Sequence[object], missing: NDArray[np.bool_]) -> list[str]:
    return [str(name) for name, gone in zip(names, missing, strict=True) if gone]
