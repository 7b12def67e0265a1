"""The torch.library operators ``sst_fast::*``: one contract for every compiled backend. Callers check the arguments.

No ``from __future__ import annotations`` here: operator schemas are read from the signatures.
"""

from typing import Any, List, Optional, Tuple  # noqa: UP035

import torch
from torch import Tensor

from sst_fast import reference
from sst_fast.dispatch import compiled

Results = Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # noqa: UP006


@torch.library.custom_op("sst_fast::margin_softmax", mutates_args=())
def margin_softmax(
    embedding: Tensor,
    prototypes: Tensor,
    target: Tensor,
    identity: Optional[Tensor],  # noqa: UP045
    slot_identity: Optional[Tensor],  # noqa: UP045
    window: Optional[Tensor],  # noqa: UP045
    window_identity: Optional[Tensor],  # noqa: UP045
    window_start: Optional[Tensor],  # noqa: UP045
    kind: int,
    parameters: List[float],  # noqa: UP006
    scale: float,
    mask_empty: bool,
    need_gradient: bool,
    backend: str,
) -> Results:
    """Per-sample loss [N], its gradient for each embedding [N, D] ([0, D] unless wanted), and statistics [N]."""
    run = getattr(compiled, f"{backend}_margin_softmax")
    results: Results = run(
        embedding, prototypes, target, identity, slot_identity, window, window_identity, window_start,
        kind, parameters, scale, mask_empty, need_gradient,
    )  # fmt: skip
    return results


@margin_softmax.register_fake
def _(embedding: Any, prototypes: Any, *rest: Any) -> Any:
    need_gradient = rest[-2]
    n = embedding.shape[0]
    wide = torch.promote_types(torch.promote_types(embedding.dtype, prototypes.dtype), torch.float32)
    values = [embedding.new_empty((n,), dtype=wide) for _ in range(4)]
    counts = [embedding.new_empty((n,), dtype=torch.int64) for _ in range(2)]
    gradient = embedding.new_empty((n if need_gradient else 0, embedding.shape[1]))
    return (values[0], gradient, *values[1:], *counts)


@torch.library.custom_op("sst_fast::margin_softmax_backward", mutates_args=())
def margin_softmax_backward(grad_loss: Tensor, gradient: Tensor, embedding: Tensor) -> Tensor:
    """Gradient for the embeddings [N, D]: forward has already found each row's, only the incoming factor is missing.

    ``embedding`` is there for autograd alone: a second derivative with respect to it must fail, not be zero.
    """
    return (grad_loss.unsqueeze(1) * gradient).to(gradient.dtype)


@margin_softmax_backward.register_fake
def _(grad_loss: Any, gradient: Any, embedding: Any) -> Any:
    return torch.empty_like(gradient)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_loss: Tensor, *unused: Any) -> Any:
    return (torch.ops.sst_fast.margin_softmax_backward(grad_loss, *ctx.saved_tensors), *[None] * 13)


def _no_double_backward(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError(
        "sst_fast.margin_softmax has no second derivative: its gradient is found in forward. "
        'backend="reference" has one.'
    )


margin_softmax.register_autograd(_backward, setup_context=_setup_context)
margin_softmax_backward.register_autograd(_no_double_backward)


@torch.library.custom_op("sst_fast::enqueue", mutates_args=("queue", "queue_identities", "state"))
def enqueue(
    features: Tensor, identities: Tensor, queue: Tensor, queue_identities: Tensor, state: Tensor, backend: str
) -> None:
    """Normalises, casts and writes ``features`` [B, D] into the ring in place, and advances it."""
    tensors = (features.detach(), identities, queue, queue_identities, state)
    if backend == "reference":
        reference.enqueue(*tensors)
    else:
        getattr(compiled, f"{backend}_enqueue")(*tensors)


@torch.library.custom_op("sst_fast::dequeue", mutates_args=("queue_identities", "state"))
def dequeue(count: int, queue_identities: Tensor, state: Tensor, backend: str) -> Tensor:
    """Empties the ``count`` oldest slots in place; their identities [count], -1 where there were fewer."""
    if backend == "reference":
        return reference.dequeue(count, queue_identities, state)
    gone: Tensor = getattr(compiled, f"{backend}_dequeue")(count, queue_identities, state)
    return gone


@enqueue.register_fake
def _(features: Any, identities: Any, queue: Any, queue_identities: Any, state: Any, backend: Any) -> None:
    return None


@dequeue.register_fake
def _(count: Any, queue_identities: Any, state: Any, backend: Any) -> Any:
    return queue_identities.new_empty((count,))
