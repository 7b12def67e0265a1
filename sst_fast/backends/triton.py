"""Triton for GPUs: tile sizes, and the launches of the kernels in ``kernels/margin_softmax.py``.

Without a GPU, ``TRITON_INTERPRET=1`` runs the kernels in Triton's interpreter, for tests.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from sst_fast.arguments import REDUCTIONS, Packed, wide_dtype
from sst_fast.backends import tuned
from sst_fast.backends.backend import Backend, Problem
from sst_fast.backends.extension import compiled, why_not_compiled
from sst_fast.margins import FilteredMargin
from sst_fast.reference import MIN_NORM, normalize


class Triton(Backend):
    """The loss on CUDA tensors; in the interpreter, when asked for, on CPU tensors."""

    launches = True

    def why_not(self, problem: Problem) -> str | None:
        """None where it can, otherwise the reason."""
        reason = why_no_kernels(problem)
        if reason is not None:
            return reason
        if torch.float64 in (problem.dtype, problem.queue_dtype):
            return "float64 is more exact than its kernels are"
        here = machine(problem.device)
        kernels = ("sweep", "prototypes") if problem.trains_prototypes else ("sweep",)
        for kernel, number in product(kernels, _numbers(problem.queue_dtype)):
            if blocks_for(kernel, problem.dim, number, here.architecture) is None:
                return f"no tile of {problem.dim} features in {number} fits this device"
        return None

    def volunteers(self, problem: Problem) -> bool:
        """On a GPU; the interpreter is for tests."""
        return problem.device.type == "cuda"

    def tiles(self, problem: Problem) -> list[tuple[int, int, int, int]]:
        """The neighbours of what the table says of the sweep."""
        numbers = _numbers(problem.queue_dtype)
        number = float32_precision() if len(numbers) > 1 else numbers[0]
        cut = blocks_for("sweep", problem.dim, number, machine(problem.device).architecture)
        return [] if cut is None else neighbours(cut)

    def load(self) -> None:
        """Registers its operators."""
        register("triton", margin_softmax, prototype_gradient)


def why_no_kernels(problem: Problem) -> str | None:
    """None where kernels of Triton can serve a problem of the loss, whatever its tiles, otherwise the reason."""
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
    here = machine(problem.device)
    if here.capability < (8, 0):
        return f"needs compute capability 8.0, this device has {'.'.join(map(str, here.capability))}"
    if problem.queue_dtype == torch.float8_e4m3fn and here.capability < (8, 9):
        return f"float8 needs compute capability 8.9, this device has {'.'.join(map(str, here.capability))}"
    return None


_registered: dict[str, torch.library.Library] = {}


def register(name: str, loss: Callable[..., Any], prototypes: Callable[..., Tensor]) -> None:
    """Makes Python functions the kernels of the operators ``<name>_margin_softmax`` and ``<name>_prototype_gradient``."""
    if name not in _registered:
        library = torch.library.Library("sst_fast", "IMPL")
        library.impl(f"{name}_margin_softmax", loss, "CompositeExplicitAutograd")
        library.impl(f"{name}_prototype_gradient", prototypes, "CompositeExplicitAutograd")
        _registered[name] = library


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: read once, as Triton itself does."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@dataclass(frozen=True)
class Machine:
    """What kernels are cut for: compute capability and number of multiprocessors."""

    capability: tuple[int, int]
    processors: int

    @property
    def architecture(self) -> int:
        """As the table of tile sizes knows it. 8.7 (Orin) has the shared memory of 8.0, later ones what their generation has."""
        major, minor = self.capability
        return {8: {6: 86, 9: 89}.get(minor, 80), 9: 90, 10: 100, 11: 100}.get(major, 120)


@cache
def machine(device: torch.device) -> Machine:
    """The device's; an ordinary GPU where the interpreter runs."""
    if device.type != "cuda":
        return Machine((9, 0), 4)
    properties = torch.cuda.get_device_properties(device)
    return Machine((properties.major, properties.minor), properties.multi_processor_count)


@dataclass(frozen=True)
class Blocks:
    """How a sweep is cut: rows and slots of a tile, warps, pipeline stages."""

    rows: int
    slots: int
    warps: int
    stages: int


def neighbours(cut: Blocks, most_slots: int = 256) -> list[tuple[int, int, int, int]]:
    """Tiles of which one number is the next smaller or larger one: rows and slots 16 to 128 and 256, warps 4 or 8, stages 1 to 4."""
    rows, slots, warps, stages = cut.rows, cut.slots, cut.warps, cut.stages
    around = [
        (rows // 2, slots, warps, stages), (rows * 2, slots, warps, stages), (rows, slots // 2, warps, stages),
        (rows, slots * 2, warps, stages), (rows, slots, 12 - warps, stages), (rows, slots, warps, stages - 1),
        (rows, slots, warps, stages + 1),
    ]  # fmt: skip
    return [t for t in around if 16 <= t[0] <= 128 and 16 <= t[1] <= most_slots and 1 <= t[3] <= 4]


# (kernel, architecture, what is multiplied) -> (rows, slots, warps, stages) for D up to 64, 128, 256, 512 and 1024; None: nothing
# fits. The accumulator stays in registers: tests/compile_triton.py holds every entry to the card's shared memory and next to no
# spills. The largest tiles that meet that, by machine code alone: which of them is fastest has not been measured on a GPU.
# Made for Triton 3.8 and 3.9; older ones spill in some, but all fit with 3.4 too. 8.6, 8.9 and 12.0 have 99 KiB of shared memory and
# share their tiles; without tensor cores (ieee) these are the same everywhere.
_TABLE: dict[tuple[str, int, str], tuple[tuple[int, int, int, int] | None, ...]] = {
    ("sweep", 80, "16 bits"): ((64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 1), (32, 32, 8, 1), (16, 32, 8, 2)),
    ("sweep", 80, "tf32"): ((64, 32, 8, 2), (64, 32, 8, 1), (32, 64, 8, 2), (32, 16, 8, 1), None),
    ("sweep", 80, "ieee"): ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sweep", 86, "16 bits"): ((64, 32, 8, 2), (64, 16, 8, 1), (32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 2)),
    ("sweep", 86, "tf32"): ((64, 32, 8, 1), (32, 64, 8, 2), (32, 32, 8, 1), (16, 16, 8, 2), None),
    ("sweep", 86, "ieee"): ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sweep", 89, "float8"): ((64, 32, 8, 1), (64, 16, 8, 1), (32, 32, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sweep", 89, "16 bits"): ((64, 32, 8, 2), (64, 16, 8, 1), (32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 2)),
    ("sweep", 89, "tf32"): ((64, 32, 8, 1), (32, 64, 8, 2), (32, 32, 8, 1), (16, 16, 8, 2), None),
    ("sweep", 89, "ieee"): ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sweep", 90, "float8"): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2), (32, 16, 8, 1), (16, 16, 8, 2)),
    ("sweep", 90, "16 bits"): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    ("sweep", 90, "tf32"): ((64, 32, 8, 2), (64, 16, 8, 2), (32, 64, 8, 1), (16, 32, 8, 2), (16, 16, 8, 1)),
    ("sweep", 90, "ieee"): ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sweep", 100, "float8"): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sweep", 100, "16 bits"): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2), (16, 32, 8, 2)),
    ("sweep", 100, "tf32"): ((64, 64, 8, 2), (64, 32, 8, 2), (64, 16, 8, 1), (16, 32, 8, 2), (16, 16, 8, 1)),
    ("sweep", 100, "ieee"): ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sweep", 120, "float8"): ((64, 32, 8, 1), (64, 16, 8, 1), (32, 32, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sweep", 120, "16 bits"): ((64, 32, 8, 2), (64, 16, 8, 1), (32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 2)),
    ("sweep", 120, "tf32"): ((64, 32, 8, 1), (32, 64, 8, 2), (32, 32, 8, 1), (16, 16, 8, 2), None),
    ("sweep", 120, "ieee"): ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("prototypes", 80, "16 bits"): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (16, 32, 8, 2)),
    ("prototypes", 80, "tf32"): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2), (32, 16, 8, 1), None),
    ("prototypes", 80, "ieee"): ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), None),
    ("prototypes", 86, "16 bits"): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (32, 32, 8, 2), (16, 32, 8, 2)),
    ("prototypes", 86, "tf32"): ((64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 8, 2), (16, 16, 8, 2), None),
    ("prototypes", 86, "ieee"): ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), None),
    ("prototypes", 89, "16 bits"): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (32, 32, 8, 2), (16, 32, 8, 2)),
    ("prototypes", 89, "tf32"): ((64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 8, 2), (16, 16, 8, 2), None),
    ("prototypes", 89, "ieee"): ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), None),
    ("prototypes", 90, "16 bits"): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    ("prototypes", 90, "tf32"): ((64, 64, 8, 2), (64, 32, 8, 1), (32, 32, 8, 2), (32, 16, 8, 1), None),
    ("prototypes", 90, "ieee"): ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), None),
    ("prototypes", 100, "16 bits"): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    ("prototypes", 100, "tf32"): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2), (32, 16, 8, 1), None),
    ("prototypes", 100, "ieee"): ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), None),
    ("prototypes", 120, "16 bits"): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (32, 32, 8, 2), (16, 32, 8, 2)),
    ("prototypes", 120, "tf32"): ((64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 8, 2), (16, 16, 8, 2), None),
    ("prototypes", 120, "ieee"): ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), None),
}  # fmt: skip
_DIMS = (64, 128, 256, 512, 1024)


def blocks_for(kernel: str, dim: int, number: str, architecture: int) -> Blocks | None:
    """Tile sizes of 'sweep' or 'prototypes' on an architecture (80, 90, 100, 120); None where no size fits."""
    found = next(
        (cut for most, cut in zip(_DIMS, _TABLE[kernel, architecture, number], strict=True) if dim <= most), None
    )
    return None if found is None else Blocks(*found)


def _next_power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _numbers(dtype: torch.dtype) -> tuple[str, ...]:
    """What products of prototypes in this dtype can be: of float32 as PyTorch's own matmul is set at the time."""
    return ("tf32", "ieee") if dtype == torch.float32 else ({1: "float8", 2: "16 bits"}[dtype.itemsize],)


def float32_precision() -> str:
    """'tf32' or 'ieee': what PyTorch is set to multiply float32 matrices by. The older setting cannot be read once the newer is set."""
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if newer is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if newer == "tf32" else "ieee"


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Every launch of a kernel goes through here. Triton launches on the current device: it is made the tensors' own."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants)


_ALIGNMENT = 256  # bytes
PARALLEL = 1 / 16  # the sine of the angle between a probe and a target that count as nearly parallel


def carve(device: torch.device, *arrays: tuple[torch.dtype, tuple[int, ...]]) -> list[Tensor]:
    """Arrays of these dtypes and shapes, uninitialised, out of one allocation."""
    ends = [0]
    for dtype, shape in arrays:
        ends.append(-(-(ends[-1] + prod(shape) * dtype.itemsize) // _ALIGNMENT) * _ALIGNMENT)
    whole = torch.empty(ends[-1], dtype=torch.uint8, device=device)
    return [
        whole.narrow(0, start, prod(shape) * dtype.itemsize).view(dtype).view(shape)
        for start, (dtype, shape) in zip(ends[:-1], arrays, strict=True)
    ]


class Results(NamedTuple):
    """What the loss gives: csrc/arguments.h."""

    loss: Tensor
    lse: Tensor
    target_cosine: Tensor
    hardest_cosine: Tensor
    hardest_slot: Tensor
    beats_target: Tensor
    residual: Tensor
    row_weight: Tensor
    gradient: Tensor
    negatives: Tensor
    target_slope: Tensor
    scale_slope: Tensor
    kept: Tensor


class Call(Packed):
    """The arguments of a call as kernels take them, and what follows from them."""

    @classmethod
    def received(cls, *received: Any) -> Self:
        """From what an operator has received; contiguous."""
        p = Packed.of(*received)
        fields: dict[str, Any] = {n: v.contiguous() if isinstance(v, Tensor) else v for n, v in vars(p).items()}
        return cls(**fields)

    @cached_property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """N, K, D, B, and how many probes see the same window."""
        n, dim = self.embedding.shape
        groups, b = (1, 0) if self.window is None else self.window.shape[:2]
        return n, len(self.prototypes) // self.sub_centers, dim, b, max(n // groups, 1)

    @property
    def padded(self) -> int:
        """Lanes that the rows of one slot take in a tile."""
        return _next_power_of_two(self.sub_centers)

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.embedding.device

    @cached_property
    def block_d(self) -> int:
        """Features, rounded up to what a block can have."""
        return max(16, _next_power_of_two(self.embedding.shape[1]))

    @property
    def rows(self) -> int:
        """Probes of a block of those kernels that run once per probe: about 512 numbers."""
        return max(1, 512 // self.block_d)

    @property
    def varying(self) -> int:
        """How many of the margin's parameters vary from row to row."""
        return 0 if self.by_row[0] is None else len(self.by_row[0])

    @property
    def unit_slope(self) -> bool:
        """Whether phi' = 1 whatever phi."""
        return self.straight_through and self.kind != FilteredMargin.kind

    @property
    def product_dtype(self) -> torch.dtype:
        """What products are made of; every float8_e4m3fn is a float16."""
        return torch.float16 if self.prototypes.dtype == torch.float8_e4m3fn else self.prototypes.dtype

    @cached_property
    def wide(self) -> torch.dtype:
        """Of sums and results."""
        return wide_dtype(self.embedding, self.prototypes)

    @cached_property
    def by_row(self) -> tuple[Tensor | None, Tensor | None]:
        """Parameters [P, N] and scales [N] of the probes, float64, where they vary; None: numbers serve. A launch rounds these to float32: in
        float64 they take this way too."""
        margin, scale = self.margin_rows, self.scale_rows
        if self.wide == torch.float64:
            n = len(self.embedding)
            if margin is None and self.parameters:
                margin = torch.empty(len(self.parameters), n, dtype=torch.float64, device=self.device)
                for row, number in zip(margin, self.parameters, strict=True):
                    row.fill_(number)
            if scale is None:
                scale = torch.full((n,), self.scale, dtype=torch.float64, device=self.device)
        return margin, scale

    @property
    def precision(self) -> str:
        """Of products; what is no float32 has no choice."""
        return float32_precision() if self.prototypes.dtype == torch.float32 else "ieee"

    def stored_tile(self, backend: str) -> Blocks | None:
        """Tile sizes that ``sst-fast tune`` has found the fastest for a call like this."""
        if self.sub_centers > 1:
            return None
        n, k, dim, _, _ = self.sizes
        found = tuned.tile(
            backend, self.device, self.prototypes.dtype, dim, self.normalize, self.label_smoothing > 0, n, k
        )  # fmt: skip
        return None if found is None else Blocks(*found)

    def blocks(self, kernel: str) -> Blocks:
        """The kernel's tile sizes."""
        stored = self.stored_tile("triton") if kernel == "sweep" else None
        if stored is not None:
            return stored
        numbers = _numbers(self.prototypes.dtype)
        number = self.precision if len(numbers) > 1 else numbers[0]
        found = blocks_for(kernel, self.block_d, number, machine(self.device).architecture)
        assert found is not None, "why_not() is asked first"
        return found

    def scratch(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """What :meth:`prepare` fills: unit rows, rows, targets' rows, exact cosines and sines, inverse norms."""
        from sst_fast.kernels.margin_softmax import ROW_FIELDS

        n, k, _, b, rows_in_group = self.sizes
        norms = k * self.sub_centers + n // rows_in_group * b if self.normalize else 0
        return [
            (self.product_dtype, (n, self.block_d)), (self.wide, (ROW_FIELDS, n)), (torch.int32, (n,)),
            (torch.float64, (2 * n + 1,)), (self.wide, (norms,)),
        ]  # fmt: skip

    def prepare(self, scratch: list[Tensor], cosine: Tensor, row_weight: Tensor) -> None:
        """Launches ``prepare_kernel``."""
        from sst_fast.kernels.margin_softmax import prepare_kernel

        n, k, dim, b, rows_in_group = self.sizes
        blocks = -(-n // self.rows) + 1
        if self.normalize:
            blocks += -(-(k * self.sub_centers) // self.rows) + -(-(n // rows_in_group * b) // self.rows)
        unit, rows, own_rows, exact, inverse = scratch
        launch(
            prepare_kernel, (blocks,), self.device, self.embedding, self.prototypes, self.window, self.positive,
            self.window_start, self.target, self.weight, *self.by_row, unit, rows, own_rows, exact,
            inverse if self.normalize else None, cosine, row_weight, n, k, dim, b, rows_in_group, self.ignore_index,
            *self.numbers, self.scale, KIND=self.kind, P=self.varying, NORMALIZE=self.normalize,
            SUB=self.sub_centers, ROWS=self.rows, BLOCK_D=self.block_d,
        )  # fmt: skip

    def partials(self, parts: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """What :meth:`combine` takes of each part of the slots: partial sums, counts and, for a gradient, moments."""
        from sst_fast.kernels.margin_softmax import COUNT_FIELDS, PARTIAL_FIELDS

        n = len(self.embedding)
        moment = (parts, n, self.block_d) if self.need_gradient else (0,)
        return [
            (self.wide, (PARTIAL_FIELDS, parts, n)),
            (torch.int32, (COUNT_FIELDS, parts, n)),
            (self.wide, moment),
        ]

    def combine(
        self, scratch: list[Tensor], partials: list[Tensor], found: Results, with_loss: bool, with_moment: bool
    ) -> None:
        """Launches ``combine_kernel`` on what :meth:`prepare` and the sweep have left."""
        from sst_fast.kernels.margin_softmax import combine_kernel

        n, k, dim, b, rows_in_group = self.sizes
        _, rows, own_rows, exact, _ = scratch
        smoothing = None
        if self.wide == torch.float64 and self.label_smoothing > 0:
            smoothing = torch.full((1,), self.label_smoothing, dtype=torch.float64, device=self.device)
        launch(
            combine_kernel, (-(-n // self.rows),), self.device, self.embedding, self.prototypes, self.window, self.positive,
            self.window_start, self.by_row[0], rows, own_rows, exact, *partials, found.loss, found.lse, found.hardest_cosine,
            found.hardest_slot, found.beats_target, found.residual, found.row_weight, found.gradient, found.negatives,
            found.target_slope, found.scale_slope if self.need_scale_gradient else None, smoothing, n, k, dim, b, rows_in_group,
            partials[0].shape[1], self.label_smoothing, *self.numbers,
            KIND=self.kind, P=self.varying, NORMALIZE=self.normalize, STRAIGHT=self.straight_through, LOSS=with_loss,
            MOMENT=with_moment, SMOOTH=self.label_smoothing > 0, MEAN=self.reduction == REDUCTIONS.index("mean"),
            ROWS=self.rows, BLOCK_D=self.block_d,
        )  # fmt: skip

    def results(self) -> Results:
        """Uninitialised. Each has memory of its own: those that outlive the call must not hold on to the scratch."""
        n, dim = self.embedding.shape

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        loss, lse, cosine, hardest, residual, weight, slope = (empty(self.wide, n) for _ in range(7))
        slot, beats, live = (empty(torch.int64, n) for _ in range(3))
        gradient = empty(self.wide, n if self.need_gradient else 0, dim)
        scale_slope = empty(self.wide, n if self.need_scale_gradient else 0)
        return Results(
            loss, lse, cosine, hardest, slot, beats, residual, weight, gradient, live, slope, scale_slope, self.kept_memory()
        )  # fmt: skip

    def kept_memory(self) -> Tensor:
        """What weights are kept in: none."""
        return torch.empty(0, 0, dtype=torch.uint8, device=self.device)

    def reduced(self, found: Results) -> tuple[Tensor, ...]:
        """The results as the operator gives them: the loss of each probe, weighed, or their sum."""
        none = self.reduction == REDUCTIONS.index("none")
        return found if none else found._replace(loss=found.loss.sum())

    def prototype_gradient(self, grad_loss: Tensor, found: list[Tensor]) -> Tensor:
        """[K S, D] in the prototypes' dtype. ``found`` by forward: row_weight, lse, negatives, target_slope, kept."""
        row_weight, *found = found
        n = len(self.embedding)
        gradient = torch.empty_like(self.prototypes)
        if n == 0:
            return gradient.zero_()
        *memory, cosine, weight = carve(
            self.device, *self.scratch(), *self.gradient_memory(), (self.wide, (n,)), (self.wide, (n,))
        )  # fmt: skip
        scratch, memory = memory[:5], memory[5:]
        with torch.autocast(self.device.type, enabled=False):
            self.prepare(scratch, cosine, weight)
            incoming = torch.where(row_weight == 0, 0.0, grad_loss.to(self.wide) * row_weight)
            share = self.fill_gradient(gradient, scratch, memory, incoming, cosine, *found)
            if share is not None:
                self.add_parallel(gradient, scratch[2], share)
        return gradient

    def gradient_memory(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """What :meth:`fill_gradient` takes beside what is prepared: nothing."""
        return []

    def fill_gradient(
        self, gradient: Tensor, scratch: list[Tensor], memory: list[Tensor], incoming: Tensor, cosine: Tensor, lse: Tensor,
        negatives: Tensor, target_slope: Tensor, kept: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """Fills ``gradient`` [K S, D] with what the probes' losses, each times ``incoming`` [N], make of the prototypes; returns what is left
        for :meth:`add_parallel`, if there is any."""
        from sst_fast.kernels.margin_softmax import prototypes_kernel

        n, k, dim, b, _ = self.sizes
        unit, rows, own_rows, exact, inverse = scratch
        share = None
        if self.normalize and self.positive is None:
            target_slope, share = self.split_parallel(exact, own_rows, target_slope, incoming)
        cut = self.blocks("prototypes")
        launch(
            prototypes_kernel, (-(-k // (cut.rows // self.padded)),), self.device, unit, self.prototypes,
            inverse if self.normalize else None, self.window_start, own_rows, self.identity, self.slot_identity, rows, lse,
            negatives, incoming.contiguous(), target_slope, gradient, n, k, dim, b, self.label_smoothing, KIND=self.kind,
            MASK_EMPTY=self.mask_empty, STRAIGHT=self.unit_slope, TARGETS=self.positive is None, SUB=self.sub_centers,
            PADDED=self.padded, PRECISION=self.precision, BLOCK_N=cut.slots, BLOCK_K=cut.rows, BLOCK_D=self.block_d,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        return share

    def split_parallel(
        self, exact: Tensor, own_rows: Tensor, target_slope: Tensor, incoming: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(``target_slope`` without the targets that are nearly parallel to their probes, what these get of ``incoming``).

        Where they are normalised inside, an angular margin's slope is large there and what the normalisation leaves of
        it is small: it would drown in the rounding of a kernel's sums, and is added after them.
        """
        near = (exact[1 + len(own_rows) :] < PARALLEL) & (own_rows >= 0)
        if self.window is not None:  # its slots get no gradient
            assert self.window_start is not None
            near = near & ((own_rows - self.window_start) % len(self.prototypes) >= self.window.shape[1])
        return torch.where(near, 0.0, target_slope), torch.where(near, target_slope * incoming, 0.0)

    def add_parallel(self, gradient: Tensor, own_rows: Tensor, share: Tensor) -> None:
        """Adds what :meth:`split_parallel` has taken out."""
        own_row = own_rows.clamp_min(0).long()
        nothing = share[:, None] == 0
        if self.normalize:
            own = self.prototypes[own_row].double()
            norm = torch.linalg.vector_norm(own, dim=1, keepdim=True)
            nothing = nothing | (norm < MIN_NORM)  # rows so short count as zeros, and get no gradient
            own = own / norm
        hat = normalize(self.embedding.double())
        part = hat
        if self.normalize:
            part = (hat - (hat * own).sum(1, keepdim=True) * own) / norm
        part = torch.where(nothing, 0.0, part * share[:, None]).to(gradient.dtype)
        gradient.index_put_((own_row,), part, accumulate=True)  # sorts: index_add_ adds in whatever order on a GPU

    @property
    def numbers(self) -> list[float]:
        """The margin's parameters, as many as kernels take."""
        return (self.parameters + [0.0] * 6)[:6]


def margin_softmax(*received: Any) -> tuple[Tensor, ...]:
    """The operator ``sst_fast::triton_margin_softmax``: see csrc/arguments.h for the results.

    Three launches (five with label smoothing and a gradient), one allocation of scratch memory; PyTorch's own operations
    are the allocations of the results and, where the loss is reduced, its sum.
    """
    from sst_fast.kernels.margin_softmax import sweep_kernel

    p = Call.received(*received)
    n, k, dim, b, rows_in_group = p.sizes
    found = p.results()
    if n == 0:
        return p.reduced(found)
    groups, processors = n // rows_in_group, machine(p.device).processors
    cut = p.blocks("sweep")
    blocks_in_group = -(-rows_in_group // cut.rows)
    tiles = -(-k // (cut.slots // p.padded))
    splits = max(1, min(tiles, 2 * processors // (groups * blocks_in_group)))
    tiles_in_split = -(-tiles // splits)
    splits = -(-tiles // tiles_in_split)
    parts = splits + (p.window is not None)
    memory = carve(p.device, *p.scratch(), *p.partials(parts))
    scratch, partials = memory[:5], memory[5:]
    p.prepare(scratch, found.target_cosine, found.row_weight)
    unit, rows, own_rows, _, inverse = scratch
    second = p.need_gradient and p.label_smoothing > 0

    def run_sweep(again: bool) -> None:
        launch(
            sweep_kernel, (groups * blocks_in_group, parts), p.device, unit, p.prototypes, p.window,
            inverse if p.normalize else None, p.window_start, own_rows, p.identity, p.slot_identity, p.window_identity, rows,
            found.target_cosine, found.lse, *partials, n, k, dim, b, rows_in_group, blocks_in_group, tiles_in_split, splits,
            KIND=p.kind, MASK_EMPTY=p.mask_empty, STRAIGHT=p.unit_slope,
            MOMENT=again or (p.need_gradient and not second), SECOND=again, SMOOTH=p.label_smoothing > 0,
            SCALE_SLOPE=p.need_scale_gradient and not again, SUB=p.sub_centers, PADDED=p.padded, PRECISION=p.precision, BLOCK_N=cut.rows, BLOCK_K=cut.slots, BLOCK_D=p.block_d, num_warps=cut.warps,
            num_stages=cut.stages,
        )  # fmt: skip

    run_sweep(again=False)
    p.combine(scratch, partials, found, with_loss=True, with_moment=p.need_gradient and not second)
    if second:
        run_sweep(again=True)
        p.combine(scratch, partials, found, with_loss=False, with_moment=True)
    return p.reduced(found)


def prototype_gradient(grad_loss: Tensor, found: list[Tensor], *received: Any) -> Tensor:
    """The operator ``sst_fast::triton_prototype_gradient``. Two launches of kernels, one allocation of scratch."""
    return Call.received(*received).prototype_gradient(grad_loss, found)
