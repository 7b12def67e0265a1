"""Opening data sets of very many identities, and the start of an epoch on them: seconds and memory of a process of its own.

SST_FAST_BENCH_DATA names a folder in which the data sets are kept: a million folders take minutes to make.
"""

from __future__ import annotations

import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import timing
from bench.timing import REPLAY
from sst_fast import data
from sst_fast.data import convert, recordio
from sst_fast.samplers import IdentitySampler

pytestmark = pytest.mark.benchmark(timer=REPLAY, disable_gc=False)
FORMATS = ("folder", "list", "RecordIO", "LMDB", "WebDataset", "Hugging Face")
FIRST, AGAIN, EPOCH = "ours (searched)", "ours (with its index)", "ours (start of an epoch)"
CONVERTED: dict[str, convert.Format] = {"LMDB": "lmdb", "WebDataset": "webdataset", "Hugging Face": "huggingface"}
IMAGES = 2  # of an identity
LINKS = 50_000  # names a file may have, and file systems allow no more than 65,000


@dataclass(frozen=True)
class Case:
    """One step on so many identities in a format."""

    identities: int
    format: str
    step: str

    def __str__(self) -> str:
        return f"{self.identities}-{self.format}-{self.step}"


def cases(size: str, device: torch.device) -> list[Case]:
    """The largest size takes a minute for each format."""
    identities = {"smoke": 20, "default": 50_000, "full": 1_000_000}[size]
    return [Case(identities, format, step) for format in FORMATS for step in (FIRST, AGAIN, EPOCH)]


@functools.lru_cache(maxsize=1)
def measure(identities: int, format: str, rounds: int) -> list[dict[str, float]]:
    """What each process has found; the first makes the index."""
    with tempfile.TemporaryDirectory() as folder:
        root = made(Path(os.environ.get("SST_FAST_BENCH_DATA", folder)) / f"{format}-{identities}", identities, format)
        file = root / "train.rec" if format == "RecordIO" else root
        file.with_name(f".{file.name}.sst-fast-index.npz").unlink(missing_ok=True)
        return [alone(root) for _ in range(1 + rounds)]


def alone(root: Path) -> dict[str, float]:
    """:func:`opened` in a process of its own."""
    command = [sys.executable, "-m", "bench.test_opening", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | timing.QUIET)
    if done.returncode:
        raise RuntimeError(f"{root}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def opened(root: str) -> dict[str, float]:
    """Seconds and MiB of opening, and of the time from one epoch's end to the next one's first batch, one worker reading."""
    device, found, seconds = torch.device("cpu"), [], {}

    def open_it() -> None:
        begin = time.perf_counter()
        found.append(data.faces(root))
        seconds["open"] = time.perf_counter() - begin

    def begin_epoch() -> None:
        begin = time.perf_counter()
        sampler.set_epoch(1)
        next(iter(torch.utils.data.DataLoader(pairs, batch_sampler=sampler, num_workers=1)))
        seconds["epoch"] = time.perf_counter() - begin

    memory = {"open_mib": timing.extra_memory(open_it, device)}
    pairs = data.Pairs(found[0], 112, 3, seed=0)
    sampler = IdentitySampler(len(pairs), min(128, len(pairs)), queue_size=16384, scheme="spaced")
    memory["epoch_mib"] = timing.extra_memory(begin_epoch, device)
    return {**seconds, **memory}


def made(root: Path, identities: int, format: str) -> Path:
    """The data set, unless it is there already. All images are one, under as many names as the file system allows."""
    path = root.with_suffix(".txt") if format == "list" else root
    if path.exists():
        return path
    buffer = io.BytesIO()
    Image.new("RGB", (112, 112), (90, 120, 150)).save(buffer, "JPEG")
    image = buffer.getvalue()
    if format in CONVERTED:
        convert.convert(
            data.faces(made(root.with_name(f"list-{identities}"), identities, "list")), root, CONVERTED[format]
        )
        return aged(path)
    root.mkdir(parents=True)
    if format == "list":
        (root / "image.jpg").write_bytes(image)
        path.write_text("".join(f"{root.name}/image.jpg {i:07d}\n" * IMAGES for i in range(identities)))
    elif format == "RecordIO":
        _records(root, identities, image)
    else:
        for i, name in enumerate(f"{identity:07d}" for identity in range(identities)):
            (root / name).mkdir()
            if IMAGES * i % LINKS == 0:
                source = root / name / "0.jpg"
                source.write_bytes(image)
            for k in range(IMAGES):
                if (link := root / name / f"{k}.jpg") != source:
                    os.link(source, link)
    return aged(path)


def aged(path: Path) -> Path:
    """As if written an hour ago: what has just changed gets no index."""
    long_ago = time.time() - 3600
    for written in (path, *(path.glob("*.*") if path.is_dir() else [])):
        os.utime(written, (long_ago, long_ago))
    return path


def _records(root: Path, identities: int, image: bytes) -> None:
    """Records that differ in label and number alone, a hundred thousand at a time."""
    one = np.frombuffer(recordio.framed((0.0,), 0, image), np.uint8)
    images = IMAGES * identities
    with (root / "train.rec").open("wb") as file:
        for first in range(0, images, 100_000):
            numbers = np.arange(first, min(images, first + 100_000))
            rows = np.tile(one, (len(numbers), 1))
            rows[:, 12:16] = (numbers // IMAGES).astype("<f4")[:, None].view(np.uint8)
            rows[:, 16:24] = numbers.astype("<u8")[:, None].view(np.uint8)
            rows.tofile(file)
    (root / "train.idx").write_text("".join(f"{number}\t{len(one) * number}\n" for number in range(images)))


def test_opening(case, replay, seconds):
    first, *again = measure(case.identities, case.format, 3 if seconds else 1)
    which, rounds = {FIRST: ("open", [first]), AGAIN: ("open", again), EPOCH: ("epoch", again)}[case.step]
    replay(
        [found[which] for found in rounds], f"{case.identities:,} identities, {IMAGES * case.identities:,} images, {case.format}",
        suite="opening", provider=case.step, problem={"identities": case.identities, "format": case.format},
        extra_mib=max(found[f"{which}_mib"] for found in rounds),
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(opened(sys.argv[1])))
