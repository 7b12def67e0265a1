"""A step of partial FC, its optimizer's included: ours, which touches the sampled rows alone, beside insightface's way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sst_fast
from bench import timing
from bench.timing import REPLAY
from sst_fast.nn import PartialFC, RowSGD

pytestmark = pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
BARE, PEER = "bare products", "partial FC v2, plain"
CONTENDERS = (BARE, "ours", PEER)
SCALE, MARGIN, SETTINGS = 64.0, 0.4, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Case:
    """N embeddings of 512 features, C classes of which a share takes part."""

    batch: int
    classes: int
    rate: float
    contender: str

    def __str__(self) -> str:
        return f"n{self.batch}-c{self.classes}-rate{self.rate:g}-{self.contender}"


def cases(size: str, device: torch.device) -> list[Case]:
    """A million classes in the full form alone: with all contenders side by side it needs 16 GiB."""
    found = {"smoke": [(4, 50, 0.2)], "default": [(128, 100_000, 0.1), (128, 100_000, 1.0)]}
    found["full"] = [*found["default"], (128, 1_000_000, 0.1)]
    return [Case(*each, contender) for each in found[size] for contender in CONTENDERS]


@functools.lru_cache(maxsize=1)
def measure(
    batch: int, classes: int, rate: float, device: torch.device, seconds: float, memory: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every round; MiB beyond weights and momentum."""
    settings = batch, classes, rate
    times = timing.race({name: [call] for name, call in ready(*settings, device)}, device, 2 * seconds)
    return times, timing.peak_memory("bench.test_partial_fc:ready", settings, device) if memory else {}


def ready(
    batch: int, classes: int, rate: float, device: torch.device, contenders: tuple[str, ...] = CONTENDERS
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Contenders, each called once, after their losses have been compared."""
    torch.manual_seed(0)
    x = torch.randn(batch, 512, device=device)
    y = torch.randint(classes, (batch,), device=device)
    sample = max(int(rate * classes), 1)
    made = {
        BARE: lambda: bare(x, sample),
        "ours": lambda: ours(x, y, classes, rate),
        PEER: lambda: plain(x, y, classes, sample),
    }
    losses = []
    for name in contenders:
        call = made[name]()
        loss = call()
        if isinstance(loss, Tensor):
            losses.append(loss)
        yield name, call
    # Weights and draws are random: the losses are alike, not the same.
    assert all(abs(loss - losses[0]) < 0.05 * losses[0] for loss in losses), losses


def ours(x: Tensor, y: Tensor, classes: int, rate: float) -> Callable[[], Tensor]:
    """Fused, sparse gradient, rows' optimizer."""
    head = PartialFC(classes, x.shape[1], sst_fast.AMSoftmax(MARGIN), SCALE, sample_rate=rate).to(x.device)
    return step(x, head.weight, RowSGD(head.parameters(), **SETTINGS), lambda leaf: head(leaf, y))


def plain(x: Tensor, y: Tensor, classes: int, sample: int) -> Callable[[], Tensor]:
    """insightface's partial FC v2 on one process: sampled rows copied, all logits, a dense gradient for PyTorch's SGD."""
    weight = torch.nn.Parameter(torch.normal(0, 0.01, (classes, x.shape[1]), device=x.device))

    def loss(leaf: Tensor) -> Tensor:
        rows, target = weight, y
        if sample < classes:
            order = torch.rand(classes, device=y.device)
            order[y.unique()] = 2.0
            index = order.topk(sample).indices.sort().values
            rows, target = weight[index], torch.searchsorted(index, y)
        cosine = F.linear(F.normalize(leaf), F.normalize(rows)).clamp(-1, 1)
        margined = cosine.gather(1, target[:, None]) - MARGIN
        return F.cross_entropy(SCALE * cosine.scatter(1, target[:, None], margined), target)

    return step(x, weight, torch.optim.SGD([weight], **SETTINGS), loss)


def step(
    x: Tensor, weight: Tensor, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor]
) -> Callable[[], Tensor]:
    """Loss, gradients of embeddings and weights, update."""
    leaf = x.clone().requires_grad_()

    def run() -> Tensor:
        value = loss(leaf)
        value.backward()
        optimizer.step()
        weight.grad = leaf.grad = None  # not zeroed: the peak is the step's own
        return value.detach()

    return run


def bare(x: Tensor, sample: int) -> Callable[[], None]:
    """The four products of that many rows."""
    w = torch.randn(sample, x.shape[1], device=x.device)
    cosines, out, rows = x @ w.T, torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        for _ in range(2):
            torch.mm(x, w.T, out=cosines)
        torch.mm(cosines, w, out=out)
        torch.mm(cosines.T, x, out=rows)

    return run


def test_partial_fc(replay, device, case, seconds, memory):
    times, mib = measure(case.batch, case.classes, case.rate, device, seconds, memory)
    replay(
        times[case.contender], f"partial-fc-n{case.batch}-c{case.classes}-rate{case.rate:g}", suite="partial_fc",
        provider=case.contender, problem={"n": case.batch, "classes": case.classes, "rate": case.rate},
        extra_mib=mib.get(case.contender),
    )  # fmt: skip
