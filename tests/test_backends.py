"""Which implementation runs: what is reported, what can be forced, and life without the extension."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sst_fast
from sst_fast.backends.choose import OPERATIONS, choose, compiled
from sst_fast.functional import margin_softmax

CPU = torch.device("cpu")


def test_every_operation_says_what_is_chosen_and_why():
    said = sst_fast.backends("cpu")
    assert set(said) == set(OPERATIONS)
    for choice in said.values():
        assert choice.implementations["reference"] == "available"
        assert choice.implementations[choice.chosen] == "available"
        assert choice.chosen in str(choice)
        assert choice.why


def test_forced_by_environment(monkeypatch):
    monkeypatch.setenv("SST_FAST_BACKEND", "reference")
    assert {choose(operation, CPU, None) for operation in OPERATIONS} == {"reference"}
    assert "forced by SST_FAST_BACKEND" in str(sst_fast.backends("cpu")["enqueue"])
    monkeypatch.setenv("SST_FAST_BACKEND", "enqueue=reference, dequeue=reference")
    assert choose("enqueue", CPU, None) == "reference"
    monkeypatch.delenv("SST_FAST_BACKEND")
    usual = choose("margin_softmax", CPU, None)
    monkeypatch.setenv("SST_FAST_BACKEND", "enqueue=reference")
    assert choose("margin_softmax", CPU, None) == usual


def test_the_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("SST_FAST_BACKEND", "cuda")
    assert choose("enqueue", CPU, "reference") == "reference"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fast", "SST_FAST_BACKEND: 'fast' is no backend, expected one of cuda, triton, cpu, reference"),
        ("cuda", "SST_FAST_BACKEND: margin_softmax cannot run on 'cuda'"),
        ("dance=cpu", "SST_FAST_BACKEND: 'dance' is no operation"),
    ],
)
def test_impossible_wishes_are_named(monkeypatch, value, message):
    monkeypatch.setenv("SST_FAST_BACKEND", value)
    with pytest.raises(ValueError, match=message):
        margin_softmax(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]))


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *code.split("\0")], env=os.environ | environment, capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip


def test_without_the_extension_plain_pytorch_serves_and_says_so_once():
    code = """
import sys; sys.modules["sst_fast._C"] = None
import torch, sst_fast
queue = sst_fast.GalleryQueue(8, 4)
criterion = sst_fast.SemiSiameseLoss(queue)
model = sst_fast.SemiSiamese(torch.nn.Linear(6, 4), criterion)
for _ in range(3):
    loss = model(torch.randn(3, 6), torch.randn(3, 6), torch.arange(3))
    loss.backward()
    model.update_gallery()
queue.dequeue(2)
print(len(queue), sst_fast.backends("cpu")["margin_softmax"].chosen, loss.isfinite().item())
"""
    done = run(f"-c\0{code}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "reference", "True"]
    assert done.stderr.count("cannot be imported") == 1


@pytest.mark.skipif(compiled is None, reason="the extension was not built")
@pytest.mark.parametrize("name", ["generic", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set_gives_right_answers(name):
    """The variants this processor would not choose, in a process of their own."""
    ran = run("-c\0from sst_fast import _C; print(_C.instruction_set())", SST_FAST_CPU=name)
    if ran.stdout.strip() != name:
        pytest.skip(f"no {name} here")
    done = run(
        "-m\0pytest\0-q\0tests/test_margin_softmax.py\0-k\0cpu and (sizes or wraps or extreme)", SST_FAST_CPU=name
    )
    assert done.returncode == 0, done.stdout
