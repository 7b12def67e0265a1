"""Plain PyTorch (sst_fast/reference.py): computes everything, everywhere, and holds all logits in memory."""

from __future__ import annotations

from sst_fast.backends.backend import Backend, Problem


class Reference(Backend):
    """What serves where nothing faster can."""

    def why_not(self, problem: Problem) -> str | None:
        """None where it can, otherwise the reason."""
        return None if problem.product_dtype is None else "rounds no products"
