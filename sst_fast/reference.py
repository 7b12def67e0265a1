"""Plain PyTorch statements of every operation: what the fast versions must equal, and what runs where they are missing.

Sizes: N probes, K slots of S rows (sub-centres, usually one), D features, B slots in the batch window, H groups of probes that see different windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sst_fast.arguments import Arguments, Statistics
from sst_fast.margins import FilteredMargin, Margin, Parameter

MIN_NORM = 1e-12  # a shorter embedding has no direction: cosine 0 with everything, gradient 0


class MarginSoftmax(NamedTuple):
    """The loss and the statistics of each probe, [N]; see :func:`sst_fast.functional.margin_softmax`."""

    loss: Tensor
    lse: Tensor
    target_cosine: Tensor
    hardest_cosine: Tensor
    hardest_slot: Tensor
    beats_target: Tensor


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


def margin_softmax(a: Arguments) -> tuple[Tensor, Statistics]:
    """The loss, reduced as asked, and what was seen. Differentiable in ``embedding``, ``prototypes``, ``positive``, ``scale`` and margins."""
    loss, *seen = each(a)
    weight = row_weight(a).to(loss.dtype)
    loss = torch.where(weight == 0, 0, loss * weight)
    return loss if a.reduction == "none" else loss.sum(), Statistics(*seen)


def row_weight(a: Arguments) -> Tensor:
    """What each probe's loss is multiplied by before the sum, float64 [N]: 0 where it is ignored."""
    weight = torch.ones(len(a.embedding), dtype=torch.float64, device=a.embedding.device)
    if a.weight is not None:
        weight = a.weight.double()
    if a.target is not None:
        weight = torch.where(a.target != a.ignore_index, weight, 0)
    if a.reduction == "mean":
        total = weight.sum()
        weight = weight / torch.where(total == 0, 1, total)
    return weight


def nearest_rows(a: Arguments, unit: Tensor, target: Tensor) -> Tensor:
    """Row numbers [N] of the prototypes that are the targets: of a class's sub-centres the nearest, of equally near ones the first."""
    if a.sub_centers == 1:
        return target
    with torch.no_grad():
        rows = a.prototypes.view(a.slots, a.sub_centers, -1)[target].double()
        if a.normalize_prototypes:
            rows = normalize(rows.flatten(0, 1)).view_as(rows)
        return target * a.sub_centers + (rows @ unit[:, :, None]).squeeze(2).max(1).indices


def taken(rows: Tensor, places: Tensor) -> Tensor:
    """``rows[places]`` of a tensor of any dtype: older PyTorch moves only the bytes of float8."""
    if rows.dtype == torch.float8_e4m3fn:
        return rows.view(torch.uint8)[places].view(rows.dtype)
    return rows[places]


def target_rows(a: Arguments, unit: Tensor, target: Tensor) -> Tensor:
    """What the target cosine of ``unit`` probes is taken with, float64 [N, D] both, for ``target`` [N] within the slots.

    In float64, normalised too, and N x D only: near +-1 an angular margin's slope magnifies the rounding of the cosine.
    """
    if a.positive is not None:
        rows = a.positive.double()
    else:
        rows = taken(a.prototypes, nearest_rows(a, unit, target)).double()
        if a.window is not None:
            groups, b, _ = a.window.features.shape
            place = (target - a.window.start) % len(a.prototypes)
            group = torch.arange(len(target), device=target.device) // max(len(target) // groups, 1)
            own = taken(a.window.features.flatten(0, 1), group * b + place.clamp_max(b - 1))
            own = own.to(a.prototypes.dtype)  # as the queue will hold it
            rows = torch.where((place < b)[:, None], own.double(), rows)
    return normalize(rows) if a.normalize_prototypes else rows


def angle_to_target(unit: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine [N] of unit probes with their target rows, [N, D] both, and, without gradient, the length [N] of what the rows
    have across the probes."""
    cosine = (unit * rows).sum(1)
    with torch.no_grad():
        sine = torch.linalg.vector_norm(rows - cosine[:, None] * unit, dim=1)
    return cosine, sine


def unit_probes(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings, float64 [N, D]; targets [N], all within the slots; which probes count [N].

    An ignored probe is a row of zeros, whatever it holds.
    """
    n = len(a.embedding)
    if a.target is None:
        target = torch.zeros(n, dtype=torch.int64, device=a.embedding.device)
        return normalize(a.embedding.double()), target, torch.ones_like(target, dtype=torch.bool)
    valid = a.target != a.ignore_index
    unit = normalize(a.embedding.masked_fill(~valid[:, None], 0).double())
    return unit, a.target.where(valid, 0).clamp(0, a.slots - 1), valid


def each(a: Arguments) -> MarginSoftmax:
    """Every probe's own loss, before weights and reduction; materialises the logits."""
    wide, device = a.wide, a.embedding.device
    n, k = len(a.embedding), a.slots
    target = torch.full((n,), -1, device=device) if a.target is None else a.target
    exact, within, valid = unit_probes(a)
    least = 0 if a.positive is None else -1
    if not torch.compiler.is_compiling():
        wrong = valid & ((target < least) | (target >= k))
        if bool(wrong.any()):
            bad = int(wrong.nonzero()[0])
            expected = "a row number of prototypes" if a.sub_centers == 1 else "a class number"
            raise IndexError(f"target[{bad}] is {int(target[bad])}, expected {expected} in [0, {k})")
        if a.window is not None and not 0 <= int(a.window.start) < k:
            raise IndexError(f"window.start is {int(a.window.start)}, expected a slot in [0, {k})")
    target = target.where(valid, least)
    own = target_rows(a, exact, within)
    prototypes, window = a.prototypes.to(wide, copy=True), None  # a copy: the queue changes
    if a.window is not None:  # held as the queue is that it will be written to
        window = a.window.features.to(a.prototypes.dtype).to(wide)
    if a.normalize_prototypes:
        prototypes = normalize(prototypes)
        window = None if window is None else normalize(window.flatten(0, 1)).view_as(window)
    unit = exact.to(wide)
    margin = a.margin.map(lambda parameter: parameter.to(wide))
    scale = a.scale.to(wide) if isinstance(a.scale, Tensor) else a.scale
    groups = 1 if window is None else len(window)
    parts = []
    for group, rows in enumerate(torch.arange(n, device=device).tensor_split(groups)):
        w, ids = prototypes, a.slot_identity
        if window is not None:
            assert a.window is not None
            slots = window_slots(a.window.start, window.shape[1], k)
            w = w.index_copy(0, slots, window[group])
            ids = None if ids is None else ids.index_copy(0, slots, a.window.identities)
        some = partial(_rows, rows=rows, count=n)
        parts.append(
            _plain(
                unit[rows], exact[rows], w, target[rows], own[rows],
                None if a.identity is None else a.identity[rows], ids, margin.map(some),
                some(scale) if isinstance(scale, Tensor) else scale, a.mask_empty, float(a.label_smoothing), a.sub_centers,
                a.gradient == "straight_through",
            )
        )  # fmt: skip
    return MarginSoftmax(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _rows(parameter: Tensor, rows: Tensor, count: int) -> Tensor:
    return parameter.expand(count)[rows]


def _plain(
    unit: Tensor, exact: Tensor, w: Tensor, target: Tensor, own: Tensor, identity: Tensor | None,
    slot_identity: Tensor | None, margin: Margin, scale: Parameter, mask_empty: bool, label_smoothing: float, sub_centers: int,
    straight_through: bool,
) -> MarginSoftmax:  # fmt: skip
    others = w
    if (
        slot_identity is not None and mask_empty
    ):  # an empty slot may hold NaN, which a weight of 0 does not make harmless
        others = w.masked_fill((slot_identity < 0).repeat_interleave(sub_centers)[:, None], 0)
    c = unit @ others.T
    if sub_centers > 1:
        # The gradient goes to the first of the largest. Without probes PyTorch infers no size.
        c = c.view(len(c), c.shape[1] // sub_centers, sub_centers).max(2).values
    a, sine = angle_to_target(exact, own)
    live = torch.ones_like(c, dtype=torch.bool)
    if slot_identity is not None:
        if identity is not None:
            live &= identity[:, None] != slot_identity[None, :]
        if mask_empty:
            live &= (slot_identity >= 0)[None, :]
    live &= target[:, None] != torch.arange(c.shape[1], device=w.device)

    near, across = a.detach().to(c.dtype), sine.to(c.dtype)[:, None]
    constant = margin.map(Tensor.detach)  # to phi
    hard_mean = None
    if margin.uses_hard_mean:
        hard = live & margin.is_hard(c.detach(), near[:, None], across)
        hard_mean = torch.where(hard, c.detach(), 0).sum(1) / hard.sum(1).clamp_min(1)
    psi, phi = margin.psi(a, hard_mean, sine), constant.phi(c, near[:, None], across)
    if straight_through:
        trained = margin.psi(a.detach(), hard_mean, sine) if margin.trains else 0.0
        psi = a + (psi - a).detach() + trained - psi.detach() * margin.trains
        if not isinstance(margin, FilteredMargin):  # what it leaves out has no gradient
            phi = c + (phi - c).detach()
    t = scale * psi
    z = (scale[:, None] if isinstance(scale, Tensor) else scale) * phi
    # The target never enters the sum it is subtracted from: nothing cancels as its probability nears 1.
    alone = ~live.any(1)
    masked = z.masked_fill(~live, -torch.inf)
    shift = masked.detach().amax(1).masked_fill(alone, 0)
    total = (masked - shift[:, None]).exp().sum(1)
    negatives = (shift + torch.where(alone, torch.ones_like(total), total).log()).masked_fill(alone, -torch.inf)
    loss = torch.logaddexp(0 * t, torch.where(alone, negatives, negatives - t))  # NaN too where the probe is
    lse = (loss + t).detach().to(c.dtype)
    if label_smoothing:
        # -(1 - e) log p_y - e / M sum log p_j over the M classes in play, the target among them.
        logits = torch.where(live, z - t[:, None], 0).sum(1)
        loss = loss - label_smoothing / (1 + live.sum(1)).to(loss.dtype) * logits

    cosines = c.detach().masked_fill(~live, -torch.inf)
    hardest, slot = cosines.max(1)
    beats = (cosines > near[:, None]).sum(1)
    return MarginSoftmax(loss.to(c.dtype), lse, near, hardest, slot.masked_fill(alone, -1), beats)


def check_state(operation: str, state: Tensor, slots: int) -> None:
    """ValueError where a queue's state cannot be: on the CPU only, elsewhere it would wait for the device."""
    if state.device.type != "cpu" or torch.compiler.is_compiling():
        return
    position, fill = int(state[0]), int(state[1])
    if not (0 <= position < slots and 0 <= fill <= slots):
        raise ValueError(
            f"{operation}: state must hold a position in [0, {slots}) and a fill in [0, {slots}], got {position} and {fill}"
        )


def window(
    groups: Sequence[Tensor], identities: Tensor, state: Tensor, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator ``sst_fast::window``: unit rows, start, targets, owners, identities that others see (csrc/ops.h)."""
    check_state("window", state, size)
    features = torch.stack(list(groups))
    wide = torch.promote_types(features.dtype, torch.float32)
    unit = normalize(features.flatten(0, 1).to(wide)).view_as(features)
    start = state[0].clone()
    slots = window_slots(start, len(identities), size)
    held = identities.where(features.isfinite().all(2).all(0), -1)
    return unit.to(dtype), start, slots.repeat(len(features)), identities.repeat(len(features)), held


def enqueue(
    features: Tensor, identities: Tensor, queue: Tensor, queue_identities: Tensor, state: Tensor, unit: bool = False,
    group: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes rows, normalised unless they are ``unit``, and identities into the ring at ``state[0]`` and advances it.

    A row that is not finite would make every later loss NaN: its slot stays empty, and ``state[3]`` counts it.
    ``group``, 0-d: which of features [H, B, D] is written.
    """
    if group is not None:
        if group.device.type == "cpu" and not torch.compiler.is_compiling() and not 0 <= group < len(features):
            raise IndexError(f"enqueue: group must be in [0, {len(features)}), got {int(group)}")
        features = taken(features, group.view(1))[0]
    check_state("enqueue", state, len(queue))
    wide = features.to(
        torch.promote_types(features.dtype, torch.float32) if features.dtype != torch.float8_e4m3fn else torch.float32
    )
    finite = wide.isfinite().all(1)
    slots = window_slots(state[0], len(features), len(queue))
    rows = (features if unit else normalize(wide)).to(queue.dtype)
    if queue.dtype == torch.float8_e4m3fn:  # PyTorch moves its bytes only
        queue, rows = queue.view(torch.uint8), rows.view(torch.uint8)
    queue.index_copy_(0, slots, rows.masked_fill(~finite[:, None], 0))
    queue_identities.index_copy_(0, slots, identities.where(finite, -1))
    state[3] += len(finite) - finite.sum()
    state[0] = (state[0] + len(features)) % len(queue)
    state[1] = (state[1] + len(features)).clamp_max(len(queue))


def dequeue(count: int, queue_identities: Tensor, state: Tensor) -> Tensor:
    """Empties the ``count`` oldest slots, in place; returns their identities [count], -1 where there were fewer."""
    check_state("dequeue", state, len(queue_identities))
    slots = window_slots((state[0] - state[1]) % len(queue_identities), count, len(queue_identities))
    held = torch.arange(count, device=state.device) < state[1]
    gone = torch.where(held, queue_identities[slots], -1)
    queue_identities.index_copy_(0, slots, torch.where(held, -1, queue_identities[slots]))
    state[1] = (state[1] - count).clamp_min(0)
    return gone
