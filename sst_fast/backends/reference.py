"""Plain PyTorch (sst_fast/reference.py): runs everywhere, and holds all N x K logits in memory."""

from __future__ import annotations

from sst_fast.backends.backend import Backend, Problem


class Reference(Backend):
    """Chosen where no other backend can compute the problem."""

    def why_not(self, problem: Problem) -> str | None:
        """None where it can, otherwise the reason."""
        return None if problem.product_dtype is None else "rounds no products"
