"""What must be chosen before torch and triton are first imported, and what many tests share."""

import os

# Where several processes run tests, each computes with one thread: threads that wait for one another would take the cores from
# those that compute. Tests of several threads set their number themselves, and these wait without spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton's interpreter stands in for one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine or a first import must fail no test: none has a time limit.
settings.register_profile("untimed", settings.default, deadline=None)
settings.load_profile("untimed")
usual = settings(print_blob=True)
settings.register_profile("fuzz", usual, max_examples=2000, derandomize=False)  # make fuzz
settings.register_profile("few", usual, max_examples=30)  # make sanitize


def pytest_collection_modifyitems(items):
    """The longest first: the last two tests of a process are never taken over by another that has nothing left to do."""
    items.sort(key=lambda item: "in_the_interpreter" not in item.name)


@pytest.fixture
def faces(tmp_path):
    """Twelve people with three images each, for this test alone."""
    from runs import make_faces

    return make_faces(tmp_path / "faces")


@pytest.fixture
def one_thread():
    """Networks this small lose by a second thread, and very much so where tests already use every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
