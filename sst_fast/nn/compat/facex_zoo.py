"""FaceX-Zoo's heads (JDAI-CV/FaceX-Zoo, head/*.py).

Its networks give unit vectors. Here embeddings may have any norm.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn

from sst_fast.arguments import check_word
from sst_fast.loss import SemiSiameseLoss
from sst_fast.margins import AMSoftmax, ArcSoftmax, Softmax
from sst_fast.nn import heads
from sst_fast.nn.compat import classes_last, unit_uniform
from sst_fast.queue import GalleryQueue

LossType = Literal["softmax", "am_softmax", "arc_softmax"]


def AM_Softmax(
    feat_dim: int, num_class: int, margin: float = 0.35, scale: float = 32, **options: Any
) -> heads.CosFace:  # fmt: skip
    """Additive cosine margin (AM_Softmax.py); ``margin`` is a cosine."""
    return heads.CosFace(num_class, feat_dim, margin, scale, **{"init": unit_uniform} | options)


def ArcFace(
    feat_dim: int, num_class: int, margin_arc: float = 0.35, margin_am: float = 0.0, scale: float = 32, **options: Any
) -> heads.ArcFace:
    """Additive angular margin (ArcFace.py); ``margin_arc`` in radians.

    Where the angle with its margin exceeds pi, the logit is the cosine minus ``margin_am`` instead.
    """
    return heads.ArcFace(num_class, feat_dim, margin_arc, scale, beyond=margin_am, **{"init": unit_uniform} | options)


def MagFace(
    feat_dim: int, num_class: int, margin_am: float = 0.0, scale: float = 32, l_a: float = 10, u_a: float = 110,
    l_margin: float = 0.45, u_margin: float = 0.8, lamda: float = 20, **options: Any,
) -> heads.MagFace:  # fmt: skip
    """A margin that grows with the norm (MagFace.py); ``l_a`` and ``u_a`` are norms, ``l_margin`` and ``u_margin`` radians.

    FaceX-Zoo's head returns the penalty on norms as a second result. Here its mean is a part of the loss.
    """
    return heads.MagFace(
        num_class, feat_dim, scale, lower_norm=l_a, upper_norm=u_a, lower_margin=l_margin, upper_margin=u_margin,
        penalty_weight=lamda, easy=False, beyond=margin_am, **{"init": unit_uniform} | options,
    )  # fmt: skip


def CircleLoss(
    feat_dim: int, num_class: int, margin: float = 0.25, gamma: float = 256, **options: Any
) -> heads.CircleLoss:
    """Circle loss with class-level labels (CircleLoss.py); ``margin`` is a cosine, ``gamma`` the scale."""
    return heads.CircleLoss(num_class, feat_dim, margin, gamma, **{"init": unit_uniform} | options)


def CurricularFace(
    feat_dim: int, num_class: int, m: float = 0.5, s: float = 64.0, **options: Any
) -> heads.CurricularFace:
    """Adaptive curriculum (CurricularFace.py); ``m`` in radians."""
    init = classes_last(partial(nn.init.normal_, std=0.01))
    return heads.CurricularFace(num_class, feat_dim, m, s, **{"init": init} | options)


def MV_Softmax(
    feat_dim: int, num_class: int, is_am: bool, margin: float = 0.35, mv_weight: float = 1.12, scale: float = 32,
    **options: Any,
) -> heads.MVSoftmax:  # fmt: skip
    """MV-softmax (MV_Softmax.py); ``margin`` is a cosine with ``is_am``, else radians."""
    return heads.MVSoftmax(
        num_class,
        feat_dim,
        margin,
        mv_weight,
        scale,
        arc=not is_am,
        positive_only=True,
        **{"init": unit_uniform} | options,
    )


def NPCFace(
    feat_dim: int = 512, num_class: int = 86876, margin: float = 0.5, scale: float = 64, **options: Any
) -> heads.NPCFace:
    """Negative-positive cooperation (NPCFace.py); ``margin``, in radians, decides which classes are hard."""
    return heads.NPCFace(
        num_class, feat_dim, scale=scale, hard_margin=margin, positive_only=True, **{"init": unit_uniform} | options
    )


def Adam_Softmax(
    feat_dim: int, num_class: int, scale: float = 30.0, lamda: float = 70.0, **options: Any
) -> heads.AdaMSoftmax:
    """A trained margin for each class (Adam_Softmax.py); ``lamda`` weighs the term that makes margins large.

    FaceX-Zoo's head returns this term as a second result. Here it is a part of the loss.
    """
    return heads.AdaMSoftmax(num_class, feat_dim, scale, penalty_weight=lamda, **{"init": unit_uniform} | options)


def AdaCos(feat_dim: int, num_classes: int, **options: Any) -> heads.AdaCos:
    """Adaptive scale (AdaCos.py)."""
    return heads.AdaCos(num_classes, feat_dim, **{"init": nn.init.xavier_uniform_} | options)


class SST_Prototype(SemiSiameseLoss):
    """The loss of Semi-Siamese Training with its queue (SST_Prototype.py); ``margin`` is a cosine, or radians with 'arc_softmax'.

    As in FaceX-Zoo, the queue starts with random features, and neither empty slots nor slots of a probe's own identity are masked.
    ``mask_identity=True, mask_empty=True`` masks them. The batch need not divide the queue, as it must there.
    """

    def __init__(
        self, feat_dim: int = 512, queue_size: int = 16384, scale: float = 30.0, loss_type: LossType = "softmax",
        margin: float = 0.0, **options: Any,
    ) -> None:  # fmt: skip
        check_word("loss_type", loss_type, get_args(LossType))
        formula = {
            "softmax": Softmax(), "am_softmax": AMSoftmax(margin), "arc_softmax": ArcSoftmax(margin, beyond="cosine"),
        }[loss_type]  # fmt: skip
        queue = GalleryQueue(queue_size, feat_dim, random=True)
        super().__init__(queue, formula, scale, **{"mask_identity": False, "mask_empty": False} | options)

    def forward(self, p1: Tensor, g2: Tensor, p2: Tensor, g1: Tensor, cur_ids: Tensor) -> Tensor:
        """The mean of both directions' cross-entropies. In training mode the queue then takes g1 or g2.

        Args:
            p1, g2, p2, g1: probe and gallery features [B, feat_dim] of images 1 and 2, in this order.
            cur_ids: identities, int64 [B], on any device.
        """
        return super().forward(p1, p2, g1, g2, cur_ids.to(p1.device))

    def get_id_set(self) -> set[int]:
        """The identities in the queue. FaceX-Zoo leaves them out of the next epoch."""
        return {identity for identity in self.queue.identities.tolist() if identity >= 0}
