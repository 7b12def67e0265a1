"""The loss's sweep in CUDA C++ for Hopper (csrc/cuda/sweep_sm90.cu): what it can do, and how it is cut. Not yet run on a GPU.

It takes the place of Triton's sweep between the same two kernels, which prepare rows and combine splits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sst_fast.arguments import Packed
from sst_fast.backends import triton
from sst_fast.backends.backend import Backend, Problem
from sst_fast.backends.extension import compiled, why_not_compiled

ROWS = SLOTS = 64  # of a block, of a tile: csrc/tiles.h
DIMS = (128, 256, 512)
DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
UNIT_OF_FLOAT8 = 64.0  # what unit rows are multiplied by before they are rounded to float8: csrc/cuda/sweep_sm90.h


@dataclass(frozen=True)
class Plan:
    """Splits of the tiles, tiles of each, and blocks of rows that share them."""

    splits: int
    tiles_in_split: int
    cluster: int


def plan(rows_in_group: int, groups: int, k: int, b: int, processors: int, converts: bool) -> Plan:
    """A block for each multiprocessor, if there is work enough: tiles are those of the queue and then the window's.

    ``converts``: the queue is read by threads, for themselves, not by the copy engine, for two blocks.
    """
    blocks_in_group = -(-rows_in_group // ROWS)
    tiles = -(-k // SLOTS) + -(-b // SLOTS)
    splits = max(1, min(-(-tiles // 2), processors // (groups * blocks_in_group)))
    tiles_in_split = 2 * -(-tiles // (2 * splits))  # they are taken in pairs
    return Plan(-(-tiles // tiles_in_split), tiles_in_split, 1 if blocks_in_group % 2 or converts else 2)


class Hopper(Backend):
    """On request: its kernel has not yet run on a GPU."""

    def why_not(self, problem: Problem) -> str | None:
        """None where it can, otherwise the reason."""
        if problem.operation != "margin_softmax":
            return "for the loss alone"
        if problem.device.type != "cuda":
            return f"not for {problem.device.type} tensors"
        if compiled is None:
            return why_not_compiled
        if compiled.cuda is None:
            return "sst_fast._C was built without CUDA"
        if not compiled.sm90a:
            return "sst_fast._C was built without sm_90a"
        if torch.cuda.get_device_capability(problem.device) != (9, 0):
            return "for Hopper (sm_90) alone"
        if importlib.util.find_spec("triton") is None:
            return "needs the package triton for what surrounds its sweep"
        return self.why_not_shape(problem)

    def why_not_shape(self, problem: Problem) -> str | None:
        """The same for what does not depend on the machine."""
        rounds = problem.product_dtype == torch.float8_e4m3fn
        dtypes, dims = (DTYPES[2:], DIMS[1:]) if rounds else (DTYPES, DIMS)
        if problem.product_dtype is not None and not rounds:
            return f"rounds products to float8_e4m3fn alone, not to {problem.product_dtype}"
        if problem.queue_dtype not in dtypes:
            return f"not for prototypes in {problem.queue_dtype}"
        if problem.dim not in dims:
            return f"for D in {dims}, not {problem.dim}"
        if problem.trains_prototypes or problem.normalize:
            return "for frozen unit prototypes alone"
        if problem.smooths:
            return "no label smoothing"
        if problem.dtype == torch.float64 or problem.positive:
            return "no float64, no explicit positives"
        return None

    def volunteers(self, problem: Problem) -> bool:
        """Only for what no other backend does."""
        return problem.product_dtype is not None

    def load(self) -> None:
        """Registers its operators."""
        triton.register("hopper", margin_softmax, triton.prototype_gradient)


def margin_softmax(*received: Any, sweep: Callable[..., None] | None = None) -> tuple[Tensor, ...]:
    """The operator ``sst_fast::hopper_margin_softmax``; ``sweep`` takes the place of the compiled one, in tests."""

    def planned(p: Packed, rows: Any, processors: int) -> Plan:
        groups, b = (1, 0) if p.window is None else p.window.shape[:2]
        converts = p.prototypes.dtype == torch.float8_e4m3fn and not p.float8_products
        if p.float8_products:
            rows.unit = (rows.unit.float() * UNIT_OF_FLOAT8).to(torch.float8_e4m3fn)
        p.prototypes, p.window = aligned(p.prototypes), None if p.window is None else aligned(p.window)
        return plan(len(p.embedding) // groups, groups, len(p.prototypes), b, processors, converts)

    assert compiled is not None or sweep is not None
    return triton.margin_softmax(*received, sweep=sweep or compiled.cuda_sweep, plan=planned)  # type: ignore[union-attr]


def aligned(rows: Tensor) -> Tensor:
    """Rows where the copy engine can read them: at a multiple of 16 bytes."""
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()
