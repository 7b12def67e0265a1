"""The loss on Hopper without a GPU: index arithmetic, and the kernels' own code on CPU threads (tests/sm90_on_cpu.cpp)."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import MARGINS, answer, make

from sst_fast import AMSoftmax, MVSoftmax, NPCFace
from sst_fast.arguments import Packed
from sst_fast.backends import hopper
from sst_fast.backends.extension import compiled

pytestmark = pytest.mark.skipif(compiled is None, reason="the extension is not built")
ROWS = SLOTS = 64  # of a block, of a tile: csrc/tiles.h


def tiles_of(k, b):
    return -(-k // SLOTS) + -(-b // SLOTS)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 700), st.data())
def test_every_slot_is_swept_once(k, data):
    b = data.draw(st.integers(0, k))
    start = data.draw(st.integers(0, k - 1))
    rows, groups, processors = (data.draw(st.integers(1, n)) for n in (300, 2, 140))
    splits, in_split, cluster, blocks = compiled.plan_sweep(
        rows, groups, k, b, 512, processors, data.draw(st.booleans())
    )
    assert in_split % 2 == 0
    assert blocks % cluster == 0
    assert blocks * ROWS >= rows > (blocks - cluster) * ROWS
    seen = {True: [], False: []}
    tiles = tiles_of(k, b)
    for split in range(splits):
        first = split * in_split
        last = min(first + in_split, tiles)
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


@pytest.mark.parametrize("rows", [64, 1024, 3072, 4096, 6144, 9216])
@pytest.mark.parametrize("k", [16384, 1 << 20])
def test_the_plan_keeps_an_h100_busy(rows, k):
    """Processors that have something to do, over all rounds of blocks."""
    splits, in_split, cluster, blocks = compiled.plan_sweep(rows, 1, k, 0, 512, 132, True)
    rounds = -(-blocks * splits // 132)
    assert tiles_of(k, 0) * -(-rows // ROWS) / (rounds * in_split * 132) >= (0.74 if k == 16384 else 0.66)
    assert cluster == (2 if rows > ROWS else 1)
    assert splits * rows * 512 * 4 <= 1 << 28


def test_an_odd_block_is_filled_up_where_sharing_loads_is_worth_it():
    assert compiled.plan_sweep(7 * ROWS, 1, 16384, 0, 512, 132, True)[2:] == (2, 8)
    assert compiled.plan_sweep(ROWS, 2, 16384, 64, 512, 132, True)[2:] == (1, 1)
    assert compiled.plan_sweep(7 * ROWS, 1, 16384, 0, 512, 132, False)[2:] == (1, 7)


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


# ---- the kernels' own code ----------------------------------------------------------------------------------------------------

NUMBERS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]  # csrc/cuda/rows_sm90.h
FLOATS = ["loss", "lse", "target_cosine", "hardest_cosine", "residual", "row_weight", "gradient", "target_slope"]
RESULTS = [
    "loss", "lse", "target_cosine", "hardest_cosine", "hardest_slot", "beats_target", "residual", "row_weight", "gradient",
    "negatives", "target_slope",
]  # fmt: skip


def cuda_headers():
    """Folder of cuda_fp8.h: the toolkit's, or the one that comes with PyTorch, where that has all that is included from there."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *Path("/usr/local").glob("cuda-*")]
    homes += Path(torch.__file__).parents[1].glob("nvidia/*/")
    folders = [Path(home, "include") for home in homes if home]
    whole = (f for f in folders if (f / "cuda_fp8.h").exists() and (f / "crt" / "host_defines.h").exists())
    return next(whole, None)


@pytest.fixture(scope="module")
def libraries(request):
    """The kernels for bfloat16 and converted float8 queues, and those for float16 and float8 products.

    They are kept from one run of the tests to the next while the sources stay the same.
    """
    headers, compiler = cuda_headers(), shutil.which(os.environ.get("CXX", "g++"))
    if headers is None or compiler is None:
        pytest.skip("needs a C++ compiler and the CUDA headers")
    tests = Path(__file__).parent
    csrc = tests.parent / "csrc"
    sources = [tests / "sm90_on_cpu.cpp", *csrc.glob("*.h"), *(csrc / "cuda").glob("*.h")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:16]
    folder = request.config.cache.mkdir("sm90_on_cpu")
    built = [folder / f"{digest}-{part}.so" for part in (0, 1)]
    running = []
    for part, library in enumerate(built):
        if not library.exists():
            command = [compiler, "-std=c++20", "-O1", "-U_FORTIFY_SOURCE", f"-DSST_PART={part}", "-shared", "-fPIC", "-I",
                       csrc, "-I", headers, tests / "sm90_on_cpu.cpp", "-o", library.with_suffix(".new")]  # fmt: skip
            running.append((library, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for library, process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said[-3000:]
        library.with_suffix(".new").replace(library)
    for path in set(folder.glob("*.so")) - set(built):
        path.unlink()
    loaded = [ctypes.CDLL(str(library)).margin_softmax for library in built]
    for function in loaded:
        function.restype = ctypes.c_char_p
    return loaded


def run(libraries, arguments, need_gradient=True, processors=4, seed=0):
    """The results of csrc/arguments.h, by name."""
    p = Packed.of(*arguments.packed())
    n, d = p.embedding.shape
    k, (groups, b) = len(p.prototypes), (1, 0) if p.window is None else p.window.shape[:2]
    out = {name: torch.full((n,), torch.nan) if name in FLOATS else torch.full((n,), -7) for name in RESULTS}
    out["loss"] = out["loss"][: n if p.reduction == 0 else 1]
    out["gradient"] = torch.full((n, d), torch.nan)
    tensors = [p.embedding, p.prototypes, p.window, p.weight, p.target, p.identity, p.slot_identity, p.window_identity,
               p.window_start, p.margin_rows, p.scale_rows, *(out[name] for name in RESULTS)]  # fmt: skip
    assert all(t is None or t.is_contiguous() for t in tensors)
    integers = [
        n, k, d, b, groups, NUMBERS.index(p.embedding.dtype), NUMBERS.index(p.prototypes.dtype),
        0 if p.weight is None else NUMBERS.index(p.weight.dtype), 0 if p.margin_rows is None else len(p.margin_rows), p.kind,
        p.ignore_index, p.reduction == 1, p.reduction != 0, p.mask_empty, p.straight_through, p.float8_products,
        need_gradient, processors,
    ]  # fmt: skip
    numbers = [*([p.scale, *p.parameters] + [0.0] * 6)[:7]]
    part = int(p.prototypes.dtype == torch.float16 or p.float8_products)
    wrong = libraries[part](
        (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors)),
        (ctypes.c_int64 * len(integers))(*map(int, integers)), (ctypes.c_double * 7)(*numbers), ctypes.c_uint64(seed),
    )  # fmt: skip
    assert wrong is None, wrong
    return out


def check(
    libraries, problem, margin, scale, tolerance, need_gradient=True, gradient_tolerance=None, cosine_tolerance=None,
    product_dtype=None, seed=0, processors=4, **options,
):  # fmt: skip
    expected, exact = answer(problem, margin, scale, **options)
    arguments = replace(problem, margin=margin, scale=scale, reduction="none", product_dtype=product_dtype, **options)
    seen = run(libraries, arguments, need_gradient, processors, seed)
    largest = max(1, expected.loss.abs().max().item())
    for name in ("loss", "lse"):
        assert (seen[name] - getattr(expected, name)).abs().max() <= tolerance * largest, name
    cosine_tolerance = cosine_tolerance or max(1e-5, tolerance / 4)
    assert torch.allclose(seen["target_cosine"].double(), expected.target_cosine, atol=1e-6)
    assert torch.allclose(seen["hardest_cosine"].double(), expected.hardest_cosine, atol=cosine_tolerance)
    assert (seen["beats_target"] - expected.beats_target).abs().max() <= (1 if tolerance < 1e-4 else 4)
    if need_gradient:
        error = (seen["gradient"] - exact).norm()
        assert error <= (gradient_tolerance or 3 * tolerance) * max(exact.norm().item(), 0.05)
    return seen


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
def test_every_margin(libraries, margin):
    problem = make(66, 200, 128, start=190, identities=150, empty=0.2)
    check(libraries, problem.to(torch.bfloat16), margin, 16.0, 5e-3)
    check(libraries, problem.to(torch.float16), margin, 64.0, 1e-2, need_gradient=False)
    check(libraries, problem.to(torch.float16), margin, 16.0, 1e-3, gradient="straight_through")


@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_events_blocks_or_overwrites(libraries, seed):
    """Twelve launches of many tiles in random order, of two blocks that share their loads and of one."""
    for n in (66, 30):
        problem = make(n, 1000, 128, start=990, identities=900, empty=0.1)
        check(libraries, problem.to(torch.bfloat16), AMSoftmax(0.35), 16.0, 5e-3, seed=100 * seed, processors=8)
    one = make(33, 500, 128, identities=900)
    check(libraries, one.to(torch.float16), AMSoftmax(0.35), 64.0, 5e-3, seed=seed, processors=1)


@pytest.mark.parametrize(("n", "k", "start"), [(1, 1, None), (3, 70, None), (65, 450, 0), (128, 128, 5)])
def test_every_size(libraries, n, k, start):
    problem = make(n, k, 128, start=start, identities=2 * k, masks=k != 70)
    check(libraries, problem.to(torch.float16), AMSoftmax(0.35), 30.0, 5e-3)
    check(libraries, problem.to(torch.float32, torch.float8_e4m3fn), AMSoftmax(0.35), 30.0, 5e-3)


@pytest.mark.parametrize("dim", [256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_every_dimension(libraries, dim, dtype):
    embedding = torch.float32 if dtype == torch.float8_e4m3fn else dtype
    problem = make(30, 300, dim, start=290, identities=200).to(embedding, dtype)
    check(libraries, problem, AMSoftmax(0.35), 16.0, 5e-3)


@pytest.mark.parametrize(("n", "dim", "margin"), [(30, 512, AMSoftmax(0.35)), (70, 256, MVSoftmax())], ids=repr)
def test_float8_products(libraries, n, dim, margin):
    """Probes keep four significant bits, hence cosines an error below 0.1 / sqrt(D), times the scale in logits; weights four as well."""
    problem = make(n, 300, dim, start=290, identities=200).to(torch.float32, torch.float8_e4m3fn)
    rounding = {"product_dtype": torch.float8_e4m3fn, "cosine_tolerance": 0.1 / dim**0.5}
    check(libraries, problem, margin, 64.0, 2e-3 * 64, gradient_tolerance=0.1, **rounding)
    if dim == 256:
        check(libraries, problem, margin, 16.0, 2e-3 * 16, need_gradient=False, **rounding)


def test_sums_of_float8_products_are_kept_in_float32(libraries):
    """The emulated tensor cores add with 13 bits, as Hopper's do: over many tiles the gradient would shrink."""
    problem = make(5, 6000, 256, masks=False).to(torch.float32, torch.float8_e4m3fn)
    seen = check(libraries, problem, AMSoftmax(0.35), 4.0, 1e-2, gradient_tolerance=0.1, processors=1,
                 product_dtype=torch.float8_e4m3fn, cosine_tolerance=0.1 / 16)  # fmt: skip
    _, exact = answer(problem, AMSoftmax(0.35), 4.0)
    assert ((seen["gradient"] * exact).sum() / exact.square().sum() - 1).abs() < 5e-3


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_ignored_rows_and_reductions(libraries, reduction):
    problem = make(20, 100, 128, identities=60).to(torch.bfloat16)
    margin, generator = AMSoftmax(0.35), torch.Generator().manual_seed(0)
    weight = torch.rand(20, generator=generator, dtype=torch.float64)
    target = problem.target.clone()
    target[3:5], problem.embedding[3] = -100, torch.nan
    arguments = replace(
        problem, target=target, weight=weight.bfloat16(), margin=margin, scale=16.0, reduction=reduction
    )
    seen = run(libraries, arguments)
    problem.embedding[3] = 0
    expected, _ = answer(problem, margin, 16.0)
    weight = weight.bfloat16().double().masked_fill(target == -100, 0)
    weight = weight / weight.sum() if reduction == "mean" else weight
    each = weight * expected.loss
    assert torch.allclose(seen["loss"].double(), each if reduction == "none" else each.sum(), atol=5e-3)
    assert torch.allclose(seen["row_weight"].double(), weight, atol=1e-6)
    assert (seen["gradient"][3:5] == 0).all()
    assert (seen["loss"] == seen["loss"]).all()


def test_margins_and_scales_that_vary_from_row_to_row(libraries):
    problem = make(20, 100, 128, start=90, identities=60).to(torch.float16)
    m = torch.linspace(0.1, 0.5, 40, dtype=torch.float64)
    check(libraries, problem, AMSoftmax(m), torch.linspace(8, 32, 40, dtype=torch.float64), 2e-3)


def test_many_splits(libraries):
    """More than a warp's lanes, in which combine adds them up."""
    check(libraries, make(2, 5000, 128, identities=3000).to(torch.bfloat16), NPCFace(), 16.0, 5e-3, processors=40)


def test_bad_targets_and_features_give_nan(libraries):
    problem = make(4, 100, 128, identities=60).to(torch.bfloat16)
    problem.target[1], problem.embedding[2] = 100, torch.nan
    seen = run(libraries, replace(problem, margin=AMSoftmax(0.35), scale=16.0, reduction="none"))
    assert seen["loss"].isnan().tolist() == [False, True, True, False]
    assert seen["gradient"].isnan().all(1).tolist() == [False, True, True, False]


def test_a_launch_gives_the_same_bits_in_any_order(libraries):
    problem = replace(
        make(66, 300, 128, start=290, identities=200).to(torch.float16), margin=NPCFace(), scale=64.0, reduction="mean"
    )
    first, second = (run(libraries, problem, seed=seed) for seed in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)
