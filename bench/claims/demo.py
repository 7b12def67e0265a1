"""``python -m bench.claims.demo``: searches the settings of ``sst-fast demo``, for both methods by the same number of configurations.

It trains on splits of the ORL faces that the demo does not report. A line for each finished run goes into the file of results; stopped at any time, it
goes on after the last. Then the mean score of each configuration is printed, the best one first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from bench.claims import grid
from bench.claims.__main__ import RESULTS, all_parts, cut_off, file_of, part_of, versions
from bench.claims.train import recorded
from sst_fast.margins import AMSoftmax
from sst_fast.train import demo
from sst_fast.train.config import Method
from sst_fast.train.loop import train

Row = dict[str, Any]
FOLDER = Path("runs/claims/demo")  # of the runs themselves


def main(arguments: Sequence[str] | None = None) -> int:
    """One line on stderr for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m bench.claims.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "demo-orl.jsonl", help="file of results")
    parser.add_argument("--part", default="1/1", help="I/N: every Nth run, into a file of its own")
    parser.add_argument("--epochs", type=int, default=demo.DemoConfig.epochs)
    options = parser.parse_args(arguments)
    try:
        search(options.out, part_of(options.part), options.epochs)
    except (ValueError, OSError) as error:
        print(f"bench.claims.demo: {error}", file=sys.stderr)
        return 1
    return 0


def search(out: Path, part: tuple[int, int], epochs: int) -> None:
    """Trains what is missing in the files of all parts, and prints what they hold."""
    config = grid.read_config()["demo"]
    mine = file_of(out, part)
    cut_off(mine)
    runs, done = wanted(config, epochs), [asked_for(row) for row in read(out)]
    for run in itertools.islice(runs, part[0] - 1, None, part[1]):
        if run not in done:
            one(run, mine)
    found = [row for row in read(out) if asked_for(row) in runs]
    print("\n".join(summary(found, config["score"])))


def wanted(config: grid.Config, epochs: int) -> list[Row]:
    """All runs: what each is asked for."""
    runs = []
    numbers = range(config["configurations"])
    for number, fold, method in itertools.product(numbers, range(config["folds"]), get_args(Method)):
        settings = grid.drawn(config, "am-softmax", number)
        if method == "conventional":
            del settings["queue_size"], settings["momentum"]
        runs.append(
            {"method": method, "configuration": number, "fold": fold, "epochs": epochs, "split": config["tuning"]["seed"],
             "settings": settings}
        )  # fmt: skip
    return runs


def asked_for(row: Row) -> Row:
    """Of a finished run."""
    return {name: row[name] for name in ("method", "configuration", "fold", "epochs", "split", "settings")}


def read(out: Path) -> list[Row]:
    """Finished runs, of all parts."""
    return [json.loads(line) for path in all_parts(out) for line in path.read_text(encoding="utf-8").splitlines()]


def one(run: Row, out: Path) -> None:
    """Trains and writes a line."""
    asked = demo.DemoConfig(seed=run["split"], epochs=run["epochs"], device="cpu")
    name = "-".join(str(run[name]) for name in ("method", "configuration", "fold", "epochs"))
    settings = replace(
        demo.settings_for(asked, run["method"], run["fold"]),
        **run["settings"] | {"margin": AMSoftmax(run["settings"]["margin"])},
        out=str(FOLDER / name),
    )
    demo.begun_alike(settings)
    done = train(settings, *demo.split(asked, run["fold"]), run["method"])
    assert done.scores is not None
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run | {"scores": recorded(done.scores), "versions": versions()}) + "\n")


def summary(rows: Sequence[Row], score: Sequence[str]) -> list[str]:
    """Of each method, its configurations by the mean of these scores over folds."""
    lines = []
    for method in get_args(Method):
        by_number: dict[int, list[Row]] = {}
        for row in rows:
            if row["method"] == method:
                by_number.setdefault(row["configuration"], []).append(row)
        means = {
            n: statistics.mean(row["scores"][name] for row in some for name in score) for n, some in by_number.items()
        }
        for number in sorted(means, key=lambda n: -means[n]):
            some = by_number[number]
            lines.append(f"{method} {number}: {100 * means[number]:.1f}, folds {len(some)}, {some[0]['settings']}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
