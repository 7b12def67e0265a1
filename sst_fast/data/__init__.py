"""Training and test images: which identities there are, and how their images become batches."""

from sst_fast.data.formats import faces
from sst_fast.data.identities import Faces, flat, folder, images_below, listing, orl
from sst_fast.data.images import EXTENSIONS, MEAN, STD, DataError, decode, read, square, to_tensor
from sst_fast.data.objects import from_dataset
from sst_fast.data.pairs import Images, Pairs, Unreadable, all_images, augment, augmentation, image_batches
from sst_fast.data.store import Selected

__all__ = [
    "EXTENSIONS",
    "MEAN",
    "STD",
    "DataError",
    "Faces",
    "Images",
    "Pairs",
    "Selected",
    "Unreadable",
    "all_images",
    "augment",
    "augmentation",
    "decode",
    "faces",
    "flat",
    "folder",
    "from_dataset",
    "image_batches",
    "images_below",
    "listing",
    "orl",
    "read",
    "square",
    "to_tensor",
]
