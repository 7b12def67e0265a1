"""The fused loss: every backend against the float64 reference, exactness at the extremes, and the contract."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    FilteredMargin,
    MagFace,
    MVSoftmax,
    NPCFace,
    SphereFace,
)

# Triton, interpreted, is slow: test_triton.py has sizes for it.
STATES = backends("cpu")["margin_softmax"].implementations
BACKENDS = [name for name, state in STATES.items() if state == "available" and name not in ("staged", "triton")]
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
@pytest.mark.parametrize("normalize", [False, True])
def test_positives_of_huge_and_tiny_embeddings(normalize, backend):
    """Their gradient does not know the embedding's length, and their own only as its inverse."""
    p = make(3, 20, 8).to(torch.float32)
    length = torch.tensor([[1e30], [1e-10], [1.0]])
    gradients = []
    for factor in (length, torch.ones(3, 1)):
        positive = (p.prototypes[:3] * (factor if normalize else 1)).requires_grad_()
        loss = margin_softmax(
            p.embedding * factor, p.prototypes, None, positive=positive, normalize_prototypes=normalize, backend=backend
        )
        loss.backward()
        gradients.append(positive.grad * (factor if normalize else 1))
    assert gradients[1].norm() > 0.1
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_prototypes_see_norms_in_float64(backend):
    """The loss is float64 where an input is, and so is what its margin makes of the norms of float32 embeddings."""
    p = of_each_norm()
    margin = MagFace(easy=False)
    found, expected = (
        margin_softmax(x, p.prototypes, p.target, margin=margin, backend=backend, reduction="none")
        for x in (p.embedding.float(), p.embedding.float().double())
    )
    assert torch.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_empty_slots_may_hold_anything(normalize, backend):
    p = make(40, 300, 16, empty=0.3).to(torch.float32)
    empty = p.slot_identity < 0
    empty[p.target] = False
    results = []
    for value in (0.0, torch.nan, torch.inf):
        x, w = p.embedding.clone().requires_grad_(), p.prototypes.clone()
        w[empty] = value
        held = p.slot_identity.clamp_min(0).where(~empty, -1)
        loss = margin_softmax(
            x, w, p.target, identity=p.identity, slot_identity=held, normalize_prototypes=normalize, backend=backend
        )
        results.append((loss, *torch.autograd.grad(loss, x)))
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_without_negatives_is_bad(backend):
    x = torch.tensor([[torch.nan, 1.0], [2.0, 1.0]], requires_grad=True)
    loss = margin_softmax(x, torch.eye(2)[:1], torch.zeros(2, dtype=torch.int64), reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isnan().tolist() == [True, False]
    assert gradient.isnan().any(1).tolist() == [True, False]


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
@pytest.mark.parametrize("margin", [AMSoftmax(0.35), MagFace(), AdaFace(mean=1.0, std=1.0)], ids=repr)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_rows_of_weight_zero_may_hold_anything(garbage, margin, backend):
    """MagFace's term for the norms is no part of the kernels."""
    p = make(6, 30, 8)
    x = p.embedding.clone()
    x[2, 1] = garbage
    x.requires_grad_()
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 1.0])
    loss = margin_softmax(x, p.prototypes, p.target, margin=margin, weight=weight, reduction="mean", backend=backend)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin", [AMSoftmax(0.35), ArcSoftmax(0.5), MVSoftmax(0.5, 1.2, arc=True)], ids=repr)
@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_a_row_that_is_not_finite_has_no_gradient_that_is(scale, margin, backend):
    """Its inverse norm is 0 like that of a row too short to have a direction, whose gradient is 0; there may be no negatives."""
    for dtype in (torch.float64, torch.float32):
        x = torch.tensor([[-math.inf, -0.4145, -0.5916]], dtype=dtype, requires_grad=True)
        w = F.normalize(torch.tensor([[-0.1755, -0.2551, -0.9509]], dtype=dtype))
        loss = margin_softmax(x, w, torch.tensor([0]), margin=margin, scale=scale, backend=backend)
        loss.backward()
        assert loss.isnan()
        assert x.grad.isnan().any()


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
        ({"margin": AMSoftmax(torch.ones(3))}, ValueError, r"margin: a parameter must be .*\[4\] or \[\] on cpu, got \[3\]"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \[4\], got \[3\]"),
        ({"weight": torch.ones(4, requires_grad=True)}, ValueError, "weight must not require a gradient"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"sub_centers": 0}, ValueError, "sub_centers must be an integer >= 1, got 0"),
        ({"sub_centers": 2.0}, ValueError, "sub_centers must be an integer >= 1, got 2.0"),
        ({"sub_centers": 17}, ValueError, "sub_centers must be at most 16, got 17"),
        ({"sub_centers": 3}, ValueError, "prototypes must have sub_centers = 3 rows for each class, got 10 rows"),
        ({"sub_centers": 2, "slot_identity": torch.arange(10)}, ValueError, r"slot_identity must have shape \[5\], got \[10\]"),
        ({"sub_centers": 2, "window": Window(torch.randn(1, 2, 8), IDS[:2], torch.tensor(0), IDS[:2])}, ValueError, "sub_centers must be 1 beside a window"),
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


# --- gradients of the whole loss -------------------------------------------------------------------------------------

NORMS = [2.0, 12.0, 40.0, 70.0, 109.0, 150.0]  # below, within and above what MagFace and AdaFace tell apart
OF_NORMS = [
    MagFace(), MagFace(easy=False), MagFace(easy=False, beyond=0.0), MagFace(easy=False, beyond="cosine"), AdaFace(mean=50.0),
    AdaFace(mean=50.0, clamps=True),
]  # fmt: skip


def of_each_norm(seed: int = 0) -> Problem:
    """Probes with NORMS, at angles from 20 to 160 degrees from their targets."""
    problem = make(len(NORMS), 9, 6, seed=seed, masks=False)
    generator = torch.Generator().manual_seed(seed)
    own = problem.prototypes[problem.target]
    across = torch.randn(own.shape, generator=generator, dtype=torch.float64)
    across = F.normalize(across - (across * own).sum(1, keepdim=True) * own)
    theta = torch.deg2rad(torch.tensor([20.0, 45.0, 80.0, 110.0, 140.0, 160.0], dtype=torch.float64))[:, None]
    norm = torch.tensor(NORMS, dtype=torch.float64)[:, None]
    return replace(problem, embedding=norm * (theta.cos() * own + theta.sin() * across))


def finite_differences(function, x: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    """Of a scalar function, relative to each row's length."""
    gradient = torch.zeros_like(x)
    for i in range(len(x)):
        for d in range(x.shape[1]):
            moved = torch.zeros_like(x)
            moved[i, d] = step * x[i].norm()
            gradient[i, d] = (function(x + moved) - function(x - moved)) / (2 * step * x[i].norm())
    return gradient


@pytest.mark.parametrize("margin", [*DERIVATIVES, *OF_NORMS], ids=repr)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_that_of_the_loss_along_the_embedding_too(margin, backend):
    """By finite differences. What is constant to the gradient by design is held: AdaFace's norms."""
    problem = of_each_norm()
    if isinstance(margin, AdaFace):
        margin = margin.for_batch(problem.embedding.norm(dim=1))

    def loss(x):
        return margin_softmax(x, problem.prototypes, problem.target, margin=margin, scale=4.0, backend=backend)

    leaf = problem.embedding.requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    expected = finite_differences(loss, leaf.detach())
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() < 1e-5
    radial = (expected * leaf.detach()).sum(1)
    assert (radial.abs() > 1e-4).any() == isinstance(margin, MagFace)


@pytest.mark.parametrize("margin", [CircleLoss(), ArcNegFace(), NPCFace()], ids=repr)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_at_constant_weights(margin, backend):
    """These hold weights, or a mean, that depend on cosines constant: finite differences of the loss with the weights held."""
    problem = of_each_norm()
    cosines = F.normalize(problem.embedding) @ problem.prototypes.T
    row = torch.arange(len(NORMS))
    own = cosines[row, problem.target]
    if isinstance(margin, CircleLoss):
        m, other = margin.m, (cosines + margin.m).clamp_min(0)
        weights = other.clone()
        weights[row, problem.target] = (1 + m - own).clamp_min(0)
    elif isinstance(margin, NPCFace):
        weights = margin.is_hard(cosines, own[:, None]).index_put((row, problem.target), torch.tensor(False))
        mean = (weights * cosines).sum(1) / weights.sum(1).clamp_min(1)
    else:
        weights = margin.alpha * (-((cosines - margin.psi(own)[:, None]) ** 2) / margin.sigma).exp()

    def held(x):
        c = F.normalize(x) @ problem.prototypes.T
        if isinstance(margin, CircleLoss):
            logits = weights * (c - margin.m)
            target = weights[row, problem.target] * (c[row, problem.target] - (1 - margin.m))
        elif isinstance(margin, NPCFace):
            logits = torch.where(weights, margin.t * c + margin.alpha, c)
            target = margin.psi(c[row, problem.target], mean)
        else:
            logits = weights * c + weights - 1
            target = margin.psi(c[row, problem.target])
        return F.cross_entropy(4.0 * logits.index_put((row, problem.target), target), problem.target)

    leaf = problem.embedding.requires_grad_()
    loss = margin_softmax(leaf, problem.prototypes, problem.target, margin=margin, scale=4.0, backend=backend)
    assert loss.item() == pytest.approx(held(leaf.detach()).item(), rel=1e-9)
    (found,) = torch.autograd.grad(loss, leaf)
    expected = finite_differences(held, leaf.detach())
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5


TRAINED = [
    lambda m: AMSoftmax(m), lambda m: ArcSoftmax(m), lambda m: ArcSoftmax(m, easy=True), lambda m: MVSoftmax(m, arc=True),
    lambda m: CombinedMargin(1.1, m, 0.1, 0.5), lambda m: CurricularFace(m, 0.2),
    lambda m: FilteredMargin(1.2, m, 0.1, threshold=0.1),
]  # fmt: skip


@pytest.mark.parametrize("rule", ["exact", "straight_through"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_margin_that_is_trained(backend, reduction, rule):
    """One value for each class, as in AdaptiveFace: its gradient by finite differences, ignored rows and weights included."""
    problem = of_each_norm()
    target = problem.target.clone()
    target[1] = -100
    weight = torch.linspace(0.5, 2, len(NORMS), dtype=torch.float64)
    factors = torch.linspace(-1, 2, len(NORMS), dtype=torch.float64)
    for make_margin in TRAINED:

        def loss(m, make_margin=make_margin):
            found = margin_softmax(
                problem.embedding, problem.prototypes, target, margin=make_margin(m[problem.target]), scale=4.0, weight=weight,
                reduction=reduction, gradient=rule, backend=backend, label_smoothing=0.1,
            )  # fmt: skip
            return found @ factors if reduction == "none" else found

        classes = torch.linspace(0.2, 0.6, 9, dtype=torch.float64, requires_grad=True)
        (found,) = torch.autograd.grad(loss(classes), classes)
        for k in range(9):
            step = 1e-6 * F.one_hot(torch.tensor(k), 9)
            expected = (loss(classes.detach() + step) - loss(classes.detach() - step)) / 2e-6
            assert found[k].item() == pytest.approx(expected.item(), abs=1e-8, rel=1e-6)


# --- the rules of other codes, restated plainly ----------------------------------------------------------------------


def plain_head(x, w, target, psi, scale, phi=lambda c: c):
    """Cross entropy of class logits scale * phi(c), the target's scale * psi(a)."""
    cosines = F.normalize(x) @ F.normalize(w).T
    at = (torch.arange(len(x)), target)
    return F.cross_entropy((scale * phi(cosines).index_put(at, psi(cosines[at]))), target)


def magface_head(easy, margin_am):
    """MagFace's own code (easy) and FaceX-Zoo's (margin_am)."""

    def head(x, w, target):
        norm = x.norm(dim=1).clamp(10, 110)
        m = 0.45 + (norm - 10) / 100 * 0.35

        def psi(a):
            inside = a * m.cos() - (1 - a**2).sqrt() * m.sin()
            return torch.where(a > (0 if easy else (math.pi - m).cos()), inside, a - (0 if easy else margin_am))

        return plain_head(x, w, target, psi, 6.0) + 20 * (norm / 110**2 + 1 / norm).mean()

    return head


def adaface_head(x, w, target):
    """The authors' code with its clamps: of all cosines to 0.999, of the target's angle to [0.001, pi - 0.001]."""
    norm = x.detach().norm(dim=1).clamp(1e-3, 100)
    q = ((norm - 50) / (100 + 1e-3) * 0.333).clamp(-1, 1)
    held = lambda c: c.clamp(-0.999, 0.999)
    return plain_head(
        x,
        w,
        target,
        lambda a: (held(a).acos() - 0.4 * q).clamp(1e-3, math.pi - 1e-3).cos() - (0.4 + 0.4 * q),
        6.0,
        held,
    )


def sphereface_head(x, w, target):
    """A-softmax: logits are the embedding's norm times the margined cosine, the norm differentiable."""

    def psi(a):
        theta = a.acos()
        k = (4 * theta / math.pi).floor().detach()
        return (5 * a + (-1) ** k * (4 * theta).cos() - 2 * k) / 6

    return plain_head(x, w, target, psi, x.norm(dim=1, keepdim=True))


def filtered_head(psi):
    """insightface's: of the other classes, cosines above the threshold count as 0, without gradient."""
    return lambda x, w, target: plain_head(x, w, target, psi, 6.0, lambda c: c * (c <= 0.1))


PARITY = {
    "magface": (MagFace(), magface_head(True, 0.0)),
    "magface of FaceX-Zoo": (MagFace(easy=False, beyond=0.0), magface_head(False, 0.0)),
    "adaface": (AdaFace(mean=50.0, clamps=True), adaface_head),
    "sphereface": (SphereFace(norm_scale=True), sphereface_head),
    "arcface of insightface": (
        CombinedMargin(1.0, 0.5, 0.0, beyond="cosine"),
        lambda x, w, y: plain_head(x, w, y, lambda a: (a.acos() + 0.5).cos(), 6.0),
    ),
    "arc_softmax of Semi-Siamese Training": (
        ArcSoftmax(0.5, beyond="cosine"),
        lambda x, w, y: plain_head(x, w, y, lambda a: a * math.cos(0.5) - (1 - a**2).sqrt() * math.sin(0.5), 6.0),
    ),
    "filtering with arcface": (FilteredMargin(threshold=0.1), filtered_head(lambda a: (a.acos() + 0.5).cos())),
    "filtering with cosface": (FilteredMargin(1.0, 0.0, 0.4, threshold=0.1), filtered_head(lambda a: a - 0.4)),
}  # fmt: skip


@pytest.mark.parametrize("name", PARITY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_with_the_authors_rules(backend, name):
    """Loss and both gradients, the embedding's along itself included."""
    margin, head = PARITY[name]
    problem = of_each_norm()
    x = problem.embedding
    if isinstance(margin, AdaFace):  # one target and one other class beyond the clamps
        x = x.clone()
        x[0] = 30 * F.normalize(problem.prototypes[problem.target[0]] + 0.01 * F.normalize(x[0], dim=0), dim=0)
        x[1] = 30 * F.normalize(
            problem.prototypes[(problem.target[1] + 1) % 9] + 0.01 * F.normalize(x[1], dim=0), dim=0
        )
    x, w = x.requires_grad_(), (2 * problem.prototypes).requires_grad_()
    ours = margin_softmax(x, w, problem.target, margin=margin, scale=6.0, normalize_prototypes=True, backend=backend)
    theirs = head(x, w, problem.target)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    for found, expected in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(theirs, (x, w)), strict=True):
        assert (found - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_of_zero_is_that_of_a_row_without_direction(backend):
    """Every logit is 0 then, and so are its gradients."""
    p = of_each_norm()
    x = torch.cat([p.embedding[:3], torch.zeros(1, p.embedding.shape[1], dtype=torch.float64)]).requires_grad_()
    loss = margin_softmax(
        x, p.prototypes, p.target[:4], margin=SphereFace(norm_scale=True), label_smoothing=0.1, reduction="none",
        backend=backend,
    )  # fmt: skip
    assert loss[3].item() == pytest.approx(math.log(len(p.prototypes)))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert torch.isfinite(gradient).all()
    assert not gradient[3].any()


# --- nearly parallel to the target -----------------------------------------------------------------------------------

LONG = np.longdouble


def arc_gradients(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor, m: float, scale: float):
    """Of ArcFace's summed loss for embeddings and raw class weights, in extended precision."""
    x, w = (t.detach().double().numpy().astype(LONG) for t in (x, w))
    norm_x, norm_w = (np.sqrt((t * t).sum(1, keepdims=True)) for t in (x, w))
    hat_x, hat_w = x / norm_x, w / norm_w
    of_x, of_w = np.zeros_like(x), np.zeros_like(w)
    for i, y in enumerate(target.tolist()):
        c = hat_w @ hat_x[i]
        sine = np.sqrt(((hat_w[y] - c[y] * hat_x[i]) ** 2).sum())
        z = scale * c
        z[y] = scale * (c[y] * np.cos(LONG(m)) - sine * np.sin(LONG(m)))
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        weight = scale * p
        weight[y] = -scale * np.delete(p, y).sum() * (np.cos(LONG(m)) + c[y] * np.sin(LONG(m)) / sine)
        of_x[i] = (weight[:, None] * (hat_w - c[:, None] * hat_x[i])).sum(0)
        of_w += weight[:, None] * (hat_x[i] - c[:, None] * hat_w)
    return [torch.from_numpy(g.astype(np.float64)) for g in (of_x / norm_x, of_w / norm_w)]


@pytest.mark.parametrize("theta", [1e-6, 3e-5, 1e-3, 0.03, math.pi - 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_angular_margins_near_their_target(backend, dtype, theta):
    """The slope of the margin goes as 1 / theta, what it multiplies as theta."""
    generator = torch.Generator().manual_seed(0)
    w, across = (torch.randn(n, 48, generator=generator, dtype=torch.float64) for n in (6, 3))
    own = F.normalize(w[:3])
    across = F.normalize(across - (across * own).sum(1, keepdim=True) * own)
    x = ((own * math.cos(theta) + across * math.sin(theta)) * 3).to(dtype).requires_grad_()
    w = w.to(dtype).requires_grad_()
    target = torch.arange(3)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    for margin in (ArcSoftmax(0.5, beyond="cosine"), CombinedMargin(1.0, 0.5, 0.0, beyond="cosine")):
        loss = margin_softmax(
            x, w, target, margin=margin, scale=8.0, reduction="sum", normalize_prototypes=True, backend=backend
        )
        for found, expected in zip(
            torch.autograd.grad(loss, (x, w)), arc_gradients(x, w, target, 0.5, 8.0), strict=True
        ):
            assert ((found - expected).norm(dim=1) <= tolerance * expected.norm(dim=1)).all()


@pytest.mark.parametrize("queue_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_exactly_unit(backend, queue_dtype):
    """Rounded rows are 1e-3 to 1e-2 too long or too short; the angle is that of their direction."""
    p = make(1, 6, 48).to(torch.float64, queue_dtype)
    w = p.prototypes.double()
    length = w.norm(dim=1)
    theta = torch.tensor([0.01, 0.03, 0.2])
    across = F.normalize(make(1, 3, 48, seed=1).prototypes.double())
    own = F.normalize(w[:3])
    across = F.normalize(across - (across * own).sum(1, keepdim=True) * own)
    x = (own * theta.cos()[:, None] + across * theta.sin()[:, None]).requires_grad_()
    loss = margin_softmax(x, p.prototypes, torch.arange(3), margin=ArcSoftmax(0.5), scale=8.0, backend=backend)
    cosines = F.normalize(x) @ w.T
    angle = (cosines[torch.arange(3), torch.arange(3)] / length[:3]).acos()
    logits = cosines.index_put((torch.arange(3), torch.arange(3)), length[:3] * (angle + 0.5).cos())
    expected = F.cross_entropy(8.0 * logits, torch.arange(3))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    (found,), (right,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, x)
    assert (found - right).norm() <= 1e-8 * right.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_probe_that_is_its_target(backend):
    """There is no direction across: the target's part of the gradient is 0, the mean over all directions; all is finite."""
    w = torch.eye(4, 8).requires_grad_()
    for sign in (1.0, -1.0):
        x = (sign * w.detach()[:2]).requires_grad_()
        for margin in (ArcSoftmax(0.5), CombinedMargin(1.0, 0.3, 0.0), SphereFace()):
            loss = margin_softmax(x, w, torch.arange(2), margin=margin, scale=8.0, reduction="sum", backend=backend)
            found = torch.autograd.grad(loss, (x, w))
            assert all(torch.isfinite(g).all() for g in found)
            assert (found[0][:, 4:] == 0).all()


# --- other contracts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [1e-2, 1e-5])
def test_float16_autocast_normalises_first(std):
    """Small class weights and embeddings keep their direction, and their gradient a loss scale of 32,768."""
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(n, 64, generator=generator) * std for n in (200, 64))
    w, x, target = w.requires_grad_(), x.requires_grad_(), torch.arange(64)
    options = {"margin": AMSoftmax(0.35), "scale": 64.0, "normalize_prototypes": True}
    expected = torch.autograd.grad(margin_softmax(x, w, target, **options), (x, w))
    with torch.autocast("cpu", torch.float16):
        loss = margin_softmax(x, w, target, **options)
    for found, right in zip(torch.autograd.grad(loss * 32768, (x, w)), expected, strict=True):
        assert (found / 32768 - right).norm() <= 5e-3 * right.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin", [CircleLoss(), ArcSoftmax(0.5)], ids=repr)
def test_float16_embeddings_without_length(margin, backend):
    """Their gradient goes as 1 / norm. It is the float64 one, and infinite, never NaN, where float16 has no such number."""
    p = make(40, 60, 16, masks=False)
    x = (F.normalize(p.embedding) * torch.logspace(-6, 0, 40, dtype=torch.float64)[:, None]).half()
    found, exact = [], None
    for dtype in (torch.float16, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        loss = margin_softmax(
            leaf, p.prototypes.half().to(dtype), p.target, margin=margin, scale=64.0, reduction="sum", backend=backend
        )
        found += torch.autograd.grad(loss, leaf)
    found, exact = found[0].double(), found[1]
    beyond = exact.abs() > torch.finfo(torch.float16).max
    assert beyond.any()
    assert found[beyond].isinf().all()
    assert (found[beyond] * exact[beyond] > 0).all()
    rest = ~beyond & (exact.abs() < 60000)
    assert (found - exact)[rest].abs().max() <= 2e-3 * exact[rest].abs().max()
    assert found[rest].isfinite().all()


def test_class_weights_that_are_no_unit_rows_are_warned_of_once():
    x, target = torch.randn(4, 8), torch.arange(4)
    w = (3 * F.normalize(torch.randn(10, 8))).requires_grad_()
    with pytest.warns(UserWarning, match=r"rows of norm 3 to 3, expected 1: .*normalize_prototypes=True"):
        margin_softmax(x, w, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        margin_softmax(x, w, target)
        margin_softmax(x, (3 * F.normalize(torch.randn(10, 8))).requires_grad_(), target, normalize_prototypes=True)
        margin_softmax(x, F.normalize(torch.randn(10, 8)).requires_grad_(), target)


@pytest.mark.parametrize("backend", COMPILED)
def test_forward_mode_is_refused(backend):
    x, w, target = torch.randn(4, 8), F.normalize(torch.randn(10, 8)), torch.arange(4)
    one = torch.tensor(0.5)
    for function, inputs in (
        (lambda x: margin_softmax(x, w, target, backend=backend), x),
        (lambda s: margin_softmax(x, w, target, scale=s, backend=backend), one),
        (lambda m: margin_softmax(x, w, target, margin=AMSoftmax(m), backend=backend), one),
        (lambda u: margin_softmax(x, w, target, weight=u, backend=backend), torch.ones(4)),
    ):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(function, (inputs,), (torch.ones_like(inputs),))


def test_compiles_with_sizes_and_scales_that_change():
    torch.compiler.reset()
    w, target = F.normalize(torch.randn(10, 8)), torch.arange(8)

    def function(x, scale):
        return margin_softmax(x, w, target[: len(x)], margin=MagFace(0.5, 5.0), scale=scale)

    run = torch.compile(function, dynamic=True, fullgraph=True, backend="aot_eager")
    for n, scale in ((8, 3.0), (5, 4.5), (3, 7.0)):
        leaves = [torch.randn(n, 8).requires_grad_()]
        leaves.append(leaves[0].detach().clone().requires_grad_())
        for f, leaf in zip((function, run), leaves, strict=True):
            f(leaf, scale).backward()
        assert torch.allclose(leaves[0].grad, leaves[1].grad, rtol=1e-5)


def test_values_in_tensors_are_checked_on_the_cpu():
    x, w, target = torch.randn(4, 8), F.normalize(torch.randn(10, 8)), torch.arange(4)
    for scale in (-30.0, math.nan, math.inf, 1e5):
        for tensor in (torch.tensor(scale), torch.tensor([30.0, scale, 30.0, 30.0])):
            with pytest.raises(ValueError, match="scale must be > 0 and at most 1000, got a tensor with"):
                margin_softmax(x, w, target, scale=tensor)
    with pytest.raises(ValueError, match=r"scale must be at most 1000, got 1000000000.0"):
        margin_softmax(x, w, target, scale=1e9)
    for value in (50.0, math.nan):
        with pytest.raises(ValueError, match=r"ArcSoftmax: margin must be radians in \[0, 3.14159\], got"):
            margin_softmax(x, w, target, margin=ArcSoftmax(torch.tensor(value)))
    plain = margin_softmax(x, w, target, scale=30.0)
    for number in (np.float32(30), np.float64(30), np.int64(30), 30):
        assert torch.equal(margin_softmax(x, w, target, scale=number, ignore_index=np.int64(-100)), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_label_smoothing_over_slots_that_coincide(backend):
    """The gradient is 0; what rounding leaves of it is small beside the scale, up to the largest there is."""
    w = F.normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(0))).repeat(300, 1)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).mul(3).requires_grad_()
    for scale in (64.0, 1000.0):
        loss = margin_softmax(
            x, w, torch.arange(16), margin=Softmax(), scale=scale, label_smoothing=0.2, reduction="sum", backend=backend
        )
        (gradient,) = torch.autograd.grad(loss, x)
        assert (gradient.norm(dim=1) * x.detach().norm(dim=1)).max() <= 3e-5 * scale
