"""Other projects' heads restated plainly, from reading them: all logits in memory, in PyTorch, with their names and shapes.

``head(embedding, label)`` gives the cross-entropy that their training loops take of the logits. Their networks end in unit
vectors; here the head makes them. Used beside ours in tests and benchmarks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_target(cosine: Tensor, label: Tensor) -> Tensor:
    """[N, K] -> [N, 1]."""
    return cosine.gather(1, label[:, None])


def with_target(cosine: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """[N, K] with the target's entries replaced by ``target`` [N, 1]."""
    return cosine.scatter(1, label[:, None], target)


def add_angle(cosine: Tensor, margin: float | Tensor) -> Tensor:
    """cos(theta + margin) as they write it."""
    margin = torch.as_tensor(margin, dtype=cosine.dtype)
    return cosine * margin.cos() - (1 - cosine**2).sqrt() * margin.sin()


class Head(nn.Module):
    """Cosines with unit class weights, a margin (``logits``), cross-entropy."""

    name = "weight"  # of the class weights
    classes_last = True  # they are [dim, classes]

    def __init__(self, classes: int, dim: int, scale: float) -> None:
        super().__init__()
        shape = (dim, classes) if self.classes_last else (classes, dim)
        self.register_parameter(self.name, nn.Parameter(torch.empty(shape)))
        self.scale = scale
        with torch.no_grad():
            self.fill(getattr(self, self.name))

    def fill(self, weight: Tensor) -> None:
        """First values."""
        weight.uniform_(-1, 1).renorm_(2, 1, 1e-5).mul_(1e5)

    def cosine(self, x: Tensor) -> Tensor:
        """[N, K]."""
        weight = getattr(self, self.name)
        return F.normalize(x) @ F.normalize(weight if self.classes_last else weight.T, dim=0)

    def logits(self, cosine: Tensor, x: Tensor, label: Tensor) -> Tensor:
        """[N, K]."""
        raise NotImplementedError

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """The mean loss."""
        return F.cross_entropy(self.logits(self.cosine(x), x, label), label)


class AMSoftmax(Head):
    """FaceX-Zoo's AM_Softmax."""

    def __init__(self, classes: int, dim: int, margin: float = 0.35, scale: float = 32) -> None:
        super().__init__(classes, dim, scale)
        self.margin = margin

    def logits(self, cosine: Tensor, x: Tensor, label: Tensor) -> Tensor:
        return self.scale * with_target(cosine, label, at_target(cosine, label) - self.margin)


class AdamSoftmax(Head):
    """FaceX-Zoo's Adam_Softmax; its second result added."""

    name = "kernel"

    def __init__(self, classes: int, dim: int, scale: float = 30.0, lamda: float = 70.0) -> None:
        super().__init__(classes, dim, scale)
        self.lamda = lamda
        self.adam = nn.Parameter(torch.empty(1, classes).uniform_(0.3, 0.4))

    def logits(self, cosine: Tensor, x: Tensor, label: Tensor) -> Tensor:
        self.adam.data.clamp_(0, 1)
        return self.scale * with_target(cosine, label, at_target(cosine, label) - self.adam[:, label].view(-1, 1))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return super().forward(x, label) + self.lamda * (1 - self.adam.sum() / self.adam.numel())


class UniFace(Head):
    """CVI-SZU/UniFace's Unified_Cross_Entropy_Loss of all classes, without its clamps of logits."""

    classes_last = False

    def __init__(self, classes: int, dim: int, m: float = 0.4, s: float = 64.0, weight: float = 1.0) -> None:
        super().__init__(classes, dim, s)
        self.m, self.negative_weight = m, weight
        self.bias = nn.Parameter(torch.tensor([math.log(classes * 10)]))

    def fill(self, weight: Tensor) -> None:
        nn.init.kaiming_normal_(weight, a=1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        cosine = self.cosine(x)
        near = torch.logaddexp(torch.zeros_like(cosine), self.bias - self.scale * (cosine - self.m))
        far = self.negative_weight * torch.logaddexp(torch.zeros_like(cosine), self.scale * cosine - self.bias)
        hot = F.one_hot(label, cosine.shape[1]).bool()
        return torch.where(hot, near, far).sum(1).mean()


class ArcFace(Head):
    """FaceX-Zoo's: the sine of every class, one rule for angles beyond pi."""

    def __init__(
        self, classes: int, dim: int, margin_arc: float = 0.35, margin_am: float = 0.0, scale: float = 32
    ) -> None:
        super().__init__(classes, dim, scale)
        self.margin_arc, self.margin_am = margin_arc, margin_am

    def logits(self, cosine: Tensor, x: Tensor, label: Tensor) -> Tensor:
        margined = torch.where(
            cosine > math.cos(math.pi - self.margin_arc), add_angle(cosine, self.margin_arc), cosine - self.margin_am
        )
        return self.scale * with_target(cosine, label, at_target(margined, label))


class MagFace(Head):
    """FaceX-Zoo's; the loss with the mean of what it returns beside the logits."""

    def __init__(
        self, classes: int, dim: int, margin_am: float = 0.0, scale: float = 32, l_a: float = 10, u_a: float = 110,
        l_margin: float = 0.45, u_margin: float = 0.8, lamda: float = 20,
    ) -> None:  # fmt: skip
        super().__init__(classes, dim, scale)
        self.margin_am, self.l_a, self.u_a, self.lamda = margin_am, l_a, u_a, lamda
        self.l_margin, self.u_margin = l_margin, u_margin

    def norm(self, x: Tensor) -> Tensor:
        return x.norm(dim=1, keepdim=True).clamp(self.l_a, self.u_a)

    def logits(self, cosine: Tensor, x: Tensor, label: Tensor) -> Tensor:
        slope = (self.u_margin - self.l_margin) / (self.u_a - self.l_a)
        m = self.l_margin + slope * (self.norm(x) - self.l_a)
        a = at_target(cosine, label)
        inside = a * m.cos() - (1 - a**2).sqrt() * m.sin()
        return self.scale * with_target(cosine, label, torch.where(a > (math.pi - m).cos(), inside, a - self.margin_am))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        norm = self.norm(x)
        return super().forward(x, label) + self.lamda * (norm / self.u_a**2 + 1 / norm).mean()


class CircleLoss(Head):
    """FaceX-Zoo's."""

    def __init__(self, classes: int, dim: int, margin: float = 0.25, gamma: float = 256) -> None:
        super().__init__(classes, dim, gamma)
        self.margin = margin

    def logits(self, cosine: Tensor, x: Tensor, label: Tensor) -> Tensor:
        m, held = self.margin, cosine.detach()
        positive = (1 + m - held).clamp_min(0) * (cosine - (1 - m))
        negative = (held + m).clamp_min(0) * (cosine - m)
        return self.scale * with_target(negative, label, at_target(positive, label))


class CurricularFace(Head):
    """FaceX-Zoo's (and its author's)."""

    name = "kernel"

    def __init__(self, classes: int, dim: int, m: float = 0.5, s: float = 64.0) -> None:
        super().__init__(classes, dim, s)
        self.m = m
        self.register_buffer("t", torch.zeros(1))

    def fill(self, weight: Tensor) -> None:
        weight.normal_(std=0.01)

    def logits(self, cosine: Tensor, x: Tensor, label: Tensor) -> Tensor:
        a = at_target(cosine, label)
        inside = add_angle(a, self.m)
        final = torch.where(a > math.cos(math.pi - self.m), inside, a - math.sin(math.pi - self.m) * self.m)
        self.t = 0.01 * a.detach().mean() + 0.99 * self.t
        return self.scale * with_target(torch.where(cosine > inside, cosine * (self.t + cosine), cosine), label, final)


class MVSoftmax(Head):
    """FaceX-Zoo's MV_Softmax."""

    def __init__(
        self, classes: int, dim: int, is_am: bool, margin: float = 0.35, mv_weight: float = 1.12, scale: float = 32
    ) -> None:
        super().__init__(classes, dim, scale)
        self.is_am, self.margin, self.mv_weight = is_am, margin, mv_weight

    def logits(self, cosine: Tensor, x: Tensor, label: Tensor) -> Tensor:
        a = at_target(cosine, label)
        inside = a - self.margin if self.is_am else add_angle(a, self.margin)
        final = torch.where(a > (self.margin if self.is_am else 0.0), inside, a)
        hard = self.mv_weight * cosine + self.mv_weight - 1
        return self.scale * with_target(torch.where(cosine > inside, hard, cosine), label, final)


class NPCFace(Head):
    """FaceX-Zoo's."""

    name = "kernel"

    def __init__(self, classes: int, dim: int, margin: float = 0.5, scale: float = 64) -> None:
        super().__init__(classes, dim, scale)
        self.margin = margin

    def logits(self, cosine: Tensor, x: Tensor, label: Tensor) -> Tensor:
        a = at_target(cosine, label)
        limit = add_angle(a, self.margin)
        with torch.no_grad():
            hard = with_target(cosine > limit, label, torch.zeros_like(label, dtype=torch.bool)[:, None])
            mean = (cosine * hard).sum(1, keepdim=True) / hard.sum(1, keepdim=True).clamp_min(1)
            m = 0.4 + 0.2 * mean
        final = torch.where(a > 0, a * m.cos() - (1 - a**2).sqrt() * m.sin(), a)
        return self.scale * with_target(torch.where(cosine > limit, 1.1 * cosine + 0.2, cosine), label, final)


class AdaCos(Head):
    """FaceX-Zoo's."""

    name, classes_last = "W", False

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__(classes, dim, math.sqrt(2) * math.log(classes - 1))

    def fill(self, weight: Tensor) -> None:
        nn.init.xavier_uniform_(weight)

    def logits(self, cosine: Tensor, x: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad():
            others = with_target((self.scale * cosine).exp(), label, torch.zeros_like(at_target(cosine, label)))
            angle = at_target(cosine, label).acos().median().clamp_max(math.pi / 4)
            self.scale = ((others.sum() / len(x)).log() / angle.cos()).item()
        return self.scale * cosine


class AdaFace(Head):
    """Its authors' head.py, of embeddings before their normalisation."""

    name = "kernel"

    def __init__(
        self, classes: int, dim: int, m: float = 0.4, h: float = 0.333, s: float = 64.0, t_alpha: float = 1.0
    ) -> None:
        super().__init__(classes, dim, s)
        self.m, self.h, self.t_alpha = m, h, t_alpha
        for name, value in (("t", 0.0), ("batch_mean", 20.0), ("batch_std", 100.0)):
            self.register_buffer(name, torch.full((1,), value))

    def logits(self, cosine: Tensor, x: Tensor, label: Tensor) -> Tensor:
        held = cosine.clamp(-1 + 1e-3, 1 - 1e-3)
        norm = x.detach().norm(dim=1, keepdim=True).clamp(1e-3, 100)
        self.batch_mean = self.t_alpha * norm.mean() + (1 - self.t_alpha) * self.batch_mean
        self.batch_std = self.t_alpha * norm.std() + (1 - self.t_alpha) * self.batch_std
        q = (self.h * (norm - self.batch_mean) / (self.batch_std + 1e-3)).clamp(-1, 1)
        theta = held.acos()
        moved = with_target(theta, label, at_target(theta, label) - self.m * q)
        margined = moved.clamp(1e-3, math.pi - 1e-3).cos()
        return self.scale * with_target(margined, label, at_target(margined, label) - (self.m + self.m * q))


class PartialFC(Head):
    """insightface's CombinedMarginLoss within its partial FC, on one process with all classes."""

    classes_last = False

    def __init__(
        self, classes: int, dim: int, s: float = 64.0, m1: float = 1.0, m2: float = 0.5, m3: float = 0.0,
        interclass_filtering_threshold: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(classes, dim, s)
        self.m1, self.m2, self.m3, self.threshold = m1, m2, m3, interclass_filtering_threshold

    def fill(self, weight: Tensor) -> None:
        weight.normal_(std=0.01)

    def logits(self, cosine: Tensor, x: Tensor, label: Tensor) -> Tensor:
        cosine = cosine.clamp(-1, 1)
        if self.threshold > 0:
            kept = with_target(cosine <= self.threshold, label, torch.ones_like(label, dtype=torch.bool)[:, None])
            cosine = cosine * kept
        if self.m1 == 1 and self.m3 == 0:
            with torch.no_grad():
                theta = cosine.acos()
                change = with_target(theta, label, at_target(theta, label) + self.m2).cos() - cosine
            return self.scale * (cosine + change)
        return self.scale * with_target(cosine, label, at_target(cosine, label) - self.m3)


class SSTPrototype(nn.Module):
    """FaceX-Zoo's SST_Prototype: the mean of both directions' cross-entropies. The caller says whose feature is kept."""

    def __init__(self, dim: int, size: int, scale: float, loss_type: str, margin: float) -> None:
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.rand(dim, size).uniform_(-1, 1), dim=0))
        self.scale, self.loss_type, self.margin = scale, loss_type, margin
        self.index, self.label_list = 0, [-1] * size

    def forward(self, p1: Tensor, g2: Tensor, p2: Tensor, g1: Tensor, ids: Tensor, first: bool) -> Tensor:
        count = len(ids)
        label = torch.arange(count, device=ids.device) + self.index
        loss = p1.new_zeros(())
        for probe, gallery in ((p1, g2), (p2, g1)):
            queue = self.queue.clone()
            queue[:, self.index : self.index + count] = F.normalize(gallery.detach()).T
            cosine = (F.normalize(probe) @ queue).clamp(-1, 1)
            a = at_target(cosine, label)
            if self.loss_type == "am_softmax":
                cosine = with_target(cosine, label, a - self.margin)
            elif self.loss_type == "arc_softmax":
                cosine = with_target(cosine, label, add_angle(a, self.margin))
            loss = loss + 0.5 * F.cross_entropy(self.scale * cosine, label)
        self.queue[:, self.index : self.index + count] = F.normalize((g1 if first else g2).detach()).T
        self.label_list[self.index : self.index + count] = ids.tolist()
        self.index = (self.index + count) % self.queue.shape[1]
        return loss
