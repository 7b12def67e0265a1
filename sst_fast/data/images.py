"""From stored bytes to images, as safe as can be: what is not surely the right image is a :class:`DataError`.

Pillow decodes, also where torchvision is installed: it reads every format that people store faces in, and an image has the
same pixels whatever else is installed, which exact resuming needs. An augmentation may well use torchvision
(``data.augment``).
"""

from __future__ import annotations

import functools
import io
import os
import stat
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

MEAN, STD = 127.5, 128.0  # a network sees (pixel - MEAN) / STD
EXTENSIONS = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pbm", ".pgm", ".ppm", ".pnm"]
)  # of files that are taken for images, in lower case
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # what is decoded, whatever the suffix says
MAX_PIXELS = 1 << 26  # 67 megapixels, 256 MiB decoded: more is refused before it is decoded
MAX_BYTES = 1 << 28  # 256 MiB: larger files are refused before they are read

# What goes through many images shows a bar, if it takes more than a second; a log, which would keep every state of it, gets none.
progress = functools.partial(tqdm, leave=False, delay=1, disable=None)


class DataError(ValueError):
    """One image or record that cannot be read; the message names it and says why.

    It says the same when it comes from a worker process: there a ``DataLoader`` makes a traceback the message of an exception
    of the same class, of which only the last line is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip())


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file.

    Raises:
        DataError: it cannot be read, is no regular file (a FIFO or a device would never end), or is larger than MAX_BYTES.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for somebody who writes.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{printable(path)} cannot be read as an image: it is {kind_of_file(status.st_mode)}")
            if status.st_size > MAX_BYTES:
                raise DataError(
                    f"{printable(path)} cannot be read as an image: it has {status.st_size:,} bytes, at most {MAX_BYTES:,} are read"
                )
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, DataError):
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(f"{printable(path)} cannot be read as an image: {reason}") from None


def kind_of_file(mode: int) -> str:
    """In words, from ``os.stat``."""
    kinds = {
        stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
        stat.S_IFDIR: "a folder", stat.S_IFREG: "a file",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "no regular file")


def printable(path: str | os.PathLike[str]) -> str:
    """A path for a message: bytes that are no UTF-8 are shown by their numbers."""
    return os.fspath(path).encode(errors="surrogateescape").decode(errors="backslashreplace")


def decode(data: bytes, name: str, channels: int) -> Image.Image:
    """The image that these bytes hold, upright by its EXIF orientation, as 8-bit gray (``channels`` 1) or RGB (3).

    16-bit gray is scaled to 8 bits; of an animation or a file with several pages the first is taken; transparency is dropped.

    Raises:
        DataError: they hold no whole image of FORMATS, more than MAX_PIXELS, or pixels whose white is not defined (32-bit
            integers, floating point); names ``name``.
    """
    reason: object
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        with image:
            if image.width * image.height <= MAX_PIXELS:
                ImageOps.exif_transpose(image, in_place=True)
                return eight_bits(image, image.format).convert("L" if channels == 1 else "RGB")
            reason = f"it has {image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are decoded"
    except UnidentifiedImageError:
        reason = f"it is none of {', '.join(FORMATS)}, or its header is broken" if data else "it is empty"
    except Image.DecompressionBombError:
        reason = f"it has more than {MAX_PIXELS:,} pixels"
    except Exception as error:  # Pillow's decoders raise whatever a broken file leads to
        reason = str(error) or type(error).__name__
    raise DataError(f"{name} cannot be read as an image: {reason}")


def eight_bits(image: Image.Image, format: str | None) -> Image.Image:
    """The same image, 16-bit gray scaled to 8 bits, which Pillow's ``convert`` would cut off at 255.

    Raises:
        ValueError: pixels of 32 bits, of which nobody knows which value is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray(((wide + 128) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit {'integers' if image.mode == 'I' else 'floats'}, expected 8 or 16 bits"
        )
    return image


def square(image: Image.Image, size: int) -> Image.Image:
    """Centre-cropped to a square and resized to ``size`` pixels, bilinearly with antialiasing."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def read(path: str | os.PathLike[str], size: int, channels: int) -> Image.Image:
    """The image file as gray (1 channel) or RGB (3), centre-cropped to a square and resized to ``size`` pixels.

    Raises:
        DataError: see :func:`read_file` and :func:`decode`.
    """
    return square(decode(read_file(path), printable(path), channels), size)


def to_tensor(image: Image.Image) -> Tensor:
    """(pixel - 127.5) / 128 as float32 [channels, size, size]."""
    pixels = np.array(image)
    pixels = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return torch.from_numpy(pixels).float().sub_(MEAN).mul_(1 / STD)  # exact: STD is a power of two
