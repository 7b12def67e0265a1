"""Other projects' heads by their own names and constructor arguments, made of ours: one module for each project.

They behave as there, in what a loss or a gradient is and in how weights start (the same seed gives the same weights, to rounding;
partial FC's have the same distribution), but for this: a head gives the loss, not logits for a cross-entropy to follow, and takes
embeddings as the network gives them. Keyword options of our own class may be added to any of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["classes_last", "unit_uniform"]


def classes_last(fill: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
    """``fill`` for projects that keep weights as [dim, classes]: the same numbers from the same seed."""

    def init(weight: Tensor) -> None:
        theirs = torch.empty(weight.shape[::-1], dtype=weight.dtype, device=weight.device)
        fill(theirs)
        weight.copy_(theirs.T)

    return init


def _unit_columns(weight: Tensor) -> None:
    weight.copy_(normalize(weight.uniform_(-1, 1), dim=0))


#: Columns drawn uniformly from a cube, then made unit vectors: FaceX-Zoo's and AdaFace's first weights.
unit_uniform = classes_last(_unit_columns)
