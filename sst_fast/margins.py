"""Margins of the softmax family. The one place in Python that knows a margin's formula.

``a`` is the cosine of a probe with its target prototype, ``c`` the cosine with any other one. A margin changes the
target's cosine, ``psi(a)``, and may change the others', ``phi(c, a)``; logits are ``scale`` times these.
``csrc/margin.h`` is the counterpart for the compiled kernels; ``tests/test_margins.py`` holds the two together.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

# The arc margin's slope is unbounded as the angle nears 0 or pi; closer than this sin(theta) is held constant.
MIN_SINE = 1e-3


@dataclass(frozen=True)
class Margin:
    """Base of all margins: a frozen set of numbers with the formulas ``psi`` and ``phi``.

    ``kind`` is the number by which compiled kernels know the margin (``enum class Kind`` in csrc/margin.h).
    """

    kind: ClassVar[int]

    def psi(self, a: Tensor) -> Tensor:
        """Target cosine with the margin applied, same shape and dtype as ``a``."""
        raise NotImplementedError

    def phi(self, c: Tensor, a: Tensor) -> Tensor:
        """Cosines ``c`` [N, K] of the other slots after the margin; ``a`` [N, 1] are the target cosines."""
        return c

    def parameters(self) -> list[float]:
        """The numbers that compiled kernels need, in the order of the fields."""
        return [float(value) for value in dataclasses.astuple(self)]


@dataclass(frozen=True)
class Softmax(Margin):
    """No margin: NormFace (Wang et al., ACM MM 2017). psi(a) = a."""

    kind: ClassVar[int] = 0

    def psi(self, a: Tensor) -> Tensor:
        """psi(a) = a."""
        return a


@dataclass(frozen=True)
class AMSoftmax(Margin):
    """Additive cosine margin: AM-softmax (Wang et al., SPL 2018, eq. 6), CosFace (Wang et al., CVPR 2018, eq. 4).

    psi(a) = a - margin.

    Args:
        margin: a cosine in [0, 2]; 0.35 is what the authors of Semi-Siamese Training use.
    """

    kind: ClassVar[int] = 1
    margin: float = 0.35

    def __post_init__(self) -> None:
        _check_range("AMSoftmax", "margin", self.margin, 0.0, 2.0, "a cosine")

    def psi(self, a: Tensor) -> Tensor:
        """psi(a) = a - margin."""
        return a - self.margin


@dataclass(frozen=True)
class ArcSoftmax(Margin):
    """Additive angular margin: ArcFace (Deng et al., CVPR 2019, eq. 3).

    psi(a) = cos(theta + margin), theta = acos a, as long as theta + margin <= pi. Beyond that either the linear
    continuation a - margin * sin(margin) (default) or, ``easy``, no margin for every target beyond 90 degrees.

    The slope sin(theta + margin) / sin(theta) has no bound as theta nears 0 or pi; where sin(theta) < 1e-3 it is
    replaced by cos(margin), so gradients stay finite (the loss itself changes by less than 1e-3 * scale there).

    Args:
        margin: radians in [0, pi].
        easy: the 'easy margin' rule.
    """

    kind: ClassVar[int] = 2
    margin: float = 0.5
    easy: bool = False

    def __post_init__(self) -> None:
        _check_range("ArcSoftmax", "margin", self.margin, 0.0, math.pi, "radians")

    def psi(self, a: Tensor) -> Tensor:
        """cos(theta + margin) or its continuation."""
        cos_m, sin_m = math.cos(self.margin), math.sin(self.margin)
        sine = ((1 - a) * (1 + a)).clamp_min(MIN_SINE**2).sqrt()
        limit = 0.0 if self.easy else -cos_m
        beyond = a if self.easy else a - self.margin * sin_m
        return torch.where(a > limit, a * cos_m - sine * sin_m, beyond)


MARGINS: dict[int, type[Margin]] = {margin.kind: margin for margin in (Softmax, AMSoftmax, ArcSoftmax)}


def _check_range(owner: str, name: str, value: float, low: float, high: float, unit: str) -> None:
    if not low <= value <= high:
        raise ValueError(f"{owner}: {name} must be {unit} in [{low:g}, {high:g}], got {value!r}")
