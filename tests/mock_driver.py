"""What the host passes to a GPU's driver, without a GPU: whole training steps under a driver that compiles and runs nothing.

``python tests/mock_driver.py``: a line of JSON for every step. Triton itself binds the arguments and decides what is compiled; only its
compiler and its launcher are replaced. Operations of PyTorch run on the CPU, over results that nobody has computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton.compiler
from sst_fast.kernels import margin_softmax as fused_kernels
from sst_fast.kernels import staged as staged_kernels
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import sst_fast
from sst_fast import margins
from sst_fast.backends import staged
from sst_fast.backends import triton as fused

KERNELS = [
    f for module in (fused_kernels, staged_kernels) for f in vars(module).values() if isinstance(f, triton.JITFunction)
]
carve = fused.carve
LAUNCHES: list[dict[str, Any]] = []


class Driver:
    """Of one Hopper."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


class Kernel:
    """What the compiler would have made of a kernel and what it knows of the arguments."""

    function = packed_metadata = None

    def __init__(self, source: Any) -> None:
        self.source = source
        self.fresh = True

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        """``arguments``: three of the grid, six of Triton's own, then the kernel's, constants included."""
        names, signature = self.source.fn.arg_names, self.source.signature
        given = dict(zip(names, arguments[9:], strict=True))
        passed = {name: value for name, value in given.items() if signature[name] != "constexpr"}
        aligned = {names[at] for (at,), what in self.source.attrs.items() if ["tt.divisibility", 16] in what}
        LAUNCHES.append(
            {
                "kernel": self.source.fn.__name__,
                "bound": len(given),
                "passed": len(passed),
                "compiled": self.fresh,
                "scattered": [n for n, v in passed.items() if torch.is_tensor(v) and not v.is_contiguous()],
                "unaligned": [n for n, v in passed.items() if torch.is_tensor(v) and n not in aligned],
            }
        )
        self.fresh = False


def compiled(source: Any, **_: Any) -> Kernel:
    """In place of Triton's compiler."""
    return Kernel(source)


Step = tuple[str, Callable[[], None]]
FLOATS = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.float8_e4m3fn, "float32": torch.float32,
    "float64": torch.float64,
}  # fmt: skip
K, B, D = 320, 32, 64
KEPT = staged.KEPT


def rows(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, D).to(dtype).requires_grad_()


def of_queue(backend: str, dtype: torch.dtype, **options: Any) -> Iterator[Step]:
    """Semi-Siamese Training: the ring at any position, the last batch of any size."""
    queue = sst_fast.GalleryQueue(K, D, dtype=dtype)
    loss = sst_fast.SemiSiameseLoss(queue, backend=backend, **options)
    multiplied = dtype if dtype.itemsize > 1 else torch.float32

    def step(start: int, count: int) -> None:
        queue.clear()
        queue.enqueue(torch.randn(start, D), torch.arange(start))
        loss(*(rows(count, multiplied) for _ in range(4)), torch.arange(count)).backward()

    for start, count in ((5, B), (0, B), (1, B), (16, B), (17, B), (K - 1, B), (32, B // 2 + 1)):
        yield f"{count} of each image, the ring at {start}", partial(step, start, count)


def of_classes(backend: str, dtype: torch.dtype, budget: int = KEPT, **options: Any) -> Iterator[Step]:
    """Trained prototypes: the last batch of any size. ``budget``: bytes of weights that the staged sweep may keep for backward."""
    head = sst_fast.MarginSoftmaxHead(K, D, backend=backend, **options).to(dtype)

    def step(count: int) -> None:
        staged.KEPT = budget
        head(rows(count, dtype), torch.arange(count)).backward()

    for count in (2 * B, 2 * B - 1, B + 1, B + 16):
        yield f"{count} probes", partial(step, count)


def of_some_classes(backend: str, dtype: torch.dtype, **options: Any) -> Iterator[Step]:
    """As Partial FC has them: another number of slots in every step."""
    head = sst_fast.MarginSoftmaxHead(K, D, backend=backend, **options).to(dtype)

    def step(slots: int) -> None:
        sst_fast.functional.margin_softmax(
            rows(2 * B, dtype), head.weight[:slots], torch.arange(2 * B), backend=backend, **options
        ).backward()

    for slots in (K, K - 16, K - 1, K - 127):
        yield f"{slots} slots", partial(step, slots)


def trainings(backend: str) -> Iterator[tuple[str, Iterator[Step]]]:
    """One of each kind of launch, each for itself."""
    for name, dtype in FLOATS.items():
        if (backend, name) == ("triton", "float64"):
            continue
        yield f"queue, {name}", of_queue(backend, dtype)
        if name != "float8":
            yield f"classes, {name}", of_classes(backend, dtype)
    half = torch.bfloat16
    for kind in (
        margins.MVSoftmax,
        margins.CurricularFace,
        margins.NPCFace,
        margins.AdaCos,
        margins.MagFace,
        margins.AdaFace,
    ):
        yield f"classes, {kind.__name__}", of_classes(backend, half, margin=kind())
    yield "queue, smoothed", of_queue(backend, half, label_smoothing=0.1)
    yield "queue, trained scale", of_queue(backend, half, scale=torch.nn.Parameter(torch.tensor(16.0)))
    yield "queue, whole scale", of_queue(backend, half, scale=64)
    for budget in (0, KEPT):
        kept = "kept" if budget else "not kept"
        yield f"classes, smoothed, {kept}", of_classes(backend, half, budget, label_smoothing=0.1)
        yield (
            f"classes, normalised float16, {kept}",
            of_classes(backend, torch.float16, budget, normalize_prototypes=True),
        )
        for sub_centers in (3, 9):
            yield (
                f"classes, {sub_centers} sub-centres, {kept}",
                of_classes(backend, half, budget, sub_centers=sub_centers),
            )
    yield "some classes", of_some_classes(backend, half)


def zeros(device: torch.device, *arrays: Any) -> list[torch.Tensor]:
    """Scratch memory that nobody will fill: rows are looked up by what it holds."""
    return [array.zero_() for array in carve(device, *arrays)]


def main() -> None:
    """All trainings on both backends."""
    triton.compiler.compile = compiled
    driver.set_active(Driver())
    fused.interpreted = lambda: True  # CPU tensors are let pass
    fused.carve = staged.carve = zeros
    staged.WEIGHTS = 1 << 15  # several chunks
    for backend in ("triton", "staged"):
        for training, steps in trainings(backend):
            for kernel in KERNELS:
                for cache, *_ in kernel.device_caches.values():
                    cache.clear()
            for name, step in steps:
                LAUNCHES.clear()
                step()
                print(json.dumps({"training": f"{backend}: {training}", "step": name, "launches": LAUNCHES}))


if __name__ == "__main__":
    main()
