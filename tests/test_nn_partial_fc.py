"""Partial FC: W ranks (gloo) against one process with all classes, samples against a plain restatement, rows' optimizers."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from runs import on_ranks
from torch import nn

from sst_fast import (
    AdaCos,
    AdaFace,
    AMSoftmax,
    ArcSoftmax,
    CurricularFace,
    FilteredMargin,
    GalleryQueue,
    MagFace,
    MarginSoftmaxHead,
    MVSoftmax,
    NPCFace,
    SemiSiameseLoss,
    distributed,
)
from sst_fast.nn import PartialFC, RowAdamW, RowSGD, merge_state_dicts, split_state_dict

C, D, SCALE, STEPS = 23, 6, 16.0, 50  # neither 2 nor 3 ranks divide the classes
MARGINS = (AMSoftmax(0.35), MVSoftmax(), FilteredMargin(), CurricularFace(), AdaFace(), MagFace(5, 20))
# Differences that 50 free steps may leave, relative to the largest entry.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def weights(dtype=torch.float64):
    return torch.randn(C, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def network(dtype=torch.float64):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, D)).to(dtype)


def batches(world, dtype=torch.float64):
    """The whole batch, whose size changes; some targets are ignored, not as many on each rank."""
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        n = world * (2 + step % 4)
        y = torch.randint(C, (n,), generator=generator)
        y[torch.rand(n, generator=generator) < 0.1] = -100
        yield 3 * torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype), y


def close(a, b, tolerance=1e-12):
    worst = (a - b).abs().max() / b.abs().max().clamp_min(1e-3)
    assert worst <= tolerance, (worst, a, b)


def made(margin, dtype=torch.float64, **options):
    head = PartialFC(C, D, margin, SCALE, **options).to(dtype)
    head.load_state_dict(split_state_dict({**head.state_dict(), "weight": weights()}, head.world)[head.rank])
    return head


def on_all_ranks(value):
    found = [None] * distributed.ranks()[1]
    dist.all_gather_object(found, value)
    return found


def check_full_head(rank, world, dtype, margin):
    """All classes: loss, embeddings' gradients, network and rows are those of one process with the whole batch."""
    tolerance = TOLERANCE[dtype]
    head, whole = made(margin, dtype), MarginSoftmaxHead(C, D, margin, SCALE).to(dtype)
    whole.weight.data = weights(dtype)
    mine, alone = network(dtype), network(dtype)
    ddp = nn.parallel.DistributedDataParallel(mine)
    optimizers = [
        torch.optim.SGD([*net.parameters(), *h.parameters()], 0.02, momentum=0.9, weight_decay=5e-4)
        for net, h in ((mine, head), (alone, whole))
    ]
    for x, y in batches(world, dtype):
        rows = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
        embedding, expected = ddp(x[rows]), alone(x)
        embedding.retain_grad(), expected.retain_grad()
        losses = head(embedding, y[rows]), whole(expected, y)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        close(losses[0].detach(), losses[1].detach(), tolerance)
        close(embedding.grad, world * expected.grad[rows], 10 * tolerance)  # DDP divides by W
        for optimizer in optimizers:
            optimizer.step()
    found = merge_state_dicts(on_all_ranks(head.state_dict()))
    for name, value in whole.state_dict().items():
        close(found[name], value, tolerance)
    for a, b in zip(mine.parameters(), alone.parameters(), strict=True):
        close(a.detach(), b.detach(), tolerance)
    distributed.assert_same(dict(head.margin.named_buffers()))


def plain_loss(w, x, y, margin, straight):
    """Cross-entropy over the rows ``w``, of which ``y`` names the targets; insightface applies the margin without gradient."""
    kept = y >= 0
    cosine = F.linear(F.normalize(x), F.normalize(w))[kept]
    target = cosine.gather(1, y[kept, None])
    margined = margin.psi(target[:, 0])[:, None]
    if straight:
        margined = target + (margined - target).detach()
    return F.cross_entropy(SCALE * cosine.scatter(1, y[kept, None], margined), y[kept])


def check_sampled(rank, world, make, straight=False):
    """A sample: as cross-entropy over all ranks' draws, with an optimizer of PyTorch whose parameters are single rows."""
    margin = ArcSoftmax(0.5)
    torch.manual_seed(rank)
    head = made(margin, sample_rate=0.4, gradient="straight_through" if straight else "exact")
    rows = [nn.Parameter(row.clone()) for row in weights()]
    optimizer, plain = make[0](head.parameters()), make[1](rows)
    for x, y in batches(world):
        some = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
        mine, leaf = (v.clone().requires_grad_() for v in (x[some], x))
        loss = head(mine, y[some])
        drawn = torch.cat(on_all_ranks(head.sampled + head.first))
        w = torch.stack([rows[i] for i in drawn])
        place = torch.full((C,), -1).scatter(0, drawn, torch.arange(len(drawn)))
        assert (place[y[y >= 0]] >= 0).all()
        expected = plain_loss(w, leaf, torch.where(y < 0, y, place[y.clamp_min(0)]), margin, straight)
        close(loss.detach(), expected.detach(), 1e-10)
        for o, value in ((optimizer, loss), (plain, expected)):
            o.zero_grad()
            value.backward()
            o.step()
        assert head.weight.grad.is_sparse
        assert head.weight.grad.coalesce().indices()[0].equal(head.sampled)
        close(mine.grad, world * leaf.grad[some], 1e-9)
    found = merge_state_dicts(on_all_ranks(head.state_dict()))["weight"]
    close(found, torch.stack(rows).detach(), 1e-10)
    state = merge_state_dicts(on_all_ranks(optimizer.state_dict()), 0)["state"][0]
    for name in set(state) & {"momentum_buffer", "exp_avg", "exp_avg_sq"}:
        zero = torch.zeros(D, dtype=torch.float64)
        close(state[name], torch.stack([plain.state[row].get(name, zero) for row in rows]), 1e-9)


def sgd(kind):
    return partial(kind, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)


def adamw(kind):
    return partial(kind, lr=0.01, weight_decay=0.1)


def check_dense_gradients(rank, world):
    """insightface's partial FC v2: the margin without gradient, and PyTorch's SGD, which moves all rows in each step."""
    margin = ArcSoftmax(0.5, beyond="cosine")
    head = made(margin, sample_rate=0.4, sparse=False, gradient="straight_through")
    w = nn.Parameter(weights())
    optimizers = [torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=5e-4) for p in ([head.weight], [w])]
    for x, y in batches(world):
        some = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
        loss = head(x[some], y[some])
        drawn = torch.cat(on_all_ranks(head.sampled + head.first))
        place = torch.full((C,), -1).scatter(0, drawn, torch.arange(len(drawn)))
        expected = plain_loss(w[drawn], x, torch.where(y < 0, y, place[y.clamp_min(0)]), margin, straight=True)
        for optimizer, value in zip(optimizers, (loss, expected), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        close(loss.detach(), expected.detach(), 1e-10)
    close(merge_state_dicts(on_all_ranks(head.state_dict()))["weight"], w.detach(), 1e-10)


def check_trained_margin_and_scale(rank, world):
    """A margin and a scale that are parameters have the same gradients on every rank: those of one process."""
    value, scale = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (0.35, SCALE))
    head, whole = PartialFC(C, D, AMSoftmax(value), scale).double(), MarginSoftmaxHead(C, D, AMSoftmax(value), scale)
    part = split_state_dict({"weight": weights()}, world)[rank]["weight"]
    head.weight.data, whole.weight.data = part, weights()
    x, y = next(batches(world))
    some = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
    found, expected = (torch.autograd.grad(loss, [value, scale]) for loss in (head(x[some], y[some]), whole(x, y)))
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-10)


def check_evaluation(rank, world):
    """Over all classes."""
    head, whole = made(AMSoftmax(0.35), sample_rate=0.2).eval(), MarginSoftmaxHead(C, D, AMSoftmax(0.35), SCALE)
    whole.weight.data = weights()
    x, y = next(batches(world))
    some = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
    close(head(x[some], y[some]).detach(), whole(x, y).detach())


def check_first_rows_differ(rank, world):
    torch.manual_seed(0)
    rows = on_all_ranks(PartialFC(world * 4, D).weight.detach())
    assert not torch.equal(rows[0], rows[1])


def check_bad_input_is_named_on_every_rank(rank, world):
    x, y = torch.randn(4, D), torch.arange(4)
    bad = rank == 1  # the others bring nothing wrong
    head = PartialFC(C, D)
    before = "" if bad else "rank 1: "
    cases = [
        (IndexError, f"{before}target.2. is {C}, expected a class number in .0, {C}", x, torch.tensor([0, 1, C, 3])),
        (IndexError, f"{before}target.0. is -1, expected", x, torch.tensor([-1, 1, 2, 3])),
        (ValueError, rf"{before}embedding must have shape \[any, {D}\], got \[4, 3\]", x[:, :3], y),
        (TypeError, f"{before}target must be int64, got int32", x, y.int()),
        (ValueError, r"size of the batch must be the same on every rank, got 4 on rank 0, 3 on rank 1", x[:3], y[:3]),
    ]
    for kind, match, wrong_x, wrong_y in cases:
        with pytest.raises(kind, match=match):
            head(wrong_x if bad else x, wrong_y if bad else y)
    for name, said, options in (
        ("classes", f"{C} on rank 0, {C + 1} on rank 1", {"classes": C + bad}),
        (
            "margin",
            r"AMSoftmax\(margin=0.35\) on rank 0, AMSoftmax\(margin=0.[34]",
            {"margin": AMSoftmax(0.4 if bad else 0.35)},
        ),
        ("sample_rate", r"0.5 on rank 0, 0.[56]", {"sample_rate": 0.6 if bad else 0.5}),
        ("scale", "64.0 on rank 0", {"scale": 30.0 if bad else 64.0}),
    ):
        other = PartialFC(**{"classes": C, "dim": D, **options})
        with pytest.raises(ValueError, match=f"{name} must be the same on every rank, got {said}"):
            other(x, y)
    if world > 2:
        with pytest.raises(ValueError, match="classes must be at least 3, the number of ranks, got 2"):
            PartialFC(2, D)
    assert head(x, y).isfinite()


def check_sharded_queue_with_norms(rank, world):
    """What margins add to the loss counts once, not once a shard."""
    for margin in (MagFace(5, 20), AdaFace()):
        shard = SemiSiameseLoss(GalleryQueue(8, D, spare=2 * world), margin, SCALE, keep="first", shard=True).double()
        whole = SemiSiameseLoss(GalleryQueue(8 * world, D), margin, SCALE, keep="first").double()
        generator = torch.Generator().manual_seed(5)
        for step in range(3):
            features = [9 * torch.randn(2 * world, D, generator=generator, dtype=torch.float64) for _ in range(4)]
            some, ids = slice(2 * rank, 2 * rank + 2), torch.arange(2 * world) + 10 * step
            losses = [loss(*(f[some] for f in features), ids[some]) for loss in (shard, whole)]
            close(losses[0], losses[1], 1e-6)  # queues hold float32


CHECKS = (
    *(partial(check_full_head, dtype=torch.float64, margin=margin) for margin in MARGINS),
    partial(check_full_head, dtype=torch.float32, margin=ArcSoftmax(0.5)),
    partial(check_sampled, make=(sgd(RowSGD), sgd(torch.optim.SGD))),
    partial(check_sampled, make=(adamw(RowAdamW), adamw(torch.optim.AdamW)), straight=True),
    check_dense_gradients, check_trained_margin_and_scale, check_evaluation, check_first_rows_differ,
    check_bad_input_is_named_on_every_rank, check_sharded_queue_with_norms,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_equal_one_process(world):
    # The margins between the first and the last take no path of their own over ranks.
    some = [c for c in CHECKS if world == 2 or getattr(c, "keywords", {}).get("margin") not in MARGINS[1:-1]]
    on_ranks(world, *some)


def test_sample_keeps_positives_and_draws_the_rest_evenly():
    torch.manual_seed(0)
    head = PartialFC(50, 4, sample_rate=0.2)
    y, counts = torch.tensor([7, 7, 31]), torch.zeros(50)
    for _ in range(2000):
        head(torch.randn(3, 4), y)
        assert len(head.sampled) == 10
        counts[head.sampled] += 1
    assert counts[[7, 31]].tolist() == [2000, 2000]
    others = counts[torch.tensor([i not in (7, 31) for i in range(50)])] / 2000
    assert (others - 8 / 48).abs().max() < 5 * (8 / 48 * 40 / 48 / 2000) ** 0.5
    head(torch.randn(20, 4), torch.arange(20))  # more positives than the rate asks for
    assert head.sampled.tolist() == list(range(20))


def test_draws_are_reproducible():
    x, y = torch.randn(3, 4), torch.arange(3)
    heads = [PartialFC(50, 4, sample_rate=0.2, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    for head in heads:
        head(x, y)
    assert heads[0].sampled.equal(heads[1].sampled)


@pytest.mark.parametrize("kind", [sgd, adamw])
def test_dense_gradients_are_left_to_pytorch(kind):
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.full((3, 4), 0.5)), nn.Parameter(torch.tensor(1.0))] for _ in range(2))
    optimizers = (
        kind({sgd: RowSGD, adamw: RowAdamW}[kind])(ours),
        kind({sgd: torch.optim.SGD, adamw: torch.optim.AdamW}[kind])(theirs),
    )
    calls = []
    optimizers[0].register_step_post_hook(lambda *_: calls.append(1))
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn_like(a)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(calls) == 5  # hooks are called once a step


@pytest.mark.parametrize("kind", [sgd, adamw])
def test_rows_of_an_optimizer_that_began_or_ends_with_all(kind):
    """A head trained with all classes, then with a sample, then with all again; rows that were in each step are PyTorch's."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.full((6, 4), 0.5)) for _ in range(2))
    optimizers = (
        kind({sgd: RowSGD, adamw: RowAdamW}[kind])([ours]),
        kind({sgd: torch.optim.SGD, adamw: torch.optim.AdamW}[kind])([theirs]),
    )
    index = torch.tensor([[1, 4]])
    for step in range(9):
        grad = torch.randn(6, 4)
        theirs.grad = grad
        ours.grad = torch.sparse_coo_tensor(index, grad[index[0]], (6, 4)) if step in (3, 4, 5) else grad
        for optimizer in optimizers:
            optimizer.step()
        if step == 4:
            before = ours[0].clone()
        if step == 5:
            assert ours[0].equal(before)
    close(ours[index[0]].detach(), theirs[index[0]].detach(), 1e-6)
    assert not torch.allclose(ours[0], theirs[0])


def test_gradients_accumulate():
    head = PartialFC(50, 4, sample_rate=0.2)
    batches = [(torch.randn(3, 4), torch.randint(50, (3,))) for _ in range(2)]
    expected = torch.zeros(50, 4)
    for x, y in batches:
        loss = head(x, y)
        expected += torch.autograd.grad(loss, head.weight, retain_graph=True)[0].to_dense()
        loss.backward()
    close(head.weight.grad.to_dense(), expected, 1e-6)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_state_dicts_merge_and_split(world):
    head = PartialFC(11, 4, CurricularFace(), sample_rate=0.5)
    optimizer = RowAdamW([nn.Parameter(torch.ones(3)), head.weight], 0.1)
    head(torch.randn(4, 4), torch.arange(4)).backward()
    optimizer.step()
    for whole, name in ((head.state_dict(), "weight"), (optimizer.state_dict(), 1)):
        shards = split_state_dict(whole, world, name)
        assert len(shards) == world
        again = merge_state_dicts(shards, name)
        assert again.keys() == whole.keys()
        found, expected = (again["state"][1], whole["state"][1]) if name == 1 else (again, whole)
        for key, value in expected.items():
            assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), key
    shards = split_state_dict(head.state_dict(), 2)
    assert [len(shard["weight"]) for shard in shards] == [6, 5]
    with pytest.raises(ValueError, match=r"shards must be those of all ranks, in order, got \[5, 6\] rows of 'weight'"):
        merge_state_dicts(shards[::-1])
    with pytest.raises(KeyError, match=r"'head\.weight' is no parameter of this state dict"):
        split_state_dict(head.state_dict(), 2, "head.weight")
    with pytest.raises(ValueError, match="world must be at most 11, the rows of 'weight', got 12"):
        split_state_dict(head.state_dict(), 12)
    with pytest.raises(ValueError, match="world must be an integer >= 1, got 0"):
        split_state_dict(head.state_dict(), 0)
    with pytest.raises(ValueError, match="shards must hold the state dict of at least one rank"):
        merge_state_dicts([])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": 1}, "classes must be an integer >= 2, got 1"),
        ({"sample_rate": 0}, r"sample_rate must be in \(0, 1\], got 0"),
        ({"sample_rate": 1.5}, r"sample_rate must be in \(0, 1\], got 1.5"),
        ({"sample_rate": float("nan")}, r"sample_rate must be in \(0, 1\], got nan"),
        ({"margin": NPCFace()}, "margin must be one that needs no sum over all classes, got NPCFace"),
        ({"margin": AdaCos()}, "margin must be one that needs no sum over all classes, got AdaCos"),
        (
            {"margin": AMSoftmax(torch.ones(3))},
            "margin must be a number or a tensor .., the same for all ranks, got .3.",
        ),
        ({"scale": torch.ones(3)}, "scale must be a number or a tensor .., the same for all ranks, got .3."),
        ({"gradient": "exakt"}, "gradient must be one of 'exact', 'straight_through', got 'exakt'"),
    ],
)
def test_bad_settings_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        PartialFC(**{"classes": 10, "dim": 4, **options})


def test_bad_input_is_named_without_a_group():
    head = PartialFC(10, 4)
    for kind, said, x, y in (
        (
            IndexError,
            r"target\[1\] is 10, expected a class number in \[0, 10\)",
            torch.randn(2, 4),
            torch.tensor([0, 10]),
        ),
        (ValueError, r"embedding must have shape \[any, 4\], got \[2, 5\]", torch.randn(2, 5), torch.arange(2)),
        (ValueError, r"target must have shape \[2\], got \[2, 1\]", torch.randn(2, 4), torch.ones(2, 1).long()),
        (ValueError, "embedding must have at least one row", torch.randn(0, 4), torch.arange(0)),
    ):
        with pytest.raises(kind, match=said):
            head(x, y)


def test_names_are_those_of_insightface():
    assert list(PartialFC(10, 4).state_dict()) == ["weight"]


def test_what_is_not_finite_stays_so():
    x = torch.randn(3, 4)
    x[1] = torch.nan
    assert PartialFC(10, 4)(x, torch.arange(3)).isnan()
    assert distributed.combine_shards(torch.tensor([torch.nan, 1.0])).isnan().tolist() == [True, False]


def test_all_ignored_is_zero():
    head = PartialFC(10, 4)
    loss = head(torch.randn(3, 4), torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not head.weight.grad.any()


def test_autocast():
    torch.manual_seed(0)
    head = PartialFC(100, 16, sample_rate=0.5, generator=torch.Generator().manual_seed(0))
    x, y = torch.randn(8, 16, requires_grad=True), torch.arange(8)
    expected = head(x, y)
    head.generator.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(x, y)
    assert loss.dtype == torch.float32
    close(loss, expected, 0.02)
    loss.backward()
    assert head.weight.grad.dtype == torch.float32
