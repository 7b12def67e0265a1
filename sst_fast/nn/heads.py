"""Heads: learned class weights with one margin each, ``loss = head(embedding, label)``.

Each is a :class:`sst_fast.MarginSoftmaxHead` whose margin is given by numbers. This holds for all of them:

- ``classes`` K >= 2 and ``dim`` D are the sizes of ``weight`` [K, D], which starts as ``init`` makes it.
- The docstring of each head names a margin of :mod:`sst_fast.margins`. There stand the formula, the paper, and the unit and range of
  each number.
- ``scale`` is s in (0, 1000], the inverse temperature.
- ``options`` go on to :class:`sst_fast.MarginSoftmaxHead`: ``init``, ``reduction``, ``label_smoothing``, ``ignore_index``,
  ``gradient='straight_through'`` (as in heads that apply the margin under ``no_grad``), ``backend``, ...
- ``head(embedding, label)`` gives the mean loss, 0-d. It takes class numbers int64 [N], and embeddings [N, D] as the network gives
  them: they are normalised inside, and some margins look at their norms.
- ``head.logits(embedding)`` and ``head.topk(embedding, k)`` are for accuracy, ``head.statistics`` for progress.
- Numbers that follow the training (CurricularFace's t, AdaFace's statistics, AdaCos' scale) are buffers ``margin.*``.

Errors: TypeError or ValueError names the argument. A label outside [0, K) that is not ``ignore_index`` raises IndexError; Triton
kernels make the loss NaN instead.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from sst_fast import functional, margins
from sst_fast.arguments import check_embedding, check_tensor, is_number, wide_dtype
from sst_fast.loss import MarginSoftmaxHead
from sst_fast.margins import ArcBeyond, CombinedBeyond, Parameter
from sst_fast.nn import blocks
from sst_fast.nn.blocks import unit_rows


class ArcFace(MarginSoftmaxHead):
    """Additive angular margin (Deng et al., CVPR 2019): the margin :class:`sst_fast.ArcSoftmax`. ``margin`` in radians."""

    def __init__(
        self, classes: int, dim: int, margin: Parameter = 0.5, scale: Parameter = 64.0, *, easy: bool = False,
        beyond: ArcBeyond = "linear", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(classes, dim, margins.ArcSoftmax(margin, easy, beyond), scale, **options)


class SubCenterArcFace(ArcFace):
    """ArcFace with several weight vectors for each class (Deng et al., Sub-center ArcFace, ECCV 2020).

    A probe's cosine with a class is that with the nearest of its vectors. ``sub_centers`` is their number S, 1 to 16. ``weight`` is
    [classes S, dim]. Class c has the rows c S to c S + S - 1.
    """

    def __init__(
        self, classes: int, dim: int, margin: Parameter = 0.5, scale: Parameter = 64.0, *, sub_centers: int = 3,
        easy: bool = False, beyond: ArcBeyond = "linear", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            classes, dim, margin, scale, easy=easy, beyond=beyond, sub_centers=sub_centers, **options
        )  # fmt: skip


class CosFace(MarginSoftmaxHead):
    """Additive cosine margin (Wang et al., CosFace, CVPR 2018), also known as AM-softmax: the margin :class:`sst_fast.AMSoftmax`."""

    def __init__(
        self, classes: int, dim: int, margin: Parameter = 0.35, scale: Parameter = 64.0, **options: Any
    ) -> None:
        super().__init__(classes, dim, margins.AMSoftmax(margin), scale, **options)


class NormalizedSoftmax(MarginSoftmaxHead):
    """Softmax of cosines without a margin (Wang et al., NormFace, ACM MM 2017): :class:`sst_fast.Softmax`.

    ``temperature`` is 1 / scale, at least 0.001.
    """

    def __init__(self, classes: int, dim: int, temperature: float = 0.05, **options: Any) -> None:
        if not is_number(temperature) or not temperature >= 1 / margins.MAX_SCALE:
            raise ValueError(f"temperature must be a number of at least {1 / margins.MAX_SCALE:g}, got {temperature!r}")
        super().__init__(classes, dim, margins.Softmax(), 1 / temperature, **options)


class SphereFace(MarginSoftmaxHead):
    """Multiplicative angular margin, A-softmax (Liu et al., CVPR 2017): the margin :class:`sst_fast.SphereFace`.

    ``margin`` is its m1, a factor of the angle. With ``norm_scale`` the embedding's norm takes the place of ``scale``.
    """

    def __init__(
        self, classes: int, dim: int, margin: Parameter = 4.0, scale: Parameter = 64.0, *, annealing: Parameter = 5.0,
        norm_scale: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        formula = margins.SphereFace(margin, annealing=annealing, norm_scale=norm_scale)
        super().__init__(classes, dim, formula, scale, **options)


class CombinedMargin(MarginSoftmaxHead):
    """cos(m1 theta + m2) - m3 (Deng et al., ArcFace, CVPR 2019, eq. 4): the margin :class:`sst_fast.CombinedMargin`.

    ``threshold`` is a cosine. Other classes above it are taken for wrong labels: their logit becomes 0, without a gradient. This is
    insightface's inter-class filtering, :class:`sst_fast.FilteredMargin`. It has no ``annealing``.
    """

    def __init__(
        self, classes: int, dim: int, m1: Parameter = 1.0, m2: Parameter = 0.3, m3: Parameter = 0.2,
        scale: Parameter = 64.0, *, annealing: Parameter = 0.0, beyond: CombinedBeyond = "fall",
        threshold: Parameter | None = None, **options: Any,
    ) -> None:  # fmt: skip
        formula: margins.Margin
        if threshold is None:
            formula = margins.CombinedMargin(m1, m2, m3, annealing, beyond)
        elif is_number(annealing) and annealing == 0:
            formula = margins.FilteredMargin(m1, m2, m3, beyond, threshold)
        else:
            raise ValueError(f"annealing must be 0 with threshold, got {annealing!r}")
        super().__init__(classes, dim, formula, scale, **options)


class CurricularFace(MarginSoftmaxHead):
    """Adaptive curriculum of hard negatives (Huang et al., CVPR 2020): the margin :class:`sst_fast.CurricularFace`.

    Its t follows the training, in the buffer ``margin.t``.
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        margin: Parameter = 0.5,
        scale: Parameter = 64.0,
        *,
        t: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(classes, dim, margins.CurricularFace(margin, t), scale, **options)


class MVSoftmax(MarginSoftmaxHead):
    """More weight for mis-classified vectors (Wang et al., MV-softmax, AAAI 2020): the margin :class:`sst_fast.MVSoftmax`.

    ``margin`` is a cosine, or radians with ``arc``.
    """

    def __init__(
        self, classes: int, dim: int, margin: Parameter = 0.35, t: Parameter = 1.12, scale: Parameter = 32.0, *,
        arc: bool = False, positive_only: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(classes, dim, margins.MVSoftmax(margin, t, arc, positive_only), scale, **options)


class NPCFace(MarginSoftmaxHead):
    """Negative-positive cooperation (Zeng et al., ACCV 2020): the margin :class:`sst_fast.NPCFace`."""

    def __init__(
        self, classes: int, dim: int, m0: Parameter = 0.4, m1: Parameter = 0.2, t: Parameter = 1.1, alpha: Parameter = 0.2,
        scale: Parameter = 64.0, *, hard_margin: Parameter = 0.5, positive_only: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        formula = margins.NPCFace(m0, m1, t, alpha, hard_margin, positive_only)
        super().__init__(classes, dim, formula, scale, **options)


class AdaMSoftmax(MarginSoftmaxHead):
    """CosFace with a trained margin for each class: AdaM-softmax (Liu et al., AdaptiveFace, CVPR 2019, eqs. 5 to 7).

        loss = L(m) + penalty_weight (1 - mean of m),  L the loss of CosFace with margin m_y for class y

    The second term makes margins grow as far as the first one allows. The paper has -mean of m. The 1, as in FaceX-Zoo, keeps the loss
    positive. The parameter ``margins`` holds cosines. In training each call brings them back into [0, 1]. They should have no weight
    decay. ``reduction`` must be 'mean'.

    Args:
        penalty_weight: the paper's lambda, >= 0; 70 as in FaceX-Zoo.
        per_class: True: ``margins`` is [classes]. False: it is [1], one for all classes.
        low: the least margin at the start; 0.3 as in FaceX-Zoo.
        high: the largest margin at the start; 0.4 as in FaceX-Zoo. Margins are drawn evenly in between.
    """

    def __init__(
        self, classes: int, dim: int, scale: Parameter = 30.0, *, penalty_weight: float = 70.0, per_class: bool = True,
        low: float = 0.3, high: float = 0.4, **options: Any,
    ) -> None:  # fmt: skip
        if not is_number(penalty_weight) or not penalty_weight >= 0:
            raise ValueError(f"penalty_weight must be a number >= 0, got {penalty_weight!r}")
        if not (is_number(low) and is_number(high) and 0 <= low <= high <= 1):
            raise ValueError(f"low and high must be cosines with 0 <= low <= high <= 1, got {low!r} and {high!r}")
        if options.get("reduction", "mean") != "mean":
            raise ValueError(f"reduction must be 'mean', got {options['reduction']!r}")
        super().__init__(classes, dim, margins.AMSoftmax(0.0), scale, **options)
        self.margins = nn.Parameter(torch.empty(classes if per_class else 1).uniform_(low, high))
        self.penalty_weight = float(penalty_weight)

    def forward(self, embedding: Tensor, target: Tensor) -> Tensor:
        """Loss of embeddings [N, D] with class numbers ``target``, int64 [N]."""
        check_embedding("embedding", embedding)
        check_tensor("target", target, (len(embedding),), (torch.int64,), self.weight.device)
        if self.training:
            with torch.no_grad():
                self.margins.clamp_(0, 1)
        # The operator raises the error for a target out of range.
        own = self.margins[target.clamp(0, len(self.margins) - 1)]
        loss: Tensor
        loss, self.statistics = functional.margin_softmax(
            embedding, self.weight, target, margin=margins.AMSoftmax(own), scale=self.scale, return_statistics=True,
            **self.options,
        )  # fmt: skip
        return loss + self.penalty_weight * (1 - self.margins.mean()).to(loss.dtype)


class UniFace(MarginSoftmaxHead):
    """One threshold for all pairs of an embedding and a class: the unified cross-entropy (Zhou et al., UniFace, ICCV 2023, eqs. 11 and 12).

        loss_i = log(1 + exp(b - s (c_iy - m))) + negative_weight * sum over other classes j of log(1 + exp(s c_ij - b))

    A sigmoid for each pair takes the place of the softmax. Logits are made for one block of classes at a time, with their gradients,
    and are not kept. The loss is the mean of the loss_i. The authors' code clamps logits to [-s, s]. A target that lies beyond then has
    no gradient. Here nothing is clamped.

    Args:
        margin: m, a cosine in [0, 2].
        scale: s in (0, 1000].
        negative_weight: the paper's lambda, >= 0.
        bias: start value of the trained ``bias`` [1], the b above. None: log(10 classes), as in their code.
        init: as of :class:`sst_fast.MarginSoftmaxHead`. No other of its options is taken.
    """

    def __init__(
        self, classes: int, dim: int, margin: float = 0.4, scale: float = 64.0, *, negative_weight: float = 1.0,
        bias: float | None = None, **options: Any,
    ) -> None:  # fmt: skip
        for name, value in (("margin", margin), ("scale", scale), ("negative_weight", negative_weight)):
            if not is_number(value) or not value >= 0:
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        unknown = sorted(set(options) - {"init"})
        if unknown:
            raise TypeError(f"{unknown[0]} is no option of UniFace, expected init")
        super().__init__(classes, dim, margins.AMSoftmax(margin), scale, **options)
        self.bias = nn.Parameter(torch.tensor([math.log(10 * classes) if bias is None else float(bias)]))
        self.m, self.negative_weight = float(margin), float(negative_weight)

    def forward(self, embedding: Tensor, target: Tensor) -> Tensor:
        """Mean loss of embeddings [N, D] with class numbers ``target``, int64 [N].

        A class number outside [0, K) raises IndexError on the CPU. On other devices the loss is then NaN.
        """
        check_embedding("embedding", embedding)
        check_tensor("embedding", embedding, (None, self.weight.shape[1]), (embedding.dtype,), self.weight.device)
        check_tensor("target", target, (len(embedding),), (torch.int64,), self.weight.device)
        wrong = (target < 0) | (target >= len(self.weight))
        if target.device.type == "cpu" and bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise IndexError(f"target[{at}] is {int(target[at])}, expected a class number in [0, {len(self.weight)})")
        wide = wide_dtype(embedding, self.weight)
        with torch.autocast(embedding.device.type, enabled=False):
            x, w = unit_rows(embedding.to(wide)), unit_rows(self.weight.to(wide))
            share = partial(self._share, target)
            total = blocks.sum_over_blocks(x, w, share, blocks.COLUMNS, self.bias.to(wide))
        # To raise an error here, the host would have to wait for the device.
        return total.masked_fill(wrong.any(), torch.nan) / max(1, len(embedding))

    def _share(self, target: Tensor, c: Tensor, i: slice, j: slice, bias: Tensor) -> Tensor:
        own = target[i]
        row = ((own >= j.start) & (own < j.stop)).nonzero().flatten()
        place = row, own[row] - j.start
        z = self.scale * c - bias
        near = softplus(self.scale * self.m - z[place], threshold=blocks.SOFTPLUS_IS_LINEAR)
        far = softplus(z.index_put(place, z.new_tensor(-torch.inf)), threshold=blocks.SOFTPLUS_IS_LINEAR)
        return near.sum() + self.negative_weight * far.sum()


class ArcNegFace(MarginSoftmaxHead):
    """Noise-tolerant negatives (Liu et al., ICCV workshops 2019): the margin :class:`sst_fast.ArcNegFace`."""

    def __init__(
        self, classes: int, dim: int, margin: Parameter = 0.5, scale: Parameter = 64.0, *, alpha: Parameter = 1.2,
        sigma: Parameter = 2.0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(classes, dim, margins.ArcNegFace(margin, alpha, sigma), scale, **options)


class CircleLoss(MarginSoftmaxHead):
    """Circle loss with class-level labels (Sun et al., CVPR 2020): the margin :class:`sst_fast.CircleLoss`.

    ``scale`` is the paper's gamma. For pairs of embeddings see :class:`sst_fast.nn.PairCircle`.
    """

    def __init__(self, classes: int, dim: int, m: Parameter = 0.25, scale: Parameter = 256.0, **options: Any) -> None:
        super().__init__(classes, dim, margins.CircleLoss(m), scale, **options)


class AdaCos(MarginSoftmaxHead):
    """No margin, but a scale that adapts (Zhang et al., CVPR 2019): :class:`sst_fast.AdaCos`.

    The scale is the buffer ``margin.scale``, 0 before the first batch in training mode.
    """

    def __init__(self, classes: int, dim: int, **options: Any) -> None:
        super().__init__(classes, dim, margins.AdaCos(), **options)


class MagFace(MarginSoftmaxHead):
    """A margin that grows with the embedding's norm (Meng et al., CVPR 2021): the margin :class:`sst_fast.MagFace`.

    ``penalty_weight`` is the margin's ``weight``, that of the penalty on norms.
    """

    def __init__(
        self, classes: int, dim: int, scale: Parameter = 64.0, *, lower_norm: float = 10.0, upper_norm: float = 110.0,
        lower_margin: float = 0.45, upper_margin: float = 0.8, penalty_weight: float = 20.0, easy: bool = True,
        beyond: ArcBeyond = "linear", **options: Any,
    ) -> None:  # fmt: skip
        formula = margins.MagFace(lower_norm, upper_norm, lower_margin, upper_margin, penalty_weight, easy, beyond)
        super().__init__(classes, dim, formula, scale, **options)


class AdaFace(MarginSoftmaxHead):
    """A margin that adapts to image quality (Kim et al., CVPR 2022): the margin :class:`sst_fast.AdaFace`.

    ``mean`` and ``std`` are the start values of the buffers ``margin.mean`` and ``margin.std``, the running statistics of the norms.
    """

    def __init__(
        self, classes: int, dim: int, m: float = 0.4, h: float = 0.333, scale: Parameter = 64.0, *, t_alpha: float = 0.01,
        mean: float = 20.0, std: float = 100.0, clamps: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(classes, dim, margins.AdaFace(m, h, mean, std, t_alpha, clamps), scale, **options)
