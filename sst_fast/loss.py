"""The losses as modules: Semi-Siamese Training over a gallery queue, and learned class weights."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sst_fast import functional
from sst_fast.margins import AMSoftmax, Margin, Parameter, Seen, Softmax
from sst_fast.queue import GalleryQueue

Keep = Literal["coin", "first", "second"]


class RunningMargin(nn.Module):
    """A margin and, as buffers, those of its parameters that follow the training (``Margin.running``)."""

    def __init__(self, margin: Margin) -> None:
        super().__init__()
        self.margin = margin
        for name in margin.running:
            self.register_buffer(name, torch.as_tensor(getattr(margin, name), dtype=torch.float32).clone())

    def current(self) -> Margin:
        """The margin with its parameters as they are now: copies, which later updates leave alone."""
        if not self.margin.running:
            return self.margin
        return dataclasses.replace(self.margin, **{name: getattr(self, name).clone() for name in self.margin.running})

    @torch.no_grad()
    def follow(self, embedding: Tensor, prototypes: Tensor, target: Tensor, **options: Any) -> None:
        """Moves the running parameters on by a batch; arguments as of :func:`sst_fast.functional.margin_softmax`."""
        if not self.margin.running:
            return
        looks = {name: options[name] for name in ("window", "normalize_prototypes") if name in options}
        cosine = functional.target_cosine(embedding, prototypes, target, **looks)

        def log_negatives(scale: Tensor) -> Tensor:
            excess = functional.margin_softmax(
                embedding, prototypes, target, margin=Softmax(), scale=scale, reduction="none", **options
            )
            found: Tensor = scale * cosine + excess + (-torch.expm1(-excess)).log()
            return found

        norm = functional.embedding_norm(embedding)
        for name, value in self.current().follow(Seen(norm, cosine, len(prototypes), log_negatives)).items():
            getattr(self, name).copy_(value)


class SemiSiameseLoss(nn.Module):
    """Both directions of Semi-Siamese Training against one queue, in one launch, then the enqueue.

    loss = 1/2 [ L(probe(x1), gallery(x2)) + L(probe(x2), gallery(x1)) ]  (Du et al., ECCV 2020), where L
    is :func:`sst_fast.functional.margin_softmax` with the other image's gallery feature in the batch's own slots.

    Args:
        queue: the gallery queue.
        margin: a margin of :mod:`sst_fast.margins`.
        scale: inverse temperature s > 0.
        label_smoothing, gradient: as in :func:`sst_fast.functional.margin_softmax`.
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
        scale: Parameter = 30.0,
        *,
        label_smoothing: float = 0.0,
        gradient: functional.GradientRule = "exact",
        keep: Keep = "coin",
        mask_identity: bool = True,
        mask_empty: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if keep not in ("coin", "first", "second"):
            raise ValueError(f"keep must be 'coin', 'first' or 'second', got {keep!r}")
        self.queue = queue
        self.margin = RunningMargin(margin)
        self.scale = scale
        self.label_smoothing = label_smoothing
        self.gradient = gradient
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
        embedding, target = torch.cat([probe_a, probe_b]), window.slots.repeat(2)
        options: dict[str, Any] = {
            "window": window,
            "identity": identity.repeat(2) if self.mask_identity else None,
            "slot_identity": self.queue.identities,
            "mask_empty": self.mask_empty,
            "backend": self.backend,
        }
        if self.training:
            self.margin.follow(embedding, self.queue.features, target, **options)
        loss: Tensor
        loss, self.statistics = functional.margin_softmax(
            embedding, self.queue.features, target, margin=self.margin.current(), scale=self.scale,
            label_smoothing=self.label_smoothing, gradient=self.gradient, return_statistics=True, **options,
        )  # fmt: skip
        if self.training:
            self.queue.enqueue(self._kept(gallery_a.detach(), gallery_b.detach()), identity)
        return loss

    def _kept(self, gallery_a: Tensor, gallery_b: Tensor) -> Tensor:
        if self.keep == "coin":
            # Tossed on the device: the host neither waits nor decides.
            kept: Tensor = torch.where(torch.rand((), device=gallery_a.device) < 0.5, gallery_a, gallery_b)
            return kept
        one: Tensor = gallery_a if self.keep == "first" else gallery_b
        return one


class MarginSoftmaxHead(nn.Module):
    """Learned class weights under a margin: what ArcFace and CosFace heads do, by the same kernels and with no N x K tensor.

    Args:
        classes: number of classes K; dim: number of features D.
        margin: a margin of :mod:`sst_fast.margins`.
        scale: inverse temperature s > 0.
        options: more keyword arguments of :func:`sst_fast.functional.margin_softmax`.

    After each call ``statistics`` holds the :class:`sst_fast.functional.Statistics` of the batch.
    """

    statistics: functional.Statistics | None

    def __init__(
        self, classes: int, dim: int, margin: Margin = AMSoftmax(0.35), scale: Parameter = 64.0, **options: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(classes, dim), std=0.01))
        self.margin = RunningMargin(margin)
        self.scale = scale
        self.options = {"normalize_prototypes": True} | options
        self.statistics = None

    def forward(self, embedding: Tensor, target: Tensor) -> Tensor:
        """Loss of embeddings [N, D] with class numbers ``target``, int64 [N]."""
        if self.training and self.margin.margin.running:
            looks = {"normalize_prototypes": self.options["normalize_prototypes"]}
            valid = target != self.options.get("ignore_index", -100)
            self.margin.follow(embedding[valid], self.weight, target[valid], **looks)
        loss: Tensor
        loss, self.statistics = functional.margin_softmax(
            embedding, self.weight, target, margin=self.margin.current(), scale=self.scale, return_statistics=True,
            **self.options,
        )  # fmt: skip
        return loss
