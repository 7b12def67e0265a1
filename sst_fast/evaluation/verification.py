"""Open-set evaluation of embeddings: all pairs of images compared, each image searched among the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sst_fast.evaluation.blocked import all_pairs
from sst_fast.evaluation.collapse import rank_of, singular_spectrum
from sst_fast.evaluation.distribution import PairScores, Rate


@dataclass(frozen=True)
class Scores:
    """Cosines of all pairs of test images, and what follows from them (fractions, not percent).

    Attributes:
        pairs: how many pairs of one identity, and of two, have each cosine.
        accuracy: best balanced accuracy over all thresholds, see :meth:`PairScores.accuracy`.
        eer: equal error rate.
        rates: true accept rate at each false accept rate asked for, with its interval, see :meth:`PairScores.tar_at`.
        cmc: float64 [100], identification among all other images at rank 1, 2, ...; see :func:`cmc`.
        spectrum: float64 [min(M, D)], see :func:`singular_spectrum`.
    """

    pairs: PairScores
    accuracy: float
    eer: float
    rates: dict[float, Rate]
    cmc: NDArray[np.float64]
    spectrum: NDArray[np.float64]

    @property
    def tar(self) -> dict[float, float]:
        """True accept rate at each false accept rate asked for."""
        return {far: rate.value for far, rate in self.rates.items()}

    @property
    def rank1(self) -> float:
        """Share of images, of those that have a genuine partner, whose nearest other image is of the same identity."""
        return float(self.cmc[0])

    @property
    def rank5(self) -> float:
        """Share of images with fewer than five impostors nearer than the nearest image of the same identity."""
        return float(self.cmc[4])

    @property
    def effective_rank(self) -> float:
        """See :func:`effective_rank`."""
        return rank_of(self.spectrum)

    def roc(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """False and true accept rates over all thresholds."""
        far, tar, _ = self.pairs.roc()
        return far, tar


def roc(genuine: ArrayLike, impostor: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true accept rates over all thresholds, from cosines of genuine [G] and impostor pairs [I]."""
    far, tar, _ = PairScores.of(genuine, impostor).roc()
    return far, tar


def evaluate(
    embeddings: Tensor, labels: Tensor, fars: Sequence[float] = (0.1, 0.01, 0.001), *, progress: bool = False
) -> Scores:
    """Scores of unit ``embeddings`` [M, D] with identity ``labels`` [M]; at least two images of two identities.

    Memory beside the embeddings is bounded whatever M (below 2 GiB); see :func:`all_pairs` for what is exact.

    Raises:
        ValueError: shapes do not fit, embeddings are not finite, or there is no genuine or no impostor pair.
    """
    found = all_pairs(embeddings, labels, fars, progress=progress)
    pairs = found.pairs
    return Scores(
        pairs, pairs.accuracy(), pairs.eer(), pairs.tar_at(fars), found.cmc(), singular_spectrum(embeddings)
    )  # fmt: skip
