"""sst-fast: fused margin-softmax over an in-place gallery queue, and Semi-Siamese Training on top of it."""

from importlib.metadata import PackageNotFoundError, version

from sst_fast import functional
from sst_fast.dispatch import backends
from sst_fast.loss import SemiSiameseLoss
from sst_fast.margins import AMSoftmax, ArcSoftmax, Margin, Softmax
from sst_fast.queue import GalleryQueue, Window
from sst_fast.semi_siamese import SemiSiamese

try:
    __version__ = version("sst-fast")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AMSoftmax",
    "ArcSoftmax",
    "GalleryQueue",
    "Margin",
    "SemiSiamese",
    "SemiSiameseLoss",
    "Softmax",
    "Window",
    "backends",
    "functional",
]
