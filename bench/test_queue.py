"""Queue and gallery update, beside a copy of the bytes that must move and what plain PyTorch does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sst_fast
from bench import timing
from bench.timing import REPLAY
from sst_fast import GalleryQueue
from sst_fast.train import backbones

pytestmark = pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
LIMIT = "copy of the bytes"
CONTENDERS = (LIMIT, "ours (cpu)", "ours (cuda)", "ours (reference)", "plain PyTorch")


@dataclass(frozen=True)
class Case:
    """One operation by one contender; batch B into a queue of ``size`` slots of 512."""

    operation: str  # 'enqueue', 'dequeue', 'update'
    batch: int
    dtype: str
    size: int
    contender: str

    def __str__(self) -> str:
        return f"{self.operation}-b{self.batch}-{self.dtype}-{self.contender}"


def cases(size: str, device: torch.device) -> list[Case]:
    """Batches and dtypes."""
    slots = 64 if size == "smoke" else 16384
    batches = [4] if size == "smoke" else [1, 128, 512, 4096]
    dtypes = ["float32"] if size == "smoke" else ["float32", "bfloat16", "float8_e4m3fn"]
    found = [("enqueue", b, t) for b in batches for t in dtypes] + [("dequeue", b, "float32") for b in batches]
    found.append(("update", 0, "float32"))
    return [Case(operation, b, t, slots, c) for operation, b, t in found for c in CONTENDERS]


Measured = tuple[dict[str, list[float]], dict[str, float]]  # seconds of every round; MiB


@functools.lru_cache(maxsize=1)
def measure(
    operation: str, batch: int, dtype: str, size: int, device: torch.device, seconds: float, memory: bool
) -> Measured:
    settings = operation, batch, dtype, size
    times = timing.race({name: [call] for name, call in ready(*settings, device)}, device, seconds, 20)
    return times, timing.peak_memory("bench.test_queue:ready", settings, device) if memory else {}


def ready(
    operation: str, batch: int, dtype: str, size: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Contenders, each called once."""
    contenders = {"enqueue": enqueue, "dequeue": dequeue, "update": update}[operation](batch, dtype, size, device)
    for name, call in contenders.items():
        call()
        yield name, call


def enqueue(batch: int, dtype: str, size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Normalise, cast, write at the ring's position. Plain: slices, the wrap-around by hand, identities in a Python list."""
    kind = getattr(torch, dtype)
    features, ids = torch.randn(batch, 512, device=device), torch.arange(batch, device=device)
    calls: dict[str, Callable[[], object]] = {}
    wanted = F.normalize(features).to(kind).float()
    for backend, state in sst_fast.backends(device)["enqueue"].implementations.items():
        if state == "available":
            queue = GalleryQueue(size, 512, kind, device=device, backend=backend)
            queue.enqueue(features, ids)
            close = queue.features[:batch].float() - wanted
            assert close.abs().max() <= torch.finfo(kind).eps, backend
            calls[f"ours ({backend})"] = functools.partial(queue.enqueue, features, ids)

    ring, labels, at = torch.zeros(size, 512, dtype=kind, device=device), [-1] * size, 0

    def plain() -> None:
        nonlocal at
        unit = F.normalize(features).to(kind)
        first = min(batch, size - at)
        ring[at : at + first] = unit[:first]
        ring[: batch - first] = unit[first:]
        for i, identity in enumerate(ids.tolist()):
            labels[(at + i) % size] = identity
        at = (at + batch) % size

    source, target = wanted.to(kind), torch.empty(batch, 512, dtype=kind, device=device)
    return {LIMIT: lambda: target.copy_(source), **calls, "plain PyTorch": plain}


def dequeue(batch: int, dtype: str, size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Empties the oldest slots and gives their identities. Plain: a Python list."""
    calls: dict[str, Callable[[], object]] = {}
    for backend, state in sst_fast.backends(device)["dequeue"].implementations.items():
        if state == "available":
            queue = GalleryQueue(size, 512, device=device, backend=backend)
            queue.enqueue(torch.randn(size, 512, device=device), torch.arange(size, device=device))
            assert queue.dequeue(1).tolist() == [0], backend

            def call(queue: GalleryQueue = queue) -> None:
                queue.state[1] = size  # full again
                queue.dequeue(batch)

            calls[f"ours ({backend})"] = call
    labels = list(range(size))

    def plain() -> None:
        torch.tensor(labels[:batch], device=device)
        labels[:batch] = [-1] * batch

    source, target = torch.arange(batch, device=device), torch.empty(batch, dtype=torch.int64, device=device)
    return {LIMIT: lambda: target.copy_(source), **calls, "plain PyTorch": plain}


def update(batch: int, dtype: str, size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """MobileFaceNet's moving average. Plain: a loop over parameters. Limit: one lerp over as many numbers in one tensor."""
    network = backbones.build("mobilefacenet", 512, 112)
    model = sst_fast.SemiSiamese(network, sst_fast.SemiSiameseLoss(GalleryQueue(8, 512))).to(device)
    probe, gallery = list(model.probe.parameters()), list(model.gallery.parameters())

    def plain() -> None:
        with torch.no_grad():
            for mine, theirs in zip(gallery, probe, strict=True):
                mine.copy_(0.999 * mine + 0.001 * theirs)

    flat = [nn.utils.parameters_to_vector(p.detach() for p in side) for side in (gallery, probe)]
    return {
        LIMIT: lambda: flat[0].lerp_(flat[1], 0.001),
        "ours (cpu)": model.update_gallery,
        "plain PyTorch": plain,
    } | ({} if device.type == "cpu" else {"ours (cuda)": model.update_gallery})


def test_queue(replay, device, case, seconds, memory):
    times, mib = measure(case.operation, case.batch, case.dtype, case.size, device, seconds / 3, memory)
    if case.contender not in times:
        pytest.skip("not for this device or operation")
    replay(
        times[case.contender], f"{case.operation}-b{case.batch}-{case.dtype}", suite="queue", provider=case.contender,
        problem={"operation": case.operation, "batch": case.batch, "dtype": case.dtype}, extra_mib=mib.get(case.contender),
    )  # fmt: skip
