"""Writing a data set in any of the formats that are read, image files byte for byte as they are."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from sst_fast.data import lists, lmdb_store, objects, recordio
from sst_fast.data.identities import SYSTEM, Faces
from sst_fast.data.images import FORMATS, DataError, printable, progress
from sst_fast.data.pairs import Unreadable
from sst_fast.data.store import Files, Strings

Format = Literal["auto", "folder", "list", "recordio", "lmdb", "webdataset", "huggingface"]
SUFFIX_OF = dict(zip(FORMATS, (".jpg", ".png", ".bmp", ".gif", ".tif", ".webp", ".ppm"), strict=True))
Writer = Callable[[Iterator["Record"], Path], int]
SHARD = 10**9  # bytes of a WebDataset shard, about
# A Hugging Face data set of more identities holds their names as text: the package reads all names of a ClassLabel anew with every
# thousand rows, which takes seconds where there are a million.
MOST_CLASSES = 10_000


@dataclass(frozen=True)
class Record:
    """An image on its way.

    Attributes:
        identity: number among those that are written; name: its name.
        place: among its identity's images.
        content: the encoded image; suffix: of its format.
    """

    identity: int
    name: str
    place: int
    content: bytes
    suffix: str


def convert(
    faces: Faces, target: str | os.PathLike[str], format: Format = "auto", skipped: Unreadable | None = None
) -> int:
    """Writes the data set to ``target``, which appears when it is whole; returns the number of images.

    Args:
        target: a new folder or file.
        format: 'auto': a list file, LMDB (.lmdb) or one tar (.tar) by the suffix, else a folder per identity. 'recordio' writes
            a folder with train.rec, train.idx and property (names become numbers), 'webdataset' a folder of shards.
        skipped: where to note images that cannot be read; without it one stops the conversion.

    Raises:
        FileExistsError: ``target`` exists. DataError: an image cannot be read. ValueError: fewer than two identities are left,
            or a name cannot be said in this format. ImportError: the format needs a package.
    """
    path = Path(target)
    chosen = _by_suffix(path) if format == "auto" else format
    if chosen == "list":
        return _list(faces, path, skipped)
    if chosen == "huggingface":
        writer: Writer = functools.partial(_huggingface, faces.names)
    else:
        writer = _tar if chosen == "webdataset" and path.suffix.lower() == ".tar" else WRITERS[chosen]
    with appearing(path) as temporary:
        return writer(_records(faces, skipped), temporary)


def _by_suffix(path: Path) -> Format:
    suffix = path.suffix.lower()
    if suffix in lists.SUFFIXES:
        return "list"
    if suffix == ".rec":
        raise ValueError(f"{printable(path)}: RecordIO is three files; name a new folder, and the format recordio")
    found: dict[str, Format] = {".lmdb": "lmdb", ".tar": "webdataset"}
    return found.get(suffix, "folder")


def encoded(faces: Faces, number: int) -> tuple[bytes, str]:
    """An image's file and the suffix of its format; an image that is only there decoded becomes a PNG.

    Raises:
        DataError: it cannot be read, or its header is no image's.
    """
    found = faces.store.read(number)
    if isinstance(found, Image.Image):
        buffer = io.BytesIO()
        found.save(buffer, "PNG")
        return buffer.getvalue(), ".png"
    try:
        with Image.open(io.BytesIO(found), formats=FORMATS) as opened:
            return found, SUFFIX_OF[opened.format or ""]
    except Exception:  # whatever a broken header leads to
        reason = f"it is none of {', '.join(FORMATS)}, or its header is broken"
        raise DataError(f"{faces.store.name(number)} cannot be read as an image: {reason}") from None


def _records(faces: Faces, skipped: Unreadable | None) -> Iterator[Record]:
    written = 0
    with progress(total=len(faces.numbers), unit="image") as bar:
        for identity in range(len(faces.names)):
            name, place = faces.names[identity], 0
            for number in faces.images(identity).tolist():
                try:
                    content, suffix = encoded(faces, number)
                except DataError as error:
                    if skipped is None:
                        raise
                    skipped.add(error)
                else:
                    yield Record(written, name, place, content, suffix)
                    place += 1
                bar.update()
            written += place > 0
    if written < 2:
        raise ValueError(f"at least two identities must be left to write, found {written}")


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A path beside ``target`` that takes its place when the block ends well, and is removed otherwise."""
    if os.path.lexists(target):
        raise FileExistsError(f"{printable(target)} exists already; name a new file or folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.rename(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _file_of(record: Record) -> str:
    """Where the image lies, as a relative path; the identity's name is its folder.

    Raises:
        ValueError: the name cannot be a folder's that :func:`sst_fast.data.faces` would take for an identity's.
    """
    if (
        "/" in record.name
        or "\0" in record.name
        or record.name.startswith(".")
        or record.name.lower() in SYSTEM
        or not record.name
    ):
        raise ValueError(
            f"the identity {record.name!r} cannot be a folder's name; choose the format huggingface or a list of files"
        )
    return f"{record.name}/{record.place:06d}{record.suffix}"


def _folder(records: Iterator[Record], target: Path) -> int:
    count = 0
    for record in records:
        file = target / _file_of(record)
        if record.place == 0:
            file.parent.mkdir(parents=True)
        file.write_bytes(record.content)
        count += 1
    return count


def _list(faces: Faces, target: Path, skipped: Unreadable | None) -> int:
    """A list of the files where the images lie in files; otherwise of a folder of them that is made beside it."""
    with appearing(target) as temporary:
        if isinstance(faces.store, Files):
            labels = np.repeat(np.arange(len(faces.names)), faces.counts)
            rows = [
                (os.path.relpath(faces.store.path(number), target.parent), faces.names[int(label)])
                for number, label in zip(faces.numbers.tolist(), labels, strict=True)
            ]
            _write_list(rows, temporary, target)
        else:
            folder, rows = target.with_suffix(""), []

            def noted() -> Iterator[Record]:
                for record in _records(faces, skipped):
                    rows.append((f"{folder.name}/{_file_of(record)}", record.name))
                    yield record

            with appearing(folder) as images:
                _folder(noted(), images)
                _write_list(rows, temporary, target)
        return len(rows)


def _write_list(rows: list[tuple[str, str]], temporary: Path, target: Path) -> None:
    suffix = target.suffix.lower()
    with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        if suffix in (".csv", ".tsv"):
            csv.writer(file, delimiter="," if suffix == ".csv" else "\t").writerows([("path", "label"), *rows])
        else:
            file.writelines(f"{path} {label}\n" for path, label in rows)
    try:
        names, paths, identities = lists.read_list(temporary)
        same = paths == Strings.of(path for path, _ in rows) and names.take(identities) == Strings.of(
            name for _, name in rows
        )
    except ValueError:
        same = False
    if not same:
        raise ValueError(f"{printable(target)}: names or paths hold characters that such a list cannot; write a .csv")


def _recordio(records: Iterator[Record], target: Path) -> int:
    target.mkdir()
    count, ranges, size = 0, [], "0,0"
    with (target / "train.rec").open("wb") as file, (target / "train.idx").open("w") as places:

        def write(key: int, label: tuple[float, ...], content: bytes = b"") -> None:
            places.write(f"{key}\t{file.tell()}\n")
            file.write(recordio.framed(label, key, content))

        write(0, (0.0, 0.0))
        for count, record in enumerate(records, 1):
            if record.place == 0:
                ranges.append(count)
                with Image.open(io.BytesIO(record.content)) as image:
                    size = f"{image.height},{image.width}"
            write(count, (float(record.identity),), record.content)
        ranges.append(count + 1)
        for identity, (first, last) in enumerate(itertools.pairwise(ranges)):
            write(count + 1 + identity, (float(first), float(last)))
        file.seek(0)
        file.write(recordio.framed((float(count + 1), float(count + len(ranges))), 0, b""))
    (target / "property").write_text(f"{len(ranges) - 1},{size}\n")
    return count


def _lmdb(records: Iterator[Record], target: Path) -> int:
    count, lmdb = 0, lmdb_store.package()
    # The file is as large as what is in it; the size of the map is only its limit.
    with lmdb.open(str(target), map_size=1 << 42, writemap=False) as environment:
        batches = iter(lambda: list(itertools.islice(records, 1000)), [])
        for batch in batches:
            with environment.begin(write=True) as transaction:
                for record in batch:
                    key = _file_of(record).encode(errors="surrogateescape")
                    if len(key) > environment.max_key_size():
                        raise ValueError(
                            f"LMDB's keys have at most {environment.max_key_size()} bytes, got {printable(record.name)!r}"
                        )
                    transaction.put(key, record.content)
            count += len(batch)
    (target / "lock.mdb").unlink(missing_ok=True)
    return count


def _tar(records: Iterator[Record], target: Path) -> int:
    """One tar; each sample has the image, .cls and a .json with the identity's name."""
    count = 0
    with tarfile.open(target, "w") as tar:
        for record in records:
            _sample(tar, record, count)
            count += 1
    return count


def _shards(records: Iterator[Record], target: Path) -> int:
    """A folder of tars of about SHARD bytes each."""
    target.mkdir()
    count, shard = 0, 0
    tar = None
    try:
        for record in records:
            if tar is None or tar.offset >= SHARD:
                if tar is not None:
                    tar.close()
                tar = tarfile.open(target / f"{shard:06d}.tar", "w")  # noqa: SIM115 (closed below)
                shard += 1
            _sample(tar, record, count)
            count += 1
    finally:
        if tar is not None:
            tar.close()
    return count


def _sample(tar: tarfile.TarFile, record: Record, number: int) -> None:
    told = json.dumps({"label": record.identity, "identity": record.name}).encode()
    for suffix, content in ((record.suffix, record.content), (".cls", b"%d" % record.identity), (".json", told)):
        member = tarfile.TarInfo(f"{number:09d}{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def _huggingface(names: Strings, records: Iterator[Record], target: Path) -> int:
    datasets = objects.package()
    from datasets.arrow_writer import ArrowWriter

    numbers = {name: number for number, name in enumerate(names)} if len(names) <= MOST_CLASSES else {}
    label = datasets.ClassLabel(names=list(numbers)) if numbers else datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    count, rows = 0, target / ".rows"
    rows.mkdir(parents=True)
    with ArrowWriter(features=features, path=str(rows / "rows.arrow")) as writer:
        for record in records:
            writer.write(
                {"image": {"bytes": record.content, "path": None}, "label": numbers.get(record.name, record.name)}
            )
            count += 1
        writer.finalize()
    datasets.Dataset.from_file(str(rows / "rows.arrow")).save_to_disk(str(target))
    shutil.rmtree(rows)
    return count


WRITERS: dict[str, Writer] = {
    "folder": _folder, "recordio": _recordio, "lmdb": _lmdb, "webdataset": _shards,
}  # fmt: skip
