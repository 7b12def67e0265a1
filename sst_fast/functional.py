"""The fused loss as a function: checks its arguments, picks a backend, calls the operator."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from sst_fast import ops, reference
from sst_fast.dispatch import choose
from sst_fast.margins import AMSoftmax, Margin

if TYPE_CHECKING:
    from sst_fast.queue import Window

Reduction = Literal["none", "mean", "sum"]

EMBEDDING_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Statistics(NamedTuple):
    """What the sweep over the queue saw, per probe, each [N], without gradient.

    ``lse`` log-sum-exp of all logits, ``target_cosine``, ``hardest_cosine`` of the slots that are neither target nor
    masked (-inf if there is none) and its ``hardest_slot`` (-1), ``beats_target``: how many of them exceed the target.
    """

    lse: Tensor
    target_cosine: Tensor
    hardest_cosine: Tensor
    hardest_slot: Tensor
    beats_target: Tensor


@overload
def margin_softmax(
    embedding: Tensor, prototypes: Tensor, target: Tensor, *, margin: Margin = ..., scale: float = ...,
    reduction: Reduction = ..., window: Window | None = ..., identity: Tensor | None = ...,
    slot_identity: Tensor | None = ..., mask_empty: bool = ..., normalize_prototypes: bool = ...,
    return_statistics: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def margin_softmax(
    embedding: Tensor, prototypes: Tensor, target: Tensor, *, margin: Margin = ..., scale: float = ...,
    reduction: Reduction = ..., window: Window | None = ..., identity: Tensor | None = ...,
    slot_identity: Tensor | None = ..., mask_empty: bool = ..., normalize_prototypes: bool = ...,
    return_statistics: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Statistics]: ...  # fmt: skip


def margin_softmax(
    embedding: Tensor,
    prototypes: Tensor,
    target: Tensor,
    *,
    margin: Margin = AMSoftmax(0.35),
    scale: float = 30.0,
    reduction: Reduction = "mean",
    window: Window | None = None,
    identity: Tensor | None = None,
    slot_identity: Tensor | None = None,
    mask_empty: bool = True,
    normalize_prototypes: bool = False,
    return_statistics: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Statistics]:
    """Margin-softmax of probes over a gallery queue (Du et al., Semi-Siamese Training, ECCV 2020), in one sweep over the queue.

    With c_ij the cosine of probe i and slot j and a_i that of its target slot y_i,

        loss_i = -s psi(a_i) + log( exp(s psi(a_i)) + sum over unmasked j != y_i of exp(s phi(c_ij)) ).

    No N x K tensor is ever made. The gradient for ``embedding`` is found in the same sweep; ``prototypes`` get one
    if they require it (by plain PyTorch for now). Compiled backends have no second derivative.

    Args:
        embedding: probes [N, D], float64, float32, bfloat16 or float16; normalised inside. A zero row has cosine 0
            with everything and gradient 0.
        prototypes: [K, D], same device, taken as they are: rows should have norm 1 (those of a queue do).
        target: int64 [N], row numbers of ``prototypes``.
        margin: a margin of :mod:`sst_fast.margins`.
        scale: s > 0, the inverse temperature.
        reduction: 'mean' (default), 'sum' or 'none' (float32 [N]; float64 if an input is).
        window: the batch's own slots, from :meth:`sst_fast.GalleryQueue.window`: replaces those rows of
            ``prototypes`` for this call, differently for each group of probes.
        identity: int64 [N]. With ``slot_identity``, a slot of the probe's own identity that is not its target is no
            negative and is masked.
        slot_identity: int64 [K], -1 for an empty slot.
        mask_empty: mask slots with identity -1 (needs ``slot_identity``).
        normalize_prototypes: divide rows of ``prototypes`` by their norm first.
        return_statistics: also return :class:`Statistics`.
        backend: force an implementation, see :func:`sst_fast.backends`.

    Returns:
        The loss, or (loss, statistics).

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, dtype, device or value.
        IndexError: a target outside [0, K).
    """
    check_embedding("embedding", embedding)
    n, d = embedding.shape
    check_tensor("prototypes", prototypes, (None, d), EMBEDDING_DTYPES, embedding.device)
    k = prototypes.shape[0]
    if k == 0:
        raise ValueError("prototypes must have at least one row, got [0, D]")
    check_tensor("target", target, (n,), (torch.int64,), embedding.device)
    if identity is not None:
        check_tensor("identity", identity, (n,), (torch.int64,), embedding.device)
        if slot_identity is None:
            raise ValueError("identity masks slots of the same identity and needs slot_identity as well, got None")
    if slot_identity is not None:
        check_tensor("slot_identity", slot_identity, (k,), (torch.int64,), embedding.device)
    if not isinstance(margin, Margin):
        raise TypeError(f"margin must be a margin of sst_fast.margins, got {type(margin).__name__}")
    if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a finite number > 0, got {scale!r}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if reduction == "mean" and n == 0:
        raise ValueError("embedding must have at least one row for reduction='mean', got [0, D]")

    features = window_identity = start = None
    if window is not None:
        features, window_identity, start = window.features, window.identities, window.start
        check_tensor("window.features", features, (None, None, d), EMBEDDING_DTYPES, embedding.device)
        h, b = features.shape[:2]
        check_tensor("window.identities", window_identity, (b,), (torch.int64,), embedding.device)
        if h == 0 or n % h:
            raise ValueError(f"embedding: {n} rows cannot be split evenly over the window's {h} groups")
        if b > k:
            raise ValueError(f"window holds {b} slots, more than the {k} rows of prototypes")
        features = features.to(prototypes.dtype)

    chosen = choose("margin_softmax", embedding.device, backend)
    if normalize_prototypes:
        wide = torch.promote_types(prototypes.dtype, torch.float32)
        prototypes = reference.normalize(prototypes.to(wide))
        features = None if features is None else reference.normalize(features.to(wide).flatten(0, 1)).view_as(features)
    rest = (target, identity, slot_identity, features, window_identity, start)
    grad = torch.is_grad_enabled()
    if chosen == "reference" or (grad and prototypes.requires_grad):
        plain = reference.margin_softmax(embedding, prototypes, *rest, margin, float(scale), mask_empty)
        loss, statistics = plain.loss, Statistics(*plain[1:])
    else:
        loss, _, *columns = ops.margin_softmax(
            embedding, prototypes, *rest, margin.kind, margin.parameters(), float(scale), mask_empty,
            grad and embedding.requires_grad, chosen,
        )  # fmt: skip
        statistics = Statistics(*columns)
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return (loss, statistics) if return_statistics else loss


def check_embedding(name: str, value: Tensor) -> None:
    """TypeError or ValueError unless ``value`` is a floating-point [N, D] with D > 0."""
    check_tensor(name, value, (None, None), EMBEDDING_DTYPES, None)
    if value.shape[1] == 0:
        raise ValueError(f"{name} must have D > 0 features, got shape {list(value.shape)}")


def check_tensor(
    name: str,
    value: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None,
) -> None:
    """TypeError or ValueError that names the argument, what was expected and what came."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}")
    fits = value.dim() == len(shape) and all(e is None or e == s for e, s in zip(shape, value.shape, strict=True))
    if not fits:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{expected}], got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {value.device}")
