"""The Triton kernels, interpreted on the CPU, against the float64 reference; and compiled, though never run, for every GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import problems
import pytest
import torch
from problems import answer, make

from sst_fast import AMSoftmax, ArcSoftmax, CircleLoss, CombinedMargin
from sst_fast.functional import margin_softmax
from sst_fast.margins import FUSED, KINDS

triton = pytest.importorskip("triton")
# Older interpreters convert one-element arrays to numbers, which newer numpy refuses.
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
pytestmark = pytest.mark.skipif(OLD, reason=f"Triton {triton.__version__}'s interpreter needs numpy < 2.4")

MARGINS = [
    *problems.MARGINS[:6], CombinedMargin(1.0, -0.2, 0.3, 0.0, "hold"), *problems.MARGINS[6:],
    AMSoftmax(torch.linspace(0.1, 0.5, 12)),
]  # fmt: skip


def both(problem, **options):
    """(loss, statistics, gradients) of the kernel, and of the reference in float64 on the same numbers."""
    results = []
    for backend, p in (("triton", problem), ("reference", problem.to(torch.float64))):
        x, w = p.embedding.detach().requires_grad_(), p.prototypes.detach()
        w.requires_grad_(options.get("prototypes", False))
        rest = {name: value for name, value in options.items() if name != "prototypes"}
        loss, statistics = margin_softmax(x, w, p.target, reduction="none", backend=backend, return_statistics=True,
                                          **p.options(), **rest)  # fmt: skip
        factors = torch.linspace(-1, 2, len(x), dtype=loss.dtype)
        leaves = (x, w) if w.requires_grad else (x,)
        results.append((loss.detach(), statistics, torch.autograd.grad(loss @ factors, leaves)))
    return results


def check(problem, tolerance=1e-5, **options):
    (loss, seen, gradients), (expected, known, exact) = both(problem, **options)
    assert (loss.double() - expected).abs().max() <= tolerance * max(1, expected.abs().max().item())
    for a, b in zip(gradients, exact, strict=True):
        assert a.dtype == problem.embedding.dtype
        assert (a.double() - b).norm() <= 3 * tolerance * max(b.norm().item(), 0.05)
    for name in ("target_cosine", "hardest_cosine"):
        assert torch.allclose(getattr(seen, name).double(), getattr(known, name).double(), atol=max(1e-5, tolerance))
    assert torch.allclose(seen.lse.double(), known.lse.double(), atol=1e-4 + 64 * tolerance)
    assert (seen.beats_target - known.beats_target).abs().max() <= (1 if tolerance < 1e-4 else 4)
    assert torch.equal(seen.hardest_slot < 0, known.hardest_slot < 0)


def test_every_margin_is_here():
    assert {margin.kind for margin in MARGINS} == set(FUSED) == set(range(len(KINDS)))


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_every_margin(margin):
    check(make(12, 50, 24, identities=15, empty=0.2).to(torch.float32), margin=margin, scale=30.0)


@pytest.mark.parametrize("margin", MARGINS[::3], ids=repr)
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"gradient": "straight_through"}, {"scale": torch.linspace(1, 64, 12)}], ids=repr)  # fmt: skip
def test_options(margin, options):
    check(make(12, 50, 24, identities=15).to(torch.float32), margin=margin, **options)


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 3), (1, 200, 16), (70, 33, 40), (33, 300, 128), (5, 65, 300)])
def test_sizes(n, k, d):
    check(make(n, k, d).to(torch.float32))


@pytest.mark.parametrize(("k", "start"), [(50, 0), (50, 45), (50, 30), (12, 5)])
@pytest.mark.parametrize("normalize", [False, True])
def test_window_wraps_round(k, start, normalize):
    problem = make(12, k, 20, start=start, identities=30, empty=0.2)
    if normalize:
        window = replace(problem.window, features=problem.window.features * 1.7)
        problem = replace(problem, prototypes=problem.prototypes * 0.6, window=window)
    check(problem.to(torch.float32), normalize_prototypes=normalize)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"normalize_prototypes": True}, {"gradient": "straight_through"}], ids=repr)  # fmt: skip
@pytest.mark.parametrize("margin", MARGINS[1::4], ids=repr)
def test_trainable_prototypes(margin, options):
    problem = make(12, 90, 24, identities=30, empty=0.1).to(torch.float32)
    check(problem, margin=margin, prototypes=True, scale=16.0, **options)


@pytest.mark.parametrize("scale", [1.0, 64.0, 256.0])
@pytest.mark.parametrize("margin", [AMSoftmax(0.35), ArcSoftmax(0.5), CircleLoss()], ids=repr)
def test_extreme_cosines(margin, scale):
    eye = torch.eye(20, 24, dtype=torch.float64)
    problem = replace(
        make(1, 1, 24, masks=False), embedding=torch.cat([eye, -eye]), prototypes=torch.cat([eye, -eye, eye]),
        target=torch.arange(40),
    )  # fmt: skip
    loss = margin_softmax(problem.embedding.float(), problem.prototypes.float(), problem.target, margin=margin,
                          scale=scale, reduction="none", backend="triton")  # fmt: skip
    assert torch.allclose(loss.double(), answer(problem, margin, scale)[0].loss, rtol=1e-5, atol=1e-5)


def test_targets_near_one():
    """Where an angular margin's slope magnifies the rounding of the target cosine."""
    problem = make(12, 50, 24)
    step = torch.logspace(-4, -1, 12, dtype=torch.float64)[:, None]
    near = problem.prototypes[problem.target] + step * problem.embedding
    check(replace(problem, embedding=near).to(torch.float32), margin=ArcSoftmax(0.5), scale=64.0)


def test_half_precision():
    check(make(12, 90, 24).to(torch.float16), 2e-3, scale=16.0)
    check(make(12, 90, 24).to(torch.float32, torch.float16), 5e-3, scale=16.0)
    check(
        make(12, 90, 24, start=80).to(torch.float32, torch.float8_e4m3fn), 2e-2, scale=16.0, normalize_prototypes=True
    )


def test_targets_that_are_no_slots_poison_their_own_rows():
    """A check would have to wait for the device."""
    problem = make(6, 40, 12, start=30).to(torch.float32)
    target = problem.target.clone()
    target[1], target[4] = 40, -3
    x = problem.embedding.clone().requires_grad_()
    loss = margin_softmax(x, problem.prototypes, target, reduction="none", backend="triton", window=problem.window)
    loss.sum().backward()
    assert torch.isnan(loss).nonzero().flatten().tolist() == [1, 4]
    assert torch.isnan(x.grad).any(1).nonzero().flatten().tolist() == [1, 4]


def test_nothing_but_the_target_and_bad_rows():
    problem = make(6, 40, 12).to(torch.float32)
    x = problem.embedding.clone()
    x[2, 3] = torch.nan
    x[4] = 0
    x.requires_grad_()
    loss = margin_softmax(x, problem.prototypes, problem.target, reduction="none", backend="triton")
    loss.sum().backward()
    assert torch.isnan(loss).tolist() == [i == 2 for i in range(6)]
    assert torch.isnan(x.grad).any(1).tolist() == [i == 2 for i in range(6)]
    empty = torch.full((40,), -1)
    alone = margin_softmax(x[:2], problem.prototypes, problem.target[:2], slot_identity=empty, backend="triton")
    assert alone.item() == 0


@pytest.mark.slow
def test_every_configuration_compiles_for_every_gpu():
    """In a process of its own, without the interpreter: fits shared memory, spills nothing, uses tensor cores."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
