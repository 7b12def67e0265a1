"""The loss, its gradient and the enqueue over several processes, queue gathered or sharded, beside each rank's bare products."""

from __future__ import annotations

import functools
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import sst_fast
from bench import timing
from bench.problems import Problem
from bench.test_loss import BARE, ready
from bench.timing import REPLAY

pytestmark = pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
CONTENDERS = (BARE, "ours (gathered)", "ours (sharded)")


@dataclass(frozen=True)
class Case:
    """B identities for each of W processes, K slots in all."""

    world: int
    contender: str
    batch: int
    size: int

    def __str__(self) -> str:
        return f"w{self.world}-b{self.batch}-k{self.size}-{self.contender}"


def cases(size: str, device: torch.device) -> list[Case]:
    """As many processes as there are devices."""
    most = torch.cuda.device_count() if device.type == "cuda" else torch.get_num_threads()
    worlds = [w for w in (2**i for i in range(8)) if w <= max(1, most)]
    if size == "smoke":
        worlds = [2]
    batch, slots = (4, 64) if size == "smoke" else (128, 16384)
    return [Case(w, c, batch, slots) for w in worlds for c in CONTENDERS if w > 1 or "sharded" not in c]


def step(world: int, batch: int, size: int, here: torch.device, shard: bool) -> Callable[[], object]:
    """One rank's part of the loss, its gradient and the enqueue."""
    slots, spare = (size // world, world * batch) if shard else (size, 0)
    queue = sst_fast.GalleryQueue(slots, 512, spare=spare, device=here)
    queue.enqueue(torch.randn(slots, 512, device=here), torch.arange(slots, device=here))
    criterion = sst_fast.SemiSiameseLoss(queue, shard=shard)
    features = [torch.randn(batch, 512, device=here) for _ in range(4)]
    leaves = [x.requires_grad_() for x in features[:2]]
    identity = torch.arange(batch, device=here) + size + dist.get_rank() * batch
    return lambda: torch.autograd.grad(criterion(*features, identity), leaves)


def work(
    rank: int, world: int, batch: int, size: int, device: str, seconds: float, memory: bool, port: int, path: str
) -> None:
    """One process: takes turns between contenders, all ranks together. Rank 0 saves seconds, or MiB."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    here = torch.device(f"cuda:{rank}" if device == "cuda" else "cpu")
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=world)
    # As many operations as with a shard's share of the slots.
    (_, bare), *_ = ready(vars(Problem(2 * batch, size)), [], here)
    calls = {BARE: bare, "ours (gathered)": step(world, batch, size, here, False)}
    if world > 1:
        calls["ours (sharded)"] = step(world, batch, size, here, True)
    found: dict[str, list[float]] = {name: [] for name in calls}
    begin, least = time.perf_counter(), 3 if memory else 7
    while True:
        for name, call in calls.items():
            dist.barrier()
            if memory:
                found[name].append(timing.extra_memory(call, here))
                continue
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - start)
        go = torch.tensor(float(len(found[BARE]) < least or time.perf_counter() - begin < seconds), device=here)
        dist.broadcast(go, 0)
        if not go:
            break
    if rank == 0:
        torch.save({name: values[2:] for name, values in found.items()}, path)
    dist.barrier()
    dist.destroy_process_group()


@functools.lru_cache(maxsize=1)
def measure(
    world: int, batch: int, size: int, device: str, seconds: float, memory: bool, path: Path
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every round; MiB on the first rank."""

    def run(seconds: float, memory: bool) -> dict[str, list[float]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(work, (world, batch, size, device, seconds, memory, port, str(path)), world)
        found: dict[str, list[float]] = torch.load(path)
        return found

    times, mib = run(seconds, False), {}
    if memory:
        with mock.patch.dict(os.environ, timing.QUIET):
            mib = {name: values[-1] for name, values in run(0, True).items()}
    return times, mib


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("scaling") / "found.pt"


def test_scaling(replay, device, case, seconds, memory, path):
    times, mib = measure(case.world, case.batch, case.size, device.type, seconds, memory, path)
    replay(
        times[case.contender], f"scaling-w{case.world}-b{case.batch}-k{case.size}", suite="scaling",
        provider=case.contender, problem={"world": case.world, "batch": case.batch, "k": case.size},
        extra_mib=mib.get(case.contender),
    )  # fmt: skip
