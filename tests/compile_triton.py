"""Compiles every configuration that the Triton launcher can choose, for every architecture, without a GPU; says what is wrong.

``python tests/compile_triton.py [sm ...]``: a line each, then status 1 if one does not fit, spills or misses tensor cores.
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
from sst_fast.kernels import margin_softmax as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sst_fast.backends.triton import Blocks, blocks_for

SHARED = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB a block may have
TENSOR = {80: "HMMA", 90: "HGMMA|HMMA", 100: "UTCHMMA|UTCQMMA|UTCOMMA|HMMA", 120: "HMMA"}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8e4nv": 1}
DIMS = (64, 128, 256, 512, 1024)
FLOATS = {"cosine", "scales", "phi_rows", "lse", "uniform", "shift_out", "sum_out", "logits_out", "hard_sum_out", "hardest_out",
          "moment_out", "inverse_w", "inverse_window", "factor", "target_slope"}  # fmt: skip
FLOATS |= {"margin_rows", "scale_rows", "inverse_norm", "shift", "total", "logits", "hard_sum", "hardest", "moment", "loss_out",
           "lse_out", "slope_out", "residual_out", "uniform_out"}  # fmt: skip
NUMBERS = {"label_smoothing", "p0", "p1", "p2", "p3", "p4", "p5", "scale"}
COUNTERS = {"hard_out", "live_out", "slot_out", "beats_out"}
SPLIT_COUNTERS = {"hard", "live", "slot", "beats"}  # what combine_kernel reads; it writes int64
LONGS = {"start", "target", "identity", "slot_identity", "window_identity"}
SPILL_FREE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)  # what the table of tile sizes was made for
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def source(kernel: str, dtype: str, dim: int, kind: int, blocks: Blocks) -> ASTSource:
    """The kernel as the launcher would specialise it, with everything switched on."""
    function = getattr(kernels, kernel)
    constants = {
        "KIND": kind, "WINDOW": True, "IDENTITY": True, "SLOT_IDENTITY": True, "MASK_EMPTY": True, "NORMALIZE": False,
        "STRAIGHT": False, "MOMENT": True, "SECOND": False, "LOGITS": False, "PRECISION": "tf32" if dtype == "fp32" else "ieee",
        "BLOCK_N": blocks.rows, "BLOCK_K": blocks.slots, "BLOCK_D": dim, "inverse_w": None, "inverse_window": None,
    }  # fmt: skip
    if kernel == "prototypes_kernel":
        constants |= {"BLOCK_N": blocks.slots, "BLOCK_K": blocks.rows, "NORMALIZE": True}
        del constants["inverse_w"]
    if kernel in ("prepare_kernel", "combine_kernel"):
        constants |= {"P": 6, "SCALE_ROWS": True, "LOSS": True, "SMOOTH": True}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature, attributes = {}, {}
    for at, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "*fp32"
        elif name == "exact":
            signature[name] = "*fp64"
        elif name in NUMBERS:
            signature[name] = "fp32"
        elif name in (SPLIT_COUNTERS if kernel == "combine_kernel" else COUNTERS):
            signature[name] = "*i32"
        elif name in LONGS or name in COUNTERS:
            signature[name] = "*i64"
        elif name in ("w", "window"):
            signature[name] = f"*{dtype}"
        elif name == "gradient_out":
            signature[name] = "*fp32"
        elif name in ("unit", "x", "gradient"):
            signature[name] = "*fp16" if dtype == "fp8e4nv" else f"*{dtype}"
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or name in ("N", "D"):
            attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, {(function.arg_names.index(n),): v for n, v in constants.items()}, attributes)


def examine(kernel: str, sm: int, dtype: str, dim: int, kind: int) -> tuple[str, list[str]]:
    """One configuration: a line about it, and what is wrong with it."""
    by_row = kernel in ("prepare_kernel", "combine_kernel")
    if dtype == "fp8e4nv" and sm < 90:
        return f"{kernel} sm_{sm} {dtype}: left to the reference", []
    blocks = Blocks(1, 1, 4, 3) if by_row else blocks_for(kernel.removesuffix("_kernel"), dim, DTYPES[dtype], sm)
    if blocks is None:
        return f"{kernel} sm_{sm} {dtype} D {dim}: left to the reference", []
    name = f"{kernel:<17} sm_{sm:<4} {dtype} D {dim:<5} kind {kind} {blocks}"
    try:
        built = triton.compile(
            source(kernel, dtype, dim, kind, blocks), target=GPUTarget("cuda", sm, 32),
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
    # The other kernels run once per probe; what they keep in local memory is the range reduction of sine and cosine.
    if SPILL_FREE and spills and kernel in ("sweep_kernel", "prototypes_kernel"):
        wrong.append(f"{spills} spill instructions")
    if not tensor and kernel in ("sweep_kernel", "prototypes_kernel"):
        wrong.append("no tensor-core instruction")
    return f"{name}: shared {shared:.0f} KiB, tensor {tensor}, spills {spills}", wrong


def main() -> int:
    """Every architecture, dtype and dimension; the additive margin everywhere, the heaviest element-wise ones at D = 512."""
    architectures = [int(sm) for sm in sys.argv[1:]] or list(SHARED)
    work = [("sweep_kernel", sm, dtype, dim, 1) for sm, dtype, dim in product(architectures, DTYPES, DIMS)]
    work += [("sweep_kernel", sm, "bf16", 512, kind) for sm, kind in product(architectures, (4, 8))]
    work += [
        ("prototypes_kernel", sm, dtype, dim, 1) for sm, dtype, dim in product(architectures, ("bf16", "fp32"), DIMS)
    ]
    work += [
        (kernel, sm, "bf16", 512, kind)
        for kernel, sm, kind in product(("prepare_kernel", "combine_kernel"), architectures, (3, 6))
    ]
    bad = 0
    with ProcessPoolExecutor(2) as pool:
        for line, wrong in pool.map(examine, *zip(*work, strict=True)):
            print(line, "; ".join(wrong), flush=True)
            bad += bool(wrong)
    print(f"{len(work)} configurations, {bad} bad")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
