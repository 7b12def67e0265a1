"""Where images lie: one interface over files, records and archives."""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sst_fast.data.images import MAX_BYTES, DataError, decode, printable, read_file


class Strings(Sequence[str]):
    """Many strings in two arrays.

    A million Python strings would take 60 bytes more each, and every forked worker would copy them when it counts references.

    Args:
        data: all of them in a row, as UTF-8 (file names that are none by Python's ``surrogateescape``), uint8.
        ends: where they begin and end in it, int64 [count + 1].
    """

    def __init__(self, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        """These strings."""
        gathered = Gathered()
        for string in strings:
            gathered.append(string)
        return gathered.strings()

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Strings: ...
    def __getitem__(self, index: int | slice) -> str | Strings:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} strings")
        index %= len(self)
        return self.data[self.ends[index] : self.ends[index + 1]].tobytes().decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        data = self.data.tobytes()
        for begin, end in itertools.pairwise(self.ends.tolist()):
            yield data[begin:end].decode(errors="surrogateescape")

    def take(self, numbers: NDArray[np.int64]) -> Strings:
        """Those with these numbers, in this order."""
        lengths = self.ends[numbers + 1] - self.ends[numbers]
        ends = np.zeros(len(numbers) + 1, np.int64)
        np.cumsum(lengths, out=ends[1:])
        # Each byte's place in the old data: where its string began, and how far it is from there.
        places = np.arange(ends[-1]) + np.repeat(self.ends[numbers] - ends[:-1], lengths)
        return Strings(self.data[places], ends)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Strings):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.data, other.data)
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Strings({list(self[:3])}, {len(self)} in all)"


class Gathered:
    """Strings that come one by one."""

    def __init__(self) -> None:
        self._data, self._ends = bytearray(), array("q", [0])

    def append(self, string: str | bytes) -> None:
        """One more."""
        self._data += string.encode(errors="surrogateescape") if isinstance(string, str) else string
        self._ends.append(len(self._data))

    def strings(self) -> Strings:
        """All of them."""
        return Strings(np.frombuffer(self._data, np.uint8), np.frombuffer(self._ends, np.int64))


class Store(Protocol):
    """Images by number, from 0. Opens what it needs when it is first read from, in each process anew, and can be pickled."""

    format: str  # what ``sst-fast data info`` calls it

    def __len__(self) -> int: ...

    def read(self, number: int) -> bytes | Image.Image:
        """An encoded image, or a decoded one where the store has no other.

        Raises:
            DataError: it cannot be read; names it.
        """

    def name(self, number: int) -> str:
        """For people: the file or record."""


class Opened:
    """Files that are read from at any place, opened at the first read; a pickle of it has none open. The same file may be read
    from in forked processes, because reading moves no position.
    """

    MOST = 64  # open at a time

    def __init__(self) -> None:
        self._files: dict[str, BinaryIO] = {}

    def read(self, path: str | os.PathLike[str], begin: int, size: int, name: str) -> bytes:
        """These bytes of a file.

        Raises:
            DataError: it cannot be opened or ends too early, or there are more than MAX_BYTES; the message names ``name``.
        """
        if size > MAX_BYTES:
            raise DataError(f"{name} cannot be read: it has {size:,} bytes, at most {MAX_BYTES:,} are read")
        try:
            key = os.fspath(path)
            file = self._files.get(key)
            if file is None:
                if len(self._files) >= self.MOST:
                    self._files.pop(next(iter(self._files))).close()
                file = self._files[key] = open(key, "rb", buffering=0)  # noqa: SIM115 (stays open)
            found = os.pread(file.fileno(), size, begin)
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}") from None
        if len(found) < size:
            raise DataError(f"{name} cannot be read: the file ends after {len(found):,} of its {size:,} bytes")
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": {}}


def load(store: Store, number: int, channels: int) -> Image.Image:
    """The image as 8-bit gray (1 channel) or RGB (3), upright.

    Raises:
        DataError: it cannot be read; names it.
    """
    found = store.read(number)
    if isinstance(found, bytes):
        return decode(found, store.name(number), channels)
    return found.convert("L" if channels == 1 else "RGB")


class Files:
    """Image files, by their paths relative to ``root`` (or absolute)."""

    def __init__(self, root: str | os.PathLike[str], paths: Strings, format: str) -> None:
        self.root, self.paths, self.format = os.fspath(root), paths, format

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, number: int) -> Path:
        """Of image ``number``."""
        return Path(self.root, self.paths[number])

    def read(self, number: int) -> bytes:
        """The file's bytes."""
        return read_file(self.path(number))

    def name(self, number: int) -> str:
        """The path."""
        return printable(self.path(number))


class Selected(Sequence[str]):
    """Some images of a store, in an order; as a sequence, their names."""

    def __init__(self, store: Store, numbers: NDArray[np.int64]) -> None:
        self.store, self.numbers = store, numbers

    @classmethod
    def of(cls, paths: Sequence[Any]) -> Selected:
        """These paths, or what has been selected already."""
        if isinstance(paths, Selected):
            return paths
        return cls(Files("", Strings.of(map(os.fspath, paths)), "files"), np.arange(len(paths)))

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Selected: ...
    def __getitem__(self, index: int | slice) -> str | Selected:
        if isinstance(index, slice):
            return Selected(self.store, self.numbers[index])
        return self.store.name(int(self.numbers[index]))

    def load(self, index: int, channels: int) -> Image.Image:
        """See :func:`load`."""
        return load(self.store, int(self.numbers[index]), channels)
