"""Random problems for the fused loss (those of sst-fast check), and the float64 answer to each."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sst_fast import (
    AMSoftmax,
    ArcNegFace,
    ArcSoftmax,
    CircleLoss,
    CombinedMargin,
    CurricularFace,
    FilteredMargin,
    Margin,
    MVSoftmax,
    NPCFace,
    Softmax,
    SphereFace,
    reference,
)  # fmt: skip
from sst_fast.check import Example as Problem
from sst_fast.check import make, make_sub_centers
from sst_fast.margins import Parameter
from sst_fast.reference import MarginSoftmax

__all__ = ["MARGINS", "Problem", "answer", "make", "make_sub_centers"]

# At least one of every kind that kernels know.
MARGINS = [
    Softmax(), AMSoftmax(0.35), ArcSoftmax(0.5), ArcSoftmax(0.5, easy=True), CombinedMargin(1.0, 0.3, 0.2), SphereFace(),
    MVSoftmax(), MVSoftmax(0.5, 1.2, arc=True), CurricularFace(0.5, 0.3), NPCFace(), CircleLoss(), ArcNegFace(),
    FilteredMargin(threshold=0.2),
]  # fmt: skip


def answer(
    problem: Problem, margin: Margin, scale: Parameter, mask_empty: bool = True, label_smoothing: float = 0.0,
    gradient: str = "exact",
) -> tuple[MarginSoftmax, Tensor]:  # fmt: skip
    """Per-sample results and gradient of their sum in float64, on the problem's own (rounded) numbers."""
    p = replace(
        problem.to(torch.float64), margin=margin, scale=scale, mask_empty=mask_empty, label_smoothing=label_smoothing,
        gradient=gradient,
    )  # fmt: skip
    p = replace(p, embedding=p.embedding.detach().requires_grad_())
    out = reference.each(p)
    (found,) = torch.autograd.grad(out.loss.sum(), p.embedding)
    return out, found
