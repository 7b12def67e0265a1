"""Every Python block of README and docs runs; every picture and page that they name is there; every margin has its section."""

import doctest
import math
import re
from pathlib import Path

import pytest
import torch

import sst_fast
from sst_fast.backends import model
from sst_fast.backends.backend import Problem
from sst_fast.margins import MARGINS
from sst_fast.nn import queues, symmetric

CUDA = torch.device("cuda")
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTED_ELSEWHERE = {"losses", "migration"}  # test_docs_losses.py, test_docs_migration.py: these hold them to more
# A block after "<!-- not run: why -->" is left out.
FENCE = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^( *)```python\n(.*?)^\2```", re.MULTILINE | re.DOTALL)


def names() -> dict[str, object]:
    """What a reader has already: a network, a loader of two images an identity, features and labels."""
    torch.manual_seed(0)
    identities = torch.arange(12).view(3, 4)
    return {
        "torch": torch,
        "sst_fast": sst_fast,
        "backbone": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 512)),
        "loader": [(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), identity) for identity in identities],
        "embedding": torch.randn(4, 16, requires_grad=True),
        "prototypes": torch.nn.functional.normalize(torch.randn(32, 16)),
        "target": torch.arange(4),
        "embeddings": torch.nn.functional.normalize(torch.randn(40, 16)),
        "labels": torch.arange(40) // 2,
        "cosines": torch.rand(100),
        "genuine": torch.arange(100) % 2 == 0,
    }


def blocks(page: Path) -> list[str]:
    found = []
    for left_out, indent, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if not left_out:
            found.append("\n".join(line.removeprefix(indent) for line in code.split("\n")))
    return found


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p) and p.stem not in TESTED_ELSEWHERE], ids=lambda page: page.stem
)
def test_code_runs(page):
    namespace = names()
    for number, code in enumerate(blocks(page)):
        exec(compile(code, f"{page.name}, block {number + 1}", "exec"), namespace)


@pytest.mark.parametrize(
    "example",
    [
        test
        for module in (queues, symmetric)
        for test in doctest.DocTestFinder(exclude_empty=True).find(module)
        if test.examples
    ],
    ids=lambda example: example.name.removeprefix("sst_fast.nn."),
)
def test_examples_of_docstrings_run(example):
    torch.manual_seed(0)
    dim = 512 if example.name.endswith("DCQ") else 128
    rows = {
        name: torch.randn(4, dim, requires_grad=True)
        for name in ("query", "embedding", "view_a", "view_b", "image_features", "text_features")
    }
    label = torch.tensor([0, 0, 1, 1])
    example.globs = rows | {
        "math": math, "torch": torch, "sst_fast": sst_fast, "key": torch.randn(4, dim), "identity": label, "label": label,
        "features": torch.randn(4, 2, dim, requires_grad=True), "logit_scale": torch.tensor(2.0),
    }  # fmt: skip
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    assert torch.isfinite(example.globs["loss"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} names {target}, which is not there"


def test_no_element_has_the_id_of_a_heading():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        slugs = [re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for title in re.findall(r"^#+ (.+)$", text, re.M)]
        assert not set(re.findall(r'<\w+ id="([^"]+)"', text)) & set(slugs), page.name


def test_the_models_predictions_lie_above_the_calculators_bounds():
    script = (ROOT / "docs" / "assets" / "calculator.js").read_text(encoding="utf-8")
    devices = re.findall(r'"([^"]+)": \[([\d.]+)e12, ([\d.]+)e12, [\d.]+e12, ([\d.]+)e12\]', script)
    known = {"H100 SXM": (90, 132), "A100 80 GB": (80, 108), "RTX 4090": (89, 128), "RTX 3090": (86, 82)}
    assert known.keys() <= {name for name, *_ in devices}
    for name, *numbers in devices:
        if name not in known:
            continue
        bfloat16, float32, memory = (1e12 * float(number) for number in numbers)
        for dtype, peak in ((torch.bfloat16, bfloat16), (torch.float32, float32)):
            problem = Problem("margin_softmax", CUDA, torch.float32, dtype, dim=512, probes=1024, slots=1_000_000)
            bound = max(2 * 2 * 1024 * 1e6 * 512 / peak, 1e6 * 512 * dtype.itemsize / memory)
            for predicted in (model.fused_time, model.staged_time):
                assert bound < predicted(problem, *known[name]) < 20 * bound, (name, dtype, predicted.__name__)


def test_every_margin_has_a_section_and_a_figure():
    text = (ROOT / "docs" / "margins.md").read_text(encoding="utf-8")
    for name, margin in MARGINS.items():
        assert f"## {margin.__name__}\n" in text
        assert f"figures/margin_{name}.svg" in text
