"""The queue's operations by backend: the operators ``torch.ops.sst_fast.*`` of csrc/operators.cpp, or plain PyTorch.

They are called after the arguments have been checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sst_fast import reference
from sst_fast.backends.backend import Problem
from sst_fast.backends.choose import choose


def _plain(operation: str, tensor: Tensor, queue_dtype: torch.dtype, backend: str | None) -> bool:
    return choose(Problem(operation, tensor.device, tensor.dtype, queue_dtype), backend) == "reference"


def enqueue(
    features: Tensor, identities: Tensor, queue: Tensor, queue_identities: Tensor, state: Tensor, unit: bool,
    group: Tensor | None, backend: str | None,
) -> None:  # fmt: skip
    """Writes ``features`` [B, D], normalised unless they are ``unit``, into the ring in place, and advances it.

    ``group``, 0-d: which of ``features`` [H, B, D] is written.
    """
    plain = _plain("enqueue", features, queue.dtype, backend)
    run = reference.enqueue if plain else torch.ops.sst_fast.enqueue
    run(features, identities, queue, queue_identities, state, unit, group)


def dequeue(count: int, queue_identities: Tensor, state: Tensor, backend: str | None) -> Tensor:
    """Empties the ``count`` oldest slots in place; their identities [count], -1 where there were fewer."""
    plain = _plain("dequeue", state, torch.float32, backend)
    gone: Tensor = (reference.dequeue if plain else torch.ops.sst_fast.dequeue)(count, queue_identities, state)
    return gone


def window(
    groups: Sequence[Tensor], identities: Tensor, state: Tensor, size: int, dtype: torch.dtype, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The slots that a batch is about to take; csrc/ops.h says what the five tensors are."""
    run = reference.window if _plain("window", groups[0], dtype, backend) else torch.ops.sst_fast.window
    unit, start, targets, owners, held = run(groups, identities, state, size, dtype)
    return unit, start, targets, owners, held
