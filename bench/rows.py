"""The loss beside its rivals, each row written as soon as it is measured: for a machine that may be gone any minute.

python -m bench.rows FILE.jsonl --device cuda              # measures what FILE does not hold yet; a process for each problem
python -m bench.rows FILE.jsonl --slowest 3                # kernels of our slowest rows, from the profiler
python -m bench.rows FILE.jsonl --merge results.json       # as bench.report reads it
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import problems, providers, report, timing
from bench.lines import append, read
from bench.problems import Problem

PATIENCE = 150.0  # seconds for the process of one problem


def chosen(size: str) -> list[Problem]:
    """Most valuable first: the usual size in bfloat16, then other sizes, then other dtypes."""
    if size == "smoke":
        return [
            Problem(8, 64, 32, "bfloat16"), Problem(8, 64, 32, "float8_e4m3fn", task="forward"),
            Problem(8, 64, 32, "tf32", task="prototypes", sst=False),
        ]  # fmt: skip
    sizes = [(1024, 16384), (4096, 1048576), (256, 131072)]
    sizes += [(n, k) for n in (256, 1024, 4096) for k in (16384, 131072, 1048576) if (n, k) not in sizes]
    d, found = 512, []
    for dtype in ("bfloat16", "float8_e4m3fn", "tf32"):
        for n, k in sizes:
            for task in ("gradient", "forward", "prototypes"):
                if task != "prototypes" or dtype != "float8_e4m3fn":
                    found.append(Problem(n, k, d, dtype, task=task, sst=task != "prototypes"))
            if dtype == "bfloat16":  # the plain softmax, which most libraries can compute
                found.append(Problem(n, k, d, dtype, margin="softmax", sst=False))
    return found


def able(problem: Problem, device: torch.device, size: str) -> Iterator[tuple[providers.Provider, str]]:
    """Every provider and why it does not take part, '' if it does."""
    for provider in providers.PROVIDERS:
        reason = provider.why_not(problem, device)
        if provider.name == "torch.compile" and (size == "smoke" or problem.k > 16384):
            reason = reason or "torch.compile takes most of a minute for each size"
        yield provider, reason


def measure(problem: Problem, device: torch.device, size: str, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each contender: its times, or why there are none."""
    torch.set_float32_matmul_precision("high" if problem.dtype == "tf32" else "highest")
    row = {"suite": "loss", "group": str(problem), "problem": asdict(problem)}
    few = problems.small(problem)
    inputs = problems.make(few, device)
    wanted = problems.expected(few, inputs)
    makers: dict[str, Any] = {report.BARE: providers.bare}
    known: dict[str, dict[str, Any]] = {report.BARE: {}}
    for provider, reason in able(problem, device, size):
        if reason:
            yield row | {"provider": provider.name, "absent": reason}
            continue
        try:
            known[provider.name] = {"error": problems.compare(few, provider.make(few, inputs)(), wanted)}
            makers[provider.name] = provider.make
        except Exception as error:
            yield row | {"provider": provider.name, "absent": one_line(error)}
    del inputs, wanted
    inputs = problems.make(problem, device)
    several = [inputs] + [
        problems.make(problem, device, seed) for seed in range(1, timing.copies([inputs.x_low, inputs.w_low]))
    ]
    calls: dict[str, list[Any]] = {}
    for name, make in makers.items():
        try:  # a rival's lack of memory is a row
            calls[name] = [make(problem, each) for each in several]
            first, again = (calls[name][0]() for _ in range(2))
            if report.is_ours(name):
                known[name]["bitwise"] = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            del first, again
        except Exception as error:
            calls.pop(name, None)
            yield row | {"provider": name, "absent": one_line(error)}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    times = timing.race(calls, device, seconds, least=3)
    speed = clocks(device)
    for name, data in times.items():
        median = statistics.median(data)
        work = 2 * problem.products * problem.n * problem.k * problem.d
        found = row | known[name] | {"provider": name, "data": data, "tflops": work / median / 1e12, "clocks": speed}
        if report.is_ours(name) and device.type == "cuda":
            spent = kernels(calls[name][0])
            sweep = sum(us for kernel, us in spent.items() if "sweep" in kernel)
            passes = min(problem.products, 2)  # the sweep's own products; the prototypes' are another kernel's
            found |= {"kernels": spent}
            if sweep:
                found |= {"sweep tflops": 2 * passes * problem.n * problem.k * problem.d / sweep / 1e6}
        yield found


def kernels(call: timing.Call) -> dict[str, float]:
    """Microseconds of each kernel of one call on a GPU."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return {e.key[:80]: float(e.device_time_total) for e in seen.key_averages() if e.device_time_total}


def clocks(device: torch.device) -> str:
    """Of multiprocessors and memory, power and temperature, as nvidia-smi gives them; '' where it does not."""
    if device.type != "cuda":
        return ""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def run_all(path: Path, device: torch.device, size: str, seconds: float, within: float) -> None:
    """Measures the problems that the file does not hold, one process each, for about ``within`` seconds."""
    begin = time.monotonic()
    done = {row["done"] for row in read(path) if "done" in row}
    if not path.exists():
        append(path, {"machine": timing.about(device) | {"bytes per second": timing.bandwidth(device)}})
    for number, problem in enumerate(chosen(size)):
        if str(problem) in done:
            continue
        if time.monotonic() - begin > within:
            print(f"bench.rows: {within:g} s are up; run it again to go on", flush=True)
            return
        command = [sys.executable, "-m", "bench.rows", str(path), "--device", str(device), "--size", size]
        command += ["--seconds", str(seconds), "--one", str(number)]
        try:
            status = subprocess.run(command, timeout=PATIENCE).returncode
            ended = "" if status == 0 else f"its process ended with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"it was stopped after {PATIENCE:g} s"
        if ended:
            append(path, {"group": str(problem), "provider": "all that came after", "absent": ended})
        append(path, {"done": str(problem)})  # what failed once is not tried again


def told(row: dict[str, Any]) -> str:
    if "absent" in row:
        return f"{row['group']}: {row['provider']}: {row['absent']}"
    speed = f"{1e3 * statistics.median(row['data']):.3g} ms, {row['tflops']:.3g} TFLOP/s"
    return f"{row['group']}: {row['provider']}: {speed}" + (
        "" if row.get("bitwise", True) else ", NOT bitwise repeatable"
    )


def slowest(path: Path, count: int, device: torch.device) -> None:
    """The profiler's table for our rows that are farthest from the bare products."""
    rows = [row for row in read(path) if "data" in row]
    bare = {row["group"]: statistics.median(row["data"]) for row in rows if row["provider"] == report.BARE}
    mine = [row for row in rows if report.is_ours(row["provider"]) and row["group"] in bare]
    mine.sort(key=lambda row: statistics.median(row["data"]) / bare[row["group"]], reverse=True)
    for row in mine[:count]:
        problem = Problem(**row["problem"])
        torch.set_float32_matmul_precision("high" if problem.dtype == "tf32" else "highest")
        provider = next(p for p in providers.PROVIDERS if p.name == row["provider"])
        call = provider.make(problem, problems.make(problem, device))
        call()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with profile(activities=activities) as seen:
            for _ in range(5):
                call()
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        ratio = statistics.median(row["data"]) / bare[row["group"]]
        print(f"{row['group']}, {row['provider']}: {ratio:.2f} times the bare products\n")
        print(seen.key_averages().table(sort_by=by, row_limit=15), flush=True)


def merge(path: Path, target: Path) -> None:
    """Writes the file that bench.report reads."""
    rows = read(path)
    machine = next(row["machine"] for row in rows if "machine" in row)
    extra = ("suite", "provider", "problem", "error", "tflops", "sweep tflops", "clocks", "bitwise", "kernels")
    benchmarks = [
        {
            "group": row["group"], "extra_info": {name: row[name] for name in extra if name in row},
            "stats": {"data": [float(f"{seconds:.5g}") for seconds in row["data"]]},
        }
        for row in rows if "data" in row
    ]  # fmt: skip
    absent = [{name: row[name] for name in ("group", "provider", "absent")} for row in rows if "absent" in row]
    content = {"machine_info": machine, "benchmarks": benchmarks, "absent": absent}
    target.write_text(json.dumps(content) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="lines of JSON; what it holds is not measured again")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("smoke", "default"), default="default")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each problem, all its contenders together")
    parser.add_argument("--within", type=float, default=420.0, help="seconds after which no further problem is begun")
    parser.add_argument("--one", type=int, help="this problem alone, in this process")
    parser.add_argument("--slowest", type=int, help="profile so many of our slowest rows instead")
    parser.add_argument("--merge", type=Path, help="write the file for bench.report instead")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.merge:
        merge(options.rows, options.merge)
    elif options.slowest:
        slowest(options.rows, options.slowest, device)
    elif options.one is not None:
        for row in measure(chosen(options.size)[options.one], device, options.size, options.seconds):
            append(options.rows, row)
            print(told(row), flush=True)
    else:
        run_all(options.rows, device, options.size, options.seconds, options.within)
    return 0


if __name__ == "__main__":
    sys.exit(main())
