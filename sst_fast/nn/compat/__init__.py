"""Other projects' heads by their own names and constructor arguments: one module for each project.

Each is one of our heads (:mod:`sst_fast.nn.heads`). Loss, gradients and first weights are as in the other project: the same seed gives
the same first weights, to rounding; those of partial FC have the same distribution. Two things differ. A head gives the loss, not
logits for a cross-entropy. And it takes embeddings as the network gives them, since it normalises them itself. Keyword options of our
own class may be added to any of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["classes_last", "unit_uniform"]


def classes_last(fill: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
    """``fill`` for our weights [classes, dim], as if for weights [dim, classes]: the same seed gives the same numbers as there."""

    def init(weight: Tensor) -> None:
        theirs = torch.empty(weight.shape[::-1], dtype=weight.dtype, device=weight.device)
        fill(theirs)
        weight.copy_(theirs.T)

    return init


def _unit_columns(weight: Tensor) -> None:
    weight.copy_(normalize(weight.uniform_(-1, 1), dim=0))


#: Columns drawn uniformly from a cube, then made unit vectors: FaceX-Zoo's and AdaFace's first weights.
unit_uniform = classes_last(_unit_columns)
