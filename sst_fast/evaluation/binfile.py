"""insightface's ``.bin`` verification sets, read without trusting them.

A ``.bin`` is a pickle of (list of 2 P encoded images, list of P booleans). A pickle can run any program while it is read, so
the file is first looked through, instruction by instruction, without carrying any out; then it is read by an unpickler that
knows a handful of harmless constructors, all of them ours. Neither step makes more of the file than the file holds.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Instructions that make lists, tuples, bytes, numbers, booleans and text (which names what to construct), keep and fetch
# objects, and construct. Missing on purpose: dictionaries, sets, persistent objects, extensions, old ways to construct.
_ADMITTED = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK",
    "LIST", "EMPTY_LIST", "APPEND", "APPENDS", "TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip
_BYTE_TYPES = {"u1", "|u1", "b1", "|b1", "i1", "|i1"}
_NUMBER_TYPES = {*_BYTE_TYPES, *(f"{kind}{size}" for kind in "iuf" for size in (2, 4, 8))}


class BinFile(NamedTuple):
    """Encoded images (JPEG, PNG) [2 P], of which 2 i and 2 i + 1 are pair i, and whether each pair is genuine, bool [P]."""

    images: list[bytes]
    genuine: NDArray[np.bool_]


def read_bin(path: str | Path) -> BinFile:
    """Reads insightface's ``.bin``.

    Admitted are lists, tuples, bytes, numbers, booleans and NumPy arrays of bytes, in any pickle protocol, and nothing else.

    Raises:
        FileNotFoundError: no such file. ValueError: the pickle wants anything else (names it), is cut short, or does not hold
            2 P images and P booleans.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    content = path.read_bytes()
    try:
        _look_through(content)
        loaded = _Reader(content).load()
    except _Refused as refused:
        raise ValueError(f"{path} is no verification set: {refused}") from None
    except RecursionError:
        raise ValueError(f"{path} is no verification set: its objects are nested too deeply") from None
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"{path} is no verification set: broken pickle ({error})") from None
    return _pairs(path, loaded)


class _Refused(Exception):
    """Why a file is refused."""


def _look_through(content: bytes) -> None:
    """Raises if the pickle has an instruction that is not admitted, claims more bytes than there are, or is cut short."""
    number = 0
    for number, (code, argument, position) in enumerate(_instructions(content), 1):
        if code.name not in _ADMITTED:
            raise _Refused(f"the pickle's instruction {code.name} at byte {position} is not admitted")
        if code.name == "GLOBAL":
            _constructor(*argument.split(" ", 1))
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= argument <= number:
            raise _Refused(f"memo number {argument} at byte {position} is larger than the number of objects")
        if code.name == "FRAME" and argument > len(content) - position:
            raise _Refused(f"a frame of {argument} bytes at byte {position}, but the file has {len(content)}")
    if not number:
        raise _Refused("it is empty")


def _instructions(content: bytes) -> Any:
    try:
        yield from pickletools.genops(io.BytesIO(content))  # reads no more than there is
    except ValueError as error:
        raise _Refused(f"it is cut short or no pickle ({error})") from None


class _Reader(pickle.Unpickler):
    """Knows only :func:`_constructor`'s names, each in its own copy, so that nothing outlives the reading."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.text = len(content)  # characters that may still be encoded: never more than the file has

    def find_class(self, module: str, name: str) -> Any:
        make = _constructor(module, name)
        if make is _encode:
            return self.encode
        return lambda *arguments: make(*arguments)

    def encode(self, text: object, encoding: object) -> bytes:
        if isinstance(text, str):
            self.text -= len(text)
        if self.text < 0:
            raise _Refused("its text is encoded again and again")
        return _encode(text, encoding)


class _Type:
    """In the place of a NumPy dtype."""

    def __init__(self, name: object, *_: object) -> None:
        text = name.decode("latin1") if isinstance(name, bytes) else name
        if not isinstance(text, str) or text not in _NUMBER_TYPES:
            raise _Refused(f"a NumPy array of type {text!r}")
        self.name = text

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", "|", b"<", b"|"):
            raise _Refused(f"a NumPy type of byte order {order!r}")


class _Array:
    """In the place of a NumPy array of bytes; holds the bytes."""

    def __init__(self, *_: object) -> None:
        self.data = b""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refused("a NumPy array of an unknown form")
        _, shape, kind, _, data = state
        self.data = _checked_bytes(data, kind, shape)


class _Name:
    """In the place of numpy.ndarray, where it is only named."""


def _array_from_buffer(data: object, kind: object, shape: object, *_: object) -> bytes:
    return _checked_bytes(data, kind, shape)


def _scalar(kind: object, data: object = b"", *_: object) -> Any:
    if not isinstance(kind, _Type) or not isinstance(data, (bytes, bytearray)):
        raise _Refused("a NumPy number of an unknown form")
    return np.frombuffer(data, np.dtype(kind.name).newbyteorder("<"), count=1)[0].item()


def _checked_bytes(data: object, kind: object, shape: object) -> bytes:
    if not isinstance(kind, _Type) or kind.name not in _BYTE_TYPES:
        raise _Refused(f"a NumPy array of type {getattr(kind, 'name', kind)!r}, not of bytes")
    if not isinstance(data, (bytes, bytearray)):
        raise _Refused(f"a NumPy array of {type(data).__name__}")
    if (
        not isinstance(shape, tuple)
        or not all(type(n) is int and n >= 0 for n in shape)
        or math.prod(shape) != len(data)
    ):
        raise _Refused(f"a NumPy array that claims the shape {shape!r} with {len(data)} bytes")
    return data if isinstance(data, bytes) else bytes(data)


def _encode(text: object, encoding: object) -> bytes:
    """How Python 3 writes bytes in protocols up to 2: text of which each character is a byte."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise _Refused(f"_codecs.encode in {encoding!r}")
    return text.encode("latin1")


def _no_bytes(*arguments: object) -> bytes:
    """How Python 3 writes empty bytes in protocols up to 2."""
    if arguments:
        raise _Refused("bytes made from an argument")
    return b""


def _constructor(module: str, name: str) -> Callable[..., Any]:
    core = module.replace("numpy._core", "numpy.core")
    known: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _Name,
        ("numpy", "dtype"): _Type,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
        ("_codecs", "encode"): _encode,
        ("builtins", "bytes"): _no_bytes,
        ("__builtin__", "bytes"): _no_bytes,
    }
    if (core, name) not in known:
        raise _Refused(f"the pickle wants {module}.{name}, which is not admitted; such a file can run any program")
    return known[core, name]


def _pairs(path: Path, loaded: object) -> BinFile:
    form = f"{path} is no verification set: expected (list of 2 P images, list of P booleans)"
    if (
        not isinstance(loaded, (tuple, list))
        or len(loaded) != 2
        or not all(isinstance(x, (list, tuple)) for x in loaded)
    ):
        raise ValueError(f"{form}, got {_kind(loaded)}")
    images, same = loaded
    data = [image.data if isinstance(image, _Array) else image for image in images]
    for i, image in enumerate(data):
        if not isinstance(image, (bytes, bytearray)):
            raise ValueError(f"{form}, image {i} is {_kind(image)}")
    for i, flag in enumerate(same):
        if not isinstance(flag, (bool, int)) or flag not in (0, 1):
            raise ValueError(f"{form}, boolean {i} is {_kind(flag)}")
    if len(data) != 2 * len(same) or not same:
        raise ValueError(f"{form}, got {len(data)} images and {len(same)} booleans")
    return BinFile([bytes(image) for image in data], np.array(same, dtype=bool))


def _kind(value: object) -> str:
    return repr(value) if isinstance(value, (bool, int, float)) else f"a {type(value).__name__.strip('_').lower()}"
