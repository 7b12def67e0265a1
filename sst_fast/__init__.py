"""sst-fast: fused margin-softmax over an in-place gallery queue, and Semi-Siamese Training on top of it."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

from sst_fast import functional
from sst_fast.arguments import Window
from sst_fast.backends.choose import backends  # a function of the package's name: the modules stay importable
from sst_fast.loss import MarginSoftmaxHead, SemiSiameseLoss
from sst_fast.margins import (
    AdaCos,
    AdaFace,
    AMSoftmax,
    ArcNegFace,
    ArcSoftmax,
    CircleLoss,
    CombinedMargin,
    CurricularFace,
    FilteredMargin,
    MagFace,
    Margin,
    MVSoftmax,
    NPCFace,
    Softmax,
    SphereFace,
)  # fmt: skip
from sst_fast.queue import GalleryQueue
from sst_fast.samplers import IdentitySampler
from sst_fast.semi_siamese import SemiSiamese

if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str) -> ModuleType:
        """``sst_fast.nn``, imported when it is first asked for."""
        if name == "nn":
            return import_module("sst_fast.nn")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


try:
    __version__ = version("sst-fast")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AMSoftmax",
    "AdaCos",
    "AdaFace",
    "ArcNegFace",
    "ArcSoftmax",
    "CircleLoss",
    "CombinedMargin",
    "CurricularFace",
    "FilteredMargin",
    "GalleryQueue",
    "IdentitySampler",
    "MVSoftmax",
    "MagFace",
    "Margin",
    "MarginSoftmaxHead",
    "NPCFace",
    "SemiSiamese",
    "SemiSiameseLoss",
    "Softmax",
    "SphereFace",
    "Window",
    "backends",
    "functional",
]
