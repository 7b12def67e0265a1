"""The queue's operations by backend: the operators ``torch.ops.sst_fast.*`` of csrc/operators.cpp, or plain PyTorch.

They are called after the arguments have been checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sst_fast import reference
from sst_fast.backends.choose import attempt
from sst_fast.backends.extension import operator

_enqueue, _dequeue, _window = operator("enqueue"), operator("dequeue"), operator("window")


def enqueue(
    features: Tensor, identities: Tensor, queue: Tensor, queue_identities: Tensor, state: Tensor, unit: bool,
    group: Tensor | None, backend: str | None,
) -> None:  # fmt: skip
    """Writes ``features`` [B, D], normalised unless they are ``unit``, into the ring in place, and advances it.

    ``group``, 0-d: which of ``features`` [H, B, D] is written.
    """

    def run(by: str) -> None:
        write = reference.enqueue if by == "reference" else _enqueue
        write(features, identities, queue, queue_identities, state, unit, group)

    attempt(("enqueue", features.device, features.dtype, queue.dtype), backend, run)


def dequeue(count: int, queue_identities: Tensor, state: Tensor, backend: str | None) -> Tensor:
    """Empties the ``count`` oldest slots in place; their identities [count], -1 where there were fewer."""

    def run(by: str) -> Tensor:
        gone: Tensor = (reference.dequeue if by == "reference" else _dequeue)(count, queue_identities, state)
        return gone

    return attempt(("dequeue", state.device, state.dtype), backend, run)


def window(
    groups: Sequence[Tensor], identities: Tensor, state: Tensor, size: int, dtype: torch.dtype, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The slots that a batch is about to take; csrc/ops.h says what the five tensors are."""

    def run(by: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if by == "reference":
            with torch.no_grad():
                return reference.window(groups, identities, state, size, dtype)
        found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _window(groups, identities, state, size, dtype)
        return found

    return attempt(("window", groups[0].device, groups[0].dtype, dtype), backend, run)
