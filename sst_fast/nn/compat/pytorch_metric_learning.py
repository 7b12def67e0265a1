"""pytorch-metric-learning's classification losses (2.9, losses/*.py).

``weight_init_func`` fills weights [embedding_size, num_classes], as in that library. Reducers, distances, regularizers and tuples of
miners have no counterpart here. In the place of a reducer there is the option ``reduction``. A regularizer can be added to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sst_fast.nn import heads
from sst_fast.nn.compat import classes_last

Init = Callable[[Tensor], object]


def ArcFaceLoss(
    num_classes: int, embedding_size: int, margin: float = 28.6, scale: float = 64, *,
    weight_init_func: Init = nn.init.normal_, **options: Any,
) -> heads.ArcFace:  # fmt: skip
    """Additive angular margin; ``margin`` in degrees."""
    init = classes_last(weight_init_func)
    return heads.ArcFace(num_classes, embedding_size, math.radians(margin), scale, init=init, **options)


def CosFaceLoss(
    num_classes: int, embedding_size: int, margin: float = 0.35, scale: float = 64, *,
    weight_init_func: Init = nn.init.normal_, **options: Any,
) -> heads.CosFace:  # fmt: skip
    """Additive cosine margin; ``margin`` is a cosine."""
    init = classes_last(weight_init_func)
    return heads.CosFace(num_classes, embedding_size, margin, scale, init=init, **options)


def SphereFaceLoss(
    num_classes: int, embedding_size: int, margin: int = 4, scale: float = 1, *, weight_init_func: Init = nn.init.normal_,
    **options: Any,
) -> heads.SphereFace:  # fmt: skip
    """Multiplicative angular margin without annealing; ``margin`` is a factor of the angle.

    The embedding's norm is the scale. ValueError for another ``scale`` than 1.
    """
    if scale != 1:
        raise ValueError(f"scale must be 1, the embedding's norm taking its place, got {scale!r}")
    return heads.SphereFace(
        num_classes,
        embedding_size,
        margin,
        annealing=0.0,
        norm_scale=True,
        init=classes_last(weight_init_func),
        **options,
    )


def NormalizedSoftmaxLoss(
    num_classes: int, embedding_size: int, temperature: float = 0.05, *, weight_init_func: Init = nn.init.normal_,
    **options: Any,
) -> heads.NormalizedSoftmax:  # fmt: skip
    """Softmax of cosines without a margin; the scale is 1 / ``temperature``."""
    return heads.NormalizedSoftmax(
        num_classes, embedding_size, temperature, init=classes_last(weight_init_func), **options
    )


def SubCenterArcFaceLoss(
    num_classes: int, embedding_size: int, margin: float = 28.6, scale: float = 64, sub_centers: int = 3, *,
    weight_init_func: Init = nn.init.normal_, **options: Any,
) -> heads.SubCenterArcFace:  # fmt: skip
    """Additive angular margin with several weight vectors for each class; ``margin`` in degrees."""
    init = classes_last(weight_init_func)
    return heads.SubCenterArcFace(
        num_classes, embedding_size, math.radians(margin), scale, sub_centers=sub_centers, init=init, **options
    )
