"""The fused loss against its limits and against plain code, on this machine: ``python -m bench.targets``.

All contenders of a row take turns in one process on the same inputs; a row shows medians. Results are compared before
anything is timed.

bare      the library's own matrix products of the same size and dtype, as many as the task needs: what a perfect kernel
          would take if it could not beat the library.
eager     the loss as the authors' head writes it, with its masks: both directions of Semi-Siamese Training, the queue
          cloned for each (or, for trainable prototypes, one direction over all rows).
compiled  the same under torch.compile.

bfloat16 runs ``eager`` and ``compiled`` under autocast, ours on bfloat16 tensors, as autocast hands them over.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import sst_fast
from sst_fast import AMSoftmax, ArcSoftmax, GalleryQueue, Margin
from sst_fast.functional import margin_softmax

Run = Callable[[], object]
Row = dict[str, object]
SCALE = 30.0


def median_times(contenders: dict[str, Run], seconds: float) -> dict[str, float]:
    """Median milliseconds of each contender; they take turns, for about so many seconds and at least five rounds."""
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


def plain(x: Tensor, w: Tensor, y: Tensor, margin: Margin, identity: Tensor, slots: Tensor) -> Tensor:
    """Logits written out, false negatives masked."""
    cosines = F.linear(F.normalize(x), w)
    target = cosines.gather(1, y[:, None])
    cosines = cosines.masked_fill(identity[:, None] == slots[None, :], -torch.inf)
    return F.cross_entropy(SCALE * cosines.scatter(1, y[:, None], margin.psi(target).to(cosines.dtype)), y)


def measure(
    n: int, k: int, d: int, dtype: torch.dtype, margin: Margin, task: str, seconds: float, compiled: bool
) -> Row:
    """One row: 'gradient' for the probes, 'forward' alone, or 'prototypes': gradients for both."""
    generator = torch.Generator().manual_seed(0)
    both, wanted = task == "prototypes", task != "forward"
    queue = GalleryQueue(k, d, dtype)
    queue.enqueue(torch.randn(k, d, generator=generator), torch.arange(k))
    queue.state[0] = k // 3  # a window in the middle
    gallery = torch.randn(2, n // 2, d, generator=generator)
    identity = torch.arange(k, k + n // 2)
    window = queue.window(gallery, identity)
    x = (gallery.flatten(0, 1) + torch.randn(n, d, generator=generator)).requires_grad_(wanted)
    w = queue.features.float().requires_grad_(both)
    x_low, w_low = x.detach().to(dtype).requires_grad_(wanted), w.detach().to(dtype).requires_grad_(both)
    y, ids = window.slots.repeat(2), identity.repeat(2)
    features = window.features.float()

    def finish(loss: Tensor) -> Tensor:
        for leaf in (x, w, x_low, w_low):
            leaf.grad = None
        if wanted:
            loss.backward()
        return loss.detach()

    def ours() -> Tensor:
        options = {"normalize_prototypes": True} if both else {"window": window}
        return finish(margin_softmax(x_low, w_low, y, margin=margin, scale=SCALE, identity=ids,
                                     slot_identity=queue.identities, **options))  # fmt: skip

    def directions(x: Tensor, w: Tensor, features: Tensor) -> Tensor:
        if both:
            return plain(x, F.normalize(w), y, margin, ids, queue.identities)
        total = torch.zeros(())
        for probes, own in zip(x.chunk(2), features, strict=True):
            mine, labels = w.clone(), queue.identities.clone()
            mine[window.slots] = own
            labels[window.slots] = identity
            total = total + 0.5 * plain(probes, mine, window.slots, margin, identity, labels)
        return total

    def under_autocast(function: Callable[..., Tensor]) -> Run:
        def run() -> Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = function(x, w, features)
            return finish(loss)

        return run

    unit, weights = F.normalize(x.detach()).to(dtype), torch.randn(n, k, generator=generator).to(dtype)
    frozen = w_low.detach()

    def bare() -> None:
        unit @ frozen.T
        if wanted:
            weights @ frozen
        if both:
            unit @ frozen.T
            weights.T @ unit

    contenders: dict[str, Run] = {"ours": ours, "bare": bare, "eager": under_autocast(directions)}
    if compiled:
        contenders["compiled"] = under_autocast(torch.compile(directions))
    expected = under_autocast(directions)()
    assert isinstance(expected, Tensor)
    assert math.isclose(ours().item(), expected.item(), rel_tol=1e-4 if dtype == torch.float32 else 0.05)
    found = median_times(contenders, seconds)
    rivals = [name for name in contenders if name not in ("ours", "bare")]
    return {
        "dtype": str(dtype).removeprefix("torch."), "K": k, "N": n, "margin": type(margin).__name__, "task": task,
        **{f"{name} ms": round(value, 1) for name, value in found.items()},
        "ours / bare": round(found["ours"] / found["bare"], 2),
        **{f"{name} / ours": round(found[name] / found["ours"], 2) for name in rivals},
    }  # fmt: skip


def threads_row(dtype: torch.dtype, seconds: float) -> Row:
    """Speed-up from one thread to all."""
    x, w = torch.randn(1024, 512).to(dtype).requires_grad_(), F.normalize(torch.randn(16384, 512)).to(dtype)
    y, most = torch.arange(1024), torch.get_num_threads()

    def with_threads(count: int) -> Run:
        def run() -> None:
            torch.set_num_threads(count)
            margin_softmax(x, w, y).backward()

        return run

    found = median_times({"one": with_threads(1), "all": with_threads(most)}, seconds)
    return {"dtype": str(dtype).removeprefix("torch."), "threads": most, "one thread ms": round(found["one"], 1),
            "all threads ms": round(found["all"], 1), "speed-up": round(found["one"] / found["all"], 2)}  # fmt: skip


def memory_row(n: int, k: int, dtype: torch.dtype, prototypes: bool) -> Row:
    """Peak memory of loss and gradient beyond inputs and outputs, in a fresh process that has run a small one before."""
    script = f"""
import torch, torch.nn.functional as F
from sst_fast.functional import margin_softmax
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
def case(k):
    x = torch.randn({n}, 512).to({dtype}).requires_grad_()
    w = torch.empty(k, 512, dtype={dtype})
    for part in w.split(16384):
        part.copy_(F.normalize(torch.randn(len(part), 512)))
    w.requires_grad_({prototypes})
    return x, w, torch.arange({n}) % k, torch.arange(k)
def run(x, w, y, slots):
    margin_softmax(x, w, y, identity=slots[y], slot_identity=slots, normalize_prototypes={prototypes}).backward()
run(*case(1024))
inputs = case({k})
open("/proc/self/clear_refs", "w").write("5")
before = peak()
run(*inputs)
outputs = sum(t.grad.numel() * t.grad.element_size() for t in inputs[:2] if t.grad is not None)
print("peak", (peak() - before) / 1024 - outputs / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    found = re.search(r"peak (\S+)", done.stdout)
    assert found is not None, done.stdout
    return {"dtype": str(dtype).removeprefix("torch."), "K": k, "N": n, "prototypes": prototypes,
            "extra MiB": round(float(found[1]), 1)}  # fmt: skip


def show(rows: list[Row], row: Row) -> None:
    """Prints a row of a Markdown table, its head first."""
    if not rows:
        print("\n| " + " | ".join(row) + " |\n|" + "---|" * len(row))
    rows.append(row)
    print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)


def main() -> None:
    """Prints Markdown tables; with --json also writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--large", action="store_true", help="K = 131,072 too, and memory at K = 1,048,576")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    about = {
        "processor": platform.processor() or platform.machine(),
        "instruction set": sst_fast.dispatch.compiled.instruction_set() if sst_fast.dispatch.compiled else "none",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "date": str(date.today()),
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in about.items()) + "; D = 512, masks on")
    times: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        for k in (16384, 131072) if options.large else (16384,):
            for n in (256, 1024):
                for margin in (AMSoftmax(0.35), ArcSoftmax(0.5)):
                    for task in ("gradient", "forward", "prototypes"):
                        compiled = task == "gradient" and k == 16384
                        row = measure(n, k, 512, dtype, margin, task, options.seconds, compiled)
                        row.setdefault("compiled ms", "")
                        row.setdefault("compiled / ours", "")
                        order = [
                            *(key for key in row if not key.startswith("compiled")),
                            "compiled ms",
                            "compiled / ours",
                        ]
                        show(times, {key: row[key] for key in order})
    threads: list[Row] = []
    memory: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        show(threads, threads_row(dtype, options.seconds))
    for dtype in (torch.float32, torch.bfloat16):
        for k in (16384, 1048576) if options.large else (16384, 131072):
            for prototypes in (False, True):
                show(memory, memory_row(256, k, dtype, prototypes))
    if options.json:
        options.json.write_text(
            json.dumps({"about": about, "times": times, "threads": threads, "memory": memory}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
