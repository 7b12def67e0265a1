"""The torch.library operators ``sst_fast::*``: one contract for every compiled backend. Callers check the arguments.

No ``from __future__ import annotations`` here: operator schemas are read from the signatures.
"""

from typing import Any, List, Optional, Tuple  # noqa: UP035

import torch
from torch import Tensor

from sst_fast import reference
from sst_fast.backends.choose import compiled, implementation

Maybe = Optional[Tensor]  # noqa: UP045
Results = Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # noqa: UP006


@torch.library.custom_op("sst_fast::margin_softmax", mutates_args=())
def margin_softmax(
    embedding: Tensor, prototypes: Tensor, target: Tensor, identity: Maybe, slot_identity: Maybe, window: Maybe, window_identity: Maybe,
    window_start: Maybe, margin_rows: Maybe, scale_rows: Maybe, kind: int, parameters: List[float], scale: float,  # noqa: UP006
    mask_empty: bool, normalize: bool, label_smoothing: float, straight_through: bool, need_gradient: bool, backend: str,
) -> Results:  # fmt: skip
    """Per-sample loss [N], its gradient for each embedding [N, D] ([0, D] unless wanted), and seven statistics [N]: csrc/ops.h.

    ``margin_rows`` [P, N] and ``scale_rows`` [N], float64, take the place of ``parameters`` and ``scale``.
    """
    run = implementation(backend, "margin_softmax")
    loss, *others = run(
        embedding, prototypes, target, identity, slot_identity, window, window_identity, window_start, margin_rows,
        scale_rows, kind, parameters, scale, mask_empty, normalize, label_smoothing, straight_through, need_gradient,
    )  # fmt: skip
    return (loss, *others)


@margin_softmax.register_fake
def _(embedding: Any, prototypes: Any, *rest: Any) -> Any:
    need_gradient = rest[-2]
    n = embedding.shape[0]
    wide = reference.wide_dtype(embedding, prototypes)
    value, count = (embedding.new_empty((n,), dtype=dtype) for dtype in (wide, torch.int64))
    gradient = embedding.new_empty((n if need_gradient else 0, embedding.shape[1]))
    like = (value, gradient, value, value, value, count, count, count, value)
    return tuple(torch.empty_like(x) for x in like)


@torch.library.custom_op("sst_fast::margin_softmax_backward", mutates_args=())
def margin_softmax_backward(grad_loss: Tensor, gradient: Tensor, embedding: Tensor) -> Tensor:
    """Gradient for the embeddings [N, D]: forward has already found each row's, only the incoming factor is missing.

    ``embedding`` is there for autograd alone: a second derivative with respect to it must fail, not be zero.
    """
    return (grad_loss.unsqueeze(1) * gradient).to(gradient.dtype)


@margin_softmax_backward.register_fake
def _(grad_loss: Any, gradient: Any, embedding: Any) -> Any:
    return torch.empty_like(gradient)


@torch.library.custom_op("sst_fast::prototype_gradient", mutates_args=())
def prototype_gradient(
    grad_loss: Tensor, lse: Tensor, negatives: Tensor, target_slope: Tensor, embedding: Tensor, prototypes: Tensor,
    target: Tensor, identity: Maybe, slot_identity: Maybe, margin_rows: Maybe, scale_rows: Maybe, kind: int,
    parameters: List[float], scale: float, mask_empty: bool, normalize: bool, label_smoothing: float,  # noqa: UP006
    straight_through: bool, backend: str,
) -> Tensor:  # fmt: skip
    """Gradient for the prototypes [K, D], in their dtype: a second sweep, from the log-sum-exp of the first."""
    run = implementation(backend, "prototype_gradient")
    gradient: Tensor = run(
        grad_loss, lse, negatives, target_slope, embedding, prototypes, target, identity, slot_identity, margin_rows,
        scale_rows, kind, parameters, scale, mask_empty, normalize, label_smoothing, straight_through,
    )  # fmt: skip
    return gradient


@prototype_gradient.register_fake
def _(grad_loss: Any, lse: Any, negatives: Any, slope: Any, embedding: Any, prototypes: Any, *rest: Any) -> Any:
    return torch.empty_like(prototypes, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    embedding, prototypes, target, identity, slot_identity, window, *_ = inputs
    tensors = [output[1], embedding]
    ctx.numbers = None
    if ctx.needs_input_grad[1]:
        assert window is None, "prototypes that a window replaces get their gradient from the reference"
        tensors += [output[2], output[7], output[8], prototypes, target, identity, slot_identity, *inputs[8:10]]
        ctx.numbers = (*inputs[10:17], inputs[18])
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Any, *unused: Any) -> Any:
    gradient, embedding, *more = ctx.saved_tensors
    for_embedding = for_prototypes = None
    if grad_loss is not None and ctx.needs_input_grad[0]:
        for_embedding = torch.ops.sst_fast.margin_softmax_backward(grad_loss, gradient, embedding)
    if grad_loss is not None and ctx.numbers is not None:
        lse, negatives, slope, prototypes, *rest = more
        for_prototypes = torch.ops.sst_fast.prototype_gradient(
            grad_loss, lse, negatives, slope, embedding, prototypes, *rest, *ctx.numbers
        )
    return (for_embedding, for_prototypes, *[None] * 17)


def _no_double_backward(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError(
        "sst_fast.margin_softmax has no second derivative: its gradient is found in forward. "
        'backend="reference" has one.'
    )


margin_softmax.register_autograd(_backward, setup_context=_setup_context)
margin_softmax_backward.register_autograd(_no_double_backward)
prototype_gradient.register_autograd(_no_double_backward)


# The queue's operators are registered in csrc/bindings.cpp and choose by the tensors' device.
if compiled is not None:
    torch.library.register_fake("sst_fast::enqueue", lambda *tensors: None)
    torch.library.register_fake("sst_fast::dequeue", lambda count, ids, state: ids.new_empty((count,)))


def enqueue(
    features: Tensor, identities: Tensor, queue: Tensor, queue_identities: Tensor, state: Tensor, backend: str
) -> None:
    """Normalises, casts and writes ``features`` [B, D] into the ring in place, and advances it."""
    if backend == "reference":
        reference.enqueue(features, identities, queue, queue_identities, state)
    else:
        torch.ops.sst_fast.enqueue(features, identities, queue, queue_identities, state)


def dequeue(count: int, queue_identities: Tensor, state: Tensor, backend: str) -> Tensor:
    """Empties the ``count`` oldest slots in place; their identities [count], -1 where there were fewer."""
    if backend == "reference":
        return reference.dequeue(count, queue_identities, state)
    gone: Tensor = torch.ops.sst_fast.dequeue(count, queue_identities, state)
    return gone
