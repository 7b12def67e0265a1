"""From image files to batches: reading, the paper's augmentation, pairs of an identity."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sst_fast.data.identities import Faces, flat

MEAN, STD = 127.5, 128.0  # a network sees (pixel - MEAN) / STD


def read(path: Path | BinaryIO, size: int, channels: int) -> Image.Image:
    """The image as gray (1 channel) or RGB (3), upright by its EXIF data, centre-cropped to a square and resized to ``size``
    pixels.

    Raises:
        ValueError: the file is no readable image; names it.
    """
    try:
        with Image.open(path) as image:
            converted = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            return ImageOps.fit(converted, (size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def to_tensor(image: Image.Image) -> Tensor:
    """(pixel - 127.5) / 128 as float32 [channels, size, size]."""
    array = np.array(image, dtype=np.float32)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray((array - MEAN) / STD))


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
        self._cache: dict[Path, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.faces.names)

    def __getitem__(self, identity: int) -> tuple[Tensor, Tensor, int]:
        rng = random.Random(f"{self.seed}/{self.epoch}/{identity}")
        paths = self.faces.paths[identity]
        chosen = rng.sample(paths, 2) if len(paths) > 1 else [paths[0]] * 2
        a, b = (to_tensor(augment(self._image(path), rng)) for path in chosen)
        return a, b, identity

    def _image(self, path: Path) -> Image.Image:
        if path not in self._cache:
            image = read(path, self.size, self.channels)
            if len(self._cache) < 4096:  # small sets stay decoded
                self._cache[path] = image
            return image
        return self._cache[path]


class Images(torch.utils.data.Dataset[Tensor]):
    """Images by path, not augmented."""

    def __init__(self, paths: Sequence[Path], size: int, channels: int) -> None:
        self.paths, self.size, self.channels = paths, size, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return to_tensor(read(self.paths[index], self.size, self.channels))


def image_batches(
    paths: Sequence[Path], size: int, channels: int, *, batch: int = 256, workers: int = 0
) -> Iterable[Tensor]:
    """These images in order, as [<= batch, channels, size, size]. Leaves the global random state alone."""
    images = Images(paths, size, channels)
    return torch.utils.data.DataLoader(images, batch, num_workers=workers, generator=torch.Generator())


def all_images(faces: Faces, size: int, channels: int) -> tuple[Tensor, Tensor]:
    """Every image [M, channels, size, size] and its identity number [M], not augmented."""
    paths, labels = flat(faces)
    return torch.cat(list(image_batches(paths, size, channels))), labels
