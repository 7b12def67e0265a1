"""insightface's ``train.rec``, ``train.idx`` and ``property``, read without MXNet.

A ``.rec`` file is a row of records (dmlc-core, ``recordio.h``): the word MAGIC; a word with the length in its lower 29 bits and, above,
which part of a record this is (0 whole, 1 first, 2 middle, 3 last: records are cut wherever the word MAGIC stands in them, and the
word is left out); the bytes, filled up to a multiple of four. A record begins with MXNet's image header (``IRHeader``: flag uint32,
label float32, id and id2 uint64); with flag > 0 so many float32 follow, which are the label. ``.idx`` has a line with key and offset
for each record.

insightface's own files have a record 0 without image, whose label (a, b) says that the keys 1 to a - 1 are images and a to b - 1
identities, each with the label (first image, last image + 1). Those that MXNet's ``im2rec`` writes have images only.
"""

from __future__ import annotations

import itertools
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sst_fast.data import index
from sst_fast.data.identities import Faces
from sst_fast.data.images import DataError, printable
from sst_fast.data.store import Opened, Strings

MAGIC = 0xCED7230A
LENGTH = (1 << 29) - 1  # the bits of the length
HEADER = np.dtype(
    [("magic", "<u4"), ("length", "<u4"), ("flag", "<u4"), ("label", "<f4"), ("id", "<u8", 2), ("labels", "<f4", 2)]
)  # 40 bytes: both words, the image header, and two of the labels behind it
EXACT = 1 << 24  # float32 holds every integer up to this one


class Records:
    """Images of a ``.rec`` file."""

    format = "RecordIO"

    def __init__(
        self, path: Path, keys: NDArray[np.int64], begins: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> None:
        self.path, self.keys, self.begins, self.sizes = path, keys, begins, sizes
        self._file = Opened()

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, number: int) -> str:
        """The file and the record's key."""
        return f"{printable(self.path)}, record {self.keys[number]}"

    def read(self, number: int) -> bytes:
        """The encoded image."""
        raw = self._file.read(self.path, int(self.begins[number]), int(self.sizes[number]), self.name(number))
        try:
            record = joined(raw)
            (flag,) = struct.unpack_from("<I", record)
            return record[24 + 4 * flag :]
        except (struct.error, ValueError) as error:
            raise DataError(f"{self.name(number)} cannot be read: {error}") from None


def joined(raw: bytes) -> bytes:
    """The content of a record, its parts put together again.

    Raises:
        ValueError: the bytes are no record. struct.error: they end too early.
    """
    parts: list[bytes] = []
    at = 0
    while True:
        magic, length = struct.unpack_from("<II", raw, at)
        kind, length = length >> 29, length & LENGTH
        if magic != MAGIC or kind not in ((2, 3) if parts else (0, 1)):
            raise ValueError("no record begins there")
        if at + 8 + length > len(raw):
            raise ValueError(f"it ends after {len(raw) - at - 8:,} of {length:,} bytes")
        parts.append(raw[at + 8 : at + 8 + length])
        if kind in (0, 3):
            return struct.pack("<I", MAGIC).join(parts)
        at += 8 + -(-length // 4) * 4


def framed(label: tuple[float, ...], key: int, content: bytes) -> bytes:
    """A record: one label in the header, several behind it; cut wherever a word of it is MAGIC."""
    if len(label) == 1:
        record = struct.pack("<IfQQ", 0, label[0], key, 0) + content
    else:
        record = struct.pack(f"<IfQQ{len(label)}f", len(label), 0.0, key, 0, *label) + content
    magic = struct.pack("<I", MAGIC)
    words = np.frombuffer(record, "<u4", len(record) // 4)
    cuts = (4 * np.flatnonzero(words == MAGIC)).tolist()
    parts = [record[a:b] for a, b in zip([0, *(cut + 4 for cut in cuts)], [*cuts, len(record)], strict=True)]
    kinds = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
    framing = (
        (magic, struct.pack("<I", kind << 29 | len(part)), part, b"\0" * (-len(part) % 4))
        for kind, part in zip(kinds, parts, strict=True)
    )
    return b"".join(itertools.chain.from_iterable(framing))


def open_records(path: Path) -> Faces:
    """The identities of a ``.rec`` file; their names are the labels.

    Raises:
        FileNotFoundError: there is no ``.idx`` beside it. ValueError: one of the two is broken, or has fewer than two
            identities.
    """
    idx = path.with_suffix(".idx")
    for file, what in (
        (path, "the records"),
        (idx, "the records' places, which MXNet's tools write beside the records"),
    ):
        if not file.is_file():
            raise FileNotFoundError(f"{printable(file)} does not exist: {what}")
    arrays: Any = index.cached(path, lambda _: index.state_of(path, idx), lambda: _build(path, idx))
    store = Records(path, arrays["keys"], arrays["begins"], arrays["sizes"])
    names = index.unpacked("names", arrays)
    told = path.with_name("property")
    if told.is_file():
        count = told.read_text(errors="replace").split(",")[0].strip()
        if count != str(len(names)):
            warnings.warn(
                f"{printable(told)} speaks of {count} identities, the records have {len(names)}", stacklevel=3
            )
    return Faces(names, store, arrays["numbers"], arrays["ends"])


def _build(path: Path, idx: Path) -> index.Arrays:
    keys, begins = _places(idx)
    order = np.argsort(begins, kind="stable")
    sizes = np.empty_like(begins)
    sizes[order] = np.diff(np.append(begins[order], os.path.getsize(path)))
    if (sizes < 32).any() or begins.min() < 0:
        raise ValueError(
            f"{printable(idx)} does not belong to {printable(path)}: record {keys[(sizes < 32).argmax()]} lies outside of it"
        )
    by_key = np.argsort(keys)
    keys, begins, sizes = keys[by_key], begins[by_key], sizes[by_key]
    labels = _from_ranges(path, keys, begins)
    if labels is None:
        headers = _headers(path, begins, keys)
        labels = np.where(headers["flag"] > 0, headers["labels"][:, 0], headers["label"])
        # Records of identities hold no image.
        kept = (headers["length"] >> 29 > 0) | (
            (headers["length"] & LENGTH) > 24 + 4 * headers["flag"].astype(np.int64)
        )
        labels, keys, begins, sizes = labels[kept], keys[kept], begins[kept], sizes[kept]
    else:
        images = slice(1, 1 + len(labels))
        keys, begins, sizes = keys[images], begins[images], sizes[images]
    if not np.isfinite(labels).all():
        raise ValueError(
            f"{printable(path)}, record {keys[~np.isfinite(labels)][0]}: its label is {labels[~np.isfinite(labels)][0]}"
        )
    values, identities = np.unique(labels, return_inverse=True)
    if len(values) < 2:
        raise ValueError(f"{printable(path)} must hold at least two identities, found {len(values)}")
    names = Strings.of(str(int(value)) if value == int(value) else str(value) for value in values)
    faces = Faces.by_identity(names, Records(path, keys, begins, sizes), identities)
    return {
        "keys": keys, "begins": begins, "sizes": sizes, "numbers": faces.numbers, "ends": faces.ends,
        **index.packed("names", names),
    }  # fmt: skip


def _places(idx: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys and offsets of the ``.idx`` file."""
    raw = idx.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # how NumPy says that the text is no row of numbers
            table = np.fromstring(raw, np.int64, sep=" ").reshape(-1, 2)
        if len(table) != len(raw.splitlines()) or not len(table):
            raise ValueError
    except (ValueError, DeprecationWarning):
        raise ValueError(f"{printable(idx)}: expected 'key offset' in each line") from None
    return table[:, 0].copy(), table[:, 1].copy()


def _headers(path: Path, begins: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[Any]:
    """Image headers of records, HEADER [n]; what lies behind the end of the file is 0."""
    found = np.zeros(len(begins), HEADER)
    raw = found.view(np.uint8).reshape(len(begins), HEADER.itemsize)
    for at in range(0, len(begins), 1 << 16):
        data = np.memmap(path, np.uint8, "r")  # anew each time, or the whole file would count as our memory
        places = begins[at : at + (1 << 16), None] + np.arange(HEADER.itemsize)
        raw[at : at + (1 << 16)] = data[np.minimum(places, len(data) - 1)]
    wrong = found["magic"] != MAGIC
    if wrong.any():
        raise ValueError(
            f"{printable(path)}, record {keys[wrong.argmax()]}: no record begins there; is the .idx another file's?"
        )
    return found


def _from_ranges(path: Path, keys: NDArray[np.int64], begins: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """Labels of the images 1, 2 ..., from the records of identities, which say which images are whose, and from the first image
    of each: reading every image's header would touch the whole file.

    None where there are no such records or they do not agree with each other or the images; then every image must be asked.
    """
    first = _headers(path, begins[:1], keys)
    if keys[0] != 0 or first["flag"][0] < 2 or not 1 < first["labels"][0, 0] < first["labels"][0, 1] < EXACT:
        return None
    end, last = (int(value) for value in first["labels"][0])
    if last > len(keys) or not np.array_equal(keys[:last], np.arange(last)):
        return None
    ranges = _headers(path, begins[end:last], keys[end:last])["labels"].astype(np.int64)
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    ranges = ranges[ranges[:, 1] > ranges[:, 0]]
    lengths = ranges[:, 1] - ranges[:, 0]
    if lengths.sum() != end - 1 or not np.array_equal(ranges[:, 0], 1 + np.cumsum(lengths) - lengths):
        return None
    ends: list[NDArray[np.float32]] = []
    for key in (ranges[:, 0], ranges[:, 1] - 1):
        headers = _headers(path, begins[key], key)
        ends.append(np.where(headers["flag"] > 0, headers["labels"][:, 0], headers["label"]))
    if not np.array_equal(ends[0], ends[1]) or len(np.unique(ends[0])) != len(ranges):
        return None
    labels: NDArray[np.float32] = np.repeat(ends[0], lengths)
    return labels
