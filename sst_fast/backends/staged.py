"""The staged sweep for GPUs: the library's matrix products, and Triton for what lies between them (kernels/staged.py).

The slots are taken in chunks whose weights P [N, C] fit :data:`WEIGHTS`, so that they stay in the second-level cache:

1. ``weigh_kernel`` multiplies probes and slots in tiles and turns the cosines into weights and partial sums where they are made;
   product 1 of float32 without tf32 and of float64 is the library's, into the memory of P, which the kernel then replaces.
2. The library multiplies P by the chunk, which is in the cache still, and adds to the moments [N, D] in float32 at least.
3. Behind the last chunk ``again_kernel`` adds up the tiles' sums and sweeps those rows again, if there are any, whose weights the
   exponents' range did not hold. ``combine_kernel`` of the fused sweep finishes.

One sweep takes a common shift, which is known beforehand. A float16 queue has too narrow a range for that, and so has a scale so large that
every row's sum would vanish: there, and for label smoothing, a sweep without weights finds each row's own shift first, and ``gather_kernel``
adds up its tiles' sums. Without a gradient it is the only one.

Sub-centres are columns of P like any others: those that are not nearest to a probe hold 0. float64 takes the same way, all of it in
float64.

Trained prototypes get their gradient from one more product, of P and the probes. Where P for all slots fits :data:`KEPT`, forward keeps it
for backward, with what a row's weights are to be multiplied by: three products in all, as many as PyTorch's own graph of the loss takes.
Elsewhere backward makes P again, chunk by chunk: four.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sst_fast.backends.backend import Backend, Problem
from sst_fast.backends.model import KEPT, WEIGHTS, fused_time, staged_time
from sst_fast.backends.triton import (
    PARALLEL,
    Blocks,
    Call,
    Results,
    Triton,
    carve,
    float32_precision,
    launch,
    machine,
    neighbours,
    register,
    why_no_kernels,
)  # fmt: skip

SUMS = 32 << 20  # bytes of the prototypes' gradient that are held as they are summed
TILE = 128  # slots
LONGEST = 1 << 16  # features
WIDEST = 124.0  # how far the largest possible logit may lie above that of an unrelated slot for the common shift to do
LIFT = 8.0  # what is written in float16 is lifted by this many powers of e: it flushes what is below 6e-8
PIECE_BYTES = 128  # of a row in product 1
AGAIN = 16  # probes of a block of again_kernel
COLUMNS = 256  # and columns of their moments


def _release(version: str) -> tuple[int, ...]:
    """Its first two numbers."""
    return tuple(int(part) for part in version.split(".")[:2])


_ADDS = _release(torch.__version__) >= (2, 10)


class Staged(Backend):
    """The loss on CUDA tensors; where Triton's interpreter is asked for, on CPU tensors."""

    launches = True

    def why_not(self, problem: Problem) -> str | None:
        """None where it can, otherwise the reason."""
        reason = why_no_kernels(problem)
        if reason is None and problem.dim > LONGEST:
            reason = f"for up to {LONGEST} features"
        if reason is None and problem.device.type == "cuda" and torch.float64 in (problem.dtype, problem.queue_dtype):
            reason = _why_not_double()
        return reason

    def volunteers(self, problem: Problem) -> bool:
        """On a GPU, where the model says so or the fused sweep cannot; the interpreter is for tests."""
        if problem.device.type != "cuda":
            return False
        here = machine(problem.device)
        if Triton().why_not(problem) is not None:
            return True
        times = (time(problem, here.architecture, here.processors) for time in (staged_time, fused_time))
        return next(times) <= next(times)

    def keeps_weights(self, probes: int, rows: int, dtype: torch.dtype) -> bool:
        """Where they fit :data:`KEPT`."""
        return probes * kept_bytes(rows, dtype) <= KEPT

    def tiles(self, problem: Problem) -> list[tuple[int, int, int, int]]:
        """The neighbours of its tile; a kept row ends with a whole one of at most :data:`TILE` slots."""
        if torch.float64 in (problem.dtype, problem.queue_dtype):
            return []
        number = float32_precision() if problem.queue_dtype == torch.float32 else "16 bits"
        cut = weigh_tile(problem.probes or TILE, number, machine(problem.device).architecture)
        return neighbours(cut, most_slots=TILE)

    def load(self) -> None:
        """Registers its operators."""
        register("staged", margin_softmax, prototype_gradient)


@cache
def _why_not_double() -> str | None:
    """``tl.dot`` takes float64 from Triton 3.5 on; in the interpreter it always did."""
    import triton

    old = _release(triton.__version__) < (3, 5)
    return f"float64 needs Triton 3.5, this is {triton.__version__}" if old else None


def kept_bytes(rows: int, dtype: torch.dtype) -> int:
    """Of a row of kept weights, one for each of so many rows of prototypes; csrc/arguments.h says the same."""
    return -(-rows // TILE) * TILE * dtype.itemsize + 128


def weigh_tile(rows_in_group: int, number: str, architecture: int, sub_centers: bool = False) -> Blocks:
    """How ``weigh_kernel`` is cut for so many probes of a group; ``number`` as in the table of the fused sweep's tiles, or "float64"."""
    if number in ("ieee", "float64"):  # the library makes the product
        return Blocks(32 if number == "ieee" else 16, TILE, 4, 1)
    most, warps = (64, 8) if sub_centers else (128, 4)  # the maximum of a class takes registers
    rows = max(16, min(most, 1 << (rows_in_group - 1).bit_length()))
    return Blocks(rows, TILE, warps, 2 if architecture in (86, 89, 120) else 3)


class Chunk(NamedTuple):
    """Slots [first, last) of the queue, or of the batch window."""

    of_window: bool
    first: int
    last: int
    matrices: list[Tensor]  # [(last - first) S, D], as products take them: for all probes, or one for each group
    whole: Tensor  # where these lie,
    row: int  # from this row on,
    stride: int  # so many rows apart


@dataclass
class Staging(Call):
    """A call of the loss, in chunks."""

    @property
    def product_dtype(self) -> torch.dtype:
        """What products are made of; every float8_e4m3fn is a bfloat16, whose range holds the weights."""
        if self.wide == torch.float64:
            return torch.float64
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
        return self.product_dtype.itemsize >= 4 and self.precision == "ieee"

    @cached_property
    def cut(self) -> Blocks:
        """Tile sizes."""
        number = {4: self.precision, 8: "float64"}.get(self.product_dtype.itemsize, "16 bits")
        stored = None if number == "float64" else self.stored_tile("staged")
        return stored or weigh_tile(self.sizes[4], number, machine(self.device).architecture, self.sub_centers > 1)

    @property
    def step(self) -> int:
        """Slots of a tile: a power of two of its lanes for each."""
        return self.cut.slots // self.padded

    @property
    def piece(self) -> int:
        """Features of a piece of product 1."""
        return min(self.block_d, PIECE_BYTES // self.product_dtype.itemsize)

    @cached_property
    def chunk(self) -> int:
        """Slots of a chunk: a multiple of a tile's. It has a column of weights for each of their rows."""
        n, k, _, b, _ = self.sizes
        most = WEIGHTS // (n * self.product_dtype.itemsize * self.sub_centers)
        return min(max(most // self.step, 1), -(-max(k, b) // self.step)) * self.step

    @property
    def tiles(self) -> int:
        """Tiles of a chunk T."""
        return self.chunk // self.step

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

    @property
    def keeps(self) -> bool:
        """Whether forward keeps the weights of the queue's slots for backward."""
        return self.keep_weights and self.need_gradient

    def kept_memory(self) -> Tensor:
        """What weights are kept in: rows [N] of bytes."""
        if not self.keeps:
            return super().kept_memory()
        bytes_of_row = kept_bytes(len(self.prototypes), self.product_dtype)
        return torch.empty(len(self.embedding), bytes_of_row, dtype=torch.uint8, device=self.device)

    def memory(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """The weights of a chunk that is not kept, and the chunk as products take it where that is not as it is."""
        n, _, dim, b, rows_in_group = self.sizes
        groups = 1 if self.window is None else n // rows_in_group
        columns = self.chunk * self.sub_centers
        converted = max(columns, groups * min(b, self.chunk)) if self.converts else 0
        rounded = -(-columns // 16) * 16  # that rows begin at multiples of 16 bytes is compiled in, and must stay so
        held = min(-(-b // TILE) * TILE, self.chunk) if self.keeps else rounded
        return [(self.product_dtype, (n, held)), (self.product_dtype, (converted, dim))]

    def place(self, chunk: Chunk, weights: Tensor, kept: Tensor) -> Tensor:
        """Where the weights of a chunk belong."""
        if chunk.of_window or not self.keeps:
            return weights
        return kept.view(self.product_dtype)[:, chunk.first * self.sub_centers :]

    def chunks(self, inverse: Tensor, converted: Tensor, window: bool = True) -> Iterator[Chunk]:
        """All chunks: the queue's, then the batch window's."""
        _, k, _, b, _ = self.sizes
        sub = self.sub_centers  # 1 beside a window
        for of_window, source in ((False, self.prototypes[None]), (True, self.window)):
            if source is None or (of_window and not window):
                continue
            size = source.shape[1]
            norms = inverse[k:].view(-1, b) if of_window and self.normalize else inverse[None]
            for at in range(0, size, self.chunk * sub):
                end = min(at + self.chunk * sub, size)
                rows = source[:, at:end]
                if self.converts:
                    rows = converted[: rows.shape[0] * rows.shape[1]].view(rows.shape)
                    if self.makes_unit:
                        torch.mul(source[:, at:end], norms[:, at:end, None], out=rows)
                    else:
                        rows.copy_(source[:, at:end])
                    yield Chunk(of_window, at // sub, end // sub, list(rows), rows, 0, end - at)
                else:
                    yield Chunk(of_window, at // sub, end // sub, list(rows), source, at, size)

    def weigh(
        self, chunk: Chunk, scratch: list[Tensor], cosine: Tensor, weights: Tensor, tiles: list[Tensor] | None = None, *,
        store: bool, keep: bool = False, shifts: Tensor | None = None, incoming: Tensor | None = None, target_slope: Tensor | None = None,
        even: bool = False, fresh: bool = False,
    ) -> None:  # fmt: skip
        """Product 1 of a chunk and what follows it. ``tiles``: partial sums and counts, to be added to; None: they are known."""
        from sst_fast.kernels.staged import weigh_kernel

        n, k, dim, b, rows_in_group = self.sizes
        unit, rows, own_rows, _, inverse = scratch
        count = chunk.last - chunk.first
        if self.given:
            for x, matrix, out in self.by_group(chunk, unit[:, :dim], weights[:, : count * self.sub_centers]):
                torch.mm(x, matrix.T, out=out)
        ids = self.window_identity if chunk.of_window else self.slot_identity
        blocks_in_group = -(-rows_in_group // self.cut.rows)
        launch(
            weigh_kernel, (n // rows_in_group * blocks_in_group, self.tiles if fresh else -(-count // self.step)),
            self.device, unit, chunk.whole, inverse if self.normalize and not self.makes_unit else None, self.window_start,
            own_rows, self.identity, None if self.slot_identity is None else ids, rows, cosine, shifts, incoming, target_slope,
            weights, *(tiles or (None, None)), n, k, dim, b, rows_in_group, blocks_in_group, chunk.first, count, chunk.row,
            chunk.stride, self.tiles, weights.stride(0), int(fresh), self.lift if even and incoming is None else 0.0, KIND=self.kind,
            MASK_EMPTY=self.mask_empty, STRAIGHT=self.unit_slope, OF_WINDOW=chunk.of_window, SEEN=tiles is not None,
            STORE=store, KEEP=keep, SMOOTH=self.label_smoothing > 0,
            SCALE_SLOPE=self.need_scale_gradient, EVEN=even, GIVEN=self.given, SUB=self.sub_centers, PADDED=self.padded,
            PRECISION=self.precision, BLOCK_N=self.cut.rows, BLOCK_K=self.cut.slots, BLOCK_D=self.block_d, PIECE=self.piece, num_warps=self.cut.warps,
            num_stages=self.cut.stages,
        )  # fmt: skip

    def add_moments(self, chunk: Chunk, weights: Tensor, moment: Tensor, first: bool) -> None:
        """Product 2: adds the weighed slots of a chunk to ``moment`` [N, D], which it makes if the chunk is the first."""
        _, _, dim, _, _ = self.sizes
        columns = (chunk.last - chunk.first) * self.sub_centers
        for some, matrix, out in self.by_group(chunk, weights[:, :columns], moment[:, :dim]):
            _product(out, some, matrix, add=not first)

    def multiply(
        self, weights: Tensor, probes: Tensor, first: int, sums: Tensor, gradient: Tensor, inverse: Tensor,
        factor: Tensor | None,
    ) -> None:  # fmt: skip
        """Rows ``first`` and on of the prototypes' gradient: ``weights`` [N, .] times ``probes`` [N, D], over ``factor``, taken through
        the normalisation. ``sums`` is memory for some of the rows in which they are summed; none: there is nothing to do behind the
        product."""
        from sst_fast.kernels.staged import finish_prototypes_kernel

        dim, last = probes.shape[1], first + weights.shape[1]
        if len(sums) == 0:
            torch.mm(weights.T, probes, out=gradient[first:last])
            return
        rows_in_block = max(1, 4096 // self.block_d)
        for at in range(first, last, len(sums)):
            count = min(len(sums), last - at)
            _product(sums[:count], weights[:, at - first : at - first + count].T, probes, add=False)
            launch(
                finish_prototypes_kernel, (-(-count // rows_in_block),), self.device, sums, self.prototypes,
                inverse if self.normalize else None, factor, gradient, at, count, dim,
                WEIGHED=self.keeps and not self.makes_unit, ROWS=rows_in_block, BLOCK_D=self.block_d,
            )  # fmt: skip

    def keep(self, scratch: list[Tensor], shifts: Tensor, found: Results) -> None:
        """Completes what is kept: the targets' weights, and for each row what its weights are relative to."""
        from sst_fast.kernels.staged import keep_kernel

        n, k, _, b, _ = self.sizes
        _, rows, own_rows, exact, inverse = scratch
        launch(
            keep_kernel, (-(-n // 128),), self.device, rows, own_rows, exact, inverse if self.normalize else None,
            self.window_start, found.lse, shifts, found.target_slope, found.kept.view(self.product_dtype),
            found.kept.view(self.wide), n, k, b, found.kept.shape[1] // self.product_dtype.itemsize,
            found.kept.shape[1] // self.wide.itemsize, self.lift if self.label_smoothing > 0 else 0.0, TARGETS=self.positive is None,
            PARALLEL=PARALLEL, BLOCK_N=128,
        )  # fmt: skip

    def gradient_memory(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """Rows of the gradient as they are summed, where there is something to do behind the products; then :meth:`memory` for weights
        that are not kept."""
        dim = self.prototypes.shape[1]
        finishes = self.half or self.normalize or self.prototypes.dtype != self.product_dtype
        rows = min(self.chunk * self.sub_centers, max(SUMS // (self.wide.itemsize * dim), 1)) if finishes else 0
        return [(self.wide, (rows, dim)), *([] if self.keeps else self.memory())]

    def fill_gradient(
        self, gradient: Tensor, scratch: list[Tensor], memory: list[Tensor], incoming: Tensor, cosine: Tensor, lse: Tensor,
        negatives: Tensor, target_slope: Tensor, kept: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """One product, of kept weights or of each chunk's, made anew, and the probes."""
        sums, *memory = memory
        if self.keeps:
            return self._fill_from_kept(gradient, scratch, sums, incoming, target_slope, kept)
        from sst_fast.kernels.margin_softmax import LARGEST_FLOAT16, SCALE, UNIFORM

        unit, rows, own_rows, exact, inverse = scratch
        weights, converted = memory
        share = factor = None
        if self.normalize and self.positive is None:
            target_slope, share = self.split_parallel(exact, own_rows, target_slope, incoming)
        if self.label_smoothing > 0:
            rows[UNIFORM.value] = self.label_smoothing / (1.0 + negatives.to(self.wide))
        if self.half:  # its range is narrow: the largest weight is brought to the upper end
            most = torch.maximum(4.0 * rows[SCALE.value], target_slope.abs()) * incoming.abs()
            factor = LARGEST_FLOAT16.value / most.max().clamp_min(1e-30)
            incoming = incoming * factor
        for chunk in self.chunks(inverse, converted, window=False):
            self.weigh(
                chunk, scratch, cosine, weights, store=True, shifts=lse, incoming=incoming,
                target_slope=target_slope if self.positive is None else None, even=self.label_smoothing > 0,
            )  # fmt: skip
            some = weights[:, : (chunk.last - chunk.first) * self.sub_centers]
            self.multiply(
                some, unit[:, : gradient.shape[1]], chunk.first * self.sub_centers, sums, gradient, inverse, factor
            )
        return share

    def _fill_from_kept(
        self,
        gradient: Tensor,
        scratch: list[Tensor],
        sums: Tensor,
        incoming: Tensor,
        target_slope: Tensor,
        kept: Tensor,
    ) -> Tensor | None:
        from sst_fast.kernels.margin_softmax import INVERSE_NORM, LARGEST_FLOAT16

        _, rows, own_rows, _, inverse = scratch
        factor = None
        weights = kept.view(self.product_dtype)[:, : len(self.prototypes)]
        each = torch.where(incoming == 0, 0.0, incoming * kept.view(self.wide)[:, -1])
        if self.half:  # as above, of rows
            factor = LARGEST_FLOAT16.value / each.abs().max().clamp_min(1e-30)
            each = each * factor
        each = (each * rows[INVERSE_NORM.value])[:, None]
        probes = torch.where((incoming == 0)[:, None], 0.0, self.embedding * each).to(self.product_dtype)
        self.multiply(weights, probes, 0, sums, gradient, inverse, factor)
        if self.positive is not None:
            return None
        wanting = (own_rows >= 0) & (weights.gather(1, own_rows.clamp_min(0).long()[:, None])[:, 0] == 0)
        if self.window is not None:  # its slots get no gradient
            assert self.window_start is not None
            _, k, _, b, _ = self.sizes
            wanting = wanting & ((own_rows - self.window_start) % k >= b)
        return torch.where(wanting & (incoming != 0), target_slope * incoming, 0.0)

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
    )
    scratch, partials, (weights, converted), tiles = memory[:5], memory[5:8], memory[8:10], memory[10:12]
    unit, rows, own_rows, _, inverse = scratch
    shifts = partials[0][0, 0]
    with torch.autocast(p.device.type, enabled=False):
        p.prepare(scratch, found.target_cosine, found.row_weight)
        for at, chunk in enumerate(p.chunks(inverse, converted)):
            into = p.place(chunk, weights, found.kept)
            p.weigh(chunk, scratch, found.target_cosine, into, tiles, store=not twice, keep=p.keeps, fresh=at == 0)
            if not twice:
                p.add_moments(chunk, into, partials[2][0], first=at == 0)
        if twice:
            launch(
                gather_kernel, (-(-n // 32),), p.device, *tiles, rows, *partials[:2], n, p.tiles, p.lift,
                KIND=p.kind, SMOOTH=smooths, SCALE_SLOPE=p.need_scale_gradient, TILES=32, BLOCK_N=32,
            )  # fmt: skip
        if twice and p.need_gradient:
            if smooths:
                p.combine(scratch, partials, found, with_loss=True, with_moment=False)
                shifts = found.lse
            for at, chunk in enumerate(p.chunks(inverse, converted)):
                into = p.place(chunk, weights, found.kept)
                p.weigh(
                    chunk, scratch, found.target_cosine, into, store=True, keep=p.keeps, shifts=shifts, even=smooths
                )
                p.add_moments(chunk, into, partials[2][0], first=at == 0)
        if p.need_gradient:
            blocks_in_group = -(-rows_in_group // AGAIN)
            columns = min(p.block_d, COLUMNS)
            launch(
                again_kernel, (n // rows_in_group * blocks_in_group, -(-dim // columns)), p.device,
                *((None, None) if twice else tiles), unit, p.prototypes, p.window, inverse if p.normalize else None,
                p.window_start, own_rows, p.identity, p.slot_identity, p.window_identity, rows, shifts, *partials,
                found.kept.view(p.product_dtype) if p.keeps and not twice else None, n, k, dim, b, p.tiles, rows_in_group,
                blocks_in_group, found.kept.shape[1] // p.product_dtype.itemsize, p.lift if smooths else 0.0, KIND=p.kind,
                MASK_EMPTY=p.mask_empty, STRAIGHT=p.unit_slope, SMOOTH=smooths, SCALE_SLOPE=p.need_scale_gradient,
                SUB=p.sub_centers, PADDED=p.padded, PRECISION=p.precision, TILES=32, BLOCK_N=AGAIN, BLOCK_K=32,
                BLOCK_D=p.block_d, PIECE=min(p.piece, 32), COLUMNS=columns, num_warps=4, num_stages=1,
            )  # fmt: skip
        if smooths and p.need_gradient:
            partials[2] *= math.exp(-p.lift)
            p.combine(scratch, partials, found, with_loss=False, with_moment=True)
        else:
            p.combine(scratch, partials, found, with_loss=True, with_moment=p.need_gradient)
        if p.keeps:
            p.keep(scratch, shifts, found)
        return p.reduced(found)


def prototype_gradient(grad_loss: Tensor, found: list[Tensor], *received: Any) -> Tensor:
    """The operator ``sst_fast::staged_prototype_gradient``."""
    return Staging.received(*received).prototype_gradient(grad_loss, found)


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
