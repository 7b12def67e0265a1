"""The sweep in CUDA C++ for Hopper (csrc/cuda/sweep_sm90.cu): what it can do, and how it is cut. Not yet run on a GPU.

It takes the place of Triton's sweep between the same two kernels, which prepare rows and combine splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def fits(
    prototypes: Tensor, trains_prototypes: bool, normalize: bool, label_smoothing: float, float8_products: bool
) -> bool:
    """Whether this sweep can do it; Triton's does the rest."""
    if trains_prototypes or normalize or label_smoothing:
        return False
    dtypes, dims = (DTYPES[2:], DIMS[1:]) if float8_products else (DTYPES, DIMS)
    return prototypes.dtype in dtypes and prototypes.shape[1] in dims


def aligned(rows: Tensor) -> Tensor:
    """Rows where the copy engine can read them: at a multiple of 16 bytes."""
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()
