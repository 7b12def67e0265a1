"""A data set of pictures that is shallow by nature: emoji are the identities, the drawings of several vendors their images."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sst_fast.data.convert import appearing
from sst_fast.data.images import printable, progress

# npm's packages of whole emoji sets; of Microsoft's two, the flat one, because both are nearly the same drawings.
PACKAGES = "noto noto-v1 openmoji twemoji emojione emojione-v1 fluent-emoji-flat fxemoji"
LEFT_OUT = {"fluent-emoji"}
DRAWINGS = 4  # that an emoji must have to become an identity
LICENCES = "licences.txt"
# Skin tones, letters of flags, tags of flags: variations of another emoji, or no picture of a thing.
NO_IDENTITY = [range(0x1F3FB, 0x1F400), range(0x1F1E6, 0x1F200), range(0xE0020, 0xE0080)]


@dataclass(frozen=True)
class IconSet:
    """An npm package of the Iconify project.

    Attributes:
        vendor: its short name; credit: name, version and licence; drawings: SVG by the icon's name; codes: of names, where it
            tells them.
    """

    vendor: str
    credit: str
    drawings: dict[str, str]
    codes: dict[str, str]


def read_set(path: Path) -> IconSet:
    """From the package's ``icons.json`` and the files beside it.

    Raises:
        ValueError: they are not what such a package holds; names the file.
    """
    content = _json(path)
    info, package, codes = (
        _json(path.with_name(f"{name}.json"), needed=False) for name in ("info", "package", "chars")
    )
    try:
        size = content.get("width", 16), content.get("height", 16)
        drawings = {name: _svg(icon, *size) for name, icon in content["icons"].items()}
        for name, alias in content.get("aliases", {}).items():
            if set(alias) == {"parent"} and alias["parent"] in drawings:
                drawings.setdefault(name, drawings[alias["parent"]])
        licence = info.get("license", {})
        words = [
            package.get("name", content["prefix"]), package.get("version", ""), licence.get("title", "licence not told"),
            licence.get("url", ""), info.get("author", {}).get("name", ""), info.get("author", {}).get("url", ""),
        ]  # fmt: skip
        named = {name: _plain(code) for code, name in codes.items()}
        return IconSet(content["prefix"], " | ".join(map(str, words)), drawings, named)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"packages: {printable(path)} is no icon set of Iconify: {error!r}") from None


def _json(path: Path, needed: bool = True) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if needed:
            raise
        return {}
    except ValueError as error:
        raise ValueError(f"packages: {printable(path)} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"packages: {printable(path)} holds {type(found).__name__}, expected an object")
    return found


def _svg(icon: Mapping[str, Any], width: float, height: float) -> str:
    box = icon.get("left", 0), icon.get("top", 0), icon.get("width", width), icon.get("height", height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{box[2]}" height="{box[3]}" '
        f'viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
    )


def _plain(code: str) -> str:
    """A sequence of code points without the one that only asks for colours."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _is_identity(code: str) -> bool:
    points = [int(part, 16) for part in code.split("-")]
    return points[0] > 0xFF and not any(point in left_out for point in points for left_out in NO_IDENTITY)


def identities(sets: list[IconSet]) -> dict[str, dict[str, str]]:
    """Of each emoji, by its code points, every vendor's drawing; vendors that tell no code points share the others' names."""
    names: dict[str, str] = {}
    for each in sets:
        names = each.codes | names
    found: dict[str, dict[str, str]] = {}
    for each in sets:
        for name, drawing in each.drawings.items():
            code = each.codes.get(name) or names.get(name)
            if code and _is_identity(code):
                found.setdefault(code, {}).setdefault(each.vendor, drawing)
    return {code: found[code] for code in sorted(found) if len(found[code]) >= DRAWINGS}


def render(drawing: str, size: int) -> Image.Image | None:
    """The SVG on white, RGB [size, size]; None if it cannot be drawn or refers to anything outside itself."""
    import resvg_py

    if re.search(r"""href\s*=\s*["'](?!#)|url\(\s*["']?(?!#)|<!""", drawing):
        return None
    try:
        content = resvg_py.svg_to_bytes(
            svg_string=drawing, width=size, height=size, background="white", skip_system_fonts=True
        )
    except ValueError:
        return None
    with Image.open(io.BytesIO(bytes(content)), formats=["PNG"]) as image:
        found = Image.new("RGB", (size, size), "white")
        found.paste(image.convert("RGB"), ((size - image.width) // 2, (size - image.height) // 2))
    return found


def emoji(
    out: str, packages: str = "", size: int = 64, test_share: float = 1 / 3, images: int = 2, seed: int = 0
) -> None:
    """Draws a data set: emoji are the identities, vendors' drawings their images; OUT/train and OUT/test share none.

    Args:
        out: a new folder; OUT/licences.txt lists the packages and their licences.
        packages: must be given: a folder with unpacked npm packages @iconify-json/NAME (noto noto-v1 openmoji twemoji emojione emojione-v1
            fluent-emoji-flat fxemoji), searched to the bottom.
        size: side of the images in pixels.
        test_share: share of the emoji that go to OUT/test, with all their drawings, in (0, 1).
        images: of each training emoji, chosen by seed; 0: all.
        seed: another one splits otherwise.
    """
    if not 8 <= size <= 1024:
        raise ValueError(f"size must be in [8, 1024] pixels, got {size}")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be in (0, 1), got {test_share}")
    if images != 0 and images < 2:
        raise ValueError(f"images must be 0 (all) or at least 2, got {images}")
    if not packages or not Path(packages).is_dir():
        raise FileNotFoundError(f"packages must be a folder with npm's icon packages, got {printable(packages)!r}")
    try:
        import resvg_py  # noqa: F401 (render needs it)
    except ImportError:
        raise ImportError("emoji are drawn by the package resvg-py: pip install 'sst-fast[emoji]'") from None
    target = Path(out)
    with appearing(target) as temporary:
        sets = [read_set(path) for path in sorted(Path(packages).rglob("icons.json"))]
        sets = [each for each in sets if each.vendor not in LEFT_OUT]
        found = identities(sets)
        if len(found) < 4:
            names = " ".join(each.vendor for each in sets) or "none"
            raise ValueError(
                f"packages: {printable(packages)} has {len(found)} emoji with at least {DRAWINGS} drawings, 4 are needed (packages "
                f"found: {names}); for each NAME of {PACKAGES}: npm pack @iconify-json/NAME, and unpack it there"
            )
        rng = random.Random(f"{seed}/split")
        mixed = rng.sample(list(found), len(found))
        held = min(max(2, round(test_share * len(mixed))), len(mixed) - 2)
        parts = {"train": mixed[held:], "test": mixed[:held]}
        counts, failed = dict.fromkeys(parts, 0), 0
        with progress(total=len(found), unit="emoji") as bar:
            for part, codes in parts.items():
                for code in codes:
                    chosen = sorted(found[code])
                    if part == "train" and images:
                        chosen = rng.sample(chosen, min(images, len(chosen)))
                    drawn = {vendor: render(found[code][vendor], size) for vendor in chosen}
                    whole = {vendor: image for vendor, image in drawn.items() if image}
                    failed += len(drawn) - len(whole)
                    if len(whole) > 1:
                        folder = temporary / part / code.upper()
                        folder.mkdir(parents=True)
                        for vendor, image in whole.items():
                            image.save(folder / f"{vendor}.png")
                        counts[part] += len(whole)
                    bar.update()
        credits = "".join(f"{each.credit}\n" for each in sets)
        (temporary / LICENCES).write_text(
            f"package | version | licence | its text | author | where\n{credits}", encoding="utf-8"
        )
    print(f"{len(found):,} emoji with at least {DRAWINGS} drawings in {len(sets)} packages")
    for part, codes in parts.items():
        print(f"{len(codes):,} emoji, {counts[part]:,} images in {printable(target / part)}")
    if failed:
        print(f"{failed} drawings could not be rendered and were left out")
    print(f"licences: {printable(target / LICENCES)}")
