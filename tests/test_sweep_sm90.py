"""The Hopper sweep without a GPU: index arithmetic, schedule, the kernel's own code on CPU threads, and its barriers.

The schedule and the barriers' users are restated from csrc/cuda/sweep_sm90.h; tile and address arithmetic (csrc/tiles.h) are the compiled
functions themselves.
"""

import ctypes
import os
import random
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import answer, make

from sst_fast import (
    AMSoftmax,
    ArcNegFace,
    ArcSoftmax,
    CircleLoss,
    CurricularFace,
    MVSoftmax,
    NPCFace,
    functional,
)  # fmt: skip
from sst_fast.backends import hopper
from sst_fast.backends.extension import compiled
from sst_fast.functional import margin_softmax

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(compiled is None, reason="the extension is not built")
ROWS, SLOTS = hopper.ROWS, hopper.SLOTS
NEVER, SLACK = -1e30, 8.0


def tiles_of(k, b):
    return -(-k // SLOTS) + -(-b // SLOTS)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 700), st.data())
def test_every_slot_is_swept_once(k, data):
    b = data.draw(st.integers(0, k))
    start = data.draw(st.integers(0, k - 1))
    rows, groups, processors = (data.draw(st.integers(1, n)) for n in (300, 2, 140))
    plan = hopper.plan(rows, groups, k, b, processors, data.draw(st.booleans()))
    blocks = groups * -(-rows // ROWS)
    assert plan.splits == 1 or plan.splits * blocks <= processors
    assert plan.tiles_in_split % 2 == 0
    assert blocks % plan.cluster == 0
    seen = {True: [], False: []}
    tiles = tiles_of(k, b)
    for split in range(plan.splits):
        first = split * plan.tiles_in_split
        last = min(first + plan.tiles_in_split, tiles)
        assert last > first
        for number in range(first, first + 2 * -(-(last - first) // 2)):  # a pair may reach beyond
            of_window, at, slots, columns, whole = compiled.tile(number, last, start, k, b)
            assert whole == (min(slots) >= 0)
            for j, slot in enumerate(slots):
                if slot >= 0:
                    assert columns[j] == j
                    assert slot == ((at + j + start) % k if of_window else at + j)
                    seen[of_window].append(slot)
    window = {(start + i) % k for i in range(b)}
    assert sorted(seen[True]) == sorted(window)
    assert sorted(seen[False]) == sorted(set(range(k)) - window)


# ---- where numbers lie in shared memory ---------------------------------------------------------------------------------------


def swizzle(address):
    """What copy engine and products do with an address in 128-byte mode: bits 4-6 are exclusive-ored with bits 7-9."""
    return address ^ ((address >> 7 & 7) << 4)


def fields(descriptor):
    """(start address, leading and stride byte offsets) of a matrix descriptor in that mode."""
    assert descriptor >> 62 == 1
    return tuple((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))


def read_rows(memory, descriptor, rows):
    """[rows, 16] as a product reads an operand whose sum runs along 128-byte rows (CUTLASS: canonical layout, K-major, B128)."""
    start, _, stride = fields(descriptor)
    return torch.tensor(
        [[memory[swizzle(start + r // 8 * stride + r % 8 * 128 + 2 * k)] for k in range(16)] for r in range(rows)]
    )


def read_columns(memory, descriptor, columns):
    """[columns, 16] likewise where the sum runs over rows (MN-major, B128)."""
    start, leading, stride = fields(descriptor)
    return torch.tensor(
        [
            [memory[swizzle(start + n // 64 * leading + n % 64 * 2 + k // 8 * stride + k % 8 * 128)] for k in range(16)]
            for n in range(columns)
        ]
    )


@pytest.mark.parametrize("dim", hopper.DIMS)
def test_operands_are_what_was_loaded(dim):
    base, panel = 3 * 1024, 64 * 128
    tile = torch.arange(SLOTS * dim).view(SLOTS, dim)
    memory = {}  # by byte address
    for p in range(dim // 64):  # the copy engine's box: 64 columns, 64 rows, panels
        for r in range(64):
            for c in range(64):
                memory[swizzle(base + p * panel + r * 128 + 2 * c)] = tile[r, 64 * p + c].item()
    for k in range(dim // 16):
        found = read_rows(memory, compiled.rows_operand(base + k // 4 * panel + k % 4 * 32), 64)
        assert torch.equal(found, tile[:, 16 * k : 16 * k + 16])
    for half in (0, 1):
        for k in range(SLOTS // 16):
            at = base + half * (dim // 128) * panel + 16 * k * 128
            found = read_columns(memory, compiled.columns_operand(at, panel), dim // 2)
            assert torch.equal(found, tile[16 * k : 16 * k + 16, half * dim // 2 : (half + 1) * dim // 2].T)


def test_weights_are_read_where_they_were_written():
    """By the threads, as pairs: rows 16 warp + lane / 4 (+ 8), columns 8 j + 2 (lane % 4)."""
    weights, memory, banks = torch.arange(ROWS * SLOTS).view(ROWS, SLOTS), {}, set()
    for warp in range(4):
        for lane in range(32):
            for n in range(0, 32, 2):
                row, column = 16 * warp + lane // 4 + n // 2 % 2 * 8, n // 4 * 8 + 2 * (lane % 4)
                to = compiled.swizzled(row, n // 4) + 4 * (lane % 4)
                memory[to], memory[to + 2] = weights[row, column].item(), weights[row, column + 1].item()
                if warp == n == 0:
                    banks.add(to // 4 % 32)
    assert len(banks) == 32  # no conflicts
    for k in range(4):
        assert torch.equal(read_rows(memory, compiled.rows_operand(32 * k), 64), weights[:, 16 * k : 16 * k + 16])


# ---- the schedule ---------------------------------------------------------------------------------------------------------------


def phi_of(c, rows, hard):
    """phi and its slope from what the probes' rows say (csrc/margin.h: PlainPhi, HardPhi)."""
    if not hard:
        return c, torch.ones_like(c)
    limit, square, linear, constant = (r[:, None] for r in rows)
    above = c > limit
    return torch.where(above, (square * c + linear) * c + constant, c), torch.where(above, 2 * square * c + linear, 1)


def emulate(
    unit, prototypes, window, window_start, target, identity, slot_identity, window_identity, cosine, scales, phi_rows, out,
    moment, tiles_in_split, cluster, kind, mask_empty, straight,
):  # fmt: skip
    """``sst_fast::cuda::sweep``, block by block, with its two chains of tiles and its lazy shift."""
    n, d = unit.shape
    k, groups, b = len(prototypes), *((1, 0) if window is None else window.shape[:2])
    start = 0 if window is None else window_start.item()
    in_group, tiles = n // groups, tiles_of(k, b)
    blocks_in_group = -(-in_group // ROWS)
    hard_family, npc, bf16 = kind in (4, 5, 6), kind == 6, unit.dtype == torch.bfloat16
    x = torch.cat([unit.float(), torch.zeros(ROWS, d)])  # beyond the end the copy engine reads zeros
    features = {False: torch.cat([prototypes.float(), torch.zeros(ROWS, d)])}
    if window is not None:
        features[True] = torch.cat([window.float().flatten(0, 1), torch.zeros(ROWS, d)])
    for block in range(groups * blocks_in_group):
        group, first_row = block // blocks_in_group, block % blocks_in_group * ROWS
        row0 = group * in_group + first_row
        count = min(ROWS, in_group - first_row)
        i = row0 + torch.arange(count)
        scale, rows = scales[i], phi_rows[:, i]
        for split in range(-(-tiles // tiles_in_split)):
            first = split * tiles_in_split
            last = min(first + tiles_in_split, tiles)
            shift = torch.full((count,), NEVER)
            if bf16 and not hard_family:
                shift = torch.where(scale <= 40, scale, NEVER)
            o = torch.zeros(count, d)
            total, hard_sum, hardest = torch.zeros(2, count), torch.zeros(count), torch.full((count,), NEVER)
            hard, live, beats = (torch.zeros(count, dtype=torch.int32) for _ in range(3))
            slot = torch.full((count,), -1, dtype=torch.int32)
            for step in range(-(-(last - first) // 2)):
                weights, sums, shifts, loaded = [], [], [], []
                for half in (0, 1):
                    of_window, at, slots, *_ = compiled.tile(first + 2 * step + half, last, start, k, b)
                    slots = torch.tensor(slots, dtype=torch.int32)
                    at += group * b if of_window and window is not None else 0
                    source = features[of_window and window is not None]
                    w = source[at : at + SLOTS] if at < len(source) else torch.zeros(0, d)
                    w = torch.cat([w, torch.zeros(SLOTS - len(w), d)])
                    c = x[row0 : row0 + count] @ w.T
                    alive = (slots >= 0)[None] & (slots[None] != target[i, None])
                    ids = window_identity if of_window else slot_identity
                    if ids is not None:
                        at_ids = at - (group * b if of_window else 0) + torch.arange(SLOTS)
                        theirs = torch.where(slots >= 0, ids[at_ids.clamp_max(len(ids) - 1)], 0)
                        alive &= ~((theirs < 0)[None] & mask_empty)
                        if identity is not None:
                            alive &= theirs[None] != identity[i, None]
                    value, slope = phi_of(c, rows, hard_family)
                    shown = torch.where(alive, c, NEVER)
                    beats += (alive & (c > cosine[i, None])).sum(1).int()
                    live += alive.sum(1).int()
                    best, where = shown.max(1)
                    slot = torch.where(best > hardest, slots[where], slot)
                    hardest = torch.maximum(hardest, best)
                    if npc:
                        is_hard = alive & (c > rows[0][:, None])
                        hard += is_hard.sum(1).int()
                        hard_sum += torch.where(is_hard, c, 0).sum(1)
                    z = scale[:, None] * value
                    top = torch.where(alive, z, NEVER).amax(1)
                    now = shifts[0] if half else shift  # the second warpgroup waits for the first one's
                    now = torch.where(top > now + SLACK, top, now)
                    p = torch.where(alive, (z - now[:, None]).exp(), 0)
                    sums.append(p.sum(1))
                    weights.append((p if straight else p * slope).to(unit.dtype).float())
                    shifts.append(now)
                    loaded.append(w)
                for parity in (0, 1):
                    fade = (shift - shifts[parity]).exp()
                    shift = shifts[parity]
                    o, total = o * fade[:, None], total * fade
                    total[parity] += sums[parity]  # each warpgroup's own
                    o += weights[parity] @ loaded[parity]
            found = (shift, total.sum(0), hard_sum, hard, live, hardest, slot, beats)
            for tensor, values in zip(out, found, strict=True):
                tensor[split, i] = values
            if moment.numel():
                moment[split, i] = o


@pytest.fixture
def through(monkeypatch):
    """Puts another sweep into the frame of the Triton kernels, which the interpreter runs."""
    libraries = []

    def put(sweep):
        for library in libraries:
            library._destroy()
        libraries[:] = [torch.library.Library("sst_fast", "IMPL")]
        run = partial(hopper.margin_softmax, sweep=sweep)
        libraries[0].impl("hopper_margin_softmax", run, "CompositeExplicitAutograd")
        monkeypatch.setattr(functional, "choose", lambda problem, requested: "hopper")

    yield put
    for library in libraries:
        library._destroy()


def check(
    problem,
    margin,
    scale,
    tolerance,
    need_gradient=True,
    gradient_tolerance=None,
    cosine_tolerance=None,
    loss_options=None,
    **options,
):
    expected, exact = answer(problem, margin, scale, **options)
    x = problem.embedding.detach().requires_grad_(need_gradient)
    loss, seen = margin_softmax(x, problem.prototypes, problem.target, margin=margin, scale=scale, reduction="none",
                                return_statistics=True, **problem.options(), **options, **(loss_options or {}))  # fmt: skip
    assert (loss - expected.loss).abs().max() <= tolerance * max(1, expected.loss.abs().max().item())
    cosine_tolerance = cosine_tolerance or max(1e-5, tolerance / 4)
    assert torch.allclose(seen.hardest_cosine.double(), expected.hardest_cosine, atol=cosine_tolerance)
    assert (seen.beats_target - expected.beats_target).abs().max() <= (1 if tolerance < 1e-4 else 4)
    if need_gradient:
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert (gradient - exact).norm() <= (gradient_tolerance or 3 * tolerance) * max(exact.norm().item(), 0.05)


@pytest.mark.parametrize("margin", [ArcSoftmax(0.5), CurricularFace(0.5, 0.3), NPCFace()], ids=repr)
@pytest.mark.parametrize(
    ("n", "k", "start"), [(3, 5, None), (70, 300, None), (70, 300, 290), (65, 130, 0), (130, 513, 400)]
)
@pytest.mark.parametrize("scale", [30.0, 256.0])
def test_the_schedule_gives_the_reference_s_loss(through, margin, n, k, start, scale):
    through(emulate)
    check(make(n, k, 16, start=start, identities=k // 2 + 2, empty=0.2).to(torch.float32), margin, scale, 2e-5)


@pytest.mark.parametrize("scale", [16.0, 39.0, 64.0])
def test_the_schedule_with_weights_of_sixteen_bits(through, scale):
    through(emulate)
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        check(make(70, 700, 32, start=650, identities=400).to(dtype), AMSoftmax(0.35), scale, scale / 16 * tolerance)


# ---- the kernel's own code ----------------------------------------------------------------------------------------------------


def cuda_headers():
    """Folder of cuda_fp16.h: the toolkit's, or the one that comes with PyTorch."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *Path("/usr/local").glob("cuda-*")]
    homes += Path(torch.__file__).parents[1].glob("nvidia/*/")
    return next((Path(h, "include") for h in homes if h and Path(h, "include", "cuda_fp8.h").exists()), None)


@pytest.fixture(scope="module")
def kernel_on_cpu(tmp_path_factory):
    """The sweep as ``cuda_sweep`` expects it, run by as many threads as it has."""
    headers, compiler = cuda_headers(), shutil.which(os.environ.get("CXX", "g++"))
    if headers is None or compiler is None:
        pytest.skip("needs a C++ compiler and the CUDA headers")
    library, tests = tmp_path_factory.mktemp("sm90") / "sweep.so", Path(__file__).parent
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-I", tests.parent / "csrc", "-I", headers,
               tests / "sm90_on_cpu.cpp", "-o", library]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run, dtypes = ctypes.CDLL(str(library)).sweep, (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    clusters = set()

    def sweep(
        unit, prototypes, window, window_start, target, identity, slot_identity, window_identity, cosine, scales, phi_rows,
        out, moment, tiles_in_split, cluster, kind, mask_empty, straight,
    ):  # fmt: skip
        tensors = [unit, prototypes, window, window_start, target, identity, slot_identity, window_identity, cosine,
                   scales, phi_rows, *out, moment if moment.numel() else None]  # fmt: skip
        assert all(t is None or t.is_contiguous() for t in tensors)
        groups, b = (1, 0) if window is None else window.shape[:2]
        clusters.add(cluster)
        failed = run(*(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors), len(unit), len(prototypes), b,
                     groups, unit.shape[1], 3 if unit.dtype == dtypes[2] else dtypes.index(prototypes.dtype), tiles_in_split, cluster, kind, int(mask_empty),
                     int(straight))  # fmt: skip
        assert failed == 0

    sweep.clusters = clusters
    return sweep


@pytest.mark.slow
@pytest.mark.parametrize("margin", [AMSoftmax(0.35), MVSoftmax(), NPCFace(), CircleLoss(), ArcNegFace()], ids=repr)
def test_the_kernel_on_cpu_threads(through, kernel_on_cpu, margin):
    through(kernel_on_cpu)
    problem = make(66, 200, 128, start=190, identities=150, empty=0.2)
    check(
        problem.to(torch.bfloat16), margin, 16.0, 2e-2
    )  # the interpreter, which prepares rows, rounds to bfloat16 by cutting off
    check(problem.to(torch.float16), margin, 64.0, 1e-2, need_gradient=False)
    check(problem.to(torch.float16), margin, 16.0, 2e-3, gradient="straight_through")


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k", "start"), [(1, 1, None), (3, 70, None), (65, 450, 0), (128, 128, 5)])
def test_the_kernel_on_cpu_threads_of_any_size(through, kernel_on_cpu, n, k, start):
    through(kernel_on_cpu)
    problem = make(n, k, 128, start=start, identities=2 * k, masks=k != 70)
    check(problem.to(torch.float16), AMSoftmax(0.35), 30.0, 5e-3)
    check(problem.to(torch.float32, torch.float8_e4m3fn), AMSoftmax(0.35), 30.0, 5e-3)
    if n > 64:
        assert 2 in kernel_on_cpu.clusters


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "dtype"), [(256, torch.bfloat16), (512, torch.bfloat16), (512, torch.float8_e4m3fn)])
def test_the_kernel_on_cpu_threads_of_any_dimension(through, kernel_on_cpu, dim, dtype):
    through(kernel_on_cpu)
    embedding = torch.float32 if dtype == torch.float8_e4m3fn else dtype
    check(make(30, 300, dim, start=290, identities=200).to(embedding, dtype), AMSoftmax(0.35), 16.0, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "dim", "margin"), [(30, 512, AMSoftmax(0.35)), (128, 256, MVSoftmax())], ids=repr)
def test_the_kernel_on_cpu_threads_with_float8_products(through, kernel_on_cpu, n, dim, margin):
    """Probes keep four significant bits, hence cosines an error below 0.1 / sqrt(D), times the scale in logits; weights four as well."""
    through(kernel_on_cpu)
    float8 = {"product_dtype": torch.float8_e4m3fn}
    problem = make(n, 300, dim, start=290, identities=200).to(torch.float32, torch.float8_e4m3fn)
    check(
        problem, margin, 64.0, 2e-3 * 64, gradient_tolerance=0.1, cosine_tolerance=0.1 / dim**0.5, loss_options=float8
    )
    check(problem, margin, 16.0, 2e-3 * 16, need_gradient=False, loss_options=float8)


# ---- the barriers ---------------------------------------------------------------------------------------------------------------


class Barrier:
    """An mbarrier: a phase ends with the last of its arrivals; whoever waits knows its parity alone."""

    def __init__(self, arrivals, loads=0):
        self.arrivals, self.loads, self.phase, self.arrived, self.loaded = arrivals, loads, 0, 0, 0

    def arrive(self):
        self.arrived += 1
        assert self.arrived <= self.arrivals
        self._end()

    def load(self):
        self.loaded += 1
        assert self.loaded <= self.loads
        self._end()

    def _end(self):
        if (self.arrived, self.loaded) == (self.arrivals, self.loads):
            self.phase, self.arrived, self.loaded = self.phase + 1, 0, 0

    def done(self, parity):
        return self.phase % 2 != parity


class Block:
    """Shared memory of one block: what is in each buffer, or None while it is being written."""

    def __init__(self, tiles, cluster):
        self.w = {}
        self.turned = {}
        self.p = {}
        self.full = [[Barrier(1, 1) for _ in range(2)] for _ in range(tiles)]
        self.empty = [[Barrier(4 * cluster) for _ in range(2)] for _ in range(tiles)]
        self.turns = [Barrier(2) for _ in range(tiles)]  # of two threads
        self.weights = [Barrier(4) for _ in range(2)]  # counted in warps
        self.taken = [Barrier(8) for _ in range(2)]


def load(blocks, rank, tiles, t, spawn):
    me, cluster = blocks[rank], len(blocks)
    at, round_ = t % tiles, t // tiles
    for half in (0, 1):
        mine = cluster == 1 or rank == half
        if round_ > 0:
            yield (me.empty if mine else me.full)[at][half], (round_ - 1) & 1
        me.full[at][half].arrive()
        if mine:
            for block in blocks:
                spawn(landing(block, at, half, t))
        yield None


def loading(blocks, rank, tiles, pairs, spawn):
    for t in range(2 * pairs):
        yield from load(blocks, rank, tiles, t, spawn)


def turning(blocks, rank, tiles, pairs, spawn, thread):
    """Where products are of float8: a tile is loaded by the first thread, and turned by it and the others."""
    me = blocks[rank]
    if thread == 0:
        yield from load(blocks, rank, tiles, 0, spawn)
    for t in range(2 * pairs):
        at = t % tiles
        if thread == 0 and t + 1 < 2 * pairs:
            yield from load(blocks, rank, tiles, t + 1, spawn)
        for side in (0, 1):
            yield me.full[at][side], t // tiles & 1
        for _ in range(2):
            assert me.w[at, 0] == me.w[at, 1] == t
            me.turned[at, thread] = t
            yield None
        me.turns[at].arrive()


def landing(block, at, half, t):
    block.w[at, half] = None
    yield None
    block.w[at, half] = t
    block.full[at][half].load()


def warp(blocks, rank, tiles, pairs, number, moment, turns):
    me, cluster, half = blocks[rank], len(blocks), number // 4

    def weights_are_of(parity, step):
        return all(me.p[4 * parity + i] == step for i in range(4))

    def release(at, side):
        blocks[side if cluster > 1 else 0].empty[at][side].arrive()

    for step in range(pairs):
        t = 2 * step + half
        at = t % tiles
        for side in (0, 1):
            yield me.full[at][side], t // tiles & 1
            assert me.w[at, side] == t
        yield None
        assert me.w[at, 0] == me.w[at, 1] == t  # still, when the products end
        if not moment:
            release(at, 0), release(at, 1)
            continue
        if half == 1:
            yield me.weights[0], step & 1
            assert weights_are_of(0, step)
        if step > 0:
            yield me.taken[half], (step - 1) & 1
        me.p[number] = step
        me.weights[half].arrive()
        for parity in (0, 1):
            u = 2 * step + parity
            yield me.weights[parity], step & 1
            yield me.turns[u % tiles] if turns else me.full[u % tiles][half], u // tiles & 1
            for _ in range(2):
                assert weights_are_of(parity, step)
                assert (
                    (me.turned[u % tiles, 0] == me.turned[u % tiles, 1] == u) if turns else me.w[u % tiles, half] == u
                )
                yield None
            release(u % tiles, half)
            me.taken[parity].arrive()


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tiles", [2, 4])
@pytest.mark.parametrize("products", ["moment", "moment of float8", "no moment"])
def test_no_order_of_events_blocks_or_overwrites(cluster, tiles, products):
    moment, turns = products != "no moment", "float8" in products
    for seed in range(60):
        chance, pairs = random.Random(seed), 1 + seed % 5
        blocks = [Block(tiles, cluster) for _ in range(cluster)]
        agents = []
        for rank in range(cluster):
            if turns:
                agents += [turning(blocks, rank, tiles, pairs, agents.append, thread) for thread in (0, 1)]
            else:
                agents.append(loading(blocks, rank, tiles, pairs, agents.append))
            agents += [warp(blocks, rank, tiles, pairs, i, moment, turns) for i in range(8)]
        waiting = {}
        while agents:
            able = [a for a in agents if waiting.get(a) is None or waiting[a][0].done(waiting[a][1])]
            assert able, f"blocked, seed {seed}"
            # Some are slow: one in three is taken by weight, so that agents drift far apart.
            agent = chance.choice(able) if chance.random() < 0.7 else able[seed % len(able)]
            try:
                waiting[agent] = next(agent)
            except StopIteration:
                agents.remove(agent)
