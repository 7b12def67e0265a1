"""Training and test images: which identities there are, and how their images become batches."""

from sst_fast.data.identities import Faces, faces, flat, folder, images_below, listing, orl
from sst_fast.data.images import EXTENSIONS, MEAN, STD, DataError, read, to_tensor
from sst_fast.data.pairs import Images, Pairs, all_images, augment, image_batches

__all__ = [
    "EXTENSIONS",
    "MEAN",
    "STD",
    "DataError",
    "Faces",
    "Images",
    "Pairs",
    "all_images",
    "augment",
    "faces",
    "flat",
    "folder",
    "image_batches",
    "images_below",
    "listing",
    "orl",
    "read",
    "to_tensor",
]
