"""``sst-fast tune``: which backend is fastest for a problem of the user's, measured here and stored for later choices.

Candidates are all backends that can compute the problem on this device. The Hopper sweep is among them: without a stored choice it runs
only when asked for by name. Backends written in Triton are measured with tiles of several sizes. Each candidate is first compared with
the reference, on few probes over the whole queue. Only what agrees is timed and can be stored. As in ``sst-fast check``, a candidate has
a process of its own, so that one that crashes does not end the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import torch

from sst_fast import check
from sst_fast.arguments import QUEUE_DTYPES, check_count
from sst_fast.backends import tuned
from sst_fast.backends.backend import Problem, size_class
from sst_fast.backends.choose import BACKENDS, backends, forget
from sst_fast.check import Row, Timed

FEW = 16  # probes on which results are compared
LARGEST = 2**31  # bytes of logits beyond which the reference is no candidate
PATIENCE = 180.0  # seconds for one candidate, its compiling included
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in QUEUE_DTYPES}


@dataclass(frozen=True)
class Result:
    """What was measured: a row for each candidate, the fastest right one, and where that was stored."""

    rows: list[Row]
    chosen: str
    file: Path


def problem_of(timed: Timed, device: torch.device, product_dtype: torch.dtype | None = None) -> Problem:
    """What the dispatcher is asked when a call like this is made."""
    wide = torch.float32 if timed.dtype == torch.float8_e4m3fn else timed.dtype
    return Problem(
        "margin_softmax", device, wide, timed.dtype, timed.d, trains_prototypes=timed.trains, normalize=timed.trains,
        product_dtype=product_dtype, probes=size_class(timed.n), slots=size_class(timed.k),
    )  # fmt: skip


def candidates(timed: Timed, device: torch.device, product_dtype: torch.dtype | None = None) -> list[str]:
    """Backends that can compute the problem here, and their other tiles as in 'triton:64x32x8x2' (rows, slots, warps, stages); the
    reference where its logits have room."""
    problem = problem_of(timed, device, product_dtype)
    able = [name for name in BACKENDS if check.why_not(name, problem) is None]
    able = [name for name in able if name != "reference" or 4 * timed.n * timed.k <= LARGEST]
    return [
        name + tile for name in able for tile in ("", *(":" + "x".join(map(str, t)) for t in BACKENDS[name].tiles(problem)))
    ]  # fmt: skip


def parts(candidate: str) -> tuple[str, tuple[int, ...] | None]:
    """The backend of a candidate and its tile, None where that is the backend's own; ValueError if it is no candidate's name."""
    name, colon, tile = candidate.partition(":")
    words = tile.split("x") if colon else []
    if name not in BACKENDS or len(words) not in (0, 4) or not all(word.isdecimal() for word in words):
        raise ValueError(
            f"candidate must be a backend, perhaps with a tile as in 'triton:64x32x8x2', got {candidate!r}"
        )
    return name, tuple(map(int, words)) or None


def tune(timed: Timed, device: torch.device, out: TextIO, product_dtype: torch.dtype | None = None) -> Result:
    """Compares and measures every candidate, prints a line for each, and stores the fastest of those that are right.

    The choice holds for problems with and without a batch window, on this device and with these versions.

    Raises:
        ValueError: no candidate computes the problem right.
        OSError: the choice cannot be stored.
    """
    rows: list[Row] = []
    print(check.heading(), file=out)
    for name in candidates(timed, device, product_dtype):
        for row in check.isolated(name, command(name, timed, device, product_dtype), PATIENCE):
            rows.append(row)
            print(check.shown(row), file=out, flush=True)
    failed = {row.backend for row in rows if row.verdict in ("wrong", "failed")}
    seconds = {
        row.backend: row.milliseconds / 1e3
        for row in rows
        if row.milliseconds is not None and row.backend not in failed
    }
    if not seconds:
        raise ValueError("no backend here computes this problem right: see 'sst-fast check'")
    chosen = min(seconds, key=lambda name: seconds[name])
    backend, tile = parts(chosen)
    problem = problem_of(timed, device, product_dtype)
    for window in (False, True) if not timed.trains else (False,):
        if BACKENDS[backend].why_not(problem._replace(window=window)) is None:
            file = tuned.store(problem._replace(window=window), backend, seconds, tile)
    forget()
    return Result(rows, chosen, file)


def examine(name: str, timed: Timed, device: torch.device, product_dtype: torch.dtype | None = None) -> list[Row]:
    """One candidate: compared on few probes, without and with a window, and timed if that was right."""
    candidate, rows = name, []
    name, tile = parts(candidate)
    if tile is not None:
        tuned.try_tile(name, tile)
    for start in (None,) if timed.trains else (None, timed.k - 1):
        n = min(timed.n, FEW, timed.k)
        example = check.make(n, timed.k, timed.d, start=start, masks=start is not None)
        example = replace(example, normalize_prototypes=timed.trains, product_dtype=product_dtype)
        wide = torch.float32 if timed.dtype == torch.float8_e4m3fn else timed.dtype
        tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        row = check.compare(example.to(wide, timed.dtype), name, device, timed.trains, tf32)
        rows.append(replace(row, backend=candidate, problem="results" if start is None else "results, window"))
    if all(row.verdict == "right" for row in rows):
        seconds = check.measure(timed, [name], device, 2.0, product_dtype)
        mine, bare = (1e3 * seconds[what] for what in (name, "bare products"))
        rows.append(Row(candidate, timed.name, "right", milliseconds=mine, bare=bare))
    return rows


def timed_from(n: int, k: int, d: int, dtype: str, prototypes: bool) -> Timed:
    """From what the command line gives; ValueError that names the option."""
    for option, value in (("n", n), ("k", k), ("d", d)):
        check_count(option, value, 1)
    if dtype not in NAMES:
        raise ValueError(f"dtype must be one of {', '.join(NAMES)}, got {dtype!r}")
    if prototypes and NAMES[dtype] == torch.float8_e4m3fn:
        raise ValueError("prototypes in float8_e4m3fn are frozen and cannot be trained")
    return Timed(n, k, d, NAMES[dtype], prototypes)


def chosen_now(timed: Timed, device: torch.device, product_dtype: torch.dtype | None = None) -> str:
    """What the dispatcher now says of such a problem, in words."""
    fields = problem_of(timed, device, product_dtype)._asdict()
    del fields["operation"], fields["device"]
    return str(backends(device, **fields)["margin_softmax"])


def command(name: str, timed: Timed, device: torch.device, product_dtype: torch.dtype | None = None) -> list[str]:
    """What examines one candidate in a process of its own; rows come as lines of JSON."""
    sizes = [f"--n={timed.n}", f"--k={timed.k}", f"--d={timed.d}", f"--dtype={str(timed.dtype).removeprefix('torch.')}"]
    flags = ["--prototypes"] * timed.trains + ["--float8-products"] * (product_dtype is not None)
    return [sys.executable, "-m", "sst_fast.tune", *sizes, *flags, f"--device={device}", f"--candidate={name}"]


def run(timed: Timed, device: torch.device, float8_products: bool = False) -> None:
    """Measures, stores and says what is chosen now."""
    product_dtype = torch.float8_e4m3fn if float8_products else None
    result = tune(timed, device, sys.stdout, product_dtype)
    now = chosen_now(timed, device, product_dtype)
    print(f"\n{result.chosen} is stored in {result.file}; now chosen:\n{now}")


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m sst_fast.tune``: what ``sst-fast tune`` does, without the command line's extra; or one candidate alone."""
    parser = argparse.ArgumentParser(
        description="Measure the backends for a problem and store the fastest that is right."
    )
    for size in ("--n", "--k"):
        parser.add_argument(size, type=int, required=True)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--dtype", choices=tuple(NAMES), default="bfloat16")
    parser.add_argument("--prototypes", action="store_true")
    parser.add_argument("--float8-products", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--candidate", help="this one alone, in this process; rows are lines of JSON")
    options = parser.parse_args(arguments)
    timed = timed_from(options.n, options.k, options.d, options.dtype, options.prototypes)
    device = torch.device(options.device)
    if options.candidate is None:
        run(timed, device, options.float8_products)
        return 0
    product_dtype = torch.float8_e4m3fn if options.float8_products else None
    for row in examine(options.candidate, timed, device, product_dtype):
        print(json.dumps(check.as_json([row])[0]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
