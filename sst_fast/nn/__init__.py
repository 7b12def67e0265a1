"""Losses as modules, by the names that the field knows them by. Each can replace a head or a loss of another project.

Some names exist twice. The package itself has *margins*: formulas without weights (:mod:`sst_fast.margins`). ``sst_fast.nn`` has
*modules*, which hold the class weights or the queue that they need and give a loss. ``sst_fast.CurricularFace(0.5)`` is the
formula, ``sst_fast.nn.CurricularFace(classes, dim, 0.5)`` is the head that uses it.

All losses take embeddings [N, D] in float64, float32, bfloat16 or float16, and normalise them inside. Labels and identities are
int64 [N]. The loss is 0-d: float64 if an input is float64, else float32. TypeError and ValueError name the argument, what was expected
and what came.

A *head* (ArcFace, CosFace ...) holds one weight vector for each of K classes. ``loss = head(embedding, label)`` takes class numbers
[N] in [0, K). ``head.weight`` is [K, D]. ``head.logits(embedding)`` and ``head.topk(embedding, k)`` are for accuracy.
``head.statistics`` holds what the last call has found, for progress. :mod:`sst_fast.nn.heads` says what all heads have in common.

Most modules are a thin layer over one operator, :func:`sst_fast.functional.margin_softmax`. Where a batch is compared with itself, or
images with texts, they use PyTorch's own products, block by block.
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
