"""Which runs there are, and in which order: tuning, then seeds of the best configuration, depth, ablations."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

Config = Mapping[str, Any]
Result = Mapping[str, Any]
METRIC_LEARNING = ("triplet", "contrastive", "n-pairs")
HAS_QUEUE = ("sst", "masst")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        data: the data set's name; stage: 'tune', 'test', 'length', 'depth' or 'ablation'; variant: which of the stage's.
        method: 'conventional', 'sst', 'masst' or 'metric'; loss: what it minimises.
        depth: images of each training identity; length: times as many steps as the configuration says; seed: of every random choice.
        the rest: hyper-parameters; those of the queue mean nothing to methods without one.
    """

    data: str
    stage: str
    variant: str
    method: str
    loss: str
    seed: int
    lr: float
    weight_decay: float
    scale: float
    margin: float
    queue: int = 0
    momentum: float = 0.0
    galleries: int = 1
    warmup: int = 20
    batchnorm: str = "own"
    keep: str = "coin"
    mask_identity: bool = True
    mask_empty: bool = True
    depth: int = 2
    length: int = 1

    @property
    def key(self) -> str:
        """Its name in a file of results."""
        return f"{self.data}/{self.stage}/{self.method}/{self.loss}/{self.variant}/{self.seed}"


def read_config(path: Path | None = None) -> dict[str, Any]:
    """The configuration file; by default the one beside this module."""
    found: dict[str, Any] = yaml.safe_load(
        (path or Path(__file__).with_name("claims.yaml")).read_text(encoding="utf-8")
    )
    return found


def of_set(config: Config, data: str) -> dict[str, Any]:
    """``config`` with the data set's own values in place of the common ones."""
    return {**config, "data": config["data"] | config.get("sets", {}).get(data, {})}


def digest(config: Config, data: str) -> str:
    """Of what makes results of a data set comparable: training, data and tuning."""
    own = of_set(config, data)
    text = json.dumps({name: own[name] for name in ("training", "data", "tuning", "first", "space")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def drawn(config: Config, loss: str, number: int) -> dict[str, Any]:
    """Configuration ``number`` of a loss. The same numbers draw the same values for every method."""
    first, space = config["first"], config["space"]
    if number == 0:
        return {name: value[loss] if name == "margin" else value for name, value in first.items()}
    rng = random.Random(f"{config['tuning']['seed']}/{number}")
    found = {}
    for name in first:
        choices = space[name][loss] if name == "margin" else space[name]
        at = rng.random()  # one number for each, whatever the choices are
        if len(choices) == 2:
            low, high = map(math.log, choices)
            found[name] = float(f"{math.exp(low + at * (high - low)):.3g}")
        else:
            found[name] = choices[int(at * len(choices))]
    return found


def _run(data: str, stage: str, variant: str, method: str, loss: str, seed: int, values: Mapping[str, Any]) -> Run:
    values = dict(values)
    if method not in HAS_QUEUE:
        values |= {"queue": 0, "momentum": 0.0}
    values["galleries"] = values["galleries"] if method == "masst" else 1
    return Run(data, stage, variant, method, loss, seed, **values)


def tuning(config: Config, data: str, method: str, loss: str) -> list[Run]:
    """The runs from which :func:`best` chooses."""
    seed = config["tuning"]["seed"]
    numbers = range(config["tuning"]["configurations"])
    return [_run(data, "tune", str(n), method, loss, seed, drawn(config, loss, n)) for n in numbers]


def best(config: Config, data: str, method: str, loss: str, results: Mapping[str, Result]) -> Run | None:
    """The run with the highest score on the validation identities; None while some are missing."""
    runs = tuning(config, data, method, loss)
    if not all(run.key in results for run in runs):
        return None
    return max(runs, key=lambda run: score(results[run.key], config["tuning"]["score"]))


def score(result: Result, name: str) -> float:
    """A run's, on the identities that it was judged by; below all if it diverged."""
    value = (result.get("scores") or {}).get(name)
    return -1.0 if value is None else float(value)


def methods(config: Config) -> list[tuple[str, str]]:
    """(method, loss) of all that are tuned, in order, so that those to be compared take turns."""
    pairs = [(method, loss) for loss in config["stages"]["losses"] for method in ("conventional", "sst")]
    for other in config["stages"]["others"]:
        pairs.append((other, "am-softmax") if other == "masst" else ("metric", other))
    return pairs


def _in_turns(groups: Iterable[list[Run]]) -> list[Run]:
    return [run for together in zip(*groups, strict=True) for run in together]


def seeds(config: Config, stage: str, chosen: Run, variant: str, **changes: Any) -> list[Run]:
    """A configuration on the test identities."""
    return [
        replace(chosen, stage=stage, variant=variant, seed=seed, **changes) for seed in range(config["seeds"][stage])
    ]


def stages(config: Config, data: str, results: Mapping[str, Result]) -> Iterator[tuple[str, list[Run] | None]]:
    """All stages with their runs; None where the runs depend on results that are not there yet."""

    def tested(stage: str, pairs: list[tuple[str, str]], variant: str, **changes: Any) -> list[Run] | None:
        chosen = [best(config, data, *pair, results) for pair in pairs]
        if any(run is None for run in chosen):
            return None
        return _in_turns(seeds(config, stage, run, variant, **changes) for run in chosen if run)

    both = [("conventional", "am-softmax"), ("sst", "am-softmax")]

    def tuned(group: list[tuple[str, str]]) -> Iterator[tuple[str, list[Run] | None]]:
        name = " and ".join(f"{method} {loss}" for method, loss in group)
        yield f"tuning of {name}", _in_turns(tuning(config, data, *pair) for pair in group)
        yield f"test of {name}", tested("test", group, "best")

    for loss in config["stages"]["losses"]:
        yield from tuned([("conventional", loss), ("sst", loss)])
    for length in config["stages"]["lengths"]:
        yield f"{length} times as long", tested("length", both, str(length), length=length)
    for pair in methods(config)[2 * len(config["stages"]["losses"]) :]:
        yield from tuned([pair])
    for depth in config["stages"]["depths"]:
        yield f"depth {depth}", tested("depth", both, str(depth), depth=depth)
    chosen = best(config, data, *both[1], results)
    for name, value in ablations(config):
        yield f"{name} {value}", None if chosen is None else ablated(config, chosen, name, value)


def ablations(config: Config) -> list[tuple[str, Any]]:
    """(setting, value) of each."""
    return [(name, value) for name, values in config["ablations"].items() for value in values]


def ablated(config: Config, chosen: Run, name: str, value: Any) -> list[Run]:
    """SST's best configuration with one setting changed; if that is its value anyway, the runs of the test, which are not repeated."""
    if getattr(chosen, name) == value:
        return seeds(config, "test", chosen, "best")
    return seeds(config, "ablation", chosen, f"{name}={value}", **{name: value})


def quick(config: Config, data: str, results: Mapping[str, Result]) -> list[Run]:
    """Both methods with AM-softmax, by their best known configurations (the first one where none is known)."""
    groups = []
    for method in ("conventional", "sst"):
        found = best(config, data, method, "am-softmax", results) or tuning(config, data, method, "am-softmax")[0]
        groups.append(
            [
                replace(found, stage="quick", variant="best", seed=1000 + seed)
                for seed in range(config["quick"]["seeds"])
            ]
        )
    return _in_turns(groups)


def read_results(path: Path, protocol: str = "") -> dict[str, Result]:
    """Finished runs by key; a last line that was cut off is left out.

    Raises:
        ValueError: a line is none, or belongs to another configuration than ``protocol``.
    """
    found: dict[str, Result] = {}
    if not path.exists():
        return found
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            result = json.loads(line)
            key, theirs = result["key"], result["protocol"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                continue
            raise ValueError(f"{path}, line {number} is no result of a run") from None
        if protocol and theirs != protocol:
            raise ValueError(
                f"{path}, line {number} belongs to configuration {theirs}, this is {protocol}: name another --out"
            )
        found[key] = result
    return found


def record(run: Run, protocol: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A line of results."""
    return {"key": run.key, "protocol": protocol, **asdict(run), **found}
