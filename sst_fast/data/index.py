"""What a large data set holds, kept beside it, so that the next run need not search it again."""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sst_fast.data.store import Strings

Arrays = dict[str, NDArray[np.generic]]
LEAST = 100_000  # images: a smaller data set is searched again each time
VERSION = 1
SETTLED = 2 * 10**9  # nanoseconds; a file system may give two changes within this time the same date


def cached(root: Path, state: Callable[[Arrays], NDArray[np.int64]], build: Callable[[], Arrays]) -> Arrays:
    """What ``build`` finds in ``root``, from the file ``.NAME.sst-fast-index.npz`` beside it where that fits.

    Args:
        root: the data set's file or folder.
        state: of the arrays, sizes and dates (nanoseconds) of all that they were made from; where it has changed, the data set
            is searched again.
        build: gives the arrays; one of them is ``numbers``, one entry for each image.

    Where the file cannot be written, nothing is kept. A data set that has just changed is not kept either: another change at
    once might go unnoticed.
    """
    file = root.with_name(f".{root.name}.sst-fast-index.npz")
    try:
        with np.load(file, allow_pickle=False) as opened:
            kept = {name: opened[name] for name in opened.files}
        if kept["version"] == VERSION and np.array_equal(kept["state"], state(kept)):
            return kept
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # none, or none that can be used
    began = time.time_ns()
    arrays = build()
    if len(arrays["numbers"]) < LEAST:
        return arrays
    now = state(arrays)
    if now.max() < began - SETTLED:
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as target:
                np.savez(target, version=VERSION, state=now, **arrays)  # type: ignore[arg-type]
            temporary.replace(file)
        except OSError:
            temporary.unlink(missing_ok=True)
    return arrays


def state_of(*files: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Size and date of change of each."""
    return np.array([(s.st_size, s.st_mtime_ns) for s in map(os.stat, files)], np.int64).reshape(-1)


def packed(name: str, strings: Strings) -> Arrays:
    """As arrays for an index."""
    return {f"{name}.data": strings.data, f"{name}.ends": strings.ends}


def unpacked(name: str, arrays: Mapping[str, NDArray[np.generic]]) -> Strings:
    """Back from :func:`packed`."""
    return Strings(arrays[f"{name}.data"], arrays[f"{name}.ends"])  # type: ignore[arg-type]
