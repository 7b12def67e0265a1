"""Heads with learned class weights: ours beside the other projects' own or restated ones, and the bare products that limit both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import peers, timing
from bench.problems import Case
from bench.providers import missing
from bench.timing import REPLAY
from sst_fast.nn import convert
from sst_fast.nn.compat import adaface, facex_zoo, insightface, pytorch_metric_learning

pytestmark = pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
BARE, OURS, THEIRS = "bare products", "ours", "theirs"
Make = Callable[[int, int], nn.Module]  # from the number of classes and of features


def metric_learning(name: str) -> Make:
    """Of the library itself."""

    def make(classes: int, dim: int) -> nn.Module:
        from pytorch_metric_learning import losses

        return getattr(losses, name)(num_classes=classes, embedding_size=dim)

    return make


# name -> theirs, ours, the source that weights are converted from
HEADS: dict[str, tuple[Make, Make, str]] = {
    "insightface ArcFace": (
        lambda c, d: peers.PartialFC(c, d),
        lambda c, d: insightface.PartialFC_V2(insightface.ArcFace(), d, c),
        "insightface",
    ),
    "FaceX-Zoo MV_Softmax": (
        lambda c, d: peers.MVSoftmax(c, d, True), lambda c, d: facex_zoo.MV_Softmax(d, c, True), "facex-zoo",
    ),
    "FaceX-Zoo CurricularFace": (
        lambda c, d: peers.CurricularFace(c, d), lambda c, d: facex_zoo.CurricularFace(d, c), "facex-zoo",
    ),
    "FaceX-Zoo MagFace": (lambda c, d: peers.MagFace(c, d), lambda c, d: facex_zoo.MagFace(d, c), "facex-zoo"),
    "AdaFace": (lambda c, d: peers.AdaFace(c, d), lambda c, d: adaface.AdaFace(d, c), "adaface"),
    **{
        f"pytorch-metric-learning {name}": (
            metric_learning(name),
            lambda c, d, name=name: getattr(pytorch_metric_learning, name)(c, d),
            "pytorch-metric-learning",
        )
        for name in ("ArcFaceLoss", "CosFaceLoss", "SubCenterArcFaceLoss")
    },
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A head's loss of n embeddings with the gradients of these and of its weights, float32."""

    head: str
    n: int
    k: int
    d: int = 512

    def __str__(self) -> str:
        return f"{self.head}-n{self.n}-k{self.k}-d{self.d}"


def cases(size: str, device: torch.device) -> list[Case]:
    """All heads at one size, insightface's up to a million classes."""
    if size == "smoke":
        found = [Problem(name, 8, 40, 24) for name in HEADS]
    else:
        found = [Problem(name, 128, 100_000) for name in HEADS]
        sizes = [(1024, 100_000), *([(128, 1_000_000), (1024, 1_000_000)] if size == "full" else [])]
        found += [Problem("insightface ArcFace", n, k) for n, k in sizes]
    return [Case(problem, name) for problem in found for name in (BARE, OURS, THEIRS)]


def why_not(problem: Problem, provider: str) -> str:
    """Why a contender takes no part, or ''."""
    if problem.head.startswith("pytorch-metric-learning") and provider == THEIRS:
        reason = missing("pytorch_metric_learning")
        if reason:
            return reason
    return (
        "its logits take more than 2 GiB, several times" if provider == THEIRS and problem.n * problem.k > 2**29 else ""
    )


def make(problem: Problem, device: torch.device) -> dict[str, Callable[[], list[Tensor]]]:
    """Contenders by name: each gives the loss and both gradients. Weights are the same."""
    torch.manual_seed(0)
    x = (20 * torch.randn(problem.n, problem.d, device=device) / problem.d**0.5).requires_grad_()
    label = torch.randint(problem.k, (problem.n,), device=device)
    make_theirs, make_ours, source = HEADS[problem.head]
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    ours = make_ours(problem.k, problem.d).to(device)

    def call(head: nn.Module) -> Callable[[], list[Tensor]]:
        weight = next(head.parameters())

        def run() -> list[Tensor]:
            loss = head(x, label)
            return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]

        return run

    if not why_not(problem, THEIRS):
        theirs = make_theirs(problem.k, problem.d).to(device)
        ours.load_state_dict(convert(theirs.state_dict(), source))  # type: ignore[arg-type]
        calls[THEIRS] = call(theirs)
    calls[OURS] = call(ours)
    return calls


def bare(problem: Problem, device: torch.device) -> Callable[[], object]:
    """The four products of that size, outputs allocated once."""
    rows = problem.k * (3 if "SubCenter" in problem.head else 1)
    x, w = torch.randn(problem.n, problem.d, device=device), torch.randn(rows, problem.d, device=device)
    cosines, x_out, w_out = x @ w.T, torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        for _ in range(2):
            torch.mm(x, w.T, out=cosines)
        torch.mm(cosines, w, out=x_out)
        torch.mm(cosines.T, x, out=w_out)

    return run


def compare(problem: Problem, device: torch.device) -> None:
    """AssertionError unless both give the same loss and gradients, on fewer probes and classes."""
    small = Problem(problem.head, min(problem.n, 32), min(problem.k, 2000), problem.d)
    found = {name: call() for name, call in make(small, device).items()}
    for what, ours, theirs in zip(
        ("loss", "embedding", "weight"), found[OURS], found.get(THEIRS, found[OURS]), strict=True
    ):
        theirs = theirs if theirs.shape == ours.shape else theirs.T
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < 1e-3, f"{problem.head}: {what} differs by {error:.2g}"


@functools.lru_cache(maxsize=1)
def measure(
    problem: Problem, device: torch.device, seconds: float, memory: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every call; MiB at the peak of one."""
    compare(problem, device)
    calls: dict[str, Any] = {BARE: [bare(problem, device)]}
    calls |= {name: [call] for name, call in make(problem, device).items()}
    times = timing.race(calls, device, seconds)
    del calls
    return times, timing.peak_memory("bench.test_heads:ready", [asdict(problem)], device) if memory else {}


def ready(settings: dict[str, Any], device: torch.device) -> Iterator[tuple[str, timing.Call]]:
    """Contenders by name, with what they set up once done on a small problem."""
    problem = Problem(**settings)
    for call in make(Problem(problem.head, 8, 40, problem.d), device).values():
        call()
    yield from make(problem, device).items()


def test_heads(replay, device, case, seconds, memory):
    reason = why_not(case.problem, case.provider)
    if reason:
        pytest.skip(reason)
    times, extra = measure(case.problem, device, seconds, memory)
    replay(
        times[case.provider], str(case.problem), suite="heads", provider=case.provider, problem=asdict(case.problem),
        extra_mib=extra.get(case.provider),
    )  # fmt: skip
