"""insightface's margins (deepinsight/insightface, recognition/arcface_torch/losses.py) and the head that holds them.

There a margin changes logits that partial FC has made; here a margin is a :class:`MarginLoss`, which tells :func:`PartialFC_V2`
what to compute. ArcFace's margin is applied there with its derivative taken as 1: ``gradient='straight_through'``.
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
    """A margin, its scale, and how its gradient is taken."""

    margin: Margin
    scale: float
    gradient: GradientRule


def CombinedMarginLoss(
    s: float, m1: float, m2: float, m3: float, interclass_filtering_threshold: float = 0
) -> MarginLoss:
    """cos(theta + m2) where m1 = 1 and m3 = 0, else the cosine less m3; other classes above the threshold left out if it is > 0.

    Raises:
        ValueError: a combination that insightface's code refuses, or whose m1 and m2 it would not look at.
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
    """cos(theta + margin)."""
    return CombinedMarginLoss(s, 1.0, margin, 0.0)


def CosFace(s: float = 64.0, m: float = 0.40) -> MarginLoss:
    """The cosine less m."""
    return CombinedMarginLoss(s, 1.0, 0.0, m)


def PartialFC_V2(
    margin_loss: MarginLoss, embedding_size: int, num_classes: int, sample_rate: float = 1.0, fp16: bool = False,
    **options: Any,
) -> PartialFC:  # fmt: skip
    """partial_fc_v2.py: classes shared out over ranks, a sample of them in each step.

    As there, an optimizer of PyTorch sees zeros in the rows that were not drawn, and moves them by momentum and weight decay;
    ``sparse=True`` with :class:`sst_fast.nn.RowSGD` leaves them as they are. First weights are normal as there, from other random numbers.
    ``fp16`` is not looked at: it is autocast's to say.
    """
    options = {"sparse": False, "gradient": margin_loss.gradient} | options
    return PartialFC(
        num_classes, embedding_size, margin_loss.margin, margin_loss.scale, sample_rate=sample_rate, **options
    )
