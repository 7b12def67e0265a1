"""What a backend is, and how a problem is described to it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """What a backend must know to say whether it can compute something.

    Attributes:
        operation: 'margin_softmax', 'enqueue', 'dequeue' or 'window'. The fields from ``dim`` on are for the first alone.
        device: where the tensors are.
        dtype: of the embeddings, or of the features that are enqueued.
        queue_dtype: of the prototypes or the queue.
        dim: number of features D.
        window: whether there is a batch window.
        positive: whether targets are given as ``positive``, not as rows of the prototypes.
        trains_prototypes: whether the prototypes get a gradient.
        normalize: whether prototypes are normalised inside.
        smooths: whether there is label smoothing.
        product_dtype: the dtype to which the user allows factors of products to be rounded; None: no narrower one than the queue's.
        trains_scale: whether the scale gets a gradient.
        sub_centers: whether a class has several rows.
        probes, slots: N and K, rounded up by :func:`size_class`; 0: not known, as under torch.compile, where sizes may be symbols.
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
    """``size`` rounded up to a power of two. All sizes of one class have the same backend."""
    return 1 << max(size - 1, 0).bit_length()


class Backend:
    """One way to compute the operations.

    Attributes:
        launches: whether it compiles or launches kernels for a GPU, which may fail. Then the next backend takes its place, unless
            this one was asked for by name.
    """

    launches = False

    def why_not(self, problem: Problem) -> str | None:
        """None where it can compute the problem here, otherwise the reason in words."""
        raise NotImplementedError

    def volunteers(self, problem: Problem) -> bool:
        """Whether it may be chosen for a problem that it can compute, without being asked for by name."""
        return True

    def keeps_weights(self, probes: int, rows: int, dtype: torch.dtype) -> bool:
        """Whether forward keeps the softmax weights of all N x K pairs, in this dtype, for the prototypes' gradient. Else backward
        computes them again."""
        return False

    def tiles(self, problem: Problem) -> list[tuple[int, int, int, int]]:
        """Tiles (rows, slots, warps, stages) beside its own that ``sst-fast tune`` shall measure on the problem."""
        return []

    def load(self) -> None:
        """Makes its operators known to PyTorch, once. The extension has registered its own already."""
