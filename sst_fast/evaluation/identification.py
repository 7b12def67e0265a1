"""Identification: open-set search of a gallery, BLUFR's trials, MegaFace's distractors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sst_fast.evaluation.blocked import Found, all_pairs, pair_scores, search


def dir_at_far(found: Found, fars: Sequence[float], rank: int = 1) -> dict[float, float]:
    """Detection and identification rate at false alarm rates, open-set (Grother and Phillips; Liao et al., IJCB 2014).

    The false alarm rate of a threshold is the share of probes without a partner in the gallery whose best score is at or above
    it; the detection and identification rate is the share of probes with one whose best genuine score is at or above it and
    has fewer than ``rank`` impostors before it (ties count against it). Given is the highest rate of all thresholds whose false
    alarm rate is not above the one asked for.

    Args:
        found: what :func:`search` gave for all probes.
        fars: false alarm rates.
        rank: at which the partner must be found.

    Raises:
        ValueError: all probes have a partner in the gallery, or none has.
    """
    unknown = found.rank < 0
    if unknown.all() or not unknown.any():
        raise ValueError(
            f"open-set search needs probes with and without a partner, got {(~unknown).sum()} and {unknown.sum()}"
        )
    alarms = np.sort(found.best_impostor[unknown])[::-1]
    right = found.best_genuine[~unknown & (found.rank < rank)]
    rates = {}
    for far in fars:
        allowed = int(far * len(alarms) * (1 + 1e-9))
        # The threshold lies just above the first alarm too many.
        accepted = right > alarms[allowed] if allowed < len(alarms) else np.ones(len(right), bool)
        rates[far] = float(accepted.sum() / (~unknown).sum())
    return rates


@dataclass(frozen=True)
class Blufr:
    """BLUFR's configuration: image names [M], labels [M], and for each trial the row numbers of test, gallery and probe
    images."""

    images: list[str]
    labels: NDArray[np.int64]
    test: list[NDArray[np.int64]]
    gallery: list[NDArray[np.int64]]
    probe: list[NDArray[np.int64]]


@dataclass(frozen=True)
class BlufrResult:
    """Of each trial [trials]: verification rate at each FAR, detection and identification rate at rank 1 at each FAR."""

    verification: dict[float, NDArray[np.float64]]
    identification: dict[float, NDArray[np.float64]]

    def figures(self) -> dict[str, float]:
        """Mean minus standard deviation over trials, which is what the benchmark reports."""
        out = {f"VR at FAR {far:g}": _lower(v) for far, v in self.verification.items()}
        return out | {f"DIR at FAR {far:g}, rank 1": _lower(v) for far, v in self.identification.items()}


def _lower(values: NDArray[np.float64]) -> float:
    return float(values.mean() - (values.std(ddof=1) if len(values) > 1 else 0.0))


def read_blufr(path: str | Path) -> Blufr:
    """BLUFR's ``blufr_lfw_config.mat``, a MATLAB file of variables imageList, labels, testIndex, galIndex, probIndex.

    Raises:
        FileNotFoundError: no such file. ValueError: it is none, or lacks a variable.
    """
    from scipy.io import loadmat

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        found = loadmat(path, variable_names=("imageList", "labels", "testIndex", "galIndex", "probIndex"))
    except Exception as error:  # a broken file can raise anything
        raise ValueError(f"{path} is no BLUFR configuration: {error}") from None
    for name in ("imageList", "labels", "testIndex", "galIndex", "probIndex"):
        if name not in found:
            raise ValueError(f"{path} is no BLUFR configuration: it has no variable {name}")
    images = [str(cell.ravel()[0]) for cell in found["imageList"].ravel()]
    labels = found["labels"].ravel().astype(np.int64)
    trials = {}
    for name in ("testIndex", "galIndex", "probIndex"):
        trials[name] = [cell.ravel().astype(np.int64) - 1 for cell in found[name].ravel()]  # MATLAB counts from 1
        if any(len(t) == 0 or t.min() < 0 or t.max() >= len(images) for t in trials[name]):
            raise ValueError(f"{path}: {name} must hold numbers of images in [1, {len(images)}]")
    if len(labels) != len(images):
        raise ValueError(f"{path}: {len(images)} images, but {len(labels)} labels")
    return Blufr(images, labels, trials["testIndex"], trials["galIndex"], trials["probIndex"])


def blufr(
    embeddings: Tensor, config: Blufr, fars: Sequence[float] = (1e-3,), alarms: Sequence[float] = (1e-2,)
) -> BlufrResult:
    """Liao, Lei, Yi, Li, "A benchmark study of large-scale unconstrained face recognition" (IJCB 2014): in each of 10 trials all
    pairs of the test images are verified, and the probes searched in the gallery, open-set.

    Args:
        embeddings: unit [M, D], in the order of the configuration's images.
        config: see :func:`read_blufr`.
        fars: of verification (0.1 % in the paper); alarms: false alarm rates of identification (1 %).
    """
    labels = torch.from_numpy(config.labels)
    verified, identified = [], []
    for test, gallery, probe in zip(config.test, config.gallery, config.probe, strict=True):
        t, g, p = (torch.from_numpy(rows) for rows in (test, gallery, probe))
        rates = all_pairs(embeddings[t], labels[t], fars).pairs.tar_at(fars)
        verified.append([rates[far].value for far in fars])
        rate = dir_at_far(search(embeddings[p], embeddings[g], labels[p], labels[g]), alarms)
        identified.append([rate[far] for far in alarms])
    return BlufrResult(
        dict(zip(fars, np.array(verified).T, strict=True)), dict(zip(alarms, np.array(identified).T, strict=True))
    )


def rank1_among_distractors(
    embeddings: Tensor,
    labels: Tensor,
    distractors: Tensor,
    sizes: Sequence[int] = (10**3, 10**4, 10**5, 10**6),
    *,
    progress: bool = False,
) -> dict[int, float]:
    """MegaFace's challenge 1 (Kemelmacher-Shlizerman et al., CVPR 2016): every ordered pair (probe, partner) of one identity; the
    partner alone among the first n distractors must be nearer to the probe than all of them. Ties count against it.

    Args:
        embeddings: unit [M, D]; labels: integers [M]; distractors: unit [N, D], of none of these identities.
        sizes: numbers n; those above N are replaced by N.
        progress: shows a bar.

    Returns:
        n -> share of the ordered pairs.

    Raises:
        ValueError: no two images of one identity, or no distractor.
    """
    order = torch.argsort(labels, stable=True)
    counts = torch.unique(labels, return_counts=True)[1].tolist()
    first, second = [], []
    for rows in order.split(counts):
        a, b = torch.triu_indices(len(rows), len(rows), 1)
        first += [rows[a], rows[b]]
        second += [rows[b], rows[a]]
    probe, partner = torch.cat(first), torch.cat(second)
    if not len(probe) or not len(distractors):
        raise ValueError(
            "distractors are for probes with a partner: two images of one identity and a distractor are needed"
        )
    genuine = pair_scores(embeddings, probe, partner)
    best = np.full(len(embeddings), -np.inf, np.float32)
    rates, done = {}, 0
    nobody = labels.new_tensor([0])
    for size in sorted({min(n, len(distractors)) for n in sizes if n > 0}):
        part = distractors[done:size]
        # Labels that agree nowhere: all are impostors.
        found = search(
            embeddings, part, nobody.expand(len(embeddings)), nobody.expand(len(part)) + 1, progress=progress
        )
        best, done = np.maximum(best, found.best_impostor), size
        rates[size] = float((genuine > best[probe.cpu().numpy()]).mean())
    return rates
