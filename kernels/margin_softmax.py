"""The fused loss in Triton: prepare rows, sweep the queue in splits, combine. No atomics, no N x K tensor.

Sizes: N probes, K slots, D features, B slots in the batch window, S splits of the queue. All arithmetic is float32; products
take the prototypes' dtype (float32: PyTorch's matmul precision decides between tf32 and ieee; float8: float16, which holds it exactly).
sst_fast/backends/triton.py launches these kernels.
"""

import triton
import triton.language as tl
from sst_fast.kernels.margins import NPC, phi, phi_is_identity, phi_row, target_margin

# Never compiled as constants, as Triton does with arguments that are 1; D and N keep what is known of their divisibility.
COUNTS = ["K", "B", "S", "rows_in_group", "blocks_in_group", "tiles_in_split"]
NEVER = tl.constexpr(-1e30)  # cosine of a masked slot: finite, so that nothing becomes NaN on the way


@triton.jit
def _parameters(rows, i, N, p0, p1, p2, p3, p4, p5, scale, scale_rows, P: tl.constexpr, SCALE_ROWS: tl.constexpr):
    """The margin's parameters and the scale of probe i: numbers, or loaded where they vary."""
    if P > 0:
        p0 = tl.load(rows + i)
    if P > 1:
        p1 = tl.load(rows + N + i)
    if P > 2:
        p2 = tl.load(rows + 2 * N + i)
    if P > 3:
        p3 = tl.load(rows + 3 * N + i)
    if P > 4:
        p4 = tl.load(rows + 4 * N + i)
    if P > 5:
        p5 = tl.load(rows + 5 * N + i)
    if SCALE_ROWS:
        scale = tl.load(scale_rows + i)
    return p0, p1, p2, p3, p4, p5, scale


@triton.jit
def _target_row(
    w, window, inverse_w, inverse_window, start, y, i, rows_in_group, K, D, B, d,
    WINDOW: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The target prototype of probe i; NaN where the target is no slot."""
    known = (y >= 0) & (y < K)
    slot = tl.where(known, y, 0)
    row = tl.load(w + slot * D + d, mask=d < D, other=0.0).to(tl.float32)
    factor = 1.0
    if NORMALIZE:
        factor = tl.load(inverse_w + slot)
    if WINDOW:
        inside = (slot - tl.load(start) + K) % K
        if inside < B:
            own = (i // rows_in_group) * B + inside
            row = tl.load(window + own * D + d, mask=d < D, other=0.0).to(tl.float32)
            if NORMALIZE:
                factor = tl.load(inverse_window + own)
    # In float64: rounding would turn the row, which shows where it is nearly parallel to the probe.
    return tl.where(known, row.to(tl.float64) * factor, float("nan"))


@triton.jit(do_not_specialize=COUNTS)
def prepare_kernel(
    x, w, window, inverse_w, inverse_window, start, target, margin_rows, scale_rows,
    unit, inverse_norm, cosine, exact, scales, phi_rows,
    N, K, D, B, rows_in_group, p0, p1, p2, p3, p4, p5, scale,
    KIND: tl.constexpr, P: tl.constexpr, SCALE_ROWS: tl.constexpr, WINDOW: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a probe: unit row, norm, target cosine, what phi needs. ``exact`` [2, N]: the target cosine and the length of
    what the target has across the probe, in float64: an angular margin's slope magnifies their rounding near +-1."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    row = tl.load(x + i * D + d, mask=d < D, other=0.0).to(tl.float64)
    largest = tl.max(tl.abs(row), 0)
    usable = tl.where(largest > 0, largest, 1.0)
    scaled = row / usable
    norm = tl.sqrt(tl.sum(scaled * scaled, 0))
    tiny = norm * usable < 1e-12
    inverse = tl.where(tiny, 0.0, 1.0 / norm)
    hat = scaled * inverse
    tl.store(unit + i * BLOCK_D + d, hat.to(tl.float32).to(unit.dtype.element_ty))
    tl.store(inverse_norm + i, tl.where(tiny, 0.0, inverse / usable))
    y = tl.load(target + i)
    own = _target_row(w, window, inverse_w, inverse_window, start, y, i, rows_in_group, K, D, B, d, WINDOW, NORMALIZE)
    along = tl.sum(hat * own, 0)
    part = own - along * hat
    sine = tl.sqrt(tl.sum(part * part, 0))
    a = along.to(tl.float32)
    tl.store(cosine + i, a)
    tl.store(exact + i, along)
    tl.store(exact + N + i, sine)
    p0, p1, p2, p3, p4, p5, scale = _parameters(
        margin_rows, i, N, p0, p1, p2, p3, p4, p5, scale, scale_rows, P, SCALE_ROWS
    )
    tl.store(scales + i, scale)
    r0, r1, r2, r3 = phi_row(a, sine.to(tl.float32), p0, p1, p2, p3, p4, p5, KIND)
    tl.store(phi_rows + i, r0)
    tl.store(phi_rows + N + i, r1)
    tl.store(phi_rows + 2 * N + i, r2)
    tl.store(phi_rows + 3 * N + i, r3)


@triton.jit(do_not_specialize=COUNTS)
def sweep_kernel(
    unit, w, window, inverse_w, inverse_window, start, target, identity, slot_identity, window_identity,
    cosine, scales, phi_rows, lse, uniform,
    shift_out, sum_out, logits_out, hard_sum_out, hard_out, live_out, hardest_out, slot_out, beats_out, moment_out,
    N, K, D, B, rows_in_group, blocks_in_group, tiles_in_split, S,
    KIND: tl.constexpr, WINDOW: tl.constexpr, IDENTITY: tl.constexpr, SLOT_IDENTITY: tl.constexpr,
    MASK_EMPTY: tl.constexpr, NORMALIZE: tl.constexpr, STRAIGHT: tl.constexpr, MOMENT: tl.constexpr,
    SECOND: tl.constexpr, LOGITS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of probes of one group over one split of the slots; the last split is the batch window, if there is one.

    Weights are exp(z - shift); in the second sweep exp(z - lse) - uniform.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    group = block // blocks_in_group
    r = (block % blocks_in_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = r < rows_in_group
    i = (group * rows_in_group + r).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(unit + i[:, None] * BLOCK_D + d[None, :], mask=real[:, None], other=0.0)
    a = tl.load(cosine + i, mask=real, other=0.0)
    scale = tl.load(scales + i, mask=real, other=1.0)
    y = tl.load(target + i, mask=real, other=-1).to(tl.int32)  # 64 bits would take twice the registers
    r0 = tl.load(phi_rows + i, mask=real, other=0.0)
    r1 = tl.load(phi_rows + N + i, mask=real, other=0.0)
    r2 = tl.load(phi_rows + 2 * N + i, mask=real, other=0.0)
    r3 = tl.load(phi_rows + 3 * N + i, mask=real, other=0.0)
    if IDENTITY:
        mine = tl.load(identity + i, mask=real, other=-2)
    known = a
    even = a * 0.0
    if SECOND:
        known = tl.load(lse + i, mask=real, other=0.0)
        even = tl.load(uniform + i, mask=real, other=0.0)

    # Where this program's slots lie: [first, last) of the queue, or of the window.
    first = split * tiles_in_split * BLOCK_K
    last = tl.minimum(first + tiles_in_split * BLOCK_K, K)
    base, ids, inverse = w, slot_identity, inverse_w
    begin = K * 0
    if WINDOW:
        begin = tl.load(start).to(tl.int32)
        if split == S:
            first, last = K * 0, B
            base = window + group.to(tl.int64) * B * D
            if SLOT_IDENTITY:
                ids = window_identity
            if NORMALIZE:
                inverse = inverse_window + group.to(tl.int64) * B

    shift = a * 0.0 + NEVER
    total = a * 0.0
    logits = a * 0.0
    hard_sum = a * 0.0
    hard = tl.zeros([BLOCK_N], tl.int32)
    live = tl.zeros([BLOCK_N], tl.int32)
    beats = tl.zeros([BLOCK_N], tl.int32)
    hardest = a * 0.0 + NEVER
    hardest_slot = tl.zeros([BLOCK_N], tl.int32) - 1
    moment = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    for j0 in range(first, last, BLOCK_K):
        j = j0 + tl.arange(0, BLOCK_K)
        there = j < last
        features = tl.load(
            base + j.to(tl.int64)[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
        ).to(unit.dtype.element_ty)
        c = tl.dot(x, tl.trans(features), input_precision=PRECISION)
        if NORMALIZE:
            norm = tl.load(inverse + j, mask=there, other=0.0)
            c *= norm[None, :]
        slot = j
        if WINDOW:
            slot = tl.where(split == S, (j + begin) % K, j)
            # Of the queue, the slots outside the window: at least B after its start.
            there = there & (tl.where(split == S, B, (j - begin + K) % K) >= B)
        alive = there[None, :] & (slot[None, :] != y[:, None])
        if SLOT_IDENTITY:
            theirs = tl.load(ids + j, mask=there, other=-1)
            if IDENTITY:
                alive = alive & (theirs[None, :] != mine[:, None])
            if MASK_EMPTY:
                alive = alive & (theirs >= 0)[None, :]
        value, slope = phi(c, r0[:, None], r1[:, None], r2[:, None], r3[:, None], KIND)
        z = scale[:, None] * value
        if SECOND:
            p = tl.where(alive, tl.exp(z - known[:, None]) - even[:, None], 0.0)
        else:
            shown = tl.where(alive, c, NEVER)
            top = tl.max(shown, 1)
            at = tl.max(tl.where((shown == top[:, None]) & alive, slot[None, :], -1), 1)
            hardest_slot = tl.where(top > hardest, at, hardest_slot)
            hardest = tl.maximum(hardest, top)
            beats += tl.sum((alive & (c > a[:, None])).to(tl.int32), 1)
            live += tl.sum(alive.to(tl.int32), 1)
            if KIND == NPC:
                is_hard = alive & (c > r0[:, None])
                hard += tl.sum(is_hard.to(tl.int32), 1)
                hard_sum += tl.sum(tl.where(is_hard, c, 0.0), 1)
            if LOGITS:
                logits += tl.sum(tl.where(alive, z, 0.0), 1)
            if phi_is_identity(KIND):  # the largest logit is the hardest slot's
                higher = tl.maximum(shift, tl.where(top > NEVER, scale * top, NEVER))
            else:
                higher = tl.maximum(shift, tl.max(tl.where(alive, z, NEVER), 1))
            fade = tl.exp(shift - higher)
            total *= fade
            if MOMENT:
                moment *= fade[:, None]
            shift = higher
            p = tl.where(alive, tl.exp(z - shift[:, None]), 0.0)
            total += tl.sum(p, 1)
        if MOMENT:
            if not STRAIGHT:
                p *= slope
            if NORMALIZE:
                p *= norm[None, :]
            moment = tl.dot(p.to(features.dtype), features, moment, input_precision=PRECISION)

    out = split.to(tl.int64) * N + i
    if not SECOND:
        tl.store(shift_out + out, shift, mask=real)
        tl.store(sum_out + out, total, mask=real)
        tl.store(live_out + out, live, mask=real)
        tl.store(beats_out + out, beats, mask=real)
        tl.store(hardest_out + out, hardest, mask=real)
        tl.store(slot_out + out, hardest_slot, mask=real)
        if KIND == NPC:
            tl.store(hard_out + out, hard, mask=real)
            tl.store(hard_sum_out + out, hard_sum, mask=real)
        if LOGITS:
            tl.store(logits_out + out, logits, mask=real)
    if MOMENT:
        tl.store(moment_out + out[:, None] * BLOCK_D + d[None, :], moment, mask=real[:, None])


@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    x, w, window, inverse_w, inverse_window, start, target, margin_rows, scale_rows,
    inverse_norm, cosine, exact, shift, total, logits, hard_sum, hard, live, hardest, slot, beats, moment,
    loss_out, gradient_out, lse_out, hardest_out, slot_out, beats_out, live_out, slope_out, residual_out, uniform_out,
    N, K, D, B, rows_in_group, S, label_smoothing, p0, p1, p2, p3, p4, p5, scale,
    KIND: tl.constexpr, P: tl.constexpr, SCALE_ROWS: tl.constexpr, WINDOW: tl.constexpr, NORMALIZE: tl.constexpr,
    STRAIGHT: tl.constexpr, LOSS: tl.constexpr, MOMENT: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a probe, over all splits: the loss (LOSS), the gradient (MOMENT), or first the one and then the other."""
    i = tl.program_id(0).to(tl.int64)
    p0, p1, p2, p3, p4, p5, scale = _parameters(
        margin_rows, i, N, p0, p1, p2, p3, p4, p5, scale, scale_rows, P, SCALE_ROWS
    )
    a = tl.load(cosine + i)
    highest = a * 0.0 + NEVER  # a constexpr on the left makes a constexpr, in Triton before 3.9
    sum_z = a * 0.0
    if LOSS:
        top, at, above, count, hard_count = a * 0.0 + NEVER, -1, 0, 0, 0
        all_logits, all_hard = a * 0.0, a * 0.0
        for split in range(S):
            part = split * N + i
            highest = tl.maximum(highest, tl.where(tl.load(total + part) > 0, tl.load(shift + part), NEVER))
            part_top = tl.load(hardest + part)
            at = tl.where(part_top > top, tl.load(slot + part), at)
            top = tl.maximum(top, part_top)
            above += tl.load(beats + part)
            count += tl.load(live + part)
            if KIND == NPC:
                hard_count += tl.load(hard + part)
                all_hard += tl.load(hard_sum + part)
            if SMOOTH:
                all_logits += tl.load(logits + part)
        for split in range(S):
            part = split * N + i
            sum_z += tl.load(total + part) * tl.exp(tl.minimum(tl.load(shift + part) - highest, 0.0))
        hard_mean = all_hard / tl.maximum(hard_count, 1)
        psi, slope = target_margin(tl.load(exact + i), tl.load(exact + N + i), hard_mean, p0, p1, p2, p3, p4, p5, KIND)
        if STRAIGHT:
            slope = a * 0.0 + 1.0
        t = scale * psi
        # The target never enters the sum it is subtracted from: nothing cancels as its probability nears 1.
        excess = tl.where(sum_z == 0, a * 0.0 + NEVER, highest + tl.log(sum_z) - t)
        small = tl.exp(-tl.abs(excess))
        log1p = tl.where(small < 1e-3, small * (1.0 - small * (0.5 - small * 0.33333333)), tl.log(1.0 + small))
        plain = tl.where(excess > 0, excess, 0.0 * a) + log1p
        wrong = tl.where(excess > 0, 1.0, small) / (1.0 + small)
        share = label_smoothing / (1 + count)
        loss = plain
        if SMOOTH:
            loss -= share * (all_logits - count * t)
        residual = -(wrong - label_smoothing + share)
        target_slope = scale * slope * residual
        tl.store(loss_out + i, loss)
        tl.store(lse_out + i, plain + t)
        tl.store(hardest_out + i, tl.where(at < 0, -float("inf"), top))
        tl.store(slot_out + i, at.to(tl.int64))
        tl.store(beats_out + i, above.to(tl.int64))
        tl.store(live_out + i, count.to(tl.int64))
        tl.store(slope_out + i, target_slope)
        tl.store(residual_out + i, residual)
        tl.store(uniform_out + i, share)
        target_slope, wrong = target_slope.to(tl.float32), wrong.to(tl.float32)
    else:
        target_slope = tl.load(slope_out + i)
        wrong = a * 0.0
    if MOMENT:
        d = tl.arange(0, BLOCK_D)
        gathered = tl.zeros([BLOCK_D], tl.float32)
        for split in range(S):
            part = split * N + i
            piece = tl.load(moment + part * BLOCK_D + d)
            if LOSS:
                fade = tl.exp(tl.minimum(tl.load(shift + part) - highest, 0.0))
                piece *= tl.where(sum_z == 0, 0.0, fade / tl.where(sum_z == 0, 1.0, sum_z) * wrong)
            gathered += piece
        y = tl.load(target + i)
        own = _target_row(
            w, window, inverse_w, inverse_window, start, y, i, rows_in_group, K, D, B, d, WINDOW, NORMALIZE
        )
        inverse = tl.load(inverse_norm + i)
        row = tl.load(x + i * D + d, mask=d < D, other=0.0).to(tl.float32)
        hat = row * inverse
        along = tl.sum(gathered * hat, 0)
        # What the target has across the probe, in float64: where they are nearly parallel the slope is large, this small.
        wide = row.to(tl.float64)
        square = tl.sum(wide * wide, 0)
        across = own - tl.sum(own * wide, 0) / tl.where(square > 0, square, 1.0) * wide
        result = (scale * (gathered - along * hat) + (target_slope * across).to(tl.float32)) * inverse
        tl.store(gradient_out + i * D + d, result.to(gradient_out.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=COUNTS)
def prototypes_kernel(
    unit, w, inverse_w, target, identity, slot_identity, scales, phi_rows, lse, uniform, factor, target_slope, gradient,
    N, K, D,
    KIND: tl.constexpr, IDENTITY: tl.constexpr, SLOT_IDENTITY: tl.constexpr, MASK_EMPTY: tl.constexpr,
    NORMALIZE: tl.constexpr, STRAIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of slots over all probes: its rows of the prototypes' gradient, the targets' part included."""
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    there = j < K
    d = tl.arange(0, BLOCK_D)
    at = j.to(tl.int64)[:, None] * D + d[None, :]
    inside = there[:, None] & (d < D)[None, :]
    features = tl.load(w + at, mask=inside, other=0.0)
    norm = tl.full([BLOCK_K], 1.0, tl.float32)
    if NORMALIZE:
        norm = tl.load(inverse_w + j, mask=there, other=0.0)
    theirs = j.to(tl.int64)
    if SLOT_IDENTITY:
        theirs = tl.load(slot_identity + j, mask=there, other=-1)
    sums = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        real = i < N
        x = tl.load(unit + i.to(tl.int64)[:, None] * BLOCK_D + d[None, :], mask=real[:, None], other=0.0)
        y = tl.load(target + i, mask=real, other=-1).to(tl.int32)
        scale = tl.load(scales + i, mask=real, other=1.0)
        incoming = tl.load(factor + i, mask=real, other=0.0)
        r0 = tl.load(phi_rows + i, mask=real, other=0.0)
        r1 = tl.load(phi_rows + N + i, mask=real, other=0.0)
        r2 = tl.load(phi_rows + 2 * N + i, mask=real, other=0.0)
        r3 = tl.load(phi_rows + 3 * N + i, mask=real, other=0.0)
        known = tl.load(lse + i, mask=real, other=0.0)
        even = tl.load(uniform + i, mask=real, other=0.0)
        at_target = tl.load(target_slope + i, mask=real, other=0.0)
        c = tl.dot(features, tl.trans(x), input_precision=PRECISION) * norm[:, None]
        is_target = j[:, None] == y[None, :]
        alive = (real[None, :] & there[:, None]) & (is_target == 0)
        if SLOT_IDENTITY:
            if IDENTITY:
                mine = tl.load(identity + i, mask=real, other=-2)
                alive = alive & (theirs[:, None] != mine[None, :])
            if MASK_EMPTY:
                alive = alive & (theirs >= 0)[:, None]
        value, slope = phi(c, r0[None, :], r1[None, :], r2[None, :], r3[None, :], KIND)
        p = tl.where(alive, tl.exp(scale[None, :] * value - known[None, :]) - even[None, :], 0.0) * scale[None, :]
        if not STRAIGHT:
            p *= slope
        p = tl.where(is_target, at_target[None, :], p) * incoming[None, :]
        sums = tl.dot(p.to(x.dtype), x, sums, input_precision=PRECISION)
    if NORMALIZE:
        hat = features.to(tl.float32) * norm[:, None]
        sums = (sums - tl.sum(sums * hat, 1)[:, None] * hat) * norm[:, None]
    tl.store(gradient + at, sums.to(gradient.dtype.element_ty), mask=inside)
