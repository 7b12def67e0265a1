"""The training wrapper: the two-direction loss, the moving average, one whole step."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import gallery_features
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
    SemiSiamese,
    SemiSiameseLoss,
    Softmax,
)  # fmt: skip
from sst_fast.margins import MARGINS


def criterion(size=32, dim=8, **options) -> SemiSiameseLoss:
    return SemiSiameseLoss(GalleryQueue(size, dim), AMSoftmax(0.35), 30.0, **options)


def backbone(dim=8) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, dim))


def plain_loss(pa, pb, ga, gb, queue, position, scale, margin):
    """The authors' head in plain PyTorch: the queue cloned for each direction, all slots negatives."""
    total = 0.0
    for probe, gallery in ((pa, gb), (pb, ga)):
        weight = queue.clone()
        slots = (position + torch.arange(len(probe))) % len(queue)
        weight[slots] = F.normalize(gallery)
        logits = F.normalize(probe) @ weight.T
        logits = logits - margin * F.one_hot(slots, len(queue))
        total = total + F.cross_entropy(scale * logits, slots)
    return total / 2


def test_equals_the_plain_head_over_many_steps():
    torch.manual_seed(0)
    loss = criterion(keep="first", mask_identity=False, mask_empty=False)
    loss.queue.enqueue(torch.randn(32, 8), torch.arange(32))
    queue, position = loss.queue.features.clone(), 0
    for step in range(12):  # 5 does not divide 32: the window wraps round
        features = [torch.randn(5, 8, requires_grad=i < 2) for i in range(4)]
        expected = plain_loss(*features, queue, position, 30.0, 0.35)
        found = loss(*features, torch.arange(5) + 5 * step)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        for ours, theirs in zip(
            torch.autograd.grad(found, features[:2]), torch.autograd.grad(expected, features[:2]), strict=True
        ):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
        queue[(position + torch.arange(5)) % 32] = F.normalize(features[2])
        position = (position + 5) % 32
        assert torch.allclose(loss.queue.features, queue, atol=1e-6)


def test_parity_with_a_fresh_random_queue():
    """Without masks a fresh queue's random vectors are negatives, as in the authors' code."""
    queue = GalleryQueue(32, 8, random=True)
    assert len(queue) == 0
    assert torch.allclose(queue.features.norm(dim=1), torch.ones(32))
    features = [torch.randn(5, 8) for _ in range(4)]
    loss = SemiSiameseLoss(queue, AMSoftmax(0.35), 30.0, mask_identity=False, mask_empty=False, keep="first")
    w = [queue.features.clone() for _ in range(2)]
    w[0][:5], w[1][:5] = F.normalize(features[3]), F.normalize(features[2])
    expected = 0.0
    for probe, prototypes in zip(features[:2], w, strict=True):
        logits = 30 * F.normalize(probe) @ prototypes.T
        logits[torch.arange(5), torch.arange(5)] -= 30 * 0.35
        expected = expected + 0.5 * F.cross_entropy(logits, torch.arange(5))
    assert torch.allclose(loss(*features, torch.arange(5)), expected)


def test_identity_mask_removes_false_negatives():
    """An identity that is still in the queue must not be its own negative."""
    loss = criterion(keep="first")
    feature = F.normalize(torch.randn(1, 8))
    loss(*[feature] * 4, torch.tensor([3]))
    again = loss(*[feature] * 4, torch.tensor([3]))
    assert again.item() == 0  # nothing else is in the queue
    assert loss(*[feature] * 4, torch.tensor([4])).item() > 1


def test_evaluation_mode_leaves_the_queue_alone():
    loss = criterion().eval()
    before = [b.clone() for b in loss.buffers()]
    loss(*[torch.randn(4, 8) for _ in range(4)], torch.arange(4))
    assert all(torch.equal(a, b) for a, b in zip(before, loss.buffers(), strict=True))


def test_keeps_one_image_of_the_whole_batch():
    seen = set()
    torch.manual_seed(0)
    for _ in range(20):
        loss = criterion()
        ga, gb = F.normalize(torch.randn(4, 8)), F.normalize(torch.randn(4, 8))
        loss(torch.randn(4, 8), torch.randn(4, 8), ga, gb, torch.arange(4))
        kept = loss.queue.features[:4]
        assert torch.allclose(kept, ga, atol=1e-6) or torch.allclose(kept, gb, atol=1e-6)
        seen.add(torch.allclose(kept, ga, atol=1e-6))
    assert seen == {True, False}


def test_moving_average():
    model = SemiSiamese(backbone(), criterion(), momentum=0.9, warmup=0)
    before = [p.clone() for p in model.gallery.parameters()]
    with torch.no_grad():
        for p in model.probe.parameters():
            p.add_(1.0)
    model.update_gallery()
    for old, gallery in zip(before, model.gallery.parameters(), strict=True):
        assert torch.allclose(gallery, old + 0.1, atol=1e-6)
        assert not gallery.requires_grad


def test_momentum_warms_up_and_is_saved():
    model = SemiSiamese(nn.Linear(1, 1, bias=False), criterion(dim=1), momentum=0.6, warmup=2)
    with torch.no_grad():
        model.probe.weight.fill_(1.0)
        model.gallery.weight.fill_(0.0)
    value = 0.0
    for momentum in (1 / 3, 2 / 4, 3 / 5, 0.6):
        value = momentum * value + (1 - momentum)
        model.update_gallery()
        assert model.gallery.weight.item() == pytest.approx(value)
    other = SemiSiamese(nn.Linear(1, 1, bias=False), criterion(dim=1), momentum=0.6, warmup=2)
    other.load_state_dict(model.state_dict())
    assert other.updates == 4


@pytest.mark.parametrize("policy", ["copy", "average"])
def test_gallery_batchnorm_follows_the_probe(policy):
    model = SemiSiamese(backbone(), criterion(), momentum=0.75, batchnorm=policy, warmup=0)
    assert not any(m.training for m in model.gallery.modules())
    before = [b.clone() for b in model.gallery.buffers()]
    model(torch.randn(6, 12), torch.randn(6, 12), torch.arange(6))
    assert all(torch.equal(a, b) for a, b in zip(before, model.gallery.buffers(), strict=True))
    model.update_gallery()
    for old, mine, theirs in zip(before, model.gallery.buffers(), model.probe.buffers(), strict=True):
        counted = not mine.is_floating_point() or policy == "copy"
        assert torch.allclose(mine, theirs if counted else old.lerp(theirs, 0.25))


class WithBuffers(nn.Module):
    """Every kind of buffer: of spectral_norm, of InstanceNorm, of BatchNorm, a module's own, and an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(12, 6))
        self.instance = nn.InstanceNorm1d(6, track_running_stats=True)
        self.batch = nn.BatchNorm1d(6)
        self.register_buffer("center", torch.zeros(6))
        self.register_buffer("calls", torch.tensor(0))
        self.head = nn.Linear(6, 8)

    def forward(self, x):
        x = self.batch(self.linear(x))
        x = self.instance(x[:, :, None].repeat(1, 1, 2))[:, :, 0]
        if self.training:
            self.center.lerp_(x.detach().mean(0), 0.5)
            self.calls += 1
        return self.head(x - self.center)


@pytest.mark.parametrize("policy", ["own", "copy", "average"])
def test_every_buffer_that_is_no_batchnorm_is_copied(policy):
    model = SemiSiamese(WithBuffers(), criterion(), momentum=0.75, batchnorm=policy)
    for step in range(3):
        model(torch.randn(6, 12), torch.randn(6, 12), torch.arange(6) + 6 * step)
        with torch.no_grad():
            model.probe.linear.parametrizations.weight.original.mul_(20.0)
        model.update_gallery()
    gallery = dict(model.gallery.named_buffers())
    for name, buffer in model.probe.named_buffers():
        if not name.startswith("batch."):
            assert torch.equal(gallery[name], buffer), name
    kept = torch.equal(model.gallery.batch.running_mean, model.probe.batch.running_mean)
    assert kept == (policy == "copy")


def test_the_default_follows_in_a_short_run():
    """After 80 updates little is left of the start, as it would be of 0.999^80 = 0.92."""
    model = SemiSiamese(nn.Linear(1, 1, bias=False), criterion(dim=1))
    with torch.no_grad():
        model.probe.weight.fill_(1.0)
        model.gallery.weight.fill_(0.0)
    for _ in range(80):
        model.update_gallery()
    assert model.gallery.weight.item() > 0.99


def test_gallery_networks_take_turns():
    model = SemiSiamese(backbone(), criterion(), momentum=0.0, galleries=3)
    first = [g[1].weight.clone() for g in model.galleries]
    for step in range(3):
        assert model.gallery is model.galleries[step]
        with torch.no_grad():
            model.probe[1].weight.add_(1.0)
        model.update_gallery()
    for turn, (old, network) in enumerate(zip(first, model.galleries, strict=True)):
        assert torch.allclose(network[1].weight, old + turn + 1)


@pytest.mark.parametrize("keep", ["second", "mean", "both"])
def test_what_is_kept(keep):
    loss = criterion(keep=keep)
    ga, gb = F.normalize(torch.randn(4, 8)), 5 * torch.randn(4, 8)
    loss(torch.randn(4, 8), torch.randn(4, 8), ga, gb, torch.arange(4))
    unit = F.normalize(gb)
    expected = {"second": unit, "mean": F.normalize(ga + unit), "both": torch.cat([ga, unit])}[keep]
    assert torch.allclose(loss.queue.features[: len(expected)], expected, atol=1e-6)
    assert len(loss.queue) == len(expected)
    assert loss.queue.identities[: len(expected)].tolist() == [0, 1, 2, 3] * (len(expected) // 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_works_under_autocast_with_accumulated_gradients(dtype):
    """Two half batches under autocast and a gradient scaler, in channels_last: finite, and near the whole in float32."""
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 8)).to(memory_format=torch.channels_last)
    model = SemiSiamese(conv, criterion(), shuffle=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    images = [torch.randn(8, 3, 6, 6).to(memory_format=torch.channels_last) for _ in range(2)]
    model.criterion.eval()  # the queue as it is
    model.criterion.queue.enqueue(torch.randn(20, 8), torch.arange(100, 120))
    for part in (slice(0, 4), slice(4, 8)):
        with torch.autocast("cpu", dtype):
            loss = model(images[0][part], images[1][part], torch.arange(8)[part])
        scaler.scale(loss / 2).backward()
    found = [p.grad / 64 for p in model.probe.parameters()]
    model.zero_grad()
    expected = sum(model(images[0][p], images[1][p], torch.arange(8)[p]) / 2 for p in (slice(0, 4), slice(4, 8)))
    expected.backward()
    for a, b in zip(found, (p.grad for p in model.probe.parameters()), strict=True):
        assert (a - b).norm() <= 0.1 * b.norm()


def test_an_overflow_costs_one_step():
    """In float16, of both networks: the scaler skips that step, and the next ones are as good as before."""
    torch.manual_seed(0)
    model = SemiSiamese(backbone(), criterion(), momentum=0.9)
    optimizer = torch.optim.SGD(model.probe.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(6):
        images = [torch.randn(4, 12) for _ in range(2)]
        if step == 2:
            images[0][1], images[1][1] = 1e6, 1e6
        before = [p.clone() for p in model.probe.parameters()]
        with torch.autocast("cpu", torch.float16):
            loss = model(*images, torch.arange(4) + 4 * step)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        model.update_gallery()
        assert loss.isfinite() == (step != 2)
        moved = [not torch.equal(a, b) for a, b in zip(before, model.probe.parameters(), strict=True)]
        assert any(moved) == (step != 2)
    assert scaler.get_scale() == 32.0
    queue = model.criterion.queue
    assert queue.rejected == int((queue.identities[8:12] < 0).sum()) > 0
    assert (queue.identities[12:24] >= 0).all()


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once():
    """No step's number finds its way into the guards; several gallery networks take a compilation each."""
    torch.compiler.reset()
    for galleries in (1, 2):
        model = SemiSiamese(backbone(), criterion(), galleries=galleries)
        run = torch.compile(model, fullgraph=True)
        for step in range(12):
            images, ids = torch.randn(2, 4, 12), torch.arange(4) + 4 * step
            with torch._dynamo.config.patch(error_on_recompile=step >= 2 * galleries):
                run(*images, ids).backward()
            model.update_gallery()


def test_a_whole_step_compiles():
    """The step under torch.compile ends where the eager one does."""
    torch.manual_seed(0)
    models = [SemiSiamese(backbone(), criterion(keep="first"), 0.9, shuffle=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    torch.compiler.reset()
    for images in [(torch.randn(5, 12), torch.randn(5, 12)) for _ in range(3)]:
        losses = []
        for model, run in ((models[0], models[0]), (models[1], torch.compile(models[1]))):
            optimizer = torch.optim.SGD(model.probe.parameters(), 0.1)
            loss = run(*images, torch.arange(5))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update_gallery()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert not isinstance(a, torch.Tensor) or torch.allclose(a, b, atol=1e-4)


def test_gallery_batchnorm_trains_and_nothing_else_does():
    model = SemiSiamese(nn.Sequential(backbone(), nn.Dropout(0.5)), criterion())
    assert [m.training for m in model.gallery.modules() if isinstance(m, nn.BatchNorm1d)] == [True]
    assert not any(m.training for m in model.gallery.modules() if isinstance(m, nn.Dropout))
    assert not any(m.training for m in model.eval().gallery.modules())


def test_shuffling_changes_nothing_but_the_order():
    torch.manual_seed(0)
    images = torch.randn(6, 12)
    model = SemiSiamese(backbone(), criterion(), shuffle=True)
    assert torch.allclose(gallery_features(model, images), model.gallery(images), atol=1e-5)


def test_training_learns():
    """Pairs of noisy views of fixed points: the target cosine rises above the hardest negative's."""
    torch.manual_seed(0)
    points = torch.randn(40, 12)
    model = SemiSiamese(backbone(), SemiSiameseLoss(GalleryQueue(64, 8), Softmax(), 16.0), momentum=0.9)
    optimizer = torch.optim.SGD(model.probe.parameters(), 0.2, momentum=0.9)
    for _ in range(200):
        identity = torch.randperm(40)[:16]
        a, b = (points[identity] + 0.1 * torch.randn(16, 12) for _ in range(2))
        optimizer.zero_grad()
        model(a, b, identity).backward()
        optimizer.step()
        model.update_gallery()
    statistics = model.criterion.statistics
    assert statistics.target_cosine.mean() > statistics.hardest_cosine.mean() + 0.1


def test_state_dict_round_trip():
    torch.manual_seed(0)
    models = [SemiSiamese(backbone(), criterion()) for _ in range(2)]
    models[0](torch.randn(4, 12), torch.randn(4, 12), torch.arange(4))
    models[1].load_state_dict(models[0].state_dict())
    images = torch.randn(4, 12), torch.randn(4, 12)
    losses = []
    for model in models:
        torch.manual_seed(1)
        losses.append(model(*images, torch.arange(4)).item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SemiSiamese(backbone(), criterion(), momentum=1.5), r"momentum must be in \[0, 1\], got 1.5"),
        (lambda: criterion(keep="last"), "keep must be"),
        (lambda: SemiSiamese(backbone(), criterion(), galleries=0), "galleries must be an integer >= 1, got 0"),
        (lambda: SemiSiamese(backbone(), criterion(), batchnorm="no"), "batchnorm must be one of"),
        (lambda: SemiSiamese(backbone(), criterion(), warmup=0.5), "warmup must be an integer >= 0, got 0.5"),
        (lambda: SemiSiamese(nn.Flatten(), criterion()), "backbone must have parameters"),
        (lambda: criterion(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: SemiSiameseLoss(GalleryQueue(8, 4), scale=-1.0), "scale must be a finite number > 0, got -1.0"),
        (lambda: MarginSoftmaxHead(1, 4), "classes must be an integer >= 2, got 1"),
        (lambda: MarginSoftmaxHead(5, 4, scale=-1.0), "scale must be a finite number > 0, got -1.0"),
        (lambda: MarginSoftmaxHead(5, 4, reduction="avg"), "reduction must be one of .*, got 'avg'"),
        (
            lambda: MarginSoftmaxHead(5, 4, ArcSoftmax(torch.tensor(50.0))),
            "ArcSoftmax: margin must be radians in .*, got 50",
        ),
        (
            lambda: SemiSiamese(backbone(), criterion())(torch.ones(4, 12), torch.ones(3, 12), torch.arange(4)),
            "image_b must have shape",
        ),
        (
            lambda: criterion(size=3)(*[torch.randn(4, 8)] * 4, torch.arange(4)),
            "batch of 4 does not fit into a queue of 3",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: SemiSiameseLoss(GalleryQueue(8, 4), margin="am"),
            "margin must be a margin of sst_fast.margins, got str",
        ),
        (lambda: SemiSiameseLoss(torch.zeros(8, 4)), "queue must be a GalleryQueue, got Tensor"),
        (lambda: MarginSoftmaxHead(5, 4, margin=0.5), "margin must be a margin of sst_fast.margins, got float"),
        (lambda: MarginSoftmaxHead(5, 4, bogus=1), "bogus is no option of MarginSoftmaxHead, expected backend, "),
    ],
)
def test_wrong_kinds_are_refused_at_construction(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_integers_and_floats_of_numpy():
    queue = GalleryQueue(np.int64(12), np.int32(8), spare=np.int64(0))
    model = SemiSiamese(
        nn.Linear(12, 8), SemiSiameseLoss(queue, AMSoftmax(np.float32(0.35)), np.float64(30)), np.float32(0.5),
        warmup=np.int64(3), galleries=np.int64(2),
    )  # fmt: skip
    model(torch.randn(4, 12), torch.randn(4, 12), torch.arange(4)).backward()
    model.update_gallery()
    assert len(queue) == 4
    assert queue.dequeue(np.int64(2)).tolist() == [0, 1]
    MarginSoftmaxHead(np.int64(5), np.int64(4), scale=np.float32(16))(torch.randn(3, 4), torch.arange(3)).backward()


@pytest.mark.parametrize("margin", [CurricularFace(t=0.2), AdaFace(), AdaCos()], ids=repr)
def test_running_margins_see_finite_and_counted_rows_only(margin):
    """Ignored rows and rows that are not finite leave no trace; a batch without others moves nothing."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 5) * 10, torch.randint(9, (8,))
    weight = torch.randn(9, 5)
    heads = [MarginSoftmaxHead(9, 5, margin) for _ in range(3)]
    for head in heads:
        head.weight.data.copy_(weight)
    heads[0](x[:5], y[:5])
    bad, ignored = x.clone(), y.clone()
    bad[5, 2], bad[6, 0], ignored[5], bad[7], ignored[7] = torch.nan, torch.inf, -100, torch.nan, -100
    heads[1](bad, ignored)
    before = {name: value.clone() for name, value in heads[2].margin.named_buffers()}
    heads[2](x, torch.full((8,), -100))
    heads[2](torch.full_like(x, torch.nan), y)
    for name in margin.running:
        assert torch.allclose(getattr(heads[0].margin, name), getattr(heads[1].margin, name), rtol=1e-5)
        assert torch.equal(getattr(heads[2].margin, name), before[name])
        assert not torch.equal(getattr(heads[0].margin, name), before[name])


def test_running_margins_keep_their_precision():
    """float64 modules hold them in float64; half-precision ones in float32, which 0.01 of a batch can still move."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(9, (6,))
    head = MarginSoftmaxHead(9, 5, AdaCos()).double()
    head(x, y)
    cosines = F.normalize(x) @ F.normalize(head.weight.detach()).T
    first = math.sqrt(2) * math.log(8)
    others = torch.ones_like(cosines).scatter(1, y[:, None], 0)
    mean = ((first * cosines).exp() * others).sum(1).mean()
    angle = cosines[torch.arange(6), y].acos().median().clamp_max(math.pi / 4)
    assert head.margin.scale.dtype == torch.float64
    assert head.margin.scale.item() == pytest.approx((mean.log() / angle.cos()).item(), rel=1e-12)
    head = MarginSoftmaxHead(9, 5, CurricularFace(t=0.123456)).half()
    assert head.margin.t.dtype == torch.float32
    assert head.margin.t.item() == pytest.approx(0.123456, abs=1e-7)


def test_a_margin_that_is_a_parameter_is_trained():
    """AdaptiveFace: a margin for each class that wants to be large (Liu et al., CVPR 2019)."""
    margin = nn.Parameter(torch.tensor(0.3))
    head = MarginSoftmaxHead(9, 5, AMSoftmax(margin))
    assert any(p is margin for p in head.parameters())
    (head(torch.randn(6, 5), torch.arange(6)) - 70 * margin).backward()
    assert margin.grad.item() < 0


@pytest.mark.parametrize("name", MARGINS)
def test_every_margin_trains_both_losses(name):
    """Loss and gradient are finite and the loss falls, with the margin's own running parameters."""
    torch.manual_seed(0)
    special = {"magface": MagFace(0.5, 5.0, weight=0.1), "filtered": FilteredMargin(threshold=0.95)}
    margin = special.get(name) or MARGINS[name]()
    model = SemiSiamese(nn.Linear(12, 8), SemiSiameseLoss(GalleryQueue(24, 8), margin), momentum=0.5)
    head = MarginSoftmaxHead(12, 8, margin, scale=16.0)
    backbone = nn.Linear(12, 8)
    images, identity = torch.randn(12, 12), torch.arange(12)
    for parameters, loss_of in (
        (model.probe.parameters(), lambda: model(images, images + 0.1 * torch.randn(12, 12), identity)),
        ([*backbone.parameters(), *head.parameters()], lambda: head(backbone(images), identity)),
    ):
        optimizer = torch.optim.SGD(list(parameters), 0.1)
        losses = []
        for _ in range(40):
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_gallery()
            losses.append(loss.item())
        assert all(math.isfinite(x) for x in losses)
        if name != "adacos":  # its scale, and so the size of its loss, changes on the way
            assert sum(losses[-5:]) < sum(losses[5:10])


def test_curricularface_follows_the_batch_and_is_saved():
    queue = GalleryQueue(6, 4)
    criterion = SemiSiameseLoss(queue, CurricularFace(t=0.2))
    x = [F.normalize(torch.randn(3, 4)) for _ in range(4)]
    criterion(*x, torch.arange(3))
    cosines = torch.cat([(x[0] * x[3]).sum(1), (x[1] * x[2]).sum(1)])
    assert criterion.margin.t.item() == pytest.approx(0.99 * 0.2 + 0.01 * cosines.mean().item(), abs=1e-6)
    other = SemiSiameseLoss(GalleryQueue(6, 4), CurricularFace())
    other.load_state_dict(criterion.state_dict())
    assert other.margin.t.item() == criterion.margin.t.item()
    criterion.eval()
    criterion(*x, torch.arange(3))
    assert criterion.margin.t.item() == other.margin.t.item()


def test_adacos_against_its_equation():
    torch.manual_seed(1)
    head = MarginSoftmaxHead(9, 5, AdaCos())
    x, y = torch.randn(6, 5), torch.randint(9, (6,))
    head(x, y)
    cosines = F.normalize(x) @ F.normalize(head.weight.detach()).T
    first = math.sqrt(2) * math.log(8)
    others = torch.ones(6, 9).scatter(1, y[:, None], 0)
    mean = ((first * cosines).exp() * others).sum(1).mean()
    angle = cosines[torch.arange(6), y].acos().median().clamp_max(math.pi / 4)
    assert head.margin.scale.item() == pytest.approx((mean.log() / angle.cos()).item(), rel=1e-5)


def test_adaface_follows_the_norms():
    head = MarginSoftmaxHead(9, 5, AdaFace(mean=10.0, std=1.0))
    x = torch.randn(6, 5)
    head(x, torch.arange(6))
    norm = x.norm(dim=1)
    assert head.margin.mean.item() == pytest.approx(9.9 + 0.01 * norm.mean().item())
    assert head.margin.std.item() == pytest.approx(0.99 + 0.01 * norm.std().item())


def test_the_weight_of_a_batch_in_adaface():
    """1 in the authors' head: the batch's own statistics."""
    head = MarginSoftmaxHead(9, 5, AdaFace(t_alpha=1.0))
    x = torch.randn(6, 5)
    head(x, torch.arange(6))
    assert head.margin.mean.item() == pytest.approx(x.norm(dim=1).mean().item())
    assert head.margin.std.item() == pytest.approx(x.norm(dim=1).std().item())


def test_head_is_a_linear_layer_with_normalised_weights():
    torch.manual_seed(0)
    head = MarginSoftmaxHead(9, 5, AMSoftmax(0.4), 64.0)
    x, y = torch.randn(6, 5, requires_grad=True), torch.randint(9, (6,))
    logits = 64 * (F.normalize(x) @ F.normalize(head.weight).T - 0.4 * F.one_hot(y, 9))
    expected = torch.autograd.grad(F.cross_entropy(logits, y), (x, head.weight))
    found = torch.autograd.grad(head(x, y), (x, head.weight))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))
