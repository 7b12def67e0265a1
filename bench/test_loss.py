"""The loss: every provider that can compute a problem, taking turns with the bare products that limit it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
import torch

from bench import problems, providers, timing
from bench.problems import Case, Problem
from bench.timing import REPLAY

pytestmark = pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
BARE = "bare products"


def chosen(size: str, device: torch.device) -> list[Problem]:
    """Around one centre, one axis at a time, in both dtypes."""
    if size == "smoke":
        centre = Problem(8, 64, 32)
        plain = replace(centre, sst=False)
        return [
            centre, replace(centre, dtype="bfloat16", margin="arc"), replace(plain, margin="softmax"),
            replace(plain, task="prototypes"), replace(plain, task="forward"),
        ]  # fmt: skip
    gpu = device.type == "cuda"
    centre = Problem(1024 if gpu else 256, 16384)
    axes: dict[str, list[Any]] = {
        "n": [2, 32, 256, 1024], "k": [1024, 16384, 131072], "d": [128, 512, 1024],
        "margin": ["am", "arc", "softmax"], "task": ["forward", "gradient", "prototypes"],
    }  # fmt: skip
    if size == "full" or gpu:
        axes["n"] += [4096]
        axes["k"] += [1048576]
    if not gpu:
        most = torch.get_num_threads()
        axes["threads"] = [t for t in (2**i for i in range(10)) if t < most]
    found: dict[Problem, None] = {}
    for dtype in ("float32", "bfloat16"):
        for sst in (True, False):
            middle = replace(centre, dtype=dtype, sst=sst)
            for name, values in axes.items():
                if sst or name in ("margin", "task"):
                    found |= dict.fromkeys(replace(middle, **{name: value}) for value in values)
            found |= dict.fromkeys(replace(middle, n=1024, task=task) for task in axes["task"])
        found[replace(centre, dtype=dtype, sst=False, n=1)] = None
        # Small classifiers, where what surrounds the products weighs most.
        small = replace(centre, dtype=dtype, sst=False)
        found |= dict.fromkeys(
            replace(small, n=n, k=k, d=d) for n, k, d in ((16, 1000, 128), (32, 2560, 512), (256, 1024, 512))
        )
        # The plain softmax, which most libraries can compute, also over n.
        middle = replace(centre, dtype=dtype, sst=False, margin="softmax")
        found |= dict.fromkeys(replace(middle, n=n) for n in axes["n"][1:])
        found |= dict.fromkeys(replace(middle, task=task) for task in axes["task"])
    # The queue's features are nobody's parameters: prototypes are trained without one.
    return [problem for problem in found if not (problem.sst and problem.task == "prototypes")]


def compiles(problem: Problem, size: str) -> bool:
    """Whether torch.compile takes part: it needs most of a minute for each shape, so only the usual ones by default."""
    usual = problem.n in (256, 1024) and (problem.k, problem.d, problem.threads) == (16384, 512, 0)
    return size in ("full", "smoke") or usual


def cases(size: str, device: torch.device) -> list[Case]:
    """Each problem with each provider; those that cannot compute it are left out where the reason is the problem itself."""
    names = [BARE, *(provider.name for provider in providers.PROVIDERS)]
    return [
        Case(problem, name)
        for problem in chosen(size, device)
        for name in names
        if name != "torch.compile" or compiles(problem, size)
    ]


@dataclass
class Result:
    """What a problem's contenders took, why others did not take part, and what was wrong with whose result."""

    times: dict[str, list[float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)


@functools.lru_cache(maxsize=1)
def measure(problem: Problem, device: torch.device, size: str, seconds: float, memory: bool) -> Result:
    """Compares results, then times all that are right."""
    result = Result()
    able = []
    for provider in providers.PROVIDERS:
        reason = provider.why_not(problem, device)
        if provider.name == "torch.compile" and not compiles(problem, size):
            reason = "with --size full"
        if reason:
            result.absent[provider.name] = reason
        else:
            able.append(provider)
    threads = torch.get_num_threads()
    if problem.threads:
        torch.set_num_threads(problem.threads)
    try:
        few = problems.small(problem)
        inputs = problems.make(few, device)
        wanted = problems.expected(few, inputs)
        for provider in list(able):
            try:
                result.error[provider.name] = problems.compare(few, provider.make(few, inputs)(), wanted)
            except AssertionError as error:
                result.wrong[provider.name] = str(error)
                able.remove(provider)
        inputs = problems.make(problem, device)
        several = [inputs] + [
            problems.make(problem, device, seed) for seed in range(1, timing.copies([inputs.x_low, inputs.w_low]))
        ]
        calls: dict[str, list[Any]] = {BARE: [providers.bare(problem, each) for each in several]}
        calls |= {provider.name: [provider.make(problem, each) for each in several] for provider in able}
        result.times = timing.race(calls, device, seconds)
        if memory:
            names = [provider.name for provider in able]
            result.memory = timing.peak_memory("bench.test_loss:ready", [asdict(problem), names], device)
    finally:
        torch.set_num_threads(threads)
    return result


def ready(settings: dict[str, Any], names: list[str], device: torch.device) -> Iterator[tuple[str, timing.Call]]:
    """Providers by name, with what they set up once done on a small problem; bare products too."""
    problem = Problem(**settings)
    inputs = problems.make(problem, device)
    few = problems.small(problem, 16)
    warm = problems.make(few, device)
    makers = {BARE: providers.bare} | {p.name: p.make for p in providers.PROVIDERS if p.name in names}
    for name, make in makers.items():
        make(few, warm)()
        yield name, make(problem, inputs)


def test_loss(replay, device, case, seconds, memory, pytestconfig):
    result = measure(case.problem, device, pytestconfig.getoption("--size"), seconds, memory)
    if case.provider in result.absent:
        pytest.skip(result.absent[case.provider])
    if case.provider in result.wrong:
        pytest.fail(f"{case.provider}: {result.wrong[case.provider]}")
    replay(
        result.times[case.provider], str(case.problem), suite="loss", provider=case.provider,
        problem=vars(case.problem), extra_mib=result.memory.get(case.provider),
        error=result.error.get(case.provider),
    )  # fmt: skip
