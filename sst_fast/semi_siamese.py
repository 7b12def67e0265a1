"""Semi-Siamese Training: a probe network trained by gradient and a gallery network that follows it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sst_fast import distributed
from sst_fast.arguments import check_count, check_word, is_number
from sst_fast.loss import SemiSiameseLoss

BatchNorm = Literal["own", "copy", "average"]


class SemiSiamese(nn.Module):
    """The two networks of Semi-Siamese Training (Du et al., ECCV 2020) around one loss.

        loss = model(image_a, image_b, identity)
        loss.backward(); optimizer.step(); model.update_gallery()

    Args:
        backbone: maps images [B, ...] to embeddings [B, D]. It becomes ``probe``; ``gallery`` starts as a copy of it.
        criterion: the loss with its queue.
        momentum: m in [0, 1] of the moving average gallery <- m gallery + (1 - m) probe; 0.999 in the paper.
        warmup: how slowly m rises at first: update number t uses min(m, t / (t + warmup)). With the default, 20, the gallery
            network learns even in a run of a hundred updates; m = 0.999 is reached after 20,000. 0: m from the start, as in
            the paper.
        shuffle: permute the gallery batch over all ranks before its forward pass, and put it back after (shuffle-BN, as in
            MoCo). With one process this changes nothing but the order.
        batchnorm: what BatchNorm layers of the gallery network do. 'own' (default): they normalise by their own batch and keep
            their own running statistics, as in the authors' code. 'copy': they normalise by the probe network's running
            statistics. 'average': they normalise by a moving average of these, made as that of the parameters is.
            All other buffers (vectors of spectral_norm, statistics of InstanceNorm, your own) are always copied from the
            probe network at each update.
        galleries: number of gallery networks, which take turns batch by batch. The one whose turn it was is updated. More
            than one is the idea of MASST (arXiv 2105.04113, of which only the abstract was followed).

    The gallery networks run without gradient, in evaluation mode (but see ``batchnorm``). For inference use ``probe``
    alone. The number of updates is part of the state dict.

    Under DistributedDataParallel wrap the whole model, and call ``update_gallery`` on ``ddp.module``. Queue and gallery networks
    are left out of its broadcasts.
    """

    def __init__(
        self,
        backbone: nn.Module,
        criterion: SemiSiameseLoss,
        momentum: float = 0.999,
        *,
        warmup: int = 20,
        shuffle: bool = True,
        batchnorm: BatchNorm = "own",
        galleries: int = 1,
    ) -> None:
        super().__init__()
        if not is_number(momentum) or not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {momentum!r}")
        galleries = check_count("galleries", galleries, 1)
        check_word("batchnorm", batchnorm, get_args(BatchNorm))
        if next(backbone.parameters(), None) is None:
            raise ValueError(
                "backbone must have parameters for the gallery network to follow, got a module without any"
            )
        self.momentum = float(momentum)
        self.warmup = check_count("warmup", warmup, 0)
        self.shuffle = shuffle
        self.batchnorm = batchnorm
        self.updates = 0
        self.turn = 0  # a number of its own: torch.compile guards on its value, which comes again
        self.probe = backbone
        copies = [copy.deepcopy(backbone).requires_grad_(False) for _ in range(galleries)]
        self.galleries = nn.ModuleList(copies)
        self.criterion = criterion
        kept = [name for name, _ in self.named_buffers() if not name.startswith("probe.")]
        self._ddp_params_and_buffers_to_ignore = kept + [
            name for name, _ in self.named_parameters() if name.startswith("galleries.")
        ]
        self.train(self.training)

    @property
    def gallery(self) -> nn.Module:
        """The gallery network whose turn it is."""
        return self.galleries[self.turn]

    def train(self, mode: bool = True) -> SemiSiamese:
        """As ``nn.Module.train``; of the gallery networks only BatchNorm layers ever train, and only their 'own' ones."""
        super().train(mode)
        self.galleries.eval()
        for module in self.galleries.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode and self.batchnorm == "own")
        return self

    def forward(self, image_a: Tensor, image_b: Tensor, identity: Tensor) -> Tensor:
        """Symmetric loss of two images per identity. In training mode their gallery features then enter the queue.

        Args:
            image_a, image_b: one image each of the same B identities, [B, ...].
            identity: int64 [B], >= 0.

        Returns:
            Scalar loss with gradient for the probe network.
        """
        if image_a.shape != image_b.shape:
            raise ValueError(f"image_b must have shape {list(image_a.shape)} like image_a, got {list(image_b.shape)}")
        # Images travel between ranks while the probe network runs, features of a while the gallery network sees b.
        shuffle = self.shuffle and self.training
        gallery = [GalleryPass(self.gallery, image, shuffle, self.criterion.group) for image in (image_a, image_b)]
        probe_a, probe_b = self.probe(image_a), self.probe(image_b)
        for begun in gallery:
            begun.run()
        gallery_a, gallery_b = (begun.features for begun in gallery)
        loss: Tensor = self.criterion(probe_a, probe_b, gallery_a, gallery_b, identity)
        return loss

    @torch.no_grad()
    def update_gallery(self) -> None:
        """gallery <- m gallery + (1 - m) probe (Du et al., ECCV 2020). Call it after the optimizer's step."""
        m = self.momentum
        if self.warmup:
            m = min(m, (self.updates + 1) / (self.updates + 1 + self.warmup))
        for module in self.gallery.modules():
            reshard: Any = getattr(module, "reshard", None)  # FSDP2 leaves what has no backward pass gathered
            if reshard is not None:
                reshard()
        gallery: list[Tensor] = list(self.gallery.parameters())
        probe: list[Tensor] = list(self.probe.parameters())
        torch._foreach_lerp_(gallery, probe, 1.0 - m)
        for mine, theirs in zip(self.gallery.modules(), self.probe.modules(), strict=True):
            normalises = isinstance(mine, nn.modules.batchnorm._BatchNorm)
            if normalises and self.batchnorm == "own":
                continue
            buffers = theirs.named_buffers(recurse=False, remove_duplicate=False)
            for name, buffer in buffers:
                kept = mine.get_buffer(name)
                if normalises and self.batchnorm == "average" and kept.is_floating_point():
                    kept.lerp_(buffer, 1.0 - m)
                else:
                    kept.copy_(buffer)
        self.updates += 1
        self.turn = self.updates % len(self.galleries)

    def get_extra_state(self) -> Tensor:
        """The number of updates, int64 []. A tensor, since safetensors stores nothing else, and torch.distributed.checkpoint
        loads into the tensors that it finds in a state dict."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor | Mapping[str, int]) -> None:
        """Restores :meth:`get_extra_state`; also as older checkpoints hold it, {"updates": n}."""
        self.updates = int(state["updates"] if isinstance(state, Mapping) else state)
        self.turn = self.updates % len(self.galleries)


class GalleryPass:
    """One image of each identity through the gallery network, shuffled over all ranks before and put back after (shuffle-BN).

    What travels between ranks does so while something else is computed: create it before the probe network runs, call
    :meth:`run` after, and ask for :attr:`features` last.

    Args:
        network: the gallery network; runs without gradient.
        image: this rank's images [B, ...]; every rank brings as many.
        shuffle: whether to permute the images of all ranks.
        group: the process group.
    """

    def __init__(self, network: nn.Module, image: Tensor, shuffle: bool, group: distributed.Group) -> None:
        self.network, self.image, self.shuffle, self.group = network, image, shuffle, group
        if not shuffle:
            return
        rank, world = distributed.ranks(group)
        distributed.assert_same_batch(image, group)
        self.images = distributed.begin_gather(image, group)
        order = torch.rand(world * len(image), device=image.device).argsort()  # inductor cannot index by randperm's
        self.order = distributed.from_first(order, group)
        self.own = slice(rank * len(image), (rank + 1) * len(image))

    def run(self) -> None:
        """Runs the network, on this rank's share of the shuffled images."""
        with torch.no_grad():  # a block, no decorator: torch.compile does not trace decorated methods of a new object
            if self.shuffle:
                mine = self.network(self.images()[self.order[self.own]])
                self.found = distributed.begin_gather(mine, self.group)
            else:
                features: Tensor = self.network(self.image)
                self.found = lambda: features

    @property
    def features(self) -> Tensor:
        """[B, D], in the order of ``image``."""
        return self.found()[torch.argsort(self.order)[self.own]] if self.shuffle else self.found()
