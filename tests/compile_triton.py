"""Compiles every configuration that the Triton launcher can choose, for every architecture, without a GPU; says what is wrong.

``python tests/compile_triton.py [sm ...]``: a line each, then status 1 if one does not fit, spills so much that it
costs time, or misses tensor cores.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import triton
from sst_fast.kernels import margin_softmax, staged
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sst_fast.backends import model
from sst_fast.backends.staged import AGAIN, COLUMNS, PIECE_BYTES, weigh_tile
from sst_fast.backends.triton import PARALLEL, Blocks, blocks_for

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have
TENSOR = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA|HMMA", 100: "UTCHMMA|UTCQMMA|UTCOMMA|HMMA", 120: "HMMA"}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8e4nv": 1, "fp64": 8}
DIMS = (64, 128, 256, 512, 1024)
SWEEPS = ("sweep_kernel", "prototypes_kernel")
STAGED = ("weigh_kernel", "again_kernel", "gather_kernel", "keep_kernel", "finish_prototypes_kernel")
# What a sm_90's issue slots allow a tile of the staged sweep at D = 512 in bfloat16: share of the time of both products at the tensor
# cores' full rate.
LEAST_SHARE = 0.67
NUMBERS = {
    "bf16": "16 bits",
    "fp16": "16 bits",
    "tf32": "tf32",
    "ieee": "ieee",
    "fp8e4nv": "float8",
    "fp64": "float64",
}  # what the table calls them
WITHOUT_TENSOR_CORES = ("ieee", "fp64")  # in our own kernels: the staged sweep leaves these products to the library
# What is no tensor of the inputs' dtypes.
FLOATS = {  # float64 where the inputs are
    "inverse", "cosine", "rows", "lse", "partial", "tiles", "moment", "moment_out", "row_weight", "target_slope",
    "shifts", "incoming", "partial_out", "sums", "factor", "loss_out", "lse_out", "hardest_out", "residual_out", "slope_out", "gradient_out",
    "scale_slope_out", "kept_words",
}  # fmt: skip
DOUBLES = {"exact_cosine", "margin_rows", "scale_rows", "smoothing"}
SCALARS = {"lift", "label_smoothing", "p0", "p1", "p2", "p3", "p4", "p5", "scale"}
INTEGERS = {"own_rows", "counts", "counts_out", "tile_counts"}
LONGS = {
    "start", "target", "identity", "slot_identity", "ids", "window_identity", "negatives", "slot_out", "beats_out", "live_out",
}  # fmt: skip
FEW = (
    32  # spill instructions that are let pass, of a thousand and more; where they lie is not looked at. Worst seen: 28
)
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
SPILL_FREE = TRITON >= (3, 8)  # what the table of tile sizes was made for
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


PRESENT = "present"  # a tensor that is left out elsewhere


def source(kernel: str, dtype: str, dim: int, kind: int, blocks: Blocks, **changes: object) -> ASTSource:
    """The kernel as the launcher would specialise it, with everything switched on that is not in ``changes``."""
    function = getattr(margin_softmax, kernel, None) or getattr(staged, kernel)
    constants = {
        "KIND": kind, "MASK_EMPTY": True, "STRAIGHT": False, "MOMENT": True, "SECOND": False, "SMOOTH": False, "MEAN": True,
        "LOSS": True, "TARGETS": True, "P": 6, "PRECISION": "tf32" if dtype == "tf32" else "ieee",
        "BLOCK_N": blocks.rows, "BLOCK_K": blocks.slots, "BLOCK_D": dim, "ROWS": max(1, 512 // dim),
        "NORMALIZE": kernel == "prepare_kernel", "positive": None, "SCALE_SLOPE": False, "SUB": 1, "PADDED": 1,
        "OF_WINDOW": False, "SEEN": True, "STORE": True, "KEEP": False, "EVEN": False, "WEIGHED": True, "PARALLEL": PARALLEL,
        "GIVEN": dtype in WITHOUT_TENSOR_CORES, "TILES": 32, "COLUMNS": min(dim, COLUMNS),
        "PIECE": min(dim, PIECE_BYTES // DTYPES[{"tf32": "fp32", "ieee": "fp32"}.get(dtype, dtype)]),
    }  # fmt: skip
    if kernel == "sweep_kernel":
        constants["inverse"] = None
    if kernel == "prototypes_kernel":
        constants |= {"BLOCK_N": blocks.slots, "BLOCK_K": blocks.rows}
    if kernel == "combine_kernel":
        constants |= {"SMOOTH": True, **({} if dtype == "fp64" else {"smoothing": None})}
    if kernel == "weigh_kernel":
        constants |= dict.fromkeys(("inverse", "shifts", "incoming", "target_slope"))
    if kernel == "again_kernel":
        constants |= {"BLOCK_N": AGAIN, "BLOCK_K": 32, "PIECE": 32}
    if kernel == "gather_kernel":
        constants["BLOCK_N"] = 32
    if kernel == "keep_kernel":
        constants["BLOCK_N"] = 128
    if kernel == "finish_prototypes_kernel":
        constants["ROWS"] = max(1, 4096 // dim)
    constants = {
        name: value for name, value in (constants | changes).items() if name in function.arg_names and value != PRESENT
    }  # fmt: skip
    stored = {"tf32": "fp32", "ieee": "fp32"}.get(dtype, dtype)
    multiplied = stored
    if dtype == "fp8e4nv":
        multiplied = "bf16" if kernel in STAGED else "fp16"
        stored = "bf16" if kernel == "weigh_kernel" else stored  # which the host converts
    signature, attributes = {}, {}
    for at, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "*fp64" if dtype == "fp64" else "*fp32"
        elif name in DOUBLES:
            signature[name] = "*fp64"
        elif name in SCALARS:
            signature[name] = "fp32"
        elif name in INTEGERS:
            signature[name] = "*i32"
        elif name in LONGS:
            signature[name] = "*i64"
        elif name in ("w", "window"):
            signature[name] = f"*{stored}"
        elif name in ("unit", "x", "weight", "weights", "gradient", "kept"):
            signature[name] = f"*{multiplied}"
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or name in ("D", "C"):
            attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, {(function.arg_names.index(n),): v for n, v in constants.items()}, attributes)


def examine(kernel: str, sm: int, dtype: str, dim: int, kind: int, changes: dict[str, object]) -> tuple[str, list[str]]:
    """One configuration: a line about it, and what is wrong with it."""
    by_row = kernel not in (*SWEEPS, "weigh_kernel")
    if (dtype == "fp8e4nv" and sm < 89) or (dtype == "fp64" and TRITON < (3, 5)):
        return f"{kernel} sm_{sm} {dtype}: left to the reference", []
    if kernel == "weigh_kernel":
        blocks = weigh_tile(changes.get("PROBES", 128), NUMBERS[dtype], sm, "SUB" in changes)
    elif by_row:
        blocks = Blocks(1, 1, 4, 1 if kernel == "again_kernel" else 3)
    else:
        blocks = blocks_for(kernel.removesuffix("_kernel"), dim, NUMBERS[dtype], sm)
    if blocks is None:
        return f"{kernel} sm_{sm} {dtype} D {dim}: left to the reference", []
    name = f"{kernel:<17} sm_{sm:<4} {dtype} D {dim:<5} kind {kind} {blocks} {changes or ''}"
    try:
        built = triton.compile(
            source(kernel, dtype, dim, kind, blocks, **changes), target=GPUTarget("cuda", sm, 32),
            options={"num_warps": blocks.warps, "num_stages": blocks.stages},
        )  # fmt: skip
    except Exception as error:
        return name, [f"does not compile: {str(error)[:300]}"]
    wrong = []
    shared = built.metadata.shared / 1024
    if shared > SHARED[sm]:
        wrong.append(f"{shared:.0f} KiB of shared memory, {SHARED[sm]} there are")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        code = subprocess.run(
            [TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    spills = len(re.findall(r"\b(LDL|STL)\b", code))
    tensor = len(re.findall(rf"\b({TENSOR[sm]})\b", code))
    # The other kernels run once per probe; what they keep in local memory is the range reduction of sine and cosine. Weights of a tile
    # may spill outside the loop, which is looked at below.
    by_library = kernel == "weigh_kernel" and dtype in WITHOUT_TENSOR_CORES
    if SPILL_FREE and spills > FEW and (kernel in SWEEPS or by_library):
        wrong.append(f"{spills} spill instructions")
    if not tensor and dtype not in WITHOUT_TENSOR_CORES and kernel in (*SWEEPS, "weigh_kernel"):
        wrong.append("no tensor-core instruction")
    if kernel == "weigh_kernel" and dtype not in WITHOUT_TENSOR_CORES:
        wrong += wrong_with_loop(code, sm, dim, blocks, plain=not changes and kind == 1 and dtype == "bf16")
    if (kernel, sm, dtype, kind, changes) == ("sweep_kernel", 90, "bf16", 1, {}) and SPILL_FREE:
        _, loops = loops_of(code, sm)
        operations = 4 * blocks.rows * blocks.slots * dim / 1000
        if model.FUSED_ROWS[dim] != blocks.rows:
            wrong.append(f"the model believes in tiles of {model.FUSED_ROWS[dim]} probes")
        issued = len(loops[0]) * blocks.warps / 4 / operations
        wrong += differs("the loop", issued, model.FUSED_ISSUE[dim], "cycles for 1,000 operations")
    return f"{name}: shared {shared:.0f} KiB, tensor {tensor}, spills {spills}", wrong


def loops_of(code: str, sm: int) -> tuple[int, list[list[str]]]:
    """How many instructions there are, and the loops with tensor-core instructions, the shortest first."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?\s*([A-Z0-9_.]+)([^;]*);", code, re.MULTILINE)
    instructions = [(int(at, 16), name, rest) for at, name, rest in lines]
    loops = []
    for at, name, rest in instructions:
        back = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if back and int(back[1], 16) < at:
            loops.append([name for place, name, _ in instructions if int(back[1], 16) <= place <= at])
    tensor = re.compile(rf"({TENSOR[sm]})\b")
    return len(instructions), sorted((loop for loop in loops if any(map(tensor.match, loop))), key=len)


def wrong_with_loop(code: str, sm: int, dim: int, blocks: Blocks, plain: bool) -> list[str]:
    """What is wrong with the staged sweep's loop over pieces of the features, and with the time that a tile's instructions take."""
    count, loops = loops_of(code, sm)
    if not loops:
        return ["no loop with tensor-core instructions"]
    wrong = []
    spills = [name for name in loops[0] if name.startswith(("LDL", "STL"))]
    # A register that a warp spills is a cycle of the first-level cache, in which four schedulers issue an instruction each. Its other
    # traffic leaves a quarter of the products' time free at least.
    own = len(loops[0]) * blocks.warps / 4
    spilling = sum(4 if ".128" in name else 2 if ".64" in name else 1 for name in spills) * blocks.warps
    products = 2 * blocks.rows * blocks.slots * PIECE_BYTES // 2 / model.RATES[sm].flops
    if SPILL_FREE and spills and (own + spilling > products or spilling > products / 8):
        wrong.append(
            f"{len(spills)} spill instructions in the loop, which takes {own:.0f} + {spilling} cycles, its products {products:.0f}"
        )
    if sm == 90 and blocks.rows >= 64 and not any(name.startswith("HGMMA") for name in loops[0]):  # which takes 64 rows
        wrong.append("no wgmma in the loop")
    if dim == 512 and plain and SPILL_FREE:
        issued = (count - len(loops[0])) * blocks.warps / 4
        wrong += differs("the epilogue of a tile", issued, model.STAGED_EPILOGUE[sm], "cycles")
        product = 2 * blocks.rows * blocks.slots * dim / 4096
        share = 2 * product / (2 * product + issued)
        if sm == 90 and share < LEAST_SHARE:
            wrong.append(f"instructions allow {share:.0%} of the tensor cores' rate, {LEAST_SHARE:.0%} expected")
    return wrong


def differs(what: str, counted: float, modelled: float, unit: str) -> list[str]:
    """What the model of predicted times believes, if that is not what is counted."""
    close = abs(counted / modelled - 1) <= 0.1
    return [] if close else [f"{what} takes {counted:.4g} {unit} by its instructions, the model believes {modelled:g}"]


def work_of(sm: int) -> list[tuple[str, int, str, int, int, dict[str, object]]]:
    """Every dtype and dimension with the additive margin; at D = 512 the heaviest element-wise ones, and what lies between sweeps."""
    if sm == 89:  # the tiles of sm_86, and float8
        return [(kernel, sm, "fp8e4nv", dim, 1, {}) for kernel, dim in product(("sweep_kernel", "again_kernel"), DIMS)]
    multiplied = ["bf16", "tf32"]
    if sm in (80, 120):  # without tensor cores the code is the same everywhere
        multiplied.append("ieee")
    work = [(kernel, sm, dtype, dim, 1, {}) for kernel, dtype, dim in product(SWEEPS, multiplied, DIMS)]
    work += [(kernel, sm, "fp16", 512, 1, {}) for kernel in SWEEPS]
    work += [("sweep_kernel", sm, "fp8e4nv", dim, 1, {}) for dim in DIMS]
    work += [("sweep_kernel", sm, "bf16", 512, kind, {}) for kind in (4, 8)]
    work.append(("sweep_kernel", sm, "bf16", 512, 1, {"SCALE_SLOPE": True}))
    several = (*SWEEPS, "prepare_kernel", "weigh_kernel", "again_kernel")
    work += [(kernel, sm, "bf16", 512, 1, {"SUB": 3, "PADDED": 4}) for kernel in several]
    work += [(kernel, sm, dtype, 512, 1, {}) for kernel, dtype in product(STAGED, ("bf16", "tf32", "ieee", "fp64"))]
    work += [(kernel, sm, "fp64", 512, 3, {}) for kernel in ("prepare_kernel", "combine_kernel", "weigh_kernel")]
    work.append(("again_kernel", sm, "fp64", 2048, 3, {}))
    work.append(("again_kernel", sm, "bf16", 512, 1, {"tiles": None, "tile_counts": None, "SMOOTH": True}))
    work += [("weigh_kernel", sm, "bf16", 2048, 1, {}), ("weigh_kernel", sm, "bf16", 512, 8, {})]
    work += [
        ("weigh_kernel", sm, "bf16", 512, 1, {"STORE": False}),
        ("weigh_kernel", sm, "bf16", 512, 1, {"KEEP": True}),
        ("weigh_kernel", sm, "bf16", 512, 1, {"SCALE_SLOPE": True}),
        ("weigh_kernel", sm, "fp16", 512, 1, {"SEEN": False, "EVEN": True}),
        ("weigh_kernel", sm, "bf16", 64, 1, {"OF_WINDOW": True}),
    ]
    normalised = {"inverse": PRESENT}
    again = {
        "shifts": PRESENT,
        "SEEN": False,
        "incoming": PRESENT,
        "target_slope": PRESENT,
    }  # backward, where nothing was kept
    work += [
        ("weigh_kernel", sm, dtype, 512, 1, changes)
        for dtype in multiplied
        for changes in (
            normalised,
            {**again, **normalised},
            {"STORE": False, "SMOOTH": True},
            {"shifts": PRESENT, "SEEN": False, "EVEN": True},
        )
    ]
    work += [
        ("weigh_kernel", sm, "bf16", 512, 1, changes) for changes in ({"PROBES": 1}, {"PROBES": 32}, {"PROBES": 64})
    ]  # the smaller tiles
    work += [
        ("sweep_kernel", sm, "bf16", 512, 1, changes) for changes in (normalised, {"SMOOTH": True, "SECOND": True})
    ]
    for kernel in ("prepare_kernel", "combine_kernel"):
        work += [(kernel, sm, "bf16", 512, kind, {}) for kind in (3, 6)]
        work.append(
            (kernel, sm, "bf16", 64, 1, {"window": None, "start": None, "weight": None, "margin_rows": None, "P": 0})
        )
    return work


def main() -> int:
    """All architectures, or those that are asked for."""
    work = [entry for sm in [int(sm) for sm in sys.argv[1:]] or SHARED for entry in work_of(sm)]
    bad = 0
    with ProcessPoolExecutor(2) as pool:
        for line, wrong in pool.map(examine, *zip(*work, strict=True)):
            print(line, "; ".join(wrong), flush=True)
            bad += bool(wrong)
    print(f"{len(work)} configurations, {bad} bad")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
