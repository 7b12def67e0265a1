"""Every format gives the same identities and images, in any worker, and says clearly what is wrong with a broken one."""

import io
import json
import os
import pickle
import struct
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from sst_fast import data
from sst_fast.data import index, recordio, tars
from sst_fast.data.store import Strings
from sst_fast.train.cli import main

PEOPLE = {"ann": 3, "bob": 1, "cyd": 2}


def encoded(number: int) -> bytes:
    """A PNG of one gray, which tells its number."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 10 * number).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [(name, encoded(i)) for i, name in enumerate(n for n, count in PEOPLE.items() for _ in range(count))]


def record(label, number, image, length=None) -> bytes:
    """insightface's: one float as label, or several, which then stand behind the header."""
    if isinstance(label, tuple):
        content = struct.pack("<IfQQ", len(label), 0, number, 0) + struct.pack(f"<{len(label)}f", *label) + image
    else:
        content = struct.pack("<IfQQ", 0, label, number, 0) + image
    return framed(content)


def framed(content: bytes) -> bytes:
    """dmlc's RecordIO: cut at every aligned MAGIC, which is left out."""
    magic = struct.pack("<I", recordio.MAGIC)
    cuts = [at for at in range(0, len(content) - 3, 4) if content[at : at + 4] == magic]
    parts = [content[a:b] for a, b in zip([0, *(c + 4 for c in cuts)], [*cuts, len(content)], strict=True)]
    out = b""
    for i, part in enumerate(parts):
        kind = 0 if len(parts) == 1 else 1 if i == 0 else 3 if i == len(parts) - 1 else 2
        out += magic + struct.pack("<I", kind << 29 | len(part)) + part + b"\0" * (-len(part) % 4)
    return out


def write_records(folder, records) -> None:
    folder.mkdir(exist_ok=True)
    at, lines = 0, []
    with (folder / "train.rec").open("wb") as file:
        for key, content in records:
            lines.append(f"{key}\t{at}\n")
            at += file.write(content)
    (folder / "train.idx").write_text("".join(lines))


def insightface(folder, *, several=False, lie=False) -> None:
    """Images 1 to 6, identities 7 to 9, record 0 that says so."""
    names = list(PEOPLE)
    records = [(0, record((7.0, 10.0), 0, b""))]
    for i, (name, image) in enumerate(IMAGES):
        label = float(names.index(name))
        records.append((i + 1, record((label, 0.0) if several else label, i + 1, image)))
    ranges = [(1.0, 4.0), (4.0, 5.0), (5.0, 7.0)] if not lie else [(1.0, 3.0), (3.0, 5.0), (5.0, 7.0)]
    records += [(7 + i, record(r, 7 + i, b"")) for i, r in enumerate(ranges)]
    write_records(folder, records)
    (folder / "property").write_text("3,8,8")


def as_folder(root):
    for i, (name, image) in enumerate(IMAGES):
        (root / "set" / name).mkdir(parents=True, exist_ok=True)
        (root / "set" / name / f"{i}.png").write_bytes(image)
    return root / "set"


def as_list(root):
    as_folder(root)
    (root / "set" / "all.csv").write_text(
        "path,label\n" + "".join(f"{n}/{i}.png,{n}\n" for i, (n, _) in enumerate(IMAGES))
    )
    return root / "set" / "all.csv"


def as_recordio(root):
    insightface(root / "set")
    return root / "set"


def as_recordio_of_several_labels(root):
    insightface(root / "set", several=True)
    return root / "set" / "train.rec"


def as_recordio_with_wrong_ranges(root):
    insightface(root / "set", lie=True)
    return root / "set"


def as_im2rec(root):
    """Images only, shuffled."""
    names, order = list(PEOPLE), [4, 0, 5, 3, 2, 1]
    write_records(root / "set", [(i, record(float(names.index(IMAGES[i][0])), i, IMAGES[i][1])) for i in order])
    return root / "set"


def as_lmdb(root):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(root / "set"), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for i, (name, image) in enumerate(IMAGES):
            transaction.put(f"{name}/{i}.png".encode(), image)
    return root / "set"


def as_lmdb_file(root):
    lmdb = pytest.importorskip("lmdb")
    with (
        lmdb.open(str(root / "set.lmdb"), map_size=1 << 24, subdir=False) as environment,
        environment.begin(write=True) as t,
    ):
        for i, (name, image) in enumerate(IMAGES):
            t.put(f"{name}/{i}".encode(), image)
    return root / "set.lmdb"


def as_shards(root, **fields):
    webdataset = pytest.importorskip("webdataset")
    (root / "set").mkdir()
    with webdataset.ShardWriter(str(root / "set" / "faces-%03d.tar"), maxcount=2, verbose=0) as writer:
        for i, (name, image) in enumerate(IMAGES):
            writer.write({"__key__": f"{i:06d}", "png": image, "cls": list(PEOPLE).index(name)})
    return root / "set"


def as_shards_with_json(root):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(root / "set.tar")) as writer:
        for i, (name, image) in enumerate(IMAGES):
            writer.write({"__key__": f"{i:06d}", "image.png": image, "json": {"identity": name}})
    return root / "set.tar"


def as_shards_of_folders(root):
    with (
        tarfile.open(root / "set-0.tar", "w") as one,
        tarfile.open(root / "set-1.tar", "w", format=tarfile.GNU_FORMAT) as two,
    ):
        for i, (name, image) in enumerate(IMAGES):
            info = tarfile.TarInfo(f"{'long' * 40}/{name}/{i}.png")
            info.size = len(image)
            (one if i < 2 else two).addfile(info, io.BytesIO(image))
    return root / "set-{0..1}.tar"


def as_saved_dataset(root):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*PEOPLE, "nobody"])})
    rows = {"image": [{"bytes": image, "path": None} for _, image in IMAGES], "label": [name for name, _ in IMAGES]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root / "set"))
    return root / "set"


WRITERS = [value for name, value in list(globals().items()) if name.startswith("as_")]


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
@pytest.mark.filterwarnings("ignore:left out of")
def test_every_format_gives_the_same(tmp_path, write):
    found = data.faces(write(tmp_path))
    assert list(found.names) in (list(PEOPLE), ["0", "1", "2"])
    assert found.counts.tolist() == list(PEOPLE.values())
    images, labels = data.all_images(found, 8, 1)
    np.testing.assert_allclose((images * data.STD + data.MEAN)[:, 0, 0, 0], [0, 10, 20, 30, 40, 50], atol=1e-4)
    assert labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert [found.store.read(int(n)) for n in found.numbers] == [image for _, image in IMAGES]


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
@pytest.mark.filterwarnings("ignore:left out of")
def test_workers_read_what_the_first_process_has_open(tmp_path, write):
    found = data.faces(write(tmp_path))
    here = torch.cat(list(data.image_batches(data.flat(found)[0], 8, 1)))
    for _ in range(2):
        forked = torch.cat(list(data.image_batches(data.flat(found)[0], 8, 1, batch=2, workers=2)))
        assert torch.equal(here, forked)
        assert torch.equal(here, torch.cat(list(data.image_batches(data.flat(found)[0], 8, 1))))
    again = pickle.loads(pickle.dumps(found))  # what a spawned worker gets
    assert torch.equal(here, data.all_images(again, 8, 1)[0])


@pytest.mark.parametrize(
    "write", [as_folder, as_recordio, as_lmdb, as_shards, as_saved_dataset], ids=lambda w: w.__name__
)
def test_subsets_follow_from_the_seed_alone(tmp_path, write):
    found = data.faces(write(tmp_path))
    one, two = found.shallow(2, seed=5), found.subset([2, 0]).shallow(1, seed=5)
    assert one.counts.tolist() == [2, 1, 2]
    assert two.names == [found.names[2], found.names[0]]
    assert two.counts.tolist() == [1, 1]
    np.testing.assert_array_equal(one.numbers, found.shallow(2, seed=5).numbers)
    assert set(two.images(0)) <= set(found.images(2))


def test_shallow_subsets_are_fair():
    """Of five images every one is chosen equally often, each pair too, and other seeds choose otherwise."""
    people, each = 4000, 5
    faces = data.Faces.by_identity(
        Strings.of(map(str, range(people))), data.faces("orl").store, np.repeat(np.arange(people), each)
    )
    for seed in range(3):
        chosen = faces.shallow(2, seed).numbers.reshape(people, 2) % each
        pairs = np.bincount(chosen[:, 0] * each + chosen[:, 1], minlength=25).reshape(5, 5)
        expected = people / 10
        statistic = (((pairs - expected) ** 2) / expected)[np.triu_indices(5, 1)].sum()
        assert statistic < 30  # chi-square of 9 degrees of freedom: 99.9 % lie below 27.9
    assert not np.array_equal(faces.shallow(2, 0).numbers, faces.shallow(2, 1).numbers)
    for first, second in zip(faces.shallow(2, 0).numbers[::2], faces.shallow(2, 0).numbers[1::2], strict=True):
        assert first < second


def test_a_million_identities_are_kept_in_an_index(tmp_path, monkeypatch):
    root = as_folder(tmp_path)
    monkeypatch.setattr(index, "LEAST", 1)
    long_ago = 10**18
    for folder in (root, *root.iterdir()):
        os.utime(folder, ns=(long_ago, long_ago))
    first = data.faces(root)
    kept = tmp_path / ".set.sst-fast-index.npz"
    assert kept.exists()
    with monkeypatch.context() as patch:
        patch.setattr("sst_fast.data.identities._search", None)  # not called
        again = data.faces(root)
    assert again.names == first.names
    assert again.store.paths == first.store.paths
    (root / "bob" / "new.png").write_bytes(IMAGES[0][1])  # the index is stale
    assert data.faces(root).counts.tolist() == [3, 2, 2]
    kept.write_bytes(b"broken")
    assert data.faces(root).counts.tolist() == [3, 2, 2]


def test_an_index_of_what_has_just_changed_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "LEAST", 1)
    data.faces(as_folder(tmp_path))
    assert not (tmp_path / ".set.sst-fast-index.npz").exists()


@pytest.mark.parametrize("write", [as_list, as_recordio, as_lmdb, as_shards], ids=lambda w: w.__name__)
def test_other_formats_are_indexed_too(tmp_path, monkeypatch, write):
    root = write(tmp_path)
    monkeypatch.setattr(index, "LEAST", 1)
    for file in root.iterdir() if root.is_dir() else [root]:
        os.utime(file, ns=(10**18, 10**18))
    first = data.faces(root)
    monkeypatch.setattr(index.Path, "replace", None)  # a second index would fail
    again = data.faces(root)
    assert again.names == first.names
    assert torch.equal(data.all_images(again, 8, 1)[0], data.all_images(first, 8, 1)[0])


def test_a_folder_that_cannot_be_written_beside_is_read_all_the_same(tmp_path, monkeypatch):
    root = as_folder(tmp_path)
    monkeypatch.setattr(index, "LEAST", 1)
    monkeypatch.setattr(index, "SETTLED", -(10**18))

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(index.np, "savez", refuse)
    assert len(data.faces(root).names) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_records_that_hold_the_magic_word_are_put_together(tmp_path):
    image = IMAGES[0][1]
    image += b"\0" * (-len(image) % 4) + struct.pack("<I", recordio.MAGIC) * 2 + b"tail"
    write_records(tmp_path / "set", [(0, record(0.0, 0, image)), (1, record(1.0, 1, IMAGES[1][1]))])
    assert (tmp_path / "set" / "train.rec").read_bytes()[4:8] != struct.pack("<I", len(image) + 24)
    assert data.faces(tmp_path / "set").store.read(0) == image


def test_other_recordio_faults_are_named(tmp_path):
    root = as_recordio(tmp_path)
    rec, idx = root / "train.rec", root / "train.idx"
    whole, places = rec.read_bytes(), idx.read_text()
    idx.unlink()
    with pytest.raises(FileNotFoundError, match=r"train.idx does not exist: the records' places"):
        data.faces(root)
    for content, message in [
        ("0\t0\nx\t8\n", "expected 'key offset' in each line"),
        ("", "expected 'key offset' in each line"),
        (places.replace("\t0\n", "\t4\n"), "record 0: no record begins there"),
        (places + "12\t999999\n", "does not belong to .*: record 1?[02-9] lies outside of it"),
    ]:
        idx.write_text(content)
        with pytest.raises(ValueError, match=message):
            data.faces(root)
    idx.write_text(places)
    (root / "property").write_text("9,8,8")
    with pytest.warns(UserWarning, match="property speaks of 9 identities, the records have 3"):
        found = data.faces(root)
    rec.write_bytes(whole[:40] + b"\0" * 4 + whole[44:])
    with pytest.raises(data.DataError, match=r"train.rec, record 1 cannot be read: no record begins there"):
        found.store.read(0)
    rec.write_bytes(whole[:100])
    with pytest.raises(data.DataError, match=r"record 6 cannot be read: the file ends after 0 of"):
        data.Pairs(found, 8, 1, 0)._image(5)


def test_an_lmdb_environment_is_opened_again_while_it_is_read(tmp_path):
    """LMDB lets a process open an environment only once."""
    root = as_lmdb(tmp_path)
    one = data.faces(root)
    first = one.store.read(0)
    two = data.faces(root)  # searched while the other one's is open
    assert (two.store.read(0), one.store.read(0)) == (first, first)


def test_lmdb_faults_are_named(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    (tmp_path / "bad.lmdb").write_bytes(b"x" * 10000)
    with pytest.raises(ValueError, match=r"bad.lmdb cannot be read as LMDB: .*not an LMDB file"):
        data.faces(tmp_path / "bad.lmdb")
    with (
        lmdb.open(str(tmp_path / "keys"), map_size=1 << 20) as environment,
        environment.begin(write=True) as transaction,
    ):
        transaction.put(b"0001", b"x")
    with pytest.raises(ValueError, match=r"keys: expected keys of the form 'identity/image', got b'0001'"):
        data.faces(tmp_path / "keys")


def tar(path, files, mode="w"):
    with tarfile.open(path, mode) as opened:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.png": b"x", "1.png": b"y"}, r"a.tar, sample 0: nothing says whose image it is"),
        ({"0.png": b"x", "0.jpg": b"y", "0.cls": b"1"}, r"a.tar, sample 0: has two images, expected one"),
        ({"0.png": b"x", "0.cls": b" "}, r"a.tar, sample 0: its .cls is empty"),
        ({"0.png": b"x", "0.json": b"{"}, r"a.tar, sample 0: its .json cannot be read"),
        ({"0.png": b"x", "0.cls": b"1"}, r"a.tar must hold at least two identities, found 1"),
        ({"0.txt": b"x"}, r"a.tar must hold at least two identities, found 0"),
    ],
)
def test_tar_faults_are_named(tmp_path, files, message):
    tar(tmp_path / "a.tar", files)
    with pytest.raises(ValueError, match=message):
        data.faces(tmp_path / "a.tar")


def by_tarfile(path):
    with tarfile.open(path, "r:") as opened:
        return [(m.name, m.offset_data, m.size) for m in opened if m.isreg()]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("odd", ["", "times", "folders", "long", "names", "link", "global", "v7"])
def test_headers_are_read_as_tarfile_reads_them(tmp_path, monkeypatch, format, odd):
    """Whatever is in them, wherever the first odd one stands, and whatever is read at once."""
    monkeypatch.setattr(tars, "TOGETHER", 8)
    headers = {"comment": "x"} if odd == "global" and format == tarfile.PAX_FORMAT else None
    with tarfile.open(tmp_path / "a.tar", "w", format=format, pax_headers=headers) as out:
        for i in range(40):
            info = tarfile.TarInfo(f"a{i % 3}/{i:03d}.png")
            info.size = 97 * i
            if odd == "times":
                info.mtime = 1e9 + i / 8
            elif odd == "folders" and i % 4 == 0:
                info.type, info.size = tarfile.DIRTYPE, 0
            elif odd == "link" and i == 21:
                info.type, info.size, info.linkname = tarfile.SYMTYPE, 0, "a"
            elif odd == "long" and i in (18, 30):
                info.name = "b" * 90 + f"/{i}" * 9 + ".png"
            elif odd == "names" and i > 4:
                info.name = f"ä{i}.png"
            out.addfile(info, io.BytesIO(bytes(info.size)))
    content = bytearray((tmp_path / "a.tar").read_bytes())
    if odd == "v7":
        header = content[:512]
        header[257:265] = bytes(8)
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        content[:512] = header
        (tmp_path / "a.tar").write_bytes(content)
    expected = by_tarfile(tmp_path / "a.tar")
    assert len(expected) == {"folders": 30, "link": 39}.get(odd, 40)
    assert [tuple(member) for member, _ in tars._members(tmp_path / "a.tar")] == expected


@pytest.mark.parametrize("seen", [1, 2, 7, 31])
def test_damage_in_a_tar_is_not_its_end(tmp_path, seen):
    tar(tmp_path / "a.tar", {f"{i % 2}/{i}.png": b"x" for i in range(32)})
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[1024 * seen + 5] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"a.tar cannot be read as a tar file: the header at byte {1024 * seen:,} is damaged"
    ):
        data.faces(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(content[: 1024 * seen + 300])
    with pytest.raises(ValueError, match=r"a.tar cannot be read as a tar file"):
        data.faces(tmp_path / "a.tar")


def test_compressed_and_missing_tars_are_refused(tmp_path):
    tar(tmp_path / "a.tar", {"a/0.png": b"x"}, "w:gz")
    with pytest.raises(ValueError, match=r"a.tar cannot be read as a tar file.*compressed ones have no random access"):
        data.faces(tmp_path / "a.tar")
    with pytest.raises(FileNotFoundError, match=r"b-0.tar does not exist, which .*b-\{0..3\}.tar names"):
        data.faces(tmp_path / "b-{0..3}.tar")
    with pytest.raises(FileNotFoundError, match=r"c-\*.tar does not exist"):
        data.faces(tmp_path / "c-*.tar")


def test_shards_stay_closed_until_read(tmp_path):
    found = data.faces(as_shards(tmp_path))
    assert len(found.store.shards) == 3
    assert len(found.store._files._files) == 0
    found.store.read(5)
    assert len(found.store._files._files) == 1
    assert len(pickle.loads(pickle.dumps(found)).store._files._files) == 0
    (tmp_path / "set" / "faces-000.tar").write_bytes(b"short")
    with pytest.raises(data.DataError, match=r"faces-000.tar, byte [\d,]+ cannot be read: the file ends after"):
        found.store.read(0)


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tars.Opened, "MOST", 2)
    found = data.faces(as_shards(tmp_path))
    for number in (0, 2, 4, 0, 5, 3):
        assert found.store.read(number) == IMAGES[number][1]
        assert len(found.store._files._files) <= 2


def test_hugging_face_columns_by_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    buffers = [{"bytes": image, "path": None} for _, image in IMAGES]
    made = datasets.Dataset.from_dict({"picture": buffers, "who": [name for name, _ in IMAGES], "label": [0] * 6})
    made = made.cast_column("picture", datasets.Image()).select([5, 4, 3, 2, 1, 0])
    found = data.from_dataset(made, image="picture", label="who")
    assert found.names == list(PEOPLE)
    assert found.store.read(int(found.images(2)[0])) == IMAGES[5][1]
    with pytest.raises(ValueError, match="image: there is no column 'image', only picture, who, label"):
        data.from_dataset(made)
    with pytest.raises(ValueError, match="expected one split, got several: train"):
        data.from_dataset(datasets.DatasetDict({"train": made}))
    with pytest.raises(ValueError, match="expected items by number, got the stream IterableDataset"):
        data.from_dataset(made.to_iterable_dataset())


class Mapped(torch.utils.data.Dataset):
    """(image, label), each image in another form."""

    def __init__(self, root):
        gray = [np.full((8, 8), 10 * i, np.uint8) for i in range(6)]
        (root / "5.png").write_bytes(IMAGES[5][1])
        self.items = [
            Image.fromarray(gray[0]), gray[1], gray[2][:, :, None], torch.tensor(gray[3]), torch.tensor(gray[4])[None].repeat(3, 1, 1),
            root / "5.png",
        ]  # fmt: skip
        self.read = 0

    def __len__(self):
        return 6

    def __getitem__(self, i):
        self.read += 1
        return self.items[i], [3, 3, 3, 7, 8, 8][i]


def test_any_map_style_dataset(tmp_path):
    dataset = Mapped(tmp_path)
    found = data.from_dataset(dataset)
    assert found.names == ["3", "7", "8"]
    for channels in (1, 3):
        images, labels = data.all_images(found, 8, channels)
        assert images.shape == (6, channels, 8, 8)
        np.testing.assert_allclose((images * data.STD + data.MEAN)[:, 0, 0, 0], [0, 10, 20, 30, 40, 50], atol=1e-4)
    assert labels.tolist() == [0, 0, 0, 1, 2, 2]
    dataset.read = 0
    assert data.from_dataset(dataset, labels=[1, 1, 0, 0, 0, 0]).counts.tolist() == [4, 2]
    dataset.targets, dataset.classes = torch.tensor([0, 1, 0, 1, 0, 1]), ["no", "yes"]
    assert data.from_dataset(dataset).names == ["no", "yes"]
    assert dataset.read == 0


OWN = """
import io
from PIL import Image

class Own:
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return Image.new("L", (8, 8), 10 * i), "aaabcc"[i]

made = Own()
number = 3

def empty():
    return []
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The working folder, with a module of datasets in it."""
    (tmp_path / "own_datasets.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield tmp_path
    sys.modules.pop("own_datasets", None)


@pytest.mark.parametrize("path", ["own_datasets:Own", "own_datasets:made"])
def test_a_dataset_by_its_import_path(own, path):
    found = data.faces(path)
    assert list(found.names) == ["a", "b", "c"]
    assert found.counts.tolist() == [3, 1, 2]
    np.testing.assert_allclose(
        (data.all_images(found, 8, 1)[0] * data.STD + data.MEAN)[:, 0, 0, 0], range(0, 60, 10), atol=1e-4
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_datasets:none", "data.root: 'own_datasets:none' cannot be imported: .*no attribute 'none'"),
        ("no_such_module:x", "data.root: 'no_such_module:x' cannot be imported: No module named 'no_such_module'"),
        ("own_datasets:number", "'own_datasets:number' is neither a dataset nor a function that returns one, but 3"),
        ("own_datasets:empty", "dataset must hold at least two identities, found 0"),
    ],
)
def test_import_paths_of_no_dataset_are_named(own, path, message):
    with pytest.raises(ValueError, match=message):
        data.faces(path)


TRAINS = ["--data.size", "32", "--data.channels", "1", "--epochs", "2", "--batch", "3", "--dim", "8", "--width", "0.125",
          "--queue_size", "3", "--lr", "0.001", "--device", "cpu"]  # fmt: skip


@pytest.mark.parametrize("write", [*WRITERS, None], ids=lambda w: w.__name__ if w else "import path")
@pytest.mark.filterwarnings("ignore:left out of")
def test_every_format_trains_two_epochs_and_is_evaluated(own, write, one_thread, capsys):
    """From the command line, with a process that reads, and verified on the same format while training."""
    root, run = str(write(own)) if write else "own_datasets:Own", own / "run"
    reads = ["--data.root", root, "--data.test_root", root, "--verify_every", "1", "--data.workers", "1"]
    assert main(["train", *reads, *TRAINS, "--out", str(run)]) == 0
    assert len((run / "metrics.csv").read_text().splitlines()) == 3
    spectrum = np.loadtxt(run / "spectrum.csv", delimiter=",", skiprows=1)
    assert spectrum[:, 0].tolist() == [1, 2]
    np.testing.assert_allclose(spectrum[:, 1:].sum(1), 1, atol=1e-5)
    capsys.readouterr()
    assert main(["eval", str(run), root, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "all pairs, identification" in shown
    assert "rank-1" in shown
    assert "Singular spectrum" in (run / "evaluation.html").read_text()


def test_map_style_faults_are_named(tmp_path):
    dataset = Mapped(tmp_path)
    dataset.items[0] = torch.zeros(3, 8, 8)
    dataset.items[1] = None
    found = data.from_dataset(dataset)
    with pytest.raises(
        data.DataError, match=r"Mapped, item 0 cannot be read: expected an image as .*, got float32 \[8, 8, 3\]"
    ):
        found.store.read(0)
    with pytest.raises(data.DataError, match=r"Mapped, item 1 cannot be read: .* got NoneType"):
        found.store.read(1)
    with pytest.raises(ValueError, match=r"labels: expected one for each of 6 items, got the shape \[2\]"):
        data.from_dataset(dataset, labels=[1, 2])
    with pytest.raises(ValueError, match="at least two identities, found 1"):
        data.from_dataset(dataset, labels=[1] * 6)


def test_what_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x.zip: expected a folder, a list .* got a file with the suffix '.zip'"):
        data.faces(tmp_path / "x.zip")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        data.faces(tmp_path / "nowhere")
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    with pytest.raises(ValueError, match="holds several splits; name the folder of one of them"):
        data.faces(tmp_path)


WORDS = ["", "a", "Zoë", "\udce9x", "b" * 300, "c\nd"]


def test_strings_are_a_sequence_of_strings():
    strings = Strings.of(WORDS)
    assert list(strings) == WORDS
    assert strings == WORDS
    assert strings[-1] == "c\nd"
    assert strings[1:4] == WORDS[1:4]
    assert strings[::-2] == WORDS[::-2]
    assert strings.take(np.array([3, 3, 0])) == ["\udce9x", "\udce9x", ""]
    assert strings.take(np.array([], np.int64)) == []
    assert Strings.of([]) == []
    assert "Zoë" in strings
    with pytest.raises(IndexError, match="index 6 is out of range for 6 strings"):
        strings[6]
