"""``python -m bench.claims``: trains what is missing in the file of results, a line for each finished run."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sst_fast
from bench.claims import grid, report, train
from sst_fast.data.glyphs import glyphs
from sst_fast.train.cli import UNREAD, output_unread

RESULTS = Path("bench/results")


def main(arguments: Sequence[str] | None = None) -> int:
    """One line on stderr for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m bench.claims", description=__doc__)
    parser.add_argument(
        "--data", default="", help="folder with train/ and test/; by default kanji, drawn into runs/claims"
    )
    parser.add_argument("--name", default="kanji", help="of the data set in results and in docs/claim.md")
    parser.add_argument("--out", type=Path, help="file of results, by default bench/results/claims-NAME.jsonl")
    parser.add_argument("--part", default="1/1", help="I/N: every Nth run of a stage, into a file of its own")
    parser.add_argument("--config", type=Path, help="by default bench/claims/claims.yaml")
    parser.add_argument(
        "--quick", action="store_true", help="both methods with AM-softmax by known settings, about 10 minutes"
    )
    parser.add_argument(
        "--list", action="store_true", help="tell the stages and how much of each is done, train nothing"
    )
    parser.add_argument(
        "--report", type=Path, metavar="PAGE", help="write tables and figures into this page, train nothing"
    )
    options = parser.parse_args(arguments)
    try:
        run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("bench.claims: interrupted; the same command goes on after the last finished run", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if output_unread(error):
            return UNREAD
        print(f"bench.claims: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """What the options ask for."""
    config = grid.of_set(grid.read_config(options.config), options.name)
    protocol, part = grid.digest(config, options.name), part_of(options.part)
    name = "claims-quick" if options.quick else "claims"
    out = options.out or RESULTS / f"{name}-{options.name}.jsonl"
    if options.report:
        files = sorted(RESULTS.glob("claims-*.jsonl")) if options.out is None else [out]
        report.write(options.report, files, grid.read_config(options.config))
        print(options.report)
        return
    mine = file_of(out, part)

    def results() -> dict[str, grid.Result]:
        """Of all parts."""
        found: dict[str, grid.Result] = {}
        for path in all_parts(out):
            found |= grid.read_results(path, protocol)
        return found

    if options.list:
        tell(config, options.name, results())
        return
    if options.quick:
        known = grid.read_results(RESULTS / f"claims-{options.name}.jsonl")
        stages = lambda _: [("quick", grid.quick(config, options.name, known))]
    else:
        stages = lambda found: list(grid.stages(config, options.name, found))
    root = options.data or drawn(config)
    cut_off(mine)
    while True:
        found = results()
        waiting, missing = [], []
        for stage, runs in stages(found):
            if runs is None:
                waiting.append(stage)
                continue
            missing = [r for r in itertools.islice(runs, part[0] - 1, None, part[1]) if r.key not in found]
            if missing:
                break
        if not missing:
            break
        for each in missing:
            one(each, config, protocol, Path(root), mine)
    if waiting:
        print(f"wait for other parts: {', '.join(waiting)}; the same command goes on when these are done")
    if options.quick:
        print("\n".join(report.summary(list(results().values()), "quick")))


def one(run: grid.Run, config: grid.Config, protocol: str, root: Path, out: Path) -> None:
    """Trains and writes a line."""
    begin = time.monotonic()
    result = train.train(
        run, config, loaded(root, json.dumps(config, sort_keys=True), run.stage == "tune", run.depth, run.seed)
    )
    line = json.dumps(grid.record(run, protocol, result | {"versions": versions()}))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    told = result["scores"] or {}
    shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in told.items()) or "diverged"
    print(f"{run.key}: {shown} ({time.monotonic() - begin:.0f} s)", flush=True)


@functools.lru_cache(maxsize=4)
def loaded(root: Path, config: str, tunes: bool, depth: int, seed: int) -> train.Split:
    """Read once for the runs that share it."""
    return train.split(root, json.loads(config), tunes, depth, seed)


def versions() -> dict[str, Any]:
    """Of what computed a run."""
    return {
        "sst-fast": sst_fast.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def drawn(config: grid.Config) -> str:
    """The kanji of this machine's fonts."""
    root = Path("runs/claims/kanji")
    glyphs(str(root), size=config["data"]["size"])
    return str(root)


def part_of(text: str) -> tuple[int, int]:
    """'1/4' as (1, 4)."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--part must be I/N with 1 <= I <= N, got {text!r}")
    return int(number), int(count)


def file_of(out: Path, part: tuple[int, int]) -> Path:
    """Where a part's results go; ``out`` itself is that of the whole."""
    return out if part[1] == 1 else out.with_suffix(f".{part[0]}of{part[1]}.jsonl")


def all_parts(out: Path) -> list[Path]:
    """The files of results that there are: of the whole, and of parts."""
    return [path for path in (out, *sorted(out.parent.glob(f"{out.stem}.*of*.jsonl"))) if path.exists()]


def cut_off(path: Path) -> None:
    """Removes a last line that has no end: the run's process was killed while it wrote."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)


def tell(config: grid.Config, name: str, results: dict[str, grid.Result]) -> None:
    """A line for each stage."""
    for stage, runs in grid.stages(config, name, results):
        done = "waits for tuning" if runs is None else f"{sum(r.key in results for r in runs)} of {len(runs)}"
        print(f"{stage:<55} {done}")


if __name__ == "__main__":
    sys.exit(main())
