"""Triton for GPUs: tile sizes, and the launches of the kernels in ``kernels/margin_softmax.py``.

Without a GPU, ``TRITON_INTERPRET=1`` runs the kernels in Triton's interpreter, for tests.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sst_fast.arguments import REDUCTIONS, Packed
from sst_fast.backends.backend import Backend, Problem
from sst_fast.backends.extension import compiled, why_not_compiled
from sst_fast.reference import MIN_NORM, normalize

# What sweeps the queue between prepare and combine: Triton's kernel, or another that gives the same partial results.
Sweep = Callable[..., None]


class Triton(Backend):
    """The loss on CUDA tensors; in the interpreter, when asked for, on CPU tensors."""

    def why_not(self, problem: Problem) -> str | None:
        """None where it can, otherwise the reason."""
        if problem.operation != "margin_softmax":
            return "not written: the queue is C++ and CUDA C++"
        if compiled is None:
            return f"its operators are registered by the extension: {why_not_compiled}"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if problem.device.type != "cuda" and not interpreted():
            return f"not for {problem.device.type} tensors (but with TRITON_INTERPRET=1)"
        if problem.product_dtype is not None:
            return "rounds no products"
        if torch.float64 in (problem.dtype, problem.queue_dtype):
            return "float64 is more exact than its kernels are"
        if problem.positive:
            return "explicit positives are not written"
        if problem.window and problem.trains_prototypes:
            return "a window together with trained prototypes is not written"
        capability, _ = machine(problem.device)
        if problem.queue_dtype == torch.float8_e4m3fn and capability < 90:
            return "float8 needs compute capability 8.9"
        for kernel in ("sweep", "prototypes") if problem.trains_prototypes else ("sweep",):
            if blocks_for(kernel, problem.dim, problem.queue_dtype.itemsize, capability) is None:
                return f"no tile of {problem.dim} features in {problem.queue_dtype} fits this device"
        return None

    def volunteers(self, problem: Problem) -> bool:
        """On a GPU; the interpreter is for tests."""
        return problem.device.type == "cuda"

    def load(self) -> None:
        """Registers its operators."""
        register("triton", margin_softmax, prototype_gradient)


_registered: dict[str, torch.library.Library] = {}


def register(name: str, loss: Callable[..., Any], prototypes: Callable[..., Tensor]) -> None:
    """Makes Python functions the kernels of the operators ``<name>_margin_softmax`` and ``<name>_prototype_gradient``."""
    if name not in _registered:
        library = torch.library.Library("sst_fast", "IMPL")
        library.impl(f"{name}_margin_softmax", loss, "CompositeExplicitAutograd")
        library.impl(f"{name}_prototype_gradient", prototypes, "CompositeExplicitAutograd")
        _registered[name] = library


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@dataclass(frozen=True)
class Blocks:
    """How a sweep is cut: rows and slots of a tile, warps, pipeline stages."""

    rows: int
    slots: int
    warps: int
    stages: int


# (kernel, architecture, bytes per element of the prototypes) -> (rows, slots, warps, stages) for D up to 64, 128, 256, 512 and
# 1024; None: nothing fits. The accumulator stays in registers: tests/compile_triton.py holds every entry to 'no spills'. The largest
# tiles that meet that; which of them is fastest has not been measured.
# Made for Triton 3.8 and 3.9; older ones spill in some.
_TABLE: dict[tuple[str, int, int], tuple[tuple[int, int, int, int] | None, ...]] = {
    ("sweep", 80, 2): ((64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 1), (32, 32, 8, 1), (16, 32, 8, 2)),
    ("sweep", 80, 4): ((64, 32, 8, 2), (64, 32, 8, 1), (32, 64, 8, 2), (32, 16, 8, 1), None),
    ("sweep", 90, 1): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2), (32, 16, 8, 1), (16, 16, 8, 2)),
    ("sweep", 90, 2): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    ("sweep", 90, 4): ((64, 32, 8, 2), (64, 16, 8, 2), (32, 64, 8, 1), (16, 32, 8, 2), (16, 16, 8, 1)),
    ("sweep", 100, 1): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sweep", 100, 2): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2), (16, 32, 8, 2)),
    ("sweep", 100, 4): ((64, 64, 8, 2), (64, 32, 8, 2), (64, 16, 8, 1), (16, 32, 8, 2), (16, 16, 8, 1)),
    ("sweep", 120, 1): ((64, 32, 8, 1), (64, 16, 8, 1), (32, 32, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sweep", 120, 2): ((64, 32, 8, 2), (64, 16, 8, 1), (32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 2)),
    ("sweep", 120, 4): ((64, 32, 8, 1), (32, 64, 8, 2), (32, 32, 8, 1), (16, 16, 8, 2), None),
    ("prototypes", 80, 2): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (16, 32, 8, 2)),
    ("prototypes", 80, 4): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (32, 16, 8, 1), None),
    ("prototypes", 90, 2): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    ("prototypes", 90, 4): ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 1), None),
    ("prototypes", 100, 2): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    ("prototypes", 100, 4): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2), (32, 16, 8, 1), None),
    ("prototypes", 120, 2): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (32, 32, 8, 2), (16, 32, 8, 2)),
    ("prototypes", 120, 4): ((64, 64, 8, 1), (64, 64, 8, 2), (32, 32, 8, 2), (16, 16, 8, 2), None),
}  # fmt: skip
_DIMS = (64, 128, 256, 512, 1024)


def blocks_for(kernel: str, dim: int, itemsize: int, capability: int) -> Blocks | None:
    """Tile sizes of 'sweep' or 'prototypes' on an architecture (80, 90, 100, 120); None where no size fits."""
    found = next(
        (cut for most, cut in zip(_DIMS, _TABLE[kernel, capability, itemsize], strict=True) if dim <= most), None
    )
    return None if found is None else Blocks(*found)


def _inverse_norms(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(
        rows.float() if rows.dtype == torch.float8_e4m3fn else rows, dim=-1, dtype=torch.float32
    )
    return torch.where(norm < MIN_NORM, 0.0, 1.0 / norm)


def _precision(dtype: torch.dtype) -> str:
    """Of float32 products: as PyTorch's own matmul is set."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def machine(device: torch.device) -> tuple[int, int]:
    """Architecture, as the table knows it, and number of multiprocessors; of an ordinary GPU where the interpreter runs."""
    if device.type != "cuda":
        return 90, 4
    properties = torch.cuda.get_device_properties(device)
    return {9: 90, 10: 100, 12: 120}.get(properties.major, 80), properties.multi_processor_count


@dataclass
class _Rows:
    """What is computed once per probe, and the arguments every kernel shares."""

    unit: Tensor
    inverse_norm: Tensor
    cosine: Tensor
    exact: Tensor
    scales: Tensor
    phi_rows: Tensor
    inverse_w: Tensor | None
    inverse_window: Tensor | None
    numbers: list[float]
    block_d: int


def _next_power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _prepare(p: Packed) -> _Rows:
    from sst_fast.kernels.margin_softmax import prepare_kernel

    assert p.target is not None
    n, dim = p.embedding.shape
    block_d = max(16, _next_power_of_two(dim))
    groups, b = (1, 0) if p.window is None else p.window.shape[:2]
    floats: dict[str, Any] = {"dtype": torch.float32, "device": p.embedding.device}
    rows = _Rows(
        torch.empty((n, block_d), dtype=_product_dtype(p.prototypes), device=p.embedding.device),
        torch.empty(n, **floats), torch.empty(n, **floats), torch.empty((2, n), dtype=torch.float64, device=p.embedding.device),
        torch.empty(n, **floats), torch.empty((4, n), **floats),
        _inverse_norms(p.prototypes) if p.normalize else None,
        _inverse_norms(p.window) if p.normalize and p.window is not None else None,
        [*(p.parameters + [0.0] * 6)[:6], p.scale], block_d,
    )  # fmt: skip
    prepare_kernel[(n,)](
        p.embedding, p.prototypes, p.window, rows.inverse_w, rows.inverse_window, p.window_start, p.target, p.margin_rows,
        p.scale_rows, rows.unit, rows.inverse_norm, rows.cosine, rows.exact, rows.scales, rows.phi_rows, n,
        len(p.prototypes), dim, b, max(n // groups, 1), *rows.numbers,
        KIND=p.kind, P=0 if p.margin_rows is None else len(p.margin_rows), SCALE_ROWS=p.scale_rows is not None,
        WINDOW=p.window is not None, NORMALIZE=p.normalize, BLOCK_D=block_d,
    )  # fmt: skip
    return rows


def _received(*received: Any) -> tuple[Packed, Tensor]:
    """The arguments as kernels take them, contiguous, ignored probes as rows of zeros; and which probes count."""
    p = Packed.of(*received)
    assert p.target is not None
    valid = p.target != p.ignore_index
    p.embedding = p.embedding.masked_fill(~valid[:, None], 0).contiguous()
    p.prototypes, p.target = p.prototypes.contiguous(), p.target.where(valid, 0).contiguous()
    p.window = None if p.window is None else p.window.contiguous()
    p.margin_rows = None if p.margin_rows is None else p.margin_rows.float().contiguous()
    p.scale_rows = None if p.scale_rows is None else p.scale_rows.float().contiguous()
    return p, valid


def _weights(p: Packed, valid: Tensor) -> Tensor:
    """What each probe's loss is multiplied by before the sum, float32 [N]."""
    weight = valid.float() if p.weight is None else torch.where(valid, p.weight.float(), 0.0)
    if p.reduction != REDUCTIONS.index("mean"):
        return weight
    total = weight.sum(dtype=torch.float64)
    return (weight / torch.where(total == 0, 1, total)).float()


def margin_softmax(*received: Any, sweep: Sweep | None = None, plan: Any = None) -> tuple[Tensor, ...]:
    """The operator ``sst_fast::triton_margin_softmax``: see csrc/arguments.h for the results.

    ``sweep`` takes the place of Triton's sweep, cut as ``plan`` says.
    """
    from sst_fast.kernels.margin_softmax import combine_kernel, sweep_kernel

    p, valid = _received(*received)
    n, dim = p.embedding.shape
    k, device = len(p.prototypes), p.embedding.device
    groups, b = (1, 0) if p.window is None else p.window.shape[:2]

    def values(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    loss, lse, hardest, slope, residual = values(n), values(n), values(n), values(n), values(n)
    slot, beats, live = numbers(n), numbers(n), numbers(n)
    gradient = values(n if p.need_gradient else 0, dim)
    weight = _weights(p, valid)
    if n == 0:
        loss = loss if p.reduction == REDUCTIONS.index("none") else loss.sum()
        return loss, lse, values(0), hardest, slot, beats, residual, weight, gradient, live, slope
    rows = _prepare(p)
    capability, processors = machine(device)
    cut = blocks_for("sweep", rows.block_d, p.prototypes.element_size(), capability)
    assert cut is not None, "why_not() is asked first"
    if sweep is None:
        blocks_in_group = -(-(n // groups) // cut.rows)
        tiles = -(-k // cut.slots)
        splits = max(1, min(tiles, 2 * processors // (groups * blocks_in_group)))
        tiles_in_split = -(-tiles // splits)
        splits = -(-tiles // tiles_in_split)
        parts = splits + (p.window is not None)
    else:
        plan = plan(p, rows, processors)
        parts = plan.splits
    second = p.need_gradient and p.label_smoothing > 0
    shift, total, logits, hard_sum, top = (values(parts, n) for _ in range(5))
    hard, alive, at, above = (numbers(parts, n, dtype=torch.int32) for _ in range(4))
    moment = values(parts, n, rows.block_d) if p.need_gradient else None
    uniform = values(n)

    def run_sweep(again: bool) -> None:
        if sweep is not None:
            out = [shift, total, hard_sum, hard, alive, top, at, above]
            sweep(
                rows.unit, p.prototypes, p.window, p.window_start, p.target, p.identity, p.slot_identity, p.window_identity,
                rows.cosine, rows.scales, rows.phi_rows, out, values(0) if moment is None else moment, plan.tiles_in_split,
                plan.cluster, p.kind, p.mask_empty, p.straight_through,
            )  # fmt: skip
            return
        sweep_kernel[(groups * blocks_in_group, parts)](
            rows.unit, p.prototypes, p.window, rows.inverse_w, rows.inverse_window, p.window_start, p.target, p.identity,
            p.slot_identity, p.window_identity, rows.cosine, rows.scales, rows.phi_rows, lse, uniform, shift, total, logits,
            hard_sum, hard, alive, top, at, above, moment, n, k, dim, b, n // groups, blocks_in_group, tiles_in_split, splits,
            KIND=p.kind, WINDOW=p.window is not None, IDENTITY=p.identity is not None and p.slot_identity is not None,
            SLOT_IDENTITY=p.slot_identity is not None, MASK_EMPTY=p.mask_empty, NORMALIZE=p.normalize,
            STRAIGHT=p.straight_through, MOMENT=again or (p.need_gradient and not second), SECOND=again,
            LOGITS=p.label_smoothing > 0, PRECISION=_precision(p.prototypes.dtype), BLOCK_N=cut.rows, BLOCK_K=cut.slots,
            BLOCK_D=rows.block_d, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    def combine(with_loss: bool, with_moment: bool) -> None:
        combine_kernel[(n,)](
            p.embedding, p.prototypes, p.window, rows.inverse_w, rows.inverse_window, p.window_start, p.target,
            p.margin_rows, p.scale_rows, rows.inverse_norm, rows.cosine, rows.exact, shift, total, logits, hard_sum,
            hard, alive, top, at, above, moment, loss, gradient, lse, hardest, slot, beats, live, slope, residual, uniform,
            n, k, dim, b, n // groups, parts, p.label_smoothing, *rows.numbers,
            KIND=p.kind, P=0 if p.margin_rows is None else len(p.margin_rows), SCALE_ROWS=p.scale_rows is not None,
            WINDOW=p.window is not None, NORMALIZE=p.normalize, STRAIGHT=p.straight_through, LOSS=with_loss,
            MOMENT=with_moment, SMOOTH=p.label_smoothing > 0, BLOCK_D=rows.block_d,
        )  # fmt: skip

    run_sweep(again=False)
    combine(True, p.need_gradient and not second)
    if second:
        run_sweep(again=True)
        combine(False, True)
    loss = torch.where(weight == 0, 0.0, loss * weight)
    if p.reduction != REDUCTIONS.index("none"):
        loss = loss.sum()
    return loss, lse, rows.cosine, hardest, slot, beats, residual, weight, gradient, live, slope


def prototype_gradient(grad_loss: Tensor, found: list[Tensor], *received: Any) -> Tensor:
    """The operator ``sst_fast::triton_prototype_gradient``: [K, D] in the prototypes' dtype."""
    from sst_fast.kernels.margin_softmax import prototypes_kernel

    weight, lse, negatives, target_slope = found
    p, valid = _received(*received)
    n, dim = p.embedding.shape
    gradient = torch.empty_like(p.prototypes)
    if n == 0:
        return gradient.zero_()
    rows = _prepare(p)
    cut = blocks_for("prototypes", rows.block_d, p.prototypes.element_size(), machine(p.embedding.device)[0])
    assert cut is not None, "why_not() is asked first"
    incoming = torch.where(valid, grad_loss.float() * weight, 0.0)
    parallel = torch.zeros_like(incoming)
    if p.normalize:
        # Where a probe is nearly parallel to its target an angular margin's slope is large and what the normalisation leaves
        # of it is small: it would drown in the rounding of the kernel's sums, and is added after them.
        near = rows.exact[1] < 1 / 16
        parallel = torch.where(near, target_slope * incoming, 0.0)
        target_slope = torch.where(near, 0.0, target_slope)
    prototypes_kernel[(-(-len(p.prototypes) // cut.rows),)](
        rows.unit, p.prototypes, rows.inverse_w, p.target, p.identity, p.slot_identity, rows.scales, rows.phi_rows, lse,
        p.label_smoothing / (1.0 + negatives.float()), incoming, target_slope, gradient, n, len(p.prototypes), dim,
        KIND=p.kind, IDENTITY=p.identity is not None and p.slot_identity is not None,
        SLOT_IDENTITY=p.slot_identity is not None, MASK_EMPTY=p.mask_empty, NORMALIZE=p.normalize,
        STRAIGHT=p.straight_through, PRECISION=_precision(p.prototypes.dtype), BLOCK_N=cut.slots, BLOCK_K=cut.rows,
        BLOCK_D=rows.block_d, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if p.normalize:
        assert p.target is not None
        unit, own = normalize(p.embedding.double()), p.prototypes[p.target].double()
        norm = torch.linalg.vector_norm(own, dim=1, keepdim=True).clamp_min(MIN_NORM)
        own = own / norm
        across = unit - (unit * own).sum(1, keepdim=True) * own
        gradient.index_add_(0, p.target, (across * parallel[:, None] / norm).to(gradient.dtype))
    return gradient


def _product_dtype(prototypes: Tensor) -> torch.dtype:
    """What products are made of; every float8_e4m3fn is a float16."""
    return torch.float16 if prototypes.dtype == torch.float8_e4m3fn else prototypes.dtype
