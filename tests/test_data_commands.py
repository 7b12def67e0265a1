"""``sst-fast data``: every format becomes every other, in one step or not at all, and what is in it is told."""

import numpy as np
import pytest
from PIL import Image
from test_data_formats import IMAGES, PEOPLE, as_folder, as_lmdb, as_recordio, as_saved_dataset, as_shards_with_json

from sst_fast import data
from sst_fast.data import commands, convert, recordio
from sst_fast.data.store import Strings
from sst_fast.train.cli import main

TARGETS = {
    "folder": "out",
    "list": "out.csv",
    "recordio": "out",
    "lmdb": "out.lmdb",
    "webdataset": "out",
    "huggingface": "out",
}
SOURCES = [as_folder, as_recordio, as_lmdb, as_shards_with_json, as_saved_dataset]


def content(faces):
    """Names and the bytes of each identity's images."""
    return {faces.names[i]: [faces.store.read(n) for n in faces.images(i).tolist()] for i in range(len(faces.names))}


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.__name__)
@pytest.mark.parametrize("format", TARGETS)
def test_every_format_becomes_every_other(tmp_path, source, format, capsys):
    packages = {"lmdb": "lmdb", "huggingface": "datasets"}
    if format in packages:
        pytest.importorskip(packages[format])
    root = source(tmp_path)
    out = tmp_path / "made" / TARGETS[format]
    assert main(["data", "convert", str(root), str(out), "--format", format]) == 0
    assert f"6 images in {out}" in capsys.readouterr().out
    before, after = content(data.faces(root)), content(data.faces(out))
    assert list(after.values()) == list(before.values())
    assert list(after) == (list(before) if format != "recordio" else ["0", "1", "2"])
    assert {path.name for path in out.parent.iterdir()} <= {out.name, "out"}


@pytest.mark.parametrize("name", ["a.txt", "a.tsv", "a.csv", "a.lmdb", "a.tar", "a"])
def test_the_suffix_chooses(tmp_path, name):
    pytest.importorskip("lmdb")
    out = tmp_path / "made" / name
    assert convert.convert(data.faces(as_folder(tmp_path)), out) == 6
    kinds = {"a.lmdb": "LMDB", "a.tar": "WebDataset", "a": "folder per identity"}
    assert data.faces(out).store.format == kinds.get(name, "list file")
    assert list(data.faces(out).names) == list(PEOPLE)


def test_independent_readers_read_what_is_written(tmp_path, monkeypatch):
    webdataset, lmdb, datasets = map(pytest.importorskip, ("webdataset", "lmdb", "datasets"))
    faces = data.faces(as_folder(tmp_path))
    convert.convert(faces, tmp_path / "one.tar")
    samples = list(webdataset.WebDataset(str(tmp_path / "one.tar"), shardshuffle=False))
    assert [sample["png"] for sample in samples] == [image for _, image in IMAGES]
    assert [int(sample["cls"]) for sample in samples] == [0, 0, 0, 1, 2, 2]
    convert.convert(faces, tmp_path / "two.lmdb")
    with (
        lmdb.open(str(tmp_path / "two.lmdb"), readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        assert transaction.get(b"bob/000000.png") == IMAGES[3][1]
        assert transaction.stat()["entries"] == 6
    convert.convert(faces, tmp_path / "three", "huggingface")
    made = datasets.load_from_disk(str(tmp_path / "three"))
    assert made.features["label"].names == list(PEOPLE)
    assert [np.asarray(row["image"])[0, 0] for row in made] == [0, 10, 20, 30, 40, 50]
    monkeypatch.setattr(convert, "MOST_CLASSES", 2)
    convert.convert(faces, tmp_path / "four", "huggingface")
    assert datasets.load_from_disk(str(tmp_path / "four"))["label"][:] == ["ann", "ann", "ann", "bob", "cyd", "cyd"]
    assert list(content(data.faces(tmp_path / "four"))) == sorted(PEOPLE)


def test_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SHARD", 5000)
    convert.convert(data.faces(as_folder(tmp_path)), tmp_path / "out", "webdataset")
    assert len(list((tmp_path / "out").iterdir())) > 1
    assert list(content(data.faces(tmp_path / "out"))) == list(PEOPLE)


def test_records_are_cut_where_the_magic_word_stands():
    magic = recordio.MAGIC.to_bytes(4, "little")
    for body in (b"", magic, b"abcd" + magic * 3 + b"x", b"ab" + magic + b"cdef", b"x" * 5):
        record = recordio.framed((1.0,), 3, body)
        assert recordio.joined(record)[24:] == body
        assert len(record) % 4 == 0
        words = np.frombuffer(record, "<u4")
        assert (words == recordio.MAGIC).sum() == 1 + sum(body[i : i + 4] == magic for i in range(0, len(body), 4))


@pytest.mark.parametrize("format", ["folder", "list", "recordio", "lmdb", "webdataset", "huggingface"])
def test_a_conversion_that_fails_or_is_interrupted_leaves_nothing(tmp_path, format, monkeypatch, capsys):
    packages = {"lmdb": "lmdb", "huggingface": "datasets"}
    if format in packages:
        pytest.importorskip(packages[format])
    root = as_shards_with_json(tmp_path)
    out = tmp_path / "made" / TARGETS[format]
    whole, calls = convert.encoded, iter(range(100))

    def stops(faces, number):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return whole(faces, number)

    monkeypatch.setattr(convert, "encoded", stops)
    assert main(["data", "convert", str(root), str(out), "--format", format]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"sst-fast data: interrupted; nothing has been written to {out}"
    assert list(out.parent.iterdir()) == []


def test_nothing_is_overwritten(tmp_path, capsys):
    root = as_folder(tmp_path)
    for out in (root, root / "ann"):
        assert main(["data", "shallow", str(root), str(out)]) == 1
        assert f"{out} exists already" in capsys.readouterr().err
    assert len(data.faces(root).numbers) == 6


def test_broken_images_stop_or_are_skipped_and_named(tmp_path, capsys):
    root = as_folder(tmp_path)
    (root / "ann" / "1.png").write_bytes(b"broken")
    (root / "bob" / "3.png").write_bytes(b"broken")
    assert main(["data", "convert", str(root), str(tmp_path / "a.tar")]) == 1
    assert "ann/1.png cannot be read as an image" in capsys.readouterr().err
    assert main(["data", "convert", str(root), str(tmp_path / "a.tar"), "--on_error", "skip"]) == 0
    assert "2 images could not be read and were skipped" in capsys.readouterr().out
    assert "bob/3.png" in (tmp_path / "a.tar.unreadable.txt").read_text()
    found = data.faces(tmp_path / "a.tar")
    assert (list(found.names), found.counts.tolist()) == (["ann", "cyd"], [2, 2])


def test_decoded_images_are_written_without_loss(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8)
    faces = data.from_dataset([(Image.fromarray(p), i // 2) for i, p in enumerate(pixels)])
    convert.convert(faces, tmp_path / "out")
    found = data.faces(tmp_path / "out")
    np.testing.assert_array_equal(
        np.stack([np.asarray(Image.open(path)) for paths in found.paths for path in paths]), pixels
    )


@pytest.mark.parametrize("name", ["a/b", ".a", "", "__MACOSX"])
def test_names_that_no_folder_can_have_are_refused(tmp_path, name):
    faces = data.from_dataset([(Image.new("L", (8, 8)), label) for label in (name, "b")])
    with pytest.raises(ValueError, match="cannot be a folder's name"):
        convert.convert(faces, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_list_that_would_be_read_otherwise_is_refused(tmp_path):
    found = data.faces(as_folder(tmp_path))
    odd = data.Faces(Strings.of(["x y", "b", "c"]), found.store, found.numbers, found.ends)
    with pytest.raises(
        ValueError, match=r"out.txt: names or paths hold characters that such a list cannot; write a .csv"
    ):
        convert.convert(odd, tmp_path / "out.txt")
    convert.convert(odd, tmp_path / "out.csv")
    assert list(data.faces(tmp_path / "out.csv").names) == ["x y", "b", "c"]


def test_shallow_writes_the_papers_subset(tmp_path):
    root = as_folder(tmp_path)
    assert main(["data", "shallow", str(root), str(tmp_path / "two.csv"), "--images", "2", "--seed", "3"]) == 0
    found = data.faces(tmp_path / "two.csv")
    assert found.counts.tolist() == [2, 1, 2]
    assert content(found) == content(data.faces(root).shallow(2, seed=3))


def test_info_tells_what_is_there(tmp_path, capsys):
    root = as_folder(tmp_path)
    (root / "cyd" / "copy.png").write_bytes(IMAGES[0][1])
    (root / "ann" / "copy.png").write_bytes(IMAGES[1][1])
    (root / "bob" / "broken.png").write_bytes(b"?")
    (root / "bob" / "cut.png").write_bytes(IMAGES[2][1][:50])
    Image.new("L", (9, 7)).save(root / "bob" / "large.jpg")
    assert main(["data", "info", str(root)]) == 0
    told = capsys.readouterr().out
    for line in (
        "format      folder per identity", "identities  3", "images      11", "depth       3 to 4 images of an identity, median 4",
        "3 to 4: 3 identities", "sizes       8 x 8: 9, 9 x 7: 1", "files       PNG: 9, JPEG: 1",
        "duplicates  2 images repeat another's bytes, 1 of them another identity's", "unreadable  1\n",
    ):  # fmt: skip
        assert line in told
    assert f"{root}/cyd/copy.png = {root}/ann/0.png" in told
    assert main(["data", "info", str(root), "--decoded", "true", "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert "unreadable  2\n" in told
    assert "cut.png cannot be read as an image" in told
    assert main(["data", "info", str(root), "--quick", "true"]) == 0
    assert "sizes" not in capsys.readouterr().out


def test_depths_are_counted_in_doubling_ranges():
    counts = [1, 1, 2, 3, 4, 5, 8, 9, 16, 17, 100]
    faces = data.Faces.by_identity(
        Strings.of(map(str, range(len(counts)))), data.faces("orl").store, np.repeat(np.arange(len(counts)), counts)
    )
    assert commands.summary(faces)[4:] == [
        "            1: 2 identities", "            2: 1 identities", "            3 to 4: 2 identities",
        "            5 to 8: 2 identities", "            9 to 16: 2 identities", "            17 to 32: 1 identities",
        "            65 to 128: 1 identities",
    ]  # fmt: skip


def test_info_that_is_interrupted_tells_what_it_has_seen(tmp_path, capsys, monkeypatch):
    whole = commands.Census.__getitem__

    def stops(self, index):
        if index == 4:
            raise KeyboardInterrupt
        return whole(self, index)

    monkeypatch.setattr(commands.Census, "__getitem__", stops)
    assert main(["data", "info", str(as_folder(tmp_path))]) == 0
    assert "interrupted after 0 of 6 images" in capsys.readouterr().out


def test_faults_are_one_line(tmp_path, capsys):
    assert main(["data", "info", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == f"sst-fast data: {tmp_path / 'nowhere'} does not exist\n"
    assert main(["data", "convert", str(as_folder(tmp_path)), str(tmp_path / "a.rec")]) == 1
    assert "RecordIO is three files; name a new folder" in capsys.readouterr().err
