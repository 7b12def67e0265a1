"""Plain PyTorch statements of every operation: what the fast versions must equal, and what runs where they are missing.

Sizes: N probes, K slots, D features, B slots in the batch window, H groups of probes that see different windows.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sst_fast.margins import Margin, Parameter

MIN_NORM = 1e-12  # a shorter embedding has no direction: cosine 0 with everything, gradient 0


class MarginSoftmax(NamedTuple):
    """Per-sample results, each [N]; see :func:`sst_fast.functional.margin_softmax`."""

    loss: Tensor
    lse: Tensor
    target_cosine: Tensor
    hardest_cosine: Tensor
    hardest_slot: Tensor
    beats_target: Tensor


def wide_dtype(embedding: Tensor, prototypes: Tensor) -> torch.dtype:
    """In which losses are returned: float32, or float64 if an input is."""
    return torch.float64 if torch.float64 in (embedding.dtype, prototypes.dtype) else torch.float32


def normalize(x: Tensor) -> Tensor:
    """Rows of ``x`` [N, D] divided by their norm; rows shorter than 1e-12 become zero. No overflow at any finite x."""
    largest = x.detach().abs().amax(1, keepdim=True)
    usable = largest > 0
    x = x / torch.where(usable, largest, torch.ones_like(largest))
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    tiny = norm.detach() * largest < MIN_NORM
    return torch.where(tiny, torch.zeros_like(x), x / torch.where(tiny, torch.ones_like(norm), norm))


def window_slots(start: Tensor, size: int, slots: int) -> Tensor:
    """Slot numbers [size] of a batch window that begins at ``start`` (0-d) in a ring of ``slots`` slots."""
    return (start + torch.arange(size, device=start.device)) % slots


def margin_softmax(
    embedding: Tensor,
    prototypes: Tensor,
    target: Tensor,
    identity: Tensor | None,
    slot_identity: Tensor | None,
    window: Tensor | None,
    window_identity: Tensor | None,
    window_start: Tensor | None,
    margin: Margin,
    scale: Parameter,
    mask_empty: bool,
    label_smoothing: float = 0.0,
    straight_through: bool = False,
) -> MarginSoftmax:
    """Differentiable in ``embedding`` and ``prototypes``; materialises the logits. Arguments as in the operator."""
    wide = wide_dtype(embedding, prototypes)
    if not torch.compiler.is_compiling() and not bool(((target >= 0) & (target < len(prototypes))).all()):
        bad = int(((target < 0) | (target >= len(prototypes))).nonzero()[0])
        raise IndexError(
            f"target[{bad}] is {int(target[bad])}, expected a row number of prototypes in [0, {len(prototypes)})"
        )
    # The target cosine in float64: near +-1 an angular margin's slope magnifies its rounding, and it costs N x D only.
    exact = normalize(embedding.double())
    unit = exact.to(wide)
    groups = 1 if window is None else len(window)
    parts = []
    for group, rows in enumerate(torch.arange(len(unit), device=unit.device).tensor_split(groups)):
        w, ids = prototypes.to(wide, copy=True), slot_identity  # a copy: the queue changes before backward
        if window is not None:
            assert window_start is not None
            slots = window_slots(window_start, window.shape[1], len(prototypes))
            w = w.index_copy(0, slots, window[group].to(wide))
            ids = None if ids is None or window_identity is None else ids.index_copy(0, slots, window_identity)
        some = partial(_rows, rows=rows, count=len(unit))
        identity_of = None if identity is None else identity[rows]
        scale_of = some(scale) if isinstance(scale, Tensor) else scale
        parts.append(
            _plain(
                unit[rows], exact[rows], w, target[rows], identity_of, ids, margin.map(some), scale_of, mask_empty,
                label_smoothing, straight_through,
            )
        )  # fmt: skip
    return MarginSoftmax(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _rows(parameter: Tensor, rows: Tensor, count: int) -> Tensor:
    return parameter.expand(count)[rows]


def _plain(
    unit: Tensor, exact: Tensor, w: Tensor, target: Tensor, identity: Tensor | None, slot_identity: Tensor | None,
    margin: Margin, scale: Parameter, mask_empty: bool, label_smoothing: float, straight_through: bool,
) -> MarginSoftmax:  # fmt: skip
    c = unit @ w.T
    a = (exact * w[target]).sum(1)
    live = torch.ones_like(c, dtype=torch.bool)
    if slot_identity is not None:
        if identity is not None:
            live &= identity[:, None] != slot_identity[None, :]
        if mask_empty:
            live &= (slot_identity >= 0)[None, :]
    live = live.scatter(1, target[:, None], torch.zeros_like(live[:, :1]))

    near = a.detach().to(c.dtype)
    hard_mean = None
    if margin.uses_hard_mean:
        hard = live & margin.is_hard(c.detach(), near[:, None])
        hard_mean = torch.where(hard, c.detach(), 0).sum(1) / hard.sum(1).clamp_min(1)
    psi, phi = margin.psi(a, hard_mean), margin.phi(c, near[:, None])
    if straight_through:
        psi, phi = a + (psi - a).detach(), c + (phi - c).detach()
    t = scale * psi
    z = (scale[:, None] if isinstance(scale, Tensor) else scale) * phi
    # The target never enters the sum it is subtracted from: nothing cancels as its probability nears 1.
    alone = ~live.any(1)
    masked = z.masked_fill(~live, -torch.inf)
    shift = masked.detach().amax(1).masked_fill(alone, 0)
    total = (masked - shift[:, None]).exp().sum(1)
    negatives = (shift + torch.where(alone, torch.ones_like(total), total).log()).masked_fill(alone, -torch.inf)
    loss = torch.logaddexp(torch.zeros_like(t), torch.where(alone, negatives, negatives - t))
    lse = (loss + t).detach().to(c.dtype)
    if label_smoothing:
        # -(1 - e) log p_y - e / M sum log p_j over the M classes in play, the target among them.
        logits = torch.where(live, z - t[:, None], 0).sum(1)
        loss = loss - label_smoothing / (1 + live.sum(1)).to(loss.dtype) * logits

    cosines = c.detach().masked_fill(~live, -torch.inf)
    hardest, slot = cosines.max(1)
    beats = (cosines > near[:, None]).sum(1)
    return MarginSoftmax(loss.to(c.dtype), lse, near, hardest, slot.masked_fill(alone, -1), beats)


def enqueue(features: Tensor, identities: Tensor, queue: Tensor, queue_identities: Tensor, state: Tensor) -> None:
    """Writes unit rows and identities into the ring at ``state[0]``, in place, and advances it."""
    wide = torch.promote_types(features.dtype, torch.float32)
    slots = window_slots(state[0], len(features), len(queue))
    rows = normalize(features.to(wide)).to(queue.dtype)
    if queue.dtype == torch.float8_e4m3fn:  # PyTorch moves its bytes only
        queue, rows = queue.view(torch.uint8), rows.view(torch.uint8)
    queue.index_copy_(0, slots, rows)
    queue_identities.index_copy_(0, slots, identities)
    state[0] = (state[0] + len(features)) % len(queue)
    state[1] = (state[1] + len(features)).clamp_max(len(queue))


def dequeue(count: int, queue_identities: Tensor, state: Tensor) -> Tensor:
    """Empties the ``count`` oldest slots, in place; returns their identities [count], -1 where there were fewer."""
    slots = window_slots((state[0] - state[1]) % len(queue_identities), count, len(queue_identities))
    held = torch.arange(count, device=state.device) < state[1]
    gone = torch.where(held, queue_identities[slots], -1)
    queue_identities.index_copy_(0, slots, torch.where(held, -1, queue_identities[slots]))
    state[1] = (state[1] - count).clamp_min(0)
    return gone
