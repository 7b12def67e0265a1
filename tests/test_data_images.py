"""From files to images: what is not surely the right image is one clear error that names the file."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from sst_fast import data
from sst_fast.data.images import MAX_PIXELS, decode, read_file
from sst_fast.train.cli import main


def encoded(image, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width, height, *, bits=8, colour=0, body=b"") -> bytes:
    """A PNG by its parts, header first; each chunk's checksum is right."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(body)),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


CORNERS = np.array([[250, 10], [90, 170]], np.uint8).repeat(16, 0).repeat(16, 1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_upright(format, orientation):
    # What a camera stores: the upright image turned back, by the meaning of the tag (Exif 2.3, table 4).
    stored = {
        1: CORNERS, 2: CORNERS[:, ::-1], 3: CORNERS[::-1, ::-1], 4: CORNERS[::-1], 5: CORNERS.T,
        6: np.rot90(CORNERS), 7: CORNERS[::-1, ::-1].T, 8: np.rot90(CORNERS, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    options = {"PNG": {}, "TIFF": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}[format]
    raw = encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options)
    for channels in (1, 3):
        found = np.array(decode(raw, "image", channels), np.int16).reshape(32, 32, channels)
        assert np.abs(found - CORNERS[:, :, None]).max() <= 8


@pytest.mark.parametrize("format", ["PNG", "PPM", "TIFF"])
def test_sixteen_bit_gray_is_scaled(format):
    wide = np.array([[0, 128, 129, 257], [32896, 65535, 60000, 1000]], np.uint16)
    raw = encoded(Image.fromarray(wide), format)
    expected = np.round(wide / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.array(decode(raw, "image", 1)), expected)
    np.testing.assert_array_equal(np.array(decode(raw, "image", 3)), expected[:, :, None].repeat(3, 2))


def test_sixteen_bit_gray_is_turned_too():
    exif = Image.Exif()
    exif[274] = 6
    wide = (np.rot90(CORNERS).astype(np.uint16) * 257).copy()
    np.testing.assert_array_equal(np.array(decode(encoded(Image.fromarray(wide), exif=exif), "image", 1)), CORNERS)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
WHOLE = encoded(NOISE)
BROKEN = {
    "empty": b"",
    "text": b"no picture",
    "png_chunk": WHOLE.replace(b"IDAT", b"I\x00AT"),
    "png_header": WHOLE[:16] + b"\0" * 17 + WHOLE[33:],
    "png_header_short": WHOLE[:8] + struct.pack(">I", 4) + b"IHDR" + b"\0" * 8 + WHOLE[33:],
    "png_truncated": WHOLE[: len(WHOLE) // 2],
    "png_flipped": WHOLE[:200] + bytes([WHOLE[200] ^ 4]) + WHOLE[201:],
    "png_short_body": png(50, 50, body=b"\0" * 100),
    "png_compressed_text": WHOLE[:33] + struct.pack(">I", 9) + b"zTXtkey\0\0bad!" + b"\0" * 4 + WHOLE[33:],
    "jpeg_truncated": encoded(NOISE, "JPEG")[:700],
    "gif_truncated": encoded(NOISE, "GIF")[:300],
    "bmp_truncated": encoded(NOISE, "BMP")[:300],
    "tiff_truncated": encoded(NOISE, "TIFF")[:300],
    "webp_truncated": encoded(NOISE, "WEBP")[:100],
    "pgm_word": b"P5 ten 10 255\n" + b"\0" * 100,
    "pgm_maxval": b"P5 10 10 70000\n" + b"\0" * 100,
    "pgm_zero": b"P5 0 10 255\n",
    "pgm_short": b"P5 10 10 255\n" + b"\0" * 50,
    "pgm_endless": b"P5 " + b"1" * 100,
    "pgm_cut": b"P5 10",
    "tiff_floats": encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    "tiff_integers": encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"),
    "bomb": png(12000, 12000, body=b""),
    "larger_bomb": png(2**31 - 1, 2**31 - 1),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("error")
def test_a_broken_file_is_one_error_that_names_it(tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(data.DataError) as caught:
        data.read(path, 32, 3)
    assert str(caught.value).startswith(f"{path} cannot be read as an image: ")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_limits_are_said(tmp_path):
    with pytest.raises(data.DataError, match=r"12000 x 12000 pixels, at most 67,108,864 are decoded"):
        decode(BROKEN["bomb"], "image", 3)
    assert decode(png(8192, 8192, bits=1, body=b"\0" * 1025 * 8192), "image", 1).size == (8192, 8192)
    assert MAX_PIXELS == 8192 * 8192
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)  # sparse
    with pytest.raises(data.DataError, match=r"268,435,457 bytes, at most 268,435,456 are read"):
        read_file(path)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    for name, reason in [
        ("fifo", "it is a FIFO"),
        ("zero", "it is a device"),
        ("folder", "Is a directory"),
        ("gone", "No such file"),
    ]:
        with pytest.raises(data.DataError, match=rf"{name}.jpg cannot be read as an image: {reason}"):
            data.read(tmp_path / f"{name}.jpg", 32, 1)
    with pytest.raises(data.DataError, match=r"null (byte|character)"):
        data.read("a\0.png", 32, 1)


def test_a_name_that_is_no_utf8_can_be_read_and_told(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"\xe9.png")
    with open(path, "wb") as file:
        file.write(WHOLE)
    assert data.read(os.fsdecode(path), 32, 3).size == (32, 32)
    with open(path, "wb") as file:
        file.write(b"?")
    with pytest.raises(data.DataError, match=r"\\xe9.png cannot be read"):
        data.read(os.fsdecode(path), 32, 3)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_error_from_a_worker_is_as_short(faces, method):
    broken = faces / "p0" / "0.png"
    broken.write_bytes(b"no picture")
    pairs = data.Pairs(data.faces(faces).subset([0]).shallow(1, seed=2), 32, 1, seed=0)
    pairs.faces.numbers[:] = 0
    loader = torch.utils.data.DataLoader(pairs, num_workers=1, multiprocessing_context=method)
    with pytest.raises(data.DataError) as caught:
        list(loader)
    assert str(caught.value).startswith(f"{broken} cannot be read as an image: it is none of JPEG, ")
    assert "\n" not in str(caught.value)


def test_the_command_line_says_one_line(faces, tmp_path, capfd):
    broken = faces / "p0" / "0.png"
    for image in (faces / "p0").iterdir():
        image.unlink()
    broken.write_bytes(BROKEN["png_chunk"])
    assert main(["train", "--data.root", str(faces), "--data.size", "32", "--out", str(tmp_path / "r"), "--epochs", "1",
                 "--batch", "12", "--dim", "16", "--width", "0.125", "--queue_size", "12", "--data.workers", "1",
                 "--device", "cpu"]) == 1  # fmt: skip
    told = [line for line in capfd.readouterr().err.splitlines() if "cannot be read" in line]
    assert len(told) == 1
    assert told[0].startswith(f"sst-fast train: {broken} cannot be read as an image: ")


@pytest.mark.parametrize("suffix", ["tif", "tiff", "jfif", "jpe", "gif", "GIF", "pnm", "webp", "bmp", "JPG"])
def test_every_suffix_is_found_and_read(tmp_path, suffix):
    formats = {"tif": "TIFF", "gif": "GIF", "pnm": "PPM", "webp": "WEBP", "bmp": "BMP"}
    format = formats.get(suffix.lower().removesuffix("f") if suffix == "tiff" else suffix.lower(), "JPEG")
    for person in "ab":
        (tmp_path / person).mkdir()
        NOISE.save(tmp_path / person / f"0.{suffix}", format)
    images, labels = data.all_images(data.faces(tmp_path), 32, 3)
    assert labels.tolist() == [0, 1]
    assert images.std() > 0.1


@pytest.mark.filterwarnings("error")
def test_what_systems_leave_behind_is_neither_identity_nor_image(faces):
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "p0/.thumbnails", "p0/__MACOSX"):
        (faces / folder).mkdir()
        NOISE.save(faces / folder / "0.png")
    for file in (
        "p0/._0.png",
        "p0/.hidden.jpg",
        "p0/Thumbs.db",
        "p0/.DS_Store",
        "p0/desktop.ini",
        "Thumbs.db",
        "._x.png",
    ):
        (faces / file).write_bytes(b"?")
    found = data.faces(faces)
    assert found.names == sorted(f"p{i}" for i in range(12))
    assert [path.name for path in found.paths[0]] == ["0.png", "1.png", "2.png"]
    (faces / "p0" / "circle").symlink_to(faces)
    assert len(data.images_below(faces)) == 36


def test_what_else_is_left_out_is_told_once(faces):
    (faces / "p0" / "0.heic").write_bytes(b"?")
    (faces / "p0" / "1.heic").write_bytes(b"?")
    (faces / "p1" / "deeper").mkdir()
    (faces / "empty").mkdir()
    NOISE.save(faces / "beside.png")
    with pytest.warns(UserWarning, match="left out of") as caught:
        assert len(data.faces(faces).names) == 12
    assert len(caught) == 1
    told = str(caught[0].message)
    for part in ("2 files whose suffix is no image's (as ", "0.heic", "1 folders inside an identity's (as ", "1 empty folders",
                 "1 files beside the identities' folders"):  # fmt: skip
        assert part in told


def test_a_fifo_among_the_images_is_refused_when_the_folder_is_read(faces):
    os.mkfifo(faces / "p3" / "x.jpg")
    with pytest.raises(ValueError, match=r"p3/x.jpg is a FIFO, expected an image file"):
        data.faces(faces)
