"""Heads: beside the peers' own or restated ones, weight for weight over free steps; conversion, logits, names of bad input."""

import copy
import dataclasses
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sst_fast
from bench import peers
from sst_fast import margins
from sst_fast.nn import convert, heads
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


def facex(name, peer, *args, **rest):
    return Pair(getattr(peers, peer)(C, D, *args), getattr(facex_zoo, name)(D, C, *args), "facex-zoo", **rest)


def metric_learning(name, *args, **rest):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    make = getattr(pytorch_metric_learning, name)
    return Pair(getattr(losses, name)(C, D, *args), make(C, D, *args), "pytorch-metric-learning", **rest)


def partial_fc(*args, **rest):
    ours = insightface.PartialFC_V2(insightface.CombinedMarginLoss(*args), D, C)
    return Pair(peers.PartialFC(C, D, *args), ours, "insightface", **rest)


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
    "FaceX-Zoo AdaCos": lambda: facex("AdaCos", "AdaCos"),
    "insightface arc": lambda: partial_fc(64.0, 1.0, 0.5, 0.0, lr=0.001),
    "insightface cos": lambda: partial_fc(64.0, 1.0, 0.0, 0.4, lr=0.001),
    "insightface cos, filtered": lambda: partial_fc(64.0, 1.0, 0.0, 0.4, 0.3, lr=0.001),
    "AdaFace": lambda: Pair(peers.AdaFace(C, D), adaface.AdaFace(D, C), "adaface", size=20.0),
    "AdaFace, t_alpha": lambda: Pair(
        peers.AdaFace(C, D, t_alpha=0.1), adaface.AdaFace(D, C, t_alpha=0.1), "adaface", size=20.0
    ),
    "pytorch-metric-learning ArcFaceLoss": lambda: metric_learning("ArcFaceLoss"),
    "pytorch-metric-learning CosFaceLoss": lambda: metric_learning("CosFaceLoss"),
    "pytorch-metric-learning SphereFaceLoss": lambda: metric_learning("SphereFaceLoss"),
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
    torch.manual_seed(1)
    pair = PAIRS[name]()
    theirs, ours = pair.theirs.to(dtype), pair.ours.to(dtype)
    ours.load_state_dict(convert(theirs.state_dict(), pair.source))
    networks = [nn.Linear(12, D, dtype=dtype)]
    networks.append(copy.deepcopy(networks[0]))
    found = []
    for head, network in zip((theirs, ours), networks, strict=True):
        optimizer = torch.optim.SGD([*head.parameters(), *network.parameters()], pair.lr, momentum=0.9, weight_decay=5e-4)
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
