"""Runs notebooks and stores what they print and draw: ``python docs/notebook.py docs/tutorial.ipynb``.

A notebook is run as Jupyter runs it, cell by cell in one namespace, but needs no Jupyter.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def read(path: Path) -> dict[str, Any]:
    """The notebook in this file."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def run(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """Runs the code cells, and puts text printed to stdout and figures left open in place of their outputs."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"{name}, cell {count}", "exec"), namespace)
        outputs: list[dict[str, Any]] = []
        if printed.getvalue():
            text = printed.getvalue().splitlines(keepends=True)
            outputs.append({"output_type": "stream", "name": "stdout", "text": text})
        for number in plt.get_fignums():
            png = io.BytesIO()
            plt.figure(number).savefig(png, format="png", dpi=100, metadata={"Software": None})
            plt.close(number)
            data = {"image/png": base64.b64encode(png.getvalue()).decode() + "\n"}
            outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
        cell |= {"execution_count": count, "outputs": outputs}
    return notebook


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        text = json.dumps(run(read(path), path.name), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
