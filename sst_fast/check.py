"""``sst-fast check``: does every backend that exists on this machine compute what it should, and how fast?

Each runs small and odd problems; loss, gradients and statistics are compared with the reference in float64 on the CPU. Every backend
has a process of its own, so that one that crashes spoils nothing but its own rows.

A difference is allowed as far as the rounding of what is multiplied explains it. With u that of a product's operands
(:data:`ROUNDING`), a cosine of unit vectors is off by at most u, a logit, its loss and a gradient's weight by s u.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sst_fast import reference
from sst_fast.arguments import Arguments, Window
from sst_fast.backends import tuned
from sst_fast.backends.backend import Problem
from sst_fast.backends.choose import BACKENDS, NO_DEVICE
from sst_fast.functional import margin_softmax
from sst_fast.margins import AMSoftmax, ArcSoftmax, CircleLoss, MVSoftmax, NPCFace, Softmax
from sst_fast.queue import GalleryQueue
from sst_fast.timing import Call, bare_products, copies, race

# What a product's operands are rounded by, with room for its sum: float8 values are multiplied as float16.
ROUNDING = {
    torch.float64: 2.0**-44, torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.float8_e4m3fn: 2.0**-10,
    torch.bfloat16: 2.0**-8,
}  # fmt: skip
TF32 = 2.0**-10
EXPECTED = 2.0  # times the bare products' time: what is slower is told
BUDGET = 35.0  # seconds after which a backend begins no further problem
PATIENCE = 60.0  # seconds more until it is stopped
Verdict = Literal["right", "wrong", "failed", "slow", "not here", "not reached"]
_Example = TypeVar("_Example", bound="Example")


class Example(Arguments):
    """Arguments of the loss, with what checks and tests do to them."""

    def options(self) -> dict[str, Any]:
        """Window and identities, as keyword arguments of ``margin_softmax``."""
        return {"window": self.window, "identity": self.identity, "slot_identity": self.slot_identity}

    def to(self: _Example, dtype: torch.dtype, queue_dtype: torch.dtype | None = None) -> _Example:
        """The same problem rounded to other dtypes."""
        queue_dtype = queue_dtype or dtype
        window = self.window and self.window._replace(features=self.window.features.to(queue_dtype))
        positive = self.positive if self.positive is None else self.positive.to(dtype)
        return replace(
            self, embedding=self.embedding.to(dtype), prototypes=self.prototypes.to(queue_dtype), window=window,
            positive=positive,
        )  # fmt: skip

    def on(self: _Example, device: torch.device) -> _Example:
        """The same problem on a device."""

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        window = self.window and Window(*map(moved, self.window))
        changed = {f.name: moved(getattr(self, f.name)) for f in fields(self)}
        return replace(self, **(changed | {"window": window, "margin": self.margin.map(moved)}))


def make(
    n: int, k: int, d: int, *, seed: int = 0, start: int | None = None, groups: int = 2, identities: int | None = None,
    empty: float = 0.0, masks: bool = True,
) -> Example:  # fmt: skip
    """n probes, k slots; with ``start`` the batch's own slots are a window there, and n is per group. In float64 on the CPU.

    ``identities`` few enough make false negatives; ``empty`` is the share of empty slots.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def integers(high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=generator)

    identities = identities or max(2, 2 * k)
    prototypes = F.normalize(rand(k, d))
    slot_identity = integers(identities, k)
    slot_identity[torch.rand(k, generator=generator) < empty] = -1
    identity: Tensor | None
    if start is None:
        target, window = integers(k, n), None
        identity = slot_identity[target].clamp_min(0)
        # Near their target, as trained probes are: otherwise every softmax is flat.
        embedding = prototypes[target] * rand(n, 1).abs() * 3 + rand(n, d) / d**0.5
    else:
        ids = integers(identities, n)
        slots = reference.window_slots(torch.tensor(start), n, k)
        window = Window(F.normalize(rand(groups, n, d), dim=2), ids, torch.tensor(start), slots)
        target, identity = slots.repeat(groups), ids.repeat(groups)
        embedding = window.features.flatten(0, 1) * 2 + rand(groups * n, d) / d**0.5
    if not masks:
        return Example(embedding, prototypes, target, window=window)
    return Example(embedding, prototypes, target, identity=identity, slot_identity=slot_identity, window=window)


def make_sub_centers(n: int, classes: int, sub_centers: int, d: int, *, seed: int = 0) -> Example:
    """n probes, each near one of the sub-centres of its class; unit rows. In float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = F.normalize(torch.randn(classes * sub_centers, d, generator=generator, dtype=torch.float64))
    row = torch.randint(classes * sub_centers, (n,), generator=generator)
    embedding = 2 * prototypes[row] + torch.randn(n, d, generator=generator, dtype=torch.float64) / d**0.5
    return Example(embedding, prototypes, row // sub_centers, sub_centers=sub_centers)


def _far_away() -> Example:
    """Every cosine near -1 but the target's: at a large scale a sum of exponentials that is shifted by the bound vanishes."""
    example = make(40, 300, 128, masks=False)
    assert example.target is not None
    one = F.normalize(torch.ones(1, 128, dtype=torch.float64))
    prototypes = F.normalize(one + 0.03 * example.prototypes)
    return replace(example, prototypes=prototypes, embedding=-one + 0.05 * example.embedding)


def _odd_rows() -> Example:
    """A probe without direction, one that is ignored and holds NaN, long rows in empty slots; one margin and scale for each probe."""
    example = make(37, 130, 64, identities=200, empty=0.2)
    assert example.target is not None
    assert example.slot_identity is not None
    empty = example.slot_identity < 0
    target = torch.where(empty[example.target], (~empty).nonzero()[0, 0], example.target)
    embedding, prototypes = example.embedding.clone(), example.prototypes.clone()
    embedding[3], embedding[5], target[5] = 0, torch.nan, -100
    prototypes[empty] *= 100
    margin, scale = AMSoftmax(torch.linspace(0.1, 0.5, 37)), torch.linspace(1, 64, 37)
    return replace(example, embedding=embedding, prototypes=prototypes, target=target, margin=margin, scale=scale)


def _weighted() -> Example:
    weight = torch.linspace(0, 2, 50, dtype=torch.float64)
    return replace(make(50, 700, 64), margin=NPCFace(), reduction="mean", weight=weight, label_smoothing=0.1)


def _positive() -> Example:
    example = make(33, 200, 128, identities=90)
    return replace(
        example, positive=F.normalize(example.embedding.roll(1, 1) + example.embedding), margin=ArcSoftmax(0.3)
    )


def _sub_centers() -> Example:
    """As SubCenterArcFace trains them, and some classes that are masked."""
    example = make_sub_centers(50, 130, 3, 512)
    assert example.target is not None
    slot_identity = torch.arange(130) % 90 - 1
    return replace(
        example, prototypes=1.5 * example.prototypes, normalize_prototypes=True, margin=ArcSoftmax(0.5),
        slot_identity=slot_identity, identity=slot_identity[example.target],
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A problem that is checked: ``example`` makes it in float64, and it is rounded to ``dtype`` and ``queue_dtype``."""

    name: str
    example: Callable[[], Example]
    dtype: torch.dtype = torch.float32
    queue_dtype: torch.dtype | None = None
    trains: bool = False
    tf32: bool = False


def _training() -> Example:
    """As in Semi-Siamese Training; the window wraps round the end of the queue."""
    return make(33, 700, 512, start=690, identities=900, empty=0.1)


HALF, BRAIN, TINY = torch.float16, torch.bfloat16, torch.float8_e4m3fn
# The usual first: where the budget ends early, they are done.
CASES = (
    Case("window, bfloat16, D 512", _training, BRAIN),
    Case("window, float32, arc", lambda: replace(_training(), margin=ArcSoftmax(0.5))),
    Case("trained prototypes, bfloat16", lambda: replace(make(50, 300, 512), normalize_prototypes=True), BRAIN, trains=True),
    Case("float8 queue", lambda: replace(make(65, 700, 512), scale=16.0), torch.float32, TINY),
    Case("rounded to float8", lambda: replace(make(65, 700, 512), scale=16.0, product_dtype=TINY), torch.float32, TINY),
    Case("scale 64, all far away", lambda: replace(_far_away(), scale=64.0), BRAIN),
    Case("one probe, one slot, float16", lambda: make(1, 1, 128), HALF),
    Case("odd rows, scales by row", _odd_rows),
    Case("mined negatives, float16", lambda: replace(make(70, 333, 128, identities=500), margin=MVSoftmax(arc=True)), HALF),
    Case("trained prototypes, smoothed", lambda: replace(make(20, 333, 64), label_smoothing=0.1), trains=True),
    Case("explicit positives", _positive),
    Case("sub-centres, bfloat16", _sub_centers, BRAIN, trains=True),
    Case("D 3, one probe", lambda: replace(make(1, 200, 3), margin=Softmax())),
    Case("circle loss, scale 256", lambda: replace(make(40, 130, 64), margin=CircleLoss(), scale=256.0)),
    Case("weighted mean, smoothed", _weighted),
    Case("tf32", lambda: make(33, 700, 128), tf32=True),
    Case("float64, D 40", lambda: make(20, 130, 40, start=120), torch.float64),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What was found about one backend and one problem.

    ``output`` is the one that is farthest from right, measured by its own ``bound``; ``milliseconds`` stand beside ``bare``,
    those of the matrix products alone; ``launches`` are kernels of one call on a GPU.
    """

    backend: str
    problem: str
    verdict: Verdict
    output: str = ""
    difference: float | None = None
    bound: float | None = None
    launches: int | None = None
    milliseconds: float | None = None
    bare: float | None = None
    note: str = ""


def problem_of(example: Arguments, trains: bool = False) -> Problem:
    """What a backend is asked about it."""
    return Problem(
        "margin_softmax", example.embedding.device, example.embedding.dtype, example.prototypes.dtype,
        example.embedding.shape[1], example.window is not None, example.positive is not None, trains,
        example.normalize_prototypes, example.label_smoothing > 0, example.product_dtype,
        sub_centers=example.sub_centers > 1,
    )  # fmt: skip


def why_not(name: str, problem: Problem) -> str | None:
    """None where the backend can be checked on the problem: as :meth:`Backend.why_not`, without kernels for a GPU on a CPU."""
    if problem.device.type == "cuda" and not torch.cuda.is_available():
        return NO_DEVICE
    reason = BACKENDS[name].why_not(problem)
    if reason is None and BACKENDS[name].launches and problem.device.type == "cpu":
        return "its interpreter is for tests"
    return reason


# --- the loss ----------------------------------------------------------------------------------------------------------


def outputs(example: Arguments, backend: str, trains: bool = False) -> dict[str, Tensor]:
    """Loss, gradients and statistics by one backend, on the CPU in float64 (counts and slots: int64)."""
    options = {f.name: getattr(example, f.name) for f in fields(Arguments)[3:]}
    x, w = example.embedding.detach().requires_grad_(), example.prototypes.detach()
    leaves = {"gradient": x}
    if trains:
        leaves["prototypes' gradient"] = w.requires_grad_()
    if example.positive is not None:
        leaves["positives' gradient"] = options["positive"] = example.positive.detach().requires_grad_()
    loss, statistics = margin_softmax(x, w, example.target, backend=backend, return_statistics=True, **options)
    total = loss
    if loss.dim():
        total = loss @ torch.linspace(-1, 2, len(x), dtype=loss.dtype, device=loss.device)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    found = {"loss": loss.detach()} | dict(zip(leaves, gradients, strict=True))
    found |= {name.replace("_", " "): value for name, value in statistics._asdict().items()}
    return {name: t.cpu() if t.dtype == torch.int64 else t.cpu().double() for name, t in found.items()}


def rounding(example: Arguments, tf32: bool = False) -> float:
    """The u of the module's text."""
    if example.product_dtype is not None:
        return float(0.2 / example.embedding.shape[1] ** 0.5)
    return max(ROUNDING[example.embedding.dtype], ROUNDING[example.prototypes.dtype], TF32 if tf32 else 0.0)


def differences(
    found: dict[str, Tensor], exact: dict[str, Tensor], example: Arguments, u: float
) -> dict[str, tuple[float, float]]:
    """Output -> (difference, bound). ``example`` is the problem in float64 on the CPU, ``exact`` its right answer.

    Losses are compared relative to the largest of them, or absolutely where all are below 1; gradients by their norms; a hardest slot
    by its cosine; counts may be off by the slots that lie within u of the target's cosine.
    """
    s = float(example.scale.max()) if isinstance(example.scale, Tensor) else float(example.scale)
    rows, d = example.prototypes.shape
    unit, _, counted = reference.unit_probes(example)
    result = {}
    for name, right in exact.items():
        mine = found[name]
        if name == "hardest slot":
            there = counted & (right >= 0)
            if not torch.equal(mine[counted] < 0, right[counted] < 0) or bool((mine[there] >= example.slots).any()):
                result[name] = (math.inf, 0.0)
                continue
            nearest = reference.target_rows(replace(example, positive=None), unit, mine.clamp_min(0))
            lacks = exact["hardest cosine"] - (unit * nearest).sum(1)
            result[name] = (float(lacks[there].abs().max()) if bool(there.any()) else 0.0, 2 * u)
        elif name == "beats target":
            result[name] = (float((mine - right)[counted].abs().max()), 1 + rows * u * d**0.5)
        elif "gradient" in name:
            least = 0.05 if example.reduction == "none" else 0.05 / len(unit)
            result[name] = (float((mine - right).norm() / max(float(right.norm()), least)), s * u)
        else:
            if mine.dim():
                mine, right = mine[counted], right[counted]
            off = torch.where(mine == right, 0.0, (mine - right).abs())  # infinities that agree
            bound = 2 * u if "cosine" in name else s * u * max(1.0, float(right[right.isfinite()].abs().amax()))
            result[name] = (float(off.max()), bound)
    return result


def worst(result: dict[str, tuple[float, float]]) -> tuple[str, float, float]:
    """The output that is nearest to its bound or farthest beyond; NaN is beyond everything."""

    def share(name: str) -> float:
        difference, bound = result[name]
        return math.inf if math.isnan(difference) or (bound == 0 and difference > 0) else difference / (bound or 1.0)

    name = max(result, key=share)
    return name, *result[name]


def compare(example: Example, backend: str, device: torch.device, trains: bool = False, tf32: bool = False) -> Row:
    """One backend on one example, in the dtypes that it has, against the reference."""
    wide = example.to(torch.float64)
    wide = replace(wide, product_dtype=None)
    exact = outputs(wide, "reference", trains)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        here = example.on(device)
        found = outputs(here, backend, trains)
    finally:
        torch.set_float32_matmul_precision(before)
    name, difference, bound = worst(differences(found, exact, wide, rounding(example, tf32)))
    return Row(backend, "", "right" if difference <= bound else "wrong", name, difference, bound)


# --- the queue ---------------------------------------------------------------------------------------------------------


def check_queue(backend: str, device: torch.device, dtype: torch.dtype) -> Row:
    """Batches that wrap round the ring, a row that is not finite, windows, dequeues: against the reference on the CPU."""
    generator = torch.Generator().manual_seed(0)
    mine, right = (
        GalleryQueue(50, 40, dtype, device=device, backend=backend),
        GalleryQueue(50, 40, dtype, backend="reference"),
    )
    number, difference = 0, 0.0
    for count in (7, 50, 13, 1, 49):
        batch, ids = torch.randn(count, 40, generator=generator), torch.arange(number, number + count)
        batch[0] = torch.nan if count == 13 else batch[0]
        number += count
        seen = [queue.window(batch.to(at), ids.to(at)) for queue, at in ((mine, device), (right, torch.device("cpu")))]
        gone = []
        for queue, at in ((mine, device), (right, torch.device("cpu"))):
            queue.enqueue(batch.to(at), ids.to(at))
            gone.append(queue.dequeue(5).cpu())
        same = [
            gone, [queue.identities.cpu() for queue in (mine, right)], [w.identities.cpu() for w in seen],
            [queue.state.cpu()[[0, 1, 3]] for queue in (mine, right)], [w.slots.cpu() for w in seen],
        ]  # fmt: skip
        if not all(torch.equal(*pair) for pair in same):
            return Row(backend, "", "wrong", "identities", math.inf, 0.0)
        for a, b in ((mine.features, right.features), (seen[0].features, seen[1].features)):
            off = (a.cpu().double() - b.double()).abs()
            difference = max(
                difference, float(torch.where(b.double().isnan() & a.cpu().double().isnan(), 0.0, off).max())
            )
    bound = torch.finfo(dtype).eps
    return Row(backend, "", "right" if difference <= bound else "wrong", "features", difference, bound)


# --- time --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """A problem that is timed: N probes, K slots, D features in one dtype."""

    n: int
    k: int
    d: int
    dtype: torch.dtype
    trains: bool = False

    @property
    def name(self) -> str:
        """For the table."""
        kind = "trained prototypes" if self.trains else "gradient"
        return f"time of {kind}, {str(self.dtype).removeprefix('torch.')}, N {self.n}, K {self.k}, D {self.d}"

    def tensors(self, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Unit embeddings, unit prototypes, targets."""
        generator = torch.Generator(device).manual_seed(seed)
        x, w = (F.normalize(torch.randn(rows, self.d, device=device, generator=generator)) for rows in (self.n, self.k))
        target = torch.randint(self.k, (self.n,), device=device, generator=generator)
        x = x + 2 * w[target]
        wide = torch.float32 if self.dtype == torch.float8_e4m3fn else self.dtype
        return x.to(wide), w.to(self.dtype), target


TIMED = {
    "cuda": (
        Timed(1024, 16384, 512, BRAIN), Timed(64, 16384, 512, BRAIN), Timed(1024, 16384, 512, BRAIN, trains=True),
        Timed(1024, 16384, 512, torch.float32),
    ),
    "cpu": (Timed(128, 4096, 512, torch.float32), Timed(128, 2048, 512, torch.float32, trains=True)),
}  # fmt: skip


def contender(
    tensors: tuple[Tensor, Tensor, Tensor], backend: str, trains: bool, product_dtype: torch.dtype | None = None
) -> Call:
    """The loss and its gradients by one backend."""
    x, w, target = (t.detach() for t in tensors)
    leaves = [x.requires_grad_()] + ([w.requires_grad_()] if trains else [])

    def run() -> object:
        loss = margin_softmax(
            x, w, target, normalize_prototypes=trains, backend=backend, product_dtype=product_dtype
        )  # fmt: skip
        return torch.autograd.grad(loss, leaves)

    return run


def measure(
    timed: Timed, backends: Sequence[str], device: torch.device, seconds: float = 0.5,
    product_dtype: torch.dtype | None = None,
) -> dict[str, float]:  # fmt: skip
    """Median seconds of each backend and, as 'bare products', of the matrix products alone; they take turns."""
    first = timed.tensors(device)
    several = [first] + [timed.tensors(device, seed) for seed in range(1, copies(first[:2]))]
    calls: dict[str, list[Call]] = {
        "bare products": [bare_products(x, w, 4 if timed.trains else 2) for x, w, _ in several]
    }
    calls |= {name: [contender(t, name, timed.trains, product_dtype) for t in several] for name in backends}
    times = race(calls, device, seconds, least=3)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def launches(call: Call, device: torch.device) -> int | None:
    """Kernels that a call launches on a GPU; None on a CPU, or where the profiler is not allowed to see them."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize(device)
    assert seen.profiler is not None
    events = seen.profiler.kineto_results.events()
    return sum("LaunchKernel" in event.name() for event in events) or None


# --- one backend -------------------------------------------------------------------------------------------------------


def examine(backend: str, device: torch.device, budget: float = BUDGET) -> Iterator[Row]:
    """All rows of one backend; none for operations that it has not. After ``budget`` seconds nothing more is begun."""
    begin = time.perf_counter()

    def attempt(name: str, look: Callable[[], Row]) -> Row:
        if time.perf_counter() - begin > budget:
            return Row(
                backend, name, "not reached", note=f"{budget:g} s were up; kernels that are compiled now are kept"
            )
        try:
            return replace(look(), problem=name)
        except torch.OutOfMemoryError as error:
            return Row(backend, name, "not reached", note=_one_line(error))
        except Exception as error:
            return Row(backend, name, "failed", note=_one_line(error))

    for dtype in (torch.float32, BRAIN, TINY):
        if why_not(backend, Problem("enqueue", device, torch.float32, dtype)) is None:
            name = f"queue, {str(dtype).removeprefix('torch.')}"
            yield attempt(name, lambda dtype=dtype: check_queue(backend, device, dtype))  # type: ignore[misc]
    for case in CASES:
        example = case.example().to(case.dtype, case.queue_dtype)
        problem = problem_of(example, case.trains)._replace(device=device)
        if case.tf32 and device.type == "cpu":  # products on the CPU are never tf32
            continue
        reason = why_not(backend, problem)
        if reason is None:
            yield attempt(case.name, lambda e=example, c=case: compare(e, backend, device, c.trains, c.tf32))  # type: ignore[misc]
        elif why_not(backend, Problem("margin_softmax", device, BRAIN, BRAIN)) is None:
            yield Row(backend, case.name, "not here", note=reason)
    for timed in TIMED[device.type]:
        problem = Problem(
            "margin_softmax", device, timed.dtype, timed.dtype, timed.d, trains_prototypes=timed.trains,
            normalize=timed.trains,
        )  # fmt: skip
        if why_not(backend, problem) is None:
            yield attempt(timed.name, lambda timed=timed: _timed(timed, backend, device))  # type: ignore[misc]


def _timed(timed: Timed, backend: str, device: torch.device) -> Row:
    seconds = measure(timed, [backend], device)
    mine, bare = seconds[backend], seconds["bare products"]
    number = launches(contender(timed.tensors(device), backend, timed.trains), device)
    slow = backend != "reference" and mine > EXPECTED * bare
    note = f"expected: at most {EXPECTED:g} times the bare products" if slow else ""
    return Row(
        backend, "", "slow" if slow else "right", launches=number, milliseconds=1e3 * mine, bare=1e3 * bare, note=note
    )  # fmt: skip


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# --- all of them -------------------------------------------------------------------------------------------------------


def command(backend: str, device: torch.device) -> list[str]:
    """What examines one backend in a process of its own; rows come as lines of JSON."""
    return [sys.executable, "-m", "sst_fast.check", backend, "--device", str(device)]


def isolated(backend: str, command: Sequence[str], patience: float = BUDGET + PATIENCE) -> Iterator[Row]:
    """Rows that ``command`` prints, as it prints them; it is stopped after ``patience`` seconds. If it ended badly, how is one more row."""
    after, late = "before the first problem was done", threading.Event()
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace") as process,
    ):

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(patience, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    row = Row(**json.loads(line))
                    row = replace(row, difference=_float(row.difference), bound=_float(row.bound))
                except (ValueError, TypeError):  # something else that was printed
                    continue
                after = f"after {row.problem!r}"
                yield row
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
        errors.seek(0)
        last = [line.strip() for line in errors if line.strip()][-1:]
    if late.is_set():
        end = f"it was stopped after {patience:g} s"
    elif status < 0:
        end = f"its process was ended by signal {-status}"
    else:
        end = f"its process ended with status {status}"
    if status != 0:
        yield Row(backend, after, "failed", note=": ".join([end, *last]))


def _float(value: float | str | None) -> float | None:
    """The reverse of what :func:`as_json` does to infinities."""
    return None if value is None else float(value)


def absent(device: torch.device) -> dict[str, str]:
    """Backends of which nothing can be checked on a device, and why."""
    reasons = {}
    for name in BACKENDS:
        found = [why_not(name, Problem(operation, device, BRAIN, BRAIN)) for operation in ("margin_softmax", "enqueue")]
        if None not in found:
            reasons[name] = next(reason for reason in found if reason is not None)
    return reasons


def check(device: torch.device, out: TextIO, file: Path | None = None) -> list[Row]:
    """Every backend that exists here; rows are printed to ``out`` and written to ``file`` as they come, and a summary is printed at the end."""
    missing, about = absent(device), tuned.identity(device)
    rows: list[Row] = []
    print(", ".join(f"{name} {value}" for name, value in about.items()), end="\n\n", file=out)
    print(heading(), file=out)
    for name in BACKENDS:
        if name in missing:
            continue
        for row in isolated(name, command(name, device)):
            rows.append(row)
            print(shown(row), file=out, flush=True)
            if file is not None:  # all of it each time: the machine may be gone any minute
                write(file, rows, missing, about)
    print(file=out)
    for line in summary(rows, missing):
        print(line, file=out)
    return rows


def wrong(rows: Sequence[Row]) -> bool:
    """Whether anything is wrong or failed."""
    return any(row.verdict in ("wrong", "failed") for row in rows)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON can hold them: what is not finite becomes a word."""
    return [
        {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in asdict(row).items()}
        for row in rows
    ]


def write(path: Path, rows: Sequence[Row], missing: dict[str, str], about: dict[str, str]) -> None:
    """Everything that was found, as JSON; ``about``: versions and device."""
    content = {"about": about, "rows": as_json(rows), "not here": missing}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summary(rows: Sequence[Row], missing: dict[str, str]) -> list[str]:
    """What is right, wrong, slower than expected and not here, in a few lines."""
    lines = []
    for name in dict.fromkeys(row.backend for row in rows):
        mine = [row for row in rows if row.backend == name]
        count = {
            verdict: sum(row.verdict == verdict for row in mine) for verdict in ("right", "slow", "wrong", "failed")
        }
        words = [f"{count['right'] + count['slow']} right"]
        words += [f"{number} {word}" for word, number in count.items() if number and word in ("wrong", "failed")]
        words += [f"{number} not reached" for number in [sum(row.verdict == "not reached" for row in mine)] if number]
        lines.append(f"{name}: {', '.join(words)}")
        for row in mine:
            if row.verdict in ("wrong", "failed"):
                what = row.note or f"{row.output} is off by {_number(row.difference)}, allowed is {_number(row.bound)}"
                lines.append(f"    {row.verdict}: {row.problem}: {what}")
            elif row.verdict == "slow" and row.milliseconds and row.bare:
                lines.append(
                    f"    slower than expected: {row.problem}: {row.milliseconds / row.bare:.1f} times the bare products"
                )
    lines += [f"{name}: not here: {reason}" for name, reason in missing.items()]
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def heading() -> str:
    """The line above the rows."""
    return _line("backend", "problem", "result", "largest difference", "bound", "launches", "ms", "bare ms")


def shown(row: Row) -> str:
    """A row as a line of the table."""
    difference = f"{_number(row.difference)} {row.output}" if row.difference is not None else row.note[:40]
    times = ("" if value is None else f"{value:.3g}" for value in (row.milliseconds, row.bare))
    number = "" if row.launches is None else str(row.launches)
    return _line(row.backend, row.problem, row.verdict, difference, _number(row.bound), number, *times)


def _line(*cells: str) -> str:
    widths = (10, 62, 12, 30, 9, 9, 9, 8)
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m sst_fast.check``: what ``sst-fast check`` does, without the command line's extra; or one backend alone, its rows
    as lines of JSON, each as it is found."""
    parser = argparse.ArgumentParser(
        description="Compare backends with the reference, and their time with bare products."
    )
    parser.add_argument("backend", nargs="?", choices=tuple(BACKENDS), help="this one alone, in this process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds after which a backend begins no further problem"
    )
    parser.add_argument("--json", type=Path, help="a file for the rows")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.backend is None:
        return int(wrong(check(device, sys.stdout, options.json)))
    for row in examine(options.backend, device, options.budget):
        print(json.dumps(as_json([row])[0]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
