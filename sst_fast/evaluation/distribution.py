"""The scores of genuine and impostor pairs, as counts, and the rates that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


class Rate(NamedTuple):
    """A true accept rate, its 95 % confidence interval and the threshold (score >= threshold accepts) it was taken at."""

    value: float
    low: float
    high: float
    threshold: float


@dataclass(frozen=True)
class PairScores:
    """How many genuine pairs (of one identity) and impostor pairs (of two) have each score.

    Attributes:
        scores: float32 [T], ascending. An entry stands for one value, or, away from the thresholds that matter, for a bin
            of values (at most 0.8 % of the score wide) by its lower edge.
        genuine, impostor: int64 [T], numbers of pairs.
    """

    scores: NDArray[np.float32]
    genuine: NDArray[np.int64]
    impostor: NDArray[np.int64]

    @classmethod
    def of(cls, genuine: ArrayLike, impostor: ArrayLike) -> PairScores:
        """From the scores of genuine [G] and of impostor pairs [I]."""
        kinds = np.asarray(genuine, np.float32), np.asarray(impostor, np.float32)
        if not all(np.isfinite(kind).all() for kind in kinds):
            raise ValueError("scores are not finite")
        scores, position = np.unique(np.concatenate(kinds), return_inverse=True)
        counts = (np.bincount(p, minlength=len(scores)) for p in np.split(position, [len(kinds[0])]))
        return cls(scores, *(count.astype(np.int64) for count in counts))

    @classmethod
    def together(cls, parts: Sequence[PairScores]) -> PairScores:
        """The pairs of several, for instance of the folds of one method."""
        scores, position = np.unique(np.concatenate([p.scores for p in parts]), return_inverse=True)
        counts = []
        for kind in ("genuine", "impostor"):
            total = np.zeros(len(scores), np.int64)
            np.add.at(total, position, np.concatenate([getattr(p, kind) for p in parts]))
            counts.append(total)
        return cls(scores, *counts)

    def check(self) -> PairScores:
        """Itself.

        Raises:
            ValueError: there is no genuine or no impostor pair.
        """
        if not self.genuine.any() or not self.impostor.any():
            raise ValueError("evaluation needs at least two identities and two images of one of them")
        return self

    def roc(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """False accept rates, true accept rates and thresholds, from the strictest to the mildest (scikit-learn's)."""
        from sklearn.metrics import roc_curve  # here, since it takes a second that most trainings need not spend

        far, tar, thresholds = roc_curve(**self._weighted(), drop_intermediate=False)
        return far, tar, thresholds

    def det(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Detection error trade-off: false accept rates, false reject rates and thresholds (scikit-learn's)."""
        from sklearn.metrics import det_curve

        far, frr, thresholds = det_curve(**self._weighted())
        return far, frr, thresholds

    def tar_at(self, fars: Sequence[float] = FARS) -> dict[float, Rate]:
        """True accept rates at false accept rates: the highest TAR of all thresholds whose FAR is not above the one asked for.

        Nothing is interpolated: pairs of equal scores are accepted or rejected together, as in NIST's evaluations. The
        interval is Wilson's (1927) for a share of independent pairs at this threshold; pairs that share an image or an
        identity are not independent, so the true uncertainty is larger.
        """
        far, tar, thresholds = self.roc()
        count = int(self.genuine.sum())
        found = {}
        for wanted in fars:
            i = int(np.flatnonzero(far <= wanted * (1 + 1e-9))[-1])
            found[wanted] = Rate(float(tar[i]), *wilson(float(tar[i]), count), float(thresholds[i]))
        return found

    def eer(self) -> float:
        """Equal error rate: where false accept and false reject rate are one, on the straight line between the two
        thresholds beside it."""
        far, tar, _ = self.roc()
        gap = far - (1 - tar)
        after = int(np.argmax(gap >= 0))
        before = after - 1  # the first threshold rejects all: gap -1
        share = gap[before] / (gap[before] - gap[after])
        return float(far[before] + share * (far[after] - far[before]))

    def accuracy(self) -> float:
        """Highest balanced accuracy, the mean of true accept and true reject rate, over all thresholds. The threshold is
        chosen on the pairs it is judged by, so this is optimistic."""
        far, tar, _ = self.roc()
        return float((0.5 * (tar + 1 - far)).max())

    def _weighted(self) -> dict[str, NDArray[np.float64]]:
        self.check()
        kinds = self.genuine > 0, self.impostor > 0
        return {
            "y_true": np.repeat([1.0, 0.0], [kinds[0].sum(), kinds[1].sum()]),
            "y_score": np.concatenate([self.scores[kind] for kind in kinds]).astype(np.float64),
            "sample_weight": np.concatenate([self.genuine[kinds[0]], self.impostor[kinds[1]]]).astype(np.float64),
        }


def wilson(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (JASA 22, 1927) of a share seen in ``count`` independent trials."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = share + z * z / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    low, high = float((middle - half) / scale), float((middle + half) / scale)
    return max(0.0, min(share, low)), min(1.0, max(share, high))
