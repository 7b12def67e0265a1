"""The losses as modules: Semi-Siamese Training over a gallery queue, and learned class weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sst_fast import distributed, functional, reference
from sst_fast.arguments import (
    EMBEDDING_DTYPES,
    Arguments,
    GradientRule,
    Window,
    check_count,
    check_margin,
    check_options,
    check_scale,
    check_tensor,
    check_word,
    wide_dtype,
)
from sst_fast.margins import AdaCos, AMSoftmax, Margin, Parameter, Seen, Softmax
from sst_fast.queue import GalleryQueue

Keep = Literal["coin", "first", "second", "mean", "both"]
HEAD_OPTIONS = frozenset({
    "reduction", "weight", "ignore_index", "label_smoothing", "identity", "slot_identity", "mask_empty",
    "normalize_prototypes", "gradient", "backend", "product_dtype", "sub_centers",
})  # fmt: skip


class RunningMargin(nn.Module):
    """A margin and, as buffers, those of its parameters that follow the training (``Margin.running``), float32 at least.

    Parameters that are ``nn.Parameter`` are registered in ``trained``, so that an optimizer finds them.
    """

    def __init__(self, margin: Margin) -> None:
        super().__init__()
        check_margin(margin)
        self.margin = margin
        for name in margin.running:
            self.register_buffer(name, torch.as_tensor(getattr(margin, name), dtype=torch.float32).clone())
        self.trained = nn.ParameterDict(
            {n: value for n, value in vars(margin).items() if isinstance(value, nn.Parameter)}
        )

    def current(self) -> Margin:
        """The margin with its parameters as they are now: copies, which later updates leave alone."""
        if not self.margin.running:
            return self.margin
        return dataclasses.replace(self.margin, **{name: getattr(self, name).clone() for name in self.margin.running})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMargin:
        before = {name: getattr(self, name) for name in self.margin.running}
        super()._apply(fn, recurse)
        for name, old in before.items():  # half precision would swallow a step of 0.01
            new = getattr(self, name)
            if new.itemsize < old.itemsize < 8:
                setattr(self, name, old.to(new.device))
        return self

    @torch.no_grad()
    def follow(
        self,
        embedding: Tensor,
        prototypes: Tensor,
        target: Tensor,
        *,
        average: distributed.Average = None,
        **options: Any,
    ) -> None:
        """Updates the running parameters from a batch; arguments as of :func:`sst_fast.functional.margin_softmax`.

        Probes that are ignored or not finite do not count. If none counts, nothing changes. ``average`` is applied to the new values: the
        mean over ranks, each of which has seen another batch.
        """
        if not self.margin.running:
            return
        looks = {
            n: options[n] for n in ("window", "normalize_prototypes", "ignore_index", "sub_centers") if n in options
        }
        cosine = functional.target_cosine(embedding, prototypes, target, **looks)
        norm = functional.embedding_norm(embedding)
        counts = torch.isfinite(norm) & torch.isfinite(cosine) & (target != options.get("ignore_index", -100))

        def log_negatives(scale: Tensor) -> Tensor:
            excess = functional.margin_softmax(
                embedding, prototypes, target, margin=Softmax(), scale=scale, reduction="none", **options
            )
            found: Tensor = scale * cosine + excess + (-torch.expm1(-excess)).log()
            return found

        seen = Seen(norm, cosine, counts, len(prototypes) // options.get("sub_centers", 1), log_negatives)
        for name, value in self.current().follow(seen).items():
            running = getattr(self, name)
            new = torch.where(counts.any(), value, running)
            running.copy_(average(new) if average else new)


def splits_over_shards(margin: Margin) -> bool:
    """Whether losses over shards of the slots can be combined: not where the margin or its scale needs a sum over all of them."""
    return not (margin.uses_hard_mean or isinstance(margin, AdaCos))


def over_shards(
    embedding: Tensor, prototypes: Tensor, target: Tensor, *, margin: Margin, group: distributed.Group, **options: Any
) -> tuple[Tensor, functional.Statistics]:
    """Losses [N] over all ranks' prototypes, and this shard's statistics; see :func:`sst_fast.distributed.combine_shards`.

    Arguments as of :func:`sst_fast.functional.margin_softmax`; every rank brings the same embeddings and the same targets, by
    their rows or as ``positive``.
    """
    penalty = None
    if margin.uses_norm:  # what it adds to the loss is no part of the softmax, so it enters once, after the combination
        ignored = target == options.get("ignore_index", -100)
        wide = wide_dtype(embedding, prototypes)
        norm = functional.embedding_norm(embedding.to(wide).masked_fill(ignored[:, None], 0))
        margin, penalty = margin.for_batch(norm), margin.penalty(norm)
        penalty = None if penalty is None else penalty.masked_fill(ignored, 0)
    mine, statistics = functional.margin_softmax(
        embedding, prototypes, target, margin=margin, reduction="none", return_statistics=True, **options
    )
    losses = distributed.combine_shards(mine, group)
    return losses if penalty is None else losses + penalty.to(losses.dtype), statistics


class SemiSiameseLoss(nn.Module):
    """The loss of Semi-Siamese Training: both directions against one queue, in one launch. Then the batch enters the queue.

    loss = 1/2 [ L(probe(x1), gallery(x2)) + L(probe(x2), gallery(x1)) ]  (Du et al., ECCV 2020), where L
    is :func:`sst_fast.functional.margin_softmax` with the other image's gallery feature in the batch's own slots.

    With several processes (W ranks of a process group) every rank's gallery features and identities enter every rank's queue.
    So all ranks hold the same queue, and each probe sees the whole batch. With ``shard`` each rank's queue is a shard, 1/W of the
    whole, and probes visit all shards. Loss and gradient are then those of one queue with all the slots.

    Every rank must bring the same B. The value is the mean over the rank's own probes. If gradients are averaged over ranks, as
    DistributedDataParallel does, they are those of the mean over all probes.

    Args:
        queue: the gallery queue; with ``shard`` this rank's part of it, with ``spare`` >= W B.
        margin: a margin of :mod:`sst_fast.margins`.
        scale: inverse temperature s > 0.
        label_smoothing, gradient: as in :func:`sst_fast.functional.margin_softmax`.
        keep: which image's gallery feature enters the queue. 'coin' (default): one toss decides for the whole batch, on all
            ranks alike, as in the authors' code. 'first' or 'second': always that image's. 'mean': the mean of both unit
            features. 'both': both, which takes 2B slots a step.
        mask_identity: slots that hold the probe's own identity are no negatives (default). False: they are, as in the authors'
            code.
        mask_empty: empty slots are no negatives (default).
        gather: with several processes, fill the queue from all of them (default) or from this one alone.
        shard: the rank's queue is a part of the whole, see above.
        group: the process group; default: all processes.
        backend: force an implementation of the loss, see :func:`sst_fast.backends`.

    A shard is in no other rank's state dict. If one file is written for all ranks (torch.distributed.checkpoint, safetensors),
    leave ``criterion.queue.*`` out of the model's state, and save ``queue.state_dict()`` under a name of each rank's own.

    After each call ``statistics`` holds the :class:`sst_fast.functional.Statistics` of the 2B probes. With ``shard`` they cover
    this shard only.

    Raises:
        ValueError: ``shard`` with ``mask_empty=False``, label smoothing or a margin that needs the whole queue at once
            (NPCFace) or follows it (AdaCos).
    """

    statistics: functional.Statistics | None

    def __init__(
        self,
        queue: GalleryQueue,
        margin: Margin = AMSoftmax(0.35),
        scale: Parameter = 30.0,
        *,
        label_smoothing: float = 0.0,
        gradient: GradientRule = "exact",
        keep: Keep = "coin",
        mask_identity: bool = True,
        mask_empty: bool = True,
        gather: bool = True,
        shard: bool = False,
        group: distributed.Group = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(queue, GalleryQueue):
            raise TypeError(f"queue must be a GalleryQueue, got {type(queue).__name__}")
        check_margin(margin)
        check_scale(scale)
        check_options(label_smoothing, gradient=gradient)
        check_word("keep", keep, get_args(Keep))
        if shard and (not mask_empty or label_smoothing or not splits_over_shards(margin)):
            raise ValueError(
                "shard needs mask_empty=True, label_smoothing=0 and a margin that needs no sum over the whole queue, got "
                f"mask_empty={mask_empty}, label_smoothing={label_smoothing}, margin={margin!r}"
            )
        self.queue = queue
        self.margin = RunningMargin(margin)
        self.scale = scale
        self.label_smoothing = label_smoothing
        self.gradient = gradient
        self.keep = keep
        self.mask_identity = mask_identity
        self.mask_empty = mask_empty
        self.gather = gather
        self.shard = shard
        self.group = group
        self.backend = backend
        self.statistics = None

    def forward(
        self, probe_a: Tensor, probe_b: Tensor, gallery_a: Tensor, gallery_b: Tensor, identity: Tensor
    ) -> Tensor:
        """Loss of a batch; in training mode the queue then takes one gallery feature of each identity.

        Args:
            probe_a, probe_b: probe embeddings [B, D] of the two images of each identity; normalised inside.
            gallery_a, gallery_b: gallery embeddings [B, D] of the same images; normalised inside, no gradient.
            identity: int64 [B], >= 0.

        Returns:
            Scalar: the mean over the 2B probes.
        """
        queue = self.queue
        features, held = queue.features, queue.identities
        check_tensor("probe_a", probe_a, (None, features.shape[1]), EMBEDDING_DTYPES, features.device)
        for name, value in (("probe_b", probe_b), ("gallery_a", gallery_a), ("gallery_b", gallery_b)):
            if value.shape != probe_a.shape:
                raise ValueError(f"{name} must have shape {list(probe_a.shape)} like probe_a, got {list(value.shape)}")
        rank, world = distributed.ranks(self.group) if self.gather or self.shard else (0, 1)
        count = identity.shape[0]
        groups: Sequence[Tensor] = (gallery_b.detach(), gallery_a.detach())  # what probes a and probes b see
        kept = self._kept(identity.device)
        own = slice(rank * count, (rank + 1) * count)
        if world > 1:
            distributed.assert_same_batch(identity, self.group)
            gathered = distributed.gather(torch.stack(tuple(groups), 1), self.group)
            rows = distributed.gather(torch.cat([identity, kept[None]]), self.group).view(world, count + 1)
            groups, identity, kept = (
                gathered.unbind(1),
                rows[:, :count].flatten(),
                rows[0, count],
            )  # rank 0's toss counts
        if self.shard:
            loss, window = self._over_shards(torch.stack([probe_a, probe_b], 1), groups, identity, own)
        else:
            window = queue.window(groups, identity)
            assert window.targets is not None
            assert window.owners is not None
            targets, owners = window.targets, window.owners
            if world > 1:
                targets, owners = window.slots[own].repeat(2), identity[own].repeat(2)
            if queue.spare:
                features, held = features[: -queue.spare], held[: -queue.spare]
            loss = self._loss(torch.cat([probe_a, probe_b]), targets, owners, window, features, held)
        if self.training:
            self._enqueue(window, groups, kept, own if self.shard else slice(None))
        return loss

    def _kept(self, device: torch.device) -> Tensor:
        """Which group enters the queue, int64 0-d; tossed on the device, so that the host neither waits nor decides."""
        if self.keep == "coin":
            return torch.randint(2, (), device=device)
        return torch.full((), int(self.keep == "first"), device=device)

    def _enqueue(self, window: Window, groups: Sequence[Tensor], kept: Tensor, mine: slice) -> None:
        features, ids = window.features, window.identities
        if self.shard:
            features, ids = features[:, mine], ids[mine]
        if self.keep == "mean":
            sums = [reference.normalize(group[mine].float()) for group in groups]
            self.queue.enqueue(sums[0] + sums[1], ids.clamp_min(0))
        elif self.keep == "both":
            self.queue.enqueue(features.flip(0).flatten(0, 1), ids.repeat(2), unit=True)
        else:
            self.queue._write(features, ids, True, kept)  # the queue's own window: nothing of it is checked again

    def _loss(
        self, embedding: Tensor, target: Tensor, identity: Tensor | None, window: Window, features: Tensor,
        slot_identity: Tensor,
    ) -> Tensor:  # fmt: skip
        """The mean; with ``shard`` each probe's, over all shards. Embeddings have been checked, the rest is the queue's own."""
        if not self.mask_identity:
            identity = None
        if self.training and self.margin.margin.running:
            average = partial(distributed.mean, group=self.group) if self.gather and not self.shard else None
            self.margin.follow(
                embedding, features, target, window=window, identity=identity, slot_identity=slot_identity,
                mask_empty=self.mask_empty, backend=self.backend, average=average,
            )  # fmt: skip
        margin = self.margin.current()
        if self.shard:
            loss, self.statistics = over_shards(
                embedding, features, target, margin=margin, group=self.group, scale=self.scale, window=window,
                identity=identity, slot_identity=slot_identity, mask_empty=self.mask_empty, gradient=self.gradient,
                backend=self.backend,
            )  # fmt: skip
            return loss
        check_margin(margin)
        check_scale(self.scale, embedding.shape[0], embedding.device)
        loss, self.statistics = functional.evaluate(
            Arguments(
                embedding, features, target, None, margin, self.scale, "mean", None, -100, self.label_smoothing, window,
                identity, slot_identity, self.mask_empty, False, self.gradient,
            ),
            self.backend,
        )  # fmt: skip
        return loss

    def _over_shards(
        self, probes: Tensor, gallery: Sequence[Tensor], identity: Tensor, own: slice
    ) -> tuple[Tensor, Window]:
        """Probes [B, 2, D] of this rank, gallery 2 x [W B, D] and identity [W B] of all. The loss, and the window it saw."""
        window, held = self.queue.shard_window(gallery, identity, own)
        everyone = distributed.gather_with_gradient(probes, self.group).transpose(0, 1).flatten(0, 1)
        # Rows are the probes a of all ranks, then the probes b.
        losses = self._loss(everyone, window.slots.repeat(2), identity.repeat(2), window, self.queue.features, held)
        return losses.view(2, -1)[:, own].mean(), window


class MarginSoftmaxHead(nn.Module):
    """Learned class weights with a margin, as ArcFace and CosFace have them, without an N x K tensor.

    :mod:`sst_fast.nn` has heads named after their margins.

    Args:
        classes: number of classes K >= 2.
        dim: number of features D.
        margin: a margin of :mod:`sst_fast.margins`.
        scale: inverse temperature s > 0.
        init: fills the weight [K, D] in place, as the functions of ``torch.nn.init`` do. Default: normal with standard
            deviation 0.01, as insightface's. Only the directions of rows enter the loss. But the shorter the rows, the further
            a step of the optimizer turns them.
        options: more keyword arguments of :func:`sst_fast.functional.margin_softmax`.

    After each call ``statistics`` holds the :class:`sst_fast.functional.Statistics` of the batch.

    Raises:
        TypeError, ValueError: an argument or option that does not exist or has a wrong type or value.
    """

    statistics: functional.Statistics | None

    def __init__(
        self,
        classes: int,
        dim: int,
        margin: Margin = AMSoftmax(0.35),
        scale: Parameter = 64.0,
        *,
        init: Callable[[Tensor], object] = partial(nn.init.normal_, std=0.01),
        **options: Any,
    ) -> None:
        super().__init__()
        classes, dim = check_count("classes", classes, 2), check_count("dim", dim, 1)
        check_margin(margin)
        check_scale(scale)
        unknown = sorted(set(options) - HEAD_OPTIONS)
        if unknown:
            raise TypeError(
                f"{unknown[0]} is no option of {type(self).__name__}, expected {', '.join(sorted(HEAD_OPTIONS))}"
            )
        checked = ("label_smoothing", "reduction", "gradient", "ignore_index")
        check_options(**{name: options[name] for name in checked if name in options})
        self.sub_centers = check_count("sub_centers", options.get("sub_centers", 1), 1)
        self.weight = nn.Parameter(torch.empty(classes * self.sub_centers, dim))
        with torch.no_grad():
            init(self.weight)
        self.margin = RunningMargin(margin)
        self.scale = scale
        self.options = {"normalize_prototypes": True} | options
        self.statistics = None

    def forward(self, embedding: Tensor, target: Tensor) -> Tensor:
        """Loss of embeddings [N, D] with class numbers ``target``, int64 [N]."""
        if self.training:
            looks = {
                name: self.options[name]
                for name in ("normalize_prototypes", "ignore_index", "sub_centers")
                if name in self.options
            }
            self.margin.follow(embedding, self.weight, target, **looks)
        loss: Tensor
        loss, self.statistics = functional.margin_softmax(
            embedding, self.weight, target, margin=self.margin.current(), scale=self.scale, return_statistics=True,
            **self.options,
        )  # fmt: skip
        return loss

    def logits(self, embedding: Tensor) -> Tensor:
        """Scale times the cosines with all classes [N, K], without the margin, of embeddings [N, D]; in the embedding's dtype.

        Plain PyTorch, with its gradient. All N x K of them are in memory. To find the largest ones without that, use :meth:`topk`.
        """
        self._check(embedding)
        rows = reference.normalize(self.weight) if self.options["normalize_prototypes"] else self.weight
        cosine = reference.normalize(embedding) @ rows.to(embedding.dtype).T
        if self.sub_centers > 1:
            cosine = cosine.unflatten(1, (-1, self.sub_centers)).amax(2)
        margin, norm = self.margin.current(), None
        if margin.uses_norm:
            norm = functional.embedding_norm(embedding)
        scale = margin.scale_for(self.scale, cosine.shape[1], norm)
        if isinstance(scale, Tensor):
            scale = scale.to(cosine.dtype)[..., None]
        logits: Tensor = scale * cosine
        return logits

    def topk(self, embedding: Tensor, k: int = 1) -> functional.TopK:
        """The k most similar classes of embeddings [N, D] and their cosines; see :func:`sst_fast.functional.topk`."""
        self._check(embedding)
        normalize = bool(self.options["normalize_prototypes"])
        return functional.topk(embedding, self.weight, k, normalize_prototypes=normalize, sub_centers=self.sub_centers)

    def _check(self, embedding: Tensor) -> None:
        check_tensor("embedding", embedding, (None, self.weight.shape[1]), EMBEDDING_DTYPES, self.weight.device)
