"""A data set that any machine can draw: characters are the identities, typefaces their images."""

from __future__ import annotations

import json
import logging
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from sst_fast.data.convert import appearing
from sst_fast.data.images import printable, progress

Script = Literal["kanji", "hangul", "latin-greek-cyrillic"]
SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
COVERAGE = 0.5  # share of the script's characters that a typeface must have
PROBES = 48  # characters by which typefaces are compared
ALIKE = 0.99  # characters that look so much alike in every typeface compared (A of three scripts) count once
SETTINGS = "glyphs.json"

# Debian's packages with typefaces of a script.
PACKAGES: dict[Script, str] = {
    "kanji": """aoyagi-kouzan-t aoyagi-soseki arphic-bkai00mp arphic-bsmi00lp arphic-gbsn00lp arphic-gkai00mp arphic-ukai
        arphic-uming babelstone-han cns11643-kai cns11643-sung cwtex-fs cwtex-heib cwtex-kai cwtex-ming cwtex-yen dotgothic16
        droid-fallback hanazono horai-umefont ipaexfont ipafont ipamj-mincho kanjistrokeorders kiloji klee komatuna konatu
        kouzan-mouhitsu lxgw-wenkai migmix mmcedar mona monapo morisawa-bizud-gothic morisawa-bizud-mincho motoya-l-cedar
        motoya-l-maruberi mplus noto-cjk noto-cjk-extra oradano-mincho-gsrr rampart reggae ricty-diminished rocknroll
        sawarabi-gothic sawarabi-mincho seto smiley-sans stick takao train umeplus vlgothic wqy-microhei wqy-zenhei
        yozvox-yozfont yusei-magic""",
    "hangul": "alee baekmuk lexi-gulim lexi-saebom nanum nanum-eco nanum-extra naver-d2coding noto-cjk noto-cjk-extra "
    "unfonts-core unfonts-extra woowa-bm",
    "latin-greek-cyrillic": "cmu comfortaa dejavu-extra ebgaramond freefont-otf go inter jura junicode linuxlibertine "
    "liberation2 noto-core oldstandard open-sans play roboto-unhinted sil-gentiumplus texgyre ubuntu-title unifont vollkorn",
}  # fmt: skip


@dataclass(frozen=True)
class Typeface:
    """A face of a font file.

    Attributes:
        path: the file; number: of the face in it.
        name: family and style, unique among those found, fit for a file's name.
        characters: those wanted that it has.
    """

    path: Path
    number: int
    name: str
    characters: frozenset[str]

    def font(self, size: int) -> ImageFont.FreeTypeFont:
        """With an em a little smaller than an image of ``size`` pixels. Basic layout: the same pixels wherever it is drawn."""
        em = max(1, round(0.85 * size))
        return ImageFont.truetype(str(self.path), em, self.number, layout_engine=ImageFont.Layout.BASIC)


def characters_of(script: Script) -> list[str]:
    """Kanji: the 2,965 of level 1 of JIS X 0208. Hangul: the 2,350 syllables of KS X 1001. Else the letters of ISO 8859-1, -2,
    -5 and -7."""
    if script == "latin-greek-cyrillic":
        codes = bytes(range(0x21, 0xFF))
        found = [c for part in (1, 2, 5, 7) for c in codes.decode(f"iso8859-{part}", "ignore") if c.isalpha()]
        return list(dict.fromkeys(found))
    rows, codec = (range(16, 48), "euc_jp") if script == "kanji" else (range(16, 41), "euc_kr")
    cells = (bytes([0xA0 + row, 0xA0 + cell]) for row in rows for cell in range(1, 95))
    return [c for cell in cells if (c := cell.decode(codec, "ignore"))]


def font_folders() -> list[Path]:
    """Where fontconfig looks on Debian, and the folder of matplotlib's own."""
    import matplotlib

    usual = [Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), Path("~/.fonts"), Path("~/.local/share/fonts")]
    return [path.expanduser() for path in usual] + [Path(matplotlib.get_data_path(), "fonts", "ttf")]


def font_files(folders: Sequence[Path]) -> list[Path]:
    """Font files below these folders, sorted."""
    found = {path for folder in folders for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
    return sorted(path for path in found if path.is_file())


def typefaces(files: Sequence[Path], characters: Sequence[str]) -> tuple[list[Typeface], list[str]]:
    """The faces that have COVERAGE of the characters, by name; and why some files could not be read."""
    from fontTools.ttLib import TTCollection, TTFont

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns of much that does not matter here
    found: list[Typeface] = []
    broken: list[str] = []
    wanted, names = set(characters), set[str]()
    for path in progress(files, desc="fonts", unit="file"):
        try:
            with path.open("rb") as file:
                together = file.read(4) == b"ttcf"
            with (TTCollection if together else TTFont)(str(path), lazy=True) as opened:
                for number, font in enumerate(opened.fonts if together else [opened]):
                    has = wanted & {chr(code) for code in font.getBestCmap() or ()}
                    if len(has) < COVERAGE * len(wanted):
                        continue
                    # A font that fontTools reads may still be one that FreeType does not.
                    family = ImageFont.truetype(str(path), 16, number).getname()
                    name = base = re.sub(r"[^\w.-]+", "-", " ".join(filter(None, family))).strip("-.") or path.stem
                    count = 1
                    while name in names:
                        count += 1
                        name = f"{base}-{count}"
                    names.add(name)
                    found.append(Typeface(path, number, name, frozenset(has)))
        except Exception as error:  # whatever a broken table leads to
            broken.append(f"{printable(path)}: {error or type(error).__name__}")
    return sorted(found, key=lambda face: face.name), broken


def draw(font: ImageFont.FreeTypeFont, character: str, size: int) -> Image.Image | None:
    """The character in white on black, its ink centred, smaller only where it would not fit; None if it has no ink or cannot
    be drawn.

    White on black, because augmentations fill what they uncover with black.
    """
    try:
        left, top, right, bottom = (round(edge) for edge in font.getbbox(character))
    except OSError:  # FreeType finds a fault in this glyph's program
        return None
    width, height = right - left, bottom - top
    if not (0 < width <= 8 * size and 0 < height <= 8 * size):
        return None
    side = max(size, width, height)
    image = Image.new("L", (side, side))
    place = ((side - width) // 2 - left, (side - height) // 2 - top)
    ImageDraw.Draw(image).text(place, character, 255, font=font)
    if side > size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return image if np.asarray(image).max() >= 64 else None


def _features(face: Typeface, characters: Sequence[str], size: int = 32) -> NDArray[np.float32]:
    """Unit vectors [characters, size²] of slightly blurred drawings, centred; zeros for what the typeface lacks."""
    font, found = face.font(size), np.zeros((len(characters), size * size), np.float32)
    for row, character in zip(found, characters, strict=True):
        if character in face.characters and (image := draw(font, character, size)):
            pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), np.float32).ravel()
            pixels = pixels - pixels.mean()
            row[:] = pixels / max(float(np.linalg.norm(pixels)), 1e-6)
    return found


def distinct(faces: Sequence[Typeface], characters: Sequence[str], similar: float, seed: int) -> list[Typeface]:
    """Those typefaces whose drawings correlate by less than ``similar``, on average over characters that both have, with each
    that comes before and is kept.

    Left out are also fonts that have only one sign for all characters (as Last Resort), and those that cannot be drawn.
    """
    probes = random.Random(f"{seed}/probes").sample(sorted(characters), min(PROBES, len(characters)))
    kept: list[Typeface] = []
    seen: list[NDArray[np.float32]] = []
    for face in progress(faces, desc="compare", unit="typeface"):
        mine = _features(face, probes)
        if len({row.tobytes() for row in mine if row.any()}) < COVERAGE * len(probes):
            continue
        for other in seen:
            both = (mine.any(1) & other.any(1)).sum()
            if both and float((mine * other).sum()) / both >= similar:
                break
        else:
            kept.append(face)
            seen.append(mine)
    return kept


def told_apart(faces: Sequence[Typeface], characters: Sequence[str]) -> list[str]:
    """The characters without those that look like an earlier one in all of a few typefaces, as A does in three scripts."""
    few = sorted(faces, key=lambda face: (-len(face.characters), face.name))[:3]
    alike = np.ones((len(characters), len(characters)), bool)
    for face in few:
        features = _features(face, characters)
        alike &= features @ features.T >= ALIKE
    kept: list[int] = []
    for i in range(len(characters)):
        if not alike[i, kept].any():
            kept.append(i)
    return [characters[i] for i in kept]


def glyphs(
    out: str, script: Script = "kanji", fonts: str = "", size: int = 48, test_share: float = 1 / 3,
    test_typefaces: float = 0.25, similar: float = 0.9, seed: int = 0,
) -> None:  # fmt: skip
    """Draws a data set: characters are the identities, typefaces their images; OUT/train and OUT/test share neither.

    Args:
        out: a new folder; one that holds the same already is left as it is.
        script: whose characters.
        fonts: a folder of fonts, searched to the bottom; otherwise the system's, the user's and matplotlib's.
        size: side of the images in pixels.
        test_share: share of the characters that go to OUT/test, in (0, 1).
        test_typefaces: share of the typefaces that draw OUT/test alone, in [0, 1); 0: all draw both.
        similar: typefaces whose drawings correlate this much count once, in (0, 1].
        seed: another one splits otherwise.
    """
    if script not in get_args(Script):
        raise ValueError(f"script must be one of {', '.join(get_args(Script))}, got {script!r}")
    if not 8 <= size <= 1024:
        raise ValueError(f"size must be in [8, 1024] pixels, got {size}")
    for name, value, right, expected in (
        ("test_share", test_share, 0 < test_share < 1, "(0, 1)"),
        ("test_typefaces", test_typefaces, 0 <= test_typefaces < 1, "[0, 1)"),
        ("similar", similar, 0 < similar <= 1, "(0, 1]"),
    ):
        if not right:
            raise ValueError(f"{name} must be in {expected}, got {value}")
    if fonts and not Path(fonts).is_dir():
        raise FileNotFoundError(f"fonts: {printable(fonts)} is not a folder")
    files = font_files([Path(fonts)] if fonts else font_folders())
    settings: dict[str, object] = {
        "script": script, "size": size, "test_share": test_share, "test_typefaces": test_typefaces, "similar": similar,
        "seed": seed, "fonts": [[path.name, path.stat().st_size] for path in files],
    }  # fmt: skip
    target = Path(out)
    if _settings(target) == settings:
        print(f"{printable(target)} holds these glyphs already")
        return
    more = f"Debian packages that add some: {' '.join(f'fonts-{name}' for name in PACKAGES[script].split())}"
    with appearing(target) as temporary:
        characters = characters_of(script)
        found, broken = typefaces(files, characters)
        faces = distinct(found, characters, similar, seed)
        if broken:
            print(f"{len(broken)} font files could not be read, as {broken[0]}", file=sys.stderr)
        if len(faces) < 4:
            raise ValueError(f"at least 4 distinct typefaces with {script} are needed, found {len(faces)}. {more}")
        if script == "latin-greek-cyrillic":
            characters = told_apart(faces, characters)
        parts = _split(faces, characters, test_typefaces, test_share, seed)
        told = []
        with progress(total=sum(len(f) for f, _ in parts.values()), unit="typeface") as bar:
            for part, (drawing, own) in parts.items():
                for face in drawing:
                    _write(temporary / part, face, own, size)
                    bar.update()
                identities, images = _with_two(temporary / part)
                told.append(
                    f"{identities:,} characters, {len(drawing)} typefaces, {images:,} images in {printable(target / part)}"
                )
        settings |= {"typefaces": {part: [face.name for face in drawing] for part, (drawing, _) in parts.items()}}
        (temporary / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    print(f"{len(found)} typefaces with {script}, {len(faces)} of them distinct")
    print("\n".join(told))
    if len(faces) < 40:
        print(more)


def _settings(target: Path) -> dict[str, object] | None:
    """With which ``target`` was made."""
    try:
        found = json.loads((target / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {name: value for name, value in found.items() if name != "typefaces"} if isinstance(found, dict) else None


def _split(
    faces: Sequence[Typeface], characters: Sequence[str], test_typefaces: float, test_share: float, seed: int
) -> dict[str, tuple[list[Typeface], list[str]]]:
    """Typefaces and characters of 'train' and 'test': by seed, at least two of each."""
    rng = random.Random(f"{seed}/split")
    mixed_faces, mixed = rng.sample(list(faces), len(faces)), rng.sample(list(characters), len(characters))
    many = min(max(2, round(test_typefaces * len(faces))), len(faces) - 2)
    held = min(max(2, round(test_share * len(mixed))), len(mixed) - 2)
    test_faces, train_faces = (mixed_faces[:many], mixed_faces[many:]) if test_typefaces else (mixed_faces,) * 2
    return {"train": (train_faces, mixed[held:]), "test": (test_faces, mixed[:held])}


def _write(folder: Path, face: Typeface, characters: Sequence[str], size: int) -> None:
    """One typeface's drawings, each in its character's folder; none that it has for several characters: that is its sign for
    what it lacks, or the characters cannot be told apart."""
    font = face.font(size)
    drawn = {c: image for c in characters if c in face.characters and (image := draw(font, c, size))}
    counts = Counter(image.tobytes() for image in drawn.values())
    for character, image in drawn.items():
        if counts[image.tobytes()] == 1:
            identity = folder / f"U+{ord(character):04X}"
            identity.mkdir(parents=True, exist_ok=True)
            image.save(identity / f"{face.name}.png", compress_level=1)


def _with_two(folder: Path) -> tuple[int, int]:
    """Removes characters that have one image only, which no pair can come of; how many characters and images are left."""
    left = total = 0
    for identity in folder.iterdir():
        images = list(identity.iterdir())
        if len(images) > 1:
            left, total = left + 1, total + len(images)
        else:
            images[0].unlink()
            identity.rmdir()
    return left, total
