"""What a backend is, and what it is asked."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """What a backend must know to say whether it can compute something; what matters to none of them is left out.

    Attributes:
        operation: 'margin_softmax', 'enqueue', 'dequeue' or 'window'; the fields from ``dim`` on are of the first alone.
        device: where the tensors are.
        dtype: of the embeddings, or of the features that are enqueued.
        queue_dtype: of the prototypes or the queue.
        dim: number of features D.
        window, positive: whether there is a batch window, an explicit positive.
        trains_prototypes: whether the prototypes get a gradient.
        normalize: whether prototypes are normalised inside.
        smooths: whether there is label smoothing.
        product_dtype: what the user allows products to be rounded to; None: nothing less than the queue's dtype.
        trains_scale: whether the scale gets a gradient.
        sub_centers: whether a class has several rows.
    """

    operation: str
    device: torch.device
    dtype: torch.dtype = torch.float32
    queue_dtype: torch.dtype = torch.float32
    dim: int = 512
    window: bool = False
    positive: bool = False
    trains_prototypes: bool = False
    normalize: bool = False
    smooths: bool = False
    product_dtype: torch.dtype | None = None
    trains_scale: bool = False
    sub_centers: bool = False


class Backend:
    """One way to compute the operations."""

    def why_not(self, problem: Problem) -> str | None:
        """None where it can compute the problem here, otherwise the reason in words."""
        raise NotImplementedError

    def volunteers(self, problem: Problem) -> bool:
        """Whether it may be chosen without being asked for, where it can compute the problem."""
        return True

    def load(self) -> None:
        """Makes its operators known to PyTorch, once; nothing to do for those that the extension registers."""
