"""The fused loss: every backend against the float64 reference, exactness at the extremes, and the contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, answer, make

from sst_fast import AMSoftmax, ArcSoftmax, GalleryQueue, Softmax, Window, ops
from sst_fast.dispatch import backends
from sst_fast.functional import margin_softmax

BACKENDS = [name for name, state in backends("cpu")["margin_softmax"].implementations.items() if state == "available"]
COMPILED = [name for name in BACKENDS if name != "reference"]
MARGINS = [Softmax(), AMSoftmax(0.35), ArcSoftmax(0.5), ArcSoftmax(0.5, easy=True)]
# Relative to the largest loss and to the gradient's norm. float32 sums of 512 products, times the scale; bf16 and fp16
# inputs are compared on their rounded values, so what remains is the rounding of the gradient: 2^-8 and 2^-11.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check(problem: Problem, margin=AMSoftmax(0.35), scale=30.0, backend="cpu", ties=False, **options) -> None:
    tolerance = TOLERANCE[problem.embedding.dtype]
    leaf = problem.embedding.detach().requires_grad_()
    loss, statistics = margin_softmax(
        leaf, problem.prototypes, problem.target, margin=margin, scale=scale, reduction="none", backend=backend,
        return_statistics=True, **problem.arguments(), **options,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    expected, expected_gradient = answer(problem, margin, scale, **options)
    assert gradient.dtype == leaf.dtype
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()
    size = expected.loss.abs().max().clamp_min(1e-30)
    assert (loss.double() - expected.loss).abs().max() <= tolerance * torch.maximum(size, torch.tensor(1.0))
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
    queue_dtype = data.draw(st.sampled_from(list(TOLERANCE)), "queue dtype")
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


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(margin, backend):
    problem = make(5, 30, 8, start=27, identities=20)
    leaf = problem.embedding.requires_grad_()

    def function(x):
        return margin_softmax(x, problem.prototypes, problem.target, margin=margin, scale=8.0, reduction="none",
                              backend=backend, **problem.arguments())  # fmt: skip

    assert torch.autograd.gradcheck(function, (leaf,))


def test_trainable_prototypes_gradcheck():
    problem = make(5, 12, 6, masks=False)
    leaves = (problem.embedding.requires_grad_(), problem.prototypes.requires_grad_())
    for normalize in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, w, n=normalize: margin_softmax(x, w * 1.5, problem.target, scale=8.0, normalize_prototypes=n),
            leaves,
        )


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
            loss = margin_softmax(leaf, problem.prototypes, problem.target, backend="cpu", **problem.arguments())
            loss.backward()
            results.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("backend", COMPILED)
def test_opcheck(backend):
    problem = make(6, 40, 16, start=38, identities=9).to(torch.float32)
    window = problem.window
    arguments = (
        problem.embedding.requires_grad_(), problem.prototypes, problem.target, problem.identity, problem.slot_identity,
        window.features, window.identities, window.start, 1, [0.35], 30.0, True, True, backend,
    )  # fmt: skip
    torch.library.opcheck(ops.margin_softmax, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_compiles_without_graph_breaks(reduction, backend):
    problem = make(12, 60, 16, start=55, identities=20, empty=0.3).to(torch.float32)

    def function(x):
        return margin_softmax(
            x, problem.prototypes, problem.target, reduction=reduction, backend=backend, **problem.arguments()
        )

    results = []
    for f in (function, torch.compile(function, fullgraph=True)):
        leaf = problem.embedding.clone().requires_grad_()
        loss = f(leaf)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
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
