"""The fused loss: every backend against the float64 reference, exactness at the extremes, and the contract."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import MARGINS, Problem, answer, make

from sst_fast import AMSoftmax, ArcSoftmax, GalleryQueue, Softmax, Window
from sst_fast.backends.choose import backends
from sst_fast.functional import margin_softmax
from sst_fast.margins import (
    AdaFace,
    ArcNegFace,
    CircleLoss,
    CombinedMargin,
    CurricularFace,
    MagFace,
    MVSoftmax,
    NPCFace,
)

# Triton, interpreted, is slow: test_triton.py has sizes for it.
STATES = backends("cpu")["margin_softmax"].implementations
BACKENDS = [name for name, state in STATES.items() if state == "available" and name != "triton"]
COMPILED = [name for name in BACKENDS if name != "reference"]
# Relative to the largest loss and to the gradient's norm. float32: a cosine near 1 is held to 2^-25, which a scale of 256
# makes 8e-6. Half precision is compared on its rounded inputs, so what remains is the rounding of the gradient, 2^-9 and
# 2^-12 of each number at most; with bfloat16 queues also that of the weights of slots, 2^-9, where the sum that they make
# may be a few times smaller than they are (targets pull against negatives).
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
QUEUE_DTYPES = [*TOLERANCE, torch.float8_e4m3fn]


def check(problem: Problem, margin=AMSoftmax(0.35), scale=30.0, backend="cpu", ties=False, **options) -> None:
    tolerance = TOLERANCE[problem.embedding.dtype]
    leaf = problem.embedding.detach().requires_grad_()
    loss, statistics = margin_softmax(
        leaf, problem.prototypes, problem.target, margin=margin, scale=scale, reduction="none", backend=backend,
        return_statistics=True, **problem.options(), **options,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    expected, expected_gradient = answer(problem, margin, scale, **options)
    assert gradient.dtype == leaf.dtype
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    size = expected.loss.abs().max().clamp_min(1e-30)
    loss_tolerance = tolerance
    if getattr(margin, "kind", None) == CombinedMargin.kind and (1 - expected.target_cosine.abs()).min() < 1e-12:
        # The arc cosine makes 2e-8 of the last bit of a cosine of 1; SphereFace multiplies it by 4.
        loss_tolerance = max(tolerance, 1e-7 * float(torch.as_tensor(scale).max()))
    assert (loss.double() - expected.loss).abs().max() <= loss_tolerance * torch.maximum(size, torch.tensor(1.0))
    error = (gradient.double() - expected_gradient).norm()
    # float16 has nothing between 0 and 6e-8.
    smallest = torch.finfo(leaf.dtype).smallest_normal * torch.finfo(leaf.dtype).eps * leaf.numel() ** 0.5
    assert error <= tolerance * expected_gradient.norm() + max(smallest, 1e-12), (
        error / expected_gradient.norm()
    ).item()
    assert torch.allclose(statistics.target_cosine.double(), expected.target_cosine, atol=1e-5)
    assert torch.allclose(statistics.hardest_cosine.double(), expected.hardest_cosine, atol=1e-5)
    assert torch.allclose(statistics.lse.double(), expected.lse, atol=1e-5 * scale + 1e-5 * size.item(), rtol=1e-5)
    alone = expected.hardest_slot < 0
    assert torch.equal(statistics.hardest_slot < 0, alone)
    if not ties:  # rounding decides whether a slot that ties with the target counts
        assert (statistics.beats_target - expected.beats_target).abs().max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_agrees_with_reference(backend, data):
    k = data.draw(st.integers(1, 300), "k")
    d = data.draw(st.integers(1, 200), "d")
    windowed = data.draw(st.booleans(), "windowed")
    problem = make(
        data.draw(st.integers(1, min(k, 70) if windowed else 140), "n"),
        k,
        d,
        seed=data.draw(st.integers(0, 9999), "seed"),
        start=data.draw(st.integers(0, k - 1), "start") if windowed else None,
        groups=data.draw(st.integers(1, 3), "groups"),
        identities=data.draw(st.sampled_from([2, 5, 50, None]), "identities"),
        empty=data.draw(st.sampled_from([0.0, 0.5, 1.0]), "empty"),
        masks=data.draw(st.booleans(), "masks"),
    )
    dtype = data.draw(st.sampled_from(list(TOLERANCE)), "dtype")
    queue_dtype = data.draw(st.sampled_from(QUEUE_DTYPES), "queue dtype")
    check(
        problem.to(dtype, queue_dtype),
        data.draw(st.sampled_from(MARGINS), "margin"),
        data.draw(st.sampled_from([1.0, 30.0, 64.0]), "scale"),
        backend,
        ties=d < 16,  # rows of few features in bfloat16 coincide
        mask_empty=data.draw(st.booleans(), "mask_empty"),
    )


# N: one row, one panel of each width and its neighbours, several blocks; K: one tile and its neighbours, several
# chunks; D: one pass of product 1 (128) and its neighbours, the tile sizes' steps at 512 and 1024.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [
        (1, 1, 16),
        (1, 70_000, 64),
        (16, 96, 128),
        (17, 97, 129),
        (33, 1000, 512),
        (64, 193, 513),
        (65, 400, 1024),
        (150, 2000, 100),
    ],
)
def test_sizes(n, k, d, backend):
    for margin in MARGINS:
        check(make(n, k, d).to(torch.float32), margin, 64.0, backend)
    for queue_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        check(make(n, k, d).to(torch.bfloat16, queue_dtype), AMSoftmax(0.35), 30.0, backend)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("margin", [Softmax(), AMSoftmax(0.35), ArcSoftmax(0.5), CircleLoss()], ids=repr)
@pytest.mark.parametrize(("d", "spread"), [(512, 0.3), (512, 1.0), (1024, 1.0), (100, 1.0)])
def test_hard_negatives_at_large_scales(d, spread, margin, backend):
    """Prototypes in one cone, cosines from 0.5 to 0.99: here the rounding of each cosine counts most."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2151, d, generator=generator, dtype=torch.float64) * spread / d**0.5
    prototypes = F.normalize(F.normalize(torch.ones(1, d, dtype=torch.float64)) + noise[:2000])
    target = torch.arange(150)
    problem = Problem(prototypes[target] + 0.7 * noise[2000:2150], prototypes, target)
    for scale in (64.0, 256.0):
        check(problem.to(torch.float32), margin, scale, backend, ties=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start", [0, 1, 90, 195, 230, 299])
def test_window_wraps_round(start, backend):
    check(make(80, 300, 64, start=start, identities=40).to(torch.float32), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_as_large_as_the_queue(backend):
    check(make(50, 50, 32, start=20).to(torch.float32), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 30.0, 64.0, 256.0])
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_extreme_cosines(margin, scale, backend):
    """Probes equal and opposite to prototypes, duplicates, orthogonal pairs: no NaN, no infinity, right numbers."""
    eye = torch.eye(48, 64, dtype=torch.float64)
    prototypes = torch.cat([eye, -eye, eye])  # each cosine is -1, 0 or 1, with duplicates of the target among the slots
    embedding = torch.cat([eye, -eye, eye * 1e-6, eye * 1e6])
    problem = Problem(embedding, prototypes, torch.arange(192) % 144)
    check(problem.to(torch.float32), margin, scale, backend, ties=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 64.0, 256.0])
def test_every_cosine_the_same(scale, backend):
    """A collapsed queue: all slots equal, probes equal, opposite and orthogonal to it."""
    direction = F.normalize(torch.ones(1, 40, dtype=torch.float64))
    across = torch.cat([torch.ones(20), -torch.ones(20)]).double()[None]
    problem = Problem(torch.cat([direction, -direction, across]), direction.repeat(500, 1), torch.tensor([3, 4, 499]))
    # All of the true gradient is rounding noise of the projection, so only the losses can be held to a tolerance.
    loss = margin_softmax(problem.to(torch.float32).embedding, problem.to(torch.float32).prototypes, problem.target,
                          scale=scale, reduction="none", backend=backend)  # fmt: skip
    expected, _ = answer(problem, AMSoftmax(0.35), scale)
    assert torch.allclose(loss.double(), expected.loss, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_slots_masked_but_the_target(backend):
    problem = make(20, 100, 32).to(torch.float32)
    leaf = problem.embedding.requires_grad_()
    loss = margin_softmax(
        leaf, problem.prototypes, problem.target, slot_identity=torch.full((100,), -1), backend=backend
    )
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("backend", BACKENDS)
def test_target_probability_near_one(backend):
    """1 - p of about 1e-9: the loss and gradient keep their relative accuracy instead of vanishing."""
    generator = torch.Generator().manual_seed(1)
    prototypes = F.normalize(torch.randn(50, 256, generator=generator, dtype=torch.float64))
    problem = Problem(prototypes[:10] + 1e-3, prototypes, torch.arange(10)).to(torch.float32)
    leaf = problem.embedding.requires_grad_()
    loss = margin_softmax(leaf, problem.prototypes, problem.target, margin=Softmax(), reduction="none", backend=backend)
    loss.sum().backward()
    expected, gradient = answer(problem, Softmax(), 30.0)
    assert expected.loss.max() < 1e-7
    assert torch.allclose(loss.double(), expected.loss, rtol=1e-4, atol=0)
    assert (leaf.grad - gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_and_zero_embeddings(backend):
    problem = make(4, 60, 16).to(torch.float32)
    leaf = problem.embedding * torch.tensor([[1e30], [1e-30], [0.0], [1.0]])
    leaf.requires_grad_()
    loss = margin_softmax(leaf, problem.prototypes, problem.target, reduction="none", backend=backend)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(leaf.grad).all()
    assert torch.equal(leaf.grad[1:3], torch.zeros(2, 16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_poisons_itself_only(backend):
    problem = make(70, 300, 32).to(torch.float32)
    clean = problem.embedding.clone().requires_grad_()
    bad = problem.embedding.clone()
    bad[7, 3] = math.nan
    bad.requires_grad_()
    results = []
    for leaf in (clean, bad):
        loss = margin_softmax(leaf, problem.prototypes, problem.target, reduction="none", backend=backend)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    others = torch.arange(70) != 7
    assert torch.isnan(results[1][0][7])
    assert torch.isnan(results[1][1][7]).any()
    for good, poisoned in zip(*results, strict=True):
        assert torch.equal(good[others], poisoned[others])


# The others hold a weight constant, so their gradient is not the derivative of their loss: autograd of the reference,
# which detaches that weight, is what they are held to.
DERIVATIVES = [margin for margin in MARGINS if not isinstance(margin, (NPCFace, CircleLoss, ArcNegFace))]


@pytest.mark.parametrize("margin", DERIVATIVES, ids=repr)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(margin, backend):
    problem = make(5, 30, 8, start=27, identities=20)
    leaf = problem.embedding.requires_grad_()

    def function(x):
        return margin_softmax(x, problem.prototypes, problem.target, margin=margin, scale=8.0, reduction="none",
                              backend=backend, **problem.options())  # fmt: skip

    assert torch.autograd.gradcheck(function, (leaf,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"normalize_prototypes": True}, {"label_smoothing": 0.2}], ids=repr)
def test_trainable_prototypes_gradcheck(options, backend):
    problem = make(5, 12, 6, identities=6, empty=0.2)
    leaves = (problem.embedding.requires_grad_(), problem.prototypes.requires_grad_())

    def function(x, w):
        return margin_softmax(x, w * 1.5, problem.target, scale=8.0, backend=backend, reduction="none",
                              **problem.options(), **options)  # fmt: skip

    assert torch.autograd.gradcheck(function, leaves)


def with_gradients(problem: Problem, **options):
    """Loss, gradients for embedding and prototypes, with an incoming gradient that differs from row to row."""
    x, w = problem.embedding.detach().requires_grad_(), problem.prototypes.detach().requires_grad_()
    loss = margin_softmax(x, w, problem.target, reduction="none", **problem.options(), **options)
    factors = torch.linspace(-1, 2, len(x), dtype=loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss @ factors, (x, w))


def assert_near(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm() + 1e-12


@pytest.mark.parametrize("backend", COMPILED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_option_agrees_with_reference(backend, data):
    """Gradients of both sides under per-sample margins and scales, label smoothing, normalisation and both gradient rules."""
    n, k = data.draw(st.integers(1, 140), "n"), data.draw(st.integers(1, 300), "k")
    problem = make(
        n, k, data.draw(st.integers(4, 200), "d"), seed=data.draw(st.integers(0, 9999), "seed"),
        identities=data.draw(st.sampled_from([2, 50, None]), "identities"), empty=data.draw(st.sampled_from([0.0, 0.5]), "empty"),
    )  # fmt: skip
    margin = data.draw(st.sampled_from([
        *MARGINS, MagFace(0.1, 3.0), AdaFace(mean=1.0, std=1.0), AMSoftmax(torch.linspace(0, 0.5, n)),
        ArcSoftmax(torch.linspace(0, 1, n)), MVSoftmax(torch.linspace(0, 0.5, n), t=torch.tensor(1.3)),
    ]), "margin")  # fmt: skip
    options = {
        "margin": margin,
        "scale": data.draw(st.sampled_from([1.0, 30.0, torch.linspace(1, 64, n)]), "scale"),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1]), "label smoothing"),
        "gradient": data.draw(st.sampled_from(["exact", "straight_through"]), "gradient"),
        "normalize_prototypes": data.draw(st.booleans(), "normalize"),
    }
    problem = replace(problem, prototypes=problem.prototypes * torch.linspace(0.5, 2, k, dtype=torch.float64)[:, None]) \
        if options["normalize_prototypes"] else problem  # fmt: skip
    expected = with_gradients(problem, backend="reference", **options)
    assert_near(with_gradients(problem, backend=backend, **options), expected, 1e-7)
    rounded = problem.to(torch.float32)
    found = with_gradients(rounded, backend=backend, **options)
    expected = with_gradients(rounded.to(torch.float64), backend="reference", **options)
    if isinstance(margin, (MVSoftmax, CurricularFace, NPCFace)):
        assert all(torch.isfinite(x).all() for x in found)  # a slot at the threshold may be hard in one precision only
    else:
        for a, b in zip(found, expected, strict=True):
            largest = max(b.norm().item(), 0.05 * n**0.5)  # what the projection cancels leaves rounding
            assert (a.double() - b).norm() <= 3e-5 * largest


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trainable_prototypes_in_half_precision(dtype, backend):
    problem = make(70, 500, 96).to(dtype)
    found = with_gradients(problem, backend=backend)
    assert found[2].dtype == dtype
    assert_near(found, with_gradients(problem.to(torch.float64), backend="reference"), 1e-2)


@pytest.mark.parametrize("backend", COMPILED)
def test_trainable_prototypes_of_many_probes(backend):
    """More than one group of packed probes."""
    problem = make(1100, 400, 48).to(torch.float32)
    assert_near(
        with_gradients(problem, backend=backend), with_gradients(problem.to(torch.float64), backend="reference"), 1e-5
    )


def test_prototypes_and_window_together():
    problem = make(4, 20, 8, start=18, masks=False)
    leaf = problem.prototypes.requires_grad_()
    loss = margin_softmax(problem.embedding, leaf, problem.target, window=problem.window)
    (gradient,) = torch.autograd.grad(loss, leaf)
    replaced = torch.zeros(20, dtype=torch.bool)
    replaced[problem.window.slots] = True
    assert torch.equal(gradient[replaced], torch.zeros(4, 8, dtype=torch.float64))
    assert (gradient[~replaced] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_cross_entropy_in_every_option(backend):
    """Ignored targets, weights, label smoothing and reductions against PyTorch's own loss."""
    p = make(20, 30, 32, masks=False)
    target = p.target.clone()
    target[::3] = -100
    weight = torch.linspace(0.1, 2, 20, dtype=torch.float64)
    results = []
    for ours in (True, False):
        x = p.embedding.clone().requires_grad_()
        options = {"label_smoothing": 0.1, "reduction": "mean"}
        if ours:
            each = margin_softmax(x, p.prototypes, target, margin=Softmax(), scale=20.0, backend=backend, label_smoothing=0.1, reduction="none")  # fmt: skip
            mean = margin_softmax(x, p.prototypes, target, margin=Softmax(), scale=20.0, backend=backend, **options)
            weighted = margin_softmax(x, p.prototypes, target, margin=Softmax(), scale=20.0, backend=backend, weight=weight, **options)  # fmt: skip
        else:
            logits = 20 * F.normalize(x) @ p.prototypes.T
            each = F.cross_entropy(logits, target, label_smoothing=0.1, reduction="none")
            mean = F.cross_entropy(logits, target, **options)
            weighted = (each * weight).sum() / weight[target >= 0].sum()
        total = each.sum() + 2 * mean + 3 * weighted
        results.append((each, mean, weighted, torch.autograd.grad(total, x)[0]))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "n"), [(torch.float16, 70_000), (torch.bfloat16, 3_000)])
def test_weights_of_half_precision_are_summed_exactly(backend, dtype, n):
    """Their sum is beyond float16's largest number, and bfloat16 would have stopped counting long before."""
    p = make(n, 4, 2, masks=False)
    weight = torch.linspace(0.5, 1.5, n).to(dtype)
    found, expected = (
        margin_softmax(p.embedding.float(), p.prototypes.float(), p.target, scale=20.0, weight=w, backend=backend)
        for w in (weight, weight.double())
    )
    assert found > 0
    assert torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_may_hold_anything(backend):
    p = make(6, 30, 8)
    x = p.embedding.clone()
    x[2] = math.nan
    x.requires_grad_()
    target = p.target.clone()
    target[2] = 77
    loss = margin_softmax(x, p.prototypes, target, ignore_index=77, backend=backend)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.equal(x.grad[2], torch.zeros(8, dtype=torch.float64))
    assert torch.isfinite(x.grad).all()
    nothing = margin_softmax(x, p.prototypes, torch.full((6,), 77), ignore_index=77, backend=backend)
    assert nothing.item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_straight_through_is_the_gradient_of_a_margin_under_no_grad(backend):
    p = make(4, 40, 16, masks=False)
    x = p.embedding.requires_grad_()
    ours = margin_softmax(x, p.prototypes, p.target, margin=ArcSoftmax(0.5), scale=64.0, gradient="straight_through",
                          backend=backend)  # fmt: skip
    cosines = F.normalize(x) @ p.prototypes.T
    with torch.no_grad():
        theta = cosines[torch.arange(4), p.target].acos()
        change = torch.zeros_like(cosines)
        change[torch.arange(4), p.target] = torch.cos(theta + 0.5) - torch.cos(theta)
    theirs = F.cross_entropy(64 * (cosines + change), p.target)
    assert torch.allclose(ours, theirs)
    assert torch.allclose(torch.autograd.grad(ours, x)[0], torch.autograd.grad(theirs, x)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype(backend):
    p = make(8, 40, 16).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = margin_softmax(p.embedding, p.prototypes, p.target, backend=backend)
    rounded = margin_softmax(p.embedding.bfloat16(), p.prototypes.bfloat16(), p.target, backend=backend)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, rounded)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_cross_entropy_without_margin_or_masks(backend):
    """Against PyTorch's own loss, which shares no code with the reference."""
    p = make(20, 100, 32, masks=False)
    logits = 20 * F.normalize(p.embedding) @ p.prototypes.T
    for reduction in ("none", "mean", "sum"):
        ours = margin_softmax(
            p.embedding, p.prototypes, p.target, margin=Softmax(), scale=20.0, reduction=reduction, backend=backend
        )
        assert torch.allclose(ours, F.cross_entropy(logits, p.target, reduction=reduction))
    logits[torch.arange(20), p.target] -= 20 * 0.35
    ours = margin_softmax(p.embedding, p.prototypes, p.target, scale=20.0, backend=backend)
    assert torch.allclose(ours, F.cross_entropy(logits, p.target))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension was not built")
def test_same_bits_whatever_the_thread_count():
    problem = make(200, 3000, 96, start=2900).to(torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            leaf = problem.embedding.clone().requires_grad_()
            loss = margin_softmax(leaf, problem.prototypes, problem.target, backend="cpu", **problem.options())
            loss.backward()
            results.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(reduction, backend):
    problem = replace(
        make(6, 40, 16, start=38, identities=9).to(torch.float32), label_smoothing=0.1, reduction=reduction
    )
    problem.embedding.requires_grad_()
    torch.library.opcheck(torch.ops.sst_fast.margin_softmax, (*problem.packed(), backend))


@pytest.mark.parametrize("backend", COMPILED)
def test_opcheck_with_trainable_prototypes_and_positive(backend):
    problem = make(6, 40, 16, identities=9).to(torch.float32)
    problem = replace(
        problem, embedding=problem.embedding.requires_grad_(), prototypes=problem.prototypes.requires_grad_(),
        positive=torch.randn(6, 16, requires_grad=True), margin=AMSoftmax(torch.full((6,), 0.3)),
        scale=torch.full((6,), 20.0), normalize_prototypes=True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.sst_fast.margin_softmax, (*problem.packed(), backend))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("both", [False, True], ids=["window", "prototypes"])
def test_compiles_without_graph_breaks(both, reduction, backend):
    """The same numbers as eager, ignored targets, weights, masks and label smoothing included."""
    torch.compiler.reset()
    problem = make(12, 60, 16, start=None if both else 55, identities=20, empty=0.3).to(torch.float32)
    target = problem.target.clone()
    target[::5] = -100
    weight = torch.linspace(0.1, 2, len(target))

    def function(x, w):
        return margin_softmax(
            x,
            w,
            target,
            reduction=reduction,
            weight=weight,
            label_smoothing=0.1,
            backend=backend,
            **problem.options(),
        )

    results = []
    for f in (function, torch.compile(function, fullgraph=True)):
        x, w = problem.embedding.clone().requires_grad_(), problem.prototypes.clone().requires_grad_(both)
        loss = f(x, w)
        loss.sum().backward()
        results.append((loss.detach(), x.grad, w.grad) if both else (loss.detach(), x.grad))
    assert (results[0][1][::5] == 0).all()
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).norm() <= 1e-5 * eager.norm()


@pytest.mark.parametrize("backend", COMPILED)
def test_no_second_derivative(backend):
    problem = make(3, 10, 8)
    leaf = problem.embedding.requires_grad_()
    loss = margin_softmax(leaf, problem.prototypes, problem.target, backend=backend)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), leaf)


def test_forward_only_makes_no_gradient():
    problem = make(3, 10, 8)
    assert not margin_softmax(problem.embedding, problem.prototypes, problem.target).requires_grad
    leaf = problem.embedding.requires_grad_()
    with torch.no_grad():
        assert not margin_softmax(leaf, problem.prototypes, problem.target).requires_grad


X, W, Y = torch.randn(4, 8), F.normalize(torch.randn(10, 8)), torch.arange(4)
IDS = torch.arange(4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"embedding": [1.0]}, TypeError, "embedding must be a tensor, got list"),
        ({"embedding": X.int()}, TypeError, "embedding must be float64 or .*, got int32"),
        ({"embedding": X[0]}, ValueError, r"embedding must have shape \[any, any\], got \[8\]"),
        ({"embedding": X[:, :0]}, ValueError, "embedding must have D > 0"),
        ({"embedding": X[:0], "target": Y[:0]}, ValueError, "embedding must have at least one row"),
        ({"prototypes": W[:, :7]}, ValueError, r"prototypes must have shape \[any, 8\], got \[10, 7\]"),
        ({"prototypes": W[:0]}, ValueError, "prototypes must have at least one row"),
        ({"prototypes": W.to("meta")}, ValueError, "prototypes must be on cpu .*, got meta"),
        ({"target": Y[:3]}, ValueError, r"target must have shape \[4\], got \[3\]"),
        ({"target": Y.float()}, TypeError, "target must be int64, got float32"),
        ({"target": Y + 8}, IndexError, r"target\[2\] is 10, expected a row number of prototypes in \[0, 10\)"),
        ({"target": Y - 1}, IndexError, r"target\[0\] is -1"),
        ({"margin": 0.35}, TypeError, "margin must be a margin of sst_fast.margins, got float"),
        ({"scale": 0.0}, ValueError, "scale must be a finite number > 0, got 0.0"),
        ({"scale": math.inf}, ValueError, "scale must be a finite number > 0, got inf"),
        ({"reduction": "avg"}, ValueError, "reduction must be .*, got 'avg'"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must be a number or .*tensor \[4\] or \[\] on cpu, got torch.float32 \[3\]"),
        ({"scale": torch.ones(4, requires_grad=True)}, ValueError, "scale must not require a gradient"),
        ({"margin": AMSoftmax(torch.ones(3))}, ValueError, r"margin: a parameter must be .*\[4\] or \[\] on cpu, got \[3\]"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \[4\], got \[3\]"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"gradient": "wrong"}, ValueError, "gradient must be one of 'exact', 'straight_through', got 'wrong'"),
        ({"identity": IDS}, ValueError, "identity .* needs slot_identity"),
        ({"identity": IDS[:2], "slot_identity": torch.arange(10)}, ValueError, r"identity must have shape \[4\], got \[2\]"),
        ({"slot_identity": IDS}, ValueError, r"slot_identity must have shape \[10\], got \[4\]"),
        ({"backend": "cuda"}, ValueError, "backend argument: margin_softmax cannot run on 'cuda'"),
        ({"backend": "magic"}, ValueError, "'magic' is no backend"),
        ({"window": Window(torch.randn(3, 2, 8), IDS[:2], torch.tensor(0), IDS[:2])}, ValueError, "4 rows cannot be split evenly over the window's 3 groups"),
        ({"window": Window(torch.randn(1, 11, 8), torch.arange(11), torch.tensor(0), torch.arange(11))}, ValueError, "window holds 11 slots, more than the 10 rows"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes, error, message):
    for backend in BACKENDS:
        arguments = {"embedding": X, "prototypes": W, "target": Y, "backend": backend} | changes
        with pytest.raises(error, match=message):
            margin_softmax(**arguments)


def test_queue_window_is_what_the_queue_will_hold():
    """Loss with the window before the enqueue = loss over the queue after it."""
    queue = GalleryQueue(20, 8)
    queue.enqueue(torch.randn(17, 8), torch.arange(17))
    gallery, ids = torch.randn(6, 8), torch.arange(100, 106)
    window = queue.window(gallery, ids)
    x = torch.randn(6, 8)
    before = margin_softmax(
        x, queue.features, window.slots, window=window, identity=ids, slot_identity=queue.identities
    )
    queue.enqueue(gallery, ids)
    after = margin_softmax(x, queue.features, window.slots, identity=ids, slot_identity=queue.identities)
    assert torch.allclose(before, after, rtol=1e-6)
