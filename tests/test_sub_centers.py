"""Several rows of prototypes for each class (Deng et al., Sub-center ArcFace, ECCV 2020)."""

import pytest
import torch
import torch.nn.functional as F
from problems import MARGINS, make_sub_centers

from sst_fast import AMSoftmax, ArcSoftmax, MarginSoftmaxHead, Softmax
from sst_fast.backends.choose import backends
from sst_fast.functional import margin_softmax, target_cosine

STATES = backends("cpu", sub_centers=True)["margin_softmax"].implementations
BACKENDS = [name for name, state in STATES.items() if state == "available" and name != "triton"]
COMPILED = [name for name in BACKENDS if name != "reference"]
if "staged" in BACKENDS:
    import interpreter  # noqa: F401


def plain(x, w, target, margin, scale, sub_centers):
    """The official code: all logits, pooled over the sub-centres of a class; psi alone, on the target's."""
    cosines = (F.normalize(x) @ F.normalize(w).T).view(len(x), -1, sub_centers).max(2).values
    own = cosines[torch.arange(len(x)), target]
    return F.cross_entropy(scale * cosines.index_put((torch.arange(len(x)), target), margin.psi(own)), target)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin", [Softmax(), AMSoftmax(0.35), ArcSoftmax(0.5)], ids=repr)
@pytest.mark.parametrize("sub_centers", [2, 3, 16])
def test_is_the_maximum_over_the_rows_of_a_class(sub_centers, margin, backend):
    p = make_sub_centers(20, 30, sub_centers, 12)
    results = []
    for ours in (True, False):
        x, w = p.embedding.clone().requires_grad_(), (2 * p.prototypes).requires_grad_()
        if ours:
            loss = margin_softmax(x, w, p.target, margin=margin, scale=16.0, normalize_prototypes=True,
                                  sub_centers=sub_centers, backend=backend)  # fmt: skip
        else:
            loss = plain(x, w, p.target, margin, 16.0, sub_centers)
        results.append((loss, *torch.autograd.grad(loss, (x, w))))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-9 * expected.norm()


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def check(p, backend, **options):
    """Loss, statistics and all gradients of a backend against the reference's in float64, on the same numbers."""
    results = []
    for name, q in ((backend, p), ("reference", p.to(torch.float64))):
        x, w = q.embedding.detach().requires_grad_(), q.prototypes.detach().requires_grad_()
        scale = torch.tensor(options.get("scale", 16.0), dtype=torch.float64, requires_grad=True)
        loss, seen = margin_softmax(x, w, q.target, reduction="none", sub_centers=q.sub_centers, backend=name,
                                    return_statistics=True, **q.options(), **options | {"scale": scale})  # fmt: skip
        factors = torch.linspace(-1, 2, len(x), dtype=loss.dtype)
        results.append((loss.detach(), seen, torch.autograd.grad(loss @ factors, (x, w, scale))))
    (loss, seen, gradients), (expected, known, exact) = results
    tolerance, of_cosines = TOLERANCE[p.embedding.dtype], 1e-5
    if backend == "staged" and p.embedding.dtype == torch.bfloat16:
        tolerance, of_cosines = 3e-2, 4e-3  # unit probes and weights are rounded for the tensor cores' products
    assert (loss.double() - expected).abs().max() <= tolerance * max(1, expected.abs().max().item())
    for found, right in zip(gradients, exact, strict=True):
        assert (found.double() - right).norm() <= 2 * tolerance * max(right.norm().item(), 0.05)
    assert torch.allclose(seen.hardest_cosine.double(), known.hardest_cosine, atol=of_cosines)
    assert torch.allclose(seen.lse.double(), known.lse, atol=1e-4 + 64 * tolerance)
    assert (seen.beats_target - known.beats_target).abs().max() <= 1


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_every_margin(margin, backend):
    p = make_sub_centers(70, 90, 3, 20)
    p.slot_identity = torch.arange(90) % 70 - 1
    p.identity = p.slot_identity[p.target]
    several = ({}, {"normalize_prototypes": True}, {"label_smoothing": 0.1}, {"gradient": "straight_through"})
    if backend == "staged":  # The interpreter takes its time.
        several = ({"normalize_prototypes": True, "label_smoothing": 0.1}, {"gradient": "straight_through"})
    for options in several:
        check(p, backend, margin=margin, **options)


# K: one tile, several, several chunks; S: divisors of 12 and others; D: the steps of the tile sizes at 512 and 1024.
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(
    ("n", "k", "s", "d"),
    [(1, 1, 16, 5), (3, 7, 5, 512), (65, 300, 7, 64), (5, 60, 10, 513), (17, 1500, 9, 16), (4, 40, 16, 1025)],
)
def test_sizes(n, k, s, d, backend):
    if backend == "staged":  # The interpreter takes its time. 128 rows are a tile there, so these are still several.
        k = min(k, 60)
    for dtype in TOLERANCE:
        check(make_sub_centers(n, k, s, d).to(dtype), backend, normalize_prototypes=dtype == torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    p = make_sub_centers(4, 6, 3, 5)
    x, w, s = p.embedding.requires_grad_(), p.prototypes.requires_grad_(), torch.full((4,), 8.0, dtype=torch.float64)

    def function(x, w, s):
        return margin_softmax(x, w, p.target, scale=s, margin=ArcSoftmax(0.3), sub_centers=3, reduction="none",
                              normalize_prototypes=True, backend=backend)  # fmt: skip

    # The interpreter takes its time: along random directions there.
    assert torch.autograd.gradcheck(function, (x, w, s.requires_grad_()), fast_mode=backend == "staged")


@pytest.mark.parametrize("backend", COMPILED)
def test_an_explicit_positive_is_one_row(backend):
    """``target`` names the class that is then no negative."""
    p = make_sub_centers(9, 12, 4, 8)
    positive = F.normalize(p.embedding + 0.2)
    results = [
        margin_softmax(
            p.embedding, p.prototypes, p.target, positive=positive, sub_centers=4, reduction="none", backend=name
        )
        for name in (backend, "reference")
    ]
    assert torch.allclose(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite_is_seen(backend):
    """It must not lose the comparison without a word."""
    p = make_sub_centers(4, 6, 3, 8)
    for row in (0, 1, 2):
        w = p.prototypes.clone()
        w[9 + row, 3] = torch.nan
        assert margin_softmax(p.embedding, w, p.target, sub_centers=3, reduction="none", backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_probes(backend):
    p = make_sub_centers(0, 6, 3, 8)
    x, w = p.embedding.requires_grad_(), p.prototypes.requires_grad_()
    loss = margin_softmax(x, w, p.target, sub_centers=3, reduction="none", backend=backend)
    assert loss.shape == (0,)
    assert not torch.autograd.grad(loss.sum(), w)[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equally_near_rows_train_the_first(backend):
    p = make_sub_centers(6, 5, 1, 8)
    x, w = p.embedding, p.prototypes.repeat_interleave(3, 0).requires_grad_()
    loss = margin_softmax(x, w, p.target, sub_centers=3, backend=backend)
    (gradient,) = torch.autograd.grad(loss, w)
    once = p.prototypes.clone().requires_grad_()
    alone = margin_softmax(x, once, p.target, backend=backend)
    (expected,) = torch.autograd.grad(alone, once)
    assert loss.item() == pytest.approx(alone.item(), rel=1e-12)
    assert torch.allclose(gradient[::3], expected)
    assert not gradient.view(5, 3, 8)[:, 1:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_count_classes(backend):
    p = make_sub_centers(20, 30, 4, 12)
    loss, seen = margin_softmax(p.embedding, p.prototypes, p.target, margin=Softmax(), sub_centers=4, backend=backend,
                                reduction="none", return_statistics=True)  # fmt: skip
    cosines = (F.normalize(p.embedding) @ p.prototypes.T).view(20, 30, 4).amax(2)
    own = cosines[torch.arange(20), p.target]
    others = cosines.index_put((torch.arange(20), p.target), torch.tensor(-2.0, dtype=torch.float64))
    assert torch.allclose(seen.target_cosine, own)
    assert torch.allclose(target_cosine(p.embedding, p.prototypes, p.target, sub_centers=4), own)
    assert torch.allclose(seen.hardest_cosine, others.amax(1))
    assert torch.equal(seen.hardest_slot, others.argmax(1))
    assert torch.equal(seen.beats_target, (others > own[:, None]).sum(1))
    assert torch.allclose(loss, seen.lse - 30 * own)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_those_of_classes(backend):
    """An empty class may hold anything; a class of the probe's own identity is no negative."""
    p = make_sub_centers(6, 8, 3, 12)
    x, w, target = p.embedding, p.prototypes.clone(), torch.tensor([0, 1, 3, 4, 5, 6])
    identities = torch.tensor([0, 1, -1, 3, 4, 5, 6, 0])
    w[6:9] = torch.nan
    options = {"sub_centers": 3, "reduction": "none", "label_smoothing": 0.1, "backend": backend}
    found = margin_softmax(x, w, target, identity=identities[target], slot_identity=identities, **options)
    shown = [0, 1, 3, 4, 5, 6]
    expected = margin_softmax(x, w.view(8, 3, 12)[[*shown, 7]].flatten(0, 1), torch.arange(6), **options)
    without = margin_softmax(x, w.view(8, 3, 12)[shown].flatten(0, 1), torch.arange(6), **options)
    assert torch.allclose(found[1:], expected[1:])
    assert torch.allclose(found[0], without[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_that_is_no_class_is_named(backend):
    p = make_sub_centers(3, 5, 2, 8)
    if backend == "staged":  # which would have to wait for the device to know
        losses = margin_softmax(
            p.embedding, p.prototypes, torch.tensor([0, 5, 9]), sub_centers=2, backend=backend, reduction="none"
        )
        assert losses.isnan().tolist() == [False, True, True]
        return
    with pytest.raises(IndexError, match=r"target\[1\] is 5, expected a class number in \[0, 5\)"):
        margin_softmax(p.embedding, p.prototypes, torch.tensor([0, 5, 9]), sub_centers=2, backend=backend)


def test_head_has_rows_for_every_sub_center():
    head = MarginSoftmaxHead(7, 8, ArcSoftmax(0.3), sub_centers=3)
    assert head.weight.shape == (21, 8)
    x, target = torch.randn(5, 8), torch.tensor([0, 6, 2, 3, 6])
    assert head(x, target).item() == pytest.approx(
        plain(x, head.weight, target, ArcSoftmax(0.3), 64.0, 3).item(), rel=1e-4
    )


def test_a_head_without_probes():
    head = MarginSoftmaxHead(3, 4, sub_centers=2)
    assert head.logits(torch.randn(0, 4)).shape == (0, 3)
    assert head.topk(torch.randn(0, 4), 2).row.shape == (0, 2)
