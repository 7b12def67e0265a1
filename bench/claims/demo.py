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
from bench.claims.__main__ import RESULTS, cut_off, part_of, versions
from sst_fast.margins import AMSoftmax
from sst_fast.train import demo
from sst_fast.train.config import Method
from sst_fast.train.loop import train

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.claims.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "demo-orl.jsonl", help="file of results")
    parser.add_argument("--part", default="1/1", help="I/N: every Nth configuration, into a file of its own")
    parser.add_argument("--epochs", type=int, default=demo.DemoConfig.epochs)
    options = parser.parse_args(arguments)
    config = grid.read_config()["demo"]
    part, parts = part_of(options.part)
    mine = options.out if parts == 1 else options.out.with_suffix(f".{part}of{parts}.jsonl")
    cut_off(mine)
    done = {key_of(row) for row in read(mine)}
    numbers = range(config["configurations"])
    wanted = itertools.product(numbers, range(config["folds"]), get_args(Method))
    for number, fold, method in itertools.islice(wanted, part - 1, None, parts):
        row = {
            "method": method,
            "configuration": number,
            "fold": fold,
            "epochs": options.epochs,
            "split": config["tuning"]["seed"],
        }
        if key_of(row) not in done:
            one(row, config, mine)
    print("\n".join(summary(read(mine), config["score"])))
    return 0


def key_of(row: Row) -> tuple[Any, ...]:
    """What makes a run another."""
    return tuple(row[name] for name in ("method", "configuration", "fold", "epochs", "split"))


def read(path: Path) -> list[Row]:
    """Finished runs."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def one(row: Row, config: grid.Config, out: Path) -> None:
    """Trains and writes a line."""
    values = grid.drawn(config, "am-softmax", row["configuration"])
    if row["method"] == "conventional":
        del values["queue_size"], values["momentum"]
    asked = demo.DemoConfig(seed=row["split"], epochs=row["epochs"], device="cpu")
    settings = replace(
        demo.settings_for(asked, row["method"], row["fold"]),
        **values | {"margin": AMSoftmax(values["margin"])},
        out=str(out.with_suffix("") / "-".join(map(str, key_of(row)))),
    )
    done = train(settings, *demo.split(asked, row["fold"]), row["method"])
    assert done.scores is not None
    found = {f"tar_at_far_{far:g}": value for far, value in done.scores.tar.items()}
    found |= {"accuracy": done.scores.accuracy, "rank1": done.scores.rank1}
    line = json.dumps(row | {"settings": values, "scores": found, "versions": versions()})
    with out.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


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
