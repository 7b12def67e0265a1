"""``sst-fast data``: what is in a data set, its shallow subsets, other formats."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sst_fast.data.convert import Format, convert
from sst_fast.data.emoji import emoji
from sst_fast.data.formats import faces
from sst_fast.data.glyphs import glyphs
from sst_fast.data.identities import Faces, flat
from sst_fast.data.images import FORMATS, DataError, decode, printable, progress
from sst_fast.data.pairs import OnError, Unreadable
from sst_fast.data.store import Selected

SHOWN = 5  # examples of each kind


def info(root: str, decoded: bool = False, quick: bool = False, workers: int = 0) -> None:
    """Prints what is in a data set: format, identities, images of each, sizes, duplicates, unreadable ones.

    Args:
        root: the data set.
        decoded: decode every image, which finds all that cannot be read; otherwise only headers are read.
        quick: read no image: sizes, duplicates and unreadable images are not reported.
        workers: processes that read images.
    """
    found = faces(root)
    print("\n".join(summary(found)))
    if quick:
        return
    images, labels = flat(found)
    census = Census(images, decoded)
    loader = torch.utils.data.DataLoader(census, 64, num_workers=workers, collate_fn=list, generator=torch.Generator())
    rows: list[tuple[int, int, int, str]] = []
    try:
        with progress(total=len(images), unit="image") as bar:
            for batch in loader:
                rows += batch
                bar.update(len(batch))
    except KeyboardInterrupt:
        print(f"interrupted after {len(rows):,} of {len(images):,} images; of those:")
    print("\n".join(counted(rows, images, labels.numpy(), found)))


def shallow(
    root: str, out: str, images: int = 2, seed: int = 0, format: Format = "auto", on_error: OnError = "stop"
) -> None:
    """Writes a data set with at most so many images of each identity, chosen by seed: the paper's shallow data.

    Args:
        root: the data set.
        out: a new file or folder.
        images: most images of each identity; identities with fewer keep all.
        seed: another seed chooses other images.
        format: format of the result; 'auto': by the suffix of OUT.
        on_error: what happens if an image cannot be read: 'stop', or 'skip' it and note it in OUT.unreadable.txt.
    """
    write(faces(root).shallow(images, seed), out, format, on_error)


def change(root: str, out: str, format: Format = "auto", on_error: OnError = "stop") -> None:
    """Writes a data set in another format; image files stay as they are.

    Args:
        root: the data set.
        out: a new file or folder.
        format: format of the result; 'auto': by the suffix of OUT (a list file, .lmdb, .tar), else a folder per identity.
        on_error: what happens if an image cannot be read: 'stop', or 'skip' it and note it in OUT.unreadable.txt.
    """
    write(faces(root), out, format, on_error)


COMMANDS: dict[str, Callable[..., None]] = {
    "info": info,
    "shallow": shallow,
    "convert": change,
    "glyphs": glyphs,
    "emoji": emoji,
}


def add(parser: Any, parser_of: Callable[[str], Any]) -> None:
    """The commands above as sub-commands of jsonargparse's ``parser``; ``parser_of`` makes one from its description."""
    commands = parser.add_subcommands(required=True, dest="action")
    for name, function in COMMANDS.items():
        help = (function.__doc__ or "").split("\n")[0]
        sub = parser_of(help)
        sub.add_function_arguments(function, as_positional=True)
        commands.add_subcommand(name, sub, help=help)


def run(chosen: Any) -> None:
    """What the parsed command asks for."""
    options = chosen[chosen.action].as_dict()
    try:
        COMMANDS[chosen.action](**options)
    except KeyboardInterrupt:
        if "out" not in options:
            raise
        raise Interrupted(f"interrupted; nothing has been written to {printable(options['out'])}") from None


def write(found: Faces, out: str, format: Format, on_error: OnError) -> None:
    """Converts and prints how much."""
    skipped = Unreadable(f"{out}.unreadable.txt") if on_error == "skip" else None
    count = convert(found, out, format, skipped)
    print(f"{count:,} images in {printable(out)}")
    if skipped:
        print(f"{len(skipped):,} images could not be read and were skipped: {printable(skipped.path)}")


class Interrupted(OSError):
    """Ctrl-C came."""


class Census(torch.utils.data.Dataset[tuple[int, int, int, str]]):
    """Of each image: hash of its bytes, width, height, and its format, or after '!' why it cannot be read."""

    def __init__(self, images: Selected, decoded: bool) -> None:
        self.images, self.decoded = images, decoded

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, int, int, str]:
        number = int(self.images.numbers[index])
        content: Any = b""
        try:
            content = self.images.store.read(number)
            if isinstance(content, Image.Image):
                return digest(content.tobytes()), *content.size, "decoded"
            name = self.images.store.name(number)
            try:
                with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                    size, kind = image.size, image.format or ""
            except Exception:  # whatever a broken header leads to: decode says it in words
                size, kind = (0, 0), ""
            if self.decoded or not kind:
                decode(content, name, 3)
            return digest(content), *size, kind
        except DataError as error:
            return digest(content) if isinstance(content, bytes) else 0, 0, 0, f"!{error}"


def digest(content: bytes) -> int:
    """63 bits: among a hundred million different images, two are taken for the same with a probability of 1 in 2,000."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def summary(found: Faces) -> list[str]:
    """Format, identities, images, and how many identities have how many."""
    counts = found.counts
    lines = [
        f"format      {found.store.format}",
        f"identities  {len(found.names):,}",
        f"images      {len(found.numbers):,}",
        f"depth       {counts.min():,} to {counts.max():,} images of an identity, median {np.median(counts):g}",
    ]
    first = 1
    while first <= counts.max():
        last = first if first < 3 else 2 ** (first - 1).bit_length() if first > 3 else 4
        number = int(((counts >= first) & (counts <= last)).sum())
        if number:
            label = f"{first:,}" if first == last else f"{first:,} to {last:,}"
            lines.append(f"            {label}: {number:,} identities")
        first = last + 1
    return lines


def counted(
    rows: list[tuple[int, int, int, str]], images: Selected, labels: NDArray[np.int64], found: Faces
) -> list[str]:
    """Sizes, file formats, duplicates and unreadable images among the first rows."""
    broken = [(i, row[3][1:]) for i, row in enumerate(rows) if row[3].startswith("!")]
    whole = np.array([i for i, row in enumerate(rows) if not row[3].startswith("!")], np.int64)
    lines = []
    for what, values in (
        ("sizes", [f"{row[1]} x {row[2]}" for row in rows if not row[3].startswith("!")]),
        ("files", [row[3] for row in rows if not row[3].startswith("!")]),
    ):
        kinds, counts = np.unique(np.array(values, dtype=str), return_counts=True)
        order = np.argsort(-counts, kind="stable")
        shown = [f"{kinds[k]}: {counts[k]:,}" for k in order[:SHOWN]]
        more = [f"{len(order) - SHOWN:,} others: {counts[order[SHOWN:]].sum():,}"] if len(order) > SHOWN else []
        lines.append(f"{what:<12}{', '.join(shown + more) or 'none'}")
    hashes = np.array([rows[i][0] for i in whole], np.int64)
    _, first, group, counts = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    copies = np.flatnonzero(counts[group] > 1)
    copies = copies[first[group[copies]] != copies]
    originals = first[group[copies]]
    others = labels[whole[copies]] != labels[whole[originals]]
    lines.append(
        f"duplicates  {len(copies):,} images repeat another's bytes, {int(others.sum()):,} of them another identity's"
    )
    for k in np.concatenate([np.flatnonzero(others), np.flatnonzero(~others)])[:SHOWN]:
        lines.append(f"            {images[int(whole[copies[k]])]} = {images[int(whole[originals[k]])]}")
    lines.append(f"unreadable  {len(broken):,}")
    lines += [f"            {reason}" for _, reason in broken[:SHOWN]]
    return lines
