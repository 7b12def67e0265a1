"""A whole training step, and what it is made of: the networks, the loss kernel, and what the method adds to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import sst_fast
from bench import timing
from bench.timing import REPLAY
from sst_fast.functional import margin_softmax
from sst_fast.train import backbones

pytestmark = pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
PARTS = ("whole step", "networks", "step around free networks", "loss kernel", "enqueue", "gallery update")


class Free(nn.Module):
    """A network that costs nothing: the first features of the image."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.scale = dim, nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.flatten(1)[:, : self.dim] * self.scale


@dataclass(frozen=True)
class Case:
    """A part of the step of one backbone at B identities, queue of K."""

    backbone: str
    batch: int
    size: int
    queue: int
    part: str

    def __str__(self) -> str:
        return f"{self.backbone}-b{self.batch}-k{self.queue}-{self.part}"


def cases(size: str, device: torch.device) -> list[Case]:
    """MobileFaceNet as in the paper; ResNet-50 where timm is installed."""
    if size == "smoke":
        found = [("mobilefacenet", 2, 32, 64)]
    elif device.type == "cuda":
        found = [(b, 128, 112, 16384) for b in ("mobilefacenet", "timm:resnet50")]
    else:
        found = [("mobilefacenet", 32, 112, 16384), ("timm:resnet50", 8, 112, 16384)]
    return [Case(*each, part) for each in found for part in PARTS]


@functools.lru_cache(maxsize=1)
def measure(
    backbone: str, batch: int, size: int, queue: int, device: torch.device, seconds: float, memory: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every round; MiB."""
    settings = backbone, batch, size, queue
    calls = {name: [call] for name, call in ready(*settings, device)}
    times = timing.race(calls, device, 5 * seconds, 3 if seconds == 0 else 7)
    return times, timing.peak_memory("bench.test_step:ready", settings, device) if memory else {}


def ready(
    backbone: str, batch: int, size: int, queue: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The step's parts, each called once."""
    dim = 512
    slots = sst_fast.GalleryQueue(queue, dim)
    slots.enqueue(torch.randn(queue, dim), torch.arange(queue))
    criterion = sst_fast.SemiSiameseLoss(slots)
    model = sst_fast.SemiSiamese(backbones.build(backbone, dim, size), criterion).to(device).train()
    optimizer = torch.optim.SGD(model.probe.parameters(), 1e-4, momentum=0.9, weight_decay=5e-4)
    a, b = (torch.randn(batch, 3, size, size, device=device) for _ in range(2))
    identity = torch.arange(queue, queue + batch, device=device)

    def networks_alone() -> None:
        """Both networks' forward passes, the probe network's backward pass, the optimizer."""
        probes = [model.probe(a), model.probe(b)]
        with torch.no_grad():
            model.gallery(a), model.gallery(b)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(probes, [torch.ones_like(p) / p.numel() for p in probes])
        optimizer.step()

    def whole() -> None:
        loss = model(a, b, identity)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        model.update_gallery()

    free = sst_fast.SemiSiamese(Free(dim), criterion).to(device).train()

    def around_free_networks() -> None:
        free(a, b, identity).backward()

    embedding = torch.randn(2 * batch, dim, device=device, requires_grad=True)
    features = torch.randn(2, batch, dim, device=device)
    window = slots.window(features, identity)

    def loss_kernel() -> None:
        margin_softmax(
            embedding, slots.features, window.slots.repeat(2), window=window, identity=identity.repeat(2),
            slot_identity=slots.identities, scale=30.0,
        ).backward()  # fmt: skip
        embedding.grad = None

    parts: dict[str, Callable[[], object]] = {
        "whole step": whole, "networks": networks_alone, "step around free networks": around_free_networks,
        "loss kernel": loss_kernel,
        "enqueue": functools.partial(slots.enqueue, features[0], identity), "gallery update": model.update_gallery,
    }  # fmt: skip
    for name, call in parts.items():
        call()
        yield name, call


def test_step(replay, device, case, seconds, memory):
    if case.backbone.startswith("timm:"):
        pytest.importorskip("timm", exc_type=ImportError)
    times, mib = measure(case.backbone, case.batch, case.size, case.queue, device, seconds, memory)
    replay(
        times[case.part], f"step-{case.backbone}-b{case.batch}", suite="step", provider=case.part,
        problem={"backbone": case.backbone, "batch": case.batch, "k": case.queue}, extra_mib=mib.get(case.part),
    )  # fmt: skip
