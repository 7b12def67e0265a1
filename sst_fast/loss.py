"""The loss of Semi-Siamese Training over a gallery queue."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sst_fast import functional
from sst_fast.margins import AMSoftmax, Margin
from sst_fast.queue import GalleryQueue

Keep = Literal["coin", "first", "second"]


class SemiSiameseLoss(nn.Module):
    """Both directions of Semi-Siamese Training against one queue, in one launch, then the enqueue.

    loss = 1/2 [ L(probe(x1), gallery(x2)) + L(probe(x2), gallery(x1)) ]  (Du et al., ECCV 2020), where L
    is :func:`sst_fast.functional.margin_softmax` with the other image's gallery feature in the batch's own slots.

    Args:
        queue: the gallery queue.
        margin: a margin of :mod:`sst_fast.margins`.
        scale: inverse temperature s > 0.
        keep: whose gallery feature enters the queue: 'coin' (default: of both images alike, one toss per batch, as in
            the authors' code), 'first' or 'second'.
        mask_identity: slots that hold the probe's own identity are no negatives (default). False: as the authors' code.
        mask_empty: empty slots are no negatives (default).
        backend: force an implementation of the loss, see :func:`sst_fast.backends`.

    After each call ``statistics`` holds the :class:`sst_fast.functional.Statistics` of the 2B probes.
    """

    statistics: functional.Statistics | None

    def __init__(
        self,
        queue: GalleryQueue,
        margin: Margin = AMSoftmax(0.35),
        scale: float = 30.0,
        *,
        keep: Keep = "coin",
        mask_identity: bool = True,
        mask_empty: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if keep not in ("coin", "first", "second"):
            raise ValueError(f"keep must be 'coin', 'first' or 'second', got {keep!r}")
        self.queue = queue
        self.margin = margin
        self.scale = scale
        self.keep = keep
        self.mask_identity = mask_identity
        self.mask_empty = mask_empty
        self.backend = backend
        self.statistics = None

    def forward(
        self, probe_a: Tensor, probe_b: Tensor, gallery_a: Tensor, gallery_b: Tensor, identity: Tensor
    ) -> Tensor:
        """Loss of a batch; in training mode the queue then takes one gallery feature of each identity.

        Args:
            probe_a, probe_b: probe embeddings [B, D] of the two images of each identity; normalised inside.
            gallery_a, gallery_b: gallery embeddings [B, D] of the same images; normalised inside, no gradient.
            identity: int64 [B], >= 0.

        Returns:
            Scalar: the mean over the 2B probes.
        """
        for name, value in (("probe_b", probe_b), ("gallery_a", gallery_a), ("gallery_b", gallery_b)):
            if value.shape != probe_a.shape:
                raise ValueError(f"{name} must have shape {list(probe_a.shape)} like probe_a, got {list(value.shape)}")
        window = self.queue.window(torch.stack([gallery_b, gallery_a]).detach(), identity)
        loss, self.statistics = functional.margin_softmax(
            torch.cat([probe_a, probe_b]),
            self.queue.features,
            window.slots.repeat(2),
            margin=self.margin,
            scale=self.scale,
            window=window,
            identity=identity.repeat(2) if self.mask_identity else None,
            slot_identity=self.queue.identities,
            mask_empty=self.mask_empty,
            backend=self.backend,
            return_statistics=True,
        )
        if self.training:
            self.queue.enqueue(self._kept(window.features), identity)
        return loss

    def _kept(self, features: Tensor) -> Tensor:
        gallery_b, gallery_a = features
        if self.keep == "coin":
            # Tossed on the device: the host neither waits nor decides.
            kept: Tensor = torch.where(torch.rand((), device=features.device) < 0.5, gallery_a, gallery_b)
            return kept
        one: Tensor = gallery_a if self.keep == "first" else gallery_b
        return one
