"""Several processes: what losses exchange between ranks, and how losses over queue shards are combined.

There are W ranks, each with its own batch of B identities. Every rank must bring the same B (as DistributedSampler with ``drop_last``
does); :func:`assert_same_batch` checks it. In all functions ``group`` is the process group (default: all processes). All ranks of the
group must call them. Without a process group there is one rank, and nothing is exchanged.
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
    """Begins :func:`gather`. Call what it returns for the result; that waits. Work in between overlaps with the transfer."""
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
    """The ``x`` [B, ...] of all ranks as [W B, ...], in order of rank, without gradient. Any dtype; the same shape on every rank."""
    return begin_gather(x, group)()


def begin_shift(x: Tensor, group: Group = None) -> Callable[[], Tensor]:
    """Begins to send ``x`` to the next rank of a ring. Call what it returns for the previous rank's tensor; that waits.

    Without gradient. Shape and dtype must be the same on every rank. After W shifts each tensor is back on its own rank.
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
    """Checks that ``batch`` [B, ...] has the same B on every rank. Where shapes differ, collectives end the process or hang.

    Sizes are exchanged on the host, so that it does not wait for the device. If the batch is on a device and the group has no backend
    for the host (such as gloo), nothing is checked.

    Raises:
        ValueError: the sizes differ; on every rank, with all sizes.
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
    """Checks that settings are the same on every rank, and that no rank has met an error.

    If one rank alone raised an error, the others would wait for it without end. So all ranks raise one. Waits for all ranks, and for
    the device.

    Args:
        settings: name -> value.
        error: what is wrong on this rank, or None.
        device: where tensors of the exchange may be.

    Raises:
        Exception: ``error``, if there is one. Otherwise the first other rank's error, of the same type, with the rank's number.
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
    """Overwrites ``x`` with rank 0's, in place, and returns it. Shape and dtype must be the same on every rank."""
    if ranks(group)[1] > 1:
        dist.broadcast(x, 0 if group is None else dist.get_global_rank(group, 0), group=group)
    return x


def sum_of(x: Tensor, group: Group = None) -> Tensor:
    """Sum of ``x`` over ranks, without gradient; ``x`` stays as it is."""
    if ranks(group)[1] == 1:
        return x
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def mean(x: Tensor, group: Group = None) -> Tensor:
    """Mean of ``x`` over ranks, without gradient; ``x`` stays as it is."""
    return sum_of(x.detach(), group) / ranks(group)[1]


class _Gather(torch.autograd.Function):
    """:func:`gather`. A row's gradient is summed over ranks and goes back to the rank that the row came from."""

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
    """``x``, which has the same values on every rank. Its gradient is the mean over ranks."""
    same: Tensor = _Replicated.apply(x, group)
    return same


def gather_with_gradient(x: Tensor, group: Group = None) -> Tensor:
    """:func:`gather` with gradient: ``x`` gets that of the *sum* over ranks of what each rank computes from the result."""
    gathered: Tensor = _Gather.apply(x, group)
    return gathered


def combine_shards(mine: Tensor, group: Group = None) -> Tensor:
    """Losses over the whole queue, [N], from this rank's losses over its shard, ``mine`` [N]. The result is the same on every rank.

    Row i is the same probe on every rank. With t its target logit and z the negatives' logits, a shard's loss is
    log(1 + sum over the shard of exp(z - t)), so

        loss = log(1 + sum over shards of (exp(loss_r) - 1)),   d loss / d loss_r = exp(loss_r - loss).

    This factor turns the gradient over one shard into that shard's part of the whole gradient. The gradient is that of the *sum* over
    ranks of what each rank computes from the losses. So each rank should use only the rows of its own probes.
    """
    loss: Tensor = _Combine.apply(mine, group)
    return loss


def assert_same(tensors: dict[str, Tensor], group: Group = None) -> None:
    """Checks that tensors are the same on every rank, bit for bit. Waits for all ranks and for the device.

    Args:
        tensors: name -> tensor, with the same names in the same order on every rank.

    Raises:
        RuntimeError: a tensor differs; names it and the ranks where it differs from rank 0's.
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
