"""Heads: beside the peers' own or restated ones, weight for weight over free steps; conversion, logits, names of bad input."""

import copy
import dataclasses
import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sst_fast
from bench import peers
from sst_fast import margins
from sst_fast.nn import blocks, convert, heads
from sst_fast.nn.compat import adaface, facex_zoo, insightface, pytorch_metric_learning

C, D, N, STEPS = 40, 24, 16, 50


@dataclasses.dataclass
class Pair:
    """A peer's head and ours, how the one's state becomes the other's, and what the embeddings are multiplied by."""

    theirs: nn.Module
    ours: nn.Module
    source: str
    size: float = 1.0
    lr: float = 0.05


def pair_of(theirs, ours, source, **rest):
    """Both made from the same seed."""
    torch.manual_seed(7)
    peer = theirs()
    torch.manual_seed(7)
    return Pair(peer, ours(), source, **rest)


def facex(name, peer, *args, **rest):
    theirs, ours = getattr(peers, peer), getattr(facex_zoo, name)
    return pair_of(lambda: theirs(C, D, *args), lambda: ours(D, C, *args), "facex-zoo", **rest)


def metric_learning(name, **rest):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs, ours = getattr(losses, name), getattr(pytorch_metric_learning, name)
    sizes = {"num_classes": C, "embedding_size": D}
    return pair_of(lambda: theirs(**sizes), lambda: ours(**sizes), "pytorch-metric-learning", **rest)


def partial_fc(*args, **rest):
    def ours():
        return insightface.PartialFC_V2(insightface.CombinedMarginLoss(*args), D, C)

    return pair_of(lambda: peers.PartialFC(C, D, *args), ours, "insightface", **rest)


def uniface(m=0.4, s=64.0, weight=1.0, **rest):
    return pair_of(
        lambda: peers.UniFace(C, D, m, s, weight),
        lambda: heads.UniFace(C, D, m, s, negative_weight=weight, init=partial(nn.init.kaiming_normal_, a=1)),
        "uniface",
        **rest,
    )


def ada_face(t_alpha):
    return pair_of(
        lambda: peers.AdaFace(C, D, t_alpha=t_alpha),
        lambda: adaface.AdaFace(D, C, t_alpha=t_alpha),
        "adaface",
        size=20.0,
    )


PAIRS = {
    "FaceX-Zoo AM_Softmax": lambda: facex("AM_Softmax", "AMSoftmax"),
    "FaceX-Zoo ArcFace": lambda: facex("ArcFace", "ArcFace"),
    "FaceX-Zoo ArcFace, margin_am": lambda: facex("ArcFace", "ArcFace", 0.5, 0.1, 30.0),
    "FaceX-Zoo MagFace": lambda: facex("MagFace", "MagFace", size=20.0),
    "FaceX-Zoo CircleLoss": lambda: facex("CircleLoss", "CircleLoss", lr=0.005),
    "FaceX-Zoo CurricularFace": lambda: facex("CurricularFace", "CurricularFace", lr=0.001),
    "FaceX-Zoo MV_Softmax, am": lambda: facex("MV_Softmax", "MVSoftmax", True),
    "FaceX-Zoo MV_Softmax, arc": lambda: facex("MV_Softmax", "MVSoftmax", False, 0.5, 1.2, 30.0),
    "FaceX-Zoo NPCFace": lambda: facex("NPCFace", "NPCFace"),
    "FaceX-Zoo Adam_Softmax": lambda: facex("Adam_Softmax", "AdamSoftmax"),
    "FaceX-Zoo Adam_Softmax, other numbers": lambda: facex("Adam_Softmax", "AdamSoftmax", 20.0, 3.0),
    "FaceX-Zoo AdaCos": lambda: facex("AdaCos", "AdaCos"),
    "UniFace": lambda: uniface(lr=0.005),
    "UniFace, other numbers": lambda: uniface(0.2, 16.0, 0.5),
    "insightface arc": lambda: partial_fc(64.0, 1.0, 0.5, 0.0, lr=0.001),
    "insightface cos": lambda: partial_fc(64.0, 1.0, 0.0, 0.4, lr=0.001),
    "insightface cos, filtered": lambda: partial_fc(64.0, 1.0, 0.0, 0.4, 0.3, lr=0.001),
    "insightface arc, filtered": lambda: partial_fc(64.0, 1.0, 0.5, 0.0, 0.3, lr=0.001),
    "AdaFace": lambda: ada_face(1.0),
    "AdaFace, t_alpha": lambda: ada_face(0.1),
    "pytorch-metric-learning ArcFaceLoss": lambda: metric_learning("ArcFaceLoss"),
    "pytorch-metric-learning CosFaceLoss": lambda: metric_learning("CosFaceLoss"),
    "pytorch-metric-learning SphereFaceLoss": lambda: metric_learning("SphereFaceLoss"),
    "pytorch-metric-learning SubCenterArcFaceLoss": lambda: metric_learning("SubCenterArcFaceLoss", lr=0.02),
    "pytorch-metric-learning NormalizedSoftmaxLoss": lambda: metric_learning("NormalizedSoftmaxLoss"),
}  # fmt: skip


def batches(dtype):
    """Images near their class's centre: some of them hard, with targets on both sides of 90 degrees."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(C, 12, generator=generator, dtype=dtype)
    for _ in range(STEPS):
        label = torch.randint(C, (N,), generator=generator)
        yield centres[label] + 0.5 * torch.randn(N, 12, generator=generator, dtype=dtype), label


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", PAIRS)
def test_fifty_free_steps_beside_the_peer(name, dtype):
    """Both train their own network and class weights from the same start; losses and weights stay together."""
    pair = PAIRS[name]()
    theirs, ours = pair.theirs.to(dtype), pair.ours.to(dtype)
    ours.load_state_dict(convert(theirs.state_dict(), pair.source))
    networks = [nn.Linear(12, D, dtype=dtype)]
    networks.append(copy.deepcopy(networks[0]))
    found = []
    for head, network in zip((theirs, ours), networks, strict=True):
        optimizer = torch.optim.SGD(
            [*head.parameters(), *network.parameters()], pair.lr, momentum=0.9, weight_decay=5e-4
        )
        losses = []
        for image, label in batches(dtype):
            loss = head(pair.size * network(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append(torch.tensor(losses, dtype=dtype))
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    state = convert(theirs.state_dict(), pair.source)
    if name == "FaceX-Zoo AdaCos":  # which does not save it
        state["margin.scale"] = torch.tensor(theirs.scale, dtype=dtype)
    compared = {f"state {key}": (state[key], value) for key, value in ours.state_dict().items()}
    compared |= {"losses": tuple(found), "network": tuple(network.weight.detach() for network in networks)}
    for what, (expected, value) in compared.items():
        assert torch.isfinite(value).all()
        assert (value - expected).norm() <= tolerance * expected.norm(), what
    assert found[1][-5:].mean() < found[1][:5].mean() or "AdaCos" in name  # they learn


@pytest.mark.parametrize("loss_type", ["softmax", "am_softmax", "arc_softmax"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_fifty_free_steps_beside_facex_zoos_semi_siamese_head(loss_type, dtype):
    """Their batch must divide the queue; whose feature is kept is told to both."""
    torch.manual_seed(1)
    theirs = peers.SSTPrototype(D, 8 * N, 30.0, loss_type, 0.35).to(dtype)
    ours = facex_zoo.SST_Prototype(D, 8 * N, 30.0, loss_type, 0.35, keep="first").to(dtype)
    ours.queue.features.copy_(theirs.queue.T)
    first, second = (nn.Linear(12, D, dtype=dtype) for _ in range(2))
    pairs = [(theirs, first, second), (ours, copy.deepcopy(first), copy.deepcopy(second))]
    found = []
    for head, probe, gallery in pairs:
        optimizer = torch.optim.SGD(probe.parameters(), 0.05, momentum=0.9)
        losses = []
        for step, (image, label) in enumerate(batches(dtype)):
            a, b = image, image + 0.1 * image.flip(0)
            with torch.no_grad():
                seen = [gallery(b), gallery(a)]
            rest = {"first": True} if head is theirs else {}
            loss = head(probe(a), seen[0], probe(b), seen[1], label + C * step, **rest)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append(torch.tensor(losses, dtype=dtype))
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    assert (found[1] - found[0]).norm() <= tolerance * found[0].norm()
    assert (pairs[1][1].weight - pairs[0][1].weight).norm() <= tolerance * pairs[0][1].weight.norm()
    assert (ours.queue.features.T - theirs.queue).norm() <= tolerance * theirs.queue.norm()
    assert ours.get_id_set() == set(theirs.label_list)


def test_what_is_meant_to_differ_from_insightface():
    """Its ArcFace takes the margin's derivative as 1; ours is the loss's own gradient, unless asked. Beyond pi the one rises again."""
    torch.manual_seed(0)
    head = insightface.PartialFC_V2(insightface.ArcFace(), D, C).double()
    exact = heads.ArcFace(C, D).double()
    exact.load_state_dict(head.state_dict())
    x, y = torch.randn(N, D, dtype=torch.float64, requires_grad=True), torch.randint(C, (N,))
    assert exact(x, y).item() == pytest.approx(head(x, y).item(), rel=1e-12)
    through, own = (torch.autograd.grad(loss(x, y), x)[0] for loss in (head, exact))
    assert (own - through).norm() > 0.01 * own.norm()
    step = 1e-6 * F.normalize(own, dim=None)
    slope = (exact(x + step, y) - exact(x - step, y)) / 2e-6
    assert slope.item() == pytest.approx(own.norm().item(), rel=1e-6)
    with torch.no_grad():
        head.weight[y[0]] = exact.weight[y[0]] = -x[0]
    assert exact(x, y).item() > head(x, y).item() + 0.1


ALL = {
    heads.ArcFace: margins.ArcSoftmax, heads.CosFace: margins.AMSoftmax, heads.SphereFace: margins.SphereFace,
    heads.CombinedMargin: margins.CombinedMargin, heads.CurricularFace: margins.CurricularFace,
    heads.MVSoftmax: margins.MVSoftmax, heads.NPCFace: margins.NPCFace, heads.ArcNegFace: margins.ArcNegFace,
    heads.CircleLoss: margins.CircleLoss, heads.AdaCos: margins.AdaCos, heads.MagFace: margins.MagFace,
    heads.AdaFace: margins.AdaFace, heads.SubCenterArcFace: margins.ArcSoftmax, heads.NormalizedSoftmax: margins.Softmax,
}  # fmt: skip


@pytest.mark.parametrize("head", ALL, ids=lambda head: head.__name__)
def test_a_head_has_its_margins_arguments_and_defaults(head):
    formula = ALL[head]
    assert head(5, 4).margin.margin == formula()
    fields = {field.name: field.default for field in dataclasses.fields(formula)}
    renamed = {"penalty_weight": "weight", "margin": "m1" if head is heads.SphereFace else "margin"}
    for name, parameter in inspect.signature(head).parameters.items():
        if (renamed.get(name, name)) in fields:
            assert parameter.default == fields[renamed.get(name, name)], name
    assert getattr(sst_fast.nn, head.__name__) is head
    assert head(5, 4)(torch.randn(3, 4), torch.arange(3)).isfinite()


def test_trained_margins_grow_until_they_cost_as_much_as_they_earn():
    """AdaM-softmax: of classes told apart easily they rise to 1 at most, and stay where they were in evaluation mode."""
    torch.manual_seed(0)
    head = heads.AdaMSoftmax(4, D, penalty_weight=100.0)
    first = head.margins.detach().clone()
    assert ((first >= 0.3) & (first <= 0.4)).all()
    x, y = head.weight.detach().clone(), torch.arange(4)
    optimizer = torch.optim.SGD([head.margins], 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        head(x, y).backward()
        optimizer.step()
    head(x, y)
    assert (head.margins > first).all()
    assert head.margins.max() <= 1
    with torch.no_grad():
        head.margins.fill_(1.5)
        head.eval()(x, y)
    assert (head.margins == 1.5).all()
    one = heads.AdaMSoftmax(4, D, per_class=False)
    one(x, y).backward()
    assert one.margins.grad.shape == (1,)
    assert one.margins.grad != 0


def test_sigmoids_are_taken_in_blocks_of_classes(monkeypatch):
    torch.manual_seed(0)
    head, x, y = heads.UniFace(C, D, scale=8.0).double(), torch.randn(N, D, dtype=torch.float64), torch.randint(C, (N,))
    expected = [head(x, y), *torch.autograd.grad(head(x, y), list(head.parameters()))]
    monkeypatch.setattr(blocks, "COLUMNS", 7)
    monkeypatch.setitem(blocks.AT_ONCE, "cpu", 21)
    found = [head(x, y), *torch.autograd.grad(head(x, y), list(head.parameters()))]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    head.eval()
    assert not head(x.requires_grad_(False), y).isnan()


def test_every_margin_has_a_head():
    assert {*ALL.values(), margins.FilteredMargin} == set(margins.MARGINS.values())
    filtered = heads.CombinedMargin(5, 4, 1.0, 0.5, 0.0, beyond="cosine", threshold=0.4)
    assert filtered.margin.margin == margins.FilteredMargin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_are_the_plain_cosines(dtype):
    torch.manual_seed(0)
    head = heads.ArcFace(C, D, scale=16.0, init=nn.init.normal_).to(dtype)
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    logits = head.logits(x)
    expected = 16 * F.normalize(x.double()) @ F.normalize(head.weight.double()).T
    assert logits.dtype == dtype
    assert torch.allclose(logits.double(), expected, atol={torch.bfloat16: 0.3}.get(dtype, 1e-5))
    logits.sum().backward()
    assert x.grad.norm() > 0
    assert head.weight.grad.norm() > 0


def test_logits_with_scales_that_follow_something():
    torch.manual_seed(0)
    x, y = 3 * torch.randn(N, D), torch.randint(C, (N,))
    ada = heads.AdaCos(C, D)
    first = ada.logits(x).max() / ada.topk(x).cosine.max()
    assert first.item() == pytest.approx(math.sqrt(2) * math.log(C - 1), rel=1e-5)
    ada(x, y)
    assert (ada.logits(x).max() / ada.topk(x).cosine.max()).item() == pytest.approx(ada.margin.scale.item(), rel=1e-5)
    sphere = heads.SphereFace(C, D, norm_scale=True)
    assert torch.allclose(sphere.logits(x), x @ F.normalize(sphere.weight).T, atol=1e-5)
    each = heads.CosFace(C, D, scale=torch.linspace(1, 2, N))
    assert torch.allclose(each.logits(x)[-1], 2 * cosine_of(each, x)[-1], atol=1e-5)


def cosine_of(head, x):
    return F.normalize(x) @ F.normalize(head.weight).T


@pytest.mark.parametrize("k", [1, 5, 40])
def test_topk_over_blocks(monkeypatch, k):
    """Blocks that neither probes nor classes divide; more wanted than a block holds."""
    monkeypatch.setattr(sst_fast.functional, "BLOCK", (7, 6))
    torch.manual_seed(0)
    head, x = heads.CosFace(C, D), torch.randn(N, D)
    found = head.topk(x, k)
    expected = cosine_of(head, x).topk(k)
    assert torch.allclose(found.cosine, expected.values, atol=1e-6)
    assert torch.equal(found.row, expected.indices)
    assert not found.cosine.requires_grad


def test_sub_centers_count_as_one_class(monkeypatch):
    """In the loss, the logits and, over blocks that three sub-centres do not divide, the nearest classes."""
    monkeypatch.setattr(sst_fast.functional, "BLOCK", (7, 16))
    torch.manual_seed(0)
    head, x, y = heads.SubCenterArcFace(C, D, scale=8.0), torch.randn(N, D), torch.arange(N)
    cosine = cosine_of(head, x).view(N, C, 3).amax(2)
    assert torch.allclose(head.logits(x), 8 * cosine, atol=1e-5)
    assert torch.equal(head.topk(x, 5).row, cosine.topk(5).indices)
    own = cosine[y, y]
    margined = own * math.cos(0.5) - (1 - own**2).sqrt() * math.sin(0.5)
    expected = F.cross_entropy(8 * cosine.index_put((y, y), margined), y)
    assert head(x, y).item() == pytest.approx(expected.item(), rel=1e-5)


def test_topk_makes_no_table_of_all_cosines():
    """A million comparisons at most at once, whatever N and K."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else [out]
            largest = max([largest, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
            return out

    head, x = heads.CosFace(20_000, 4), torch.randn(3000, 4)
    with Watch():
        found = head.topk(x, 3)
    rows, columns = sst_fast.functional.BLOCK
    assert found.row.shape == (3000, 3)
    assert largest <= rows * columns < 3000 * 20_000 / 8


def test_topk_of_a_queue_of_half_precision():
    torch.manual_seed(0)
    queue = F.normalize(torch.randn(50, 16)).to(torch.float8_e4m3fn)
    found = sst_fast.functional.topk(queue.float()[[3, 7]], queue)
    assert found.row.tolist() == [[3], [7]]
    assert found.cosine.dtype == torch.float32
    assert sst_fast.functional.topk(torch.zeros(0, 16), queue, 2).row.shape == (0, 2)


# --- weights of other projects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_converted_weights_give_the_peers_logits(name):
    pair = PAIRS[name]()
    with torch.no_grad():
        for value in pair.theirs.parameters():
            value.normal_()
    state = {f"module.head.{key}": value for key, value in pair.theirs.state_dict().items()}
    pair.ours.load_state_dict(convert(state | {"module.backbone.weight": torch.zeros(3)}, pair.source))
    x = torch.randn(N, D)
    weight = next(value for value in pair.theirs.state_dict().values() if value.dim() == 2)
    by_column = F.normalize(weight.T if weight.shape == (C, D) else weight, dim=0)
    assert torch.allclose(cosine_of(pair.ours, x), F.normalize(x) @ by_column, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in PAIRS if not name.startswith("insightface")])
def test_the_same_seed_gives_the_peers_first_weights(name):
    """But for partial FC, each rank of which draws its own."""
    pair = PAIRS[name]()
    assert torch.allclose(pair.ours.weight, convert(pair.theirs.state_dict(), pair.source)["weight"], rtol=1e-5)


def test_shards_of_insightface_are_merged():
    """One file for each rank, classes in the order of ranks."""
    whole = torch.randn(C, D)
    parts = [{"weight": part} for part in whole.tensor_split(3)]
    assert torch.equal(convert(parts, "insightface")["weight"], whole)


def test_what_follows_the_training_is_converted():
    found = convert({"kernel": torch.randn(D, C), "t": torch.tensor([0.3])}, "facex-zoo")
    assert found["margin.t"].item() == pytest.approx(0.3)
    state = {
        "kernel": torch.randn(D, C),
        "t": torch.zeros(1),
        "batch_mean": torch.tensor([21.0]),
        "batch_std": torch.ones(1),
    }
    head = adaface.AdaFace(D, C)
    head.load_state_dict(convert(state, "adaface"))
    assert head.margin.mean.item() == 21
    assert head.margin.std.item() == 1


@pytest.mark.parametrize(
    ("state", "source", "message"),
    [
        ({"W": torch.ones(2, 3)}, "pml", "source must be one of 'insightface', .*, got 'pml'"),
        ({"state_dict": {"head.weight": 1}}, "facex-zoo", "must map names to tensors, got dict as 'state_dict': of a checkpoint"),
        ({"kernel": torch.ones(2, 3)}, "pytorch-metric-learning", "'kernel' of pytorch-metric-learning has no counterpart, expected W"),
        ({"W": torch.ones(3)}, "pytorch-metric-learning", r"'W' must have 2 dimensions, got \[3\]"),
        ({"t": torch.ones(1)}, "facex-zoo", "no weights, expected weight or kernel or W, got t"),
        ({}, "insightface", "no weights, expected weight, got nothing"),
        ({"queue": torch.ones(2, 3)}, "facex-zoo", "without its identities and position"),
        ([{"W": torch.ones(2, 3)}], "pytorch-metric-learning", "a list of at least one from insightface, got 1 from pytorch-"),
    ],
)  # fmt: skip
def test_states_that_cannot_be_converted(state, source, message):
    with pytest.raises(ValueError, match=message):
        convert(state, source)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: heads.ArcFace(1, 4), ValueError, "classes must be an integer >= 2, got 1"),
        (lambda: heads.AdaMSoftmax(5, 4, low=0.5, high=0.4), ValueError, "low and high must be cosines with 0 <= low <= high <= 1"),
        (lambda: heads.AdaMSoftmax(5, 4, penalty_weight=-1), ValueError, "penalty_weight must be a number >= 0, got -1"),
        (lambda: heads.AdaMSoftmax(5, 4, reduction="sum"), ValueError, "reduction must be 'mean', got 'sum'"),
        (lambda: heads.AdaMSoftmax(5, 4)(torch.ones(2, 4), torch.tensor([0, 9])), IndexError, r"target\[1\] is 9"),
        (lambda: heads.AdaMSoftmax(5, 4)(torch.ones(2, 4), torch.ones(2)), TypeError, "target must be int64"),
        (lambda: heads.UniFace(5, 4)(torch.ones(2, 4), torch.tensor([0, 9])), IndexError, r"target\[1\] is 9"),
        (lambda: heads.UniFace(5, 4)(torch.ones(2, 3), torch.tensor([0, 1])), ValueError, "embedding must have shape"),
        (lambda: heads.UniFace(5, 4, scale=-1.0), ValueError, "scale must be a number >= 0, got -1.0"),
        (lambda: heads.UniFace(5, 4, sub_centers=2), TypeError, "sub_centers is no option of UniFace"),
        (lambda: facex_zoo.ArcFace(4, 1), ValueError, "classes must be an integer >= 2, got 1"),
        (lambda: heads.ArcFace(5, 4)(torch.ones(3, 4), torch.tensor([0, 5, 1])), IndexError, r"target\[1\] is 5, .* \[0, 5\)"),
        (lambda: heads.ArcFace(5, 4)(torch.ones(3, 4), torch.tensor([0, -1, 1])), IndexError, r"target\[1\] is -1"),
        (lambda: heads.CosFace(5, 4)(torch.ones(3, 4), torch.ones(3)), TypeError, "target must be int64, got float32"),
        (lambda: heads.ArcFace(5, 4, 28.6), ValueError, r"margin must be radians in \[0, 3.14159\], got 28.6"),
        (lambda: heads.NormalizedSoftmax(5, 4, 0.0), ValueError, "temperature must be a number of at least 0.001, got 0.0"),
        (lambda: heads.CosFace(5, 4, reducer=None), TypeError, "reducer is no option of CosFace, expected backend, "),
        (lambda: heads.CombinedMargin(5, 4, annealing=1.0, threshold=0.4), ValueError, "annealing must be 0 with threshold, got 1"),
        (lambda: heads.CosFace(5, 4).topk(torch.ones(3, 4), 6), ValueError, "k must be at most 5, the number of prototypes, got 6"),
        (lambda: heads.CosFace(5, 4).topk(torch.ones(3, 4), 0), ValueError, "k must be an integer >= 1, got 0"),
        (lambda: heads.CosFace(5, 4).topk(torch.ones(3, 3)), ValueError, r"embedding must have shape \[any, 4\], got \[3, 3\]"),
        (lambda: heads.CosFace(5, 4).logits(torch.ones(4)), ValueError, r"embedding must have shape \[any, 4\], got \[4\]"),
        (lambda: insightface.CombinedMarginLoss(64, 0.9, 0.4, 0.15), ValueError, r"must be \(1, m2, 0\) or .* got \(0.9, 0.4, 0.15\)"),
        (lambda: pytorch_metric_learning.SphereFaceLoss(5, 4, scale=30), ValueError, "scale must be 1, .* got 30"),
        (lambda: facex_zoo.SST_Prototype(loss_type="am"), ValueError, "loss_type must be one of 'softmax', .*, got 'am'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
