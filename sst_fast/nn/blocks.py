"""Cosines between rows of a batch, block by block. A block is so small that the work on its cosines stays in the cache, or near it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sst_fast.reference import MIN_NORM

SOFTPLUS_IS_LINEAR = 80.0  # beyond it softplus(z) = z to float64's last bit; PyTorch's own limit, 20, is off by 2e-9
COLUMNS = 4096  # columns of a block, where a loss does not need whole rows
AT_ONCE = {"cpu": 2**20, "cuda": 2**22}  # cosines of a block, by kind of device: 4 MiB, 16 MiB in float32


def slices(count: int, width: int, device: torch.device) -> list[slice]:
    """Cuts ``count`` rows, each with ``width`` cosines, into blocks: one slice of rows for each."""
    step = max(1, AT_ONCE.get(device.type, AT_ONCE["cuda"]) // max(1, width))
    return [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]


def refuse_second_derivative() -> None:
    """Raises NotImplementedError if ``backward`` runs with create_graph=True: autograd cannot differentiate these gradients again."""
    if torch.is_grad_enabled():
        raise NotImplementedError("this loss has no second derivative: its gradient is computed block by block")


def unit_rows(x: Tensor) -> Tensor:
    """:func:`sst_fast.reference.normalize` of ``x`` [N, D], whose gradient takes fewer passes over memory than autograd's.

    In small batches such passes take as long as the cosines.
    """
    found: Tensor = _Unit.apply(x)
    return found


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        largest = x.abs().amax(1, keepdim=True)
        unit = x / largest.masked_fill(largest == 0, 1.0)
        norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
        tiny = norm * largest < MIN_NORM
        unit.mul_(norm.reciprocal().masked_fill_(tiny, 0.0))
        ctx.save_for_backward(unit, (norm * largest).reciprocal_().masked_fill_(tiny, 0.0))
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        refuse_second_derivative()
        unit, inverse = ctx.saved_tensors
        along = (unit * grad).sum(1, keepdim=True)
        found: Tensor = torch.addcmul(grad, unit, along, value=-1).mul_(inverse)
        return found


Share = Callable[..., Tensor]


def sum_over_blocks(x: Tensor, w: Tensor, share: Share, columns: int | None = None, *numbers: Tensor) -> Tensor:
    """Sum of ``share(c, i, j, *numbers)``, 0-d, over blocks c of the cosines of unit rows ``x[i]`` of [N, D] and ``w[j]`` of [K, D].

    A block's gradients are found together with its value, by PyTorch's autograd. The block is then freed.

    Args:
        x: [N, D], float32 or float64.
        w: [K, D]; any dtype, but that of ``x`` if it requires a gradient.
        share: gives a block's part of the loss, 0-d. ``i`` and ``j`` are the slices of rows of ``x`` and ``w`` in the block.
        columns: how many rows of ``w`` a block has at most; None: all of them, so that it holds whole rows of the N x K cosines.
        numbers: more tensors that ``share`` takes and that get a gradient.
    """
    found: Tensor = _Sum.apply(x, w, share, columns, *numbers)
    return found


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, share: Share, columns: int | None, *numbers: Tensor) -> Tensor:
        total = x.new_zeros(())
        wanted = any(ctx.needs_input_grad)
        for_x, for_w = torch.zeros_like(x), torch.zeros_like(w) if ctx.needs_input_grad[1] else None
        leaves = [number.detach().requires_grad_(wanted) for number in numbers]
        for_numbers = [torch.zeros_like(number) for number in numbers]
        for first in range(0, len(w), columns or max(1, len(w))):
            j = slice(first, min(first + (columns or len(w)), len(w)))
            for i in slices(len(x), j.stop - j.start, x.device):
                rows = w[j].to(x.dtype)
                c = (x[i] @ rows.T).requires_grad_(wanted)
                with torch.set_grad_enabled(wanted):
                    part = share(c, i, j, *leaves)
                total += part.detach()
                if part.requires_grad:
                    slope, *more = torch.autograd.grad(part, [c, *leaves])
                    for number, found in zip(for_numbers, more, strict=True):
                        number += found
                    for_x[i].addmm_(slope, rows)
                    if for_w is not None:
                        for_w[j].addmm_(slope.T, x[i])
        ctx.save_for_backward(for_x, for_w, *for_numbers)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        for_x, for_w, *for_numbers = ctx.saved_tensors
        of_numbers = (grad * number for number in for_numbers)
        return grad * for_x, None if for_w is None else grad * for_w, None, None, *of_numbers
