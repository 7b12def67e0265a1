"""What the host passes to a GPU's driver in whole training steps: tests/mock_driver.py, in a process without Triton's interpreter."""

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from sst_fast.backends.triton import compiled

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(compiled is None, reason="the extension is not built")

# Arguments that Triton's launcher binds for the kernel, and those of them that reach the driver: each costs the host time.
MOST = {
    "prepare_kernel": (35, 26), "sweep_kernel": (36, 22), "combine_kernel": (47, 34), "prototypes_kernel": (28, 15),
    "weigh_kernel": (47, 25), "gather_kernel": (13, 8), "again_kernel": (40, 24), "keep_kernel": (19, 15),
    "finish_prototypes_kernel": (11, 8),
}  # fmt: skip


@pytest.fixture(scope="module")
def trainings():
    """(backend: training, its steps)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("mock_driver.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    return [(name, list(mine)) for name, mine in groupby(steps, lambda step: step["training"])]


def test_nothing_is_compiled_in_the_middle_of_a_training(trainings):
    """Whatever the ring's position, the size of a batch and the number of slots: 0, 1, multiples of 16 and others."""
    again = [
        f"{name}: {step['step']}: {launch['kernel']}"
        for name, (_, *later) in trainings
        for step in later
        for launch in step["launches"]
        if launch["compiled"]
    ]
    assert again == []
    for name, (first, *later) in trainings:
        assert any(launch["compiled"] for launch in first["launches"]), name
        assert later


def test_every_kernel_is_launched_with_few_arguments(trainings):
    most = {}
    for launch in (launch for _, steps in trainings for step in steps for launch in step["launches"]):
        before = most.get(launch["kernel"], (0, 0))
        most[launch["kernel"]] = tuple(map(max, before, (launch["bound"], launch["passed"])))
    assert most.keys() == MOST.keys()
    assert {name: found for name, found in most.items() if any(map(int.__gt__, found, MOST[name]))} == {}


def test_arrays_are_what_kernels_take_them_for(trainings):
    """One row behind the other, but for the weights, whose rows are so many columns apart; and aligned, which is compiled in."""
    for name, steps in trainings:
        for launch in (launch for step in steps for launch in step["launches"]):
            assert set(launch["scattered"]) <= {"weights"}, (name, launch["kernel"])
            assert launch["unaligned"] == [], (name, launch["kernel"])


@pytest.mark.parametrize(
    ("training", "kernels"),
    [
        ("triton: queue, bfloat16", "prepare sweep combine"),
        ("triton: classes, bfloat16", "prepare sweep combine prepare prototypes"),
        ("staged: queue, bfloat16", "prepare weigh weigh weigh again combine"),
        (
            "staged: classes, bfloat16",
            "prepare weigh weigh again combine keep prepare finish_prototypes finish_prototypes",
        ),
    ],
)
def test_launches_of_a_step(trainings, training, kernels):
    """The staged sweep takes the slots in two chunks here, and the window in a third."""
    first, *_ = dict(trainings)[training]
    assert " ".join(launch["kernel"].removesuffix("_kernel") for launch in first["launches"]) == kernels
