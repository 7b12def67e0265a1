"""The fused loss in Triton: prepare rows, sweep the queue in splits, combine. The result never changes from run to run: no
atomics, no N x K tensor.

Sizes: N probes, K slots of SUB rows (sub-centres, usually one) each, D features, B slots in the batch window, S splits of the queue; the window is one split more. Sums are
float32, what is done once per probe float64; products take the prototypes' dtype (float32: PyTorch's matmul precision decides
between tf32 and ieee; float8: float16, which holds it exactly). A tensor that is not there is None, which Triton compiles for.
The kernels that the staged sweep takes from here are *wide* where ``rows`` is float64: so are all sums and results then.
sst_fast/backends/triton.py launches these kernels.

What kernels hand on lies in few arrays of several rows, because a launch costs the host time for every argument:
``own_rows`` int32 [N]: the row that is the target, -1 if there is none; ``rows`` [ROW_FIELDS, N] and ``partial`` [PARTIAL_FIELDS, splits, N], float32 or wide, ``counts`` int32 [COUNT_FIELDS, splits, N].
"""

import triton
import triton.language as tl
from sst_fast.kernels.margins import needs_hard_mean, phi, phi_is_identity, phi_row, target_margin

from sst_fast.reference import MIN_NORM as MIN_NORM_OF_ALL

# What may change from step to step: Triton would compile anew where one of these becomes 1 or stops being divisible by 16. D does not
# change, and what is known of its divisibility is needed.
COUNTS = ["N", "K", "B", "S", "rows_in_group", "blocks_in_group", "tiles_in_split"]
# Cosine of a masked slot: finite, so that nothing becomes NaN on the way, and the same number in any dtype.
NEVER = tl.constexpr(-(2.0**100))
FLOOR = tl.constexpr(-(2.0**99))  # a shift before anything was seen: exp(NEVER - FLOOR) is 0
MIN_NORM = tl.constexpr(MIN_NORM_OF_ALL)
# float16 flushes what is below 6e-8: weights over float16 are lifted by this many powers of e, and may be 4 at most (phi').
LIFT = tl.constexpr(8.0)
LARGEST_FLOAT16 = tl.constexpr(32768.0)
# Without tensor cores every thread holds its operands over the whole length of the sum: cosines are summed in pieces of D.
PIECE = tl.constexpr(16)

# Rows of `rows`. PHI is the first of four; UNIFORM, the share of label smoothing of each slot, is for the second sweep.
INVERSE_NORM, SCALE, PHI, UNIFORM = (tl.constexpr(at) for at in (0, 1, 2, 6))
ROW_FIELDS = 7
SHIFT, SUM, PHI_SUM, WEIGHED_PHI, HARD_SUM, HARDEST = (tl.constexpr(at) for at in range(6))
PARTIAL_FIELDS = 6
HARD, LIVE, SLOT, BEATS = (tl.constexpr(at) for at in range(4))
COUNT_FIELDS = 4


@triton.jit
def _parameters(margin_rows, i, real, N, p0, p1, p2, p3, p4, p5, P: tl.constexpr, SUMS: tl.constexpr):
    """The margin's parameters for probes i: numbers, or loaded where they vary, as SUMS."""
    if P > 0:
        p0 = tl.load(margin_rows + i, mask=real, other=0.0).to(SUMS)
    if P > 1:
        p1 = tl.load(margin_rows + N + i, mask=real, other=0.0).to(SUMS)
    if P > 2:
        p2 = tl.load(margin_rows + 2 * N + i, mask=real, other=1.0).to(SUMS)
    if P > 3:
        p3 = tl.load(margin_rows + 3 * N + i, mask=real, other=0.0).to(SUMS)
    if P > 4:
        p4 = tl.load(margin_rows + 4 * N + i, mask=real, other=0.0).to(SUMS)
    if P > 5:
        p5 = tl.load(margin_rows + 5 * N + i, mask=real, other=0.0).to(SUMS)
    return p0, p1, p2, p3, p4, p5


@triton.jit
def _as_float64(row):
    """From float8 the way leads over float32."""
    if row.dtype != tl.float64:
        row = row.to(tl.float32)
    return row.to(tl.float64)


@triton.jit
def _inverse_norm(row):
    """Of float64 rows [., D]; 0 for a row that is too short to have a direction."""
    norm = tl.sqrt(tl.sum(row * row, 1))
    return tl.where(norm < MIN_NORM, 0.0, 1.0 / tl.where(norm < MIN_NORM, 1.0, norm))


@triton.jit
def _since(slot, begin, K):
    """How many slots lie between slot ``begin`` of the ring and ``slot``."""
    distance = slot - begin
    return tl.where(distance < 0, distance + K, distance)


@triton.jit
def _target_row(
    w, window, positive, start, row_number, i, real, d, K, D, B, rows_in_group, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The targets of probes i, float64 [., D], normalised if asked for; zeros where there is none (row -1)."""
    inside = real[:, None] & (d < D)[None, :]
    if positive is not None:
        row = _as_float64(tl.load(positive + i[:, None] * D + d[None, :], mask=inside, other=0.0))
    else:
        inside = inside & (row_number >= 0)[:, None]
        in_queue = inside
        if window is not None:
            since = _since(row_number, tl.load(start).to(tl.int32), K)
            of_window = inside & (since < B)[:, None]
            own = (i // rows_in_group) * B + since
            shown = _as_float64(tl.load(window + own[:, None] * D + d[None, :], mask=of_window, other=0.0))
            in_queue = inside & (since >= B)[:, None]
        row = _as_float64(tl.load(w + row_number.to(tl.int64)[:, None] * D + d[None, :], mask=in_queue, other=0.0))
        if window is not None:
            row = tl.where(of_window, shown, row)
    if NORMALIZE:
        row *= _inverse_norm(row)[:, None]
    return row


@triton.jit
def _prepare_rows(
    block, x, w, window, positive, start, target, weight, margin_rows, scale_rows, unit, rows, own_rows, exact_cosine, cosine,
    row_weight, N, K, D, B, rows_in_group, ignore_index, p0, p1, p2, p3, p4, p5, scale,
    KIND: tl.constexpr, P: tl.constexpr, NORMALIZE: tl.constexpr, SUB: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
    real = i < N
    d = tl.arange(0, BLOCK_D)
    valid, wrong, slot = real, i < 0, tl.zeros([ROWS], tl.int32) - 1
    if target is not None:
        y = tl.load(target + i, mask=real, other=0)
        valid = real & (y != ignore_index)
        known = (y >= 0) & (y < K)
        wrong = valid & (known == 0)
        if positive is not None:
            wrong = wrong & (y != -1)
        slot = tl.where(valid & known, y, -1).to(tl.int32)
    # An ignored row may hold anything: it is a row of zeros here.
    row = tl.load(x + i[:, None] * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0).to(tl.float64)
    inverse = _inverse_norm(row)
    hat = row * inverse[:, None]
    nearest = tl.where(slot >= 0, slot * SUB, -1)
    own = _target_row(w, window, positive, start, nearest, i, valid, d, K, D, B, rows_in_group, NORMALIZE)
    exact = tl.sum(hat * own, 1)
    if SUB > 1:
        if positive is None:
            for sub in range(1, SUB):
                row_number = tl.where(slot >= 0, slot * SUB + sub, -1)
                other = _target_row(
                    w, window, positive, start, row_number, i, valid, d, K, D, B, rows_in_group, NORMALIZE
                )
                cosine_of_other = tl.sum(hat * other, 1)
                nearer = (cosine_of_other > exact) | (cosine_of_other != cosine_of_other)
                own = tl.where(nearer[:, None], other, own)
                exact = tl.where(nearer, cosine_of_other, exact)
                nearest = tl.where(nearer, row_number, nearest)
    # In float64: near +-1 an angular margin's slope magnifies the target cosine's rounding. No check can wait for the
    # device: a target that is no slot makes its row's loss NaN.
    exact = tl.where(wrong, float("nan"), exact)
    part = own - exact[:, None] * hat
    sine = tl.sqrt(tl.sum(part * part, 1))
    SUMS: tl.constexpr = rows.dtype.element_ty
    a = exact.to(SUMS)
    q0, q1, q2, q3, q4, q5 = _parameters(margin_rows, i, real, N, p0, p1, p2, p3, p4, p5, P, SUMS)
    r0, r1, r2, r3 = phi_row(a, sine.to(SUMS), q0, q1, q2, q3, q4, q5, KIND)
    scales = a * 0.0 + scale
    if scale_rows is not None:
        scales = tl.load(scale_rows + i, mask=real, other=1.0).to(SUMS)
    factor = valid.to(SUMS)
    if weight is not None:
        factor = tl.where(valid, tl.load(weight + i, mask=real, other=0.0).to(SUMS), 0.0)
    tl.store(unit + i[:, None] * BLOCK_D + d[None, :], hat.to(SUMS).to(unit.dtype.element_ty), mask=real[:, None])
    tl.store(rows + INVERSE_NORM * N + i, inverse, mask=real)
    tl.store(rows + SCALE * N + i, scales, mask=real)
    tl.store(rows + PHI * N + i, r0, mask=real)
    tl.store(rows + (PHI + 1) * N + i, r1, mask=real)
    tl.store(rows + (PHI + 2) * N + i, r2, mask=real)
    tl.store(rows + (PHI + 3) * N + i, r3, mask=real)
    tl.store(own_rows + i, nearest, mask=real)
    tl.store(exact_cosine + 1 + i, exact, mask=real)
    tl.store(exact_cosine + 1 + N + i, sine, mask=real)
    tl.store(cosine + i, a, mask=real)
    tl.store(row_weight + i, factor, mask=real)


@triton.jit
def _total_weight(target, weight, N, ignore_index, BLOCK: tl.constexpr):
    """Sum of the weights of all probes that are not ignored, float64 [1]."""
    total = tl.zeros([1], tl.float64)
    for first in range(0, N, BLOCK):
        i = first + tl.arange(0, BLOCK)
        counts = i < N
        if target is not None:
            counts = counts & (tl.load(target + i, mask=counts, other=0) != ignore_index)
        factor = counts.to(tl.float64)
        if weight is not None:
            factor = tl.load(weight + i, mask=counts, other=0.0).to(tl.float64)
        total += tl.sum(factor, 0)
    return total


@triton.jit
def _prepare_norms(block, matrix, inverse, count, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    j = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = (j < count)[:, None] & (d < D)[None, :]
    row = _as_float64(tl.load(matrix + j[:, None] * D + d[None, :], mask=mask, other=0.0))
    tl.store(inverse + j, _inverse_norm(row), mask=j < count)


@triton.jit(do_not_specialize=COUNTS)
def prepare_kernel(
    x, w, window, positive, start, target, weight, margin_rows, scale_rows,
    unit, rows, own_rows, exact_cosine, inverse, cosine, row_weight,
    N, K, D, B, rows_in_group, ignore_index, p0, p1, p2, p3, p4, p5, scale,
    KIND: tl.constexpr, P: tl.constexpr, NORMALIZE: tl.constexpr, SUB: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All that is done once before the sweep: programs for blocks of probes, then one for the sum of the weights, then,
    where prototypes are normalised, some for the inverse norms of prototypes and window.

    Of probes: the unit row, the target's row and cosine, what phi needs, the row's weight (0: ignored).
    ``exact_cosine`` float64 [1 + 2 N]: the sum of the weights, the target cosines, the lengths of what targets have across the probes; ``inverse`` [K SUB + H B].
    """
    block = tl.program_id(0)
    blocks = tl.cdiv(N, ROWS)
    if block < blocks:
        _prepare_rows(
            block, x, w, window, positive, start, target, weight, margin_rows, scale_rows, unit, rows, own_rows, exact_cosine,
            cosine, row_weight, N, K, D, B, rows_in_group, ignore_index, p0, p1, p2, p3, p4, p5, scale, KIND, P, NORMALIZE,
            SUB, ROWS, BLOCK_D,
        )  # fmt: skip
    if block == blocks:
        tl.store(exact_cosine + tl.arange(0, 1), _total_weight(target, weight, N, ignore_index, 1024))
    if NORMALIZE:
        of_queue = tl.cdiv(K * SUB, ROWS)
        at = block - blocks - 1
        if at >= 0:
            if at < of_queue:
                _prepare_norms(at, w, inverse, K * SUB, D, ROWS, BLOCK_D)
            else:
                if window is not None:
                    _prepare_norms(at - of_queue, window, inverse + K, N // rows_in_group * B, D, ROWS, BLOCK_D)


@triton.jit
def is_nearest(c, SUB: tl.constexpr, AXIS: tl.constexpr, PADDED: tl.constexpr):
    """Of cosines [2-D], in which neighbours along ``AXIS`` are the rows of one slot, SUB of PADDED: which are their slot's largest, the
    first of equally large ones. What is not a number is larger than all else: it must not be lost."""
    AHEAD: tl.constexpr = c.shape[0] if AXIS == 0 else c.shape[1]
    BESIDE: tl.constexpr = c.shape[1] if AXIS == 0 else c.shape[0]
    key = tl.where(c == c, c, float("inf"))
    key = tl.trans(key) if AXIS == 0 else key
    key = tl.reshape(key, [BESIDE, AHEAD // PADDED, PADDED])
    sub = tl.arange(0, PADDED)[None, None, :]
    key = tl.where(sub < SUB, key, NEVER)
    largest = tl.max(key, 2)[:, :, None]
    first = tl.min(tl.where(key == largest, sub, PADDED), 2)[:, :, None]
    nearest = tl.reshape((first == sub).to(tl.int32), [BESIDE, AHEAD])
    nearest = tl.trans(nearest) if AXIS == 0 else nearest
    return nearest != 0


@triton.jit
def probes_of(rows, own_rows, i, real, N):
    """What a sweep knows of probes i: the target's row, the scale, and the four numbers of phi."""
    own_row = tl.load(own_rows + i, mask=real, other=-1)
    scale = tl.load(rows + SCALE * N + i, mask=real, other=1.0)
    r0 = tl.load(rows + PHI * N + i, mask=real, other=0.0)
    r1 = tl.load(rows + (PHI + 1) * N + i, mask=real, other=0.0)
    r2 = tl.load(rows + (PHI + 2) * N + i, mask=real, other=0.0)
    r3 = tl.load(rows + (PHI + 3) * N + i, mask=real, other=0.0)
    return own_row, scale, r0, r1, r2, r3


@triton.jit
def is_negative(there, slot, theirs, y, mine, slot_identity, identity, MASK_EMPTY: tl.constexpr):
    """Which slots count for which probes; ``there``, ``slot`` and ``theirs`` lie across ``y`` and ``mine``, either way round."""
    alive = there & (slot != y)
    if slot_identity is not None:
        if identity is not None:
            alive = alive & (theirs != mine)
        if MASK_EMPTY:
            alive = alive & (theirs >= 0)
    return alive


@triton.jit
def holds_features(there, theirs, slot_identity, MASK_EMPTY: tl.constexpr):
    """Whose features may be read: an empty slot may hold anything, and a weight of 0 does not make NaN harmless."""
    if (slot_identity is not None) and MASK_EMPTY:
        there = there & (theirs >= 0)
    return there


@triton.jit
def logits_of(c, alive, scale, r0, r1, r2, r3, KIND: tl.constexpr):
    """Cosines of a tile [probes, slots] with NEVER where a slot does not count; phi; logits, whose exponentials are 0 there; slopes of phi.
    The mask is not needed any more behind this, and a mask is dear: it is kept in registers and taken apart bit by bit."""
    shown = tl.where(alive, c, NEVER)
    value, slope = phi(c, r0[:, None], r1[:, None], r2[:, None], r3[:, None], KIND)
    z = tl.where(alive, scale[:, None] * value, NEVER)
    if not phi_is_identity(KIND):
        slope = tl.where(alive, slope, 0.0)
    return shown, value, z, slope


@triton.jit
def seen_in_tile(shown, value, z, slot, a, scale, r0, KIND: tl.constexpr, SMOOTH: tl.constexpr):
    """Of a tile, for each probe: the largest logit, the hardest slot's cosine and number, how many slots exceed the target, how
    many there are, number and sum of hard cosines (where psi needs them), sum of phi (SMOOTH)."""
    top = tl.max(shown, 1)
    at = tl.max(tl.where(shown == top[:, None], slot[None, :], -1), 1)
    at = tl.where(top > NEVER, at, -1)
    beats = tl.sum((shown > a[:, None]).to(tl.int32), 1)
    live = tl.sum((shown != NEVER).to(tl.int32), 1)
    hard, hard_sum, phi_sum = live * 0, top * 0.0, top * 0.0
    if needs_hard_mean(KIND):
        is_hard = shown > r0[:, None]
        hard = tl.sum(is_hard.to(tl.int32), 1)
        hard_sum = tl.sum(tl.where(is_hard, shown, 0.0), 1)
    if SMOOTH:
        phi_sum = tl.sum(tl.where(shown != NEVER, value, 0.0), 1)
    highest = tl.max(z, 1)
    if phi_is_identity(KIND):  # it is the hardest slot's
        highest = tl.where(top > NEVER, scale * top, NEVER)
    return highest, top, at, beats, live, hard, hard_sum, phi_sum


@triton.jit
def store_part(
    partial, counts, field, out, real, shift, total, weighed_phi, top, at, beats, live, hard, hard_sum, phi_sum,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, SCALE_SLOPE: tl.constexpr,
):  # fmt: skip
    """Writes what a part of the slots has been for some probes to places ``out`` of fields of so many numbers."""
    tl.store(partial + SHIFT * field + out, shift, mask=real)
    tl.store(partial + SUM * field + out, total, mask=real)
    tl.store(partial + HARDEST * field + out, top, mask=real)
    tl.store(counts + LIVE * field + out, live, mask=real)
    tl.store(counts + SLOT * field + out, at, mask=real)
    tl.store(counts + BEATS * field + out, beats, mask=real)
    if needs_hard_mean(KIND):
        tl.store(partial + HARD_SUM * field + out, hard_sum, mask=real)
        tl.store(counts + HARD * field + out, hard, mask=real)
    if SMOOTH:
        tl.store(partial + PHI_SUM * field + out, phi_sum, mask=real)
    if SCALE_SLOPE:
        tl.store(partial + WEIGHED_PHI * field + out, weighed_phi, mask=real)


@triton.jit(do_not_specialize=COUNTS)
def sweep_kernel(
    unit, w, window, inverse, start, own_rows, identity, slot_identity, window_identity, rows, cosine, lse,
    partial, counts, moment_out,
    N, K, D, B, rows_in_group, blocks_in_group, tiles_in_split, S,
    KIND: tl.constexpr, MASK_EMPTY: tl.constexpr, STRAIGHT: tl.constexpr, MOMENT: tl.constexpr, SECOND: tl.constexpr,
    SMOOTH: tl.constexpr, SCALE_SLOPE: tl.constexpr, SUB: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of probes of one group over one split of the slots; the last split is the batch window, if there is one.

    Weights are exp(z - shift); in the second sweep exp(z - lse) - uniform. A tile has BLOCK_K lanes, PADDED (a power of two)
    for each slot, of which SUB are its rows.
    """
    block, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    group = block // blocks_in_group
    r = (block % blocks_in_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = r < rows_in_group
    i = (group * rows_in_group + r).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    IEEE: tl.constexpr = (unit.dtype.element_ty == tl.float32) and (PRECISION == "ieee")
    if not IEEE:
        x = tl.load(unit + i[:, None] * BLOCK_D + d[None, :], mask=real[:, None], other=0.0)
    a = tl.load(cosine + i, mask=real, other=0.0)
    own_row, scale, r0, r1, r2, r3 = probes_of(rows, own_rows, i, real, N)
    y = tl.where(own_row < 0, -1, own_row // SUB)
    mine = y
    if identity is not None:
        mine = tl.load(identity + i, mask=real, other=-2)
    known = a
    even = a * 0.0
    if SECOND:
        known = tl.load(lse + i, mask=real, other=0.0)
        even = tl.load(rows + UNIFORM * N + i, mask=real, other=0.0)
    HALF: tl.constexpr = unit.dtype.element_ty == tl.float16
    lift = 0.0
    if HALF:
        lift = LIFT

    # Where this program's slots lie: [first, last) of the queue, or of the window.
    STEP: tl.constexpr = BLOCK_K // PADDED
    lane = tl.arange(0, BLOCK_K)
    first = split * tiles_in_split * STEP
    last = tl.minimum(first + tiles_in_split * STEP, K)
    base, ids, norms = w, slot_identity, inverse
    begin = K * 0
    of_window = split < 0
    if window is not None:
        begin = tl.load(start).to(tl.int32)
        of_window = split == S
        if of_window:
            first, last = K * 0, B
            base = window + group.to(tl.int64) * B * D
            if slot_identity is not None:
                ids = window_identity
            if inverse is not None:
                norms = inverse + K + group.to(tl.int64) * B

    shift = a * 0.0 + FLOOR
    total = a * 0.0
    phi_sum = a * 0.0
    weighed_phi = a * 0.0
    hard_sum = a * 0.0
    hard = tl.zeros([BLOCK_N], tl.int32)
    live = tl.zeros([BLOCK_N], tl.int32)
    beats = tl.zeros([BLOCK_N], tl.int32)
    hardest = a * 0.0 + NEVER
    hardest_slot = tl.zeros([BLOCK_N], tl.int32) - 1
    moment = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    for j0 in range(first, last, STEP):
        j = j0 + lane // PADDED
        there = j < last
        at_row = j
        if SUB > 1:
            there = there & (lane % PADDED < SUB)
            at_row = j * SUB + lane % PADDED
        theirs = j
        if slot_identity is not None:
            theirs = tl.load(ids + j, mask=there, other=-1)
        held = holds_features(there, theirs, slot_identity, MASK_EMPTY)
        features = tl.load(
            base + at_row.to(tl.int64)[:, None] * D + d[None, :], mask=held[:, None] & (d < D)[None, :], other=0.0
        ).to(unit.dtype.element_ty)
        if IEEE:
            c = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for d0 in range(0, BLOCK_D, PIECE):
                e = d0 + tl.arange(0, PIECE)
                some = tl.load(unit + i[:, None] * BLOCK_D + e[None, :], mask=real[:, None], other=0.0)
                theirs_of = base + at_row.to(tl.int64)[:, None] * D + e[None, :]
                part = tl.load(theirs_of, mask=held[:, None] & (e < D)[None, :], other=0.0)
                c = tl.dot(some, tl.trans(part), c, input_precision=PRECISION)
        else:
            c = tl.dot(x, tl.trans(features), input_precision=PRECISION)
        if inverse is not None:
            norm = tl.load(norms + at_row, mask=held, other=0.0)
            c *= norm[None, :]
        slot = j
        if window is not None:
            slot = tl.where(of_window, j + begin, j)
            slot = tl.where(slot >= K, slot - K, slot)
            # Of the queue, the slots outside the window.
            there = there & (of_window | (_since(j, begin, K) >= B))
        alive = is_negative(
            there[None, :],
            slot[None, :],
            theirs[None, :],
            y[:, None],
            mine[:, None],
            slot_identity,
            identity,
            MASK_EMPTY,
        )
        if SUB > 1:
            alive = alive & is_nearest(c, SUB, 1, PADDED)
        shown, value, z, slope = logits_of(c, alive, scale, r0, r1, r2, r3, KIND)
        if SECOND:
            p = tl.where(shown != NEVER, tl.exp(z - known[:, None]) - even[:, None], 0.0)
            p *= tl.exp(a * 0.0 + lift)[:, None]
        else:
            highest, top, at, tile_beats, tile_live, tile_hard, tile_hard_sum, tile_phi_sum = seen_in_tile(
                shown, value, z, slot, a, scale, r0, KIND, SMOOTH
            )
            hardest_slot = tl.where(top > hardest, at, hardest_slot)
            hardest = tl.maximum(hardest, top)
            beats += tile_beats
            live += tile_live
            hard += tile_hard
            hard_sum += tile_hard_sum
            phi_sum += tile_phi_sum
            higher = tl.maximum(shift, highest - lift)
            fade = tl.exp(shift - higher)
            total *= fade
            weighed_phi *= fade
            if MOMENT:
                moment *= fade[:, None]
            shift = higher
            p = tl.exp(z - shift[:, None])
            total += tl.sum(p, 1)
            if SCALE_SLOPE:
                weighed_phi += tl.sum(tl.where(shown != NEVER, p * value, 0.0), 1)
        if MOMENT:
            if not (STRAIGHT or phi_is_identity(KIND)):
                p *= slope
            summed = features
            if inverse is not None:
                if HALF:  # an inverse norm may exceed what float16 holds
                    summed = (features.to(tl.float32) * norm[:, None]).to(features.dtype)
                else:
                    p *= norm[None, :]
            moment = tl.dot(p.to(features.dtype), summed, moment, input_precision=PRECISION)

    out = split.to(tl.int64) * N + i
    field = splits.to(tl.int64) * N
    if SECOND:
        moment *= tl.exp(a * 0.0 - lift)[:, None]
    else:
        store_part(
            partial, counts, field, out, real, shift, total, weighed_phi, hardest, hardest_slot, beats, live, hard, hard_sum,
            phi_sum, KIND, SMOOTH, SCALE_SLOPE,
        )  # fmt: skip
    if MOMENT:
        tl.store(moment_out + out[:, None] * BLOCK_D + d[None, :], moment, mask=real[:, None])


@triton.jit(do_not_specialize=COUNTS)
def combine_kernel(
    x, w, window, positive, start, margin_rows, rows, own_rows, exact_cosine, partial, counts, moment,
    loss_out, lse_out, hardest_out, slot_out, beats_out, residual_out, row_weight, gradient_out, live_out, slope_out,
    scale_slope_out, smoothing,
    N, K, D, B, rows_in_group, S, label_smoothing, p0, p1, p2, p3, p4, p5,
    KIND: tl.constexpr, P: tl.constexpr, NORMALIZE: tl.constexpr, STRAIGHT: tl.constexpr, LOSS: tl.constexpr,
    MOMENT: tl.constexpr, SMOOTH: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of probes over all S splits: the loss (LOSS), the gradient (MOMENT), or first the one and then the other.

    ``smoothing`` float64 [1], or None: ``label_smoothing``, which arrives as float32.
    """
    SUMS: tl.constexpr = rows.dtype.element_ty
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    real = i < N
    d = tl.arange(0, BLOCK_D)
    scale = tl.load(rows + SCALE * N + i, mask=real, other=1.0)
    field = S.to(tl.int64) * N
    highest = scale * 0.0 + NEVER
    sum_z = scale * 0.0
    top, at = scale * 0.0 + NEVER, tl.zeros([ROWS], tl.int32) - 1
    above, count, hard = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    phi_sum, weighed_phi, hard_sum = scale * 0.0, scale * 0.0, scale * 0.0
    gathered = tl.zeros([ROWS, BLOCK_D], SUMS)
    for split in range(S):
        part = split * N + i
        if LOSS:
            total = tl.load(partial + SUM * field + part, mask=real, other=0.0)
            shift = tl.load(partial + SHIFT * field + part, mask=real, other=NEVER)
            higher = tl.maximum(highest, tl.where(total > 0, shift, NEVER))
            before, here = tl.exp(highest - higher), tl.exp(tl.minimum(shift - higher, 0.0))
            sum_z = sum_z * before + total * here
            highest = higher
            part_top = tl.load(partial + HARDEST * field + part, mask=real, other=NEVER)
            at = tl.where(part_top > top, tl.load(counts + SLOT * field + part, mask=real, other=-1), at)
            top = tl.maximum(top, part_top)
            above += tl.load(counts + BEATS * field + part, mask=real, other=0)
            count += tl.load(counts + LIVE * field + part, mask=real, other=0)
            if needs_hard_mean(KIND):
                hard += tl.load(counts + HARD * field + part, mask=real, other=0)
                hard_sum += tl.load(partial + HARD_SUM * field + part, mask=real, other=0.0)
            if SMOOTH:
                phi_sum += tl.load(partial + PHI_SUM * field + part, mask=real, other=0.0)
            if scale_slope_out is not None:
                weighed_here = tl.load(partial + WEIGHED_PHI * field + part, mask=real, other=0.0)
                weighed_phi = weighed_phi * before + weighed_here * here
        if MOMENT:
            piece = tl.load(
                moment + part[:, None] * BLOCK_D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0
            )
            if LOSS:
                gathered = gathered * before[:, None] + piece * here[:, None]
            else:
                gathered += piece
    if LOSS:
        q0, q1, q2, q3, q4, q5 = _parameters(margin_rows, i, real, N, p0, p1, p2, p3, p4, p5, P, SUMS)
        exact = tl.load(exact_cosine + 1 + i, mask=real, other=0.0)
        sine = tl.load(exact_cosine + 1 + N + i, mask=real, other=0.0)
        psi, slope = target_margin(exact, sine, hard_sum / tl.maximum(hard, 1), q0, q1, q2, q3, q4, q5, KIND)
        if STRAIGHT:
            slope = exact * 0.0 + 1.0
        t = scale * psi
        # The target never enters the sum it is subtracted from: nothing cancels as its probability nears 1.
        excess = tl.where(sum_z == 0, NEVER, highest + tl.log(tl.where(sum_z == 0, 1.0, sum_z)) - t)
        excess = tl.where(exact == exact, excess, exact)  # a probe that is not finite may have no negatives
        small = tl.exp(-tl.abs(excess))
        # log(1 + x) as x log(1 + x) / ((1 + x) - 1): the rounding of 1 + x is in both.
        rounded = 1.0 + small - 1.0
        log1p = tl.where(rounded == 0, small, tl.log(1.0 + small) * (small / tl.where(rounded == 0, 1.0, rounded)))
        plain = tl.where(excess > 0, excess, 0.0 * exact) + log1p
        wrong = tl.where(excess > 0, 1.0, small) / (1.0 + small)
        if smoothing is not None:
            label_smoothing = tl.load(smoothing)
        share = label_smoothing / (1 + count)
        loss = plain
        if SMOOTH:
            loss -= share * (scale * phi_sum - count * t)
        residual = -(wrong - label_smoothing + share)
        target_slope = (scale * slope * residual).to(SUMS)
        weight = tl.load(row_weight + i, mask=real, other=0.0)
        if MEAN:
            all_weights = tl.load(exact_cosine)
            weight = (weight / tl.where(all_weights == 0, 1.0, all_weights)).to(SUMS)
            tl.store(row_weight + i, weight, mask=real)
        tl.store(loss_out + i, tl.where(weight == 0, 0.0, loss * weight), mask=real)
        tl.store(lse_out + i, plain + t, mask=real)
        tl.store(hardest_out + i, tl.where(at < 0, -float("inf"), top), mask=real)
        tl.store(slot_out + i, at.to(tl.int64), mask=real)
        tl.store(beats_out + i, above.to(tl.int64), mask=real)
        tl.store(residual_out + i, residual, mask=real)
        tl.store(live_out + i, count.to(tl.int64), mask=real)
        tl.store(slope_out + i, target_slope, mask=real)
        if scale_slope_out is not None:
            in_scale = (
                tl.where(sum_z == 0, 0.0, wrong * (weighed_phi / tl.where(sum_z == 0, 1.0, sum_z))) + residual * psi
            )
            if SMOOTH:
                in_scale -= share * phi_sum
            tl.store(scale_slope_out + i, in_scale, mask=real)
        if SMOOTH:
            tl.store(rows + UNIFORM * N + i, share, mask=real)
        gathered *= tl.where(sum_z == 0, 0.0, wrong.to(SUMS) / tl.where(sum_z == 0, 1.0, sum_z))[:, None]
    else:
        target_slope = tl.load(slope_out + i, mask=real, other=0.0)
    if MOMENT:
        inverse = tl.load(rows + INVERSE_NORM * N + i, mask=real, other=0.0)
        usable = real & (inverse != 0)  # an ignored row may hold anything, and a short one has no gradient
        own_row = tl.load(own_rows + i, mask=real, other=-1)
        own = _target_row(w, window, positive, start, own_row, i, usable, d, K, D, B, rows_in_group, NORMALIZE)
        mask = usable[:, None] & (d < D)[None, :]
        row = tl.load(x + i[:, None] * D + d[None, :], mask=mask, other=0.0)
        hat = row.to(SUMS) * inverse[:, None]
        along = tl.sum(gathered * hat, 1)
        # What the target has across the probe, in float64: where they are nearly parallel the slope is large, this small.
        wide = row.to(tl.float64)
        square = tl.sum(wide * wide, 1)
        share = tl.sum(own * wide, 1) / tl.where(square > 0, square, 1.0)
        across = own - share[:, None] * wide
        result = scale[:, None] * (gathered - along[:, None] * hat) + (target_slope[:, None] * across).to(SUMS)
        result *= inverse[:, None]
        tl.store(gradient_out + i[:, None] * D + d[None, :], result, mask=real[:, None] & (d < D)[None, :])


@triton.jit
def through_norm(sums, features, norm):
    """From the gradient for unit rows to that for the rows themselves, ``norm``: their inverse norms. Zeros for rows that are not
    finite and have no gradient, as empty slots may be."""
    hat = features * norm[:, None]
    result = (sums - tl.sum(sums * hat, 1)[:, None] * hat) * norm[:, None]
    nothing = (tl.sum(tl.abs(sums), 1) == 0)[:, None]
    return tl.where(nothing, 0.0, result)


@triton.jit(do_not_specialize=COUNTS)
def prototypes_kernel(
    unit, w, inverse, start, own_rows, identity, slot_identity, rows, lse, negatives, incoming, target_slope,
    gradient, N, K, D, B, label_smoothing,
    KIND: tl.constexpr, MASK_EMPTY: tl.constexpr, STRAIGHT: tl.constexpr, TARGETS: tl.constexpr,
    SUB: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of slots over all probes: its rows of the prototypes' gradient, the targets' part included (TARGETS: unless these
    are explicit positives). Slots that a window replaces get zeros. ``incoming`` [N]: what each probe's loss is multiplied by.
    """
    lane = tl.arange(0, BLOCK_K)
    j = tl.program_id(0) * (BLOCK_K // PADDED) + lane // PADDED
    there = j < K
    row_number = j
    if SUB > 1:
        there = there & (lane % PADDED < SUB)
        row_number = j * SUB + lane % PADDED
    d = tl.arange(0, BLOCK_D)
    at = row_number.to(tl.int64)[:, None] * D + d[None, :]
    inside = there[:, None] & (d < D)[None, :]
    IEEE: tl.constexpr = (unit.dtype.element_ty == tl.float32) and (PRECISION == "ieee")
    theirs = j
    if slot_identity is not None:
        theirs = tl.load(slot_identity + j, mask=there, other=-1)
    features = tl.load(w + at, mask=inside, other=0.0)
    norm = tl.full([BLOCK_K], 1.0, tl.float32)
    if inverse is not None:
        norm = tl.load(inverse + row_number, mask=there, other=0.0)
    counts = there
    if start is not None:
        counts = there & (_since(j, tl.load(start).to(tl.int32), K) >= B)
    # float16 has a narrow range: the largest weight that can occur is brought to its upper end.
    HALF: tl.constexpr = unit.dtype.element_ty == tl.float16
    factor = tl.full([1], 1.0, tl.float32)
    if HALF:
        largest = tl.zeros([1], tl.float32)
        for first in range(0, N, 1024):
            i = first + tl.arange(0, 1024)
            real = i < N
            scale = tl.load(rows + SCALE * N + i, mask=real, other=0.0)
            at_target = tl.load(target_slope + i, mask=real, other=0.0)
            factors = tl.load(incoming + i, mask=real, other=0.0)
            most = tl.maximum(4.0 * scale, tl.abs(at_target)) * tl.abs(factors)
            largest = tl.maximum(largest, tl.max(most, 0))
        factor = LARGEST_FLOAT16 / tl.maximum(largest, 1e-30)
    sums = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N)
        real = i < N
        x = tl.load(unit + i.to(tl.int64)[:, None] * BLOCK_D + d[None, :], mask=real[:, None], other=0.0)
        own_row, scale, r0, r1, r2, r3 = probes_of(rows, own_rows, i, real, N)
        y = tl.where(own_row < 0, -1, own_row // SUB)
        mine = y
        if identity is not None:
            mine = tl.load(identity + i, mask=real, other=-2)
        factors = tl.load(incoming + i, mask=real, other=0.0) * factor
        known = tl.load(lse + i, mask=real, other=0.0)
        even = label_smoothing / (1.0 + tl.load(negatives + i, mask=real, other=0).to(tl.float32))
        if IEEE:
            c = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
            for d0 in range(0, BLOCK_D, PIECE):
                e = d0 + tl.arange(0, PIECE)
                some = tl.load(unit + i.to(tl.int64)[:, None] * BLOCK_D + e[None, :], mask=real[:, None], other=0.0)
                part = tl.load(
                    w + row_number.to(tl.int64)[:, None] * D + e[None, :],
                    mask=there[:, None] & (e < D)[None, :],
                    other=0.0,
                )
                c = tl.dot(part, tl.trans(some), c, input_precision=PRECISION)
        else:
            c = tl.dot(features, tl.trans(x), input_precision=PRECISION)
        c *= norm[:, None]
        is_target = counts[:, None] & (row_number[:, None] == own_row[None, :])
        # Probes behind the last one need no mask here: their factors are 0.
        alive = is_negative(
            counts[:, None], j[:, None], theirs[:, None], y[None, :], mine[None, :], slot_identity, identity, MASK_EMPTY
        )
        if SUB > 1:
            alive = alive & is_nearest(c, SUB, 0, PADDED)
        value, slope = phi(c, r0[None, :], r1[None, :], r2[None, :], r3[None, :], KIND)
        p = (tl.exp(scale[None, :] * value - known[None, :]) - even[None, :]) * scale[None, :]
        if not STRAIGHT:
            p *= slope
        p = tl.where(alive, p, 0.0)
        if TARGETS:
            at_target = tl.load(target_slope + i, mask=real, other=0.0)
            p = tl.where(is_target, at_target[None, :], p)
        p = tl.where(factors[None, :] == 0, 0.0, p * factors[None, :])
        sums = tl.dot(p.to(x.dtype), x, sums, input_precision=PRECISION)
    sums *= (1.0 / factor)[:, None]
    if inverse is not None:
        sums = through_norm(sums, features.to(tl.float32), norm)
    tl.store(gradient + at, sums.to(gradient.dtype.element_ty), mask=inside)
