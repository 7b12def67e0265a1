"""Whether embeddings have collapsed: the spectrum of the features, cosines within and between identities, uniformity.

Du et al. (ECCV 2020) explain by collapse of the feature dimension why conventional training fails on shallow data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 8192  # rows at a time
MOST_FOR_UNIFORMITY = 16384


@dataclass(frozen=True)
class Collapse:
    """Diagnostics of unit embeddings.

    Attributes:
        spectrum: float64 [min(M, D)], singular values of the centred embeddings, descending, as shares of their sum.
        effective_rank: see :func:`effective_rank`.
        intra_cosine, inter_cosine: mean cosine of the pairs of one identity, and of two identities; NaN without such pairs.
        alignment: mean squared distance of the pairs of one identity (Wang and Isola, ICML 2020, alpha = 2); smaller is closer.
        uniformity: log of the mean of exp(-2 squared distance) over all pairs (the same, t = 2); smaller is more uniform.
            Over 16,384 images chosen at random if there are more.
    """

    spectrum: NDArray[np.float64]
    effective_rank: float
    intra_cosine: float
    inter_cosine: float
    alignment: float
    uniformity: float

    def figures(self) -> dict[str, float]:
        """The numbers, without the spectrum."""
        return {
            "effective rank": self.effective_rank,
            "intra-class cosine": self.intra_cosine,
            "inter-class cosine": self.inter_cosine,
            "alignment": self.alignment,
            "uniformity": self.uniformity,
        }

    def row(self) -> dict[str, float]:
        """The numbers that exist, named as columns of a training's metrics."""
        found = {name.replace(" ", "_").replace("-", "_"): value for name, value in self.figures().items()}
        return {name: value for name, value in found.items() if math.isfinite(value)}


@torch.no_grad()
def collapse(embeddings: Tensor, labels: Tensor, spectrum: NDArray[np.float64] | None = None) -> Collapse:
    """Diagnostics of unit ``embeddings`` [M, D] with identity ``labels`` [M]; memory beside them does not grow with M.

    ``spectrum``: of these embeddings, where :func:`singular_spectrum` has been called already.

    Raises:
        ValueError: an embedding is not finite.
    """
    spectrum = singular_spectrum(embeddings) if spectrum is None else spectrum
    numbers, counts = torch.unique(labels.to(embeddings.device), return_inverse=True, return_counts=True)[1:]
    # Sums of cosines follow from sums of embeddings: |sum x|^2 = sum |x|^2 + 2 (sum over pairs).
    total = torch.zeros(embeddings.shape[1], dtype=torch.float64, device=embeddings.device)
    norms, within, order = 0.0, 0.0, torch.argsort(numbers, stable=True)
    for first in range(0, len(counts), CHUNK):
        here = slice(first, first + CHUNK)
        before, size = int(counts[:first].sum()), int(counts[here].sum())
        sums = torch.zeros(len(counts[here]), len(total), dtype=torch.float64, device=embeddings.device)
        for rows in order[before : before + size].split(CHUNK):
            x = embeddings[rows].double()
            sums.index_add_(0, numbers[rows] - first, x)
            norms += float((x * x).sum())
        within += float((sums * sums).sum())
        total += sums.sum(0)
    m = float(len(embeddings))
    genuine_pairs = float((counts.double() * (counts - 1)).sum())
    intra = (within - norms) / genuine_pairs if genuine_pairs else math.nan
    impostor_pairs = m * (m - 1) - genuine_pairs
    inter = float((total * total).sum() - within) / impostor_pairs if impostor_pairs else math.nan
    alignment = 2 * (norms / m - intra)
    return Collapse(spectrum, rank_of(spectrum), intra, inter, alignment, _uniformity(embeddings))


def effective_rank(embeddings: Tensor) -> float:
    """exp(entropy of the singular values of the centred embeddings [M, D], as shares of their sum): Roy and Vetterli,
    EUSIPCO 2007.

    Raises:
        ValueError: an embedding is not finite.
    """
    return rank_of(singular_spectrum(embeddings))


def rank_of(spectrum: NDArray[np.float64]) -> float:
    """:func:`effective_rank` of what :func:`singular_spectrum` gave."""
    shares = spectrum[spectrum > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


@torch.no_grad()
def singular_spectrum(embeddings: Tensor) -> NDArray[np.float64]:
    """Singular values [min(M, D)] of the centred embeddings [M, D], descending, as shares of their sum.

    Raises:
        ValueError: an embedding is not finite.
    """
    # The R of a QR decomposition has them; it is made a few thousand rows at a time.
    chunks = embeddings.split(CHUNK)
    if not all(bool(torch.isfinite(chunk).all()) for chunk in chunks):
        raise ValueError("embeddings are not finite: the network has diverged; lower lr or enlarge batch")
    mean = torch.stack([chunk.double().sum(0) for chunk in chunks]).sum(0) / len(embeddings)
    rest = torch.zeros(0, embeddings.shape[1], dtype=torch.float64, device=embeddings.device)
    for chunk in chunks:
        rest = torch.linalg.qr(torch.cat([rest, chunk.double() - mean]), mode="r").R
    values = torch.linalg.svdvals(rest)
    shares: NDArray[np.float64] = (values / values.sum().clamp_min(1e-12)).cpu().numpy()
    return shares


def _uniformity(embeddings: Tensor) -> float:
    m = len(embeddings)
    if m < 2:
        return math.nan
    if m > MOST_FOR_UNIFORMITY:
        chosen = torch.randperm(m, generator=torch.Generator().manual_seed(0))[:MOST_FOR_UNIFORMITY]
        embeddings, m = embeddings[chosen.to(embeddings.device)], MOST_FOR_UNIFORMITY
    x = embeddings.float()
    square = (x * x).sum(1)
    total = 0.0
    for first in range(0, m, 1024):  # each pair once: rows against those from the first of them on
        rows = slice(first, first + 1024)
        near = (2 * (2 * x[rows] @ x[first:].T - square[rows, None] - square[first:])).exp_()
        total += 2 * float(near.sum(dtype=torch.float64)) - float(near[:, : len(near)].sum(dtype=torch.float64))
    return math.log(max(total - m, 1e-300) / (m * (m - 1)))
