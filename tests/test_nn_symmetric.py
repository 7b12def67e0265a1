"""CLIP's and SigLIP's losses: beside plain restatements over free steps, over ranks, without a matrix of logits."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from runs import on_ranks
from test_nn_queues import Largest
from torch import nn

from bench import queue_peers as peers
from sst_fast import distributed
from sst_fast.nn import CLIPLoss, SigLIPLoss, blocks, symmetric

N, D = 9, 6
TOGETHER = {torch.float64: 1e-10, torch.float32: 1e-4}


class Towers(nn.Module):
    """Two small networks, a logit scale and a logit bias, as open_clip's models hold them."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(2)
        self.image, self.text = (nn.Linear(10, D, dtype=dtype) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0), dtype=dtype))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0, dtype=dtype))

    def forward(self, x, y):
        return {
            "image_features": F.normalize(self.image(x)),
            "text_features": F.normalize(self.text(y)),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


def clip(image_features, text_features, logit_scale, logit_bias, output_dict):
    return {"contrastive_loss": peers.clip(image_features, text_features, logit_scale) + 0 * logit_bias}


def siglip(image_features, text_features, logit_scale, logit_bias, output_dict):
    return {"contrastive_loss": peers.siglip(image_features, text_features, logit_scale, logit_bias)}


def batches(dtype, steps=50, size=N):
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        x = torch.randn(size, 10, generator=generator, dtype=torch.float64)
        yield x.to(dtype), (x.flip(1) + torch.randn(x.shape, generator=generator, dtype=torch.float64)).to(dtype)


def train(loss, dtype):
    """Losses and parameters of 50 free SGD steps, called as open_clip's training loop does."""
    model = Towers(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    found = []
    for x, y in batches(dtype):
        value = loss(**model(x, y), output_dict=True)["contrastive_loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.detach())
    return torch.cat([torch.stack(found), *(p.detach().flatten() for p in model.parameters())])


@pytest.mark.parametrize("dtype", TOGETHER, ids=str)
@pytest.mark.parametrize(
    ("at_once", "kept"), [(2**20, 2**20), (4 * N, 2**20), (5, 0)], ids=["one block", "blocks kept", "a block a row"]
)
@pytest.mark.parametrize(("ours", "theirs"), [(CLIPLoss(), clip), (SigLIPLoss(), siglip)], ids=["CLIP", "SigLIP"])
def test_free_steps_stay_together(one_thread, ours, theirs, dtype, at_once, kept, monkeypatch):
    monkeypatch.setitem(blocks.AT_ONCE, "cpu", at_once)
    monkeypatch.setattr(symmetric, "KEPT", kept)
    a, b = train(ours, dtype), train(theirs, dtype)
    start = torch.cat([p.detach().flatten() for p in Towers(dtype).parameters()])
    assert ((b[50:] - start).abs() > 1e-3).float().mean() > 0.9
    assert (a - b).abs().max() <= TOGETHER[dtype] * b.abs().max()


def test_parameters_of_the_loss_itself(one_thread):
    """logit_scale is a logarithm, as in open_clip's models."""
    x, y = torch.randn(2, N, D).unbind()
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (1.5, -3.0))
    for ours, expected, leaves in (
        (CLIPLoss(1.5), peers.clip(F.normalize(x), F.normalize(y), scale.exp()), [scale]),
        (SigLIPLoss(1.5, -3.0), peers.siglip(F.normalize(x), F.normalize(y), scale.exp(), bias), [scale, bias]),
    ):
        found = ours(x, y)
        torch.testing.assert_close(found, expected)
        gradients = torch.autograd.grad(found, list(ours.parameters()))
        for a, b in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_sigmoid_gradients_by_differences(one_thread):
    x, y = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (4.0, -1.0))
    assert torch.autograd.gradcheck(SigLIPLoss(), (x, y, scale, bias))
    assert torch.autograd.gradcheck(CLIPLoss(), (x, y, scale))


def test_no_matrix_of_logits(one_thread, monkeypatch):
    n = 512
    monkeypatch.setitem(blocks.AT_ONCE, "cpu", 8 * n)
    monkeypatch.setattr(symmetric, "KEPT", n * n - 1)
    for loss in (CLIPLoss(2.0), SigLIPLoss(2.0, -1.0)):
        x, y = (torch.randn(n, D, requires_grad=True) for _ in range(2))
        with Largest() as seen:
            loss(x, y).backward()
        assert seen.numel <= 8 * n  # of 512 x 512


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(one_thread, dtype, autocast):
    for loss in (CLIPLoss(2.0), SigLIPLoss(2.0, -1.0)):
        x, y = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)).unbind()
        y = x + y
        found = []
        for half in (False, True):
            leaf = x.to(dtype) if half and not autocast else x
            leaf = leaf.clone().requires_grad_()
            with torch.autocast("cpu", dtype, enabled=half and autocast):
                value = loss(leaf, y.to(leaf.dtype))
            assert value.dtype == torch.float32
            found.append([value.detach(), *(g.float() for g in torch.autograd.grad(value, [leaf, *loss.parameters()]))])
        for a, b in zip(*found, strict=True):
            assert (a - b).norm() <= 0.03 * a.norm()


def test_scale_and_bias_far_out_stay_finite(one_thread):
    x = F.normalize(torch.randn(4, D)).requires_grad_()
    for loss in (CLIPLoss()(x, -x, 1000.0), SigLIPLoss()(x, -x, 1000.0, torch.tensor([-50.0]))):
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


X = torch.randn(N, D)
WRONG = {
    "init_logit_scale must be a number or None, got 'log'": lambda: CLIPLoss("log"),
    "gather must be True, False or 'ring', got 'all'": lambda: CLIPLoss(gather="all"),
    "init_logit_bias must be a number or None, got 'b'": lambda: SigLIPLoss(2.0, "b"),
    "logit_scale must be given unless init_logit_scale was": lambda: CLIPLoss()(X, X),
    "logit_bias must be given unless init_logit_bias was": lambda: SigLIPLoss(2.0)(X, X),
    r"logit_scale must be one number, got \[9\]": lambda: CLIPLoss()(X, X, torch.ones(N)),
    r"logit_bias must be one number, got \[9\]": lambda: SigLIPLoss()(X, X, 1.0, torch.ones(N)),
    "scale must be > 0 and at most 1000": lambda: CLIPLoss()(X, X, torch.tensor(2000.0)),
    "scale must be a finite number > 0, got 0.0": lambda: SigLIPLoss()(X, X, 0.0, -1.0),
    r"text_features must be torch.float32 \[9, 6\] like image_features": lambda: CLIPLoss(1.0)(X, X[1:]),
    "text_features must be float64": lambda: SigLIPLoss(1.0, 1.0)(X, X.long()),
    r"image_features must have shape \[any, any\]": lambda: CLIPLoss(1.0)(X[0], X[0]),
    "image_features must have at least one row": lambda: SigLIPLoss(1.0, 1.0)(X[:0], X[:0]),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()


def test_no_second_derivative_instead_of_a_wrong_one(one_thread):
    x = X.clone().requires_grad_()
    for loss in (CLIPLoss(1.0), SigLIPLoss(1.0, -1.0)):
        with pytest.raises((RuntimeError, NotImplementedError), match="no second derivative"):
            torch.autograd.grad(torch.autograd.grad(loss(x, X), x, create_graph=True)[0].sum(), x)


def test_features_beyond_the_square_root_of_the_largest_number(one_thread):
    """Normalised without overflow, as everywhere; a zero row has cosine 0 and gradient 0."""
    x = torch.randn(4, D)
    big = (x * torch.tensor([1e30, 1.0, 1e-30, 0.0])[:, None]).requires_grad_()
    for loss in (CLIPLoss(2.0), SigLIPLoss(2.0, -1.0)):
        found = loss(big, x)
        gradient = torch.autograd.grad(found, big)[0]
        unit = F.normalize(torch.cat([x[:2], 0 * x[2:]]), dim=1)
        torch.testing.assert_close(found, loss(unit, x))
        assert torch.isfinite(gradient).all()
        assert not gradient[2:].any()
        assert gradient[:2].any(1).all()


# --- several processes ---------------------------------------------------------------------------------------------------


def check_gathered(rank, world):
    """Values and gradients of W ranks are those of one process with the whole batch, whatever factor a rank gives its loss."""
    mine, factor = slice(rank * N, (rank + 1) * N), 1.0 + rank
    x, y = next(batches(torch.float32, 1, world * N))
    losses = [(CLIPLoss, peers.clip), (SigLIPLoss, peers.siglip)]
    for (make, plain), gather, kept in itertools.product(losses, (True, "ring"), (0, symmetric.KEPT)):
        symmetric.KEPT, blocks.AT_ONCE["cpu"] = kept, 4 * N  # in this process alone
        s, b = (torch.tensor(v, requires_grad=True) for v in (7.0, -2.0))
        more = (s, b) if make is SigLIPLoss else (s,)
        local = [t[mine].clone().requires_grad_() for t in (x, y)]
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        unit = [F.normalize(t) for t in leaves]
        loss = make(gather=gather)(*local, *more)
        torch.testing.assert_close(distributed.mean(loss), plain(*unit, *more).detach(), rtol=1e-5, atol=1e-6)
        # Every rank's share of the whole, written out, times its own factor.
        shares = []
        for r in range(world):
            logits = s * unit[0] @ unit[1].T
            rows, target = slice(r * N, (r + 1) * N), torch.arange(r * N, (r + 1) * N)
            if make is CLIPLoss:
                part = (F.cross_entropy(logits[rows], target) + F.cross_entropy(logits.T[rows], target)) / 2
            else:
                labels = 2 * torch.eye(world * N)[rows] - 1
                part = -F.logsigmoid(labels * (logits[rows] + b)).sum() / N
            shares.append((1.0 + r) * part)
        found = torch.autograd.grad(factor * loss, [*local, *more])
        expected = torch.autograd.grad(sum(shares), [*leaves, *more])
        for a, e in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(a, e[mine], rtol=1e-4, atol=1e-6)
        for a, e in zip(found[2:], expected[2:], strict=True):
            torch.testing.assert_close(distributed.sum_of(a), e, rtol=1e-4, atol=1e-6)


def check_training(rank, world):
    """Steps under DistributedDataParallel end where one process with the whole batch ends."""
    for loss in (CLIPLoss(), CLIPLoss(gather="ring"), SigLIPLoss(), SigLIPLoss(gather=True)):
        model, alone = Towers(torch.float32), Towers(torch.float32)
        wrapped = nn.parallel.DistributedDataParallel(model)
        single = type(loss)(gather=False)
        for x, y in batches(torch.float32, 3, world * N):
            for network, own, take in ((wrapped, loss, slice(rank * N, (rank + 1) * N)), (alone, single, slice(None))):
                network.zero_grad()
                own(**network(x[take], y[take])).backward()
                with torch.no_grad():
                    for p in network.parameters():
                        if p.grad is not None:
                            p -= 0.1 * p.grad
        for a, b in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def check_differences_are_named(rank, world):
    for make in (
        lambda: SigLIPLoss(1.0, -1.0 - rank),
        lambda: (CLIPLoss, SigLIPLoss)[rank > 0](1.0),
        lambda: CLIPLoss(gather=(True, "ring")[rank > 0]),
    ):
        loss = make()
        with pytest.raises(ValueError, match=r"settings must be the same on every rank, got .*Loss"):
            loss(X, X, 1.0, 1.0)
    with pytest.raises(ValueError, match="every rank must bring a batch of the same size"):
        SigLIPLoss(1.0, 1.0)(X[rank:], X[rank:])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_equal_one_process(world):
    on_ranks(world, check_gathered, check_training, check_differences_are_named)
