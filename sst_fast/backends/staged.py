"""The staged sweep for GPUs: the library's matrix products, and Triton for what lies between them (kernels/staged.py).

The slots are taken in chunks whose weights P [N, C] fit :data:`WEIGHTS`, so that they stay in the second-level cache:

1. ``weigh_kernel`` multiplies probes and slots in tiles and turns the cosines into weights and partial sums where they are made;
   product 1 of float32 without tf32 and of float64 is the library's, into the memory of P, which the kernel then replaces.
2. The library multiplies P by the chunk, which is in the cache still, and adds to the moments [N, D] in float32.
3. Behind the last chunk ``gather_kernel`` adds up the tiles' sums, ``again_kernel`` sweeps those rows again whose weights the
   exponents' range did not hold, and ends at once if there are none, and ``combine_kernel`` of the fused sweep finishes.

One sweep takes a common shift, which is known beforehand. A float16 queue has too narrow a range for that, and so has a scale so large that
every row's sum would vanish: there, and for label smoothing, a sweep without weights finds each row's own shift first. Without a gradient
it is the only one. Trained prototypes take one more sweep in backward: P again, and its product with the probes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sst_fast.backends.backend import Backend, Problem
from sst_fast.backends.model import fused_time, staged_time
from sst_fast.backends.triton import Blocks, Call, Triton, carve, launch, machine, register, why_no_kernels

WEIGHTS = 32 << 20  # bytes of P that are held at once
LONGEST = 1 << 16  # features
WIDEST = 124.0  # how far the largest possible logit may lie above that of an unrelated slot for the common shift to do
LIFT = 8.0  # what is written in float16 is lifted by this many powers of e: it flushes what is below 6e-8
PIECE_BYTES = 128  # of a row in product 1
AGAIN = 16  # probes of a block of again_kernel
COLUMNS = 256  # and columns of their moments
_ADDS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


class Staged(Backend):
    """The loss on CUDA tensors; where Triton's interpreter is asked for, on CPU tensors."""

    launches = True

    def why_not(self, problem: Problem) -> str | None:
        """None where it can, otherwise the reason."""
        reason = why_no_kernels(problem)
        if reason is not None:
            return reason
        if problem.sub_centers:
            return "one row a class"
        if problem.trains_scale:
            return "no gradient of the scale"
        return f"for up to {LONGEST} features" if problem.dim > LONGEST else None

    def volunteers(self, problem: Problem) -> bool:
        """On a GPU, where the model says so or the fused sweep cannot; the interpreter is for tests."""
        if problem.device.type != "cuda":
            return False
        here = machine(problem.device)
        if Triton().why_not(problem) is not None:
            return True
        times = (time(problem, here.architecture, here.processors) for time in (staged_time, fused_time))
        return next(times) <= next(times)

    def load(self) -> None:
        """Registers its operators."""
        register("staged", margin_softmax, prototype_gradient)


def weigh_tile(rows_in_group: int, number: str, architecture: int) -> Blocks:
    """How ``weigh_kernel`` is cut for so many probes of a group; ``number`` as in the table of the fused sweep's tiles."""
    if number == "ieee":  # the library makes the product
        return Blocks(32, 128, 4, 1)
    rows = max(16, min(128, 1 << (rows_in_group - 1).bit_length()))
    return Blocks(rows, 128, 8 if rows == 128 else 4, 2 if architecture in (86, 89, 120) else 3)


class Chunk(NamedTuple):
    """Slots [first, last) of the queue, or of the batch window."""

    of_window: bool
    first: int
    last: int
    matrices: list[Tensor]  # [last - first, D], as products take them: for all probes, or one for each group
    whole: Tensor  # where these lie,
    row: int  # from this row on,
    stride: int  # so many rows apart


@dataclass
class Staging(Call):
    """A call of the loss, in chunks."""

    @property
    def product_dtype(self) -> torch.dtype:
        """What products are made of; every float8_e4m3fn is a bfloat16, whose range holds the weights."""
        return torch.bfloat16 if self.prototypes.dtype == torch.float8_e4m3fn else self.prototypes.dtype

    @property
    def half(self) -> bool:
        """Whether weights have the narrow range of float16."""
        return self.product_dtype == torch.float16

    @property
    def lift(self) -> float:
        """By how many powers of e weights are lifted."""
        return LIFT if self.half else 0.0

    @property
    def given(self) -> bool:
        """Whether the library makes product 1 as well."""
        return self.product_dtype == torch.float32 and self.precision == "ieee"

    @cached_property
    def cut(self) -> Blocks:
        """Tile sizes."""
        number = {4: self.precision}.get(self.product_dtype.itemsize, "16 bits")
        return weigh_tile(self.sizes[4], number, machine(self.device).architecture)

    @property
    def piece(self) -> int:
        """Features of a piece of product 1."""
        return min(self.block_d, PIECE_BYTES // self.product_dtype.itemsize)

    @cached_property
    def chunk(self) -> int:
        """Slots of a chunk C: a multiple of a tile's."""
        n, k, _, b, _ = self.sizes
        most = WEIGHTS // (n * self.product_dtype.itemsize)
        return min(max(most // self.cut.slots, 1), -(-max(k, b) // self.cut.slots)) * self.cut.slots

    @property
    def tiles(self) -> int:
        """Tiles of a chunk T."""
        return self.chunk // self.cut.slots

    @property
    def makes_unit(self) -> bool:
        """Whether the library gets unit rows: inverse norms in the weights would exceed the range of float16."""
        return self.half and self.normalize

    @property
    def converts(self) -> bool:
        """Whether products need the slots in another form."""
        return self.makes_unit or self.prototypes.dtype != self.product_dtype

    @property
    def needs_own_shift(self) -> bool:
        """Whether the rows' largest logits must be known before weights are written."""
        if self.half or self.label_smoothing > 0:
            return True
        if self.scale_rows is not None:
            return False  # not known here; again_kernel sees to the rows whose scale is too large
        from sst_fast.kernels.margins import CIRCLE, phi_is_identity

        span = 1.0
        if self.kind == CIRCLE.value:
            span = 1.0 if self.margin_rows is not None else max(1.0, self.numbers[0] ** 2 + 1)
        elif not phi_is_identity.fn(self.kind):
            span = 2.0
        return self.scale * span > WIDEST

    def memory(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """The weights of a chunk, and the chunk as products take it where that is not as it is."""
        n, _, dim, b, rows_in_group = self.sizes
        groups = 1 if self.window is None else n // rows_in_group
        converted = max(self.chunk, groups * min(b, self.chunk)) if self.converts else 0
        return [(self.product_dtype, (n, self.chunk)), (self.product_dtype, (converted, dim))]

    def chunks(self, inverse: Tensor, converted: Tensor, window: bool = True) -> Iterator[Chunk]:
        """All chunks: the queue's, then the batch window's."""
        _, k, _, b, _ = self.sizes
        for of_window, source in ((False, self.prototypes[None]), (True, self.window)):
            if source is None or (of_window and not window):
                continue
            size = source.shape[1]
            norms = inverse[k:].view(-1, b) if of_window and self.normalize else inverse[None]
            for first in range(0, size, self.chunk):
                last = min(first + self.chunk, size)
                rows = source[:, first:last]
                if self.converts:
                    rows = converted[: rows.shape[0] * rows.shape[1]].view(rows.shape)
                    if self.makes_unit:
                        torch.mul(source[:, first:last], norms[:, first:last, None], out=rows)
                    else:
                        rows.copy_(source[:, first:last])
                    yield Chunk(of_window, first, last, list(rows), rows, 0, last - first)
                else:
                    yield Chunk(of_window, first, last, list(rows), source, first, size)

    def weigh(
        self, chunk: Chunk, scratch: list[Tensor], cosine: Tensor, weights: Tensor, tiles: list[Tensor] | None = None, *,
        store: bool, shifts: Tensor | None = None, incoming: Tensor | None = None, target_slope: Tensor | None = None,
        even: bool = False, fresh: bool = False,
    ) -> None:  # fmt: skip
        """Product 1 of a chunk and what follows it. ``tiles``: partial sums and counts, to be added to; None: they are known."""
        from sst_fast.kernels.staged import weigh_kernel

        n, k, dim, b, rows_in_group = self.sizes
        unit, rows, own_rows, _, inverse = scratch
        count = chunk.last - chunk.first
        if self.given:
            for x, matrix, out in self.by_group(chunk, unit[:, :dim], weights[:, :count]):
                torch.mm(x, matrix.T, out=out)
        ids = self.window_identity if chunk.of_window else self.slot_identity
        blocks_in_group = -(-rows_in_group // self.cut.rows)
        launch(
            weigh_kernel, (n // rows_in_group * blocks_in_group, self.tiles if fresh else -(-count // self.cut.slots)),
            self.device, unit, chunk.whole, inverse if self.normalize and not self.makes_unit else None, self.window_start,
            own_rows, self.identity, None if self.slot_identity is None else ids, rows, cosine, shifts, incoming, target_slope,
            weights, *(tiles or (None, None)), n, k, dim, b, rows_in_group, blocks_in_group, chunk.first, count, chunk.row,
            chunk.stride, self.tiles, self.chunk, int(fresh), self.lift if even and incoming is None else 0.0, KIND=self.kind,
            MASK_EMPTY=self.mask_empty, STRAIGHT=self.unit_slope, OF_WINDOW=chunk.of_window, SEEN=tiles is not None,
            STORE=store, SMOOTH=self.label_smoothing > 0, EVEN=even, GIVEN=self.given, PRECISION=self.precision,
            BLOCK_N=self.cut.rows, BLOCK_K=self.cut.slots, BLOCK_D=self.block_d, PIECE=self.piece, num_warps=self.cut.warps,
            num_stages=self.cut.stages,
        )  # fmt: skip

    def add_moments(self, chunk: Chunk, weights: Tensor, moment: Tensor, first: bool) -> None:
        """Product 2: adds the weighed slots of a chunk to ``moment`` [N, D], which it makes if the chunk is the first."""
        _, _, dim, _, _ = self.sizes
        for some, matrix, out in self.by_group(chunk, weights[:, : chunk.last - chunk.first], moment[:, :dim]):
            _product(out, some, matrix, add=not first)

    def by_group(self, chunk: Chunk, *rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of two tensors [N, .] the rows of the probes that see one matrix: (of the first, the matrix, of the second)."""
        parts = [tensor.chunk(len(chunk.matrices)) for tensor in rows]
        return zip(parts[0], chunk.matrices, parts[1], strict=True)


def margin_softmax(*received: Any) -> tuple[Tensor, ...]:
    """The operator ``sst_fast::staged_margin_softmax``: see csrc/arguments.h for the results."""
    from sst_fast.kernels.staged import again_kernel, gather_kernel

    p = Staging.received(*received)
    n, k, dim, b, rows_in_group = p.sizes
    found = p.results()
    if n == 0:
        return p.reduced(found)
    twice = p.needs_own_shift or not p.need_gradient
    smooths = p.label_smoothing > 0
    memory = carve(
        p.device,
        *p.scratch(),
        *p.partials(1),
        *p.memory(),
        *p.partials(p.tiles)[:2],
        (torch.int32, (0 if twice else n,)),
    )
    scratch, partials, (weights, converted), tiles = memory[:5], memory[5:8], memory[8:10], memory[10:12]
    unit, rows, own_rows, _, inverse = scratch
    again = None if twice else memory[12]
    shifts = partials[0][0, 0]
    with torch.autocast(p.device.type, enabled=False):
        p.prepare(scratch, found.target_cosine, found.row_weight)
        for at, chunk in enumerate(p.chunks(inverse, converted)):
            p.weigh(chunk, scratch, found.target_cosine, weights, tiles, store=not twice, fresh=at == 0)
            if not twice:
                p.add_moments(chunk, weights, partials[2][0], first=at == 0)
        launch(
            gather_kernel, (-(-n // 32),), p.device, *tiles, rows, own_rows, *partials[:2], again, n, p.tiles, p.lift,
            KIND=p.kind, COMMON=not twice, SMOOTH=smooths, TILES=32, BLOCK_N=32,
        )  # fmt: skip
        if twice and p.need_gradient:
            if smooths:
                p.combine(scratch, partials, found, with_loss=True, with_moment=False)
                shifts = found.lse
            for at, chunk in enumerate(p.chunks(inverse, converted)):
                p.weigh(chunk, scratch, found.target_cosine, weights, store=True, shifts=shifts, even=smooths)
                p.add_moments(chunk, weights, partials[2][0], first=at == 0)
        if p.need_gradient:
            blocks_in_group = -(-rows_in_group // AGAIN)
            columns = min(p.block_d, COLUMNS)
            launch(
                again_kernel, (n // rows_in_group * blocks_in_group, -(-dim // columns)), p.device, again, unit, p.prototypes,
                p.window, inverse if p.normalize else None, p.window_start, own_rows, p.identity, p.slot_identity,
                p.window_identity, rows, shifts, partials[0], partials[2], n, k, dim, b, rows_in_group, blocks_in_group,
                p.lift if smooths else 0.0, KIND=p.kind, MASK_EMPTY=p.mask_empty, STRAIGHT=p.unit_slope, EVEN=smooths,
                PRECISION=p.precision, BLOCK_N=AGAIN, BLOCK_K=32, BLOCK_D=p.block_d, PIECE=min(p.piece, 32),
                COLUMNS=columns, num_warps=4, num_stages=1,
            )  # fmt: skip
        if smooths and p.need_gradient:
            partials[2] *= math.exp(-p.lift)
            p.combine(scratch, partials, found, with_loss=False, with_moment=True)
        else:
            p.combine(scratch, partials, found, with_loss=True, with_moment=p.need_gradient)
        return p.reduced(found)


def prototype_gradient(grad_loss: Tensor, found: list[Tensor], *received: Any) -> Tensor:
    """The operator ``sst_fast::staged_prototype_gradient``: [K, D] in the prototypes' dtype."""
    from sst_fast.kernels.margin_softmax import LARGEST_FLOAT16, SCALE, UNIFORM
    from sst_fast.kernels.staged import finish_prototypes_kernel

    row_weight, lse, negatives, target_slope = found
    p = Staging.received(*received)
    n, _, dim, _, _ = p.sizes
    gradient = torch.empty_like(p.prototypes)
    if n == 0:
        return gradient.zero_()
    finishes = p.half or p.normalize
    *memory, cosine, weight, sums = carve(
        p.device, *p.scratch(), *p.memory(), (torch.float32, (n,)), (torch.float32, (n,)),
        (torch.float32, (p.chunk if finishes else 0, dim)),
    )  # fmt: skip
    scratch, weights, converted = memory[:5], memory[5], memory[6]
    unit, rows, own_rows, exact, inverse = scratch
    with torch.autocast(p.device.type, enabled=False):
        p.prepare(scratch, cosine, weight)
        incoming = torch.where(row_weight == 0, 0.0, grad_loss.float() * row_weight)
        parallel = factor = None
        if p.normalize and p.positive is None:
            target_slope, parallel = p.split_parallel(exact, own_rows, target_slope, incoming)
        if p.label_smoothing > 0:
            rows[UNIFORM.value] = p.label_smoothing / (1.0 + negatives)
        if p.half:  # its range is narrow: the largest weight that can occur is brought to the upper end
            most = torch.maximum(4.0 * rows[SCALE.value], target_slope.abs()) * incoming.abs()
            factor = LARGEST_FLOAT16.value / most.max().clamp_min(1e-30)
            incoming = incoming * factor
        for chunk in p.chunks(inverse, converted, window=False):
            p.weigh(
                chunk, scratch, cosine, weights, store=True, shifts=lse, incoming=incoming,
                target_slope=target_slope if p.positive is None else None, even=p.label_smoothing > 0,
            )  # fmt: skip
            count = chunk.last - chunk.first
            some = weights[:, :count].T
            if not finishes:
                torch.mm(some, unit[:, :dim], out=gradient[chunk.first : chunk.last])
                continue
            _product(sums[:count], some, unit[:, :dim], add=False)
            rows_in_block = max(1, 4096 // p.block_d)
            launch(
                finish_prototypes_kernel, (-(-count // rows_in_block),), p.device, sums, p.prototypes,
                inverse if p.normalize else None, factor, gradient, chunk.first, count, dim, ROWS=rows_in_block,
                BLOCK_D=p.block_d,
            )  # fmt: skip
        if parallel is not None:
            p.add_parallel(gradient, own_rows, parallel)
    return gradient


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """Makes ``out``, float32 at least, the product of two matrices of a lower precision perhaps, or adds that to it."""
    if a.dtype == out.dtype or not a.is_cuda:  # on a CPU the library adds such products in their own dtype
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(add), out=out)
    elif not add:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif _ADDS:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b, out_dtype=out.dtype)
