"""WebDataset shards: tar files in which the files of one sample stand in a row and share their name up to the first dot.

An index of where every image begins makes any image readable at once, whatever shard it is in; shards stay closed until then.
Whose image it is: ``identity`` or ``label`` in the sample's ``.json``, else its ``.cls``, else the folder in its name.
"""

from __future__ import annotations

import json
import os
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sst_fast.data import index
from sst_fast.data.identities import Faces
from sst_fast.data.images import MAX_BYTES, printable
from sst_fast.data.lists import is_image
from sst_fast.data.store import Opened, Strings

LABELS = {"json", "cls"}  # the extensions of files that say whose image it is


class Members:
    """Images in tar files."""

    format = "WebDataset"

    def __init__(
        self, root: Path, shards: Strings, shard: NDArray[np.int64], begins: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> None:
        self.root, self.shards, self.shard, self.begins, self.sizes = root, shards, shard, begins, sizes
        self._files = Opened()

    def __len__(self) -> int:
        return len(self.shard)

    def name(self, number: int) -> str:
        """The shard and where in it the image begins."""
        return f"{printable(self._path(number))}, byte {self.begins[number]:,}"

    def read(self, number: int) -> bytes:
        """The encoded image."""
        return self._files.read(
            self._path(number), int(self.begins[number]), int(self.sizes[number]), self.name(number)
        )

    def _path(self, number: int) -> Path:
        return self.root / self.shards[int(self.shard[number])]


def open_tars(root: Path, shards: list[Path]) -> Faces:
    """The identities of these shards.

    Args:
        root: the folder of the shards, or the only one; the index is kept beside it.
        shards: the tar files, in order.

    Raises:
        ValueError: a file is no plain tar, a sample has no or two images or nobody knows whose it is, or there are fewer than
            two identities; names shard and sample.
    """
    arrays: Any = index.cached(root, lambda _: index.state_of(*shards), lambda: _build(root, shards))
    base = root if root.is_dir() else root.parent
    store = Members(base, index.unpacked("shards", arrays), arrays["shard"], arrays["begins"], arrays["sizes"])
    return Faces(index.unpacked("names", arrays), store, arrays["numbers"], arrays["ends"])


def _build(root: Path, shards: list[Path]) -> index.Arrays:
    names: dict[str, int] = {}
    shard, begins, sizes, identities = (array("q") for _ in range(4))
    with tqdm(
        total=sum(path.stat().st_size for path in shards), unit="B", unit_scale=True, desc="index", leave=False, delay=1
    ) as bar:
        for number, path in enumerate(shards):
            for name, image, identity in samples(path):
                if identity is None:
                    raise ValueError(
                        f"{printable(path)}, sample {name}: nothing says whose image it is; expected a .cls file, a .json file with "
                        "'identity' or 'label', or the identity's folder in its name"
                    )
                shard.append(number)
                begins.append(image.offset_data)
                sizes.append(image.size)
                identities.append(names.setdefault(identity, len(names)))
            bar.update(path.stat().st_size)
    if len(names) < 2:
        raise ValueError(f"{printable(root)} must hold at least two identities, found {len(names)}")
    base = root if root.is_dir() else root.parent
    columns = [np.frombuffer(column, np.int64) for column in (shard, begins, sizes)]
    paths, found = Strings.of(os.path.relpath(path, base) for path in shards), Strings.of(names)
    faces = Faces.by_identity(found, Members(base, paths, *columns), np.frombuffer(identities, np.int64))
    return {
        "shard": columns[0], "begins": columns[1], "sizes": columns[2], "numbers": faces.numbers, "ends": faces.ends,
        **index.packed("shards", paths), **index.packed("names", found),
    }  # fmt: skip


def samples(path: Path) -> Iterator[tuple[str, tarfile.TarInfo, str | None]]:
    """Name, image and identity of every sample of a shard; samples without image are skipped."""
    key, image = "", None
    told: dict[str, bytes] = {}
    for member, content in _members(path):
        folder, _, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        if f"{folder}/{stem}" != key:
            if image is not None:
                yield key.lstrip("/"), image, _identity(path, key, told)
            key, image, told = f"{folder}/{stem}", None, {}
        if is_image(file):
            if image is not None:
                raise ValueError(f"{printable(path)}, sample {key.lstrip('/')}: has two images, expected one")
            image = member
        elif content is not None:
            told[extension.lower()] = content
    if image is not None:
        yield key.lstrip("/"), image, _identity(path, key, told)


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """A tar's files in order, and what those with a label's extension hold."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                base = member.name.rpartition("/")[2]
                if not member.isreg() or member.issparse() or base.startswith("."):
                    continue
                content = None
                if base.partition(".")[2].lower() in LABELS and member.size <= MAX_BYTES:
                    opened = tar.extractfile(member)
                    assert opened is not None
                    content = opened.read()
                yield member, content
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"{printable(path)} cannot be read as a tar file: {error} (compressed ones have no random access; unpack them to .tar)"
        ) from None


def _identity(path: Path, key: str, told: dict[str, bytes]) -> str | None:
    where = f"{printable(path)}, sample {key.lstrip('/')}"
    if "json" in told:
        try:
            fields = json.loads(told["json"])
        except ValueError as error:
            raise ValueError(f"{where}: its .json cannot be read: {error}") from None
        for name in ("identity", "label"):
            if isinstance(fields, dict) and isinstance(fields.get(name), str | int):
                return str(fields[name])
    if "cls" in told:
        label = told["cls"].decode(errors="replace").strip()
        if not label:
            raise ValueError(f"{where}: its .cls is empty")
        return label
    return key.rpartition("/")[0].rpartition("/")[2] or None
