"""IJB-B's and IJB-C's protocols: templates of several images and video frames, compared 1:1 and 1:N."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sst_fast.evaluation.blocked import Found, cmc, pair_scores, search
from sst_fast.evaluation.distribution import FARS, PairScores
from sst_fast.evaluation.identification import dir_at_far

Search = tuple[NDArray[np.int64], NDArray[np.int64]]  # templates and their subjects


@dataclass(frozen=True)
class Ijb:
    """The official meta files.

    Attributes:
        images: paths relative to the image folder [M].
        weights: float32 [M], detection scores, or None; landmarks: float32 [M, 5, 2], eyes, nose and corners of the mouth in
            pixels, or None.
        image, template, media: int64 [R], rows of the template list: row number of the image, template, media (all frames of
            a video have one).
        first, second: int64 [P], templates of the 1:1 pairs; genuine: bool [P].
        galleries: name -> (templates, subjects) of the 1:N protocol; probes: the same for the probes. Empty if not there.
    """

    images: list[str]
    weights: NDArray[np.float32] | None
    landmarks: NDArray[np.float32] | None
    image: NDArray[np.int64]
    template: NDArray[np.int64]
    media: NDArray[np.int64]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    genuine: NDArray[np.bool_]
    galleries: dict[str, Search] = field(default_factory=dict)
    probes: Search | None = None

    def check(self) -> Ijb:
        """Itself.

        Raises:
            ValueError: a template is compared that has no image.
        """
        known = np.unique(self.template)
        searches = [*self.galleries.values(), *([self.probes] if self.probes is not None else [])]
        for templates in [self.first, self.second, *(templates for templates, _ in searches)]:
            unknown = np.setdiff1d(templates, known)
            if len(unknown):
                raise ValueError(f"template {unknown[0]} is compared, but there is no image of it")
        return self

    def without(self, missing: NDArray[np.bool_]) -> Ijb:
        """Without the images of which ``missing``, bool [M], is true."""
        keep = ~missing[self.image]
        rows = {name: getattr(self, name)[keep] for name in ("image", "template", "media")}
        return replace(self, **rows).check()


def meta_folder(folder: Path) -> Path | None:
    """The folder with the meta files: itself or ``meta`` in it; None if there are none."""
    for here in (folder, folder / "meta"):
        if here.is_dir() and any(here.glob("*_face_tid_mid.txt")):
            return here
    return None


def read_ijb(folder: str | Path) -> Ijb:
    """The meta files of IJB-B or IJB-C as insightface distributes them, in ``folder`` or ``folder/meta``:

    - ``*_face_tid_mid.txt``: image, template, media a line;
    - ``*_template_pair_label.txt``: template, template, 1 or 0 a line;
    - ``*_name_5pts_score.txt``, if there: image, ten coordinates, detection score a line;
    - ``*_1N_gallery_*.csv``, ``*_1N_probe_mixed.csv``, if there: a header, then TEMPLATE_ID, SUBJECT_ID, ...

    Raises:
        FileNotFoundError: a file that must be there is not. ValueError: a line is of another form; names it.
    """
    meta = meta_folder(Path(folder))
    if meta is None:
        raise FileNotFoundError(f"{folder} has no *_face_tid_mid.txt, nor has its folder meta")
    faces = _columns(_only(meta, "*_face_tid_mid.txt"), ("image", "template", "media"))
    pairs = _columns(_only(meta, "*_template_pair_label.txt"), ("template", "template", "label"))
    names = list(dict.fromkeys(faces[0]))
    number = {name: i for i, name in enumerate(names)}
    weights, landmarks = _detections(meta, names)
    galleries = {path.stem.rpartition("_")[2]: _search(path) for path in sorted(meta.glob("*_1N_gallery_*.csv"))}
    mixed = sorted(meta.glob("*_1N_probe_mixed.csv"))
    found = Ijb(
        names,
        weights,
        landmarks,
        np.array([number[name] for name in faces[0]], np.int64),
        _integers(meta, faces[1]),
        _integers(meta, faces[2]),
        _integers(meta, pairs[0]),
        _integers(meta, pairs[1]),
        _integers(meta, pairs[2]) == 1,
        galleries,
        _search(mixed[0]) if mixed else None,
    )
    return found.check()


@torch.no_grad()
def pool_templates(features: Tensor, ijb: Ijb) -> tuple[NDArray[np.int64], Tensor]:
    """Templates [T], ascending, and their unit embeddings [T, D], float32.

    Features of one media are averaged, those averages are summed over the template's media, the sum is normalised (Whitelam et
    al., CVPRW 2017; the order of insightface's evaluation). ``features`` [M, D] are weighted by detection scores before, if the meta
    files have them; whether they are normalised before is the caller's choice.
    """
    templates, template = np.unique(ijb.template, return_inverse=True)
    media = np.unique(np.stack([template, ijb.media]), axis=1, return_inverse=True)
    owner, part = media[0][0], media[1].reshape(-1)
    weighted = features.float()
    if ijb.weights is not None:
        weighted = weighted * torch.from_numpy(ijb.weights).to(features.device)[:, None]
    rows = torch.from_numpy(part).to(features.device)
    means = torch.zeros(len(owner), features.shape[1], device=features.device)
    for chunk in torch.arange(len(part)).split(1 << 14):
        means.index_add_(0, rows[chunk], weighted[torch.from_numpy(ijb.image[chunk.numpy()]).to(features.device)])
    means /= torch.bincount(rows, minlength=len(owner))[:, None]
    sums = torch.zeros(len(templates), features.shape[1], device=features.device)
    sums.index_add_(0, torch.from_numpy(owner).to(features.device), means)
    return templates, torch.nn.functional.normalize(sums)


def template_verification(templates: NDArray[np.int64], embeddings: Tensor, ijb: Ijb) -> PairScores:
    """Scores of the listed pairs of templates (1:1)."""
    rows = (torch.from_numpy(np.searchsorted(templates, part)) for part in (ijb.first, ijb.second))
    scores = pair_scores(embeddings, *rows)
    return PairScores.of(scores[ijb.genuine], scores[~ijb.genuine]).check()


@dataclass(frozen=True)
class Identified:
    """1:N. cmc [100]: closed-set, over both galleries together; dir: mean over the galleries of the detection and
    identification rate at rank 1 at each false alarm rate (the other gallery's subjects are the unknown ones)."""

    cmc: NDArray[np.float64]
    dir: dict[float, float]


def template_identification(
    templates: NDArray[np.int64], embeddings: Tensor, ijb: Ijb, fars: Sequence[float] = FARS[:2]
) -> Identified | None:
    """Probe templates searched in the galleries (1:N; Maze et al., ICB 2018); None if the meta files have none."""
    if not ijb.galleries or ijb.probes is None:
        return None

    def found(gallery: Search) -> Found:
        parts = [_unique(s) for s in (ijb.probes, gallery) if s is not None]
        rows = [embeddings[torch.from_numpy(np.searchsorted(templates, s[0]))] for s in parts]
        return search(*rows, *(torch.from_numpy(s[1]) for s in parts))

    both = tuple(np.concatenate([g[k] for g in ijb.galleries.values()]) for k in (0, 1))
    each = [dir_at_far(found(g), fars) for g in ijb.galleries.values()] if len(ijb.galleries) > 1 else []
    rates = {far: float(np.mean([rate[far] for rate in each])) for far in fars} if each else {}
    return Identified(cmc(found((both[0], both[1])).rank), rates)


def _unique(part: Search) -> Search:
    """Each template once: the official files repeat one for each of its images."""
    templates, first = np.unique(part[0], return_index=True)
    return templates, part[1][first]


def _detections(meta: Path, names: list[str]) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Detection scores [M] and landmarks [M, 5, 2] of the images, if there is the file."""
    files = sorted(meta.glob("*_name_5pts_score.txt"))
    if not files:
        return None, None
    table = {}
    for number, line in enumerate(_lines(files[0]), 1):
        try:
            if len(line) != 12:
                raise ValueError
            table[line[0]] = [float(value) for value in line[1:]]
        except ValueError:
            raise ValueError(
                f"{files[0]}, line {number}: expected 'image, ten coordinates, score', got {line!r}"
            ) from None
    missing = next((name for name in names if name not in table), None)
    if missing is not None:
        raise ValueError(f"{files[0]} has no score for {missing}")
    values = np.array([table[name] for name in names], np.float32)
    return values[:, 10], values[:, :10].reshape(-1, 5, 2)


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{folder} has no {pattern}")
    return found[0]


def _lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _columns(path: Path, names: tuple[str, ...]) -> list[list[str]]:
    rows = _lines(path)
    for number, row in enumerate(rows, 1):
        if len(row) != len(names) or not all(field.lstrip("-").isdigit() for field in row[1:]):
            raise ValueError(f"{path}, line {number}: expected '{' '.join(names)}', got {' '.join(row)!r}")
    if not rows:
        raise ValueError(f"{path} is empty")
    return [list(column) for column in zip(*rows, strict=True)]


def _integers(folder: Path, column: list[str]) -> NDArray[np.int64]:
    try:
        return np.array(column, dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{folder}: {error}") from None


def _search(path: Path) -> Search:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))[1:]
    for number, row in enumerate(rows, 2):
        if len(row) < 2 or not (row[0].strip().isdigit() and row[1].strip().isdigit()):
            raise ValueError(f"{path}, line {number}: expected 'TEMPLATE_ID,SUBJECT_ID,...', got {','.join(row)!r}")
    if not rows:
        raise ValueError(f"{path} is empty")
    return np.array([int(row[0]) for row in rows], np.int64), np.array([int(row[1]) for row in rows], np.int64)
