"""Other projects' losses over queues and pairs restated plainly, from reading them: all logits in memory, in PyTorch.

Used beside ours in tests and benchmarks. pytorch-metric-learning's are used themselves, where it is installed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Queue(nn.Module):
    """MoCo's and DCQ's ring of columns; its position; the batch must divide it."""

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("queue", F.normalize(torch.randn(dim, size, dtype=dtype), dim=0))
        self.register_buffer("labels", torch.full((size,), -1))
        self.at = 0

    def enqueue(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Over the oldest."""
        place = slice(self.at, self.at + len(keys))
        self.queue[:, place] = keys.T
        if labels is not None:
            self.labels[place] = labels
        self.at = (self.at + len(keys)) % self.queue.shape[1]


class MoCo(Queue):
    """facebookresearch/moco's logits and cross-entropy; ``symmetric`` as its CIFAR notebook."""

    def __init__(
        self, size: int, dim: int, dtype: torch.dtype = torch.float32, temperature: float = 0.07, margin: float = 0.0
    ) -> None:
        super().__init__(size, dim, dtype)
        self.temperature, self.margin = temperature, margin

    def direction(self, query: Tensor, key: Tensor, label: Tensor | None = None) -> Tensor:
        """One of both."""
        positive = torch.einsum("nc,nc->n", query, key)[:, None] - self.margin
        negative = torch.einsum("nc,ck->nk", query, self.queue.clone().detach())
        if label is not None:
            negative = negative - 1e9 * (label[:, None] == self.labels[None, :])
        logits = torch.cat([positive, negative], 1) / self.temperature
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Of network outputs."""
        query, key = F.normalize(query), F.normalize(key).detach()
        loss = self.direction(query, key)
        self.enqueue(key)
        return loss

    def symmetric(self, query: Tensor, key: Tensor, query_b: Tensor, key_b: Tensor) -> Tensor:
        """Both directions summed, both keys enqueued."""
        key, key_b = F.normalize(key).detach(), F.normalize(key_b).detach()
        loss = self.direction(F.normalize(query), key) + self.direction(F.normalize(query_b), key_b)
        self.enqueue(torch.cat([key_b, key]))
        return loss


class DCQ(MoCo):
    """bilylee/DCQ (PaddlePaddle): a margin, and slots of the same label masked."""

    def __init__(
        self, size: int, dim: int, dtype: torch.dtype = torch.float32, margin: float = 0.3, scale: float = 50.0
    ) -> None:
        super().__init__(size, dim, dtype, 1 / scale, margin)

    def forward(self, query: Tensor, key: Tensor, label: Tensor) -> Tensor:
        """Of network outputs."""
        key = F.normalize(key).detach()
        loss = self.direction(F.normalize(query), key, label)
        self.enqueue(key, label)
        return loss


def sup_con(
    features: Tensor, labels: Tensor | None, temperature: float = 0.07, base_temperature: float = 0.07
) -> Tensor:
    """HobbitLong/SupContrast's SupConLoss of unit features [B, V, D]."""
    batch, views = features.shape[:2]
    labels = torch.arange(batch, device=features.device) if labels is None else labels
    every = torch.cat(torch.unbind(features, dim=1))
    logits = every @ every.T / temperature
    logits = logits - logits.max(1, keepdim=True)[0].detach()
    others = 1 - torch.eye(batch * views, dtype=logits.dtype, device=logits.device)
    same = (labels[:, None] == labels[None, :]).to(logits.dtype).repeat(views, views) * others
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -(temperature / base_temperature) * ((same * log_prob).sum(1) / same.sum(1)).mean()


def masks(label: Tensor, key_label: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positives and negatives [N, K]; ``own`` [N] are the probes' own keys; empty keys have the label -1."""
    same = label[:, None] == key_label[None, :]
    other = ~same & (key_label >= 0)[None, :]
    return (same if own is None else same.scatter(1, own[:, None], False)), other


def sup_con_over(
    x: Tensor,
    label: Tensor,
    keys: Tensor,
    key_label: Tensor,
    own: Tensor | None,
    temperature: float,
    inside: bool = False,
) -> Tensor:
    """Khosla et al., eqs. 2 and 3, over any keys; the mean over probes with a positive."""
    same, other = masks(label, key_label, own)
    logits = F.normalize(x) @ keys.T / temperature
    every = logits.masked_fill(~(same | other), -torch.inf).logsumexp(1, keepdim=True)
    count, log_prob = same.sum(1).to(logits.dtype), logits - every
    if inside:
        each = -(log_prob.masked_fill(~same, -torch.inf).logsumexp(1) - count.log())
    else:
        each = -log_prob.masked_fill(~same, 0).sum(1) / count
    return each[count > 0].mean()


def nt_xent_over(
    x: Tensor, label: Tensor, keys: Tensor, key_label: Tensor, own: Tensor | None, temperature: float
) -> Tensor:
    """A softmax for each pair, the probe's other positives left out; the mean over pairs."""
    same, other = masks(label, key_label, own)
    logits = F.normalize(x) @ keys.T / temperature
    negatives = logits.masked_fill(~other, -torch.inf).logsumexp(1, keepdim=True)
    return (torch.logaddexp(logits, negatives) - logits)[same].mean()


def circle_over(
    x: Tensor, label: Tensor, keys: Tensor, key_label: Tensor, own: Tensor | None, m: float, gamma: float
) -> Tensor:
    """Sun et al.'s pair form; the mean over probes with a positive and a negative."""
    same, other = masks(label, key_label, own)
    c = F.normalize(x) @ keys.T
    p = (-gamma * (1 + m - c.detach()).relu() * (c - (1 - m))).masked_fill(~same, -torch.inf).logsumexp(1)
    n = (gamma * (c.detach() + m).relu() * (c - m)).masked_fill(~other, -torch.inf).logsumexp(1)
    counts = same.any(1) & other.any(1)
    return F.softplus((p + n)[counts], threshold=80.0).mean()


def contrastive_over(
    x: Tensor, label: Tensor, keys: Tensor, key_label: Tensor, own: Tensor | None, threshold: float
) -> Tensor:
    """The cross-batch memory paper's: positives are drawn near, negatives beyond the threshold away; the mean over probes."""
    same, other = masks(label, key_label, own)
    c = F.normalize(x) @ keys.T
    return ((1 - c)[same].sum() + (c - threshold).relu()[other].sum()) / len(x)


def clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """open_clip's ClipLoss on one process, of unit features."""
    logits = logit_scale * image @ text.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logit_scale * text @ image.T, target)) / 2


def siglip(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """open_clip's SigLipLoss on one process, of unit features."""
    logits = logit_scale * image @ text.T + logit_bias
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(logits)
