"""Training and test images: which identities there are, and how their images become batches."""

from sst_fast.data.identities import EXTENSIONS, Faces, faces, flat, folder, listing, orl
from sst_fast.data.images import (
    MEAN,
    STD,
    Images,
    Pairs,
    all_images,
    augment,
    image_batches,
    read,
    to_tensor,
)

__all__ = [
    "EXTENSIONS",
    "MEAN",
    "STD",
    "Faces",
    "Images",
    "Pairs",
    "all_images",
    "augment",
    "faces",
    "flat",
    "folder",
    "image_batches",
    "listing",
    "orl",
    "read",
    "to_tensor",
]
