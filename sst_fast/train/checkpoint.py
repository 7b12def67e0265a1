"""One file from which a run goes on exactly where it was, or as well as can be under another batch, queue or world size."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sst_fast import distributed
from sst_fast.samplers import IdentitySampler
from sst_fast.train.config import Config

# What a run may change when it goes on: where and how it runs and what it writes ...
FREE = {
    "out", "device", "init", "compile", "verify_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints",
}  # fmt: skip
FREE_DATA = {"workers"}
# ... and sizes, which change its course.
RESIZABLE = {"batch", "queue_size", "shard"}


@dataclass
class State:
    """All that a run is made of.

    Attributes:
        history: a row of metrics for each epoch done; sums, count: of the current epoch's, over this rank's pairs.
        step: batches; images: seen over all ranks, since the beginning.
        best: highest accuracy of a verification.
    """

    config: Config
    model: Any  # SemiSiamese, or conventional training's
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sampler: IdentitySampler
    history: list[dict[str, float]] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    count: int = 0
    step: int = 0
    images: int = 0
    best: float = -1.0


def save(folder: Path, state: State, *, best: bool = False) -> None:
    """Writes ``checkpoint.pt``, replacing it in one step, and keeps what the configuration wants kept. All ranks call it.

    With more than one to keep, ``checkpoint-EPOCH.pt`` are the last ones; ``best.pt`` is the best, if ``best`` says so.
    """
    mine: dict[str, Any] = {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "sums": state.sums,
        "count": state.count,
    }
    model = state.model.state_dict()
    rank, world = distributed.ranks()
    if state.config.shard:  # each rank's queue is another
        mine["queue"] = {name: model[f"criterion.queue.{name}"] for name in ("features", "identities", "state")}
    ranks: list[dict[str, Any]] = [mine] * world
    if world > 1:
        dist.all_gather_object(ranks, mine)
    if rank:
        return
    content = {
        "config": json.dumps(asdict(state.config), sort_keys=True),
        "model": model,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "sampler": state.sampler.state_dict(),
        "ranks": ranks,
        **{name: getattr(state, name) for name in ("history", "step", "images", "best")},
    }
    latest = folder / "checkpoint.pt"
    with replacing(latest) as temporary:
        torch.save(content, temporary)
    if state.config.keep_checkpoints > 1:
        _link(latest, folder / f"checkpoint-{len(state.history):05}.pt")
    for old in sorted(folder.glob("checkpoint-*.pt"))[: -state.config.keep_checkpoints]:
        old.unlink()
    if best:
        _link(latest, folder / "best.pt")


def load(path: Path, state: State) -> list[str]:
    """Puts the run back where :func:`save` found it.

    Returns:
        What differs from going on exactly, in words for the user; nothing as a rule.

    Raises:
        ValueError: the file belongs to another configuration; names the difference.
    """
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    theirs, ours = json.loads(saved["config"]), json.loads(json.dumps(asdict(state.config)))
    changed = _differences(path, theirs, ours)
    rank, world = distributed.ranks()
    model, ranks = saved["model"], saved["ranks"]
    said = [f"{path} was written with {name}={theirs[name]}, now it is {ours[name]}" for name in changed]
    if len(ranks) != world:
        said.append(f"{path} was written by {len(ranks)} processes, now there are {world}")
    shards = [saved_by["queue"] for saved_by in ranks if "queue" in saved_by]
    queue = getattr(state.model.criterion, "queue", None)
    if queue is not None and not (said or shards):
        state.model.load_state_dict(model)
    elif queue is not None:
        prefix = "criterion.queue."
        whole = {name.removeprefix(prefix): model.pop(name) for name in list(model) if name.startswith(prefix)}
        state.model.load_state_dict(model, strict=False)  # but for the queue
        if shards and not said:
            queue.load_state_dict(shards[rank])
        else:
            part = (rank, world) if state.config.shard else (0, 1)
            kept, there = queue.load_newest(*(shards or [whole]), rank=part[0], world=part[1])
            said.append(f"the queue keeps its newest {kept} of {there} features, the rest starts empty")
    else:
        state.model.load_state_dict(model)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    state.sampler.load_state_dict(saved["sampler"])
    for name in ("history", "step", "images", "best"):
        setattr(state, name, saved[name])
    if len(ranks) == world:
        mine = ranks[rank]
        state.sums, state.count = mine["sums"], mine["count"]
        torch.set_rng_state(mine["rng"])
        if mine["cuda_rng"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["cuda_rng"])
    elif rank == 0:  # carries what all of them had summed up
        state.sums = [sum(values) for values in zip(*(r["sums"] for r in ranks), strict=True)]
        state.count = sum(r["count"] for r in ranks)
        torch.set_rng_state(ranks[0]["rng"])
    return said


def _differences(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Settings of RESIZABLE that differ; ValueError at any other."""
    changed = []
    for name in sorted(set(theirs) | set(ours)):
        a, b = theirs.get(name), ours.get(name)
        if name == "data" and a and b:
            a, b = ({k: v for k, v in x.items() if k not in FREE_DATA} for x in (a, b))
        if a == b or name in FREE:
            continue
        if name not in RESIZABLE:
            raise ValueError(f"{path} was written with {name}={a!r}, now it is {b!r}; choose another out")
        changed.append(name)
    return changed


def _link(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        temporary.unlink(missing_ok=True)  # never write into what it may be another name of
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)


class replacing:
    """A temporary file beside ``path`` that takes its place when the block ends well."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
