"""The contract around the kernels: what autograd, torch.func, torch.compile and autocast's scaler see, and what a call costs."""

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from problems import MARGINS, make

from sst_fast import AMSoftmax, ArcSoftmax, GalleryQueue, Softmax, Window
from sst_fast.backends import choose
from sst_fast.backends.choose import backends
from sst_fast.backends.extension import compiled
from sst_fast.functional import margin_softmax

BACKENDS = ["reference"] + (["cpu"] if compiled is not None else [])
COMPILED = BACKENDS[1:]


SCALE_BACKENDS = [
    name for name, state in backends("cpu", trains_scale=True)["margin_softmax"].implementations.items()
    if state == "available" and name in BACKENDS
]  # fmt: skip


@pytest.fixture
def problem():
    return make(6, 40, 16, identities=30, empty=0.2).to(torch.float32)


def loss_of(problem, x, **options):
    return margin_softmax(x, problem.prototypes, problem.target, **problem.options(), **options)


# ---- explicit positives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_explicit_positive_is_infonce(backend, normalize):
    """MoCo's loss (He et al., CVPR 2020, eq. 1): the positive beside the queue, no identities."""
    x, p = torch.randn(2, 5, 12, dtype=torch.float64)
    w = torch.randn(30, 12, dtype=torch.float64)
    p, w = (p * 1.7, w * 0.6) if normalize else (F.normalize(p), F.normalize(w))
    results = []
    for ours in (True, False):
        a, b = x.clone().requires_grad_(), p.clone().requires_grad_()
        if ours:
            loss = margin_softmax(a, w, None, positive=b, margin=Softmax(), scale=10.0, normalize_prototypes=normalize,
                                  backend=backend)  # fmt: skip
        else:
            own, others = (F.normalize(b), F.normalize(w)) if normalize else (b, w)
            logits = torch.cat([(F.normalize(a) * own).sum(1, True), F.normalize(a) @ others.T], 1)
            loss = F.cross_entropy(10 * logits, torch.zeros(5, dtype=torch.int64))
        results.append((loss, *torch.autograd.grad(loss, (a, b))))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_explicit_positive_with_every_margin_and_trained_prototypes(backend, margin):
    """A probe's own row, named by ``target``, is no negative; -1 names none."""
    base = make(7, 40, 16, identities=30, empty=0.2)
    target = base.target.clone()
    target[::2] = -1
    results = []
    for name in (backend, "reference"):
        x, w = base.embedding.clone().requires_grad_(), base.prototypes.clone().requires_grad_()
        p = F.normalize(base.prototypes[base.target] + 0.3).requires_grad_()
        loss = margin_softmax(x, w, target, positive=p, margin=margin, reduction="none", backend=name, **base.options())
        weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
        results.append((loss, *torch.autograd.grad(loss @ weights, (x, w, p))))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-9 * expected.norm() + 1e-12


# ---- the window together with trained prototypes -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("margin", MARGINS[::2], ids=repr)
def test_window_and_trained_prototypes(backend, margin, normalize):
    base = make(9, 50, 16, start=45, identities=30, empty=0.1)
    results = []
    for name in (backend, "reference"):
        x, w = base.embedding.clone().requires_grad_(), (base.prototypes * 1.3).requires_grad_()
        loss = margin_softmax(x, w, base.target, margin=margin, reduction="none", backend=name,
                              normalize_prototypes=normalize, **base.options())  # fmt: skip
        weights = torch.linspace(-1, 2, len(x), dtype=torch.float64)
        results.append((loss, *torch.autograd.grad(loss @ weights, (x, w))))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-9 * expected.norm() + 1e-12
    assert torch.equal(results[0][2][base.window.slots], torch.zeros(9, 16, dtype=torch.float64))


# ---- half precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradients_meet_the_loss_scale_before_they_are_rounded(backend):
    """Without that, small gradients underflow: 2 % of the gradient was lost at a scale of 65,536."""
    base = make(256, 60, 16, masks=False).to(torch.float16)
    embedding = base.embedding * 100  # the larger the embedding, the smaller its gradient
    found, exact = [], None
    for dtype in (torch.float16, torch.float64):
        x = embedding.to(dtype).requires_grad_()
        loss = margin_softmax(x, base.prototypes.to(dtype), base.target, scale=16.0, backend=backend)
        (gradient,) = torch.autograd.grad(loss * 65536, x)
        found.append(gradient.double())
    exact = found.pop()
    assert (found[0] - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_summed_exactly(backend, dtype):
    """float16 ends at 65,504, bfloat16 counts to 256."""
    n = 3000 if dtype == torch.bfloat16 else 70_000
    x, w = torch.randn(1, 4).expand(n, 4), F.normalize(torch.randn(3, 4))
    target = torch.zeros(n, dtype=torch.int64)
    plain = margin_softmax(x, w, target, backend=backend)
    weighted = margin_softmax(x, w, target, weight=torch.ones(n, dtype=dtype), backend=backend)
    assert weighted.item() == pytest.approx(plain.item(), rel=1e-5)


# ---- derivatives ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", SCALE_BACKENDS)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("margin", [Softmax(), AMSoftmax(0.35), ArcSoftmax(0.5)], ids=repr)
def test_the_scale_has_the_gradient_of_a_temperature(margin, per_row, backend):
    """Against all logits through cross-entropy, label smoothing, weights and an ignored probe included."""
    p = make(9, 40, 12, masks=False)
    target = p.target.clone()
    target[2] = -100
    weight = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    results = []
    for ours in (True, False):
        x = p.embedding.clone().requires_grad_()
        s = (torch.linspace(8, 20, 9) if per_row else torch.tensor(12.0)).double().requires_grad_()
        if ours:
            loss = margin_softmax(x, p.prototypes, target, margin=margin, scale=s, weight=weight, label_smoothing=0.1,
                                  backend=backend)  # fmt: skip
        else:
            cosines = F.normalize(x) @ p.prototypes.T
            own = cosines[torch.arange(9), p.target]
            logits = cosines.index_put((torch.arange(9), p.target), margin.psi(own)) * s.expand(9)[:, None]
            each = F.cross_entropy(logits, target, reduction="none", label_smoothing=0.1)
            loss = (each * weight).sum() / weight[target != -100].sum()
        results.append((loss, *torch.autograd.grad(loss, (x, s))))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_the_scales_gradient_with_every_margin(margin, backend):
    """Against the reference: masks, a window, explicit positives, label smoothing, straight-through gradients, float32."""
    window = make(7, 40, 16, start=37, identities=30, empty=0.2)
    masked = make(7, 40, 16, identities=30, empty=0.2)
    positive = replace(masked, positive=F.normalize(masked.embedding + 0.3))
    for p in (window, masked, positive):
        for options in ({}, {"label_smoothing": 0.2}, {"gradient": "straight_through"}):
            results = []
            for name, dtype in ((backend, torch.float64), (backend, torch.float32), ("reference", torch.float64)):
                q = p.to(torch.float32).to(dtype)
                s = torch.linspace(2, 60, len(q.embedding), dtype=dtype).requires_grad_()
                loss = margin_softmax(q.embedding, q.prototypes, q.target, positive=q.positive, margin=margin, scale=s,
                                      reduction="sum", backend=name, **q.options(), **options)  # fmt: skip
                results.append(torch.autograd.grad(loss, s)[0].double())
            exact, rounded, expected = results
            assert (exact - expected).norm() <= 1e-9 * expected.norm()
            assert (rounded - expected).norm() <= 1e-5 * max(expected.norm(), 1)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_scales_gradient_is_found_without_the_others(reduction, backend):
    """The embeddings need none; an ignored probe, whatever it holds, gives none."""
    p = make(6, 40, 16, masks=False).to(torch.float32)
    p.embedding[3], p.target[3] = torch.nan, -100
    found = []
    for name in (backend, "reference"):
        s = torch.full((6,), 16.0, requires_grad=True)
        loss = margin_softmax(p.embedding, p.prototypes, p.target, scale=s, reduction=reduction, backend=name)
        found.append(torch.autograd.grad(loss.sum(), s)[0])
    assert found[0][3] == 0
    assert torch.allclose(*found, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", COMPILED)
def test_the_scales_gradient_as_target_probability_nears_one(backend):
    """1 - p of about 1e-9: it keeps its relative accuracy instead of vanishing, or drowning in rounding."""
    w = F.normalize(torch.randn(50, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        s = torch.tensor(30.0, dtype=dtype, requires_grad=True)
        loss = margin_softmax(w[:10].to(dtype), w.to(dtype), torch.arange(10), margin=Softmax(), scale=s, backend=name)
        results.append(torch.autograd.grad(loss, s)[0])
    assert results[1].abs() < 1e-7
    assert results[0].item() == pytest.approx(results[1].item(), rel=1e-4)


@pytest.mark.parametrize("backend", COMPILED)
def test_the_contract_of_a_trained_scale(backend):
    p = replace(make(5, 20, 8, masks=False), sub_centers=2)
    p.target = p.target // 2
    s = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)

    def loss(s, x=p.embedding):
        return margin_softmax(x, p.prototypes, p.target, scale=s, sub_centers=2, backend=backend)

    assert torch.autograd.gradcheck(loss, (s,))
    (found,) = torch.autograd.grad(loss(s), s)
    assert torch.allclose(torch.func.grad(loss)(s.detach()), found)
    x = p.embedding.clone().requires_grad_()
    for leaf in (s, x):
        (first,) = torch.autograd.grad(loss(s, x), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            first.sum().backward()
    q = replace(p, embedding=x, prototypes=p.prototypes.requires_grad_(), scale=s)
    torch.library.opcheck(torch.ops.sst_fast.margin_softmax, (*q.packed(), backend))


@pytest.mark.slow
@pytest.mark.parametrize("backend", SCALE_BACKENDS)
def test_a_trained_scale_compiles(backend):
    """A logit scale as CLIP's, exp of a parameter, and sub-centres; in one graph."""
    torch.compiler.reset()
    p = make(8, 20, 8, masks=False).to(torch.float32)

    def function(x, w, log_scale):
        return margin_softmax(x, w, p.target // 2, scale=log_scale.exp(), sub_centers=2, backend=backend)

    results = []
    for f in (function, torch.compile(function, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (p.embedding, p.prototypes, torch.tensor(2.5))]
        loss = f(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for eager, graph in zip(*results, strict=True):
        assert (eager - graph).norm() <= 1e-5 * eager.norm()


@pytest.mark.parametrize("backend", COMPILED)
def test_torch_func_grad(problem, backend):
    x = problem.embedding.clone().requires_grad_()
    loss_of(problem, x, backend=backend).backward()
    found = torch.func.grad(lambda x: loss_of(problem, x, backend=backend))(problem.embedding)
    assert torch.equal(found, x.grad)


@pytest.mark.parametrize("backend", COMPILED)
def test_forward_mode_is_refused_not_zero(problem, backend):
    x = problem.embedding
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: loss_of(problem, x, backend=backend), (x,), (x,))
    _, found = torch.func.jvp(lambda x: loss_of(problem, x, backend="reference"), (x,), (torch.ones_like(x),))
    gradient = torch.func.grad(lambda x: loss_of(problem, x, backend="reference"))(x)
    assert found.item() == pytest.approx(gradient.sum().item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_for_every_size_and_scale(backend):
    torch.compiler.reset()
    compiled_loss = torch.compile(
        lambda x, w, y, scale: margin_softmax(x, w, y, scale=scale, backend=backend), dynamic=True, fullgraph=True
    )
    for n, k, scale in ((6, 40, 30.0), (7, 41, 20.0), (9, 50, 12.5)):
        p = make(n, k, 16, masks=False).to(torch.float32)
        results = []
        for function in (compiled_loss, lambda *a: margin_softmax(*a[:3], scale=a[3], backend=backend)):
            x = p.embedding.clone().requires_grad_()
            loss = function(x, p.prototypes, p.target, scale)
            loss.backward()
            results.append((loss.detach(), x.grad))
        for found, expected in zip(*results, strict=True):
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


# ---- bad input --------------------------------------------------------------------------------------------------------------

UNIT = F.normalize(torch.randn(1, 2, 16), dim=2)
IDS = torch.arange(2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        (Window(UNIT, IDS, torch.tensor([]), IDS), TypeError, "window.start must be int64, got float32"),
        (Window(UNIT, IDS, torch.tensor([1, 2]), IDS), ValueError, r"window.start must have shape \[\], got \[2\]"),
        (Window(UNIT, IDS, torch.tensor(1, dtype=torch.int32), IDS), TypeError, "window.start must be int64, got int32"),
        (Window(UNIT, IDS, torch.tensor(1, device="meta"), IDS), ValueError, "window.start must be on cpu .*, got meta"),
        (Window(UNIT, IDS, torch.tensor(99), IDS), IndexError, r"window.start is 99, expected a slot in \[0, 40\)"),
        (Window(UNIT, IDS, torch.tensor(-1), IDS), IndexError, r"window.start is -1, expected a slot in \[0, 40\)"),
        (Window(UNIT.clone().requires_grad_(), IDS, torch.tensor(0), IDS), ValueError, "window.features must not require a gradient"),
    ],
)  # fmt: skip
def test_bad_windows_are_named(problem, window, error, message, backend):
    with pytest.raises(error, match=message):
        margin_softmax(problem.embedding, problem.prototypes, problem.target, window=window, backend=backend)


def test_bad_positives_are_named(problem):
    x, w = problem.embedding, problem.prototypes
    with pytest.raises(ValueError, match=r"positive must have shape \[6, 16\], got \[5, 16\]"):
        margin_softmax(x, w, None, positive=x[:5])
    with pytest.raises(TypeError, match=r"target must be a tensor .* unless positive is given, got None"):
        margin_softmax(x, w, None)


# ---- what a call costs ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(compiled is None, reason="the extension is not built")
def test_a_call_looks_nothing_up(problem, monkeypatch):
    """Backends are asked once: afterwards there is no look at the environment, at files or at packages."""
    queue = GalleryQueue(40, 16)

    def calls():
        loss_of(problem, problem.embedding)
        queue.window(problem.embedding, torch.arange(6))
        queue.enqueue(problem.embedding, torch.arange(6))

    choose.forget()
    calls()

    def never(*arguments):
        raise AssertionError(f"looked up {arguments}")

    monkeypatch.setattr(importlib.util, "find_spec", never)
    monkeypatch.setattr(os.environ, "get", never)
    calls()


@pytest.mark.skipif(compiled is None, reason="the extension is not built")
def test_the_first_call_imports_no_compiler():
    code = """
import sys, torch, sst_fast
from sst_fast.functional import margin_softmax
x = torch.randn(4, 8, requires_grad=True)
margin_softmax(x, torch.nn.functional.normalize(torch.randn(9, 8)), torch.arange(4)).backward()
print("torch._dynamo" in sys.modules, "triton" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_tensor_margins_and_scales_are_not_kept(problem):
    """Parameters that are tensors are read at every call; numbers once."""
    m = torch.tensor(0.1)
    margin = AMSoftmax(m)
    first = loss_of(problem, problem.embedding, margin=margin)
    m.fill_(0.5)
    assert not torch.equal(loss_of(problem, problem.embedding, margin=margin), first)
    a = replace(problem, margin=ArcSoftmax(0.5))
    assert a.packed()[5] == a.packed()[5]
    assert a.packed()[5][:3] == [30.0, 0.0, 0.5]
    assert math.isfinite(first.item())
