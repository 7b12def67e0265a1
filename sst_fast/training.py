"""Training: one loop for Semi-Siamese and for conventional training (learned class weights), resumable at any step."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sst_fast import backbones, data, functional
from sst_fast.loss import MarginSoftmaxHead, SemiSiameseLoss
from sst_fast.margins import MARGINS, Margin, MarginName
from sst_fast.queue import GalleryQueue
from sst_fast.semi_siamese import SemiSiamese
from sst_fast.verification import Scores, effective_rank, evaluate

Method = Literal["sst", "conventional"]


@dataclass
class DataConfig:
    """What is trained on.

    Attributes:
        root: folder with one sub-folder per identity, or 'orl' for the embedded faces.
        size: side of the square input in pixels.
        channels: 1 (gray) or 3 (RGB).
        images_per_identity: keep so many of each identity, chosen by seed; 0 keeps all.
        test_share: share of identities held out for evaluation.
    """

    root: str = "orl"
    size: int = 112
    channels: int = 3
    images_per_identity: int = 0
    test_share: float = 0.0


@dataclass
class Config:
    """A training run.

    Attributes:
        method: 'sst' or 'conventional' (learned class weights).
        backbone, dim, width: see sst_fast.backbones.build.
        margin: its name; margin_value: its first parameter, in its unit (default: the paper's); scale: inverse temperature.
        queue_size: slots K; momentum: of the gallery network.
        epochs, batch (identities per step, two images each), lr, weight_decay, warmup (epochs), seed.
        milestones: shares of all epochs after which the learning rate falls tenfold.
        out: folder for checkpoint, logs and metrics; an interrupted run there is resumed.
        device: 'cpu', 'cuda' or 'auto'.
        checkpoint_every: epochs between checkpoints. SIGTERM writes one at once, in the middle of an epoch, and stops.
    """

    data: DataConfig = field(default_factory=DataConfig)
    method: Method = "sst"
    backbone: str = "mobilefacenet"
    dim: int = 512
    width: float = 1.0
    margin: MarginName = "am"
    margin_value: float | None = None
    scale: float = 30.0
    queue_size: int = 16384
    momentum: float = 0.999
    epochs: int = 100
    batch: int = 128
    lr: float = 0.05
    weight_decay: float = 5e-4
    warmup: int = 0
    milestones: tuple[float, ...] = (0.48, 0.72, 0.9)
    seed: int = 0
    out: str = "runs/train"
    device: str = "auto"
    checkpoint_every: int = 1


def margin_of(config: Config) -> Margin:
    """The margin that a configuration names, with its first parameter set to ``margin_value`` if there is one."""
    kind = MARGINS[config.margin]
    if config.margin_value is None:
        return kind()
    names = [field.name for field in fields(kind)]
    if not names:
        raise ValueError(f"margin_value: the margin {config.margin!r} has no parameter, got {config.margin_value}")
    return kind(**{names[0]: config.margin_value})


class Conventional(nn.Module):
    """A backbone with learned class weights under the same margin-softmax: what shallow data makes collapse."""

    def __init__(self, backbone: nn.Module, classes: int, dim: int, margin: Margin, scale: float) -> None:
        super().__init__()
        self.probe = backbone
        self.criterion = MarginSoftmaxHead(classes, dim, margin, scale)

    def forward(self, image_a: Tensor, image_b: Tensor, identity: Tensor) -> Tensor:
        """Mean loss over the 2B images."""
        embedding = torch.cat([self.probe(image_a), self.probe(image_b)])
        loss: Tensor = self.criterion(embedding, identity.repeat(2))
        return loss

    def update_gallery(self) -> None:
        """There is none."""


METRICS = ("loss", "target_cosine", "hardest_cosine")


@dataclass
class Position:
    """How far a run has come: the epochs done, a row of metrics each, and so many steps of the next with their sums."""

    history: list[dict[str, float]] = field(default_factory=list)
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * len(METRICS))


class Stopped(Exception):
    """SIGTERM came; everything up to the last step is in the checkpoint."""


@dataclass
class Run:
    """A finished run: the probe network and one row of metrics per epoch."""

    network: nn.Module
    history: list[dict[str, float]]
    scores: Scores | None


def split(config: Config) -> tuple[data.Faces, data.Faces | None]:
    """Training identities, and held-out ones if ``data.test_share`` asks for them."""
    faces = data.orl() if config.data.root == "orl" else data.folder(config.data.root)
    order: list[int] = torch.randperm(len(faces.names), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held = round(config.data.test_share * len(order))
    if len(order) - held < 2:
        raise ValueError(f"data.test_share: {config.data.test_share} leaves fewer than two identities for training")
    train, test = faces.subset(sorted(order[held:])), faces.subset(sorted(order[:held])) if held else None
    return (
        train.shallow(config.data.images_per_identity, config.seed) if config.data.images_per_identity else train
    ), test


def train(config: Config, train_faces: data.Faces, test_faces: data.Faces | None, label: str | None = None) -> Run:
    """Trains as ``config`` says and evaluates the last state on ``test_faces``; resumes what it finds in ``config.out``.

    Raises:
        ValueError: the configuration is impossible, or the checkpoint belongs to another one.
        Stopped: SIGTERM came; the same call goes on from there.
    """
    check(config, train_faces)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    torch.manual_seed(config.seed)
    network = backbones.build(config.backbone, config.dim, config.data.size, config.width, config.data.channels)
    margin = margin_of(config)
    model: SemiSiamese | Conventional
    if config.method == "sst":
        criterion = SemiSiameseLoss(GalleryQueue(config.queue_size, config.dim), margin, config.scale)
        model = SemiSiamese(network, criterion, config.momentum)
    else:
        model = Conventional(network, len(train_faces.names), config.dim, margin, config.scale)
    model.to(device).train()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], config.lr, momentum=0.9, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: lr_factor(config, epoch))

    pairs = data.Pairs(train_faces, config.data.size, config.data.channels, config.seed)
    test = data.all_images(test_faces, config.data.size, config.data.channels) if test_faces else None
    watched = test or data.all_images(
        train_faces.subset(list(range(min(50, len(pairs))))), config.data.size, config.data.channels
    )
    checkpoint = out / "checkpoint.pt"
    at = load(checkpoint, config, model, optimizer, schedule) if checkpoint.exists() else Position()
    history = at.history

    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=len(history))
    steps = len(list(data.batches(len(pairs), config.batch, config.seed, 0)))
    done = len(history) * steps + at.step
    with Progress(label or config.method, config.epochs * steps, done) as progress, Termination() as termination:
        for epoch in range(len(history), config.epochs):
            if not epoch_of_training(config, at, pairs, model, optimizer, device, progress, termination):
                save(checkpoint, config, model, optimizer, schedule, at)
                raise Stopped(
                    f"stopped in epoch {epoch + 1}, step {at.step}; the same command goes on from {checkpoint}"
                )
            row = dict(zip(METRICS, (value / at.step for value in at.sums), strict=True))
            row["effective_rank"] = effective_rank(backbones.embed(model.probe, watched[0].to(device)))
            row["lr"] = float(schedule.get_last_lr()[0])
            schedule.step()
            history.append(row)
            at = Position(history)
            for name, value in row.items():
                writer.add_scalar(name, value, epoch)
            if (epoch + 1) % config.checkpoint_every == 0 or epoch + 1 == config.epochs:
                save(checkpoint, config, model, optimizer, schedule, at)
    writer.close()
    if history:
        with replacing(out / "metrics.csv") as path, path.open("w", newline="") as file:
            table = csv.DictWriter(file, history[0])
            table.writeheader()
            table.writerows(history)
    scores = evaluate(backbones.embed(model.probe, test[0].to(device)), test[1]) if test else None
    return Run(model.probe, history, scores)


def check(config: Config, faces: data.Faces) -> None:
    """ValueError that names the setting, unless the run is possible."""
    for name in ("epochs", "batch", "dim", "queue_size", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be > 0, got {getattr(config, name)}")
    if config.batch < 2:
        raise ValueError("batch must be at least 2 (BatchNorm), got 1")
    if config.method == "sst" and min(config.batch, len(faces.names)) > config.queue_size:
        raise ValueError(f"batch: {config.batch} identities do not fit into a queue of queue_size={config.queue_size}")
    if config.data.channels not in (1, 3):
        raise ValueError(f"data.channels must be 1 or 3, got {config.data.channels}")


def lr_factor(config: Config, epoch: int) -> float:
    """Linear warm-up, then a tenfold fall after each milestone."""
    if epoch < config.warmup:
        return (epoch + 1) / (config.warmup + 1)
    return float(0.1 ** sum(epoch >= share * config.epochs for share in config.milestones))


def epoch_of_training(
    config: Config, at: Position, pairs: data.Pairs, model: SemiSiamese | Conventional,
    optimizer: torch.optim.Optimizer, device: torch.device, progress: Progress, termination: Termination,
) -> bool:  # fmt: skip
    """The rest of an epoch, moving ``at`` on; whether it came to its end. Sums are kept on the device: no step waits."""
    pairs.epoch = len(at.history)
    sums = torch.tensor(at.sums, dtype=torch.float64, device=device)
    for batch in list(data.batches(len(pairs), config.batch, config.seed, pairs.epoch))[at.step :]:
        images_a, images_b, identities = zip(*(pairs[i] for i in batch), strict=True)
        a, b = torch.stack(images_a).to(device), torch.stack(images_b).to(device)
        identity = torch.tensor(identities, device=device)
        loss = model(a, b, identity)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        model.update_gallery()
        seen = model.criterion.statistics
        assert isinstance(seen, functional.Statistics)
        hardest = seen.hardest_cosine.clamp_min(-1)  # no negative at all in the very first steps
        sums += torch.stack([loss.detach().double(), seen.target_cosine.double().mean(), hardest.double().mean()])
        at.step += 1
        progress.step(2 * len(batch), loss)
        if termination.asked:
            break
    at.sums = sums.tolist()
    return not termination.asked


class Termination:
    """Notes SIGTERM instead of dying from it, while the block runs (in the main thread; elsewhere nothing is noted)."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, *_: object) -> None:
        self.asked = True


class Progress:
    """A bar with ETA on a terminal, a log line now and then elsewhere."""

    def __init__(self, label: str, total: int, done: int) -> None:
        self.label, self.total, self.done, self.images = label, total, done, 0
        self.begin = self.spoke = time.monotonic()
        self.first = done
        self.bar = (
            tqdm(total=total, initial=done, desc=label, unit="step", leave=False) if sys.stderr.isatty() else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        seconds = time.monotonic() - self.begin
        print(f"{self.label}: {self.done}/{self.total} steps, {seconds:.1f} s", file=sys.stderr, flush=True)

    def step(self, images: int, loss: Tensor) -> None:
        """One step done, on so many images."""
        self.done += 1
        self.images += images
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update()
        if now - self.spoke < (0.5 if self.bar is not None else 10):
            return
        self.spoke = now
        rate = self.images / (now - self.begin)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss.item():.3f}", images_per_s=f"{rate:.0f}")
        else:
            eta = (now - self.begin) / (self.done - self.first) * (self.total - self.done)
            print(
                f"{self.label}: step {self.done}/{self.total}, loss {loss.item():.3f}, {rate:.0f} images/s, ETA {eta:.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def save(
    path: Path, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR, at: Position,
) -> None:  # fmt: skip
    """Everything that a run needs to go on exactly where it was, replacing the file in one step."""
    state = {
        "config": json.dumps(asdict(config), sort_keys=True),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": {"last_epoch": schedule.last_epoch},
        "position": asdict(at),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load(
    path: Path, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> Position:  # fmt: skip
    """Restores :func:`save`'s state and returns the position; ValueError if it belongs to another configuration."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    theirs, ours = json.loads(state["config"]), json.loads(json.dumps(asdict(config)))
    for name in sorted(set(theirs) | set(ours)):
        if name not in ("out", "device", "checkpoint_every") and theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{path} was written with {name}={theirs.get(name)!r}, now it is {ours.get(name)!r}; choose another out"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.last_epoch = state["schedule"]["last_epoch"]
    for group, base in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = float(base) * lr_factor(config, schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return Position(**state["position"])


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
