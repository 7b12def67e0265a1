"""Losses of N pairs of image and text: CLIP's and SigLIP's, with no more than a block of the N x N logits in memory at once.

Rows of logits are made a block at a time by PyTorch's own products, so that the work on each logit stays in the cache. CLIP's loss
needs the sums of its rows and columns before any gradient. So it takes two passes over the cosines, for both directions together.
Between the passes the cosines are kept if they are few (:data:`KEPT`). Otherwise they are made again.

With several processes (W ranks of a process group) every image is compared with every rank's texts, and every text with every rank's
images, with exact gradients. Every rank must bring the same N. Each rank computes the rows of its own images, and its value is its
share: the mean of these shares over ranks is the loss of the whole batch. Features get the gradient of the sum of the shares, of
which DistributedDataParallel makes the mean. A scale or bias gets the gradient of the logits that its own rank computes. The mean of
these over ranks is the gradient of the whole loss.

Sizes: N pairs, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sst_fast import distributed
from sst_fast.arguments import check_embedding, check_scale, is_number, wide_dtype
from sst_fast.nn.blocks import SOFTPLUS_IS_LINEAR, refuse_second_derivative, slices, unit_rows
from sst_fast.nn.ranks import OverRanks

Gather = bool | Literal["ring"]

KEPT = 2**22  # so many cosines at most are kept for the gradient, 16 MiB; with more, they are computed again


class _Symmetric(OverRanks):
    """What both losses share: the logit scale, and what happens to features before their products."""

    def __init__(
        self, init_logit_scale: float | None, gather: Gather, group: distributed.Group, settings: dict[str, object]
    ) -> None:
        if not isinstance(gather, bool) and gather != "ring":
            raise ValueError(f"gather must be True, False or 'ring', got {gather!r}")
        super().__init__(bool(gather), group, settings | {"gather": gather})
        if init_logit_scale is not None and not is_number(init_logit_scale):
            raise TypeError(f"init_logit_scale must be a number or None, got {init_logit_scale!r}")
        self.ring = gather == "ring"
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

    def _meet(
        self, image_features: Tensor, text_features: Tensor, *numbers: Tensor | float
    ) -> tuple[Tensor, Tensor, list[Tensor], Exchange]:
        """Unit image features in the wide dtype, unit text features in that of the products, numbers as wide 0-d tensors, the exchange."""
        check_embedding("image_features", image_features)
        check_embedding("text_features", text_features)
        if image_features.shape != text_features.shape or image_features.dtype != text_features.dtype:
            raise ValueError(
                f"text_features must be {image_features.dtype} {list(image_features.shape)} like image_features, got "
                f"{text_features.dtype} {list(text_features.shape)}"
            )
        if len(image_features) == 0:
            raise ValueError("image_features must have at least one row, got [0, D]")
        exchange = Exchange(*self.meet(image_features), self.ring, self.group)
        kind, wide = image_features.device.type, wide_dtype(image_features)
        narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else image_features.dtype
        # Where products of bfloat16 can give their sums in float32.
        dtype = torch.bfloat16 if (narrow, wide, kind) == (torch.bfloat16, torch.float32, "cuda") else wide
        image, text = (unit_rows(features.to(wide)) for features in (image_features, text_features))
        wider = [torch.as_tensor(number, dtype=wide, device=image.device).reshape(()) for number in numbers]
        return image, text.to(dtype), wider, exchange


class CLIPLoss(_Symmetric):
    """CLIP's InfoNCE in both directions (Radford et al., ICML 2021, fig. 3), as open_clip's ClipLoss, whose arguments it takes.

        loss = 1/2 mean_i [ -log softmax_j(s c_ij)_i - log softmax_j(s c_ji)_i ],  c_ij the cosine of image i and text j

    Both directions have the same logits. So each logit is made once in forward, a block at a time, and once more in backward. Up to
    N = 2,048 they are kept for backward instead (16 MiB in float32). With several processes values and gradients are those of
    open_clip with ``local_loss`` and ``gather_with_grad``, for half the products.

    Args:
        init_logit_scale: None (default): ``logit_scale`` is given in each call, as to open_clip's. A number (log(1 / 0.07) in CLIP): the
            loss has a parameter ``logit_scale``, the logarithm of s, as open_clip's models have.
        gather: with several processes: True (default): compare with the texts of all ranks, which are gathered. 'ring': the same, but
            texts travel round the ring of ranks, so that each holds two ranks' at a time. False: compare with this rank's alone.
        group: the process group (default: all).

    Example:
        >>> criterion = sst_fast.nn.CLIPLoss()
        >>> loss = criterion(image_features, text_features, logit_scale.exp())
    """

    def __init__(
        self, init_logit_scale: float | None = None, *, gather: Gather = True, group: distributed.Group = None
    ) -> None:
        super().__init__(init_logit_scale, gather, group, {"init_logit_scale": init_logit_scale})

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float | None = None,
        logit_bias: Tensor | float | None = None, output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """Mean loss, with gradient for both features and the logit scale.

        Args:
            image_features, text_features: [N, D] of the same N pairs; normalised inside.
            logit_scale: s itself, not its logarithm, in (0, 1000]: a number or a tensor of one element.
            logit_bias: accepted for open_clip's calls. A softmax does not change with it; its gradient is 0.
            output_dict: return {"contrastive_loss": loss}, as open_clip's training loop asks.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype, device or value, or ranks that bring different settings or batch sizes
                (on every rank).
        """
        scale = self._scale(logit_scale)
        image, text, (s,), exchange = self._meet(image_features, text_features, scale)
        with torch.autocast(image.device.type, enabled=False):
            loss: Tensor = _SoftmaxPairs.apply(image, text, s, exchange)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.sum()  # a gradient of zero: DistributedDataParallel waits for one
        return {"contrastive_loss": loss} if output_dict else loss


class SigLIPLoss(_Symmetric):
    """SigLIP's pairwise sigmoid loss (Zhai et al., ICCV 2023, eq. 1), as open_clip's SigLipLoss, whose arguments it takes.

        loss = -1/N sum_ij log sigmoid(y_ij (s c_ij + b)),  y_ij = 1 for the pair i = j, -1 otherwise

    A pair's loss depends on its own logit alone. So logits and their gradients are made a block at a time, and logits are not kept.
    With several processes they are made once more in backward, for the gradient of other ranks' texts.

    Args:
        init_logit_scale, init_logit_bias: None (default): they are given in each call, as to open_clip's. Numbers (log(10) and -10 in the
            paper): the loss has parameters ``logit_scale``, the logarithm of s, and ``logit_bias``, as open_clip's models have.
        gather: as of :class:`CLIPLoss`; 'ring' (default) as in open_clip.
        group: the process group (default: all).

    Example:
        >>> criterion = sst_fast.nn.SigLIPLoss(init_logit_scale=math.log(10), init_logit_bias=-10.0)
        >>> loss = criterion(image_features, text_features)
    """

    def __init__(
        self, init_logit_scale: float | None = None, init_logit_bias: float | None = None, *, gather: Gather = "ring",
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
            logit_scale: s itself, not its logarithm, in (0, 1000]: a number or a tensor of one element.
            logit_bias: b, any number, or a tensor of one element.
            output_dict: return {"contrastive_loss": loss}, as open_clip's training loop asks.

        Raises:
            TypeError, ValueError: a wrong type, shape, dtype, device or value, or ranks that bring different settings or batch sizes
                (on every rank).
        """
        scale = self._scale(logit_scale)
        bias = self.logit_bias if logit_bias is None else logit_bias
        if bias is None:
            raise TypeError("logit_bias must be given unless init_logit_bias was, got None")
        if isinstance(bias, Tensor) and bias.numel() != 1:
            raise ValueError(f"logit_bias must be one number, got {list(bias.shape)}")
        image, text, (s, b), exchange = self._meet(image_features, text_features, scale, bias)
        with torch.autocast(image.device.type, enabled=False):
            total: Tensor = _SigmoidPairs.apply(image, text, s, b, exchange)
        loss = total / len(image)
        return {"contrastive_loss": loss} if output_dict else loss


class Exchange(NamedTuple):
    """How this rank's images are compared with all ranks' texts: all gathered at once, or one rank's at a time, sent round a ring."""

    rank: int
    world: int
    ring: bool
    group: distributed.Group

    def visit(
        self, texts: Sequence[Tensor], found: Tensor | None,
        work: Callable[[Sequence[Tensor], Tensor | None, int | None], None], together: Callable[[Tensor], Tensor],
    ) -> Tensor | None:  # fmt: skip
        """Calls ``work(texts, found, own)`` with the texts of all ranks.

        Args:
            texts: tensors [N, ...] of this rank's texts, which go to all ranks.
            found: [N, ...], results for this rank's texts, to which ``work`` adds on every rank; None: there are none.
            work: gets texts [T, ...], their results [T, ...], and ``own``: the row of the text that belongs to this rank's first
                image; None if it is not among them.
            together: combines the results [W N, ...] of all ranks into one.

        Returns:
            ``found`` after all ranks' work.
        """
        if self.ring:
            for step in range(self.world):
                last = step == self.world - 1
                arriving = [] if last else [distributed.begin_shift(text, self.group) for text in texts]
                work(texts, found, 0 if step == 0 else None)
                if found is not None and self.world > 1:
                    found = distributed.begin_shift(found, self.group)()
                texts = [end() for end in arriving]
            return found
        if self.world == 1:
            work(texts, found, 0)
            return found
        count = len(texts[0])
        if found is not None:
            found = found.repeat(self.world, *[1] * (found.dim() - 1))
        work([distributed.gather(text, self.group) for text in texts], found, self.rank * count)
        return None if found is None else together(found).chunk(self.world)[self.rank]

    def sum(self, found: Tensor) -> Tensor:
        """Sum of ``found`` over ranks."""
        return distributed.sum_of(found, self.group)

    def log_sum_exp(self, found: Tensor) -> Tensor:
        """log of the sum of exp(found) over ranks."""
        return distributed.gather(found[None], self.group).logsumexp(0)


class _SoftmaxPairs(torch.autograd.Function):
    """This rank's share of CLIP's loss of unit rows [N, D], 0-d, in the wide dtype."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, exchange: Exchange) -> Tensor:
        count, scaled = len(image), image * scale
        rows = scale.new_full((count,), -torch.inf)
        keep = any(ctx.needs_input_grad) and exchange.world * count**2 <= KEPT
        kept: list[Tensor] = []

        def sums(texts: Sequence[Tensor], columns: Tensor | None, own: int | None) -> None:
            assert columns is not None
            for part, z in _blocks(scaled, texts[0]):
                torch.logaddexp(rows[part], z.logsumexp(1), out=rows[part])
                torch.logaddexp(columns, z.logsumexp(0), out=columns)
                if keep:
                    kept.append(z)

        columns = exchange.visit([text], torch.full_like(rows, -torch.inf), sums, exchange.log_sum_exp)
        assert columns is not None
        ctx.save_for_backward(image, text, scale, rows, columns, *kept)
        ctx.exchange = exchange
        return ((rows + columns) / 2 - (scaled * text).sum(1)).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        image, text, scale, rows, columns, *kept = ctx.saved_tensors
        exchange, scaled, known = ctx.exchange, image * scale, iter(kept) if kept else None
        for_image, for_text = torch.zeros_like(image), torch.zeros_like(image)
        # The weight of half a row's softmax in this rank's share. Texts bring their own rank's weight: ranks may scale their losses.
        mine = grad / (2 * len(image))
        wants_image = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        wants_text = ctx.needs_input_grad[1] or exchange.world > 1

        def slopes(texts: Sequence[Tensor], for_text: Tensor | None, own: int | None) -> None:
            assert for_text is not None
            text, columns, theirs = texts
            for part, z in _blocks(scaled, text, known=known):
                slope = (z - rows[part, None]).exp_().mul_(mine)
                slope.addcmul_((z - columns).exp_(), theirs)
                if own is not None:
                    slope.diagonal(own + part.start).sub_(2 * mine)
                if wants_image:
                    _add_product(for_image[part], slope, text)
                if wants_text:
                    _add_product(for_text, slope.T, scaled[part].to(text.dtype))

        for_text = exchange.visit([text, columns, mine.expand(len(image))], for_text, slopes, exchange.sum)
        assert for_text is not None
        # Each cosine is a product with its image, so the scale's sum over pairs is one over images.
        return for_image * scale, for_text.to(text.dtype), (for_image * image).sum(), None


class _SigmoidPairs(torch.autograd.Function):
    """Sum over this rank's images and all ranks' texts of -log sigmoid(y (s c + b)) of unit rows [N, D], 0-d, in the wide dtype.

    The gradients of images, scale and bias are found in forward, and with one rank that of the texts too.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, exchange: Exchange
    ) -> Tensor:  # fmt: skip
        scaled = image * scale
        total, for_bias = (torch.zeros_like(scale, dtype=torch.float64) for _ in range(2))
        wanted = any(ctx.needs_input_grad)
        for_image, for_text = torch.zeros_like(image), torch.zeros_like(image) if exchange.world == 1 else None

        def losses(texts: Sequence[Tensor], for_text: Tensor | None, own: int | None) -> None:
            for part, z in _blocks(scaled, texts[0], bias, own):
                # softplus(z) and its derivative from one exponential.
                power = z.clamp_max(SOFTPLUS_IS_LINEAR).exp_()
                total.add_(power.log1p().sum() + z.sub_(SOFTPLUS_IS_LINEAR).clamp_min_(0).sum())
                if wanted:
                    slope = _signed(power.div_(power + 1), part, own)
                    for_bias.add_(slope.sum())
                    _add_product(for_image[part], slope, texts[0])
                    if for_text is not None:
                        _add_product(for_text, slope.T, scaled[part].to(texts[0].dtype))

        exchange.visit([text], for_text, losses, exchange.sum)
        if wanted:
            ctx.save_for_backward(image, text, scale, bias, for_image, for_text, for_bias.to(scale.dtype))
        ctx.exchange = exchange
        return total.to(scale.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        image, text, scale, bias, for_image, for_text, for_bias = ctx.saved_tensors
        if for_text is None:  # every rank's part of it is times that rank's incoming gradient
            scaled = image * scale

            def slopes(texts: Sequence[Tensor], found: Tensor | None, own: int | None) -> None:
                assert found is not None
                for part, z in _blocks(scaled, texts[0], bias, own):
                    _add_product(found, _signed(z.sigmoid_(), part, own).mul_(grad).T, scaled[part].to(texts[0].dtype))

            for_text = ctx.exchange.visit([text], torch.zeros_like(image), slopes, ctx.exchange.sum)
        else:
            for_text = for_text * grad
        for_scale = (for_image * image).sum()
        return for_image * (scale * grad), for_text.to(text.dtype), for_scale * grad, for_bias * grad, None


def _blocks(
    image: Tensor, text: Tensor, bias: Tensor | None = None, own: int | None = None, known: Iterator[Tensor] | None = None
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Slices of the scaled images, and their logits with all texts: computed, or taken from ``known``.

    With ``bias`` the logits of pairs are negated, so that SigLIP's loss is the softplus of all of them.
    """
    for part in slices(len(image), len(text), image.device):
        if known is not None:
            z = next(known)
        elif image.dtype == text.dtype:
            z = image[part] @ text.T
        else:
            z = torch.mm(image[part].to(text.dtype), text.T, out_dtype=image.dtype)
        if bias is not None:
            z.add_(bias)
            if own is not None:
                z.diagonal(own + part.start).neg_()
        yield part, z


def _signed(slope: Tensor, part: slice, own: int | None) -> Tensor:
    """The slope in z made that in s c + b, in place: pairs' logits have been negated."""
    if own is not None:
        slope.diagonal(own + part.start).neg_()
    return slope


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, with the dtype of ``b`` for the factors."""
    if a.dtype == b.dtype:
        total.addmm_(a, b)
    else:
        total += a.to(b.dtype) @ b
