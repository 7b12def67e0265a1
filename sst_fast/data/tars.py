"""WebDataset shards: tar files in which the files of one sample stand in a row and share their name up to the first dot.

An index of where every image begins makes any image readable at once, whatever shard it is in; shards stay closed until then.
Whose image it is: ``identity`` or ``label`` in the sample's ``.json``, else its ``.cls``, else the folder in its name.
"""

from __future__ import annotations

import json
import os
import tarfile
from array import array
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sst_fast.data import index
from sst_fast.data.identities import Faces
from sst_fast.data.images import MAX_BYTES, printable, progress
from sst_fast.data.lists import is_image
from sst_fast.data.store import Opened, Strings

LABELS = {"json", "cls"}  # the extensions of files that say whose image it is
BLOCK = 512  # bytes; a header takes one
TOGETHER = 4096  # headers that are checked together
REGULAR, FOLDER, EXTENDED = b"05x"  # kinds of members: files, folders, headers of what the next one's has no room for
SAYS_MORE = (b"path=", b"size=", b"GNU.", b"charset=")  # in an extended header: it matters here


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
    with progress(total=sum(path.stat().st_size for path in shards), unit="B", unit_scale=True, desc="index") as bar:
        for number, path in enumerate(shards):
            for name, image, identity in samples(path):
                if identity is None:
                    raise ValueError(
                        f"{printable(path)}, sample {name}: nothing says whose image it is; expected a .cls file, a .json file with "
                        "'identity' or 'label', or the identity's folder in its name"
                    )
                shard.append(number)
                begins.append(image.begin)
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


def samples(path: Path) -> Iterator[tuple[str, Member, str | None]]:
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


class Member(NamedTuple):
    """A file in a tar: its content is ``size`` bytes from ``begin`` on."""

    name: str
    begin: int
    size: int


class _Window:
    """A file's bytes at any place, read some more at a time: headers and contents of small files lie side by side."""

    SIZE = 1 << 14

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.begin, self.held = file, 0, b""

    def read(self, begin: int, size: int) -> bytes:
        """These bytes; fewer where the file ends."""
        first = begin - self.begin
        if first < 0 or first + size > len(self.held):
            self.begin, self.held, first = begin, os.pread(self.file.fileno(), max(size, self.SIZE), begin), 0
        return self.held[first : first + size]


def _members(path: Path) -> Iterator[tuple[Member, bytes | None]]:
    """A tar's files in order, and what those with a label's extension hold."""
    try:
        with open(path, "rb") as file:
            window = _Window(file)
            for member in _files(file, window):
                base = member.name.rpartition("/")[2]
                if base.startswith("."):
                    continue
                content = None
                if base.partition(".")[2].lower() in LABELS and member.size <= MAX_BYTES:
                    content = window.read(member.begin, member.size)
                    if len(content) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                yield member, content
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"{printable(path)} cannot be read as a tar file: {error} (compressed ones have no random access; unpack them to .tar)"
        ) from None


def _files(file: BinaryIO, window: _Window) -> Iterator[Member]:
    """By their plain headers, which takes a fraction of tarfile's time; from the first other one on, by tarfile."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        if not tar.pax_headers and (at := (yield from _plain(window))):  # such headers hold for all members
            tar.firstmember, tar.offset = None, at  # type: ignore[attr-defined]  # from where next() reads
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            if member.isreg() and not member.issparse():
                yield Member(member.name, member.offset_data, member.size)
        if window.read(tar.offset, BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"the header at byte {tar.offset:,} is damaged")


def _plain(window: _Window) -> Generator[Member, None, int]:
    """The files up to the first header that does not say all there is to say (a long name, a size of 8 GiB, damage, the end);
    returns where that header begins."""
    at, more = 0, True
    while more:
        headers: list[bytes] = []
        begins: list[int] = []
        sizes: list[int] = []
        more = False
        while len(header := window.read(at, BLOCK)) == BLOCK and (field := header[124:136].rstrip(b" \0")).isdigit():
            begin = at + BLOCK
            try:
                size = int(field, 8)
            except ValueError:
                break
            if header[156] == EXTENDED and (size > TOGETHER or any(k in window.read(begin, size) for k in SAYS_MORE)):
                break
            headers.append(header)
            begins.append(begin)
            sizes.append(size)
            at = begin + -(-size // BLOCK) * BLOCK
            if more := len(headers) == TOGETHER:
                break
        if not headers:
            break
        if (count := _count_plain(headers, sizes)) < len(headers):
            at, more = begins[count] - BLOCK, False
        for header, begin, size in zip(headers[:count], begins, sizes, strict=False):
            if header[156] == REGULAR:
                yield Member(header[:100].split(b"\0", 1)[0].decode(errors="surrogateescape"), begin, size)
    return at


def _count_plain(headers: list[bytes], sizes: list[int]) -> int:
    """How many of these headers, from the first, say all there is to say and are undamaged."""
    table = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    kinds, digits = (
        table[:, 156],
        table[:, 148:154] - np.uint8(ord("0")),
    )  # of the sum over all, its own field as blanks
    sums = table.sum(1, dtype=np.int64) - table[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    good = (
        (table[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(1) & (table[:, 345] == 0)  # no first half of a long name
        & ((kinds == REGULAR) | (kinds == EXTENDED) | ((kinds == FOLDER) & (np.array(sizes) == 0)))
        & (digits < 8).all(1) & (digits @ 8 ** np.arange(5, -1, -1) == sums)
    )  # fmt: skip
    return len(headers) if good.all() else int(good.argmin())


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
