"""CUDA C++ for the queue (csrc/cuda/queue.cu)."""

from __future__ import annotations

from sst_fast.backends.backend import Backend, Problem
from sst_fast.backends.extension import compiled, why_not_compiled


class Cuda(Backend):
    """The queue's operations on CUDA tensors."""

    launches = True

    def why_not(self, problem: Problem) -> str | None:
        """None where it can, otherwise the reason."""
        if problem.device.type != "cuda":
            return f"not for {problem.device.type} tensors"
        if problem.operation == "margin_softmax":
            return "for the queue alone; the loss is written in Triton and, for Hopper, in CUDA C++"
        if compiled is None:
            return why_not_compiled
        return "sst_fast._C was built without CUDA" if compiled.cuda is None else None
