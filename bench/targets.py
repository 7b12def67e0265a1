"""The fused loss against its limits and against eager code, on this machine: ``python -m bench.targets``.

All contenders of a row take turns in one process on the same inputs; a row shows medians. 'bare' is the library's own matrix
products of the same size and dtype, as many as the task needs: what a perfect kernel would take if it could not beat the
library. 'eager' writes the logits out as the authors' head does, one direction of N rows. Results are compared
before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import sst_fast
from sst_fast import AMSoftmax, ArcSoftmax, Margin
from sst_fast.functional import margin_softmax

Run = Callable[[], object]


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


def eager(x: Tensor, w: Tensor, y: Tensor, margin: Margin, identity: Tensor, slots: Tensor, normalize: bool) -> Tensor:
    """The loss as it is usually written, with its masks."""
    cosines = F.linear(F.normalize(x), F.normalize(w) if normalize else w)
    target = cosines.gather(1, y[:, None])
    cosines = cosines.masked_fill(identity[:, None] == slots[None, :], -torch.inf)
    logits = cosines.scatter(1, y[:, None], margin.psi(target).to(cosines.dtype))
    return F.cross_entropy(30.0 * logits, y)


def measure(n: int, k: int, d: int, dtype: torch.dtype, margin: Margin, task: str, seconds: float) -> dict[str, object]:
    """One row: 'gradient' for the probes, 'forward' alone, or 'prototypes': gradients for both."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator).to(dtype)
    w = F.normalize(torch.randn(k, d, generator=generator)).to(dtype)
    y = torch.randint(k, (n,), generator=generator)
    slots = torch.arange(k)
    identity = slots[y]
    both, wanted = task == "prototypes", task != "forward"
    x.requires_grad_(wanted)
    w.requires_grad_(both)
    unit = F.normalize(x.detach())
    weights = torch.randn(n, k, generator=generator).to(dtype)
    plain = w.detach()

    def finish(loss: Tensor) -> Tensor:
        x.grad = w.grad = None
        if wanted:
            loss.backward()
        return loss.detach()

    def ours() -> Tensor:
        return finish(margin_softmax(x, w, y, margin=margin, scale=30.0, identity=identity, slot_identity=slots,
                                     normalize_prototypes=both))  # fmt: skip

    def theirs() -> Tensor:
        return finish(eager(x, w, y, margin, identity, slots, both))

    def bare() -> None:
        unit @ plain.T
        if wanted:
            weights @ plain
        if both:
            unit @ plain.T
            weights.T @ unit

    assert abs(ours().item() - theirs().item()) < (1e-3 if dtype == torch.float32 else 0.2)
    contenders: dict[str, Run] = {"ours": ours, "bare": bare, "eager": theirs}
    found = median_times(contenders, seconds)
    return {
        "n": n, "k": k, "d": d, "dtype": str(dtype).removeprefix("torch."), "margin": type(margin).__name__, "task": task,
        **{f"{name} ms": round(value, 2) for name, value in found.items()},
        "ours / bare": round(found["ours"] / found["bare"], 2), "eager / ours": round(found["eager"] / found["ours"], 2),
    }  # fmt: skip


def main() -> None:
    """Prints a Markdown table; with --json also writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--large", action="store_true", help="K = 131,072 too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    about = {
        "processor": platform.processor() or platform.machine(),
        "instruction set": sst_fast.dispatch.compiled.instruction_set() if sst_fast.dispatch.compiled else "none",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "date": str(date.today()),
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for k in (16384, 131072) if options.large else (16384,):
            for n in (256, 1024):
                for margin in (AMSoftmax(0.35), ArcSoftmax(0.5)):
                    for task in ("gradient", "forward", "prototypes"):
                        row = measure(n, k, 512, dtype, margin, task, options.seconds)
                        if not rows:
                            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
                        rows.append(row)
                        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
