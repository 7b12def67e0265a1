"""List files: which image is whose, a line each, in the forms that people have.

What is unambiguous is detected; anything else is refused with file, line and reason, because a list that is misread trains on
wrong identities without a word.
"""

from __future__ import annotations

import codecs
import csv
import itertools
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sst_fast.data.images import EXTENSIONS, printable
from sst_fast.data.store import Gathered, Strings

SUFFIXES = (".txt", ".lst", ".csv", ".tsv")
# What a first line may call the columns; of several labels one of the first set is meant.
PATH_NAMES = frozenset(
    [
        "path",
        "file",
        "filename",
        "filepath",
        "file_name",
        "file_path",
        "image",
        "image_path",
        "image_id",
        "img",
        "img_path",
    ]
)
LABEL_NAMES = frozenset(
    ["label", "identity", "identity_id", "class", "class_id", "person", "person_id", "subject", "subject_id", "target"]
)
WEAK_LABEL_NAMES = frozenset(["id", "name"])
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
ENDINGS = tuple(EXTENSIONS)


@dataclass(frozen=True)
class Form:
    """How a line is taken apart: fields between separators (quoted or not), or a path with blanks and a label without."""

    separator: str
    path: int  # the path's column; with blanks 0: first, 1: last
    label: int
    columns: int = 2

    def __str__(self) -> str:
        by = {"\t": "tabs", ",": "commas", ";": "semicolons", " ": "blanks"}[self.separator]
        return f"{'path' if self.path < self.label else 'label'} first, separated by {by}"

    def fields(self, line: str) -> list[str] | None:
        """Of one line; None where it has another number of them, or quotes that do not match."""
        if self.separator == " ":
            first, _, last = line.strip().rpartition(" ") if self.path == 0 else line.strip().partition(" ")
            found = [first.strip(" "), last.strip(" ")]
        else:
            try:
                (row,) = csv.reader([line], delimiter=self.separator, skipinitialspace=True, strict=True)
            except (csv.Error, ValueError):
                return None
            found = [field.strip() for field in row]
        return found if len(found) == self.columns and found[self.path] and found[self.label] else None

    def by_suffix(self, line: str) -> tuple[str, str] | None:
        """Path and label, if the path alone ends in an image's suffix."""
        found = self.fields(line)
        if found is None or not is_image(found[self.path]) or is_image(found[self.label]):
            return None
        if self.separator == " " and any(mark in found[self.label] for mark in "\t,;"):
            return None  # separated by those
        return found[self.path], found[self.label]


TWO_COLUMNS = [Form(separator, path, 1 - path) for separator in "\t,; " for path in (0, 1)]


def is_image(path: str) -> bool:
    """Whether its suffix is an image's."""
    return path.lower().endswith(ENDINGS)


def read_list(file: Path) -> tuple[Strings, Strings, NDArray[np.int64]]:
    """Names of the identities in the order in which they come first, paths as written [M], and each image's identity [M].

    Forms: ``path label`` or ``label path``, separated by blanks (then the path may contain blanks, the label may not), tabs,
    commas or semicolons (then fields may be quoted), where the path is the one that ends in an image's suffix; or any such
    table with a first line that names the columns. Empty lines are skipped. UTF-8, or UTF-16 with a byte-order mark.

    Raises:
        ValueError: the form is not clear, or a line has another one; names file and line.
    """
    shown = printable(file)
    lines = text(file).split("\n")
    begin = next((number for number, line in enumerate(lines) if line.strip()), None)
    if begin is None:
        raise ValueError(f"{shown} is an empty list")
    form = header(lines[begin], f"{shown}, line {begin + 1}")
    heading = form is not None
    if form is None:
        form = detect(lines, shown)
    names: dict[str, int] = {}
    paths, identities = Gathered(), array("q")
    for number, line in enumerate(itertools.islice(lines, begin + heading, None), begin + heading + 1):
        if not line.strip():
            continue
        found = _named(form, line) if heading else form.by_suffix(line)
        if found is None:
            raise refused(shown, number, line, form)
        path, label = found
        paths.append(path)
        identities.append(names.setdefault(label, len(names)))
    return Strings.of(names), paths.strings(), np.frombuffer(identities, np.int64)


def _named(form: Form, line: str) -> tuple[str, str] | None:
    found = form.fields(line)
    return None if found is None else (found[form.path], found[form.label])


def header(line: str, where: str) -> Form | None:
    """The form that a first line with the columns' names tells; None: it does not name them.

    Raises:
        ValueError: two columns may be the path, or two the label.
    """
    for separator in "\t,; ":
        names = [
            name.strip().strip('"').lower() for name in (line.split(separator) if separator != " " else line.split())
        ]
        paths = [i for i, name in enumerate(names) if name in PATH_NAMES]
        labels = [i for i, name in enumerate(names) if name in LABEL_NAMES]
        labels = labels or [i for i, name in enumerate(names) if name in WEAK_LABEL_NAMES]
        if not paths or not labels:
            continue
        for what, found in (("path", paths), ("label", labels)):
            if len(found) > 1:
                raise ValueError(f"{where}: the columns {' and '.join(names[i] for i in found)} may both be the {what}")
        if separator == " " and len(names) > 2:
            raise ValueError(f"{where}: more than two columns must be separated by tabs or commas, got {line!r}")
        return Form(separator, paths[0], labels[0], len(names))
    return None


def detect(lines: list[str], shown: str) -> Form:
    """The one form that fits the lines, as many as it takes to exclude the others.

    Raises:
        ValueError: none fits, or several fit all lines.
    """
    left = TWO_COLUMNS
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fitting = [form for form in left if form.by_suffix(line)]
        if not fitting:
            raise refused(shown, number, line, left[0] if len(left) < len(TWO_COLUMNS) else None)
        left = fitting
        if len(left) == 1:
            return left[0]
    number, line = next((number, line) for number, line in enumerate(lines, 1) if line.strip())
    raise ValueError(
        f"{shown}, line {number}: {line!r} may be read as {' or as '.join(map(str, left))}; write the columns' names, "
        "path and label, into the first line"
    )


def refused(shown: str, number: int, line: str, form: Form | None) -> ValueError:
    """For a line that is not of the list's form (None: of no form)."""
    why = ""
    if form is not None:
        why = f", as the lines before ({form})"
    elif any(len(line.split(separator)) > 2 for separator in "\t,;"):
        why = ": more than two columns need a first line with their names, path and label among them"
    elif len([word for word in line.split() if is_image(word)]) > 1:
        why = ": two of its words are images"
    elif len(line.split()) > 1 or "," in line:
        why = f": no path in it ends in one of {' '.join(sorted(EXTENSIONS))}"
    return ValueError(f"{shown}, line {number}: expected 'relative/path label', got {line[:200]!r}{why}")


def text(file: Path) -> str:
    """The file's text, with line ends as ``\\n``.

    Raises:
        ValueError: it is neither UTF-8 nor UTF-16 with a byte-order mark; names the line.
    """
    data = file.read_bytes()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        found = data.decode(encoding)
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{printable(file)}, line {number}: expected {encoding.removesuffix('-sig').upper()}, got the bytes "
            f"{data[error.start : error.start + 8]!r}; save the list as UTF-8"
        ) from None
    if (at := found.find("\0")) >= 0:
        number = found.count("\n", 0, at) + 1
        raise ValueError(f"{printable(file)}, line {number}: holds a null byte; save the list as UTF-8")
    return found.replace("\r\n", "\n").replace("\r", "\n")
