"""``sst-fast data glyphs``: characters as identities, typefaces as their images, by the fonts that matplotlib ships."""

import gc
import json
import os
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from sst_fast import data
from sst_fast.data import glyphs
from sst_fast.train.cli import main

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
FEW = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic")  # fmt: skip


@pytest.fixture
def fonts(tmp_path):
    """A folder with eight fonts of wide coverage."""
    folder = tmp_path / "fonts"
    folder.mkdir()
    for name in FEW:
        shutil.copy(FONTS / f"{name}.ttf", folder)
    return folder


def draw(out, fonts, *more):
    return main(["data", "glyphs", str(out), "--script", "latin-greek-cyrillic", "--fonts", str(fonts), "--size", "16", "--similar", "0.98", *more])  # fmt: skip


def test_what_matplotlib_ships_is_enough_and_parts_share_nothing(tmp_path, fonts, capsys):
    out = tmp_path / "out"
    assert draw(out, fonts) == 0
    told = capsys.readouterr().out
    assert "8 typefaces with latin-greek-cyrillic, 8 of them distinct" in told
    assert "Debian packages that add some: fonts-cmu " in told
    train, test = (data.faces(out / part) for part in ("train", "test"))
    assert not set(train.names) & set(test.names)
    drawn = [{path.name for paths in faces.paths for path in paths} for faces in (train, test)]
    assert not drawn[0] & drawn[1]
    assert [len(names) for names in drawn] == [6, 2]
    assert abs(len(test.names) / (len(train.names) + len(test.names)) - 1 / 3) < 0.02
    assert train.counts.min() >= 2
    for paths in train.paths[:5]:
        for path in paths:
            with Image.open(path) as image:
                pixels = np.asarray(image)
            assert image.mode == "L"
            assert pixels.shape == (16, 16)
            rows = np.flatnonzero(pixels.max(1) > 64)
            assert abs(rows[0] - (15 - rows[-1])) <= 2  # the ink is in the middle
    noted = json.loads((out / "glyphs.json").read_text())["typefaces"]
    assert [{f"{name}.png" for name in noted[part]} for part in ("train", "test")] == drawn


def test_the_same_is_not_drawn_twice_and_nothing_is_overwritten(tmp_path, fonts, capsys):
    out = tmp_path / "out"
    assert draw(out, fonts) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert draw(out, fonts) == 0
    assert "holds these glyphs already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before
    assert draw(out, fonts, "--seed", "1") == 1
    assert f"{out} exists already" in capsys.readouterr().err
    assert draw(tmp_path / "again", fonts) == 0
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*.*")} == {
        p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*.*")
    }
    assert draw(tmp_path / "other", fonts, "--seed", "1") == 0
    assert set(data.faces(tmp_path / "other" / "test").names) != set(data.faces(out / "test").names)


def test_copies_of_a_typeface_count_once(tmp_path, fonts):
    characters = glyphs.characters_of("latin-greek-cyrillic")
    shutil.copy(fonts / "DejaVuSerif.ttf", fonts / "copy.ttf")
    found, broken = glyphs.typefaces(glyphs.font_files([fonts]), characters)
    assert (len(found), broken) == (9, [])
    assert len({face.name for face in found}) == 9
    assert len(glyphs.distinct(found, characters, 0.98, 0)) == 8
    assert len(glyphs.distinct(found, characters, 0.2, 0)) < 8


def test_characters_that_look_alike_count_once(fonts):
    found, _ = glyphs.typefaces(glyphs.font_files([fonts]), "AΑАBЖ")
    kept = glyphs.told_apart(found, "AΑАBЖ")
    assert kept == ["A", "B", "Ж"]


def test_a_typeface_draws_only_what_it_has(tmp_path, fonts):
    """Its own sign for what is missing is nobody's image."""
    characters = glyphs.characters_of("latin-greek-cyrillic")
    found, _ = glyphs.typefaces(glyphs.font_files([fonts]), [*characters, "亜"])
    assert all("亜" not in face.characters for face in found)
    glyphs._write(tmp_path / "part", found[0], ["A", "亜", " "], 16)
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["U+0041"]


def test_a_sign_that_stands_for_all_characters_is_no_typeface(fonts):
    """As Last Resort's, which matplotlib ships from 3.11 on."""
    if not list(FONTS.glob("LastResort*")):
        pytest.skip("this matplotlib ships no such typeface")
    characters = glyphs.characters_of("kanji")
    found, _ = glyphs.typefaces(glyphs.font_files([FONTS]), characters)
    assert len(found) == 1
    assert glyphs.distinct(found, characters, 0.9, 0) == []


def test_characters_with_one_drawing_are_not_written(tmp_path, fonts):
    found, _ = glyphs.typefaces(glyphs.font_files([fonts]), "AΑB")
    glyphs._write(tmp_path, found[0], "AΑB", 16)
    assert [path.name for path in tmp_path.iterdir() if path != fonts] == ["U+0042"]


def test_scripts_have_the_standards_characters():
    counts = {script: len(glyphs.characters_of(script)) for script in ("kanji", "hangul")}
    assert counts == {"kanji": 2965, "hangul": 2350}
    latin = glyphs.characters_of("latin-greek-cyrillic")
    assert len(latin) == len(set(latin)) > 250
    assert set("azÄőωЖ") <= set(latin)


def test_fonts_that_cannot_be_read_are_named_and_left_out(tmp_path, fonts, capsys):
    (fonts / "broken.ttf").write_bytes(b"nothing")
    (fonts / "cut.otf").write_bytes((fonts / "DejaVuSans.ttf").read_bytes()[:3000])
    assert draw(tmp_path / "out", fonts) == 0
    assert f"2 font files could not be read, as {fonts / 'broken.ttf'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fonts", "nowhere"], "fonts: nowhere is not a folder"),
        (["--size", "4"], "size must be in [8, 1024] pixels, got 4"),
        (["--test_share", "1"], "test_share must be in (0, 1), got 1.0"),
        (["--test_typefaces", "1"], "test_typefaces must be in [0, 1), got 1.0"),
        (["--similar", "0"], "similar must be in (0, 1], got 0.0"),
        (["--script", "hangul"], "at least 4 distinct typefaces with hangul are needed, found 0. Debian packages that add some: fonts-alee"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_in_one_line(tmp_path, fonts, arguments, message, capsys):
    chosen = [] if arguments[0] == "--fonts" else ["--fonts", str(fonts)]
    assert main(["data", "glyphs", str(tmp_path / "out"), *chosen, *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_interrupted_it_leaves_nothing(tmp_path, fonts, monkeypatch, capsys):
    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(glyphs, "_with_two", stops)
    out = tmp_path / "made" / "out"
    gc.disable()  # it would close what is left open
    assert draw(out, fonts) == 1
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    gc.enable()
    assert not [file for file in opened if file.startswith(str(tmp_path))]
    assert capsys.readouterr().err.splitlines()[-1] == f"sst-fast data: interrupted; nothing has been written to {out}"
    assert list(out.parent.iterdir()) == []
