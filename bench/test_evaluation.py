"""Comparing all pairs of M images block by block, beside the bare products and the matrix of all cosines."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from bench import timing
from bench.timing import REPLAY
from sst_fast import evaluation

pytestmark = pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
LIMIT = "bare products, M x M"
CONTENDERS = (LIMIT, "bare products, each pair once", "ours", "ours, with everything that eval tells", "matrix")
LONG = 40_000  # images from which a call takes so long that one turn without warm-up says enough
BLOCK = 2048  # columns of a bare product; 512 rows


@dataclass(frozen=True)
class Case:
    """M images of M / 5 identities, D features, by one contender."""

    images: int
    dim: int
    contender: str

    def __str__(self) -> str:
        return f"m{self.images}-d{self.dim}-{self.contender}"


def cases(size: str, device: torch.device) -> list[Case]:
    """Small enough for the matrix at first."""
    sizes = {
        "smoke": [(60, 8)],
        "default": [(8192, 512), (20480, 512)],
        "full": [(8192, 512), (20480, 128), (51200, 128), (51200, 512)],
    }
    return [Case(m, d, name) for m, d in sizes[size] for name in CONTENDERS]


@functools.lru_cache(maxsize=1)
def measure(
    images: int, dim: int, device: torch.device, seconds: float, memory: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    calls = dict(ready(images, dim, device))
    once = {"most": 1, "warm_up": 0} if images >= LONG else {}
    times = timing.race({name: [call] for name, call in calls.items()}, device, seconds, 1, **once)
    return times, timing.peak_memory("bench.test_evaluation:ready", (images, dim), device) if memory else {}


def ready(images: int, dim: int, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Contenders; the matrix only as far as its memory goes, and there its rates are ours."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(images, generator=generator) // 5
    centres = torch.randn(images // 5 + 1, dim, generator=generator)
    noisy = centres[labels] + 1.5 * torch.randn(images, dim, generator=generator)
    x = torch.nn.functional.normalize(noisy).to(device)

    def products(once: bool) -> None:
        for start in range(0, images, BLOCK):
            columns = x[start : start + BLOCK].T
            for row in range(0, min(start + BLOCK, images) if once else images, 512):
                x[row : row + 512] @ columns

    def matrix() -> evaluation.PairScores:
        cosines = (x @ x.T).cpu()
        same = labels[:, None] == labels[None]
        upper = torch.ones_like(same).triu(1)
        return evaluation.PairScores.of(cosines[same & upper], cosines[~same & upper])

    def everything() -> object:
        scores = evaluation.evaluate(x, labels, evaluation.FARS)
        return evaluation.collapse(x, labels, scores.spectrum)

    ours = functools.partial(evaluation.all_pairs, x, labels)
    if images < 1000:
        tar = ours().pairs.tar_at((0.1,))[0.1].value
        assert tar == pytest.approx(matrix().tar_at((0.1,))[0.1].value, abs=1e-6)
    yield LIMIT, functools.partial(products, False)
    yield "bare products, each pair once", functools.partial(products, True)
    yield "ours", ours
    if images < 2 * LONG:
        yield "ours, with everything that eval tells", everything
    if images <= 8192:
        yield "matrix", matrix


def test_evaluation(
    case: Case, replay: Callable[..., None], device: torch.device, seconds: float, memory: bool
) -> None:
    times, extra = measure(case.images, case.dim, device, seconds, memory)
    if case.contender not in times:
        pytest.skip("not at this size")
    replay(
        times[case.contender], f"M {case.images}, D {case.dim}", suite="evaluation", provider=case.contender,
        problem={"images": case.images, "dim": case.dim}, extra_mib=extra.get(case.contender),
    )  # fmt: skip


if __name__ == "__main__":  # one comparison of so many images and features: seconds and MiB beside the embeddings
    cpu, (images, dim) = torch.device("cpu"), map(int, sys.argv[1:])
    compare = dict(ready(images, dim, cpu))["ours"]
    begin = time.perf_counter()
    extra_mib = timing.extra_memory(compare, cpu)
    print(json.dumps({"seconds": time.perf_counter() - begin, "extra_mib": extra_mib}))
