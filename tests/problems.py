"""Random problems for the fused loss, and the float64 answer to each."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
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
    Window,
    reference,
)  # fmt: skip
from sst_fast.arguments import Arguments
from sst_fast.margins import Parameter
from sst_fast.reference import MarginSoftmax, window_slots

# At least one of every kind that kernels know.
MARGINS = [
    Softmax(), AMSoftmax(0.35), ArcSoftmax(0.5), ArcSoftmax(0.5, easy=True), CombinedMargin(1.0, 0.3, 0.2), SphereFace(),
    MVSoftmax(), MVSoftmax(0.5, 1.2, arc=True), CurricularFace(0.5, 0.3), NPCFace(), CircleLoss(), ArcNegFace(),
    FilteredMargin(threshold=0.2),
]  # fmt: skip


class Problem(Arguments):
    """Arguments of the loss, with what tests do to them."""

    def options(self) -> dict:
        """Those that tests vary, as keyword arguments of ``margin_softmax``."""
        return {"window": self.window, "identity": self.identity, "slot_identity": self.slot_identity}

    def to(self, dtype: torch.dtype, queue_dtype: torch.dtype | None = None) -> Problem:
        """The same problem rounded to other dtypes."""
        queue_dtype = queue_dtype or dtype
        window = self.window and replace(self.window, features=self.window.features.to(queue_dtype))
        positive = self.positive if self.positive is None else self.positive.to(dtype)
        return replace(
            self, embedding=self.embedding.to(dtype), prototypes=self.prototypes.to(queue_dtype), window=window,
            positive=positive,
        )  # fmt: skip


def make(
    n: int,
    k: int,
    d: int,
    *,
    seed: int = 0,
    start: int | None = None,
    groups: int = 2,
    identities: int | None = None,
    empty: float = 0.0,
    masks: bool = True,
) -> Problem:
    """n probes, k slots; with ``start`` the batch's own slots are a window there, and n is per group.

    ``identities`` few enough make false negatives; ``empty`` is the share of empty slots.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def integers(high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=generator)

    identities = identities or max(2, 2 * k)
    prototypes = F.normalize(rand(k, d))
    slot_identity = integers(identities, k)
    slot_identity[torch.rand(k, generator=generator) < empty] = -1
    if start is None:
        target, window = integers(k, n), None
        identity = slot_identity[target].clamp_min(0)
        # Near their target, as trained probes are: otherwise every softmax is flat.
        embedding = prototypes[target] * rand(n, 1).abs() * 3 + rand(n, d) / d**0.5
    else:
        ids = integers(identities, n)
        slots = window_slots(torch.tensor(start), n, k)
        window = Window(F.normalize(rand(groups, n, d), dim=2), ids, torch.tensor(start), slots)
        target, identity = slots.repeat(groups), ids.repeat(groups)
        embedding = window.features.flatten(0, 1) * 2 + rand(groups * n, d) / d**0.5
    if not masks:
        identity = slot_identity = None
    return Problem(embedding, prototypes, target, identity=identity, slot_identity=slot_identity, window=window)


def make_sub_centers(n: int, classes: int, sub_centers: int, d: int, *, seed: int = 0) -> Problem:
    """n probes, each near one of the sub-centres of its class; unit rows."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = F.normalize(torch.randn(classes * sub_centers, d, generator=generator, dtype=torch.float64))
    row = torch.randint(classes * sub_centers, (n,), generator=generator)
    embedding = 2 * prototypes[row] + torch.randn(n, d, generator=generator, dtype=torch.float64) / d**0.5
    return Problem(embedding, prototypes, row // sub_centers, sub_centers=sub_centers)


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
