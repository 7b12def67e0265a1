"""How time and memory are taken. See docs/benchmarks.md for the reasons."""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from typing import Any

import torch

import sst_fast
from sst_fast.backends.extension import compiled
from sst_fast.backends.tuned import processor
from sst_fast.timing import Call, copies, race

__all__ = ["REPLAY", "Call", "bandwidth", "copies", "extra_memory", "peak_memory", "race"]


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy of 256 MiB, read and written, best of ten."""
    a = torch.empty(2**26, device=device)
    b = torch.empty_like(a)
    a.zero_(), b.zero_()
    best = min(race({"copy": [lambda: b.copy_(a)]}, device, 0.0, 10)["copy"])
    return 2 * a.numel() * a.element_size() / best


def about(device: torch.device) -> dict[str, object]:
    """Device, versions and date: what a result is worth nothing without."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "instruction set": compiled.instruction_set() if compiled else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "sst-fast": sst_fast.__version__,
        "date": str(date.today()),
    }


class Replay:
    """A clock for pytest-benchmark that replays durations: they were measured before, all contenders taking turns, which
    its own loop over one function cannot do."""

    def __init__(self) -> None:
        self.now, self.started = 0.0, False
        self.durations: list[float] = []

    def load(self, durations: Sequence[float]) -> None:
        """What the next calls will be."""
        self.durations, self.started = list(reversed(durations)), False

    def __call__(self) -> float:
        if self.started:
            self.now += self.durations.pop()
        self.started = not self.started
        return self.now


REPLAY = Replay()


# A C allocator that gives everything back at once, so that a peak is of what was asked for.
QUIET = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def peak_memory(source: str, arguments: Sequence[Any], device: torch.device) -> dict[str, float]:
    """:func:`extra_memory` of every contender; on the CPU in one fresh process.

    ``source``, 'module:function', yields (name, call) when given ``arguments``, which JSON can hold, and the device. What a call
    sets up only the first time should be there by then.
    """
    if device.type == "cuda":
        return _peaks(source, arguments, device)
    done = subprocess.run(
        [sys.executable, "-m", "bench.timing", json.dumps([source, arguments])],
        capture_output=True, text=True, env=os.environ | QUIET,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"memory of {source}, {arguments}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _peaks(source: str, arguments: Sequence[Any], device: torch.device) -> dict[str, float]:
    module, function = source.split(":")
    pairs = getattr(importlib.import_module(module), function)(*arguments, device)
    return {name: extra_memory(call, device) for name, call in pairs}


def extra_memory(call: Call, device: torch.device) -> float:
    """MiB at the peak of a call beyond what is there before it, its results included.

    CUDA: by the allocator's statistics. CPU: peak resident size; the process was started with :data:`QUIET`.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    at_rest = _high_water()
    call()
    return (_high_water() - at_rest) / 1024


def _high_water() -> int:
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    print(json.dumps(_peaks(*json.loads(sys.argv[1]), torch.device("cpu"))))
