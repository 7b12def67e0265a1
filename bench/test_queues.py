"""Losses of ``sst_fast.nn`` over queues, pairs and both sides of a batch, beside the projects' own or restated ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import providers, queue_peers, timing
from bench.timing import REPLAY
from sst_fast import GalleryQueue
from sst_fast.nn import DCQ, CLIPLoss, Contrastive, CrossBatchMemory, MoCo, NTXent, PairCircle, SigLIPLoss, SupCon

pytestmark = pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
BARE, OURS, PLAIN, LIBRARY = "bare products", "ours", "plain", "pytorch-metric-learning"
PEOPLE = 100  # identities where positives are several
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One loss by one contender: N probes, K keys (those of the batch where k is 0), D features."""

    loss: str
    n: int
    k: int
    d: int
    contender: str

    def __str__(self) -> str:
        return f"{self.loss}-n{self.n}-k{self.k or self.n}-d{self.d}-{self.contender}"


def cases(size: str, device: torch.device) -> list[Case]:
    """Sizes as in the papers or their codes."""
    wanted = {
        "MoCo": [(256, 65536, 128)],
        "DCQ": [(128, 8192, 512)],
        "SupCon": [(2048, 0, 128), (1024, 0, 512)],
        "SupCon inside": [(2048, 0, 128)],
        "NTXent": [(2048, 0, 128)],
        "PairCircle": [(1024, 0, 512)],
        "CrossBatchMemory SupCon": [(128, 16384, 128), (128, 65536, 128)],
        "CrossBatchMemory Contrastive": [(128, 16384, 128)],
        "CrossBatchMemory NTXent": [(32, 2048, 128), (128, 16384, 128)],
        "CLIP": [(256, 0, 512), (1024, 0, 512), (4096, 0, 512)],
        "SigLIP": [(256, 0, 512), (1024, 0, 512), (4096, 0, 512)],
    }
    if size == "smoke":
        wanted = {loss: [(16, 64 * (sizes[0][1] > 0), 32)] for loss, sizes in wanted.items()}
    return [
        Case(loss, *sizes, contender)
        for loss, all_sizes in wanted.items()
        for sizes in all_sizes
        for contender in (BARE, OURS, PLAIN, LIBRARY)
    ]


@dataclass
class Result:
    """Seconds of every round, MiB, difference to the plain form, and what was wrong with whose result."""

    times: dict[str, list[float]]
    memory: dict[str, float]
    error: dict[str, float]
    wrong: dict[str, str]


@functools.lru_cache(maxsize=1)
def measure(loss: str, n: int, k: int, d: int, device: torch.device, seconds: float, memory: bool) -> Result:
    """Compares results with the plain form's, then times all that are right."""
    calls = dict(ready(loss, n, k, d, device))
    expected, error, wrong = calls[PLAIN](), {}, {}
    for name in [name for name in calls if name not in (BARE, PLAIN)]:
        error[name] = max(
            float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(calls[name](), expected, strict=True)
        )
        if not error[name] <= 1e-3:
            wrong[name] = f"loss or gradient differs from the plain form's by {error[name]:.1e} of its size"
            del calls[name]
    times = timing.race({name: [call] for name, call in calls.items()}, device, seconds)
    peaks = timing.peak_memory("bench.test_queues:ready", (loss, n, k, d), device) if memory else {}
    return Result(times, peaks, error, wrong)


def ready(loss: str, n: int, k: int, d: int, device: torch.device) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Contenders, each called once; a call gives the loss and its gradients."""
    torch.manual_seed(0)
    make = {"MoCo": moco, "DCQ": dcq, "CLIP": clip, "SigLIP": siglip}.get(loss.split()[0], several_positives)
    leaves, losses = make(loss, n, k, d, device)
    calls: dict[str, Callable[[], list[Tensor]]] = {BARE: bare(n, k, d, device, sides=2 if k == 0 else 1)}
    for name, each in losses.items():
        calls[name] = functools.partial(run, each, leaves)
    for name, call in calls.items():
        call()
        yield name, call


def run(loss: Loss, leaves: list[Tensor]) -> list[Tensor]:
    """A step's share."""
    return providers.finish(loss(), leaves)


def bare(n: int, k: int, d: int, device: torch.device, sides: int) -> Callable[[], list[Tensor]]:
    """Cosines, and the gradient of one side or of both."""
    x, w = torch.randn(n, d, device=device), torch.randn(k or n, d, device=device)
    cosines = x @ w.T
    x_out, w_out = torch.empty_like(x), torch.empty_like(w)

    def products() -> list[Tensor]:
        torch.mm(x, w.T, out=cosines)
        torch.mm(cosines, w, out=x_out)
        return [torch.mm(cosines.T, x, out=w_out)] if sides == 2 else []

    return products


def leaf(n: int, d: int, device: torch.device) -> Tensor:
    """Embeddings."""
    return torch.randn(n, d, device=device).requires_grad_()


Made = tuple[list[Tensor], dict[str, Loss]]


def moco(loss: str, n: int, k: int, d: int, device: torch.device) -> Made:
    """Nothing enters the queue while it is timed."""
    peer = queue_peers.MoCo(k, d).to(device)
    queue = GalleryQueue(k, d, device=device)
    queue.enqueue(peer.queue.T.contiguous(), torch.zeros(k, dtype=torch.int64, device=device))
    ours, x, key = MoCo(queue).eval(), leaf(n, d, device), F.normalize(torch.randn(n, d, device=device))
    return [x], {OURS: lambda: ours(x, key), PLAIN: lambda: peer.direction(F.normalize(x), key)}


def dcq(loss: str, n: int, k: int, d: int, device: torch.device) -> Made:
    """Likewise, labels among those of the queue."""
    peer = queue_peers.DCQ(k, d).to(device)
    peer.labels = torch.arange(k, device=device)
    queue = GalleryQueue(k, d, device=device)
    queue.enqueue(peer.queue.T.contiguous(), peer.labels)
    ours, x, key = DCQ(queue).eval(), leaf(n, d, device), F.normalize(torch.randn(n, d, device=device))
    label = torch.arange(n, device=device)
    return [x], {OURS: lambda: ours(x, key, label), PLAIN: lambda: peer.direction(F.normalize(x), key, label)}


def several_positives(loss: str, n: int, k: int, d: int, device: torch.device) -> Made:
    """The batch against itself, or against a full memory which holds it."""
    x, label = leaf(n, d, device), torch.randint(PEOPLE, (n,), device=device)
    own = torch.arange(n, device=device)
    kind = loss.removeprefix("CrossBatchMemory ")
    ours, plain, name, options = {
        "SupCon": (SupCon(0.1), functools.partial(queue_peers.sup_con_over, temperature=0.1), "SupConLoss", {"temperature": 0.1}),
        "SupCon inside": (
            SupCon(0.1, form="inside"), functools.partial(queue_peers.sup_con_over, temperature=0.1, inside=True), "", {},
        ),
        "NTXent": (NTXent(0.1), functools.partial(queue_peers.nt_xent_over, temperature=0.1), "NTXentLoss", {"temperature": 0.1}),
        "PairCircle": (
            PairCircle(), functools.partial(queue_peers.circle_over, m=0.4, gamma=80.0), "CircleLoss", {"m": 0.4, "gamma": 80.0},
        ),
        "Contrastive": (Contrastive(), functools.partial(queue_peers.contrastive_over, threshold=0.5), "", {}),
    }[kind]  # fmt: skip
    library = None
    # NTXentLoss makes a row of all negative pairs for each positive one.
    if (
        name
        and not providers.missing("pytorch_metric_learning")
        and (name != "NTXentLoss" or (n * max(k, n)) ** 2 < PEOPLE * 2**26)
    ):
        from pytorch_metric_learning import losses

        library = getattr(losses, name)(**options)
    if k == 0:
        found: dict[str, Loss] = {
            OURS: lambda: ours(x, label),
            PLAIN: lambda: plain(x, label, F.normalize(x), label, own),
        }
        if library is not None:
            found[LIBRARY] = lambda: library(x, label)
        return [x], found
    keys, names = F.normalize(torch.randn(k, d, device=device)), torch.randint(PEOPLE, (k,), device=device)
    keys[:n], names[:n] = F.normalize(x.detach()), label
    memory = CrossBatchMemory(ours, d, k, device=device)
    memory.queue.enqueue(keys, names)  # a batch then enters again and again: the same rows in the first n slots
    found = {PLAIN: lambda: plain(x, label, keys, names, own)}

    def step() -> Tensor:
        memory.queue.state[0] = 0
        return memory(x, label)

    found[OURS] = step
    if library is not None:
        theirs = losses.CrossBatchMemory(library, d, memory_size=k).to(device)
        theirs.add_to_memory(keys, names, k)

        def their_step() -> Tensor:
            theirs.queue_idx = 0
            return theirs(x, label)

        found[LIBRARY] = their_step
    return [x], found


def clip(loss: str, n: int, k: int, d: int, device: torch.device) -> Made:
    """Both features and the scale."""
    x, y, scale = leaf(n, d, device), leaf(n, d, device), torch.tensor(20.0, device=device, requires_grad=True)
    ours = CLIPLoss()
    return [x, y, scale], {
        OURS: lambda: ours(x, y, scale),
        PLAIN: lambda: queue_peers.clip(F.normalize(x), F.normalize(y), scale),
    }


def siglip(loss: str, n: int, k: int, d: int, device: torch.device) -> Made:
    """Both features, the scale and the bias."""
    leaves, _ = clip(loss, n, k, d, device)
    x, y, scale = leaves
    ours, bias = SigLIPLoss(), torch.tensor(-10.0, device=device, requires_grad=True)
    return [*leaves, bias], {
        OURS: lambda: ours(x, y, scale, bias),
        PLAIN: lambda: queue_peers.siglip(F.normalize(x), F.normalize(y), scale, bias),
    }


def test_queues(replay, device, case, seconds, memory):
    result = measure(case.loss, case.n, case.k, case.d, device, seconds, memory)
    if case.contender in result.wrong:
        pytest.fail(f"{case.contender}: {result.wrong[case.contender]}")
    if case.contender not in result.times:
        pytest.skip("not installed, no such loss, or a row of pairs for each positive")
    problem = {"loss": case.loss, "n": case.n, "k": case.k or case.n, "d": case.d}
    replay(
        result.times[case.contender], f"{case.loss} N {case.n}, K {problem['k']}, D {case.d}", suite="queues",
        provider=case.contender, problem=problem, extra_mib=result.memory.get(case.contender),
        error=result.error.get(case.contender),
    )  # fmt: skip
