"""Hooks of MkDocs: formulas, notebooks and the references of docstrings become part of the pages while the site is built, so that no
page needs a script or anything from elsewhere for them."""

from __future__ import annotations

import base64
import json
import re
from html import unescape
from pathlib import PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# What pymdownx.arithmatex (generic: true) makes of $...$ and of $$...$$.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# What Markdown makes of a docstring's :class:`sst_fast.GalleryQueue`.
REFERENCE = re.compile(r":(?:mod|class|func|meth|attr|data):<code>([\w.]+)</code>")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to notebooks lead to their pages."""
    return markdown.replace(".ipynb)", ".md)")


def on_page_content(html: str, **_: Any) -> str:
    """The page with its formulas as MathML, and with links in the place of docstrings' references."""
    html = FORMULA.sub(lambda found: drawn(unescape(found[2]), found[1] == "div"), html)
    return REFERENCE.sub(lambda found: linked(found[1]), html)


def drawn(formula: str, alone: bool) -> str:
    """LaTeX as MathML; one that stands alone can scroll."""
    return f'<div class="formula">{convert(formula, display="block")}</div>' if alone else convert(formula)


def linked(name: str) -> str:
    """A name as code, for the plugin autorefs to link to its documentation where there is any."""
    return f'<autoref identifier="{name}" optional><code>{name}</code></autoref>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Notebooks give way to Markdown pages of the same name; their figures become files beside the others."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = PurePosixPath(notebook.src_uri).with_suffix("")
        page, figures = as_markdown(json.loads(notebook.content_string), f"figures/{name.name}")
        files.remove(notebook)
        files.append(File.generated(config, f"{name}.md", content=page))
        for path, content in figures.items():
            files.append(File.generated(config, str(name.parent / path), content=content))
    return files


def as_markdown(notebook: dict[str, Any], prefix: str) -> tuple[str, dict[str, bytes]]:
    """The page, and its figures by path: ``prefix`` and a number. A figure's alternative text is its cell's ``metadata.alt``."""
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append('```text title="printed"\n' + "".join(output["text"]) + "```")
            else:
                path = f"{prefix}_{len(figures) + 1}.png"
                figures[path] = base64.b64decode("".join(output["data"]["image/png"]))
                parts.append(f"![{cell['metadata']['alt']}]({path})")
    return "\n\n".join(parts) + "\n", figures
