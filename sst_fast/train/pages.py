"""Self-contained HTML pages: one look for all, light and dark, from a phone's width up; figures are SVG inside the page."""

from __future__ import annotations

import io
import platform
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import sst_fast
from sst_fast.train.checkpoint import replacing

# Colours of figures and text, on a light page and on a dark one. Figures are drawn in the first; the page then says which.
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1f2328", "#e3e6ea"), "muted": ("#667079", "#98a2ad"), "line": ("#d5d9de", "#3b424a"),
    "paper": ("#ffffff", "#15181c"), "note": ("#f5f3ed", "#23272d"),
    "green": ("#0b6e4f", "#4cc79a"), "red": ("#c8553d", "#ec8a73"), "blue": ("#3d5a80", "#8cb0dd"),
    "ochre": ("#b07617", "#e5b25d"), "violet": ("#7b2d8b", "#cb8ddb"), "gray": ("#8d99ae", "#7c879a"),
}  # fmt: skip
COLOURS = {name: light for name, (light, _) in PALETTE.items()}
CURVES = [COLOURS[name] for name in ("green", "red", "blue", "ochre", "violet", "gray")]  # of what is compared


def render(template: str, path: Path, **values: object) -> None:
    """Writes ``templates/TEMPLATE`` with these values to ``path``, replacing it in one step."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sst_fast.train"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template(template).render(palette=PALETTE, date=date.today().isoformat(), **values)
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def figure(title: str, draw: Callable[[Axes], None]) -> Markup:
    """What ``draw`` draws, as a ``figure`` element in the page's colours with this title over it."""
    style: Any = {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
        "grid.color": COLOURS["line"], "grid.linewidth": 0.6, "legend.frameon": False,
        **{f"{part}.color": COLOURS["ink"] for part in ("text", "xtick", "ytick")},
        **{f"axes.{part}color": COLOURS["ink"] for part in ("edge", "label")},
    }  # fmt: skip
    with matplotlib.rc_context(style):
        made = Figure(figsize=(4.2, 3.0), layout="constrained")
        axes = made.add_subplot()
        axes.grid(True)
        axes.set_axisbelow(True)
        draw(axes)
        buffer = io.StringIO()
        made.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Markup(f"<figure><figcaption>{escape(title)}</figcaption>{_in_page(buffer.getvalue(), title)}</figure>")


def legend(axes: Axes) -> None:
    """Names the curves above the axes, where no curve can cross the names."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(
        1, 62 // (max(map(len, labels)) + 8)
    )  # about 62 letters fit beside each other; a line's sample takes 8
    axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=8)


def _in_page(svg: str, title: str) -> str:
    """Matplotlib's file as an element: without prologue, size and the names of groups, which would be the same in each."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{escape(title)}">', svg, count=1
    )
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def versions() -> dict[str, str]:
    """What ran this: versions, device, backends."""
    threads = torch.get_num_threads()
    on_cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else on_cpu
    chosen = ", ".join(f"{name}: {choice.chosen}" for name, choice in sst_fast.backends().items())
    return {
        "sst-fast": sst_fast.__version__, "Python": platform.python_version(), "PyTorch": torch.__version__,
        "numpy": np.__version__, "device": device, "backends": chosen, "platform": platform.platform(),
    }  # fmt: skip
