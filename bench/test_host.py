"""The host's share: microseconds a call takes where there is next to nothing to compute, its launches and its allocations.

On a GPU the kernels of a usual step take some tens of microseconds, so what the host needs to start them decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import sst_fast
from bench import problems, providers, timing
from bench.problems import Problem
from bench.timing import REPLAY

pytestmark = pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
STEP = "loss and enqueue of a step"
BURST = 20  # calls of a turn: in a turn of one call the caches would still hold what another contender left there


class Case(problems.Case):
    """A provider's turn at a problem that is too small to matter."""

    def __str__(self) -> str:
        return f"host-{super().__str__()}"


def cases(size: str, device: torch.device) -> list[Case]:
    """The smallest calls, with and without a gradient, and Semi-Siamese Training's loss with its enqueue."""
    names = [provider.name for provider in providers.PROVIDERS if provider.name != "torch.compile"]
    found = []
    for problem in (
        Problem(4, 32, 64, sst=sst, task=task) for sst in (False, True) for task in ("forward", "gradient")
    ):
        found += [Case(problem, name) for name in names]
    plain = Problem(4, 32, 64, sst=False, task="prototypes", margin="softmax")
    return [*found, *(Case(plain, name) for name in names), Case(Problem(4, 32, 64), STEP)]


def step(device: torch.device) -> Callable[[], object]:
    """The loss of both directions and the enqueue, without networks."""
    queue = sst_fast.GalleryQueue(32, 64, device=device)
    criterion = sst_fast.SemiSiameseLoss(queue)
    a, b = (torch.randn(4, 64, device=device, requires_grad=True) for _ in range(2))
    gallery_a, gallery_b = (torch.randn(4, 64, device=device) for _ in range(2))
    identity = torch.arange(4, device=device)
    return lambda: criterion(a, b, gallery_a, gallery_b, identity)


def counts(call: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Operations that PyTorch dispatches in a call, kernels that it launches, and allocations."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    call()
    with profile(activities=activities, profile_memory=True) as seen:
        call()
    assert seen.profiler is not None
    raw = seen.profiler.kineto_results.events()  # memory events that lie inside an operation are in these alone
    events = list(seen.events() or ())
    return {
        "operations": sum(event.name.startswith(("aten::", "sst_fast::")) and event.cpu_parent is None for event in events),
        "launches": sum("LaunchKernel" in event.name() for event in raw),
        "allocations": sum(event.name() == "[memory]" and event.nbytes() > 0 for event in raw),
    }  # fmt: skip


@functools.lru_cache(maxsize=1)
def measure(
    problem: Problem, with_step: bool, device: torch.device, seconds: float
) -> tuple[dict[str, list[float]], dict[str, dict[str, int]], dict[str, str]]:
    """Seconds of every call; counts; why others did not take part."""
    inputs = problems.make(problem, device)
    calls: dict[str, Callable[[], object]] = {STEP: step(device)} if with_step else {}
    absent = {}
    for provider in providers.PROVIDERS:
        reason = provider.why_not(problem, device)
        if reason or provider.name == "torch.compile":
            absent[provider.name] = reason
        else:
            calls[provider.name] = provider.make(problem, inputs)
    wall_clock = torch.device("cpu")  # what a GPU computes meanwhile is not the host's time
    turns = timing.race({name: [burst(call)] for name, call in calls.items()}, wall_clock, seconds, 5, 2000)
    times = {name: [each / BURST for each in found] for name, found in turns.items()}
    return times, {name: counts(call, device) for name, call in calls.items()}, absent


def burst(call: Callable[[], object]) -> Callable[[], None]:
    """A turn: the call again and again."""

    def turn() -> None:
        for _ in range(BURST):
            call()

    return turn


def test_host(replay, device, case, seconds):
    times, numbers, absent = measure(case.problem, case.provider == STEP, device, seconds)
    if case.provider in absent:
        pytest.skip(absent[case.provider])
    replay(
        times[case.provider], f"host-{case.problem}", suite="host", provider=case.provider,
        problem=asdict(case.problem), counts=numbers[case.provider],
    )  # fmt: skip
