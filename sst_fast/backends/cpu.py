"""C++ for the CPU (csrc/cpu): the loss, by the widest vectors that the processor has, and the queue."""

from __future__ import annotations

from sst_fast.backends.backend import Backend, Problem
from sst_fast.backends.extension import compiled, why_not_compiled


class Cpu(Backend):
    """Computes everything on CPU tensors."""

    def why_not(self, problem: Problem) -> str | None:
        """None where it can, otherwise the reason."""
        if problem.device.type != "cpu":
            return f"not for {problem.device.type} tensors"
        if compiled is None:
            return why_not_compiled
        return None if problem.product_dtype is None else "rounds no products"
