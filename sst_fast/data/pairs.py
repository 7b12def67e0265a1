"""What networks see: augmentation, pairs of an identity, batches of images; and what becomes of images that cannot be read."""

from __future__ import annotations

import fcntl
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor

from sst_fast.data.identities import Faces, flat
from sst_fast.data.images import DataError, square, to_tensor
from sst_fast.data.objects import imported
from sst_fast.data.store import Selected, load

OnError = Literal["stop", "skip"]
Augment = Callable[[Image.Image, random.Random], "Image.Image | Tensor"]
CACHED = 4096  # images: small data sets stay decoded
OUTLASTED = (signal.SIGTERM, signal.SIGINT)
TRIED = 100  # identities without a readable image, one after the other, before the data set is taken for broken


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


def flip(image: Image.Image, rng: random.Random) -> Image.Image:
    """Mirrored with probability 1/2."""
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def unchanged(image: Image.Image, rng: random.Random) -> Image.Image:
    """No augmentation."""
    return image


AUGMENTATIONS: dict[str, Augment] = {"sst": augment, "flip": flip, "none": unchanged}


def augmentation(name: str) -> Augment:
    """'sst' (the paper's), 'flip', 'none', or a function by import path, ``package.module:function``.

    The function gets a Pillow image [size, size], gray or RGB, and a ``random.Random`` from which all its choices must come, and
    returns such an image or a float32 tensor [channels, size, size].

    Raises:
        ValueError: there is no such function.
    """
    if name in AUGMENTATIONS:
        return AUGMENTATIONS[name]
    if ":" not in name:
        raise ValueError(
            f"data.augment must be {', '.join(map(repr, AUGMENTATIONS))} or 'module:function', got {name!r}"
        )
    found = imported(name, "data.augment")
    if not callable(found):
        raise ValueError(f"data.augment: {name!r} is no function but {found!r}")
    return found  # type: ignore[no-any-return]


class Unreadable:
    """The file that names what has been skipped, a line with the reason for each image; all workers write into it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._known: set[str] = set()

    def add(self, error: DataError) -> None:
        """Notes it, unless it is there already."""
        line = str(error).replace("\n", " ") + "\n"
        if line in self._known:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            file.seek(0)
            self._known.update(file)
            if line not in self._known:
                file.write(line)
                self._known.add(line)

    def __len__(self) -> int:
        """Images so far, those of earlier runs into the same folder included."""
        if not self.path.exists():
            return 0
        with self.path.open(encoding="utf-8") as file:
            return sum(1 for _ in file)


class Pairs(torch.utils.data.Dataset[tuple[Tensor, Tensor, int]]):
    """Two augmented images of one identity per item; an identity with one image is paired with itself.

    Every random choice follows from (seed, epoch, identity) alone: neither workers nor resuming change it.

    Args:
        faces: the identities.
        size, channels: of the images.
        seed: see above.
        augment: see :func:`augmentation`.
        skipped: where to note images that cannot be read, to go on with others: of the same identity or, where it has none, of
            the next identity, whose number the item then carries. Without it, such an image raises :class:`DataError`.
    """

    def __init__(
        self, faces: Faces, size: int, channels: int, seed: int, *, augment: str = "sst", skipped: Unreadable | None = None
    ) -> None:  # fmt: skip
        self.faces, self.size, self.channels, self.seed = faces, size, channels, seed
        self.augment, self.skipped = augmentation(augment), skipped
        self.epoch = 0
        self._cache: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.faces.names)

    def __getitem__(self, identity: int) -> tuple[Tensor, Tensor, int]:
        rng = random.Random(f"{self.seed}/{self.epoch}/{identity}")
        for tried in range(min(len(self), TRIED)):
            chosen = (identity + tried) % len(self)
            found = self._two(self.faces.images(chosen).tolist(), rng)
            if found:
                a, b = (self._augmented(image, rng) for image in found)
                return a, b, chosen
        raise DataError(
            f"{self.faces.store.name(int(self.faces.images(identity)[0]))} and all images of {tried + 1} identities cannot be read"
        )

    def _two(self, images: list[int], rng: random.Random) -> list[Image.Image]:
        """Two images, by chance; fewer than two can be read: the one twice, or none."""
        chosen = rng.sample(images, 2) if len(images) > 1 else images * 2
        if self.skipped is None:
            return [self._image(number) for number in chosen]
        readable: list[Image.Image] = []
        for number in dict.fromkeys([*chosen, *images]):
            try:
                readable.append(self._image(number))
            except DataError as error:
                self.skipped.add(error)
            if len(readable) == 2:
                break
        return readable * 2 if len(readable) == 1 else readable

    def _image(self, number: int) -> Image.Image:
        if number not in self._cache:
            image = square(load(self.faces.store, number, self.channels), self.size)
            if len(self._cache) < CACHED:
                self._cache[number] = image
            return image
        return self._cache[number]

    def _augmented(self, image: Image.Image, rng: random.Random) -> Tensor:
        found = self.augment(image, rng)
        if isinstance(found, Image.Image):
            found = to_tensor(found)
        shape = (self.channels, self.size, self.size)
        if found.shape != shape or found.dtype != torch.float32:
            raise ValueError(
                f"data.augment: expected a float32 tensor {list(shape)}, got {found.dtype} {list(found.shape)}"
            )
        return found


class Images(torch.utils.data.Dataset[Tensor]):
    """Images by path, or those that :func:`flat` gives, not augmented."""

    def __init__(self, images: Sequence[str | Path], size: int, channels: int) -> None:
        self.images, self.size, self.channels = Selected.of(images), size, channels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return to_tensor(square(self.images.load(index, self.channels), self.size))


class _Numbered(torch.utils.data.Dataset[tuple[int, "Tensor | None"]]):
    """Items with their numbers; None for one that cannot be read, if that is to be skipped."""

    def __init__(self, images: Images, skipped: Unreadable | None) -> None:
        self.images, self.skipped = images, skipped

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        try:
            return index, self.images[index]
        except DataError as error:
            if self.skipped is None:
                raise
            self.skipped.add(error)
            return index, None


def _stacked(items: list[tuple[int, Tensor | None]]) -> tuple[list[int], Tensor | None]:
    readable = [(index, image) for index, image in items if image is not None]
    return [index for index, _ in readable], torch.stack([image for _, image in readable]) if readable else None


def outlast(_: int = 0) -> None:
    """For processes that read images: what a terminal or a scheduler sends to all processes reaches them too, but the one that
    waits for the images decides when to stop. SIGINT and the first SIGTERM pass; a second one ends them: ``DataLoader``'s own."""
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OUTLASTED)


def begun(loader: torch.utils.data.DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader with ``worker_init_fn=outlast``. Signals wait while its processes start: before ``outlast`` has run
    one would end them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OUTLASTED)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def image_batches(
    paths: Sequence[str | Path], size: int, channels: int, *, batch: int = 256, workers: int = 0,
    skipped: Unreadable | None = None, kept: list[int] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """These images (paths, or what :func:`flat` gives) in order, as [<= batch, channels, size, size]. Leaves the global random
    state alone.

    Args:
        skipped: where to note images that cannot be read, which are then left out; without it one raises :class:`DataError`.
        kept: gets the places in ``paths`` of the images that come.

    Raises:
        DataError: see above, or none of the images can be read.
    """
    some = False
    images = _Numbered(Images(paths, size, channels), skipped)
    loader = torch.utils.data.DataLoader(
        images, batch, num_workers=workers, generator=torch.Generator(), collate_fn=_stacked, worker_init_fn=outlast
    )
    for places, found in begun(loader):
        if found is not None:
            some = True
            if kept is not None:
                kept += places
            yield found
    if skipped is not None and not some:
        raise DataError(f"none of {len(images)} images could be read: {skipped.path}")


def all_images(faces: Faces, size: int, channels: int) -> tuple[Tensor, Tensor]:
    """Every image [M, channels, size, size] and its identity number [M], not augmented."""
    images, labels = flat(faces)
    return torch.cat(list(image_batches(images, size, channels))), labels
