"""Losses over queues and pairs: beside the peers' own or restated ones over free steps, over ranks, at the edges."""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from runs import on_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench import queue_peers as peers
from sst_fast import CurricularFace, GalleryQueue, distributed, functional
from sst_fast.nn import DCQ, Contrastive, CrossBatchMemory, MoCo, NTXent, PairCircle, SupCon, blocks, queues

B, D, K = 8, 6, 32
TOGETHER = {torch.float64: 1e-10, torch.float32: 1e-4}


# --- free steps beside the peers' --------------------------------------------------------------------------------------


def network(dtype):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, D)).to(dtype)


def batches(dtype, steps=50, batch=B, people=7):
    """Two views of the samples of each batch, of few identities, so that probes have several positives and some none."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(people, 10, generator=generator, dtype=torch.float64)
    for _ in range(steps):
        label = torch.randint(people, (batch,), generator=generator)
        views = [centres[label] + torch.randn(batch, 10, generator=generator, dtype=torch.float64) for _ in range(2)]
        yield [view.to(dtype) for view in views], label


def train(step, dtype, lr=0.02):
    """Ends of 50 free SGD steps with loss ``step(network, momentum network, views, labels)``; losses and parameters."""
    student = network(dtype)
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr, momentum=0.5)
    found = []
    for views, label in batches(dtype):
        loss = step(student, teacher, views, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        found.append(loss.detach())
    return torch.cat([torch.stack(found), *(p.detach().flatten() for p in student.parameters())])


def queue_like(peer, dtype):
    """A queue with the random vectors that the peer's starts from."""
    queue = GalleryQueue(K, D, dtype)
    queue.features.copy_(peer.queue.T)
    return queue


def moco(dtype, mask_empty=False):
    peer = peers.MoCo(K, D, dtype, temperature=0.1)
    ours = MoCo(queue_like(peer, dtype), 0.1, mask_empty=mask_empty)
    steps = [lambda q, k, v, _, loss=loss: loss(q(v[0]), k(v[1])) for loss in (ours, peer)]
    return steps


def symmetric_moco(dtype):
    peer = peers.MoCo(K, D, dtype, temperature=0.1)
    ours = MoCo(queue_like(peer, dtype), 0.1, mask_empty=False)
    return [lambda q, k, v, _, loss=loss: loss(q(v[0]), k(v[1]), q(v[1]), k(v[0])) for loss in (ours, peer.symmetric)]


def dcq(dtype):
    peer = peers.DCQ(K, D, dtype)
    ours = DCQ(queue_like(peer, dtype), mask_empty=False)
    return [lambda q, k, v, label, loss=loss: loss(q(v[0]), k(v[1]), label) for loss in (ours, peer)]


def views(dtype, labelled):
    def features(q, v):
        return torch.stack([q(v[0]), q(v[1])], 1)

    ours = SupCon(0.2, base_temperature=0.07)
    return [
        lambda q, _, v, label: ours(features(q, v), label if labelled else None),
        lambda q, _, v, label: peers.sup_con(F.normalize(features(q, v), dim=2), label if labelled else None, 0.2),
    ]


def with_queue(dtype, make, plain, momentum_keys):
    """A loss with several positives over its batch and a queue, against one matrix of all logits."""
    queue = GalleryQueue(K, D, dtype)
    ring = GalleryQueue(K, D, dtype)
    ours = make(queue=queue)

    def theirs(q, k, v, label):
        x = q(v[0])
        rows = F.normalize(k(v[1]).detach() if momentum_keys else x)
        own = None if momentum_keys else torch.arange(len(x))
        loss = plain(x, label, torch.cat([rows, ring.features]), torch.cat([label, ring.identities]), own)
        ring.enqueue(rows, label)
        return loss

    return [
        lambda q, k, v, label: ours(q(v[0]), label, k(v[1]).detach() if momentum_keys else None),
        theirs,
    ]


def metric_learning(dtype, name, ours, memory, **options):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    theirs = getattr(losses, name)(**options)
    if memory:
        theirs = losses.CrossBatchMemory(theirs, D, memory_size=K)
        ours = CrossBatchMemory(ours, D, memory_size=K, dtype=dtype)
    return [lambda q, _, v, label, loss=loss: loss(q(v[0]), label) for loss in (ours, theirs)]


def masked_memory(dtype):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    mask = torch.arange(2 * B) >= B

    def step(loss, q, k, v, label):
        return loss(torch.cat([q(v[0]), k(v[1]).detach()]), label.repeat(2), enqueue_mask=mask)

    ours = CrossBatchMemory(NTXent(0.2), D, K, dtype=dtype)
    return [partial(step, loss) for loss in (ours, losses.CrossBatchMemory(losses.NTXentLoss(0.2), D, K))]


PAIRS = {
    "MoCo": moco,
    "MoCo, symmetric": symmetric_moco,
    "DCQ": dcq,
    "SupContrast, labels": partial(views, labelled=True),
    "SupContrast, views alone": partial(views, labelled=False),
}
for keys in (False, True):
    where = "queue and momentum keys" if keys else "queue and batch"
    PAIRS |= {
        f"SupCon outside, {where}": partial(
            with_queue, make=partial(SupCon, 0.2), plain=partial(peers.sup_con_over, temperature=0.2), momentum_keys=keys
        ),
        f"SupCon inside, {where}": partial(
            with_queue, make=partial(SupCon, 0.2, form="inside"),
            plain=partial(peers.sup_con_over, temperature=0.2, inside=True), momentum_keys=keys,
        ),
        f"NTXent, {where}": partial(
            with_queue, make=partial(NTXent, 0.2), plain=partial(peers.nt_xent_over, temperature=0.2), momentum_keys=keys
        ),
        f"PairCircle, {where}": partial(
            with_queue, make=partial(PairCircle, 0.25, 8.0), plain=partial(peers.circle_over, m=0.25, gamma=8.0),
            momentum_keys=keys,
        ),
        f"Contrastive, {where}": partial(
            with_queue, make=partial(Contrastive, 0.2), plain=partial(peers.contrastive_over, threshold=0.2), momentum_keys=keys
        ),
    }  # fmt: skip


def of_batch(dtype, ours, plain, momentum_keys):
    """A loss with several positives over its batch alone, against one matrix of all logits."""

    def theirs(q, k, v, label):
        x, own = q(v[0]), None if momentum_keys else torch.arange(B)
        return plain(x, label, F.normalize(k(v[1]).detach() if momentum_keys else x), label, own)

    return [lambda q, k, v, label: ours(q(v[0]), label, k(v[1]).detach() if momentum_keys else None), theirs]


def of_memory(dtype):
    """The XBM paper's own loss over its memory, which the batch has entered."""
    ours, ring, at = CrossBatchMemory(Contrastive(0.2), D, K, dtype=dtype), GalleryQueue(K, D, dtype), itertools.count()

    def theirs(q, k, v, label):
        x, own = q(v[0]), (next(at) * B + torch.arange(B)) % K
        ring.enqueue(x, label)
        return peers.contrastive_over(x, label, ring.features, ring.identities, own, 0.2)

    return [lambda q, k, v, label: ours(q(v[0]), label), theirs]


PAIRS["CrossBatchMemory, Contrastive"] = of_memory
for keys in (False, True):
    for name, ours, plain in (
        ("SupCon outside", SupCon(0.2), partial(peers.sup_con_over, temperature=0.2)),
        ("SupCon inside", SupCon(0.2, form="inside"), partial(peers.sup_con_over, temperature=0.2, inside=True)),
        ("NTXent", NTXent(0.2), partial(peers.nt_xent_over, temperature=0.2)),
        ("PairCircle", PairCircle(0.25, 8.0), partial(peers.circle_over, m=0.25, gamma=8.0)),
        ("Contrastive", Contrastive(0.2), partial(peers.contrastive_over, threshold=0.2)),
    ):
        PAIRS[f"{name}, {'momentum keys' if keys else 'batch'}"] = partial(
            of_batch, ours=ours, plain=plain, momentum_keys=keys
        )
for memory in (False, True):
    # gamma: torch's softplus, which theirs uses, is linear beyond 20, off by 2e-9.
    name = "CrossBatchMemory" if memory else "pytorch-metric-learning"
    PAIRS |= {
        f"{name}, SupCon": lambda dtype, memory=memory: metric_learning(
            dtype, "SupConLoss", SupCon(0.2), memory, temperature=0.2
        ),
        f"{name}, NTXent": lambda dtype, memory=memory: metric_learning(
            dtype, "NTXentLoss", NTXent(0.2), memory, temperature=0.2
        ),
        f"{name}, Circle": lambda dtype, memory=memory: metric_learning(
            dtype, "CircleLoss", PairCircle(0.4, 4.0, reduction="nonzero"), memory, m=0.4, gamma=4.0
        ),
    }
PAIRS["CrossBatchMemory, mask"] = masked_memory


@pytest.mark.parametrize("dtype", TOGETHER, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_free_steps_stay_together(one_thread, name, dtype):
    torch.manual_seed(0)
    ours, theirs = PAIRS[name](dtype)
    a, b = train(ours, dtype), train(theirs, dtype)
    assert not torch.equal(b[50:], torch.cat([p.detach().flatten() for p in network(dtype).parameters()]))
    assert (a - b).abs().max() <= TOGETHER[dtype] * b.abs().max()


# --- what it costs -------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return out


LOSSES = [SupCon(), SupCon(form="inside"), NTXent(), PairCircle()]
ALL_LOSSES = [*LOSSES, Contrastive()]


def full_queue(size, dim=D, people=None, dtype=torch.float32):
    queue = GalleryQueue(size, dim, dtype)
    queue.enqueue(torch.randn(size, dim), torch.arange(size) % (people or size))
    return queue


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{type(loss).__name__} {loss.extra_repr()}")
def test_one_sweep_over_the_queue_and_no_matrix(one_thread, loss, monkeypatch):
    n, k = 64, 4096
    loss = copy.deepcopy(loss)
    loss.queue = full_queue(k, people=512)
    swept = []
    plain = functional.margin_softmax
    monkeypatch.setattr(
        functional,
        "margin_softmax",
        lambda x, w, *rest, **options: swept.append(len(w)) or plain(x, w, *rest, **options),
    )
    x = torch.randn(n, D, requires_grad=True)
    with Largest() as seen:
        loss(x, torch.arange(n) % 32).backward()
    assert sorted(swept) == [n, k]
    assert seen.numel <= k * D  # what N x K = 262,144 is far beyond


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: f"{type(loss).__name__} {loss.extra_repr()}")
@pytest.mark.parametrize("reduction", ["mean", "nonzero", "sum"])
def test_a_batch_is_taken_in_blocks(one_thread, loss, reduction, monkeypatch):
    """Nothing as large as its N x N cosines; the loss and gradient of one block, and those of a queue that holds the batch."""
    n = 96
    loss = copy.deepcopy(loss)
    loss.reduction = reduction
    x, label = torch.randn(n, D, dtype=torch.float64, requires_grad=True), torch.arange(n) % 11
    label[0] = 50  # without a positive
    key = x.detach().flip(1)
    found = []
    for at_once in (n * n, 8 * n):
        monkeypatch.setitem(blocks.AT_ONCE, "cpu", at_once)
        monkeypatch.setattr(queues, "COLUMNS", at_once // n)
        with Largest() as seen:
            value = loss(x, label, key)
            found.append((value.detach(), torch.autograd.grad(value, x)[0]))
    assert seen.numel <= 8 * n
    queue = GalleryQueue(n, D, torch.float64)
    queue.enqueue(key, label)
    value = loss.over(x, label, [queues.Keys(queue.features, queue.identities)])
    found.append((value.detach(), torch.autograd.grad(value, x)[0]))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_pairs_are_taken_in_parts(one_thread, monkeypatch):
    """Many more positives than fit at once: the same loss and gradient."""
    x, label = torch.randn(24, D, dtype=torch.float64, requires_grad=True), torch.arange(24) % 2
    queue = full_queue(K, people=2, dtype=torch.float64)
    found = []
    for at_once in (queues.PAIRS_AT_ONCE, 5 * D):
        monkeypatch.setattr(queues, "PAIRS_AT_ONCE", at_once)
        loss = NTXent(queue=queue).eval()(x, label)
        found.append((loss, *torch.autograd.grad(loss, x)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# --- edges -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=lambda loss: f"{type(loss).__name__} {loss.extra_repr()}")
@pytest.mark.parametrize(
    "label", [torch.arange(B), torch.zeros(B, dtype=torch.int64)], ids=["no positive", "no negative"]
)
@pytest.mark.parametrize("memory", [False, True], ids=["batch", "empty queue"])
def test_what_has_no_positive_or_no_negative_gives_no_nan(one_thread, loss, label, memory):
    loss = copy.deepcopy(loss)
    loss.queue = GalleryQueue(K, D) if memory else None
    x = torch.randn(B, D, requires_grad=True)
    found = loss(x, label)
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(x.grad).all()
    if isinstance(loss, Contrastive):  # positives or negatives alone are compared too
        x = F.normalize(x.detach())
        cosines = (x @ x.T)[~torch.eye(B, dtype=torch.bool)]
        alone = 1 - cosines if label[1] == 0 else (cosines - 0.5).relu()
        torch.testing.assert_close(found.detach(), alone.sum() / B)
    elif label[1] == 1 or not isinstance(loss, SupCon):
        assert found == 0
        assert not x.grad.any()
    else:  # the softmax over positives themselves
        assert found > 0


def test_an_empty_queue_has_no_negatives(one_thread):
    x = torch.randn(B, D, requires_grad=True)
    for loss in (MoCo(GalleryQueue(K, D)), DCQ(GalleryQueue(K, D))):
        rest = (torch.arange(B),) if isinstance(loss, DCQ) else ()
        assert loss(x, torch.randn(B, D), *rest) == 0
        assert len(loss.queue) == B


def test_cosines_at_the_ends_neither_overflow_nor_vanish(one_thread):
    """Parallel and opposite keys at the steepest scale: logits 2,000 apart, in float32."""
    x = F.normalize(torch.randn(1, D)).repeat(4, 1) * torch.tensor([1.0, 1, -1, -1])[:, None]
    x.requires_grad_()
    label = torch.tensor([0, 1, 0, 1])  # positives are opposite, negatives parallel, or the reverse
    for identity, expected in ((label, 2000.0), (torch.tensor([0, 0, 1, 1]), 0.0)):
        for loss in (NTXent(1e-3), SupCon(1e-3), SupCon(1e-3, form="inside")):
            found = loss(x, identity)
            assert found.item() == pytest.approx(expected, rel=1e-3, abs=1e-3)
            assert torch.isfinite(torch.autograd.grad(found, x)[0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_queues_and_embeddings_of_half_precision(one_thread, dtype):
    x, label = torch.randn(B, 32), torch.arange(B) % 3
    for loss in LOSSES:
        found = []
        for kind in (torch.float32, dtype):
            torch.manual_seed(5)
            ours = copy.deepcopy(loss)
            ours.queue = full_queue(64, 32, 9, kind)
            leaf = x.to(torch.bfloat16 if kind == torch.float8_e4m3fn else kind).requires_grad_()
            value = ours(leaf, label)
            found.append((value.detach(), torch.autograd.grad(value, leaf)[0].float()))
        (a, ga), (b, gb) = found
        assert (a - b).abs() <= 0.05 * a
        assert (ga - gb).norm() <= 0.15 * ga.norm()


def test_autocast_rounds_as_for_a_linear_layer(one_thread):
    x, label = torch.randn(B, 32, requires_grad=True), torch.arange(B) % 3
    plain = NTXent(queue=full_queue(64, 32, 9)).eval()
    expected = plain(x, label)
    with torch.autocast("cpu", torch.bfloat16):
        found = plain(x, label)
    assert found.dtype == torch.float32
    assert (found - expected).abs() <= 0.02 * expected
    a, b = (torch.autograd.grad(loss, x)[0] for loss in (found, expected))
    assert 0 < (a - b).norm() <= 0.02 * b.norm()


def test_evaluation_leaves_the_queue_alone(one_thread):
    queue = full_queue(K)
    before = copy.deepcopy(queue.state_dict())
    x = torch.randn(B, D)
    MoCo(queue).eval()(x, x)
    DCQ(queue).eval()(x, x, torch.arange(B))
    SupCon(queue=queue).eval()(x, torch.arange(B))
    assert all(torch.equal(before[name], value) for name, value in queue.state_dict().items())


def test_a_memory_resumes_where_it_was(one_thread):
    """Position and fill travel with the state dict."""
    first = CrossBatchMemory(NTXent(), D, K)
    steps = [(torch.randn(B, D), torch.randint(5, (B,))) for _ in range(3)]
    for x, label in steps[:2]:
        first(x, label)
    second = CrossBatchMemory(NTXent(), D, K)
    second.load_state_dict(first.state_dict())
    assert first(*steps[2]) == second(*steps[2])
    assert len(second.queue) == 3 * B


# --- what cannot be -----------------------------------------------------------------------------------------------------------

X, LABEL = torch.randn(B, D), torch.arange(B)
WRONG = {
    "temperature must be a number of at least 0.001, got 0": lambda: NTXent(0),
    "temperature must be a number of at least 0.001, got nan": lambda: SupCon(float("nan")),
    "base_temperature must be a number": lambda: SupCon(0.1, base_temperature=-1.0),
    "form must be one of 'outside', 'inside', got 'both'": lambda: SupCon(form="both"),
    "reduction must be one of 'mean', 'nonzero', 'sum', got 'none'": lambda: NTXent(reduction="none"),
    "threshold must be a cosine": lambda: Contrastive(1.5),
    "m must be a number and gamma one in": lambda: PairCircle(gamma=2000.0),
    "CircleLoss: m must be": lambda: PairCircle(m=-0.1),
    "queue must be a GalleryQueue, got int": lambda: SupCon(queue=4096),
    "queue must be a GalleryQueue, got NoneType": lambda: MoCo(None),
    "margin must be one that does not follow the training": lambda: DCQ(GalleryQueue(K, D), CurricularFace()),
    "margin must be a margin": lambda: DCQ(GalleryQueue(K, D), 0.3),
    "scale must be": lambda: DCQ(GalleryQueue(K, D), scale=0.0),
    "loss must be SupCon, NTXent, PairCircle or Contrastive without a queue, got one with a queue": lambda: (
        CrossBatchMemory(NTXent(queue=GalleryQueue(K, D)), D)
    ),
    "loss must be SupCon, NTXent, PairCircle or Contrastive without a queue, got CrossEntropyLoss": lambda: (
        CrossBatchMemory(nn.CrossEntropyLoss(), D)
    ),
    "embedding_size must be": lambda: CrossBatchMemory(NTXent(), 0),
    "query must have shape": lambda: MoCo(GalleryQueue(K, D))(X[0], X[0]),
    r"key must have shape \[8, 6\] like query, got \[7, 6\]": lambda: MoCo(GalleryQueue(K, D))(X, X[1:]),
    "query_b and key_b must be given together": lambda: MoCo(GalleryQueue(K, D))(X, X, X),
    "query_b and key_b must have shape": lambda: MoCo(GalleryQueue(K, D))(X, X, X[1:], X[1:]),
    "does not fit into a queue of 4 slots": lambda: MoCo(GalleryQueue(4, D))(X, X),
    "identity must be int64, got float32": lambda: DCQ(GalleryQueue(K, D))(X, X, LABEL.float()),
    "identity must be >= 0, got -3": lambda: NTXent()(X, LABEL - 3),
    r"identity must have shape \[8\], got \[7\]": lambda: SupCon()(X, LABEL[1:]),
    "identity must be an int64 tensor unless embedding holds several views": lambda: SupCon()(X),
    "and no queue is used": lambda: SupCon(queue=GalleryQueue(K, D))(X.view(4, 2, D)),
    "key must have shape": lambda: SupCon()(X, LABEL, X[1:]),
    "embedding must be": lambda: NTXent()(X.long(), LABEL),
    "enqueue_mask must be bool": lambda: CrossBatchMemory(NTXent(), D)(X, LABEL, enqueue_mask=LABEL),
    "prototypes must have shape": lambda: CrossBatchMemory(NTXent(), D).eval()(torch.randn(B, 5), LABEL),
    "features must have shape": lambda: CrossBatchMemory(NTXent(), D)(torch.randn(B, 5), LABEL),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()


# --- several processes ---------------------------------------------------------------------------------------------------------


def close(a, b):
    assert (a - b).norm() <= 2e-5 * max(b.norm().item(), 1e-3), (a, b)


def of_ranks(world):
    """Losses of one process with the whole batch, and their calls: with features [W B, D] and labels [W B]."""
    size = 40  # which the batches of all ranks do not divide
    return {
        "MoCo": (lambda: MoCo(GalleryQueue(size, D)), lambda loss, x, key, label: loss(x, key)),
        "DCQ": (lambda: DCQ(GalleryQueue(size, D)), lambda loss, x, key, label: loss(x, key, label)),
        "SupCon": (lambda: SupCon(queue=GalleryQueue(size, D)), lambda loss, x, key, label: loss(x, label)),
        "SupCon inside, keys": (
            lambda: SupCon(form="inside", queue=GalleryQueue(size, D)),
            lambda loss, x, key, label: loss(x, label, key),
        ),
        "NTXent": (lambda: NTXent(), lambda loss, x, key, label: loss(x, label)),
        "NTXent, views": (lambda: NTXent(), lambda loss, x, key, label: loss(x.view(-1, 2, D))),
        "PairCircle": (lambda: PairCircle(0.25, 16.0), lambda loss, x, key, label: loss(x, label)),
        "Contrastive": (lambda: Contrastive(0.2), lambda loss, x, key, label: loss(x, label)),
        "Contrastive, queue": (
            lambda: Contrastive(0.2, queue=GalleryQueue(size, D)), lambda loss, x, key, label: loss(x, label, key),
        ),
        "SupCon, batch": (lambda: SupCon(0.2), lambda loss, x, key, label: loss(x, label)),
        "CrossBatchMemory": (
            lambda: CrossBatchMemory(NTXent(), D, size), lambda loss, x, key, label: loss(x, label),
        ),
    }  # fmt: skip


def check_gathered(rank, world):
    """Values, gradients and queues of W ranks are those of one process with the whole batch."""
    mine = slice(rank * B, (rank + 1) * B)
    for make, call in of_ranks(world).values():
        ours, whole = make(), make()
        for module in whole.modules():
            if hasattr(module, "gather"):
                module.gather = False
        generator = torch.Generator().manual_seed(0)
        for step in range(4):
            x, key = torch.randn(2, world * B, D, generator=generator).unbind()
            label = (torch.randint(9, (world * B,), generator=generator) + step) % 9
            local, leaf = x[mine].clone().requires_grad_(), x.clone().requires_grad_()
            loss, expected = call(ours, local, key[mine], label[mine]), call(whole, leaf, key, label)
            close(distributed.mean(loss), expected.detach())
            close(torch.autograd.grad(loss, local)[0], world * torch.autograd.grad(expected, leaf)[0][mine])
        if ours.queue is not None:
            distributed.assert_same(dict(ours.queue.named_buffers()))
            assert torch.equal(ours.queue.identities, whole.queue.identities)
            close(ours.queue.features, whole.queue.features)


def check_own_queues(rank, world):
    """Without gathering each rank is alone."""
    loss = MoCo(GalleryQueue(K, D), gather=False)
    loss(X + rank, X + rank)
    assert len(loss.queue) == B
    with pytest.raises(RuntimeError, match="features differs"):
        distributed.assert_same({"features": loss.queue.features})


def check_differences_are_named(rank, world):
    x = torch.randn(B, D)
    for make in (
        lambda: NTXent(0.1 + 0.1 * rank),
        lambda: SupCon(queue=GalleryQueue(K + rank, D)),
        lambda: CrossBatchMemory(NTXent(0.1 + 0.1 * rank), D),
        lambda: (SupCon if rank else NTXent)(),
    ):
        with pytest.raises(
            ValueError, match=r"settings must be the same on every rank, got .* on rank 0, .* on rank 1"
        ):
            make()(x, LABEL)
    with pytest.raises(ValueError, match="every rank must bring a batch of the same size"):
        NTXent()(x[rank:], LABEL[rank:])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_equal_one_process(world):
    on_ranks(world, check_gathered, check_own_queues, check_differences_are_named)
