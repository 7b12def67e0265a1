"""From files to tensors in one worker: our data sets beside torchvision's ImageFolder with the same transforms."""

from __future__ import annotations

import functools
import io
import itertools
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import timing
from bench.timing import REPLAY
from sst_fast import data
from sst_fast.data import convert

pytestmark = pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
LIMIT = "Pillow's decoding"
THEIRS = "torchvision ImageFolder"
CONTENDERS = (LIMIT, "ours (folder)", "ours (RecordIO)", "ours (WebDataset)", "ours (LMDB)", THEIRS)
SIZE = 112


@dataclass(frozen=True)
class Case:
    """One contender reads ``images`` JPEG files of ``side`` pixels, flips half of them, and gives 112 x 112 tensors."""

    side: int
    images: int
    contender: str

    def __str__(self) -> str:
        return f"data-{self.side}-{self.contender}"


def cases(size: str, device: torch.device) -> list[Case]:
    """Crops as data sets ship them, and larger images."""
    sides, images = ([16], 4) if size == "smoke" else ([112, 250], 128)
    return [Case(side, images, contender) for side in sides for contender in CONTENDERS]


@functools.lru_cache(maxsize=1)
def measure(side: int, images: int, seconds: float) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every round, and why a contender is left out."""
    torch.set_num_threads(1)  # as in a worker process
    with tempfile.TemporaryDirectory() as folder:
        calls, reasons = contenders(Path(folder), side, images)
        return timing.race({name: [call] for name, call in calls.items()}, torch.device("cpu"), seconds, 20), reasons


def contenders(root: Path, side: int, images: int) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Each reads all images; those that cannot run here, with the reason."""
    write(root / "folder", side, images)
    faces = data.faces(root / "folder")
    files = [path.read_bytes() for paths in faces.paths for path in paths]
    calls: dict[str, Callable[[], object]] = {
        LIMIT: lambda: [Image.open(io.BytesIO(file)).convert("RGB") for file in files],
        "ours (folder)": reader(faces),
    }
    reasons: dict[str, str] = {}
    for name, format in (("RecordIO", "recordio"), ("WebDataset", "webdataset"), ("LMDB", "lmdb")):
        try:
            convert.convert(faces, root / format, format)  # type: ignore[arg-type]
            calls[f"ours ({name})"] = reader(data.faces(root / format))
        except ImportError as error:
            reasons[f"ours ({name})"] = str(error)
    try:
        calls[THEIRS] = image_folder(root / "folder", faces)
    except ImportError as error:
        reasons[THEIRS] = f"torchvision is not installed ({error})"
    except RuntimeError as error:  # how a torchvision that was built for another torch fails
        reasons[THEIRS] = f"torchvision does not fit this torch ({error})"
    return calls, reasons


def write(root: Path, side: int, images: int) -> None:
    """JPEG files about as large as faces': smooth, with a little noise."""
    rng = np.random.default_rng(0)
    for i in range(images):
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((side, side))
        pixels = np.asarray(coarse).astype(int) + rng.integers(-8, 9, (side, side, 3))
        folder = root / f"{i // 2:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=95)


def reader(faces: data.Faces) -> Callable[[], object]:
    """What :class:`sst_fast.data.Pairs` does for a batch, without keeping decoded images."""
    epochs = itertools.count()

    def call() -> object:
        pairs = data.Pairs(faces, SIZE, 3, seed=0, augment="flip")
        pairs.epoch = next(epochs)
        return [pairs[i] for i in range(len(pairs))]

    return call


def image_folder(root: Path, faces: data.Faces) -> Callable[[], object]:
    """The same from torchvision, first compared with ours."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    shared = [v2.Resize(SIZE), v2.CenterCrop(SIZE)]
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([127.5 / 255] * 3, [128 / 255] * 3)]
    plain = ImageFolder(str(root), v2.Compose([*shared, *to_tensor]))
    ours, labels = data.all_images(faces, SIZE, 3)
    for i in range(len(plain)):
        image, label = plain[i]
        assert label == labels[i]
        assert (image - ours[i]).abs().max() <= 2 / 128  # resizing rounds
    flipped = ImageFolder(str(root), v2.Compose([*shared, v2.RandomHorizontalFlip(), *to_tensor]))
    return lambda: [flipped[i] for i in range(len(flipped))]


def test_data(replay, case, seconds):
    times, reasons = measure(case.side, case.images, seconds)
    if case.contender in reasons:
        pytest.skip(reasons[case.contender])
    replay(
        times[case.contender], f"data-{case.side}", suite="data", provider=case.contender,
        problem={"images": case.images, "side": case.side}, per_second=case.images / statistics.median(times[case.contender]),
    )  # fmt: skip
