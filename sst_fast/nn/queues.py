"""Losses over a queue of keys, or over the batch itself. Other projects compute them with an N x K matrix of logits.

A *probe* is an embedding that is compared with *keys*. Its *positives* are the keys of its own identity. :class:`MoCo` and :class:`DCQ`
have one positive for each probe, given by a second network. :class:`SupCon`, :class:`NTXent`, :class:`PairCircle` and
:class:`Contrastive` have any number of positives, in the batch, in a queue or in both. :class:`CrossBatchMemory` uses one of these
four over a memory of the last embeddings.

Where keys are the batch alone, on the CPU, the cosines are made a block of probes at a time, and with them the block's share of the
loss and of both gradients (:func:`sst_fast.nn.blocks.sum_over_blocks`).

Over a queue, several positives need no kernel of their own. The log-sum-exp over a probe's keys is one call of
:func:`sst_fast.functional.margin_softmax`, one sweep over the queue (:func:`log_sum_exp`). Positives are few. They are found by their
identities, and their cosines are computed pair by pair. No N x K numbers are written to memory, but two smaller things: the rows of
the M keys whose identity occurs among the probes, [M, D], and one number for each pair of a probe and a positive.

With several processes (W ranks of a process group) every rank's keys enter every rank's queue. A batch's keys are compared with every
rank's probes, with exact gradients. Every rank must bring the same N. The value is a mean over the rank's own probes. The mean of
these values over ranks is the mean over all probes, and DistributedDataParallel averages the gradients in the same way.

Sizes: N probes, K keys, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sst_fast import distributed, functional
from sst_fast.arguments import (
    check_count,
    check_embedding,
    check_margin,
    check_scale,
    check_tensor,
    check_word,
    is_number,
    wide_dtype,
)
from sst_fast.loss import RunningMargin
from sst_fast.margins import MAX_SCALE, AMSoftmax, CircleLoss, Margin, Softmax
from sst_fast.nn.blocks import COLUMNS, sum_over_blocks, unit_rows
from sst_fast.nn.ranks import OverRanks
from sst_fast.queue import GalleryQueue
from sst_fast.reference import normalize, taken, window_slots

Form = Literal["outside", "inside"]
PairReduction = Literal["mean", "nonzero", "sum"]

PAIRS_AT_ONCE = 2**22  # numbers of gathered rows in memory at once, while cosines of pairs are computed


class Keys(NamedTuple):
    """What probes are compared with.

    Attributes:
        rows: [K, D], of norm 1; with a gradient where they are a batch.
        identity: int64 [K]; -1 marks an empty slot.
        own: int64 [N]: the number of the key that is the probe itself, which the probe is not compared with. None: there is none.
        batch: the keys are those of the batch: few, and none of them empty.
    """

    rows: Tensor
    identity: Tensor
    own: Tensor | None = None
    batch: bool = False


def log_sum_exp(
    embedding: Tensor, keys: Keys, scale: float, *, margin: Margin = Softmax(), lowest: float = -1.0,
    identity: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """log of the sum of exp(scale phi(c)) over a probe's keys, [N], in one sweep; -inf where it has no key.

    The operator gives log(1 + sum of exp(z - t)) for a target with logit t, from which the sum of exp(z) follows. As the target we
    give it a row along the probe itself, with cosine ``lowest``. A cosine's gradient has no part along the probe, so this target adds
    none. Its logit is not above any other, so no term of the sum is lost to underflow.

    Args:
        embedding: probes [N, D], normalised inside; with gradient, as are keys of a batch.
        keys: the keys that are summed over.
        scale: inverse temperature.
        margin: whose phi is taken.
        lowest: a cosine at which the margin's psi is the least value of phi.
        identity: int64 [N]: keys of the probe's own identity are left out; None: none is.
        backend: as in :func:`sst_fast.functional.margin_softmax`.
    """
    kind = embedding.device.type
    if torch.is_autocast_enabled(kind) and embedding.dtype == torch.float32:
        embedding = normalize(embedding).to(
            torch.get_autocast_dtype(kind)
        )  # as the operator would: what is along it must be so
    along = lowest * normalize(embedding.detach().to(wide_dtype(embedding)))
    excess, seen = functional.margin_softmax(
        embedding, keys.rows, keys.own, positive=along, margin=margin, scale=scale, reduction="none", identity=identity,
        slot_identity=keys.identity, return_statistics=True, backend=backend,
    )  # fmt: skip
    nothing = excess <= 0
    excess = excess.masked_fill(nothing, 1.0)
    total = excess + (-torch.expm1(-excess)).log() + scale * margin.psi(seen.target_cosine)
    return total.masked_fill(nothing, -torch.inf)


class Positives:
    """The keys whose identity occurs among the probes: their rows [M, D], and which of them are positives of which probe.

    Args:
        identity: int64 [N], of the probes.
        keys: where positives are looked for. No probe is its own positive.
    """

    def __init__(self, identity: Tensor, keys: Keys) -> None:
        found = torch.isin(keys.identity, identity).nonzero().flatten()
        self.slots = found[keys.identity[found].argsort(stable=True)]
        rows = taken(keys.rows, self.slots)
        self.rows = rows.to(wide_dtype(rows))  # a copy: the queue changes
        self.held = keys.identity[self.slots]
        self.identity, self.keys = identity, keys
        self.first = torch.searchsorted(self.held, identity)
        self.count = torch.searchsorted(self.held, identity, right=True) - self.first
        if keys.own is not None:
            self.count = self.count - 1

    def sums(self, unit: Tensor) -> Tensor:
        """Sum of each unit probe's cosines with its positives, [N], with gradient: its product with the sum of their rows."""
        names, which = torch.unique(self.identity, return_inverse=True)
        rows = self.rows.to(unit.dtype)
        total = rows.new_zeros(len(names), rows.shape[1]).index_add(0, torch.searchsorted(names, self.held), rows)[
            which
        ]
        if self.keys.own is not None:
            total = total - self.keys.rows[self.keys.own].to(unit.dtype)
        return (unit * total).sum(1)

    def cosines(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine of each of the P pairs of a probe and a positive, [P], with gradient, and its probe's number, int64 [P]."""
        count = self.count if self.keys.own is None else self.count + 1
        probe, place = _pairs(count)
        key = self.first[probe] + place
        if self.keys.own is not None:
            other = self.slots[key] != self.keys.own[probe]
            probe, key = probe[other], key[other]
        cosine: Tensor = _PairCosines.apply(unit, self.rows.to(unit.dtype), probe, key)
        return cosine, probe


class _PairCosines(torch.autograd.Function):
    """Products of rows ``probe`` [P] of x and rows ``key`` [P] of w, in parts, so that no [P, D] is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, probe: Tensor, key: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, probe, key)
        cosine = x.new_empty(len(probe))
        for part in _parts(len(probe), x.shape[1]):
            cosine[part] = (x[probe[part]] * w[key[part]]).sum(1)
        return cosine

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, w, probe, key = ctx.saved_tensors
        for_x, for_w = torch.zeros_like(x), torch.zeros_like(w) if ctx.needs_input_grad[1] else None
        for part in _parts(len(probe), x.shape[1]):
            i, j, g = probe[part], key[part], grad[part, None]
            for_x.index_add_(0, i, g * w[j])
            if for_w is not None:
                for_w.index_add_(0, j, g * x[i])
        return for_x, for_w, None, None


def _parts(pairs: int, features: int) -> list[slice]:
    step = max(1, PAIRS_AT_ONCE // features)
    return [slice(begin, begin + step) for begin in range(0, pairs, step)]


def _pairs(count: Tensor) -> tuple[Tensor, Tensor]:
    """Of all P pairs, where probe i has ``count[i]``: the probe's number and the pair's number in its probe, int64 [P] both."""
    probe = torch.arange(len(count), device=count.device).repeat_interleave(count)
    return probe, torch.arange(len(probe), device=count.device) - (count.cumsum(0) - count)[probe]


class _LogSumExp(torch.autograd.Function):
    """log of the sum of exp over each row of z [N, K] without the entries (``row``, ``column``) [P]; -inf with gradient 0 if none is left.

    The exponentials are kept for backward. PyTorch's own logsumexp computes them twice.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, row: Tensor, column: Tensor) -> Tensor:
        z = z.index_put((row, column), z.new_tensor(-torch.inf))
        top = z.amax(1, keepdim=True)
        nothing = top == -torch.inf
        total = z.sub_(top.masked_fill_(nothing, 0)).exp_().sum(1, keepdim=True)
        ctx.save_for_backward(z, total.reciprocal().masked_fill_(nothing, 0))
        found: Tensor = (top + total.log()).squeeze(1)  # log 0 = -inf where there is nothing
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z, inverse = ctx.saved_tensors
        return z * (grad[:, None] * inverse), None, None


def _sum_exp_of_pairs(logit: Tensor, probe: Tensor, probes: int) -> Tensor:
    """log of the sum of exp of each probe's logits, [N], where logit j of [P] belongs to ``probe[j]``; -inf where a probe has none."""
    top = logit.new_full((probes,), -torch.inf).scatter_reduce(0, probe, logit.detach(), "amax")
    top = top.masked_fill(top == -torch.inf, 0.0)
    total = torch.zeros_like(top).index_add(0, probe, (logit - top[probe]).exp())
    nothing = total == 0
    return (top + total.masked_fill(nothing, 1.0).log()).masked_fill(nothing, -torch.inf)


class _QueueLoss(OverRanks):
    """A loss with a queue. The keys of all ranks enter it."""

    queue: GalleryQueue

    def __init__(
        self, queue: GalleryQueue | None, gather: bool, group: distributed.Group, backend: str | None,
        settings: dict[str, object],
    ) -> None:  # fmt: skip
        super().__init__(gather, group, settings)
        if queue is not None and not isinstance(queue, GalleryQueue):
            raise TypeError(f"queue must be a GalleryQueue, got {type(queue).__name__}")
        self.queue = queue  # type: ignore[assignment]
        self.backend = backend

    def _slots(self) -> Keys:
        size = self.queue.size
        return Keys(self.queue.features[:size], self.queue.identities[:size])

    def _enqueue(self, key: Tensor, identity: Tensor, world: int) -> None:
        """Writes the keys of all ranks into the queue, in training mode."""
        if self.training:
            if world > 1:
                key, identity = distributed.gather(key, self.group), distributed.gather(identity, self.group)
            self.queue.enqueue(key, identity)


class _KeyLoss(_QueueLoss):
    """A probe's one positive is its key from a second network. Negatives are in the queue, as it was before the batch."""

    statistics: functional.Statistics | None

    def __init__(
        self, queue: GalleryQueue, margin: Margin, scale: float, mask_empty: bool, gather: bool, group: distributed.Group,
        backend: str | None, settings: dict[str, object],
    ) -> None:  # fmt: skip
        if queue is None:
            raise TypeError("queue must be a GalleryQueue, got NoneType")
        super().__init__(queue, gather, group, backend, settings | {"mask_empty": mask_empty})
        self.margin = RunningMargin(margin)
        self.scale = scale
        self.mask_empty = mask_empty
        self.statistics = None

    def _loss(self, query: Tensor, key: Tensor, identity: Tensor | None) -> Tensor:
        check_embedding("query", query)
        if key.shape != query.shape:
            raise ValueError(f"key must have shape {list(query.shape)} like query, got {list(key.shape)}")
        unit = normalize(key.detach().to(wide_dtype(key)))
        slots = self._slots()
        loss: Tensor
        loss, self.statistics = functional.margin_softmax(
            query, slots.rows, None, positive=unit, margin=self.margin.current(), scale=self.scale, identity=identity,
            slot_identity=slots.identity, mask_empty=self.mask_empty, return_statistics=True, backend=self.backend,
        )  # fmt: skip
        return loss


class MoCo(_KeyLoss):
    """InfoNCE over a queue of keys (He et al., Momentum Contrast, CVPR 2020, eq. 1).

        loss_i = -log( exp(q_i k_i / T) / (exp(q_i k_i / T) + sum over the queue of exp(q_i k_j / T)) )

    The sum is over the queue as it was before the batch. Then the keys of all ranks enter the queue, in order of rank. Their number
    need not divide the size of the queue.

    Args:
        queue: of K keys; 65,536 of 128 features in the paper.
        temperature: T, at least 0.001; 0.07 as in v1's code, 0.2 in v2.
        mask_empty: empty slots are no negatives (default). In the authors' code the queue starts with random vectors, which are
            negatives. For that, use False with ``GalleryQueue(..., random=True)``.
        gather: with several processes, fill the queue from all of them (default) or from this one alone.
        group: the process group; default: all processes.
        backend: an implementation to force, see :func:`sst_fast.backends`.

    After each call ``statistics`` holds the :class:`sst_fast.functional.Statistics` of the queries.

    Example:
        >>> queue = sst_fast.GalleryQueue(size=65536, dim=128)
        >>> criterion = sst_fast.nn.MoCo(queue, temperature=0.07)
        >>> loss = criterion(query, key)  # key: of the momentum encoder
    """

    def __init__(
        self, queue: GalleryQueue, temperature: float = 0.07, *, mask_empty: bool = True, gather: bool = True,
        group: distributed.Group = None, backend: str | None = None,
    ) -> None:  # fmt: skip
        scale = _inverse(temperature)
        super().__init__(queue, Softmax(), scale, mask_empty, gather, group, backend, {"temperature": temperature})

    def forward(self, query: Tensor, key: Tensor, query_b: Tensor | None = None, key_b: Tensor | None = None) -> Tensor:
        """Mean loss; the keys then enter the queue, in training mode.

        Args:
            query: [N, D] of one view of each image, normalised inside.
            key: [N, D] of another view, by the momentum encoder; normalised inside, no gradient.
            query_b, key_b: for the symmetric loss: ``query_b`` is of the view that ``key`` is of, ``key_b`` of the view that ``query``
                is of. The loss is the sum of both directions, in one sweep. Both keys enter the queue, ``key_b`` first (as in the
                authors' CIFAR notebook).

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype or device, more keys than the queue has slots, or ranks that bring
                different settings or batch sizes (on every rank).
        """
        directions = 1
        if (query_b is None) != (key_b is None):
            raise TypeError("query_b and key_b must be given together for the symmetric loss, got one of them")
        _, world = self.meet(query)
        if query_b is not None and key_b is not None:
            if query_b.shape != query.shape or key_b.shape != key.shape:
                raise ValueError(
                    f"query_b and key_b must have shape {list(query.shape)} like query, got {list(query_b.shape)} "
                    f"and {list(key_b.shape)}"
                )
            query, key, directions = torch.cat([query_b, query]), torch.cat([key_b, key]), 2
        loss = directions * self._loss(query, key, None)
        self._enqueue(key, torch.zeros(len(key), dtype=torch.int64, device=key.device), world)
        return loss


class DCQ(_KeyLoss):
    """Dynamic class queue (Li et al., CVPR 2021, eqs. 4 to 6): class weights are the keys of a momentum network.

        loss_i = -log( exp(s (q_i k_i - m)) / (exp(s (q_i k_i - m)) + sum of exp(s q_i k_j)) )

    The sum is over the queue as it was before the batch, without the slots of the probe's own identity. Then the keys of all ranks
    enter the queue. For inference the momentum network is used.

    Args:
        queue: of K keys; 8,192 in the paper.
        margin: a margin of :mod:`sst_fast.margins` that does not follow the training; AM-softmax of 0.3 in the paper.
        scale: s in (0, 1000]; 50 in the paper.
        mask_empty, gather, group, backend: as :class:`MoCo`.

    After each call ``statistics`` holds the :class:`sst_fast.functional.Statistics` of the queries.

    Example:
        >>> criterion = sst_fast.nn.DCQ(sst_fast.GalleryQueue(size=8192, dim=512))
        >>> loss = criterion(query, key, identity)
    """

    def __init__(
        self, queue: GalleryQueue, margin: Margin = AMSoftmax(0.3), scale: float = 50.0, *, mask_empty: bool = True,
        gather: bool = True, group: distributed.Group = None, backend: str | None = None,
    ) -> None:  # fmt: skip
        check_scale(scale)
        check_margin(margin)
        if margin.running:
            raise ValueError(f"margin must be one that does not follow the training, got {margin!r}")
        super().__init__(queue, margin, scale, mask_empty, gather, group, backend, {"margin": margin, "scale": scale})

    def forward(self, query: Tensor, key: Tensor, identity: Tensor) -> Tensor:
        """Mean loss of queries [N, D]; keys [N, D] and ``identity``, int64 [N], >= 0, then enter the queue, in training mode.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype, device or value, more keys than the queue has slots, or ranks that bring
                different settings or batch sizes (on every rank).
        """
        _, world = self.meet(query)
        loss = self._loss(query, key, identity)
        self._enqueue(key, identity, world)
        return loss


class PairLoss(_QueueLoss):
    """What losses with several positives share: where keys come from, and how the losses of probes or pairs become one number.

    Args:
        queue: keys beside those of the batch. Afterwards the batch's keys enter it. None: the batch's keys alone.
        reduction: 'mean': over the probes (for :class:`NTXent`: over the pairs) that have a loss. Each class says which these are.
            'nonzero': over those of them whose loss is not 0, as pytorch-metric-learning's AvgNonZeroReducer. 'sum': their sum.
        gather: with several processes, keys are those of all of them (default) or of this one alone.
        group: the process group; default: all processes.
        backend: an implementation to force, see :func:`sst_fast.backends`.
    """

    def __init__(
        self, queue: GalleryQueue | None, reduction: PairReduction, gather: bool, group: distributed.Group,
        backend: str | None, settings: dict[str, object],
    ) -> None:  # fmt: skip
        check_word("reduction", reduction, get_args(PairReduction))
        super().__init__(queue, gather, group, backend, settings | {"reduction": reduction})
        self.reduction = reduction

    def forward(self, embedding: Tensor, identity: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        """Loss of a batch against itself and the queue. In training mode its keys then enter the queue.

        Args:
            embedding: probes [N, D], normalised inside; or V views each of B samples, [B, V, D], all of which are probes.
            identity: int64 [N], or [B] with views, >= 0. None with views: every sample is an identity of its own, as in SimCLR.
            key: the batch's keys, with the shape of ``embedding``, such as those of a momentum network. They get a gradient if they
                require one. A probe's own key is one of its positives. None: the embeddings are the keys, and no probe is compared
                with itself.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype, device or value, more keys than the queue has slots, or ranks that
                bring different settings or batch sizes (on every rank).
        """
        views = 1
        if isinstance(embedding, Tensor) and embedding.dim() == 3:
            views = embedding.shape[1]
            if key is not None and key.dim() == 3:
                key = key.flatten(0, 1)
            embedding = embedding.flatten(0, 1)
        check_embedding("embedding", embedding)
        if key is not None and key.shape != embedding.shape:
            raise ValueError(f"key must have shape {list(embedding.shape)} like embedding, got {list(key.shape)}")
        rank, world = self.meet(embedding)
        count, device = len(embedding), embedding.device
        if identity is None:
            if views == 1 or self.queue is not None:
                raise TypeError(
                    "identity must be an int64 tensor unless embedding holds several views, [B, V, D], and no queue is used, "
                    "got None"
                )
            identity = torch.arange(count // views, device=device) + rank * (count // views)
        check_identity(identity, count // views, device)
        identity = identity.repeat_interleave(views)
        rows = unit_rows((embedding if key is None else key).to(wide_dtype(embedding)))
        names, own = identity, torch.arange(count, device=device) + rank * count
        if world > 1:
            rows, names = distributed.gather_with_gradient(rows, self.group), distributed.gather(identity, self.group)
        blocks = [Keys(rows, names, own if key is None else None, batch=True)]
        if self.queue is not None:
            blocks.append(self._slots())
        loss = self.over(embedding, identity, blocks)
        if self.training and self.queue is not None:
            self.queue.enqueue(rows.detach(), names)
        return loss

    def over(self, embedding: Tensor, identity: Tensor, blocks: Sequence[Keys]) -> Tensor:
        """Loss of probes [N, D] with identities int64 [N] against the keys of all blocks together."""
        total, number = self._total(embedding, identity, blocks)
        if self.reduction == "sum":
            return total
        number = number.to(total.dtype)
        if self.gather:
            number = distributed.mean(number, self.group)
        return total / torch.where(number == 0, 1, number)

    def _total(self, embedding: Tensor, identity: Tensor, blocks: Sequence[Keys]) -> tuple[Tensor, Tensor]:
        """Sum of the losses that count, and their number."""
        if len(blocks) == 1 and blocks[0].batch and embedding.device.type == "cpu":
            return self._of_batch(embedding, identity, blocks[0])
        return self._reduced(*self._each(embedding, identity, blocks))

    def _reduced(self, loss: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        if self.reduction == "nonzero":
            counts = counts & (loss != 0)
        return torch.where(counts, loss, 0).sum(), counts.sum()

    def _of_batch(self, embedding: Tensor, identity: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """The same for a batch against itself, by blocks of probes."""
        rows = keys.rows
        itself = keys.own is not None and len(rows) == len(embedding)  # not of several ranks
        unit, number = rows if itself else unit_rows(embedding.to(rows.dtype)), identity.new_zeros(())

        names, order = keys.identity.sort(stable=True)
        first = torch.searchsorted(names, identity)
        count = torch.searchsorted(names, identity, right=True) - first

        def share(c: Tensor, i: slice, j: slice) -> Tensor:
            probe, place = _pairs(count[i])
            key = order[first[i][probe] + place]
            other = torch.ones_like(probe, dtype=torch.bool) if keys.own is None else key != keys.own[i][probe]
            total, found = self._reduced(*self._rows(c, probe, key, other))
            number.add_(found)
            return total

        with torch.autocast(unit.device.type, enabled=False):
            total = sum_over_blocks(unit, rows, share)
        return total, number

    def _rows(self, c: Tensor, probe: Tensor, key: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`_each` from the cosines c [n, K] of n probes with all keys.

        Args:
            probe, key: int64 [P]: row and column in c of the pairs whose key has the probe's identity.
            other: bool [P]: False where the key is the probe itself. The others are positives.
        """
        raise NotImplementedError

    def _each(self, embedding: Tensor, identity: Tensor, blocks: Sequence[Keys]) -> tuple[Tensor, Tensor]:
        """Losses of probes or pairs, and which of them count."""
        raise NotImplementedError

    def _log_sum_exp(
        self, embedding: Tensor, blocks: Sequence[Keys], scale: float, identity: Tensor | None, **options: Any
    ) -> Tensor:
        total: Tensor | None = None
        for keys in blocks:
            part = log_sum_exp(embedding, keys, scale, identity=identity, backend=self.backend, **options)
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return total


class SupCon(PairLoss):
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020), with any number of positives and an optional queue.

    A(i) are the keys of probe i, without itself. P(i) are those of its identity among them. The sum over positives stands outside the
    logarithm (eq. 2, which the paper recommends) or inside it (eq. 3):

        outside:  loss_i = -1/|P(i)| sum over p in P(i) of log( exp(c_ip / T) / sum over a in A(i) of exp(c_ia / T) )
        inside:   loss_i = -log( 1/|P(i)| sum over p in P(i) of exp(c_ip / T) / sum over a in A(i) of exp(c_ia / T) )

    Args:
        temperature: T, at least 0.001; 0.07 as in the authors' code.
        form: 'outside' (default) or 'inside'.
        base_temperature: the loss is multiplied by T / base_temperature; 0.07 in the authors' code. None (default): by 1.
        reduction: over the probes with a positive, see :class:`PairLoss`. For a probe without one the authors' code gives NaN.
        queue, gather, group, backend: as :class:`PairLoss`.

    Example:
        >>> criterion = sst_fast.nn.SupCon(temperature=0.1)
        >>> loss = criterion(features, label)  # features [B, V, D], as of the authors' SupConLoss; or [N, D]
    """

    def __init__(
        self, temperature: float = 0.07, *, form: Form = "outside", base_temperature: float | None = None,
        queue: GalleryQueue | None = None, reduction: PairReduction = "mean", gather: bool = True,
        group: distributed.Group = None, backend: str | None = None,
    ) -> None:  # fmt: skip
        self_scale = _inverse(temperature)
        check_word("form", form, get_args(Form))
        if base_temperature is not None:
            _inverse(base_temperature, "base_temperature")
        settings: dict[str, object] = {"temperature": temperature, "form": form, "base_temperature": base_temperature}
        super().__init__(queue, reduction, gather, group, backend, settings)
        self.scale, self.form = self_scale, form
        self.factor = 1.0 if base_temperature is None else temperature / base_temperature

    def _each(self, embedding: Tensor, identity: Tensor, blocks: Sequence[Keys]) -> tuple[Tensor, Tensor]:
        every = self._log_sum_exp(embedding, blocks, self.scale, None)
        unit = normalize(embedding.to(every.dtype))
        found = [Positives(identity, keys) for keys in blocks]
        count = sum((p.count for p in found), torch.zeros_like(identity))
        number = count.clamp_min(1).to(every.dtype)
        if self.form == "outside":
            near = self.scale * sum((p.sums(unit) for p in found), torch.zeros_like(every)) / number
        else:
            pairs = [p.cosines(unit) for p in found]
            cosine, probe = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            near = _sum_exp_of_pairs(self.scale * cosine, probe, len(unit)) - number.log()
        return self.factor * torch.where(count > 0, every - near, 0), count > 0

    def _rows(self, c: Tensor, probe: Tensor, key: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        z = self.scale * c
        every = _LogSumExp.apply(z, probe[~other], key[~other])
        probe, key = probe[other], key[other]
        count = torch.bincount(probe, minlength=len(c))
        number, near = count.clamp_min(1).to(c.dtype), z[probe, key]
        if self.form == "outside":
            near = torch.zeros_like(number).index_add(0, probe, near) / number
        else:
            near = _sum_exp_of_pairs(near, probe, len(c)) - number.log()
        return self.factor * torch.where(count > 0, every - near, 0), count > 0


class NTXent(PairLoss):
    """Normalised temperature-scaled cross-entropy (Chen et al., SimCLR, ICML 2020, eq. 1), with any number of positives.

        loss_ip = -log( exp(c_ip / T) / (exp(c_ip / T) + sum over keys n of other identities of exp(c_in / T)) )

    Each pair of a probe i and a positive p has such a loss. Other positives are not in its denominator, as in pytorch-metric-learning's
    NTXentLoss.

    Args:
        temperature: T, at least 0.001; 0.07 as in pytorch-metric-learning.
        reduction: over the pairs of a probe and a positive, see :class:`PairLoss`.
        queue, gather, group, backend: as :class:`PairLoss`.

    Example:
        >>> criterion = sst_fast.nn.NTXent(temperature=0.5)
        >>> loss = criterion(torch.stack([view_a, view_b], 1))  # SimCLR: two views of each image, no labels
    """

    def __init__(
        self, temperature: float = 0.07, *, queue: GalleryQueue | None = None, reduction: PairReduction = "mean",
        gather: bool = True, group: distributed.Group = None, backend: str | None = None,
    ) -> None:  # fmt: skip
        scale = _inverse(temperature)
        super().__init__(queue, reduction, gather, group, backend, {"temperature": temperature})
        self.scale = scale

    def _each(self, embedding: Tensor, identity: Tensor, blocks: Sequence[Keys]) -> tuple[Tensor, Tensor]:
        negatives = self._log_sum_exp(embedding, blocks, self.scale, identity)
        unit = normalize(embedding.to(negatives.dtype))
        pairs = [Positives(identity, keys).cosines(unit) for keys in blocks]
        cosine, probe = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        excess = negatives[probe] - self.scale * cosine
        return torch.logaddexp(excess, torch.zeros_like(excess)), torch.ones_like(probe, dtype=torch.bool)

    def _rows(self, c: Tensor, probe: Tensor, key: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        z = self.scale * c
        negatives = _LogSumExp.apply(z, probe, key)
        probe, key = probe[other], key[other]
        excess = negatives[probe] - z[probe, key]
        return torch.logaddexp(excess, torch.zeros_like(excess)), torch.ones_like(probe, dtype=torch.bool)


class PairCircle(PairLoss):
    """Circle loss of pairs, with any number of positives (Sun et al., CVPR 2020, eqs. 4 to 6).

        loss_i = log(1 + sum over negatives of exp(g [c + m]+ (c - m)) * sum over positives of exp(-g [1 + m - c]+ (c - 1 + m)))

    c is a cosine, and [x]+ is max(x, 0). The weights [.]+ are constants to the gradient, as in the authors' code.
    (``sst_fast.CircleLoss`` is the margin for one positive: a class weight or a gallery feature.)

    Args:
        m: relaxation in [0, 1]; 0.4 as in pytorch-metric-learning. The paper has 0.25 for faces.
        gamma: scale g in (0, 1000]; 80 as in pytorch-metric-learning. The paper has 256 for faces.
        reduction: over the probes with a positive and a negative, see :class:`PairLoss`.
        queue, gather, group, backend: as :class:`PairLoss`.

    Example:
        >>> criterion = sst_fast.nn.PairCircle(m=0.25, gamma=256)
        >>> loss = criterion(embedding, identity)
    """

    def __init__(
        self, m: float = 0.4, gamma: float = 80.0, *, queue: GalleryQueue | None = None,
        reduction: PairReduction = "mean", gather: bool = True, group: distributed.Group = None, backend: str | None = None,
    ) -> None:  # fmt: skip
        if not is_number(m) or not is_number(gamma) or not 0 < gamma <= MAX_SCALE:
            raise ValueError(f"m must be a number and gamma one in (0, {MAX_SCALE:g}], got {m!r} and {gamma!r}")
        margin = CircleLoss(float(m))
        super().__init__(queue, reduction, gather, group, backend, {"m": m, "gamma": gamma})
        self.margin, self.m, self.gamma = margin, float(m), float(gamma)

    def _each(self, embedding: Tensor, identity: Tensor, blocks: Sequence[Keys]) -> tuple[Tensor, Tensor]:
        # The least value of phi is -m^2, at c = 0. psi has this value at 1 - sqrt(2) m.
        lowest = 1 - math.sqrt(2) * self.m
        negatives = self._log_sum_exp(embedding, blocks, self.gamma, identity, margin=self.margin, lowest=lowest)
        unit = normalize(embedding.to(negatives.dtype))
        pairs = [Positives(identity, keys).cosines(unit) for keys in blocks]
        cosine, probe = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        return self._both(negatives, _sum_exp_of_pairs(-self.gamma * self.margin.psi(cosine), probe, len(unit)))

    def _rows(self, c: Tensor, probe: Tensor, key: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        far = (c.detach() + self.m).clamp_min_(0).mul_(self.gamma) * (c - self.m)  # the margin's phi
        near = -self.gamma * self.margin.psi(c[probe[other], key[other]])
        return self._both(_LogSumExp.apply(far, probe, key), _sum_exp_of_pairs(near, probe[other], len(c)))

    def _both(self, negatives: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
        both = negatives + positives
        counts = both > -torch.inf
        return torch.logaddexp(both.where(counts, 0), torch.zeros_like(both)), counts


class Contrastive(PairLoss):
    """Contrastive loss of cosines, as in the paper on cross-batch memory (Wang et al., CVPR 2020, eq. 4).

        loss_i = sum over positives of (1 - c) + sum over negatives of [c - threshold]+

    [x]+ is max(x, 0). The paper has -c in the place of 1 - c, and its code has c in the place of [c - threshold]+ where c is above the
    threshold. The values differ, the gradients do not. Keys are taken a block at a time, those of the queue too.

    Args:
        threshold: a cosine in [-1, 1]. A negative below it has no loss; 0.5 as in the authors' code.
        reduction: 'mean' is over all probes, as in their code; see :class:`PairLoss`.
        queue, gather, group: as :class:`PairLoss`.

    Example:
        >>> criterion = sst_fast.nn.CrossBatchMemory(sst_fast.nn.Contrastive(), embedding_size=128, memory_size=8192)
        >>> loss = criterion(embedding, identity)
    """

    def __init__(
        self, threshold: float = 0.5, *, queue: GalleryQueue | None = None, reduction: PairReduction = "mean",
        gather: bool = True, group: distributed.Group = None,
    ) -> None:  # fmt: skip
        if not is_number(threshold) or not -1 <= threshold <= 1:
            raise ValueError(f"threshold must be a cosine in [-1, 1], got {threshold!r}")
        super().__init__(queue, reduction, gather, group, None, {"threshold": threshold})
        self.threshold = float(threshold)

    def _total(self, embedding: Tensor, identity: Tensor, blocks: Sequence[Keys]) -> tuple[Tensor, Tensor]:
        unit = unit_rows(embedding.to(wide_dtype(embedding)))
        each = unit.new_zeros(len(unit))
        total = each.sum()
        for keys in blocks:
            own = torch.full_like(identity, -1) if keys.own is None else keys.own
            with torch.autocast(unit.device.type, enabled=False):
                total = total + sum_over_blocks(
                    unit, keys.rows, partial(self._share, each, identity, keys.identity, own), COLUMNS
                )
        counts = each != 0 if self.reduction == "nonzero" else torch.ones_like(each)
        return total, counts.sum()

    def _share(
        self, each: Tensor, identity: Tensor, key_identity: Tensor, own: Tensor, c: Tensor, i: slice, j: slice
    ) -> Tensor:
        names = key_identity[j]
        same = identity[i, None] == names
        far = (c - self.threshold).clamp_min(0).masked_fill(same | (names < 0), 0)
        same &= own[i, None] != torch.arange(j.start, j.stop, device=c.device)
        loss = torch.where(same, 1 - c, far).sum(1)
        each[i] += loss.detach()
        return loss.sum()


class CrossBatchMemory(_QueueLoss):
    """A loss between the batch and a memory of the last embeddings (Wang et al., Cross-Batch Memory, CVPR 2020).

    As in pytorch-metric-learning's class of this name, the batch enters the memory first. A probe's own embedding is not one of its
    keys. With several processes the embeddings of all ranks enter, and all are keys of every rank's probes. The memory and its
    position are in the state dict, so that a run resumes.

    Args:
        loss: :class:`SupCon`, :class:`NTXent`, :class:`PairCircle` or :class:`Contrastive`, without a queue.
        embedding_size: D.
        memory_size: number of embeddings K, at least the batch of all ranks.
        dtype, device: of the memory, as of :class:`sst_fast.GalleryQueue`.

    Example:
        >>> criterion = sst_fast.nn.CrossBatchMemory(sst_fast.nn.NTXent(0.1), embedding_size=128, memory_size=4096)
        >>> loss = criterion(embedding, identity)
    """

    loss: PairLoss

    def __init__(
        self, loss: PairLoss, embedding_size: int, memory_size: int = 1024, *, dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(loss, PairLoss) or loss.queue is not None:
            what = "one with a queue" if isinstance(loss, PairLoss) else type(loss).__name__
            raise TypeError(f"loss must be SupCon, NTXent, PairCircle or Contrastive without a queue, got {what}")
        size, dim = check_count("memory_size", memory_size, 1), check_count("embedding_size", embedding_size, 1)
        queue = GalleryQueue(size, dim, dtype, device=device)
        super().__init__(queue, loss.gather, loss.group, loss.backend, {})
        self.loss = loss

    def forward(self, embedding: Tensor, identity: Tensor, *, enqueue_mask: Tensor | None = None) -> Tensor:
        """Loss of embeddings [N, D], normalised inside, with ``identity``, int64 [N], >= 0. In training mode they enter the memory.

        Args:
            embedding, identity: the batch.
            enqueue_mask: bool [N]: rows that are True enter the memory, the others are probes. This is for a batch of which one half
                comes from a momentum network. None: all rows are both. With several processes the same number of rows must enter on
                each rank.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype, device or value, more rows than the memory, or ranks that bring
                different settings or batch sizes (on every rank).
        """
        check_embedding("embedding", embedding)
        check_identity(identity, len(embedding), embedding.device)
        entering, names, own = embedding, identity, None
        if enqueue_mask is not None:
            check_tensor("enqueue_mask", enqueue_mask, (len(embedding),), (torch.bool,), embedding.device)
            entering, names = embedding[enqueue_mask], identity[enqueue_mask]
            embedding, identity = embedding[~enqueue_mask], identity[~enqueue_mask]
        rank, world = self.meet(entering)
        if self.training:
            if enqueue_mask is None:
                slots = window_slots(self.queue.state[0], world * len(entering), self.queue.size)
                own = slots[rank * len(entering) : (rank + 1) * len(entering)]
            self._enqueue(entering, names, world)
        return self.loss.over(embedding, identity, [self._slots()._replace(own=own)])


def check_identity(identity: Tensor, count: int, device: torch.device) -> None:
    """TypeError or ValueError unless ``identity`` is int64 [count] on ``device`` and, if that is the CPU, >= 0."""
    check_tensor("identity", identity, (count,), (torch.int64,), device)
    if device.type == "cpu" and not torch.compiler.is_compiling() and bool((identity < 0).any()):
        raise ValueError(f"identity must be >= 0, got {int(identity.min())}")


def _inverse(temperature: float, name: str = "temperature") -> float:
    """The scale 1 / temperature; ValueError where it is out of range."""
    if not is_number(temperature) or not 1 / MAX_SCALE <= temperature < math.inf:
        raise ValueError(f"{name} must be a number of at least {1 / MAX_SCALE:g}, got {temperature!r}")
    return 1 / float(temperature)
