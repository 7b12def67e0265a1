"""Data sets that Python hands in: Hugging Face's ``datasets``, or any map-style dataset of (image, label)."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from sst_fast.data.identities import Faces
from sst_fast.data.images import DataError, eight_bits, progress, read_file
from sst_fast.data.store import Strings


class Items:
    """Images of a map-style dataset: ``dataset[number][image]``."""

    def __init__(self, dataset: Any, image: str | int, format: str) -> None:
        self.dataset, self.image, self.format = dataset, image, format

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, number: int) -> str:
        """The dataset and the item's number."""
        return f"{type(self.dataset).__name__}, item {number}"

    def read(self, number: int) -> bytes | Image.Image:
        """The image, encoded where the dataset gives bytes or a path."""
        try:
            return image_of(self.dataset[number][self.image])
        except Exception as error:  # whatever the dataset's own code raises
            raise DataError(f"{self.name(number)} cannot be read: {error or type(error).__name__}") from error


def image_of(value: Any) -> bytes | Image.Image:
    """What datasets give for an image, as its encoded bytes or as a Pillow image of 8 bits, upright.

    Bytes; a path; a dict with one of the two as ``bytes`` or ``path`` (Hugging Face's undecoded images); a Pillow image; a NumPy array
    [H, W], [H, W, 1] or [H, W, 3] or a tensor [H, W], [1, H, W] or [3, H, W], both uint8.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | os.PathLike):
        return read_file(value)
    if isinstance(value, Image.Image):
        return eight_bits(ImageOps.exif_transpose(value), value.format)
    if isinstance(value, torch.Tensor):
        value = (value.movedim(0, -1) if value.ndim == 3 else value).numpy(force=True)
    if (
        isinstance(value, np.ndarray)
        and value.dtype == np.uint8
        and (value.ndim == 2 or value.shape[2:] in ((1,), (3,)))
    ):
        return Image.fromarray(np.ascontiguousarray(value[:, :, 0] if value.shape[2:] == (1,) else value))
    told = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
    raise TypeError(f"expected an image as bytes, path, Pillow image or uint8 array of 1 or 3 channels, got {told}")


def package() -> Any:
    """Hugging Face's package datasets.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"Hugging Face's data sets need the extra: pip install 'sst-fast[data]' ({error})") from error
    return datasets


def from_dataset(
    dataset: Any, *, image: str | int | None = None, label: str | int | None = None, labels: Sequence[Any] | None = None
) -> Faces:
    """Identities of a dataset that was made in Python, to train on: ``loop.train(config, data.from_dataset(dataset), None)``.

    Args:
        dataset: Hugging Face's ``datasets.Dataset``, or anything with ``len`` and items by number; in spawned workers it must be
            picklable.
        image, label: a column's name or an item's place; by default 'image' and 'label' of Hugging Face's, 0 and 1 of others.
        labels: each item's, where reading them from ``dataset`` would take long. By default its attribute ``targets`` or
            ``labels`` (torchvision's), else every item is read once.

    Identities are in order of their labels; where the dataset has names for those (``ClassLabel``, ``classes``), they are used.

    Raises:
        ValueError: there is no such column, not one label for each item, or fewer than two identities.
    """
    if isinstance(dataset, Mapping):
        raise ValueError(f"dataset: expected one split, got several: {', '.join(map(str, dataset))}")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"dataset: expected items by number, got the stream {type(dataset).__name__}")
    names = None
    if hasattr(dataset, "column_names") and hasattr(dataset, "cast_column"):
        datasets = package()
        image, label = image or "image", label or "label"
        for what, column in (("image", image), ("label", label)):
            if column not in dataset.column_names:
                raise ValueError(f"{what}: there is no column {column!r}, only {', '.join(dataset.column_names)}")
        if labels is None:
            labels = dataset.select_columns([label]).with_format("arrow")[:].column(label).to_pylist()
        names = getattr(dataset.features[label], "names", None)
        if isinstance(dataset.features[image], datasets.Image):
            dataset = dataset.cast_column(image, datasets.Image(decode=False))
        dataset = dataset.select_columns([image]).with_format(None)
        format = "Hugging Face datasets"
    else:
        image, label = 0 if image is None else image, 1 if label is None else label
        labels = next(
            (v for v in (labels, *(getattr(dataset, n, None) for n in ("targets", "labels"))) if v is not None), None
        )
        if labels is None:
            labels = [dataset[i][label] for i in progress(range(len(dataset)), unit="item", desc="labels")]
        names = getattr(dataset, "classes", None)
        format = "map-style dataset"
    values, identities = np.unique(np.asarray(labels), return_inverse=True)
    if identities.shape != (len(dataset),):
        raise ValueError(
            f"labels: expected one for each of {len(dataset)} items, got the shape {list(np.shape(labels))}"
        )
    if len(values) < 2:
        raise ValueError(f"dataset must hold at least two identities, found {len(values)}")
    if names is not None and np.issubdtype(values.dtype, np.integer) and values[0] >= 0 and values[-1] < len(names):
        strings = Strings.of(str(names[value]) for value in values)
    else:
        strings = Strings.of(map(str, values))
    return Faces.by_identity(strings, Items(dataset, image, format), identities)


def open_saved(root: Path) -> Faces:
    """A folder that Hugging Face's ``Dataset.save_to_disk`` has written.

    Raises:
        ImportError: datasets is not installed. ValueError: see :func:`from_dataset`.
    """
    return from_dataset(package().load_from_disk(str(root)))


def is_import_path(text: str) -> bool:
    """Whether this reads like ``package.module:name``."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", text) is not None


def imported(path: str, option: str) -> Any:
    """What ``package.module:name`` stands for. Modules in the working folder are found too, after all others.

    Raises:
        ValueError: it cannot be imported; names ``option``.
    """
    module, _, name = path.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:  # an installed command does not look there
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option}: {path!r} cannot be imported: {error}") from error
    return found


def open_imported(path: str) -> Faces:
    """The dataset that ``package.module:name`` is, or that it returns when called without arguments.

    Raises:
        ValueError: it cannot be imported, or see :func:`from_dataset`.
    """
    found = imported(path, "data.root")
    if isinstance(found, type) or not hasattr(found, "__getitem__"):
        if not callable(found):
            raise ValueError(f"data.root: {path!r} is neither a dataset nor a function that returns one, but {found!r}")
        found = found()
    return found if isinstance(found, Faces) else from_dataset(found)
