"""insightface's margins (deepinsight/insightface, recognition/arcface_torch/losses.py) and the head that holds them.

There a margin is a module that changes the logits of partial FC. Here it is a :class:`MarginLoss`, which tells :func:`PartialFC_V2`
what to compute. insightface applies ArcFace's margin under ``no_grad``, so that its derivative counts as 1. Here that is
``gradient='straight_through'``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sst_fast.arguments import GradientRule
from sst_fast.margins import AMSoftmax, FilteredMargin, Margin
from sst_fast.margins import CombinedMargin as Combined
from sst_fast.nn.partial_fc import PartialFC


@dataclass(frozen=True)
class MarginLoss:
    """A margin, its scale s, and its gradient: 'exact' or 'straight_through' (:func:`sst_fast.functional.margin_softmax`)."""

    margin: Margin
    scale: float
    gradient: GradientRule


def CombinedMarginLoss(
    s: float, m1: float, m2: float, m3: float, interclass_filtering_threshold: float = 0
) -> MarginLoss:
    """cos(theta + m2) if m1 = 1 and m3 = 0; the cosine minus m3 if m1 = 1, m2 = 0 and m3 > 0.

    Args:
        s: the scale.
        m1, m2, m3: a factor, radians, a cosine.
        interclass_filtering_threshold: a cosine. If it is > 0, other classes with a larger cosine get logit 0, without a gradient.

    Raises:
        ValueError: other m1, m2, m3. insightface's code refuses them, or does not use all of them.
    """
    arc = m1 == 1 and m3 == 0
    if not arc and not (m3 > 0 and m1 == 1 and m2 == 0):
        raise ValueError(
            "m1, m2, m3 must be (1, m2, 0) or (1, 0, m3 > 0), which is what insightface's code computes, got "
            f"({m1!r}, {m2!r}, {m3!r}); sst_fast.nn.CombinedMargin takes any"
        )
    margin: Margin
    if interclass_filtering_threshold > 0:
        margin = FilteredMargin(1.0, m2, m3, "cosine", interclass_filtering_threshold)
    else:
        margin = Combined(1.0, m2, beyond="cosine", m3=0.0) if arc else AMSoftmax(m3)
    return MarginLoss(margin, s, "straight_through" if arc else "exact")


def ArcFace(s: float = 64.0, margin: float = 0.5) -> MarginLoss:
    """cos(theta + margin), ``margin`` in radians; ``s`` is the scale."""
    return CombinedMarginLoss(s, 1.0, margin, 0.0)


def CosFace(s: float = 64.0, m: float = 0.40) -> MarginLoss:
    """The cosine minus ``m``; ``s`` is the scale."""
    return CombinedMarginLoss(s, 1.0, 0.0, m)


def PartialFC_V2(
    margin_loss: MarginLoss, embedding_size: int, num_classes: int, sample_rate: float = 1.0, fp16: bool = False,
    **options: Any,
) -> PartialFC:  # fmt: skip
    """Classes divided among ranks, a sample of them in each step (partial_fc_v2.py): :class:`sst_fast.nn.PartialFC`.

    As in insightface, the gradient is zero in the rows that were not drawn, and an optimizer of PyTorch moves them by momentum and
    weight decay. With ``sparse=True`` and :class:`sst_fast.nn.RowSGD` they stay as they are. First weights have the same distribution
    as there, but are other random numbers. ``fp16`` is accepted and not used: autocast decides.
    """
    options = {"sparse": False, "gradient": margin_loss.gradient} | options
    return PartialFC(
        num_classes, embedding_size, margin_loss.margin, margin_loss.scale, sample_rate=sample_rate, **options
    )
