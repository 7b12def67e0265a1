"""Semi-Siamese Training: a probe network trained by gradient and a gallery network that follows it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sst_fast.loss import SemiSiameseLoss


class SemiSiamese(nn.Module):
    """The two networks of Semi-Siamese Training (Du et al., ECCV 2020) around one loss.

        loss = model(image_a, image_b, identity)
        loss.backward(); optimizer.step(); model.update_gallery()

    Args:
        backbone: maps images [B, ...] to embeddings [B, D]; becomes ``probe``. ``gallery`` starts as a copy of it.
        criterion: the loss with its queue.
        momentum: m in [0, 1] of the moving average gallery <- m gallery + (1 - m) probe; 0.999 in the paper.
        shuffle: permute the gallery batch before its forward pass and put it back after (shuffle-BN, as in MoCo).

    The gallery network runs without gradient, in evaluation mode except for its BatchNorm layers, which normalise by
    their own batch and keep their own running statistics, as in the authors' code. For inference use ``probe`` alone.
    """

    def __init__(
        self, backbone: nn.Module, criterion: SemiSiameseLoss, momentum: float = 0.999, *, shuffle: bool = True
    ) -> None:
        super().__init__()
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {momentum!r}")
        self.momentum = momentum
        self.shuffle = shuffle
        self.probe = backbone
        self.gallery = copy.deepcopy(backbone).requires_grad_(False)
        self.criterion = criterion
        self.train(self.training)

    def train(self, mode: bool = True) -> SemiSiamese:
        """As ``nn.Module.train``; of the gallery network only BatchNorm layers ever train."""
        super().train(mode)
        self.gallery.eval()
        for module in self.gallery.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode)
        return self

    def forward(self, image_a: Tensor, image_b: Tensor, identity: Tensor) -> Tensor:
        """Symmetric loss of two images per identity; enqueues their gallery features in training mode.

        Args:
            image_a, image_b: one image each of the same B identities, [B, ...].
            identity: int64 [B], >= 0.

        Returns:
            Scalar loss with gradient for the probe network.
        """
        if image_a.shape != image_b.shape:
            raise ValueError(f"image_b must have shape {list(image_a.shape)} like image_a, got {list(image_b.shape)}")
        probe_a, probe_b = self.probe(image_a), self.probe(image_b)
        with torch.no_grad():
            gallery_a, gallery_b = self._gallery_forward(image_a), self._gallery_forward(image_b)
        loss: Tensor = self.criterion(probe_a, probe_b, gallery_a, gallery_b, identity)
        return loss

    @torch.no_grad()
    def update_gallery(self) -> None:
        """gallery <- m gallery + (1 - m) probe, parameters only (Du et al., ECCV 2020); call after the optimizer step."""
        gallery: list[Tensor] = list(self.gallery.parameters())
        probe: list[Tensor] = list(self.probe.parameters())
        torch._foreach_lerp_(gallery, probe, 1.0 - self.momentum)

    def _gallery_forward(self, image: Tensor) -> Tensor:
        if not (self.shuffle and self.training):
            out: Tensor = self.gallery(image)
            return out
        order = torch.randperm(len(image), device=image.device)
        shuffled: Tensor = self.gallery(image[order])
        return shuffled[torch.argsort(order)]
