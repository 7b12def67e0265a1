"""One file from which a run goes on exactly where it was, or as well as can be with other settings or more identities."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import re
import shutil
import socket
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sst_fast import distributed
from sst_fast.samplers import IdentitySampler
from sst_fast.train.config import Config

# Settings that a run keeps for life: networks and crops would not fit, and another seed or share would train on test identities.
FIXED = {
    "method", "backbone", "dim", "width", "galleries", "seed", "data.size", "data.channels", "data.test_share",
}  # fmt: skip
# Settings that change nothing of what is learned: where and how a run works and what it writes. All others are told.
SILENT = {
    "out", "device", "init", "compile", "verify_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints",
    "data.workers",
}  # fmt: skip
RESIZES = {"queue_size", "queue_dtype", "shard"}  # the queue then keeps its newest features
QUEUE, MARGIN = "criterion.queue.", "criterion.margin."  # where a model's state dict holds them


@dataclass
class State:
    """All that a run is made of.

    Attributes:
        names: of the training identities, in order of their numbers.
        history: a row of metrics for each epoch done; seconds: trained at the end of each, over all starts of the run.
        sums, count: of the current epoch's metrics, over this rank's pairs.
        step: batches; images: seen over all ranks, since the beginning.
        best: highest accuracy of a verification.
    """

    config: Config
    model: Any  # SemiSiamese, or conventional training's
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sampler: IdentitySampler
    names: Sequence[str]
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    count: int = 0
    step: int = 0
    images: int = 0
    best: float = -1.0


PLAIN = ("history", "seconds", "step", "images", "best")  # what a checkpoint holds of State as it is


def save(folder: Path, state: State, *, best: bool = False) -> None:
    """Writes ``checkpoint.pt``, replacing it in one step, and keeps what the configuration wants kept. All ranks call it.

    With more than one to keep, ``checkpoint-EPOCH.pt`` are the last ones; ``best.pt`` is the best, if ``best`` says so.
    Rank 0 writes the one file; it alone receives what other ranks hold of their own (random states, shards of the queue).

    Raises:
        OSError: the file cannot be written, as on a full disk; the one before stays.
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
        mine["queue"] = {name: model[f"{QUEUE}{name}"] for name in ("features", "identities", "state")}
    ranks: list[dict[str, Any]] = [mine] * world
    if world > 1:
        dist.gather_object(mine, ranks if rank == 0 else None)
    if rank:
        return
    content = {
        "config": json.dumps(state.config.as_dict(), sort_keys=True),
        "names": list(state.names),
        "model": model,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "sampler": state.sampler.state_dict(),
        "ranks": ranks,
        **{name: getattr(state, name) for name in PLAIN},
    }
    latest = folder / "checkpoint.pt"
    with replacing(latest) as temporary:
        _write(content, temporary, latest)
    if state.config.keep_checkpoints > 1:
        _link(latest, folder / f"checkpoint-{len(state.history):05}.pt")
    for old in sorted(folder.glob("checkpoint-*.pt"))[: -state.config.keep_checkpoints]:
        old.unlink()
    if best:
        _link(latest, folder / "best.pt")


def read(path: Path) -> Any:
    """What a file of PyTorch's holds, tensors and plain values only, on the CPU.

    Raises:
        OSError: it cannot be opened. ValueError: it is no such file, is cut short or damaged (the checksums that
            ``torch.save`` stores are compared), or holds other objects.
    """
    with path.open("rb") as file:
        begin = file.read(2)
    if not begin:
        raise ValueError(f"{path} is empty")
    is_zip = begin == b"PK"
    try:
        damaged = None
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a file of another kind leads zipfile and PyTorch to
        if isinstance(error, pickle.UnpicklingError) and re.search("Unsupported (global|class)", str(error)):
            raise ValueError(
                f"{path} holds Python objects (a whole pickled module?), and loading those could run any code; "
                "save the network's state_dict() instead"
            ) from None
        raise ValueError(f"{path} {'is cut short or damaged' if is_zip else 'is no file of PyTorch'}") from None
    raise ValueError(f"{path} is damaged: the checksum of its part {damaged!r} does not match")


def load(path: Path, state: State) -> list[str]:
    """Puts the run back where :func:`save` found it.

    Returns:
        What differs from going on exactly, in words for the user; nothing as a rule.

    Raises:
        ValueError: the file is no checkpoint, or its run differs in what a run keeps for life; names the difference.
    """
    saved: Any = read(path)
    needed = {"config", "names", "model", "optimizer", "scaler", "sampler", "ranks", *PLAIN}
    if not isinstance(saved, dict) or not needed <= saved.keys():
        raise ValueError(f"{path} is not the checkpoint of a run (weights alone are a start by 'init')")
    changed = changes(path, json.loads(saved["config"]), state.config.as_dict())
    rank, world = distributed.ranks()
    ranks = saved["ranks"]
    said = [f"{path} was written with {name}={was!r}, now it is {now!r}" for name, (was, now) in changed.items()]
    if len(ranks) != world:
        said.append(f"{path} was written by {len(ranks)} processes, now there are {world}")
    said += _renumber(path, saved, state)
    resized = len(ranks) != world or not RESIZES.isdisjoint(changed)
    said += _load_model(path, saved, state, resized, "margin" in changed)
    groups = state.optimizer.param_groups
    settings = [{name: group[name] for name in ("lr", "weight_decay")} for group in groups]
    state.optimizer.load_state_dict(saved["optimizer"])
    for group, now in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(now)  # which the file would undo
    if saved["scaler"]:
        state.scaler.load_state_dict(saved["scaler"])
    state.sampler.load_state_dict(saved["sampler"])
    for name in PLAIN:
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


def _load_model(path: Path, saved: dict[str, Any], state: State, resized: bool, other_margin: bool) -> list[str]:
    """Networks and queue; what is not taken over as it is, in words."""
    model, ranks, config = saved["model"], saved["ranks"], state.config
    queue: Any = getattr(state.model.criterion, "queue", None)
    shards = [saved_by["queue"] for saved_by in ranks if "queue" in saved_by]
    apart = queue is not None and (resized or bool(shards))  # the queue is loaded by itself
    whole = {name.removeprefix(QUEUE): model.pop(name) for name in list(model) if apart and name.startswith(QUEUE)}
    try:
        odd = state.model.load_state_dict(model, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {' '.join(str(error).split())}") from None
    may = (QUEUE if apart else None, MARGIN if other_margin else None)  # only what may differ may be missing
    for what, names in (("lacks", odd.missing_keys), ("also holds", odd.unexpected_keys)):
        if names := [name for name in names if not any(prefix and name.startswith(prefix) for prefix in may)]:
            raise ValueError(f"{path} does not fit: it {what} {', '.join(names[:3])}{' ...' * (len(names) > 3)}")
    if not apart:
        return []
    rank, world = distributed.ranks()
    if not resized:
        queue.load_state_dict(shards[rank])
        return []
    part = (rank, world) if config.shard else (0, 1)
    kept, there = queue.load_newest(*(shards or [whole]), rank=part[0], world=part[1])
    return [f"the queue keeps its newest {kept} of {there} features, the rest starts empty"]


def _renumber(path: Path, saved: dict[str, Any], state: State) -> list[str]:
    """Gives the file's identities the numbers that their names have now; says how many are new.

    Raises:
        ValueError: some are gone, or learned class weights belong to the old ones.
    """
    old, new = saved["names"], list(state.names)
    if old == new:
        return []
    number = {name: i for i, name in enumerate(new)}
    if gone := [name for name in old if name not in number]:
        shown = f"{', '.join(gone[:3])}{' ...' * (len(gone) > 3)}"
        raise ValueError(f"data.root: {len(gone)} identities that {path} was trained on are gone ({shown})")
    if state.config.method != "sst":
        raise ValueError(
            f"data.root: the identities are not those of {path}, and learned class weights belong to those"
        )
    moved = torch.tensor([number[name] for name in old])
    shards = [(by["queue"], "identities") for by in saved["ranks"] if "queue" in by]
    for place, name in [(saved["model"], f"{QUEUE}identities"), *shards]:
        place[name] = torch.where(place[name] >= 0, moved[place[name].clamp_min(0)], place[name])
    for name in ("order", "recent"):
        saved["sampler"][name] = moved[saved["sampler"][name].long()].int()
    count = len(new) - len(old)
    if not count:
        return [f"data.root: the identities come in another order than when {path} was written"]
    return [f"data.root: {count} identities are new since {path} was written; they come after the current epoch"]


def changes(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings (:meth:`Config.as_dict`) that differ and are worth telling: name -> (was, is); ValueError at one of FIXED."""
    was, now = (
        {**found, **{f"data.{k}": v for k, v in found["data"].items()}, "data": None} for found in (theirs, ours)
    )
    changed = {}
    for name in sorted(now):
        if name in SILENT or was.get(name) == now[name]:
            continue
        if name in FIXED:
            raise ValueError(
                f"{path} was written with {name}={was.get(name)!r}, now it is {now[name]!r}; choose another out"
            )
        changed[name] = (was.get(name), now[name])
    return changed


def _write(content: dict[str, Any], temporary: Path, target: Path) -> None:
    """``torch.save`` whose failure to write is an OSError in plain words."""
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # before it takes the place of the one that is surely there
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):  # PyTorch's own error hides it
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(
            cause.errno, f"cannot be written: {cause.strerror} (what was there before stays)", str(target)
        ) from None


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
        _remove_stale(self.path.parent, re.escape(self.path.name))
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from training into it while the block runs; removes what killed ones left.

    The lock ends with the process, however it ends; the file ``.lock`` stays.

    Raises:
        ValueError: another process trains into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            # A lock of the process (flock's would live on in forked workers after a kill).
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(f"out: {file.read().strip() or 'another process'} is training into {folder}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _remove_stale(folder, ".+")
        yield


def _remove_stale(folder: Path, name: str) -> None:
    """Temporary files of :class:`replacing` for these names (a regular expression) whose process was killed."""
    for path in folder.glob(".*"):
        if (found := re.fullmatch(rf"\.{name}\.(\d+)", path.name)) and path.is_file():
            process = int(found[1])
            if process == os.getpid() or not Path(f"/proc/{process}").exists():
                path.unlink(missing_ok=True)
