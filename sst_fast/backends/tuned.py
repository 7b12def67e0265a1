"""What ``sst-fast tune`` has measured on this machine, in a file of the user's cache: which backend is fastest for a problem, and with which
tile if it has several (:meth:`sst_fast.backends.backend.Backend.tiles`).

An entry is valid for one device by name and capability, for the versions of torch, triton and sst-fast that it was measured with, and for
one problem with N and K rounded up to powers of two. Only results that agreed with the reference are stored. The file is read once,
when the first decision is made. ``SST_FAST_TUNE=0`` leaves it unread.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sst_fast.backends.backend import Problem, size_class
from sst_fast.backends.extension import compiled

ENVIRONMENT = "SST_FAST_TUNE"
_FORMAT = 1
Tile = tuple[int, ...]  # rows, slots, warps, stages: sst_fast.backends.triton.Blocks
_read: dict[str, dict[tuple[object, ...], str]] = {}
_tiles: dict[str, dict[tuple[object, ...], Tile]] = {}  # of the same entries: as tile() is asked
_tried: dict[str, Tile] = {}  # backend -> the tile that is being measured


def file() -> Path:
    """Path of the file with the stored choices: below ``XDG_CACHE_HOME``, else in the platform's cache directory of the user.

    Raises:
        OSError: the user has no home directory.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # a relative path is to be ignored, says the XDG specification
        return Path(given, "sst-fast", "tuned.json")
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(f"no cache directory: {error}; set XDG_CACHE_HOME") from error
    folder = home / ".cache"
    if sys.platform == "darwin":
        folder = home / "Library" / "Caches"
    elif os.name == "nt":
        folder = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return folder / "sst-fast" / "tuned.json"


def identity(device: torch.device) -> dict[str, str]:
    """What an entry is valid for: the device and the versions of what runs on it."""
    if device.type == "cuda":
        name, capability = (
            torch.cuda.get_device_name(device),
            ".".join(map(str, torch.cuda.get_device_capability(device))),
        )
    else:
        name, capability = processor(), compiled.instruction_set() if compiled else "none"
    return {
        "device": name, "capability": capability, "torch": torch.__version__, "triton": _version("triton"),
        "sst_fast": _version("sst-fast"),
    }  # fmt: skip


def processor() -> str:
    """The processor's name, or its architecture if the system does not tell the name."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    return name[1] if name else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def key(problem: Problem) -> tuple[object, ...]:
    """The problem's fields without the device, as :func:`choices` has them."""
    return (problem[0], *problem[2:])


def choices(device: str) -> dict[tuple[object, ...], str]:
    """Stored choices for ``device`` and the versions that run now: :func:`key` of a problem -> name of a backend.

    A problem whose sizes are not known (0) has the choice that all sizes agree on, if they do.
    """
    if device not in _read:
        _read[device] = _choices(torch.device(device))
    return _read[device]


def choice(problem: Problem) -> str | None:
    """The stored choice for a problem, or None."""
    return choices(str(problem.device)).get(key(problem))


def tile(
    backend: str, device: torch.device, queue_dtype: torch.dtype, dim: int, normalize: bool, smooths: bool, probes: int,
    slots: int,
) -> Tile | None:  # fmt: skip
    """The tile that is stored for a call of a backend, by what its kernel depends on; None: the backend's own table serves."""
    if _tried:
        return _tried.get(backend)
    name = str(device)
    choices(name)
    return _tiles[name].get((backend, queue_dtype, dim, normalize, smooths, size_class(probes), size_class(slots)))


def try_tile(backend: str, cut: Tile) -> None:
    """From now on, in this process, ``backend`` uses this tile, and no stored tile is used. For measuring."""
    _tried[backend] = cut


def forget() -> None:
    """Reads the file again when it is next needed."""
    _read.clear()
    _tiles.clear()
    _tried.clear()


def _choices(device: torch.device) -> dict[tuple[object, ...], str]:
    tiles = _tiles[str(device)] = {}
    if os.environ.get(ENVIRONMENT, "1").lower() in ("0", "false", "no"):
        return {}
    try:
        entries = _entries(file())
        if not entries:
            return {}
        here = identity(device)
        found = {}
        for entry in entries:
            if entry["made_for"] == here:
                backend, problem = str(entry["backend"]), _problem(entry["problem"])
                found[key(problem)] = backend
                if entry.get("tile"):
                    _, _, _, dtype, dim, _, _, _, normalize, smooths, *_, probes, slots = problem
                    call = (backend, dtype, dim, normalize, smooths, probes, slots)
                    tiles[call] = tuple(map(int, entry["tile"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        tiles.clear()
        warnings.warn(
            f"sst_fast: the stored choices cannot be used and are ignored ({_told(error)}); 'sst-fast tune' writes them anew",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
    whatever: dict[tuple[object, ...], set[str]] = {}
    for known, backend in found.items():
        whatever.setdefault((*known[:-2], 0, 0), set()).add(backend)
    return found | {known: names.pop() for known, names in whatever.items() if len(names) == 1}


def _told(error: Exception) -> str:
    try:
        where = f"{file()}: "
    except OSError:
        where = ""
    return f"{where}{type(error).__name__}: {error}"


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    if (
        not isinstance(content, dict)
        or content.get("format") != _FORMAT
        or not isinstance(content.get("choices"), list)
    ):
        raise ValueError(f"it is no file of format {_FORMAT}")
    return list(content["choices"])


def _problem(fields: dict[str, Any]) -> Problem:
    """As :func:`_written` wrote it."""
    values = {name: getattr(torch, v[6:]) if str(v).startswith("torch.") else v for name, v in fields.items()}
    return Problem(device=torch.device("cpu"), **values)


def _written(problem: Problem) -> dict[str, Any]:
    """The problem without the device, as JSON can hold it."""
    fields = problem._asdict()
    del fields["device"]
    return {name: str(v) if isinstance(v, torch.dtype) else v for name, v in fields.items()}


def store(problem: Problem, backend: str, seconds: dict[str, float], cut: Tile | None = None) -> Path:
    """Stores the choice, over an earlier one for the same problem; the file is replaced in one step.

    Args:
        problem: with its sizes; on the device that it was measured on.
        backend: the fastest whose results agreed with the reference.
        seconds: of all that were measured, for the reader of the file.
        cut: with tiles of this size rather than those of the backend's table.

    Returns:
        The file.

    Raises:
        OSError: the file cannot be written.
    """
    path, here, fields = file(), identity(problem.device), _written(problem)
    try:
        entries = _entries(path)
        others = [e for e in entries if e["made_for"] != here or e["problem"] != fields]
    except (ValueError, KeyError, TypeError, AttributeError):
        others = []
    mine = {"made_for": here, "problem": fields, "backend": backend, "tile": cut, "seconds": seconds}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump({"format": _FORMAT, "choices": [*others, mine]}, out, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    forget()
    return path
