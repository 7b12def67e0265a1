"""Losses of pairs of a batch in both directions, CLIP's and SigLIP's, without an N x N matrix of logits.

Several processes (W ranks with a process group): every image is compared with every rank's texts and the other way round, with
exact gradients; every rank must bring the same N. The value is the rank's own share such that the mean over ranks, which is what
DistributedDataParallel's gradients are of, is the loss of the whole batch.

Sizes: N pairs, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sst_fast import distributed
from sst_fast.arguments import check_embedding, check_scale, is_number, wide_dtype
from sst_fast.functional import margin_softmax
from sst_fast.margins import Softmax
from sst_fast.nn.ranks import OverRanks
from sst_fast.reference import normalize

LOGITS_AT_ONCE = 2**18  # so many of SigLIP's are in memory
SOFTPLUS_IS_LINEAR = 80.0  # beyond, to float64's last bit; PyTorch's own 20 is off by 2e-9


class _Symmetric(OverRanks):
    """The logit scale, and open_clip's way of calling a loss."""

    def __init__(
        self, init_logit_scale: float | None, gather: bool, group: distributed.Group, settings: dict[str, object]
    ) -> None:
        super().__init__(gather, group, settings)
        if init_logit_scale is not None and not is_number(init_logit_scale):
            raise TypeError(f"init_logit_scale must be a number or None, got {init_logit_scale!r}")
        self.logit_scale = None if init_logit_scale is None else nn.Parameter(torch.tensor(float(init_logit_scale)))

    def _scale(self, given: Tensor | float | None) -> Tensor | float:
        if given is None:
            if self.logit_scale is None:
                raise TypeError("logit_scale must be given unless init_logit_scale was, got None")
            given = self.logit_scale.exp()
        if isinstance(given, Tensor) and given.dim() > 0:  # DataParallel and some checkpoints make it [1]
            if given.numel() != 1:
                raise ValueError(f"logit_scale must be one number, got {list(given.shape)}")
            given = given.reshape(())
        check_scale(given)
        return given

    def _features(self, image_features: Tensor, text_features: Tensor) -> None:
        check_embedding("image_features", image_features)
        check_embedding("text_features", text_features)
        if image_features.shape != text_features.shape or image_features.dtype != text_features.dtype:
            raise ValueError(
                f"text_features must be {image_features.dtype} {list(image_features.shape)} like image_features, got "
                f"{text_features.dtype} {list(text_features.shape)}"
            )
        if len(image_features) == 0:
            raise ValueError("image_features must have at least one row, got [0, D]")


class CLIPLoss(_Symmetric):
    """CLIP's InfoNCE in both directions (Radford et al., ICML 2021, fig. 3), as open_clip's ClipLoss, whose arguments it takes.

        loss = 1/2 mean_i [ -log softmax_j(s c_ij)_i - log softmax_j(s c_ji)_i ],  c_ij the cosine of image i and text j

    Each direction is one sweep forward and one backward of :func:`sst_fast.functional.margin_softmax`; no N x N matrix is made.
    Several processes: as open_clip with ``local_loss`` and ``gather_with_grad``.

    Args:
        init_logit_scale: None (default): ``logit_scale`` is given in each call, as to open_clip's. A number, log(1 / 0.07) in CLIP: the
            loss has a parameter ``logit_scale``, the logarithm of s, as open_clip's models have.
        gather: with several processes, compare with all of them (default) or with this one alone.
        group, backend: the process group (default: all); an implementation to force, see :func:`sst_fast.backends`.

    Example:
        >>> criterion = sst_fast.nn.CLIPLoss()
        >>> loss = criterion(image_features, text_features, logit_scale.exp())
    """

    def __init__(
        self, init_logit_scale: float | None = None, *, gather: bool = True, group: distributed.Group = None,
        backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(init_logit_scale, gather, group, {"init_logit_scale": init_logit_scale})
        self.backend = backend

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float | None = None,
        logit_bias: Tensor | float | None = None, output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """Mean loss, with gradient for both features and the logit scale.

        Args:
            image_features, text_features: [N, D] of the same N pairs; normalised inside.
            logit_scale: s itself, not its logarithm, in (0, 1000]: a number or a tensor of one element.
            logit_bias: taken as by open_clip; a softmax does not change with it.
            output_dict: return {"contrastive_loss": loss}, as open_clip's training loop asks.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype, device or value, or ranks that bring different settings or batch sizes
                (on every rank).
        """
        self._features(image_features, text_features)
        scale = self._scale(logit_scale)
        rank, world = self.meet(image_features)
        count = len(image_features)
        target = torch.arange(rank * count, (rank + 1) * count, device=image_features.device)
        both = (image_features, text_features)
        directions = [self._direction(x, other, target, scale, world) for x, other in (both, both[::-1])]
        loss = (directions[0] + directions[1]) / 2
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.sum()  # a gradient of zero: DistributedDataParallel waits for one
        return {"contrastive_loss": loss} if output_dict else loss

    def _direction(self, x: Tensor, other: Tensor, target: Tensor, scale: Tensor | float, world: int) -> Tensor:
        rows = normalize(other.to(wide_dtype(other)))
        if world > 1:
            rows = distributed.gather_with_gradient(rows, self.group)
        if isinstance(scale, Tensor):
            # The scale's gradient: logits are s times products with the rows, so a factor of the rows is one of the scale.
            rows = rows * (scale / scale.detach()).to(rows.dtype)
            scale = scale.detach()
        return margin_softmax(x, rows.to(x.dtype), target, margin=Softmax(), scale=scale, backend=self.backend)


class SigLIPLoss(_Symmetric):
    """SigLIP's pairwise sigmoid loss (Zhai et al., ICCV 2023, eq. 1), as open_clip's SigLipLoss, whose arguments it takes.

        loss = -1/N sum_ij log sigmoid(y_ij (s c_ij + b)),  y_ij = 1 for the pair i = j, -1 otherwise

    A row of logits depends on no other, so they are made and forgotten a block at a time, and the gradients with them. Several
    processes: texts travel round the ring of ranks, each rank holding two ranks' texts at a time, and in backward once more, their
    gradient with them.

    Args:
        init_logit_scale, init_logit_bias: None (default): they are given in each call, as to open_clip's. Numbers, log(10) and -10 in the
            paper: the loss has parameters ``logit_scale``, the logarithm of s, and ``logit_bias``, as open_clip's models have.
        gather: with several processes, compare with all of them (default) or with this one alone.
        group: the process group (default: all).

    Example:
        >>> criterion = sst_fast.nn.SigLIPLoss(init_logit_scale=math.log(10), init_logit_bias=-10.0)
        >>> loss = criterion(image_features, text_features)
    """

    def __init__(
        self, init_logit_scale: float | None = None, init_logit_bias: float | None = None, *, gather: bool = True,
        group: distributed.Group = None,
    ) -> None:  # fmt: skip
        settings: dict[str, object] = {"init_logit_scale": init_logit_scale, "init_logit_bias": init_logit_bias}
        super().__init__(init_logit_scale, gather, group, settings)
        if init_logit_bias is not None and not is_number(init_logit_bias):
            raise TypeError(f"init_logit_bias must be a number or None, got {init_logit_bias!r}")
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(float(init_logit_bias)))

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float | None = None,
        logit_bias: Tensor | float | None = None, output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """Loss, with gradient for both features, the logit scale and the logit bias.

        Args:
            image_features, text_features: [N, D] of the same N pairs; normalised inside.
            logit_scale: s itself, not its logarithm: a number > 0 or a tensor of one element.
            logit_bias: b, likewise.
            output_dict: return {"contrastive_loss": loss}, as open_clip's training loop asks.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype, device or value, or ranks that bring different settings or batch sizes
                (on every rank).
        """
        self._features(image_features, text_features)
        scale = self._scale(logit_scale)
        bias = self.logit_bias if logit_bias is None else logit_bias
        if bias is None:
            raise TypeError("logit_bias must be given unless init_logit_bias was, got None")
        if isinstance(bias, Tensor) and bias.numel() != 1:
            raise ValueError(f"logit_bias must be one number, got {list(bias.shape)}")
        _, world = self.meet(image_features)
        kind, wide = image_features.device.type, wide_dtype(image_features)
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else image_features.dtype
        dtype = torch.bfloat16 if narrow == torch.bfloat16 and wide == torch.float32 else wide
        image, text = (normalize(features.to(wide)).to(dtype) for features in (image_features, text_features))
        s, b = (
            value.to(wide).reshape(()) if isinstance(value, Tensor) else image.new_tensor(value, dtype=wide)
            for value in (scale, bias)
        )
        with torch.autocast(kind, enabled=False):
            total: Tensor = _SigmoidPairs.apply(image, text, s, b, world, self.group)
        loss = total / len(image)
        return {"contrastive_loss": loss} if output_dict else loss


class _SigmoidPairs(torch.autograd.Function):
    """Sum over this rank's images and all ranks' texts of -log sigmoid(y (s c + b)), wide; unit rows [N, D].

    The gradients of images, scale and bias are found in forward, that of the texts too where no other rank has any.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, world: int, group: distributed.Group
    ) -> Tensor:
        total, for_bias = (torch.zeros_like(scale, dtype=torch.float64) for _ in range(2))
        wanted = any(ctx.needs_input_grad)
        for_image, for_text = (torch.zeros_like(t, dtype=scale.dtype) if wanted else None for t in (image, text))
        for step, texts in enumerate(_round(text, world, group)):
            for part, z in _blocks(image, texts, scale, bias, own=step == 0):
                total += F.softplus(z, threshold=SOFTPLUS_IS_LINEAR).sum()
                if for_image is None or for_text is None:
                    continue
                slope = _slope(z, part, own=step == 0)
                for_bias += slope.sum()
                slope = slope.to(image.dtype)
                for_image[part] += slope @ texts
                if world == 1:
                    for_text += slope.T @ image[part]
        if for_image is not None and for_text is not None:
            # Each cosine is a product with its image, so the scale's sum over pairs is one over images.
            for_scale = (for_image * image).sum()
            ctx.save_for_backward(
                image, text, scale, bias, for_image * scale, for_text * scale, for_scale, for_bias.to(scale.dtype)
            )
        ctx.world, ctx.group = world, group
        return total.to(scale.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: without this the second derivative would lack this function's part
            raise NotImplementedError("SigLIPLoss has no second derivative: its gradient is found in forward")
        image, text, scale, bias, for_image, for_text, for_scale, for_bias = ctx.saved_tensors
        if ctx.world > 1:  # every rank's part of it, times that rank's incoming gradient, meets the text on its way
            for_text = torch.zeros_like(for_text)
            for step, texts in enumerate(_round(text, ctx.world, ctx.group)):
                for part, z in _blocks(image, texts, scale, bias, own=step == 0):
                    for_text += (grad * scale * _slope(z, part, own=step == 0)).to(image.dtype).T @ image[part]
                for_text = distributed.begin_shift(for_text, ctx.group)()
        else:
            for_text = grad * for_text
        return (
            (grad * for_image).to(image.dtype),
            for_text.to(text.dtype),
            grad * for_scale,
            grad * for_bias,
            None,
            None,
        )


def _round(text: Tensor, world: int, group: distributed.Group) -> Iterator[Tensor]:
    """The texts of all ranks, this rank's first, each sent on while it is used."""
    for left in range(world - 1, -1, -1):
        arriving = distributed.begin_shift(text, group) if left else None
        yield text
        if arriving is not None:
            text = arriving()


def _blocks(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, own: bool) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of images with their logits z against all the texts, whose softplus is the loss: s c + b, less it for pairs."""
    step = max(1, LOGITS_AT_ONCE // len(text))
    for begin in range(0, len(image), step):
        part = slice(begin, begin + step)
        z = (image[part] @ text.T).to(scale.dtype).mul_(scale).add_(bias)
        if own:
            z.diagonal(begin).neg_()
        yield part, z


def _slope(z: Tensor, part: slice, own: bool) -> Tensor:
    """Derivative of softplus(z) in s c + b; takes the place of z."""
    slope = z.sigmoid_()
    if own:
        slope.diagonal(part.start).neg_()
    return slope
