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
        probes, slots: N and K by :func:`size_class`; 0: not known, as under torch.compile, where sizes may be symbols.
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
    probes: int = 0
    slots: int = 0


def size_class(size: int) -> int:
    """``size`` rounded up to a power of two: sizes of one class are decided alike."""
    return 1 << max(size - 1, 0).bit_length()


class Backend:
    """One way to compute the operations.

    Attributes:
        launches: whether it compiles or launches kernels for a card, which the card may refuse; then the next backend serves,
            unless this one was asked for by name.
    """

    launches = False

    def why_not(self, problem: Problem) -> str | None:
        """None where it can compute the problem here, otherwise the reason in words."""
        raise NotImplementedError

    def volunteers(self, problem: Problem) -> bool:
        """Whether it may be chosen without being asked for, where it can compute the problem."""
        return True

    def keeps_weights(self, probes: int, rows: int, dtype: torch.dtype) -> bool:
        """Whether forward keeps the weights of all rows of prototypes, in this dtype, for their gradient, rather than make them again."""
        return False

    def tiles(self, problem: Problem) -> list[tuple[int, int, int, int]]:
        """Other tiles (rows, slots, warps, stages) than its own that are worth measuring on the problem; none where it has none."""
        return []

    def load(self) -> None:
        """Makes its operators known to PyTorch, once; nothing to do for those that the extension registers."""
