"""The staged sweep in Triton: what lies before and behind the library's matrix products. sst_fast/backends/staged.py launches these
kernels and says how they follow one another.

Sizes as in kernels/margin_softmax.py, and: a *chunk* is a run of slots whose weights [N, C] are held at once, a column for each of their rows; a
*piece* is a part of the features. Masks, margins and statistics are those of the fused sweep. With sub-centres a tile has BLOCK_K lanes,
PADDED for each slot, of which SUB are its rows; all but the row nearest to a probe get weights of 0.

``partial`` [PARTIAL_FIELDS, T, N] and ``counts`` [COUNT_FIELDS, T, N] hold what the tile of slots number t of every chunk has seen:
a program adds to what its forerunner in the chunk before has left, so their size does not depend on K, and their sums not on timing.
"""

import triton
import triton.language as tl
from sst_fast.kernels.margin_softmax import (
    BEATS,
    COUNTS,
    FLOOR,
    HARD,
    HARD_SUM,
    HARDEST,
    LIVE,
    NEVER,
    PHI_SUM,
    SCALE,
    SHIFT,
    SLOT,
    SUM,
    UNIFORM,
    WEIGHED_PHI,
    _since,
    holds_features,
    is_nearest,
    is_negative,
    logits_of,
    probes_of,
    seen_in_tile,
    store_part,
    through_norm,
)
from sst_fast.kernels.margins import largest_phi, needs_hard_mean, phi, phi_is_identity

OFTEN = [*COUNTS, "first", "count", "row", "stride", "T", "fresh"]
# float32 holds exp(x) for x between -87 and 88. Weights are exp(logit - shift), with the shift this far below the largest logit
# that can be: then sums over a million slots stay finite,
ROOM = tl.constexpr(60.0)
# and a row needs a shift of its own only where its largest logit lies outside these bounds from the common one.
LEAST, MOST = tl.constexpr(-64.0), tl.constexpr(70.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def common_shift(scale, r0, r1, r2, r3, KIND: tl.constexpr):
    """What weights are relative to before anything is known of the row's logits."""
    return scale * largest_phi(r0, r1, r2, r3, KIND) - ROOM


@triton.jit
def _cosines(
    unit, i, real, w, j, held, D, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Products of probes i with rows j of ``w`` [BLOCK_N, BLOCK_K], float32 at least, over pieces of the features."""
    c = tl.zeros([BLOCK_N, BLOCK_K], tl.float64 if unit.dtype.element_ty == tl.float64 else tl.float32)
    for d0 in range(0, D, PIECE):
        d = d0 + tl.arange(0, PIECE)
        x = tl.load(unit + i[:, None] * BLOCK_D + d[None, :], mask=real[:, None], other=0.0)
        f = tl.load(w + j.to(tl.int64)[:, None] * D + d[None, :], mask=held[:, None] & (d < D)[None, :], other=0.0)
        if f.dtype != x.dtype:
            f = f.to(tl.float32).to(x.dtype)
        c = tl.dot(x, tl.trans(f), c, input_precision=PRECISION)
    return c


@triton.jit(do_not_specialize=OFTEN)
def weigh_kernel(
    unit, w, inverse, start, own_rows, identity, ids, rows, cosine, shifts, incoming, target_slope, weights, partial, counts,
    N, K, D, B, rows_in_group, blocks_in_group, first, count, row, stride, T, C, fresh, lift,
    KIND: tl.constexpr, MASK_EMPTY: tl.constexpr, STRAIGHT: tl.constexpr, OF_WINDOW: tl.constexpr, SEEN: tl.constexpr,
    STORE: tl.constexpr, KEEP: tl.constexpr, SMOOTH: tl.constexpr, SCALE_SLOPE: tl.constexpr, EVEN: tl.constexpr,
    GIVEN: tl.constexpr, SUB: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """A tile of probes and slots: product 1 and what follows it. Slots [first, first + count) of the queue, or of the window
    (OF_WINDOW), which begin at row ``row`` of ``w``, or of the group's ``stride`` rows of it.

    Product 1 is made here, or was made into ``weights`` (GIVEN). SEEN: partial sums and statistics. STORE: ``weights`` [N, C], times
    the slope of phi and the prototype's inverse norm: exp(logit - shift) with the shift of ``shifts`` [N], or None: the common
    one; minus the even share of label smoothing (EVEN), times exp(lift). For the prototypes' own gradient ``incoming`` [N] and
    the scale multiply them, targets get ``target_slope`` (None: explicit positives), and nothing the inverse norm. KEEP: for
    backward, which may leave out a row that is not a number: its weights are 0.
    """
    block, tile = tl.program_id(0), tl.program_id(1)
    STEP: tl.constexpr = BLOCK_K // PADDED
    if (tile * STEP >= count) & (fresh == 0):
        return
    lane = tl.arange(0, BLOCK_K)
    n = tile * STEP + lane // PADDED
    column = n
    there = n < count
    if SUB > 1:
        there = there & (lane % PADDED < SUB)
        column = n * SUB + lane % PADDED
    group = block // blocks_in_group
    r = (block % blocks_in_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = r < rows_in_group
    i = (group * rows_in_group + r).to(tl.int64)
    place = (weights + i * C)[:, None] + column[None, :]
    inside = real[:, None]  # rows are as long as whole tiles: nothing is left out along them, unless lanes are no rows
    if SUB > 1:
        inside = inside & there[None, :]
    j = first + n
    row_number = first * SUB + column
    slot = j
    counts_here = there
    if start is not None:
        begin = tl.load(start).to(tl.int32)
        if OF_WINDOW:
            slot = tl.where(j + begin >= K, j + begin - K, j + begin)
        else:
            counts_here = there & (_since(j, begin, K) >= B)
    theirs = n
    if ids is not None:
        theirs = tl.load(ids + j, mask=there, other=-1)
    held = holds_features(counts_here, theirs, ids, MASK_EMPTY)
    if GIVEN:
        c = tl.where(held[None, :], tl.load(place, mask=inside, other=0.0), 0.0)
    else:
        base = w
        if OF_WINDOW:
            base = w + group.to(tl.int64) * stride * D
        c = _cosines(unit, i, real, base, row + column, held, D, PRECISION, BLOCK_N, BLOCK_K, BLOCK_D, PIECE)
    norm = n * 0.0 + 1.0
    if inverse is not None:
        norms = inverse
        if OF_WINDOW:
            norms = inverse + K + group.to(tl.int64) * B
        norm = tl.load(norms + row_number, mask=held, other=0.0)
        c *= norm[None, :]
    own_row, scale, r0, r1, r2, r3 = probes_of(rows, own_rows, i, real, N)
    y = own_row
    if SUB > 1:
        y = tl.where(own_row < 0, -1, own_row // SUB)
    # Masks of a whole tile are dear: they are kept in registers and taken apart bit by bit. A slot that counts for nobody has cosines
    # of 0, to which NEVER is added, and what is needed behind the one mask that remains is found from ``shown``.
    c += tl.where(held, 0.0, NEVER)[None, :]
    other = slot[None, :] != y[:, None]
    if (ids is not None) and (identity is not None):
        other = other & (theirs[None, :] != tl.load(identity + i, mask=real, other=-2)[:, None])
    if SUB > 1:
        other = other & is_nearest(c, SUB, 1, PADDED)
    shown = tl.where(other, c, NEVER)
    value, slope = phi(shown, r0[:, None], r1[:, None], r2[:, None], r3[:, None], KIND)
    z = scale[:, None] * value
    if (shifts is not None) or not (STORE and phi_is_identity(KIND)):  # elsewhere any large negative logit serves
        z = tl.where(shown <= NEVER, NEVER, z)

    out = tile.to(tl.int64) * N + i
    field = T.to(tl.int64) * N
    before = real & (r * 0 + fresh == 0)
    if SEEN:
        a = tl.load(cosine + i, mask=real, other=0.0)
        highest, top, at, beats, live, hard, hard_sum, phi_sum = seen_in_tile(
            shown, value, z, slot, a, scale, r0, KIND, SMOOTH
        )
        old_highest = tl.load(partial + SHIFT * field + out, mask=before, other=FLOOR)
        total = tl.load(partial + SUM * field + out, mask=before, other=0.0)
        highest = tl.maximum(highest, old_highest)
        weighed_phi = total * 0.0
        if SCALE_SLOPE:
            weighed_phi = tl.load(partial + WEIGHED_PHI * field + out, mask=before, other=0.0)
        if not STORE:  # the sums follow the largest logit
            fade = tl.exp(old_highest - highest)
            e = tl.exp(z - highest[:, None])
            total = total * fade + tl.sum(e, 1)
            if SCALE_SLOPE:
                weighed_phi = weighed_phi * fade + tl.sum(e * value, 1)
        old_top = tl.load(partial + HARDEST * field + out, mask=before, other=NEVER)
        at = tl.where(top > old_top, at, tl.load(counts + SLOT * field + out, mask=before, other=-1))
        top = tl.maximum(top, old_top)
        live += tl.load(counts + LIVE * field + out, mask=before, other=0)
        beats += tl.load(counts + BEATS * field + out, mask=before, other=0)
        if needs_hard_mean(KIND):
            hard += tl.load(counts + HARD * field + out, mask=before, other=0)
            hard_sum += tl.load(partial + HARD_SUM * field + out, mask=before, other=0.0)
        if SMOOTH:
            phi_sum += tl.load(partial + PHI_SUM * field + out, mask=before, other=0.0)
    if STORE:
        if shifts is not None:
            shift = tl.load(shifts + i, mask=real, other=0.0)
        else:
            shift = common_shift(scale, r0, r1, r2, r3, KIND)
        if phi_is_identity(KIND) and shifts is None:
            p = tl.exp2(shown * (scale * LOG2E)[:, None] - (shift * LOG2E)[:, None])
        else:
            p = tl.exp2(z * LOG2E - (shift * LOG2E)[:, None])
        if SEEN:
            total += tl.sum(p, 1)
            if SCALE_SLOPE:
                weighed_phi += tl.sum(p * value, 1)
        if EVEN:
            even = tl.load(rows + UNIFORM * N + i, mask=real, other=0.0)
            p = tl.where(shown != NEVER, p - even[:, None], 0.0) * tl.exp(scale * 0.0 + lift)[:, None]
        if not (STRAIGHT or phi_is_identity(KIND)):
            p *= slope
        if incoming is not None:
            factor = tl.load(incoming + i, mask=real, other=0.0)
            p *= (scale * factor)[:, None]
        elif inverse is not None:
            p *= norm[None, :]
        if incoming is not None:
            if target_slope is not None:
                at_target = tl.load(target_slope + i, mask=real, other=0.0)
                is_target = counts_here[None, :] & (row_number[None, :] == own_row[:, None])
                p = tl.where(is_target, (at_target * factor)[:, None], p)
            p = tl.where((factor == 0)[:, None], 0.0, p)
        if KEEP:
            p = tl.where(p == p, p, 0.0)
        tl.store(place, p.to(weights.dtype.element_ty), mask=inside)
    if SEEN:
        store_part(
            partial, counts, field, out, real, highest, total, weighed_phi, top, at, beats, live, hard, hard_sum, phi_sum, KIND,
            SMOOTH, SCALE_SLOPE,
        )  # fmt: skip


@triton.jit
def _gathered(
    partial, counts, i, real, zero, N, T, KIND: tl.constexpr, COMMON: tl.constexpr, SMOOTH: tl.constexpr, SCALE_SLOPE: tl.constexpr,
    TILES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Probes i over the T tiles of a chunk: what :func:`store_part` takes, their largest logit first. ``zero``: 0.0 for each.

    COMMON: the tiles' sums are all relative to the same shift; otherwise each to the tile's largest logit, as the result is then.
    """
    field = T.to(tl.int64) * N
    highest = zero + NEVER
    top, at = zero + NEVER, tl.zeros([BLOCK_N], tl.int32) - 1
    total, weighed_phi, phi_sum, hard_sum = zero, zero, zero, zero
    live, beats, hard = tl.zeros([BLOCK_N], tl.int32), tl.zeros([BLOCK_N], tl.int32), tl.zeros([BLOCK_N], tl.int32)
    for t0 in range(0, T, TILES):
        t = t0 + tl.arange(0, TILES)
        inside = (t < T)[:, None] & real[None, :]
        of = t.to(tl.int64)[:, None] * N + i[None, :]
        tops = tl.load(partial + HARDEST * field + of, mask=inside, other=NEVER)
        here = tl.max(tops, 0)
        best = tl.load(counts + SLOT * field + of, mask=inside & (tops == here[None, :]), other=-1)
        at = tl.where(here > top, tl.max(best, 0), at)
        top = tl.maximum(top, here)
        shift = tl.load(partial + SHIFT * field + of, mask=inside, other=NEVER)
        sums = tl.load(partial + SUM * field + of, mask=inside, other=0.0)
        higher = tl.maximum(highest, tl.max(shift, 0))
        fade, part = zero + 1.0, sums * 0.0 + 1.0
        if not COMMON:
            fade, part = tl.exp(highest - higher), tl.exp(shift - higher[None, :])
        total = total * fade + tl.sum(sums * part, 0)
        if SCALE_SLOPE:
            weighed = tl.load(partial + WEIGHED_PHI * field + of, mask=inside, other=0.0)
            weighed_phi = weighed_phi * fade + tl.sum(weighed * part, 0)
        highest = higher
        live += tl.sum(tl.load(counts + LIVE * field + of, mask=inside, other=0), 0)
        beats += tl.sum(tl.load(counts + BEATS * field + of, mask=inside, other=0), 0)
        if needs_hard_mean(KIND):
            hard += tl.sum(tl.load(counts + HARD * field + of, mask=inside, other=0), 0)
            hard_sum += tl.sum(tl.load(partial + HARD_SUM * field + of, mask=inside, other=0.0), 0)
        if SMOOTH:
            phi_sum += tl.sum(tl.load(partial + PHI_SUM * field + of, mask=inside, other=0.0), 0)
    return highest, total, weighed_phi, top, at, beats, live, hard, hard_sum, phi_sum


@triton.jit(do_not_specialize=["N", "T"])
def gather_kernel(
    partial, counts, rows, partial_out, counts_out, N, T, lift,
    KIND: tl.constexpr, SMOOTH: tl.constexpr, SCALE_SLOPE: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of probes over the T tiles of a chunk, each relative to its own largest logit: their sums, as one part for
    ``combine_kernel``, relative to the largest logit of all less ``lift``."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    real = i < N
    zero = tl.load(rows + SCALE * N + i, mask=real, other=0.0) * 0.0
    highest, total, weighed_phi, top, at, beats, live, hard, hard_sum, phi_sum = _gathered(
        partial, counts, i, real, zero, N, T, KIND, False, SMOOTH, SCALE_SLOPE, TILES, BLOCK_N
    )
    lifted = tl.exp(zero + lift)
    store_part(
        partial_out, counts_out, N, i, real, highest - lift, total * lifted, weighed_phi * lifted, top, at, beats, live, hard,
        hard_sum, phi_sum, KIND, SMOOTH, SCALE_SLOPE,
    )  # fmt: skip


@triton.jit
def _sweep_again(
    base, ids, norms, begin, of_window, last, unit, i, real, y, mine, identity, scale, r0, r1, r2, r3, shift, even, lift,
    total, weighed_phi, moment, start, kept, anew, stride, K, D, B, columns,
    KIND: tl.constexpr, MASK_EMPTY: tl.constexpr, STRAIGHT: tl.constexpr, SUB: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Adds slots [0, last) of the queue or the window to ``total``, ``weighed_phi`` and, for some columns, ``moment``; weights of rows ``anew`` go to
    ``kept`` [N, stride], if that is not None."""
    lane = tl.arange(0, BLOCK_K)
    for j0 in range(0, last, BLOCK_K // PADDED):
        j = j0 + lane // PADDED
        there = j < last
        row_number = j
        if SUB > 1:
            there = there & (lane % PADDED < SUB)
            row_number = j * SUB + lane % PADDED
        exists = there
        theirs = j
        if ids is not None:
            theirs = tl.load(ids + j, mask=there, other=-1)
        held = holds_features(there, theirs, ids, MASK_EMPTY)
        c = _cosines(unit, i, real, base, row_number, held, D, PRECISION, BLOCK_N, BLOCK_K, BLOCK_D, PIECE)
        if norms is not None:
            norm = tl.load(norms + row_number, mask=held, other=0.0)
            c *= norm[None, :]
        slot = j
        if start is not None:
            slot = tl.where(of_window, j + begin, j)
            slot = tl.where(slot >= K, slot - K, slot)
            there = there & (of_window | (_since(j, begin, K) >= B))
        alive = is_negative(
            there[None, :], slot[None, :], theirs[None, :], y[:, None], mine[:, None], ids, identity, MASK_EMPTY
        )
        if SUB > 1:
            alive = alive & is_nearest(c, SUB, 1, PADDED)
        shown, value, z, slope = logits_of(c, alive, scale, r0, r1, r2, r3, KIND)
        p = tl.exp(z - shift[:, None])
        total += tl.sum(p, 1)
        weighed_phi += tl.sum(tl.where(alive, p * value, 0.0), 1)
        p = tl.where(shown != NEVER, p - even[:, None], 0.0) * tl.exp(scale * 0.0 + lift)[:, None]
        if not (STRAIGHT or phi_is_identity(KIND)):
            p *= slope
        if kept is not None:
            weighed = p
            if norms is not None:
                weighed *= norm[None, :]
            tl.store(
                kept + i[:, None] * stride + row_number[None, :],
                weighed.to(kept.dtype.element_ty),
                mask=anew[:, None] & exists[None, :],
            )
        summed = tl.load(
            base + row_number.to(tl.int64)[:, None] * D + columns[None, :],
            mask=held[:, None] & (columns < D)[None, :],
            other=0.0,
        ).to(moment.dtype)
        if norms is not None:
            summed *= norm[:, None]
        moment = tl.dot(
            p.to(unit.dtype.element_ty), summed.to(unit.dtype.element_ty), moment, input_precision=PRECISION
        )
    return total, weighed_phi, moment


@triton.jit(do_not_specialize=[*COUNTS, "T"])
def again_kernel(
    tiles, tile_counts, unit, w, window, inverse, start, own_rows, identity, slot_identity, window_identity, rows, shifts, partial,
    counts, moment, kept, N, K, D, B, T, rows_in_group, blocks_in_group, stride, lift,
    KIND: tl.constexpr, MASK_EMPTY: tl.constexpr, STRAIGHT: tl.constexpr, SMOOTH: tl.constexpr,
    SCALE_SLOPE: tl.constexpr, SUB: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of probes and some columns of their moments: adds up what the tiles of a chunk have seen of them, as ``gather_kernel``
    does, where their sums are relative to the common shift (``tiles`` and ``tile_counts``; None: it was done before, relative to
    ``shifts``), and ends there unless one of these probes needs more.

    Those are the ones for which the common shift was not good enough: they get their largest logit as the shift, and sum and moment are
    taken anew. And those whose moment is NaN though their sum is not: an empty slot was not finite, which the library's product
    does not know, and the moment is taken anew without it. ``kept`` [N, stride], if not None, gets the weights of the former.
    """
    block = tl.program_id(0)
    group = block // blocks_in_group
    r = (block % blocks_in_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = r < rows_in_group
    i = (group * rows_in_group + r).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = i[:, None] * BLOCK_D + columns[None, :]
    inside = real[:, None] & (columns < D)[None, :]
    old = tl.load(moment + at, mask=inside, other=0.0)
    nan = tl.max((old != old).to(tl.int32), 1)
    own_row, scale, r0, r1, r2, r3 = probes_of(rows, own_rows, i, real, N)
    first = real & (r * 0 + tl.program_id(1) == 0)  # by one program for all columns
    anew = nan * 0
    if tiles is not None:
        highest, total, weighed_phi, top, seen_at, beats, live, hard, hard_sum, phi_sum = _gathered(
            tiles, tile_counts, i, real, scale * 0.0, N, T, KIND, True, SMOOTH, SCALE_SLOPE, TILES, BLOCK_N
        )
        shift = common_shift(scale, r0, r1, r2, r3, KIND)
        over = highest - shift
        anew = ((live > 0) & ((over < LEAST) | (over > MOST))).to(tl.int32)
        shift = tl.where(anew > 0, highest, shift)
        store_part(
            partial, counts, N, i, first, shift, total, weighed_phi, top, seen_at, beats, live, hard, hard_sum, phi_sum, KIND, SMOOTH,
            SCALE_SLOPE,
        )  # fmt: skip
    else:
        total = tl.load(partial + SUM * N + i, mask=real, other=0.0)
        shift = tl.load(shifts + i, mask=real, other=0.0)
    wanting = tl.maximum(tl.where(total == total, nan, 0), anew)
    if tl.max(wanting, 0) == 0:
        return
    y = tl.where(own_row < 0, -1, own_row // SUB)
    mine = y
    if identity is not None:
        mine = tl.load(identity + i, mask=real, other=-2)
    even = scale * 0.0
    if SMOOTH:
        even = tl.load(rows + UNIFORM * N + i, mask=real, other=0.0)
    begin = K * 0
    if start is not None:
        begin = tl.load(start).to(tl.int32)
    sums, weighed = scale * 0.0, scale * 0.0
    found = tl.zeros([BLOCK_N, COLUMNS], rows.dtype.element_ty)
    sums, weighed, found = _sweep_again(
        w, slot_identity, inverse, begin, begin < 0, K, unit, i, real, y, mine, identity, scale, r0, r1, r2, r3, shift, even,
        lift, sums, weighed, found, start, kept, first & (anew > 0), stride, K, D, B, columns,
        KIND, MASK_EMPTY, STRAIGHT, SUB, PADDED, PRECISION, BLOCK_N, BLOCK_K, BLOCK_D, PIECE,
    )  # fmt: skip
    if window is not None:
        norms = inverse
        if inverse is not None:
            norms = inverse + K + group.to(tl.int64) * B
        ids = slot_identity
        if slot_identity is not None:
            ids = window_identity
        sums, weighed, found = _sweep_again(
            window + group.to(tl.int64) * B * D, ids, norms, begin, begin >= 0, B, unit, i, real, y, mine, identity, scale, r0,
            r1, r2, r3, shift, even, lift, sums, weighed, found, start, None, anew > 0, stride, K, D, B, columns,
            KIND, MASK_EMPTY, STRAIGHT, SUB, PADDED, PRECISION, BLOCK_N, BLOCK_K, BLOCK_D, PIECE,
        )  # fmt: skip
    tl.store(moment + at, found, mask=inside & (wanting > 0)[:, None])
    if tiles is not None:
        tl.debug_barrier()  # other threads may have stored the sums that these replace
        tl.store(partial + SUM * N + i, sums, mask=first & (anew > 0))
        if SCALE_SLOPE:
            tl.store(partial + WEIGHED_PHI * N + i, weighed, mask=first & (anew > 0))


@triton.jit(do_not_specialize=["N", "K", "B", "stride", "words"])
def keep_kernel(
    rows, own_rows, exact_cosine, inverse, start, lse, shifts, target_slope, kept, kept_words, N, K, B, stride, words, lift,
    TARGETS: tl.constexpr, PARALLEL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Completes what forward keeps of a block of probes: ``kept`` [N, stride] are weights relative to ``shifts`` [N] less ``lift``.

    The last of a row's words [N, words], float32 or wide, becomes what turns its weights into derivatives of the row's loss in cosines. The
    target's weight is such that this holds for it too (TARGETS: unless these are explicit positives), or 0: where it would exceed the
    range, and where probe and prototype are nearly parallel (:meth:`split_parallel`). Backward adds these apart.
    """
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    real = i < N
    scale = tl.load(rows + SCALE * N + i, mask=real, other=1.0).to(tl.float64)
    shift = tl.load(shifts + i, mask=real, other=0.0).to(tl.float64)
    over = shift - lift - tl.load(lse + i, mask=real, other=0.0)
    over = tl.where(over > -LEAST, -LEAST, over)  # only of a row without negatives, all of whose weights are 0
    each = scale * tl.exp(over)
    tl.store(kept_words + i * words + words - 1, each, mask=real)
    if TARGETS:
        y = tl.load(own_rows + i, mask=real, other=-1)
        known = real & (y >= 0)
        if start is not None:
            known = known & (_since(y, tl.load(start).to(tl.int32), K) >= B)
        p = tl.load(target_slope + i, mask=real, other=0.0) / each
        HALF: tl.constexpr = kept.dtype.element_ty == tl.float16
        most = 6e4 if HALF else 1e37
        if inverse is not None:
            if not HALF:
                p *= tl.load(inverse + y, mask=known, other=0.0)
            sine = tl.load(exact_cosine + 1 + N + i, mask=real, other=0.0)
            p = tl.where(sine < PARALLEL, 0.0, p)
        p = tl.where(tl.abs(p) <= most, p, 0.0)
        tl.store(kept + i * stride + y, p.to(kept_words.dtype.element_ty).to(kept.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["first", "count"])
def finish_prototypes_kernel(
    sums, w, inverse, factor, gradient, first, count, D, WEIGHED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of the prototypes' gradient from ``sums`` [count, D], float32 or wide: divided by ``factor`` [1] and taken through the
    normalisation, where there are such. WEIGHED: the inverse norm is in the sums already."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = n < count
    d = tl.arange(0, BLOCK_D)
    inside = there[:, None] & (d < D)[None, :]
    result = tl.load(sums + n.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)
    if factor is not None:
        result *= 1.0 / tl.load(factor)
    at = (first + n).to(tl.int64)[:, None] * D + d[None, :]
    if inverse is not None:
        norm = tl.load(inverse + first + n, mask=there, other=0.0)
        if WEIGHED:
            known = norm > 0  # not that of a row that is not finite, whose sums are 0
            result *= tl.where(known, 1.0 / tl.where(known, norm, 1.0), 0.0)[:, None]
        result = through_norm(result, tl.load(w + at, mask=inside, other=0.0).to(result.dtype), norm)
    # Triton's interpreter makes NaN of some numbers on the way from float64 to bfloat16.
    if gradient.dtype.element_ty != tl.float64:
        result = result.to(tl.float32)
    tl.store(gradient + at, result.to(gradient.dtype.element_ty), mask=inside)
