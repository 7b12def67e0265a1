"""One training with a small network, and what is measured of it. The method itself is the package's."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.claims.grid import Run
from sst_fast import (
    AMSoftmax,
    ArcSoftmax,
    GalleryQueue,
    IdentitySampler,
    SemiSiamese,
    SemiSiameseLoss,
    Softmax,
    SphereFace,
    data,
)
from sst_fast.data.images import MEAN, STD
from sst_fast.evaluation import Scores, collapse, evaluate
from sst_fast.margins import Margin
from sst_fast.train import backbones
from sst_fast.train.loop import Conventional

WATCHED = 1000  # images of a curve's points


@dataclass(frozen=True)
class Part:
    """Images uint8 [M, C, S, S] of identities [M], an identity's in a row."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int = 500) -> Iterator[Tensor]:
        """As a network sees them."""
        for images in self.images.split(size):
            yield normal(images)


@dataclass(frozen=True)
class Split:
    """What a run needs of a data set. Mirrored: whether augmentation may mirror."""

    train: Part
    judged: Part
    mirrored: bool


def normal(images: Tensor) -> Tensor:
    """(pixel - 127.5) / 128."""
    return (images.float() - MEAN) / STD


def split(root: Path, config: Mapping[str, Any], tunes: bool, depth: int, seed: int) -> Split:
    """Training identities with ``depth`` images each by the seed, and validation (``tunes``) or test identities.

    Which identities train and which validate follows from the data alone; the validation identities are never trained on.
    """
    faces, count = data.faces(root / "train"), config["data"]["identities"]
    if len(faces.names) <= count + 1:
        raise ValueError(
            f"{root}/train has {len(faces.names)} identities, expected more than {count}: those beyond validate"
        )
    order = torch.randperm(len(faces.names), generator=torch.Generator().manual_seed(0)).tolist()
    judged = faces.subset(sorted(order[count:])) if tunes else data.faces(root / "test")
    train = faces.subset(sorted(order[:count])).shallow(depth, seed)
    channels = 1 if _gray(root) else 3
    parts = [
        _load(chosen, config["data"]["size"], channels)
        for chosen in (train, judged.shallow(config["data"]["images"], 0))
    ]
    return Split(*parts, mirrored=channels == 3)


def _gray(root: Path) -> bool:
    """Glyphs are gray and must not be mirrored; pictures have colours."""
    return (root / "glyphs.json").exists()


def _load(faces: data.Faces, size: int, channels: int) -> Part:
    images, labels = data.all_images(faces, size, channels)
    return Part((images * STD + MEAN).round().to(torch.uint8), labels)


class SmallNet(nn.Module):
    """Four 3 x 3 convolutions, the first, second and last of stride 2, with BatchNorm and PReLU; then a linear layer and BatchNorm."""

    def __init__(self, size: int, channels: int, widths: list[int], dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, stride in zip(widths, (2, 2, 1, 2), strict=True):
            layers += [
                nn.Conv2d(channels, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.PReLU(width),
            ]
            channels, size = width, -(-size // stride)
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels * size * size, dim, bias=False), nn.BatchNorm1d(dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, S, S] to [B, dim], not normalised."""
        found: Tensor = self.layers(images)
        return found


def augmented(images: Tensor, mirrored: bool, generator: torch.Generator) -> Tensor:
    """The package's augmentation ``sst`` (crop jitter, rotation, gray; mirroring if allowed) for a whole batch at once."""
    n, channels, size = images.shape[0], images.shape[1], images.shape[-1]

    def some(probability: float) -> Tensor:
        return torch.rand(n, generator=generator) < probability

    most = max(1, round(size * 9 / 112))
    near = torch.randint(most, (n, 2), generator=generator).float()  # left, top
    far = torch.randint(1, most + 1, (n, 2), generator=generator).float()  # right, bottom
    crops = some(0.5)[:, None]
    scale = torch.where(crops, (size - near - far) / size, torch.ones(()))
    shift = torch.where(crops, (near - far) / size, torch.zeros(()))
    angle = torch.where(some(0.5), torch.randint(-10, 11, (n,), generator=generator) * math.pi / 180, torch.zeros(()))
    cos, sin = angle.cos(), angle.sin()
    sign = torch.where(some(0.5), -1.0, 1.0) if mirrored else torch.ones(n)
    rotation = torch.stack([torch.stack([cos * sign, -sin], 1), torch.stack([sin * sign, cos], 1)], 1)
    theta = torch.cat([scale[:, :, None] * rotation, shift[:, :, None]], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    found = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    if channels == 3:
        weights = torch.tensor([0.299, 0.587, 0.114])
        gray = (found * weights[:, None, None]).sum(1, keepdim=True).expand_as(found)
        found = torch.where(some(0.2)[:, None, None, None], gray, found)
    return (found - MEAN) / STD


def margin_of(run: Run) -> Margin:
    """Of the softmax family."""
    kinds: dict[str, Callable[[float], Margin]] = {
        "softmax": lambda _: Softmax(), "a-softmax": SphereFace, "am-softmax": AMSoftmax, "arc-softmax": ArcSoftmax,
    }  # fmt: skip
    return kinds[run.loss](run.margin)


class MetricLearning(nn.Module):
    """A backbone under a loss on the pairs or triplets of a batch, by pytorch-metric-learning."""

    def __init__(self, backbone: nn.Module, loss: str, margin: float, scale: float) -> None:
        super().__init__()
        from pytorch_metric_learning import distances, losses, miners

        self.probe = backbone
        self.length = scale**0.5 if loss == "n-pairs" else 1.0  # of embeddings: cosines times scale are its logits
        self.miner: nn.Module | None = None
        if loss == "contrastive":  # squared distances of unit vectors are 2 - 2 cosine
            self.loss = losses.ContrastiveLoss(0.0, 2.0 * margin, distance=distances.LpDistance(power=2))
        elif loss == "triplet":
            self.miner = miners.TripletMarginMiner(margin, "semihard")
            self.loss = losses.TripletMarginLoss(margin)
        else:
            self.loss = losses.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False))

    def forward(self, image_a: Tensor, image_b: Tensor, identity: Tensor) -> Tensor:
        """Mean loss of the batch."""
        embedding = self.length * F.normalize(torch.cat([self.probe(image_a), self.probe(image_b)]))
        labels = identity.repeat(2)
        found: Tensor = self.loss(embedding, labels, self.miner(embedding, labels) if self.miner else None)
        return found

    def update_gallery(self) -> None:
        """There is none."""


def model_of(run: Run, network: nn.Module, identities: int, dim: int) -> Any:
    """The network under the run's method."""
    if run.method == "metric":
        return MetricLearning(network, run.loss, run.margin, run.scale)
    if run.method == "conventional":
        return Conventional(network, identities, dim, margin_of(run), run.scale)
    criterion = SemiSiameseLoss(
        GalleryQueue(run.queue, dim), margin_of(run), run.scale, keep=run.keep,  # type: ignore[arg-type]
        mask_identity=run.mask_identity, mask_empty=run.mask_empty,
    )  # fmt: skip
    return SemiSiamese(
        network, criterion, run.momentum, warmup=run.warmup, batchnorm=run.batchnorm,  # type: ignore[arg-type]
        galleries=run.galleries,
    )  # fmt: skip


def train(run: Run, config: Mapping[str, Any], found: Split) -> dict[str, Any]:
    """Trains, judges the last state, and returns scores, diagnostics, the curve and the seconds of processor time."""
    begin, training = time.process_time(), config["training"]
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    channels, size = found.train.images.shape[1], found.train.images.shape[-1]
    network = SmallNet(size, channels, training["channels"], training["dim"])
    ends = torch.searchsorted(found.train.labels, torch.arange(int(found.train.labels[-1]) + 2))
    first, counts = ends[:-1], ends.diff()
    model = model_of(run, network, len(counts), training["dim"]).train()
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], run.lr, momentum=0.9, weight_decay=run.weight_decay
    )
    sampler = IdentitySampler(len(counts), training["batch"], seed=run.seed)
    watched = [Part(part.images[:WATCHED], part.labels[:WATCHED]) for part in (found.train, found.judged)]
    curve: list[dict[str, float]] = []
    step, steps, total = 0, run.length * training["steps"], 0.0
    for epoch in itertools.count():
        if step == steps:
            break
        sampler.set_epoch(epoch)
        for identities in sampler:
            if step == steps:
                break
            rate = min((step + 1) / (training["warmup"] + 1), 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = run.lr * rate
            numbers = torch.tensor(identities)
            # Two different images of each identity.
            a = (torch.rand(len(numbers), generator=generator) * counts[numbers]).long()
            b = (a + 1 + (torch.rand(len(numbers), generator=generator) * (counts[numbers] - 1)).long()) % counts[
                numbers
            ]
            chosen = found.train.images[torch.cat([first[numbers] + a, first[numbers] + b])]
            image_a, image_b = augmented(chosen, found.mirrored, generator).chunk(2)
            loss = model(image_a, image_b, numbers)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            model.update_gallery()
            step, total = step + 1, total + float(loss.detach())
            if not math.isfinite(total):
                return {"scores": None, "seconds": time.process_time() - begin}
            every = steps // training["points"] if run.stage != "tune" else steps
            if step % every == 0:
                curve.append({"step": step, "loss": total / every, **_watched(network, watched)})
                total = 0.0
    return {**judged(network, found), "curve": curve, "seconds": round(time.process_time() - begin, 1)}


def _watched(network: nn.Module, parts: list[Part]) -> dict[str, float]:
    """Rank and cosines of some training and some unseen images."""
    row = {}
    for name, part in zip(("train", "test"), parts, strict=True):
        seen = collapse(backbones.embed(network, part.batches()), part.labels).row()
        row |= {f"{name}_{key}": seen[key] for key in ("effective_rank", "intra_class_cosine", "inter_class_cosine")}
    return row


def judged(network: nn.Module, found: Split) -> dict[str, Any]:
    """Scores on unseen identities; collapse of training and unseen features."""
    result: dict[str, Any] = {}
    for name, part in (("train", found.train), ("test", found.judged)):
        embeddings = backbones.embed(network, part.batches())
        seen = collapse(embeddings, part.labels)
        result[name] = seen.row() | {"spectrum": [float(f"{share:.4g}") for share in seen.spectrum]}
    result["scores"] = recorded(evaluate(embeddings, found.judged.labels))
    return result


def recorded(scores: Scores) -> dict[str, float]:
    """As files of results hold them."""
    return {
        "accuracy": scores.accuracy, "eer": scores.eer, "rank1": scores.rank1,
        **{f"tar_at_far_{far:g}": rate for far, rate in scores.tar.items()},
    }  # fmt: skip
