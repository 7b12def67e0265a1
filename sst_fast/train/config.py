"""The settings of a training run, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from sst_fast.data.pairs import OnError
from sst_fast.loss import Keep
from sst_fast.margins import MARGINS, Margin, MarginName
from sst_fast.samplers import Scheme
from sst_fast.semi_siamese import BatchNorm

Method = Literal["sst", "conventional"]
Precision = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["step", "cosine"]
QueueDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]


@dataclass
class DataConfig:
    """What is trained on.

    Attributes:
        root: any data set that sst_fast.data.faces knows (a folder with one sub-folder per identity, a list file, RecordIO, LMDB,
            WebDataset, Hugging Face), or 'orl' for the embedded faces.
        size: side of the square input in pixels.
        channels: 1 (gray) or 3 (RGB).
        images_per_identity: keep so many of each identity, chosen by seed; 0 keeps all.
        test_share: share of identities held out for verification.
        test_root: data set to verify on instead.
        workers: processes that read images (for each training process); -1: up to 8 with a GPU, else none.
        augment: 'sst' (the paper's), 'flip', 'none' or a function, 'package.module:function'; see sst_fast.data.augmentation.
        on_error: what an image that cannot be read does: 'stop' the run, or 'skip' it, noted in unreadable.txt in out.
    """

    root: str = "orl"
    size: int = 112
    channels: int = 3
    images_per_identity: int = 0
    test_share: float = 0.0
    test_root: str = ""
    workers: int = -1
    augment: str = "sst"
    on_error: OnError = "stop"


@dataclass
class Config:
    """A training run.

    Attributes:
        method: 'sst' or 'conventional' (learned class weights).
        backbone, dim, width: see sst_fast.train.backbones.build.
        margin: its name; margin_value: its first parameter, in its unit (default: the paper's); scale: inverse temperature.
        queue_size: slots K, over all processes; queue_dtype; momentum: of the gallery network.
        momentum_warmup, batchnorm, galleries: see sst_fast.SemiSiamese; keep, shard: see sst_fast.SemiSiameseLoss.
        sampler: how queued identities are kept out of a batch, see sst_fast.IdentitySampler.
        epochs, batch (identities per step over all processes, two images each), lr, weight_decay, warmup (epochs), seed.
        accumulate: batches per optimizer step.
        schedule: 'step': the learning rate falls tenfold after each of milestones (shares of all epochs); 'cosine'.
        precision: of the networks, by autocast; float16 with a gradient scaler. compile: the networks, by torch.compile.
        channels_last: memory format of images and weights.
        init: a run's folder, checkpoint or exported .safetensors whose probe network is the start (fine-tuning).
        out: folder for checkpoint, logs and metrics; an interrupted run there is resumed.
        device: 'cpu', 'cuda' or 'auto'.
        verify_every: epochs between verifications on the test identities; 0: at the end only. The best state by accuracy
            is kept as best.pt.
        checkpoint_every: epochs between checkpoints; checkpoint_minutes: minutes (0: never). SIGTERM writes one at once, in
            the middle of an epoch, and stops.
        keep_checkpoints: how many epochs' checkpoints are kept.
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
    queue_dtype: QueueDtype = "float32"
    momentum: float = 0.999
    momentum_warmup: int = 0
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

    def check(self, identities: int, world: int = 1) -> None:
        """ValueError that names the setting, unless the run is possible with so many identities and processes."""
        for name in (
            "epochs", "dim", "queue_size", "accumulate", "galleries", "checkpoint_every", "keep_checkpoints",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("verify_every", "checkpoint_minutes", "warmup", "momentum_warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.batch < 2 * world or self.batch % world:
            need = "at least 2 (BatchNorm)" if world == 1 else f"a multiple of the {world} processes, two for each"
            raise ValueError(f"batch must be {need}, got {self.batch}")
        rows = min(self.batch, identities) * (2 if self.keep == "both" else 1)
        if self.method == "sst" and rows > self.queue_size:
            raise ValueError(f"batch: {rows} identities do not fit into a queue of queue_size={self.queue_size}")
        if self.shard and self.method != "sst":
            raise ValueError("shard needs method='sst': class weights are not sharded")
        if self.shard and self.queue_size % world:
            raise ValueError(
                f"queue_size must be a multiple of the {world} processes with shard, got {self.queue_size}"
            )
        if self.data.channels not in (1, 3):
            raise ValueError(f"data.channels must be 1 or 3, got {self.data.channels}")
        if self.verify_every and not (self.data.test_share or self.data.test_root):
            raise ValueError("verify_every needs data.test_share or data.test_root")

    def margin_with_value(self) -> Margin:
        """The margin, with its first parameter set to ``margin_value`` if there is one."""
        kind = MARGINS[self.margin]
        if self.margin_value is None:
            return kind()
        names = [field.name for field in fields(kind)]
        if not names:
            raise ValueError(f"margin_value: the margin {self.margin!r} has no parameter, got {self.margin_value}")
        return kind(**{names[0]: self.margin_value})

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
