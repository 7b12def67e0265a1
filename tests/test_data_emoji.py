"""``sst-fast data emoji``: emoji as identities, vendors' drawings as their images, from small icon packages made here."""

import json

import numpy as np
import pytest
from PIL import Image

from sst_fast import data
from sst_fast.data import emoji
from sst_fast.train.cli import main

CODES = [f"1f{number:03x}" for number in range(0x600, 0x60C)]
OTHERS = {"1f1e6-1f1e8": "flag", "1f44b-1f3fb": "waving-light", "30-fe0f-20e3": "keycap"}


def make(root, vendors=5, tells=2, **changes):
    """Packages: a circle for each of twelve emoji, its colour the emoji's, its size the vendor's. The first two tell codes."""
    for number in range(vendors):
        folder = root / f"p{number}" / "package"
        folder.mkdir(parents=True)
        names = {f"{code}-fe0f" if number else code: f"face-{code}" for code in CODES} | OTHERS
        icons = {
            name: {"body": f'<circle cx="8" cy="8" r="{4 + number}" fill="#{i * 20:02x}8040"/>'}
            for i, name in enumerate(names.values())
        }
        aliases = {"another-name": {"parent": f"face-{CODES[0]}"}}
        files = {
            "icons": {"prefix": f"v{number}", "icons": icons, "aliases": aliases, "width": 16, "height": 16},
            "info": {
                "license": {"title": "CC BY 4.0", "url": "https://example.org/by"},
                "author": {"name": f"A{number}"},
            },
            "package": {"name": f"@iconify-json/v{number}", "version": "1.0"},
        } | ({"chars": names} if number < tells else {})
        for name, content in (files | changes.get(f"p{number}", {})).items():
            (folder / f"{name}.json").write_text(json.dumps(content))
    return root


def draw(out, root, *more):
    return main(["data", "emoji", str(out), "--packages", str(root), "--size", "16", *more])


@pytest.fixture(autouse=True)
def resvg():
    pytest.importorskip("resvg_py")


def test_emoji_become_identities_and_licences_are_listed(tmp_path, capsys):
    out = tmp_path / "out"
    assert draw(out, make(tmp_path / "npm")) == 0
    told = capsys.readouterr().out
    assert "12 emoji with at least 4 drawings in 5 packages" in told
    assert f"8 emoji, 16 images in {out / 'train'}" in told
    train, test = (data.faces(out / part) for part in ("train", "test"))
    assert sorted([*train.names, *test.names]) == [code.upper() for code in CODES]
    assert (train.counts.tolist(), test.counts.tolist()) == ([2] * 8, [5] * 4)
    path = out / "test" / test.names[0] / "v0.png"
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (16, 16, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[8, 8].tolist() == [CODES.index(test.names[0].lower()) * 20, 128, 64]
    licences = (out / "licences.txt").read_text().splitlines()
    assert licences[1:] == [
        f"@iconify-json/v{n} | 1.0 | CC BY 4.0 | https://example.org/by | A{n} | " for n in range(5)
    ]


def test_the_seed_chooses_and_all_drawings_can_be_kept(tmp_path):
    root = make(tmp_path / "npm")
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, more in zip(outs, ([], [], ["--seed", "1", "--images", "0"]), strict=True):
        assert draw(out, root, *more) == 0
    files = [{path.relative_to(out): path.read_bytes() for path in out.rglob("*.png")} for out in outs]
    assert files[0] == files[1]
    assert set(data.faces(outs[2] / "train").names) != set(data.faces(outs[0] / "train").names)
    assert data.faces(outs[2] / "train").counts.tolist() == [5] * 8


@pytest.mark.parametrize("body", ['<image href="/etc/hostname"/>', '<use xlink:href="a.svg#b"/>', '<rect fill="url(a.svg#b)"/>', "<broken"])  # fmt: skip
def test_drawings_that_refer_elsewhere_or_are_broken_are_left_out(tmp_path, body, capsys):
    icons = {f"face-{code}": {"body": body if code == CODES[0] else "<g/>"} for code in CODES}
    root = make(tmp_path / "npm", p4={"icons": {"prefix": "v4", "icons": icons}})
    assert draw(tmp_path / "out", root, "--images", "0") == 0
    assert "1 drawings could not be rendered" in capsys.readouterr().out
    found = {path.name for part in ("train", "test") for path in (tmp_path / "out" / part / CODES[0].upper()).glob("*")}
    assert found == {"v0.png", "v1.png", "v2.png", "v3.png"}
    own = emoji.render('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><g id="a"/><use href="#a"/></svg>', 8)
    assert own is not None


def test_what_cannot_be_is_told_in_one_line(tmp_path, capsys):
    root, out = make(tmp_path / "npm", vendors=3), tmp_path / "out"
    for more, message in (
        ([], "has 0 emoji with at least 4 drawings, 4 are needed (packages found: v0 v1 v2); for each NAME of noto "),
        (["--packages", "nowhere"], "packages must be a folder with npm's icon packages, got 'nowhere'"),
        (["--images", "1"], "images must be 0 (all) or at least 2, got 1"),
        (["--test_share", "0"], "test_share must be in (0, 1), got 0.0"),
        (["--size", "5"], "size must be in [8, 1024] pixels, got 5"),
    ):
        assert draw(out, root, *more) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for content, message in (("{", "icons.json is no JSON"), ("[]", "holds list, expected an object"), ("{}", "is no icon set of Iconify")):  # fmt: skip
        (root / "p0" / "package" / "icons.json").write_text(content)
        assert draw(out, root) == 1
        assert message in capsys.readouterr().err
    assert not out.exists()
