"""What time the two sweeps of the GPU are predicted to take, from static counts; never measured. docs/gpu_model.md explains it.

Sizes: N probes, K slots, D features. Times are seconds, rates per second.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from sst_fast.backends.backend import Problem
from sst_fast.backends.triton import float32_precision


class Rates(NamedTuple):
    """Of one multiprocessor and of a card, by data sheet."""

    flops: int  # dense bfloat16 operations per cycle of a multiprocessor; float32 by tf32: half of it
    memory: float  # bytes
    cache: float  # bytes, second level


RATES = {
    80: Rates(2048, 1.6e12, 4.0e12), 86: Rates(512, 0.8e12, 2.0e12), 89: Rates(1024, 0.9e12, 4.0e12),
    90: Rates(4096, 3.35e12, 5.5e12), 100: Rates(8192, 8.0e12, 8.0e12), 120: Rates(1024, 1.8e12, 5.0e12),
}  # fmt: skip
CLOCK = 1.7e9
WITHOUT_TENSOR_CORES = 256  # float32 operations per cycle of a multiprocessor
# Assumed, from neither machine code nor a data sheet: the share of those rates that a library's matrix product of this size reaches, that
# of mma.sync in the fused sweep, and the time from one kernel to the next.
LIBRARY = 0.75
FUSED_SHARE = 0.6
LAUNCH = 4e-6
# Counted in machine code for sm_90 of bfloat16 and the additive margin by tests/compile_triton.py, which compares them: cycles that the
# instructions of a fused sweep's loop take for 1,000 operations, at D up to so many, by Triton 3.8 and 3.9, which differ by up to 10 %. Elsewhere
# taken for the same.
FUSED_ISSUE = {64: 2.9, 128: 1.55, 256: 1.02, 512: 0.9, 1024: 0.9}
FUSED_ROWS = {64: 64, 128: 64, 256: 64, 512: 32, 1024: 16}  # probes that share one reading of the slots
# Counted there for each architecture: cycles of the instructions around product 1 of the staged sweep, for a tile of 128 x 128.
STAGED_EPILOGUE = {80: 3800, 86: 3850, 89: 3850, 90: 3550, 100: 4000, 120: 3800}
STAGED_TILE = 128
WEIGHTS = 32 << 20  # bytes of weights that the staged sweep holds at once
KEPT = 256 << 20  # and that its forward may keep for backward, where prototypes are trained


def fused_time(problem: Problem, architecture: int, processors: int) -> float:
    """Of the sweep that keeps the moments in registers; infinite where D is too large for that."""
    n, k, d = problem.probes or 1024, problem.slots or 16384, problem.dim  # 0: not known
    step = next((step for step in FUSED_ROWS if d <= step), None)
    if step is None:
        return math.inf
    rates, rows = RATES[architecture], FUSED_ROWS[step]
    size = problem.queue_dtype.itemsize
    blocks = math.ceil(n / rows)
    operations = 4 * blocks * rows * k * d
    per_operation = max(FUSED_ISSUE[step] / 1000, 1 / (FUSED_SHARE * _flops(problem, rates)))
    busy = min(1.0, blocks * max(1, 2 * processors // blocks) / (2 * processors))
    computing = operations * per_operation / (processors * busy * CLOCK)
    reading = max(k * d * size / rates.memory, blocks * k * d * size / rates.cache)
    if problem.trains_prototypes:  # both products again
        return 2 * max(computing, reading) + 5 * LAUNCH
    return max(computing, reading) + 3 * LAUNCH


class Terms(NamedTuple):
    """Of the staged sweep's time. ``reading`` the slots from memory passes meanwhile."""

    products: float
    epilogue: float
    weights: float
    moments: float
    launches: float
    reading: float


def staged_time(problem: Problem, architecture: int, processors: int) -> float:
    """Of the library's products and what lies between them: all one after the other, or reading the slots from memory, if that takes longer than
    the products and what follows them."""
    terms = staged_terms(problem, architecture, processors)
    return max(terms.products + terms.epilogue, terms.reading) + terms.weights + terms.moments + terms.launches


def staged_terms(problem: Problem, architecture: int, processors: int) -> Terms:
    """What takes the time."""
    n, k, d = problem.probes or 1024, problem.slots or 16384, problem.dim  # 0: not known
    rates = RATES[architecture]
    size = max(problem.queue_dtype.itemsize, 2)
    flops = _flops(problem, rates)
    tile = STAGED_TILE
    chunk = max(tile, min(k, WEIGHTS // (n * size) // tile * tile))
    chunks = math.ceil(k / chunk)
    rounds = chunks * math.ceil(math.ceil(n / tile) * (chunk / tile) / processors)
    tile_product = 2 * tile * tile * d / (LIBRARY * flops)
    sweeps = 2 if problem.queue_dtype == torch.float16 or problem.smooths else 1  # the rows' own shifts come first
    again = problem.trains_prototypes and n * k * size > KEPT  # backward makes weights anew, and multiplies by them
    first = (sweeps + again) * rounds / CLOCK
    second = max(2 * n * k * d / (LIBRARY * flops * processors * CLOCK), k * d * size / rates.cache)
    weights = 2 * n * k * size / rates.cache
    moments = 8 * chunks * n * d / rates.cache
    launches = (1 + sweeps) * chunks + 2 + sweeps
    if problem.trains_prototypes:
        second, launches = 2 * second, launches + (1 + again) * chunks + 2
        weights += 2 * n * k * size / (rates.cache if again else rates.memory)  # what is kept leaves the cache
    epilogue = first * STAGED_EPILOGUE[architecture]
    reading = k * d * size / rates.memory
    return Terms(first * tile_product + second, epilogue, weights, moments, launches * LAUNCH, reading)


def _flops(problem: Problem, rates: Rates) -> float:
    if problem.queue_dtype != torch.float32:
        return rates.flops
    return rates.flops / 2 if float32_precision() == "tf32" else WITHOUT_TENSOR_CORES


def table() -> str:
    """Predictions for a card with 132 multiprocessors of sm_90, milliseconds, in Markdown."""
    lines = ["| dtype, N, K, D on sm_90 | fused, ms | staged, ms | two bare products, ms |", "|---|---|---|---|"]
    for dtype, n, k, d in (
        (torch.bfloat16, 16, 16384, 512), (torch.bfloat16, 64, 16384, 512), (torch.bfloat16, 256, 16384, 512),
        (torch.bfloat16, 1024, 16384, 128), (torch.bfloat16, 1024, 16384, 512), (torch.bfloat16, 4096, 1 << 20, 512),
        (torch.float16, 1024, 16384, 512), (torch.float32, 1024, 16384, 512),
    ):  # fmt: skip
        problem = Problem("margin_softmax", torch.device("cuda"), dtype, dtype, d, probes=n, slots=k)
        bare = 4 * n * k * d / (LIBRARY * _flops(problem, RATES[90]) * 132 * CLOCK)
        bare = max(bare, k * d * dtype.itemsize / RATES[90].memory)
        times = [1e3 * time for time in (fused_time(problem, 90, 132), staged_time(problem, 90, 132), bare)]
        name = f"{str(dtype).removeprefix('torch.')}, {n:,}, {k:,}, {d}"
        lines.append(f"| {name} | " + " | ".join(f"{time:.3g}" for time in times) + " |")
    return "\n".join(lines)
