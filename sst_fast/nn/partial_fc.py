"""Partial FC: class weights that are divided among ranks, and of which each step trains a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sst_fast import distributed, functional
from sst_fast.arguments import (
    GradientRule,
    check_count,
    check_embedding,
    check_margin,
    check_options,
    check_scale,
    check_tensor,
    is_number,
)
from sst_fast.loss import RunningMargin, over_shards, splits_over_shards
from sst_fast.margins import AMSoftmax, Margin, Parameter

IGNORED, ELSEWHERE = (
    -100,
    -1,
)  # row number of a probe's target where the probe is ignored, or another rank holds the target


class PartialFC(nn.Module):
    """Partial FC (An et al., CVPR 2022): learned class weights, a slice of them on each rank, and a sample of them in each step.

    Of W ranks, rank r holds the C_r rows of the weights [C, D] from ``first`` on. The C_r differ by 1 at most. In training each rank
    draws a sample of ``sample_rate`` C_r of its classes in each step. Its classes that occur in the batches of all ranks are always in
    it, even if they are more than that. The rest is drawn evenly and without repetition. The softmax runs over what all ranks have
    drawn; in evaluation mode over all classes.

    With a sample the gradient of ``weight`` is sparse: it has the rows that were drawn. :class:`sst_fast.nn.RowSGD` and
    :class:`sst_fast.nn.RowAdamW` leave the other rows as they are. With ``sparse=False`` the gradient is dense, and zero in the
    other rows. An optimizer of PyTorch then moves those too, by momentum and weight decay, as in insightface's partial FC v2.

    Leave this module out of DistributedDataParallel and FSDP: its weights differ between ranks. The value is the mean over the
    batches of all ranks, the same on each rank. All ranks must call ``backward``. It gives ``weight`` the gradient of that mean. The
    embeddings get W times their gradient of it, since DistributedDataParallel and FSDP divide the network's gradients by W. In one
    step all ranks must bring the same number of embeddings. It may change from step to step.

    Args:
        classes: number C of classes of all ranks, at least 2 and at least W.
        dim: number of features D.
        margin: a margin of :mod:`sst_fast.margins` that needs no sum over all classes (not NPCFace, AdaCos).
        scale: inverse temperature s in (0, 1000]. It and the margin's numbers may be 0-d parameters with the same value on every
            rank. Their gradients are then the same too.
        sample_rate: share of a rank's classes that a step trains, in (0, 1].
        sparse: see above; without effect where ``sample_rate`` is 1.
        gradient: 'exact' or 'straight_through', as in :func:`sst_fast.functional.margin_softmax`.
        ignore_index: embeddings with this target have loss 0 and do not count in the mean.
        generator: for the draws; default: PyTorch's own on the weight's device.
        group: the process group; default: all processes. Without a process group there is one rank.
        backend: force an implementation, see :func:`sst_fast.backends`.

    Attributes:
        weight: [C_r, D], at the start normal with standard deviation 0.01. Ranks with the same seed have different rows.
        first: number of this rank's first class.
        sampled: int64, ascending: the rows of ``weight`` that the last step used; None: all of them.
        statistics: :class:`sst_fast.functional.Statistics` of all ranks' embeddings over this rank's rows, after each call.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """

    statistics: functional.Statistics | None
    sampled: Tensor | None

    def __init__(
        self,
        classes: int,
        dim: int,
        margin: Margin = AMSoftmax(0.35),
        scale: Parameter = 64.0,
        *,
        sample_rate: float = 1.0,
        sparse: bool = True,
        gradient: GradientRule = "exact",
        ignore_index: int = -100,
        generator: torch.Generator | None = None,
        group: distributed.Group = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.classes, self.dim = check_count("classes", classes, 2), check_count("dim", dim, 1)
        self.rank, self.world = distributed.ranks(group)
        if self.classes < self.world:
            raise ValueError(f"classes must be at least {self.world}, the number of ranks, got {classes}")
        check_margin(margin)
        if not splits_over_shards(margin):
            raise ValueError(f"margin must be one that needs no sum over all classes, got {margin!r}")
        for name, value in (("scale", scale), *vars(margin).items()):
            if isinstance(value, Tensor) and value.dim():
                raise ValueError(
                    f"{name} must be a number or a tensor [], the same for all ranks, got {list(value.shape)}"
                )
        check_scale(scale)
        check_options(gradient=gradient, ignore_index=ignore_index)
        if not is_number(sample_rate) or not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate!r}")
        sizes = shard_sizes(self.classes, self.world)
        self.first = sum(sizes[: self.rank])
        # Ranks with the same seed would otherwise begin with the same rows.
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")) + self.rank)
        rows = torch.empty(sizes[self.rank], self.dim, device="cpu").normal_(std=0.01, generator=own)
        self.weight = nn.Parameter(rows.to(torch.get_default_device()))
        self.margin = RunningMargin(margin)
        self.scale = scale
        self.sample_rate = float(sample_rate)
        self.sparse = sparse
        self.gradient = gradient
        self.ignore_index = ignore_index
        self.generator = generator
        self.group = group
        self.backend = backend
        self.sampled = self.statistics = None

    def extra_repr(self) -> str:
        """Sizes and rate."""
        return f"classes={self.classes}, dim={self.dim}, first={self.first}, sample_rate={self.sample_rate:g}"

    def forward(self, embedding: Tensor, target: Tensor) -> Tensor:
        """Mean loss over all ranks, 0-d.

        Args:
            embedding: [B, D] of this rank; normalised inside.
            target: class numbers in [0, C) or ``ignore_index``, int64 [B].

        Raises:
            TypeError, ValueError, IndexError: on every rank, if one of them brings an argument of a wrong type, shape, dtype or
                device, or a class number out of range, or if settings or batch sizes differ between ranks.
        """
        self._check(embedding, target)
        embeddings = distributed.gather_with_gradient(embedding, self.group)
        target = distributed.gather(target, self.group)
        counts = target != self.ignore_index
        row = target - self.first
        held = counts & (row >= 0) & (row < len(self.weight))
        self.sampled = self._draw(row[held]) if self.training and self.sample_rate < 1 else None
        if self.sampled is not None:
            row = torch.searchsorted(self.sampled, row)
        row = row.masked_fill(~held, ELSEWHERE)
        rows, targets = _Rows.apply(self.weight, self.sampled, row, self.sparse, self.group)
        row = row.masked_fill(~counts, IGNORED)
        if self.training:
            each = torch.arange(len(target), device=target.device).masked_fill(~counts, IGNORED)
            self.margin.follow(embeddings, targets, each, normalize_prototypes=True)
        margin = self.margin.current()
        if margin.trains:
            margin = margin.map(lambda value: distributed.replicated(value, self.group))
        scale = self.scale
        if isinstance(scale, Tensor) and scale.requires_grad:
            scale = distributed.replicated(scale, self.group)
        losses, self.statistics = over_shards(
            embeddings, rows, row, positive=targets, margin=margin, scale=scale, gradient=self.gradient,
            normalize_prototypes=True, ignore_index=IGNORED, backend=self.backend, group=self.group,
        )  # fmt: skip
        mean: Tensor = losses.sum() / counts.sum().clamp_min(1)
        return mean

    def _draw(self, positive: Tensor) -> Tensor:
        """Rows of this step, ascending: all those in ``positive``, and others up to the sample's size."""
        order = torch.rand(len(self.weight), device=self.weight.device, generator=self.generator)
        order[positive] = 2.0
        count = max(int(self.sample_rate * len(self.weight)), 1)
        if count < len(positive):
            count = max(count, len(positive.unique()))
        return order.topk(count, sorted=False).indices.sort().values

    def _check(self, embedding: Tensor, target: Tensor) -> None:
        error: Exception | None = None
        try:
            if distributed.ranks(self.group) != (self.rank, self.world):
                raise ValueError(
                    f"PartialFC was made as rank {self.rank} of {self.world} and is now rank and world "
                    f"{distributed.ranks(self.group)}: make it after the process group"
                )
            check_embedding("embedding", embedding)
            check_tensor("embedding", embedding, (None, self.dim), (embedding.dtype,), self.weight.device)
            if not len(embedding):
                raise ValueError("embedding must have at least one row, got [0, D]")
            check_tensor("target", target, (len(embedding),), (torch.int64,), self.weight.device)
            wrong = (target != self.ignore_index) & ((target < 0) | (target >= self.classes))
            if bool(wrong.any()):
                at = int(wrong.nonzero()[0])
                raise IndexError(f"target[{at}] is {int(target[at])}, expected a class number in [0, {self.classes})")
        except Exception as caught:
            error = caught
        settings = {
            "classes": self.classes, "dim": self.dim, "margin": describe(self.margin.margin),
            "scale": "tensor" if isinstance(self.scale, Tensor) else self.scale, "sample_rate": self.sample_rate,
            "gradient": self.gradient, "ignore_index": self.ignore_index, "training": self.training,
            "weight.dtype": self.weight.dtype,
        }  # fmt: skip
        if error is None:
            settings |= {"embedding.dtype": embedding.dtype, "size of the batch": len(embedding)}
        distributed.assert_agreed(settings, error, self.weight.device, self.group)


class _Rows(torch.autograd.Function):
    """This rank's rows that take part, and the target rows of all probes [N, D], from the ranks that hold them."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, sampled: Tensor | None, row: Tensor, sparse: bool, group: distributed.Group
    ) -> tuple[Tensor, Tensor]:
        """``row`` [N]: the probes' targets among the rows that take part, < 0 where another rank holds them."""
        ctx.save_for_backward(sampled, row)
        ctx.shape, ctx.sparse, ctx.group = weight.shape, sparse, group
        rows = weight if sampled is None else weight[sampled]
        targets = rows[row.clamp_min(0)].masked_fill_((row < 0)[:, None], 0)
        return rows, distributed.sum_of(targets, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_targets: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Incoming gradients add up over ranks to W times the mean's. DDP does not average those of rows, so they are divided here."""
        sampled, row = ctx.saved_tensors
        of_targets = distributed.sum_of(grad_targets, ctx.group).masked_fill((row < 0)[:, None], 0)
        grad = grad.index_add_(0, row.clamp_min(0), of_targets)  # nobody else has it: no second copy of all rows
        grad = grad.div_(distributed.ranks(ctx.group)[1])
        if sampled is not None:
            found = torch.sparse_coo_tensor(
                sampled[None], grad, ctx.shape, is_coalesced=True, check_invariants=False
            )  # ascending, without repetition
            grad = found if ctx.sparse else found.to_dense()
        return grad, None, None, None, None


def describe(margin: Margin) -> str:
    """The margin's name and numbers, with 'tensor' in the place of a tensor."""
    values = (
        f"{name}={'tensor' if isinstance(v, Tensor) else repr(v)}" for name, v in vars(margin).items() if name[0] != "_"
    )
    return f"{type(margin).__name__}({', '.join(values)})"


def shard_sizes(classes: int, world: int) -> list[int]:
    """How many classes each rank holds. If they cannot hold equally many, the first ranks hold one more."""
    return [classes // world + (rank < classes % world) for rank in range(world)]


def merge_state_dicts(shards: Sequence[Mapping[str, Any]], name: str | int = "weight") -> dict[str, Any]:
    """Joins the state dicts of all ranks into that of a :class:`PartialFC` in one process.

    They may be state dicts of the :class:`PartialFC`, of a module that contains it, or of an optimizer. Tensors with a row for each
    class are joined, on the CPU. All else is taken from rank 0. :func:`split_state_dict` then gives state dicts for another number of
    ranks.

    Args:
        shards: the state dicts of ranks 0 to W - 1, in this order.
        name: which parameter the weights are: in a module's state dict their key, such as 'head.weight'; in an optimizer's their
            number in ``state``.

    Raises:
        KeyError: there is no such parameter.
        ValueError: there are no shards, or they are not those of all ranks in order.
    """
    if not shards:
        raise ValueError("shards must hold the state dict of at least one rank, got none")
    parts = [_of_rows(shard, name) for shard in shards]
    merged = {}
    for key in parts[0]:
        if any(key not in part for part in parts):
            raise ValueError(f"shards must hold {key!r} on every rank, got it on some")
        sizes = [len(part[key]) for part in parts]
        if sizes != shard_sizes(sum(sizes), len(sizes)):
            raise ValueError(f"shards must be those of all ranks, in order, got {sizes} rows of {key!r}")
        merged[key] = torch.cat([part[key].cpu() for part in parts])
    return _with_rows(shards[0], name, merged)


def split_state_dict(whole: Mapping[str, Any], world: int, name: str | int = "weight") -> list[dict[str, Any]]:
    """The state dicts of ``world`` ranks, from the whole one: the reverse of :func:`merge_state_dicts`.

    Args:
        whole: a state dict with all classes.
        world: number of ranks W, at most the number of classes.
        name: as in :func:`merge_state_dicts`.

    Raises:
        KeyError: there is no such parameter.
        ValueError: ``world`` is out of range.
    """
    world = check_count("world", world, 1)
    rows = _of_rows(whole, name)
    for key, value in rows.items():
        if len(value) < world:
            raise ValueError(f"world must be at most {len(value)}, the rows of {key!r}, got {world}")
    parts = {key: value.split(shard_sizes(len(value), world)) for key, value in rows.items()}
    return [_with_rows(whole, name, {key: part[r].clone() for key, part in parts.items()}) for r in range(world)]


def _of_rows(state: Mapping[str, Any], name: str | int) -> dict[str, Tensor]:
    """The tensors that have a row for each class."""
    held: Mapping[Any, Any] = state["state"] if "param_groups" in state else state
    if name not in held:
        raise KeyError(f"{name!r} is no parameter of this state dict, which has {', '.join(map(repr, held)) or 'none'}")
    if held is state:
        return {str(name): held[name]}
    return {key: value for key, value in held[name].items() if isinstance(value, Tensor) and value.dim()}


def _with_rows(state: Mapping[str, Any], name: str | int, rows: dict[str, Tensor]) -> dict[str, Any]:
    """A copy of ``state`` in which ``rows`` replace the tensors of the same names."""
    if "param_groups" in state:
        return {**state, "state": {**state["state"], name: {**state["state"][name], **rows}}}
    return {**state, **rows}
