"""LMDB: one entry for each image, its key ``identity/image`` (as the relative path in a folder), its value the image's file."""

from __future__ import annotations

import contextlib
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from sst_fast.data import index
from sst_fast.data.identities import Faces
from sst_fast.data.images import DataError, printable
from sst_fast.data.store import Gathered, Strings

_environments: dict[str, Any] = {}  # by path: LMDB allows a process one of each


class Entries:
    """Images of an LMDB environment."""

    format = "LMDB"

    def __init__(self, path: Path, keys: Strings) -> None:
        self.path, self.keys = path, keys

    def __len__(self) -> int:
        return len(self.keys)

    def name(self, number: int) -> str:
        """The environment and the key."""
        return f"{printable(self.path)}, key {printable(self.keys[number])}"

    def read(self, number: int) -> bytes:
        """The encoded image."""
        lmdb = package()
        try:
            with environment(self.path).begin() as transaction:
                value = transaction.get(self.keys[number].encode(errors="surrogateescape"))
        except (lmdb.Error, OSError) as error:
            raise DataError(f"{self.name(number)} cannot be read: {error}") from None
        if value is None:
            raise DataError(f"{self.name(number)} cannot be read: it is gone")
        return bytes(value)


def package() -> Any:
    """The package lmdb.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import lmdb
    except ImportError as error:
        raise ImportError(f"LMDB needs the extra: pip install 'sst-fast[data]' ({error})") from error
    return lmdb


def environment(path: Path) -> Any:
    """This process's, for images in any order."""
    key = str(path.resolve())
    if key not in _environments:
        _environments[key] = opened(path, in_order=False)
    return _environments[key]


def opened(path: Path, in_order: bool) -> Any:
    """For reading without a lock: nobody else may write meanwhile. ``in_order``: the system reads ahead."""
    return package().open(str(path.resolve()), subdir=path.is_dir(), readonly=True, lock=False, readahead=in_order)


def _close() -> None:
    """LMDB's environments must not be carried into a forked process: both open them anew."""
    while _environments:
        _environments.popitem()[1].close()


os.register_at_fork(before=_close)


def open_lmdb(path: Path) -> Faces:
    """The identities of an LMDB environment (its folder, or its one file).

    Raises:
        ImportError: lmdb is not installed. ValueError: it is no LMDB environment, a key is not ``identity/image``, or there
            are fewer than two identities.
    """
    lmdb = package()
    file = path / "data.mdb" if path.is_dir() else path

    def build() -> index.Arrays:
        names: dict[bytes, int] = {}
        keys, identities = Gathered(), array("q")
        try:
            # A process may open an environment once: where images are being read from it, that one has to do.
            known = str(path.resolve()) in _environments
            with (
                contextlib.nullcontext(environment(path)) if known else opened(path, in_order=True) as source,
                source.begin() as transaction,
                transaction.cursor() as cursor,
            ):
                for key in cursor.iternext(values=False):
                    keys.append(key)
                    identity, slash, _ = key.rpartition(b"/")
                    if not slash or not identity:
                        raise ValueError(
                            f"{printable(path)}: expected keys of the form 'identity/image', got {key[:80]!r}"
                        )
                    identities.append(names.setdefault(identity, len(names)))
        except lmdb.Error as error:
            raise ValueError(f"{printable(path)} cannot be read as LMDB: {error}") from None
        if len(names) < 2:
            raise ValueError(f"{printable(path)} must hold at least two identities, found {len(names)}")
        strings = keys.strings()
        found = Strings.of(name.decode(errors="surrogateescape") for name in names)
        faces = Faces.by_identity(found, Entries(path, strings), np.frombuffer(identities, np.int64))
        return {
            "numbers": faces.numbers, "ends": faces.ends, **index.packed("keys", strings), **index.packed("names", found),
        }  # fmt: skip

    arrays: Any = index.cached(path, lambda _: index.state_of(file), build)
    store = Entries(path, index.unpacked("keys", arrays))
    return Faces(index.unpacked("names", arrays), store, arrays["numbers"], arrays["ends"])
