"""The loss in CUDA C++ for Hopper (csrc/cuda/margin_softmax_sm90.cu): what it can do. Not yet run on a GPU."""

from __future__ import annotations

import torch

from sst_fast.backends.backend import Backend, Problem
from sst_fast.backends.extension import compiled, why_not_compiled

DIMS = (128, 256, 512)
DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


class Hopper(Backend):
    """On request: its kernels have not yet run on a GPU."""

    launches = True

    def why_not(self, problem: Problem) -> str | None:
        """None where it can, otherwise the reason."""
        if problem.operation != "margin_softmax":
            return "for the loss alone"
        if problem.device.type != "cuda":
            return f"not for {problem.device.type} tensors"
        if compiled is None:
            return why_not_compiled
        if compiled.cuda is None:
            return "sst_fast._C was built without CUDA"
        if not compiled.sm90a:
            return "sst_fast._C was built without sm_90a"
        if torch.cuda.get_device_capability(problem.device) != (9, 0):
            return "for Hopper (sm_90) alone"
        return self.why_not_shape(problem)

    def why_not_shape(self, problem: Problem) -> str | None:
        """The same for what does not depend on the machine."""
        rounds = problem.product_dtype == torch.float8_e4m3fn
        dtypes, dims = (DTYPES[2:], DIMS[1:]) if rounds else (DTYPES, DIMS)
        if problem.product_dtype is not None and not rounds:
            return f"rounds products to float8_e4m3fn alone, not to {problem.product_dtype}"
        if problem.queue_dtype not in dtypes:
            return f"not for prototypes in {problem.queue_dtype}"
        if problem.dim not in dims:
            return f"for D in {dims}, not {problem.dim}"
        if problem.trains_prototypes or problem.normalize:
            return "for frozen unit prototypes alone"
        if problem.smooths or problem.trains_scale or problem.sub_centers:
            return "no label smoothing, no gradient for the scale, no sub-centres"
        if problem.dtype == torch.float64 or problem.positive:
            return "no float64, no explicit positives"
        return None

    def volunteers(self, problem: Problem) -> bool:
        """Only for what no other backend does."""
        return problem.product_dtype is not None
