"""Losses as modules, by the names that the field knows them by. Each can replace a head or a loss of another project.

Some names exist twice. The package itself has *margins*: formulas without weights (:mod:`sst_fast.margins`). ``sst_fast.nn`` has
*modules*, which hold the class weights or the queue that they need and give a loss. ``sst_fast.CurricularFace(0.5)`` is the
formula, ``sst_fast.nn.CurricularFace(classes, dim, 0.5)`` is the head that uses it.

The modules need torch alone. Most are a thin layer over one operator, :func:`sst_fast.functional.margin_softmax`. Where a batch is
compared with itself or with its other side, they use blocks of PyTorch's own products.
"""

from sst_fast.nn.convert import convert
from sst_fast.nn.heads import (
    AdaCos,
    AdaFace,
    AdaMSoftmax,
    ArcFace,
    ArcNegFace,
    CircleLoss,
    CombinedMargin,
    CosFace,
    CurricularFace,
    MagFace,
    MVSoftmax,
    NormalizedSoftmax,
    NPCFace,
    SphereFace,
    SubCenterArcFace,
    UniFace,
)
from sst_fast.nn.optimizers import RowAdamW, RowSGD
from sst_fast.nn.partial_fc import PartialFC, merge_state_dicts, split_state_dict
from sst_fast.nn.queues import DCQ, Contrastive, CrossBatchMemory, MoCo, NTXent, PairCircle, SupCon
from sst_fast.nn.symmetric import CLIPLoss, SigLIPLoss

__all__ = [
    "DCQ",
    "AdaCos",
    "AdaFace",
    "AdaMSoftmax",
    "ArcFace",
    "ArcNegFace",
    "CLIPLoss",
    "CircleLoss",
    "CombinedMargin",
    "Contrastive",
    "CosFace",
    "CrossBatchMemory",
    "CurricularFace",
    "MVSoftmax",
    "MagFace",
    "MoCo",
    "NPCFace",
    "NTXent",
    "NormalizedSoftmax",
    "PairCircle",
    "PartialFC",
    "RowAdamW",
    "RowSGD",
    "SigLIPLoss",
    "SphereFace",
    "SubCenterArcFace",
    "SupCon",
    "UniFace",
    "convert",
    "merge_state_dicts",
    "split_state_dict",
]
