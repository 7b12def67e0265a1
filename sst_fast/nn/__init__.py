"""Losses as modules, by the names that the field knows them by: what replaces a head or a loss of another project.

Everything here is a thin layer over the one operator, :func:`sst_fast.functional.margin_softmax`, and needs torch alone.
"""

from sst_fast.nn.queues import DCQ, CrossBatchMemory, MoCo, NTXent, PairCircle, SupCon
from sst_fast.nn.symmetric import CLIPLoss, SigLIPLoss

__all__ = ["DCQ", "CLIPLoss", "CrossBatchMemory", "MoCo", "NTXent", "PairCircle", "SigLIPLoss", "SupCon"]
