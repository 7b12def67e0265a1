"""The settings of a training run, and what follows from them."""

from __future__ import annotations

import math
import operator
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from sst_fast.data.pairs import OnError
from sst_fast.loss import Keep
from sst_fast.margins import MARGINS, AMSoftmax, Margin
from sst_fast.samplers import Scheme
from sst_fast.semi_siamese import BatchNorm
from sst_fast.train import backbones

Method = Literal["sst", "conventional"]
Precision = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["step", "cosine"]
QueueDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]


@dataclass
class DataConfig:
    """What is trained on.

    Attributes:
        root: any data set that sst_fast.data.faces knows (a folder with one sub-folder per identity, a list file, RecordIO, LMDB,
            WebDataset, Hugging Face, 'module:dataset'), or 'orl' for the ORL faces; must be given.
        size: side of the square input in pixels.
        channels: 1 (gray) or 3 (RGB).
        images_per_identity: how many images of each identity are kept, chosen by seed; 0 keeps all.
        test_share: share of identities held out for verification, in [0, 1).
        test_root: another data set to verify on, instead of held-out identities.
        workers: processes that read images (for each training process); -1: up to 8 with a GPU, else none.
        augment: 'sst' (the paper's), 'flip', 'none' or a function, 'package.module:function'; see sst_fast.data.augmentation.
        on_error: what happens if an image cannot be read: 'stop' the run, or 'skip' the image and note it in unreadable.txt in out.
    """

    root: str = ""
    size: int = 112
    channels: int = 3
    images_per_identity: int = 0
    test_share: float = 0.0
    test_root: str = ""
    workers: int = -1
    augment: str = "sst"
    on_error: OnError = "stop"

    def __post_init__(self) -> None:
        _settle(self, "data.")
        _check(self, "data.", "size", self.size >= 1, "> 0")
        _check(self, "data.", "channels", self.channels in (1, 3), "1 (gray) or 3 (RGB)")
        _check(self, "data.", "images_per_identity", self.images_per_identity >= 0, ">= 0")
        _check(self, "data.", "test_share", 0 <= self.test_share < 1, "in [0, 1)")
        _check(self, "data.", "workers", self.workers >= -1, ">= -1")


@dataclass
class Config:
    """The settings of a training run.

    Numbers may be numpy's or 0-d tensors, folders paths; they are kept as Python's own.

    Raises:
        ValueError: a value is impossible; names the setting.

    Attributes:
        data: what is trained on.
        method: 'sst' (Semi-Siamese Training) or 'conventional' (learned class weights).
        backbone: 'mobilefacenet' or 'timm:NAME'.
        dim: size D of the embedding.
        width: factor on MobileFaceNet's channel counts.
        margin: a class of sst_fast.margins, its fields as --margin.FIELD ('--margin.help CLASS' lists them), or a short name
            (softmax, am, arc, combined, sphereface, mv, curricular, npc, circle, arc_neg, adacos, magface, adaface, filtered).
        scale: inverse temperature s > 0 of the softmax.
        queue_size: slots K of the gallery queue, over all processes.
        queue_dtype: dtype of the queue's features.
        momentum: m of the gallery network's moving average, in [0, 1].
        momentum_warmup: updates over which m rises: update number t uses min(m, t / (t + momentum_warmup)), so that short runs
            move the gallery network too; 0: m from the start, as in the authors' codes.
        batchnorm: how the gallery network normalises: 'own' (by its own batch), 'copy' or 'average' (by the probe network's
            running statistics, copied or averaged).
        galleries: number of gallery networks, which take turns.
        keep: which gallery feature of an identity enters the queue: that of the 'first' or 'second' image, of one drawn by 'coin' for the
            whole batch, the 'mean' of both, or 'both'.
        shard: each process keeps its part of the queue instead of the whole.
        sampler: how identities that the queue holds are treated: 'shuffle' (drawn like others, masked in the loss), 'spaced' (not drawn
            while the queue holds them) or 'left_out' (of the next epoch).
        epochs: passes over the identities.
        batch: identities per step over all processes, two images each.
        accumulate: batches per optimizer step.
        lr: learning rate of SGD with momentum 0.9.
        weight_decay: weight decay of SGD, on all weights.
        warmup: epochs over which the learning rate rises.
        schedule: 'step' (the rate falls tenfold at each of milestones) or 'cosine'.
        milestones: shares of all epochs, each in (0, 1].
        precision: dtype of the networks' products, by autocast; float16 uses a gradient scaler.
        compile: whether the networks are compiled by torch.compile.
        channels_last: whether images and weights have this memory format.
        seed: of all random choices.
        init: a run's folder, checkpoint, exported .safetensors or file of plain weights whose probe network is the start
            (fine-tuning).
        out: folder for checkpoint, logs and metrics; an interrupted run there is continued.
        device: 'cpu', 'cuda', 'cuda:N' or 'auto' (a GPU if there is one).
        verify_every: epochs between verifications on the test identities; 0: at the end only. The best state by accuracy
            is kept as best.pt.
        checkpoint_every: epochs between checkpoints. SIGTERM and SIGINT (Ctrl-C) write one at once, in the middle of an epoch,
            and stop.
        checkpoint_minutes: minutes between checkpoints within an epoch; 0: none.
        keep_checkpoints: how many epochs' checkpoints are kept.
    """

    data: DataConfig = field(default_factory=DataConfig)
    method: Method = "sst"
    backbone: str = "mobilefacenet"
    dim: int = 512
    width: float = 1.0
    margin: Margin = field(default_factory=AMSoftmax)
    scale: float = 30.0
    queue_size: int = 16384
    queue_dtype: QueueDtype = "float32"
    momentum: float = 0.999
    momentum_warmup: int = 20
    batchnorm: BatchNorm = "own"
    galleries: int = 1
    keep: Keep = "coin"
    shard: bool = False
    sampler: Scheme = "shuffle"
    epochs: int = 100
    batch: int = 128
    accumulate: int = 1
    lr: float = 0.05
    weight_decay: float = 5e-4
    warmup: int = 0
    schedule: Schedule = "step"
    milestones: tuple[float, ...] = (0.48, 0.72, 0.9)
    precision: Precision = "float32"
    compile: bool = False
    channels_last: bool = False
    seed: int = 0
    init: str = ""
    out: str = "runs/train"
    device: str = "auto"
    verify_every: int = 0
    checkpoint_every: int = 1
    checkpoint_minutes: float = 15.0
    keep_checkpoints: int = 1

    def __post_init__(self) -> None:
        _settle(self, "")
        for name in (
            "dim", "queue_size", "galleries", "epochs", "accumulate", "checkpoint_every", "keep_checkpoints",
        ):  # fmt: skip
            _check(self, "", name, getattr(self, name) >= 1, "> 0")
        for name in ("width", "scale", "lr"):
            _check(self, "", name, 0 < getattr(self, name) < math.inf, "> 0 and finite")
        for name in ("weight_decay", "checkpoint_minutes"):
            _check(self, "", name, 0 <= getattr(self, name) < math.inf, ">= 0 and finite")
        for name in ("verify_every", "warmup", "momentum_warmup"):
            _check(self, "", name, getattr(self, name) >= 0, ">= 0")
        _check(self, "", "batch", self.batch >= 2, "at least 2 (BatchNorm)")
        _check(self, "", "momentum", 0 <= self.momentum <= 1, "in [0, 1]")
        shares = all(0 < share <= 1 for share in self.milestones)
        _check(self, "", "milestones", shares, "shares of all epochs in (0, 1], as [0.5, 0.8]")
        _check(self, "", "out", bool(self.out), "a folder")
        named = type(self.margin) in MARGINS.values()
        _check(self, "", "margin", named, f"one of {', '.join(kind.__name__ for kind in MARGINS.values())}")
        stride = backbones.MobileFaceNet.STRIDE
        if self.backbone == "mobilefacenet":
            _check(
                self.data, "data.", "size", self.data.size % stride == 0, f"a multiple of {stride} for mobilefacenet"
            )
        else:
            timm = self.backbone.startswith("timm:")
            _check(self, "", "backbone", timm, "'mobilefacenet' or 'timm:NAME'")
        if self.shard and self.method != "sst":
            raise ValueError("shard needs method='sst': class weights are not sharded")
        if self.verify_every and not (self.data.test_share or self.data.test_root):
            raise ValueError("verify_every needs data.test_share or data.test_root")

    def check(self, identities: int, world: int = 1) -> None:
        """ValueError that names the setting, unless the run is possible with so many identities and processes."""
        if self.batch < 2 * world or self.batch % world:
            raise ValueError(f"batch must be a multiple of the {world} processes, two for each, got {self.batch}")
        rows = min(self.batch, identities) * (2 if self.keep == "both" else 1)
        if self.method == "sst" and rows > self.queue_size:
            raise ValueError(f"batch: {rows} identities do not fit into a queue of queue_size={self.queue_size}")
        if self.shard and self.queue_size % world:
            raise ValueError(
                f"queue_size must be a multiple of the {world} processes with shard, got {self.queue_size}"
            )

    def untrained_share(self, updates: int) -> float:
        """How much of its untrained start a gallery network still is after so many updates: the product of their momenta."""
        left = 1.0
        for t in range(1, updates // self.galleries + 1):
            left *= min(self.momentum, t / (t + self.momentum_warmup))
            if left < 1e-6:
                return 0.0
        return left

    def as_dict(self) -> dict[str, Any]:
        """The settings in types that JSON and YAML know; as a configuration file it gives the same settings again."""
        found = asdict(self)
        fields = {
            name: value.item() if hasattr(value, "item") else value for name, value in asdict(self.margin).items()
        }
        found["margin"] = {"class_path": type(self.margin).__name__, "init_args": fields}
        found["milestones"] = list(self.milestones)
        return found

    def lr_factor(self, epoch: int) -> float:
        """Linear warm-up, then the schedule."""
        if epoch < self.warmup:
            return (epoch + 1) / (self.warmup + 1)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup) / max(1, self.epochs - self.warmup)))
        return float(0.1 ** sum(epoch >= share * self.epochs for share in self.milestones))

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks' products."""
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype


def device_named(name: str) -> torch.device:
    """The device by its name: 'auto' (a GPU if there is one), 'cpu', 'cuda' or 'cuda:N'.

    Raises:
        ValueError: another name, or a GPU that PyTorch does not find.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} was asked for, but PyTorch finds {torch.cuda.device_count()} GPUs here")
    return found


def _settle(settings: DataConfig | Config, prefix: str) -> None:
    """Gives each setting the type that is declared for it, which JSON and YAML can hold."""
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        number = not isinstance(value, str | bytes | bool)
        try:
            if get_origin(kind) is Literal:
                _check(
                    settings, prefix, name, value in get_args(kind), f"one of {', '.join(map(repr, get_args(kind)))}"
                )
            elif kind is int:
                value = operator.index(value) if number else None
            elif kind is float:
                value = float(value) if number else None
            elif kind is str:
                value = os.fspath(value)
            elif kind is bool:
                value = bool(value) if value in (True, False) else None
            elif get_origin(kind) is tuple:
                value = tuple(float(each) for each in value) if number else None
            elif not isinstance(value, kind):
                value = None
        except TypeError:
            value = None
        expected = getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else "numbers"
        _check(settings, prefix, name, value is not None, f"of the type {expected}")
        setattr(settings, name, value)


def _check(settings: object, prefix: str, name: str, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(f"{prefix}{name} must be {expected}, got {getattr(settings, name)!r}")
