"""Several processes: what Semi-Siamese Training exchanges between ranks, and how losses over queue shards are combined.

W ranks, each with its own batch of B identities; every rank must bring the same B (as DistributedSampler with
``drop_last`` does), which :func:`assert_same_batch` checks.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # PyTorch imports it when it first compiles, and its default arguments hold on to a process group that runs by then: that group
    # would outlive destroy_process_group(), its threads the interpreter.
    importlib.import_module("torch.distributed.nn")

Group = Any  # torch.distributed.ProcessGroup, which builds of PyTorch without distributed lack
Average = Callable[[Tensor], Tensor] | None


def ranks(group: Group = None) -> tuple[int, int]:
    """(rank, number of ranks W); (0, 1) where no process group runs."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def begin_gather(x: Tensor, group: Group = None) -> Callable[[], Tensor]:
    """Begins :func:`gather`; what it returns waits for the end and gives the result. Compute in between overlaps with it."""
    _, world = ranks(group)
    mine = x.detach().contiguous()
    if world == 1:
        return lambda: mine
    # As bytes: not every backend knows every dtype.
    parts = [torch.empty_like(mine) for _ in range(world)]
    work: Any = dist.all_gather(
        [part.view(torch.uint8) for part in parts], mine.view(torch.uint8), group=group, async_op=True
    )

    def end() -> Tensor:
        work.wait()
        return torch.cat(parts)

    return end


def gather(x: Tensor, group: Group = None) -> Tensor:
    """Tensors [B, ...] of all ranks as [W B, ...], in order of rank, without gradient. Any dtype."""
    return begin_gather(x, group)()


def begin_shift(x: Tensor, group: Group = None) -> Callable[[], Tensor]:
    """Begins to send ``x`` to the next rank of a ring; what it returns waits for, and gives, the previous rank's, without gradient.

    Every rank's has the same shape and dtype. After as many shifts as there are ranks each is home again.
    """
    rank, world = ranks(group)
    mine = x.detach().contiguous()
    arriving = torch.empty_like(mine)
    to, source = (((rank + step) % world) for step in (1, -1))
    if group is not None:
        to, source = dist.get_global_rank(group, to), dist.get_global_rank(group, source)
    # As bytes: not every backend knows every dtype.
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, mine.view(torch.uint8), to, group),
            dist.P2POp(dist.irecv, arriving.view(torch.uint8), source, group),
        ]
    )

    def end() -> Tensor:
        for work in works:
            work.wait()
        return arriving

    return end


def assert_same_batch(batch: Tensor, group: Group = None) -> None:
    """Every rank must bring as many rows: backends end the process, or hang, where shapes differ.

    Asked on the host, so that no device is waited for; where the group has no backend for the host, nothing is asked.

    Raises:
        ValueError: on every rank, naming the sizes.
    """
    if ranks(group)[1] == 1 or (batch.device.type != "cpu" and not _speaks_on_the_host(group)):
        return
    counts = gather(torch.tensor([batch.shape[0]]), group).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"every rank must bring a batch of the same size, got {counts} on ranks 0 to {len(counts) - 1}"
        )


def assert_agreed(
    settings: dict[str, object], error: Exception | None, device: torch.device, group: Group = None
) -> None:
    """What every rank must have alike, and what is wrong on one of them: raised on all, so that nobody waits for a rank that left.

    Waits for all ranks, and for the device. ``error`` is this rank's own, or None.

    Raises:
        ``error`` where there is one; on ranks without, the first other rank's, its type kept and the rank named.
        ValueError: a setting differs between ranks; names it and the values.
    """
    digest = hashlib.sha256(repr((settings, error)).encode()).digest()[:8]
    digests = gather(torch.frombuffer(bytearray(digest), dtype=torch.int64).to(device), group).tolist()
    if error is not None and len(digests) == 1:
        raise error
    if error is None and len(set(digests)) == 1:
        return
    everyone: list[Any] = [None] * len(digests)
    dist.all_gather_object(everyone, (settings, error), group=group)
    if error is not None:
        raise error
    for rank, (_, found) in enumerate(everyone):
        if found is not None:
            raise type(found)(f"rank {rank}: {found}")
    for name in settings:
        values = [theirs.get(name) for theirs, _ in everyone]
        if any(value != values[0] for value in values):
            said = ", ".join(f"{value} on rank {r}" for r, value in enumerate(values))
            raise ValueError(f"{name} must be the same on every rank, got {said}")


def _speaks_on_the_host(group: Group) -> bool:
    return "cpu" in str(dist.get_backend_config(group))


def from_first(x: Tensor, group: Group = None) -> Tensor:
    """Rank 0's tensor, on every rank."""
    if ranks(group)[1] > 1:
        dist.broadcast(x, 0 if group is None else dist.get_global_rank(group, 0), group=group)
    return x


def sum_of(x: Tensor, group: Group = None) -> Tensor:
    """Sum over ranks, without gradient."""
    if ranks(group)[1] == 1:
        return x
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def mean(x: Tensor, group: Group = None) -> Tensor:
    """Mean over ranks, without gradient."""
    return sum_of(x.detach(), group) / ranks(group)[1]


class _Gather(torch.autograd.Function):
    """:func:`gather` whose gradient goes back to the rank a row came from, summed over the ranks that used it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rank, world = ranks(ctx.group)
        return sum_of(grad, ctx.group).chunk(world)[rank], None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: Group) -> Tensor:
        parts = gather(mine[None], group)
        # u = log(e^loss - 1), the negatives' log-sum-exp less the target logit.
        excess = torch.where(parts <= 0, -torch.inf, parts + (-torch.expm1(-parts)).log())  # a NaN stays one
        loss = torch.logaddexp(torch.zeros_like(mine), torch.logsumexp(excess, 0))
        ctx.save_for_backward((mine - loss).exp())
        ctx.group = group
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        return sum_of(grad, ctx.group) * share, None


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return mean(grad, ctx.group), None


def replicated(x: Tensor, group: Group = None) -> Tensor:
    """``x``, a parameter that is the same on every rank, with the mean over ranks as its gradient."""
    same: Tensor = _Replicated.apply(x, group)
    return same


def gather_with_gradient(x: Tensor, group: Group = None) -> Tensor:
    """:func:`gather` with gradient: of the *sum* over ranks of what each rank computes from it."""
    gathered: Tensor = _Gather.apply(x, group)
    return gathered


def combine_shards(mine: Tensor, group: Group = None) -> Tensor:
    """Losses [N] over the whole queue from each rank's losses over its shard, the same on every rank.

    With t the target logit and z the negatives' logits, a shard's loss is log(1 + sum over the shard of exp(z - t)), so

        loss = log(1 + sum over shards of (exp(loss_r) - 1)),   d loss / d loss_r = exp(loss_r - loss):

    a shard's own gradient needs no more than this factor to become its part of the whole one. The gradient is that of the
    *sum* over ranks of what each computes from the losses: let each rank use its own rows.
    """
    loss: Tensor = _Combine.apply(mine, group)
    return loss


def assert_same(tensors: dict[str, Tensor], group: Group = None) -> None:
    """Waits for all ranks and the device; nothing to do for a single process.

    Raises:
        RuntimeError: a tensor is not the same on every rank, bit for bit; names it and the ranks that differ from rank 0.
    """
    if ranks(group)[1] == 1:
        return
    for name, tensor in tensors.items():
        content = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest = torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
        rows = gather(digest.to(tensor.device)[None], group)
        other = (rows != rows[0]).any(1).nonzero().flatten().tolist()
        if other:
            raise RuntimeError(f"{name} differs between processes: rank {', '.join(map(str, other))} from rank 0")
