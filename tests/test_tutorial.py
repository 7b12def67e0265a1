"""docs/tutorial.ipynb: its cells run, its network learns, and what is stored in it is what it prints and draws."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("notebook", DOCS / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(notebook):
    """Text and number of figures of each code cell, and the text's percentages."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    texts = ["".join("".join(o.get("text", "")) for o in cell["outputs"]) for cell in cells]
    figures = [sum("data" in o for o in cell["outputs"]) for cell in cells]
    return texts, figures, [float(number) for number in re.findall(r"([\d.]+)\s?%,", "".join(texts))]


def test_cells_run_in_one_namespace_and_their_outputs_are_kept(tool):
    cells = [{"cell_type": "code", "source": source, "outputs": ["old"], "metadata": {}} for source in (
        ["x = 3\n", "print(x)"], ["import matplotlib.pyplot as plt\n", "plt.plot([x, 1]);"], ["x += 1"],
    )]  # fmt: skip
    ran = tool.run({"cells": [{"cell_type": "markdown", "source": ["text"]}, *cells]}, "small")
    assert outputs(ran)[:2] == (["3\n", "", ""], [0, 1, 0])
    assert [cell.get("execution_count") for cell in ran["cells"]] == [None, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_tutorial_runs_and_its_network_learns(tool):
    stored = outputs(tool.read(DOCS / "tutorial.ipynb"))
    notebook = tool.read(DOCS / "tutorial.ipynb")
    (training,) = [cell for cell in notebook["cells"] if "EPOCHS = 100\n" in cell["source"]]
    training["source"][training["source"].index("EPOCHS = 100\n")] = "EPOCHS = 40\n"  # a shorter run shows it, too
    texts, figures, (before, after) = outputs(tool.run(notebook, "tutorial"))
    assert figures == stored[1]
    assert texts[1] == stored[0][1]  # what no rounding changes
    assert [bool(text) for text in texts] == [bool(text) for text in stored[0]]
    assert after > before + 2
    assert stored[2][1] > stored[2][0] + 5
