"""insightface's .bin files: what is admitted, and that hostile files do nothing."""

import io
import os
import pickle
import resource
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from sst_fast.evaluation import read_bin


def picture(seed):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


PICTURES = [picture(i) for i in range(4)]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", ["bytes", "bytearray", "array", "tuple"])
def test_every_protocol_and_form(tmp_path, protocol, form):
    images = {
        "bytes": PICTURES, "bytearray": [bytearray(p) for p in PICTURES], "tuple": tuple(PICTURES),
        "array": [np.frombuffer(p, np.uint8) for p in PICTURES],
    }[form]  # fmt: skip
    flags = [np.bool_(True), np.bool_(False)] if form == "array" else [True, 0]
    if form == "bytearray" and protocol < 5:
        pytest.skip("bytearrays are objects of their own kind before protocol 5")
    path = tmp_path / "set.bin"
    path.write_bytes(pickle.dumps((images, flags), protocol=protocol))
    found = read_bin(path)
    assert found.images == PICTURES
    assert found.genuine.tolist() == [True, False]


def test_python_2_wrote_strings(tmp_path):
    """Protocol 2 of Python 2: byte strings by SHORT_BINSTRING and BINSTRING."""
    short, long = PICTURES[0][:200], PICTURES[1]
    path = tmp_path / "set.bin"
    path.write_bytes(
        b"\x80\x02](U"
        + bytes([len(short)])
        + short
        + b"q\x01T"
        + struct.pack("<i", len(long))
        + long
        + b"e]\x88a\x86q\x02."
    )
    assert read_bin(path).images == [short, long]


class Runs:
    """Unpickled as function(*arguments)."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch MARK",), f"{os.system.__module__}.system"),
        (eval, ("open('MARK', 'w')",), "(builtins|__builtin__).eval"),
        (exec, ("open('MARK', 'w')",), "(builtins|__builtin__).exec"),
        (getattr, (Runs(__import__, "os"), "system"), "(builtins|__builtin__).getattr"),
        (np.load, ("MARK",), "numpy.*load"),
        (bytes, (10**10,), "bytes made from an argument"),
    ],
)
def test_globals_are_refused_by_name(tmp_path, monkeypatch, protocol, function, arguments, name):
    monkeypatch.chdir(tmp_path)
    hostile = Runs(function, *arguments)
    for content in ((PICTURES[:2], [hostile]), ([hostile, *PICTURES[:1]], [True]), hostile, [[[hostile]]]):
        path = tmp_path / "set.bin"
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(ValueError, match=name):
            read_bin(path)
    assert not (tmp_path / "MARK").exists()


def test_nested_reductions_of_admitted_names_build_nothing_else(tmp_path):
    """A dtype of objects, an array of arrays, an array's state set on a name, calls of what a call gave."""
    path = tmp_path / "set.bin"
    cases = {
        "array of type 'O8'": pickle.dumps(([np.array([None], dtype=object)] * 2, [True]), 2),
        "type.*not of bytes|array of type 'f8'": pickle.dumps(([np.ones(3)] * 2, [True]), 2),
        "broken pickle": b"cnumpy\nndarray\n(tR(tR.",
        "unknown form": b"cnumpy.core.multiarray\n_reconstruct\n(tR(tb.",
        "instruction INST": b"(ios\nsystem\n.",
        "instruction OBJ": b"(cnumpy\nndarray\no.",
        "instruction NEWOBJ": b"cnumpy\nndarray\n)\x81.",
        "instruction EMPTY_DICT": b"}.",
        "instruction EXT1": b"\x82\x01.",
        "instruction PERSID": b"Pthing\n.",
        "wants posix.system": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        "broken pickle .*": b"\x80\x04K\x01K\x02\x93.",
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_bin(path)


def bombs():
    """Small files that would become large, or claim to be."""
    nested = b"\x80\x02]q\x00(" + b"".join(
        b"]q" + bytes([i]) + b"(" + (b"h" + bytes([i - 1])) * 10 + b"e" for i in range(1, 30)
    ) + b"e."  # fmt: skip
    yield "memo", nested
    yield "memo number", b"\x80\x02]r\xff\xff\xff\x7f."
    yield "memo number in text", b"]p2147483647\n."
    yield "8-byte length", b"\x80\x04\x8e" + struct.pack("<Q", 10 * 2**30) + b"abc."
    yield "4-byte length", b"\x80\x03B" + struct.pack("<I", 2**32 - 1) + b"abc."
    yield "text length", b"\x80\x04\x8d" + struct.pack("<Q", 10 * 2**30) + b"abc."
    yield "bytearray length", b"\x80\x05\x96" + struct.pack("<Q", 10 * 2**30) + b"abc."
    yield "frame", b"\x80\x04\x95" + struct.pack("<Q", 10 * 2**30) + b"N."
    yield "number", b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc."
    shape = pickle.dumps(([np.zeros(3, np.uint8)], [True]), 2).replace(
        b"K\x03\x85", b"\x8a\x05" + (10**10).to_bytes(5, "little") + b"\x85"
    )
    yield "array shape", shape
    text = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000 + b"q\x00"
    again = b"c_codecs\nencode\nq\x01" + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 20_000
    yield "encoded again and again", b"\x80\x02](" + text + again + b"e."
    yield "depth", b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    yield "empty", b""
    yield "no pickle", PICTURES[0]


@pytest.mark.parametrize(("kind", "content"), [pytest.param(*bomb, id=bomb[0]) for bomb in bombs()])
def test_bombs_take_neither_memory_nor_time(tmp_path, kind, content):
    path = tmp_path / "set.bin"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(ValueError, match="is no verification set"):
        read_bin(path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert (after.ru_maxrss - before.ru_maxrss) * (1 if sys.platform == "darwin" else 1024) < 200 * 2**20
    assert after.ru_utime - before.ru_utime < 5


def test_truncated_anywhere(tmp_path):
    whole = pickle.dumps((PICTURES[:2], [True]), 4)
    path = tmp_path / "set.bin"
    for length in [*range(0, 40), *range(40, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is no verification set"):
            read_bin(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((PICTURES[:3], [True]), "got 3 images and 1 booleans"),
        (([], []), "got 0 images and 0 booleans"),
        ((PICTURES[:2], [2]), "boolean 0 is 2"),
        ((PICTURES[:2], [None]), "boolean 0 is a nonetype"),
        ((["text", b""], [True]), "image 0 is a str"),
        (PICTURES, "got a list"),
        (7, "got 7"),
    ],
)
def test_other_contents_are_named(tmp_path, content, message):
    path = tmp_path / "set.bin"
    path.write_bytes(pickle.dumps(content, 4))
    with pytest.raises(ValueError, match=message):
        read_bin(path)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_bin(tmp_path / "none.bin")
