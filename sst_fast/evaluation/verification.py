"""Open-set evaluation of embeddings: verification over all pairs, identification, rank of the features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_curve
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Cosines of all pairs of test images, and what follows from them (fractions, not percent).

    Attributes:
        genuine, impostor: cosines of pairs of one identity, and of two.
        accuracy: best over all thresholds of the mean of true accept and true reject rate (balanced accuracy; the
            threshold is chosen on the same pairs, so it is optimistic).
        tar: true accept rate at each false accept rate asked for, interpolated linearly on the ROC.
        rank1: share of images whose nearest other image is of the same identity.
        effective_rank: exp of the entropy of the normalised singular values of the centred embeddings
            (Roy and Vetterli, EUSIPCO 2007).
    """

    genuine: NDArray[np.float32]
    impostor: NDArray[np.float32]
    accuracy: float
    tar: dict[float, float]
    rank1: float
    effective_rank: float

    def roc(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """False and true accept rates over all thresholds."""
        return roc(self.genuine, self.impostor)


def roc(genuine: NDArray[np.float32], impostor: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true accept rates over all thresholds, from cosines of genuine and impostor pairs."""
    far, tar, _ = roc_curve(np.r_[np.ones(len(genuine)), np.zeros(len(impostor))], np.r_[genuine, impostor])
    return far, tar


def evaluate(embeddings: Tensor, labels: Tensor, fars: tuple[float, ...] = (0.1, 0.01, 0.001)) -> Scores:
    """Scores of unit ``embeddings`` [M, D] with identity ``labels`` [M]; at least two images of two identities."""
    similarity = (embeddings @ embeddings.T).cpu()
    labels = labels.cpu()
    same = labels[:, None] == labels[None, :]
    upper = torch.ones_like(same).triu(1)
    genuine = similarity[same & upper].numpy()
    impostor = similarity[~same & upper].numpy()
    if not len(genuine) or not len(impostor):
        raise ValueError("evaluation needs at least two identities and two images of one of them")
    far, tar = roc(genuine, impostor)
    nearest = similarity.clone().fill_diagonal_(-torch.inf).argmax(1)
    alone = same.sum(1) == 1
    return Scores(
        genuine,
        impostor,
        float((0.5 * (tar + 1 - far)).max()),
        {f: float(np.interp(f, far, tar)) for f in fars},
        float((labels[nearest] == labels)[~alone].float().mean()),
        effective_rank(embeddings),
    )


def effective_rank(embeddings: Tensor) -> float:
    """exp(entropy of the singular values of the centred embeddings [M, D], as shares of their sum).

    Raises:
        ValueError: an embedding is not finite.
    """
    if not bool(torch.isfinite(embeddings).all()):
        raise ValueError("embeddings are not finite: the network has diverged; lower lr or enlarge batch")
    values = torch.linalg.svdvals((embeddings - embeddings.mean(0)).double())
    shares = values / values.sum().clamp_min(1e-12)
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))
