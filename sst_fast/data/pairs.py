"""What networks see: the paper's augmentation, pairs of an identity, batches of images."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from sst_fast.data.identities import Faces, flat
from sst_fast.data.images import square, to_tensor
from sst_fast.data.store import Selected, load


def augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """The augmentation of Semi-Siamese Training, each with its probability: crop jitter of up to 8 % a side (1/2), flip
    (1/2), grayscale (1/5), rotation by up to 10 degrees (1/2). Rotation is about the centre and grayscale fills all
    channels, unlike in the authors' code."""
    size = image.size[0]
    if rng.random() < 0.5:
        most = max(1, round(size * 9 / 112))
        left, top = rng.randrange(most), rng.randrange(most)
        right, bottom = size - rng.randint(1, most), size - rng.randint(1, most)
        image = image.crop((left, top, right, bottom)).resize((size, size), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if rng.random() < 0.2 and image.mode == "RGB":
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        image = image.rotate(rng.randint(-10, 10), Image.Resampling.BILINEAR)
    return image


class Pairs(torch.utils.data.Dataset[tuple[Tensor, Tensor, int]]):
    """Two augmented images of one identity per item; an identity with one image is paired with itself.

    Every random choice follows from (seed, epoch, identity) alone: neither workers nor resuming change it.
    """

    def __init__(self, faces: Faces, size: int, channels: int, seed: int) -> None:
        self.faces, self.size, self.channels, self.seed = faces, size, channels, seed
        self.epoch = 0
        self._cache: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.faces.names)

    def __getitem__(self, identity: int) -> tuple[Tensor, Tensor, int]:
        rng = random.Random(f"{self.seed}/{self.epoch}/{identity}")
        images = self.faces.images(identity).tolist()
        chosen = rng.sample(images, 2) if len(images) > 1 else images * 2
        a, b = (to_tensor(augment(self._image(image), rng)) for image in chosen)
        return a, b, identity

    def _image(self, number: int) -> Image.Image:
        if number not in self._cache:
            image = square(load(self.faces.store, number, self.channels), self.size)
            if len(self._cache) < 4096:  # small sets stay decoded
                self._cache[number] = image
            return image
        return self._cache[number]


class Images(torch.utils.data.Dataset[Tensor]):
    """Images by path, or those that :func:`flat` gives, not augmented."""

    def __init__(self, images: Sequence[str | Path], size: int, channels: int) -> None:
        self.images, self.size, self.channels = Selected.of(images), size, channels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return to_tensor(square(self.images.load(index, self.channels), self.size))


def image_batches(
    paths: Sequence[str | Path], size: int, channels: int, *, batch: int = 256, workers: int = 0
) -> Iterable[Tensor]:
    """These images in order, as [<= batch, channels, size, size]. Leaves the global random state alone."""
    images = Images(paths, size, channels)
    return torch.utils.data.DataLoader(images, batch, num_workers=workers, generator=torch.Generator())


def all_images(faces: Faces, size: int, channels: int) -> tuple[Tensor, Tensor]:
    """Every image [M, channels, size, size] and its identity number [M], not augmented."""
    paths, labels = flat(faces)
    return torch.cat(list(image_batches(paths, size, channels))), labels
