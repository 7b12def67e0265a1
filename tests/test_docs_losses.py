"""docs/losses.md: every example runs as it stands and gives a finite loss."""

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parent.parent / "docs" / "losses.md").read_text()
EXAMPLES = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)


@pytest.mark.parametrize(("title", "text"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_examples_run(one_thread, title, text):
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    torch.manual_seed(0)
    names = {}
    exec(compile(code, title, "exec"), names)
    assert torch.isfinite(names["loss"])
    assert names["loss"].grad_fn is not None


def test_links_lead_to_titles():
    titles = {title.lower().replace(" ", "-") for title, _ in EXAMPLES}
    assert titles == set(re.findall(r"\(#([^)]+)\)", PAGE))
