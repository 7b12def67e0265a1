"""The loss and the enqueue over several processes: queue gathered or sharded."""

from __future__ import annotations

import functools
import os
import socket
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import sst_fast
from bench.timing import REPLAY

pytestmark = pytest.mark.benchmark(timer=REPLAY, disable_gc=False)


@dataclass(frozen=True)
class Case:
    """B identities for each of W processes, K slots in all."""

    world: int
    queue: str  # 'gathered' or 'sharded'
    batch: int
    size: int

    def __str__(self) -> str:
        return f"{self.queue}-w{self.world}-b{self.batch}-k{self.size}"


def cases(size: str, device: torch.device) -> list[Case]:
    """As many processes as there are devices."""
    most = torch.cuda.device_count() if device.type == "cuda" else torch.get_num_threads()
    worlds = [w for w in (2**i for i in range(8)) if w <= max(1, most)]
    if size == "smoke":
        worlds = [2]
    batch, slots = (4, 64) if size == "smoke" else (128, 16384)
    return [Case(w, q, batch, slots) for w in worlds for q in ("gathered", "sharded") if w > 1 or q == "gathered"]


def work(rank: int, case: Case, device: str, seconds: float, port: int, path: str) -> None:
    """One process."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, torch.get_num_threads() // case.world))
    here = torch.device(f"cuda:{rank}" if device == "cuda" else "cpu")
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=case.world)
    shard = case.queue == "sharded"
    size, spare = (case.size // case.world, case.world * case.batch) if shard else (case.size, 0)
    queue = sst_fast.GalleryQueue(size, 512, spare=spare, device=here)
    queue.enqueue(torch.randn(size, 512, device=here), torch.arange(size, device=here))
    criterion = sst_fast.SemiSiameseLoss(queue, shard=shard)
    features = [torch.randn(case.batch, 512, device=here) for _ in range(4)]
    leaves = [x.requires_grad_() for x in features[:2]]
    identity = torch.arange(case.batch, device=here) + case.size + rank * case.batch
    times: list[float] = []
    begin = time.perf_counter()
    while True:
        dist.barrier()
        start = time.perf_counter()
        torch.autograd.grad(criterion(*features, identity), leaves)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        go = torch.tensor(float(len(times) < 7 or time.perf_counter() - begin < seconds), device=here)
        dist.broadcast(go, 0)
        if not go:
            break
    if rank == 0:
        torch.save(times[2:], path)
    dist.barrier()
    dist.destroy_process_group()


@functools.cache
def measure(case: Case, device: str, seconds: float, path: str) -> list[float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (case, device, seconds, port, path), case.world)
    found: list[float] = torch.load(path)
    return found


def test_scaling(replay, device, case, seconds, tmp_path):
    times = measure(case, device.type, seconds, str(tmp_path / "times.pt"))
    replay(
        times,
        "scaling",
        suite="scaling",
        provider=case.queue,
        problem={"world": case.world, "batch": case.batch, "k": case.size},
    )
