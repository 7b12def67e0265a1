"""Margins of the softmax family. The one place in Python that knows a margin's formula.

``a`` is the cosine of a probe with its target prototype, ``c`` the cosine with any other one, theta = acos a. A margin
changes the target's cosine, ``psi(a)``, and may change the others', ``phi(c, a)``; logits are ``scale`` times these.
``csrc/margin.h`` is the counterpart for the compiled kernels; ``tests/test_margins.py`` holds the two together.

A parameter may be a number, a 0-d tensor or a tensor [N], one value per probe. Adaptive quantities (thresholds, which
slots are 'hard', weights that depend on cosines or norms) are constants to the gradient, as in the authors' codes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

# The slope of a margin on the angle is unbounded as the angle nears 0 or pi; closer than this sin(theta) is held constant.
MIN_SINE = 1e-3

# The margins that kernels know, by number: csrc/margin.h lists the same names, and a test compares the two.
KINDS = ("softmax", "am", "arc", "combined", "mv", "curricular", "npc", "circle", "arc_neg")

Parameter = float | Tensor


@dataclass(frozen=True)
class Seen:
    """What a margin that follows the training may look at: the batch, before the loss.

    ``norm`` [N] of the embeddings, ``target_cosine`` [N], ``slots`` K, and ``log_negatives(scale)``: log of the sum of
    exp(scale c) over each probe's unmasked slots [N], which costs a sweep over the queue.
    """

    norm: Tensor
    target_cosine: Tensor
    slots: int
    log_negatives: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Margin:
    """Base of all margins: a frozen set of parameters with the formulas ``psi`` and ``phi``.

    ``kind`` is the number by which kernels know the margin, its place in :data:`KINDS`.
    ``running`` names the parameters that follow the training; :class:`sst_fast.SemiSiameseLoss` keeps them as buffers.
    """

    kind: ClassVar[int]
    running: ClassVar[tuple[str, ...]] = ()
    uses_norm: ClassVar[bool] = False  # for_batch and penalty have something to say
    uses_hard_mean: ClassVar[bool] = False  # psi needs the mean cosine of the probe's hard slots

    def psi(self, a: Tensor, hard_mean: Tensor | None = None) -> Tensor:
        """Target cosine with the margin applied; ``a`` and the result are [N]."""
        raise NotImplementedError

    def phi(self, c: Tensor, a: Tensor) -> Tensor:
        """Cosines ``c`` [N, K] of the other slots after the margin; ``a`` [N, 1] are the target cosines, detached."""
        return c

    def is_hard(self, c: Tensor, a: Tensor) -> Tensor:
        """bool [N, K]: the slots that a mining margin calls hard (where ``uses_hard_mean``)."""
        raise NotImplementedError

    def for_batch(self, norm: Tensor) -> Margin:
        """The margin for these embedding norms [N]: itself, unless it depends on them."""
        return self

    def penalty(self, norm: Tensor) -> Tensor | None:
        """A term [N] added to the loss of each probe, differentiable in the embedding's norm [N]."""
        return None

    def scale_for(self, scale: Parameter, slots: int) -> Parameter:
        """The scale to use: the one asked for, unless the margin sets its own."""
        return scale

    def follow(self, seen: Seen) -> dict[str, Tensor]:
        """New values of the ``running`` parameters, given the current ones and a batch."""
        return {}

    def parameters(self) -> list[Parameter]:
        """What compiled kernels need, in the order of the fields."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    @property
    def varies(self) -> bool:
        """Whether a parameter is a tensor."""
        return any(isinstance(value, Tensor) for value in vars(self).values())

    def per_row(self, n: int) -> tuple[list[float], Tensor | None]:
        """The parameters as numbers and, where one of them is a tensor, all of them as float64 [P, n]."""
        found: tuple[list[float], Tensor | None] | None = self.__dict__.get("_per_row")
        if found is not None:
            return found
        parameters = self.parameters()
        tensors = [p for p in parameters if isinstance(p, Tensor)]
        if not tensors:
            found = [float(p) for p in parameters], None
            if not torch.compiler.is_compiling():
                self.__dict__["_per_row"] = found  # the margin is frozen: found once, kept
            return found
        blank = torch.zeros(n, dtype=torch.float64, device=tensors[0].device)
        rows = torch.stack(
            [(p.detach().double().expand(n) if isinstance(p, Tensor) else blank + float(p)) for p in parameters]
        )
        return [0.0 if isinstance(p, Tensor) else float(p) for p in parameters], rows

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same margin with ``function`` applied to those parameters that are tensors."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: function(v) for name, v in found.items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **changed) if changed else self


@dataclass(frozen=True)
class Softmax(Margin):
    """No margin: NormFace (Wang et al., ACM MM 2017). psi(a) = a."""

    kind: ClassVar[int] = KINDS.index("softmax")

    def psi(self, a: Tensor, hard_mean: Tensor | None = None) -> Tensor:
        """psi(a) = a."""
        return a


@dataclass(frozen=True)
class AMSoftmax(Margin):
    """Additive cosine margin: AM-softmax (Wang et al., SPL 2018, eq. 6), CosFace (Wang et al., CVPR 2018, eq. 4).

    psi(a) = a - margin.

    Args:
        margin: a cosine in [0, 2]; 0.35 is what the authors of Semi-Siamese Training use.
    """

    kind: ClassVar[int] = KINDS.index("am")
    margin: Parameter = 0.35

    def __post_init__(self) -> None:
        _check_range(self, "margin", 0.0, 2.0, "a cosine")

    def psi(self, a: Tensor, hard_mean: Tensor | None = None) -> Tensor:
        """psi(a) = a - margin."""
        return a - self.margin


@dataclass(frozen=True)
class ArcSoftmax(Margin):
    """Additive angular margin: ArcFace (Deng et al., CVPR 2019, eq. 3).

    psi(a) = cos(theta + margin) as long as theta + margin <= pi. Beyond that either the linear continuation
    a - margin * sin(margin) (default) or, ``easy``, no margin for every target beyond 90 degrees.

    The slope sin(theta + margin) / sin(theta) has no bound as theta nears 0 or pi; where sin(theta) < 1e-3 it is
    replaced by cos(margin), so gradients stay finite (the loss itself changes by less than 1e-3 * scale there).

    Args:
        margin: radians in [0, pi].
        easy: the 'easy margin' rule.
    """

    kind: ClassVar[int] = KINDS.index("arc")
    margin: Parameter = 0.5
    easy: bool = False

    def __post_init__(self) -> None:
        _check_range(self, "margin", 0.0, math.pi, "radians")

    def psi(self, a: Tensor, hard_mean: Tensor | None = None) -> Tensor:
        """cos(theta + margin) or its continuation."""
        return _arc(a, self.margin, self.easy)


@dataclass(frozen=True)
class CombinedMargin(Margin):
    """Combined margin (Deng et al., CVPR 2019, eq. 4): psi(a) = cos(m1 theta + m2) - m3.

    Beyond an angle of pi the cosine goes on as in SphereFace, (-1)^k cos - 2k with k = floor(angle / pi), so psi falls all
    the way; or, ``hold``, the angle is held in [0, pi]. Below 0 it is held at 0. Slopes have sin(theta) >= 1e-3.

    Args:
        m1: factor of the angle, in [0.5, 16].
        m2: radians in [-pi, pi].
        m3: a cosine in [-2, 2].
        annealing: psi becomes (annealing * a + psi) / (annealing + 1); >= 0.
        hold: see above.
    """

    kind: ClassVar[int] = KINDS.index("combined")
    m1: Parameter = 1.0
    m2: Parameter = 0.3
    m3: Parameter = 0.2
    annealing: Parameter = 0.0
    hold: bool = False

    def __post_init__(self) -> None:
        _check_range(self, "m1", 0.5, 16.0, "a factor")
        _check_range(self, "m2", -math.pi, math.pi, "radians")
        _check_range(self, "m3", -2.0, 2.0, "a cosine")
        _check_range(self, "annealing", 0.0, math.inf, "a number")

    def psi(self, a: Tensor, hard_mean: Tensor | None = None) -> Tensor:
        """cos(m1 theta + m2) - m3, monotonic."""
        sine = _sine(a).detach()
        theta = a.detach().clamp(-1, 1).acos() - (a - a.detach()) / sine
        angle = (theta * self.m1 + self.m2).clamp(0, math.pi if self.hold else math.inf)
        k = 0 if self.hold else (angle.detach() / math.pi).floor()
        sign = 1 if self.hold else 1 - 2 * (k % 2)
        return (self.annealing * a + sign * angle.cos() - 2 * k - self.m3) / (self.annealing + 1)


@dataclass(frozen=True)
class SphereFace(CombinedMargin):
    """Multiplicative angular margin: A-softmax (Liu et al., CVPR 2017, eq. 7), psi(a) = (-1)^k cos(m theta) - 2k, k = floor(m theta / pi).

    Args:
        m1: the m above; 4 in the paper, 1.35 to 1.7 in later work.
        annealing: the paper's lambda, mixes in the plain cosine; 5 at the end of its training.
    """

    m1: Parameter = 4.0
    m2: Parameter = 0.0
    m3: Parameter = 0.0
    annealing: Parameter = 5.0


@dataclass(frozen=True)
class MVSoftmax(Margin):
    """Mis-classified vectors: MV-softmax (Wang et al., AAAI 2020, eqs. 5 to 8).

    psi as AM-softmax or, ``arc``, as ArcFace. A slot with c > psi(a) is hard: phi(c) = t c + t - 1.

    Args:
        margin: a cosine, or radians with ``arc``.
        t: weight of hard slots, in [1, 4].
        arc: margin on the angle.
        positive_only: margin only where a > margin (or a > 0 with ``arc``), as FaceX-Zoo's heads do.
    """

    kind: ClassVar[int] = KINDS.index("mv")
    margin: Parameter = 0.35
    t: Parameter = 1.12
    arc: bool = False
    positive_only: bool = False

    def __post_init__(self) -> None:
        _check_range(self, "margin", 0.0, 2.0, "a cosine or radians")
        _check_range(self, "t", 1.0, 4.0, "a factor")

    def psi(self, a: Tensor, hard_mean: Tensor | None = None) -> Tensor:
        """a - margin, or cos(theta + margin)."""
        if self.arc:
            return _arc(a, self.margin, self.positive_only)
        return torch.where(a > self.margin, a - self.margin, a) if self.positive_only else a - self.margin

    def phi(self, c: Tensor, a: Tensor) -> Tensor:
        """phi(c) = t c + t - 1 where c exceeds the margined target (the full margin, whatever ``positive_only``)."""
        m, t = _column(self.margin), _column(self.t)
        limit = _cos_of_sum(a, m) if self.arc else a - m
        return torch.where(c > limit, t * c + t - 1, c)


@dataclass(frozen=True)
class CurricularFace(Margin):
    """Adaptive curriculum: CurricularFace (Huang et al., CVPR 2020, eqs. 6 to 10).

    psi as ArcFace. A slot with c > cos(theta + margin) is hard: phi(c) = c (t + c); t <- 0.99 t + 0.01 mean(a) follows the
    training (before the batch's own loss, as in the authors' code).

    Args:
        margin: radians in [0, pi].
        t: the running curriculum, starts at 0.
    """

    kind: ClassVar[int] = KINDS.index("curricular")
    running: ClassVar[tuple[str, ...]] = ("t",)
    margin: Parameter = 0.5
    t: Parameter = 0.0

    def __post_init__(self) -> None:
        _check_range(self, "margin", 0.0, math.pi, "radians")
        _check_range(self, "t", -1.0, 1.0, "a cosine")

    def psi(self, a: Tensor, hard_mean: Tensor | None = None) -> Tensor:
        """cos(theta + margin) or its continuation."""
        return _arc(a, self.margin, False)

    def phi(self, c: Tensor, a: Tensor) -> Tensor:
        """phi(c) = c (t + c) where c exceeds cos(theta + margin)."""
        return torch.where(c > _cos_of_sum(a, _column(self.margin)), c * (_column(self.t) + c), c)

    def follow(self, seen: Seen) -> dict[str, Tensor]:
        """New t = 0.99 t + 0.01 mean(a)."""
        return {"t": 0.99 * self.t + 0.01 * seen.target_cosine.mean()}


@dataclass(frozen=True)
class NPCFace(Margin):
    """Negative-positive cooperation: NPCFace (Zeng et al., ACCV 2020, eqs. 6 to 9).

    A slot with c > cos(theta + hard_margin) is hard: phi(c) = t c + alpha. psi(a) = cos(theta + m) with
    m = m0 + m1 * (mean cosine of the probe's hard slots), or m0 if it has none. The mean comes from the same sweep: no
    backend needs a second one.

    Args:
        m0, m1: radians; t, alpha: slope and offset of hard slots.
        hard_margin: radians; what decides which slots are hard.
        positive_only: margin only where a > 0, as FaceX-Zoo's head does.
    """

    kind: ClassVar[int] = KINDS.index("npc")
    uses_hard_mean: ClassVar[bool] = True
    m0: Parameter = 0.4
    m1: Parameter = 0.2
    t: Parameter = 1.1
    alpha: Parameter = 0.2
    hard_margin: Parameter = 0.5
    positive_only: bool = False

    def __post_init__(self) -> None:
        _check_range(self, "m0", 0.0, 1.5, "radians")
        _check_range(self, "m1", 0.0, 1.5, "radians")
        _check_range(self, "t", 0.0, 4.0, "a factor")
        _check_range(self, "alpha", -2.0, 2.0, "a cosine")
        _check_range(self, "hard_margin", 0.0, math.pi, "radians")

    def psi(self, a: Tensor, hard_mean: Tensor | None = None) -> Tensor:
        """cos(theta + m0 + m1 hard_mean) or its continuation."""
        mean = torch.zeros_like(a) if hard_mean is None else hard_mean
        return _arc(a, (self.m0 + self.m1 * mean).clamp(0, math.pi), self.positive_only)

    def phi(self, c: Tensor, a: Tensor) -> Tensor:
        """phi(c) = t c + alpha where hard."""
        return torch.where(self.is_hard(c, a), _column(self.t) * c + _column(self.alpha), c)

    def is_hard(self, c: Tensor, a: Tensor) -> Tensor:
        """Whether c > cos(theta + hard_margin)."""
        return c > _cos_of_sum(a, _column(self.hard_margin))


@dataclass(frozen=True)
class CircleLoss(Margin):
    """Circle loss with class-level labels (Sun et al., CVPR 2020, eqs. 4 to 8); the paper's scale is 256.

    psi(a) = [1 + m - a]+ (a - (1 - m)), phi(c) = [c + m]+ (c - m); the weights [..]+ are constants to the gradient.

    Args:
        m: relaxation in [0, 1].
    """

    kind: ClassVar[int] = KINDS.index("circle")
    m: Parameter = 0.25

    def __post_init__(self) -> None:
        _check_range(self, "m", 0.0, 1.0, "a cosine")

    def psi(self, a: Tensor, hard_mean: Tensor | None = None) -> Tensor:
        """[1 + m - a]+ (a - (1 - m))."""
        return (1 + self.m - a.detach()).clamp_min(0) * (a - (1 - self.m))

    def phi(self, c: Tensor, a: Tensor) -> Tensor:
        """[c + m]+ (c - m)."""
        m = _column(self.m)
        return (c.detach() + m).clamp_min(0) * (c - m)


@dataclass(frozen=True)
class ArcNegFace(Margin):
    """Noise-tolerant negatives: ArcNegFace (Liu et al., ICCV workshops 2019, eqs. 5 to 7).

    psi as ArcFace; phi(c) = t c + t - 1 with t = alpha exp(-(c - psi(a))^2 / sigma), a constant to the gradient.

    Args:
        margin: radians in [0, pi].
        alpha, sigma: height and width of the weight; sigma > 0.
    """

    kind: ClassVar[int] = KINDS.index("arc_neg")
    margin: Parameter = 0.5
    alpha: Parameter = 1.2
    sigma: Parameter = 2.0

    def __post_init__(self) -> None:
        _check_range(self, "margin", 0.0, math.pi, "radians")
        _check_range(self, "alpha", 0.0, 4.0, "a factor")
        _check_range(self, "sigma", 1e-3, 1e3, "a number")

    def psi(self, a: Tensor, hard_mean: Tensor | None = None) -> Tensor:
        """cos(theta + margin) or its continuation."""
        return _arc(a, self.margin, False)

    def phi(self, c: Tensor, a: Tensor) -> Tensor:
        """phi(c) = t c + t - 1."""
        limit = _arc(a, _column(self.margin), False)
        t = _column(self.alpha) * (-((c.detach() - limit) ** 2) / _column(self.sigma)).exp()
        return t * c + t - 1


@dataclass(frozen=True)
class AdaCos(Softmax):
    """Adaptive scale: AdaCos (Zhang et al., CVPR 2019, eqs. 12 to 14). psi(a) = a; replaces the loss's ``scale``.

    scale <- log(mean over the batch of sum exp(scale c)) / cos(min(pi/4, median theta)) follows the training, before the
    batch's own loss. The sum costs one more sweep over the queue (one product) than other margins need.

    Args:
        scale: the running scale; 0 stands for its first value, sqrt(2) log(K - 1).
    """

    running: ClassVar[tuple[str, ...]] = ("scale",)
    scale: Parameter = 0.0

    def __post_init__(self) -> None:
        _check_range(self, "scale", 0.0, math.inf, "a number")

    def scale_for(self, scale: Parameter, slots: int) -> Parameter:
        """The running scale, or its first value."""
        first = math.sqrt(2) * math.log(max(slots - 1, 2))
        if isinstance(self.scale, Tensor):
            return torch.where(self.scale > 0, self.scale, torch.full_like(self.scale, first))
        return self.scale or first

    def follow(self, seen: Seen) -> dict[str, Tensor]:
        """Eq. 14; unchanged while there is not one negative."""
        old = torch.as_tensor(self.scale_for(0.0, seen.slots), dtype=torch.float32, device=seen.norm.device)
        each = seen.log_negatives(old)
        log_mean = torch.logsumexp(each, 0) - math.log(max(len(each), 1))
        median = seen.target_cosine.clamp(-1, 1).acos().median().clamp_max(math.pi / 4)
        return {"scale": torch.where(torch.isfinite(log_mean) & (log_mean > 0), log_mean / median.cos(), old)}

    def parameters(self) -> list[Parameter]:
        """None: the scale is not the kernels' to know."""
        return []


@dataclass(frozen=True)
class MagFace(Margin):
    """Magnitude-aware margin: MagFace (Meng et al., CVPR 2021, eqs. 3 to 5).

    psi as ArcFace with a margin that grows linearly from ``lower_margin`` to ``upper_margin`` as the norm of the embedding goes
    from ``lower_norm`` to ``upper_norm`` (clamped; a constant to the gradient). The penalty
    weight * (norm / upper_norm^2 + 1 / norm) of the clamped norm is added to each probe's loss.

    Args:
        lower_norm, upper_norm: norms > 0; lower_margin, upper_margin: radians; weight: of the penalty.
    """

    uses_norm: ClassVar[bool] = True
    lower_norm: float = 10.0
    upper_norm: float = 110.0
    lower_margin: float = 0.45
    upper_margin: float = 0.8
    weight: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.lower_norm < self.upper_norm:
            raise ValueError(
                f"MagFace: lower_norm must be in (0, upper_norm={self.upper_norm:g}), got {self.lower_norm!r}"
            )
        _check_range(self, "lower_margin", 0.0, math.pi, "radians")
        _check_range(self, "upper_margin", 0.0, math.pi, "radians")
        _check_range(self, "weight", 0.0, math.inf, "a number")

    def for_batch(self, norm: Tensor) -> Margin:
        """ArcFace with each probe's own margin."""
        share = (norm.detach().clamp(self.lower_norm, self.upper_norm) - self.lower_norm) / (
            self.upper_norm - self.lower_norm
        )
        return ArcSoftmax(self.lower_margin + share * (self.upper_margin - self.lower_margin))

    def penalty(self, norm: Tensor) -> Tensor:
        """The term weight * (norm / upper_norm^2 + 1 / norm)."""
        clamped = norm.clamp(self.lower_norm, self.upper_norm)
        return self.weight * (clamped / self.upper_norm**2 + 1 / clamped)


@dataclass(frozen=True)
class AdaFace(Margin):
    """Quality-adaptive margin: AdaFace (Kim et al., CVPR 2022, eqs. 10 to 14).

    q = clamp(h (norm - mean) / (std + 1e-3), -1, 1); psi(a) = cos(theta - m q) - (m + m q), the angle held in [0, pi].
    mean and std of the norms follow the training: <- 0.99 old + 0.01 of the batch.

    Args:
        m: margin in [0, 1]; h: concentration; mean, std: running statistics of the norms, clamped to [1e-3, 100].
    """

    running: ClassVar[tuple[str, ...]] = ("mean", "std")
    uses_norm: ClassVar[bool] = True
    m: float = 0.4
    h: float = 0.333
    mean: Parameter = 20.0
    std: Parameter = 100.0

    def __post_init__(self) -> None:
        _check_range(self, "m", 0.0, 1.0, "a number")
        _check_range(self, "h", 0.0, math.inf, "a number")

    def for_batch(self, norm: Tensor) -> Margin:
        """The combined margin with each probe's own m2 and m3."""
        quality = (self.h * (norm.detach().clamp(1e-3, 100) - self.mean) / (self.std + 1e-3)).clamp(-1, 1)
        return CombinedMargin(1.0, -self.m * quality, self.m + self.m * quality, 0.0, True)

    def follow(self, seen: Seen) -> dict[str, Tensor]:
        """Moving averages of the batch's mean and standard deviation (of at least two norms)."""
        norm = seen.norm.clamp(1e-3, 100)
        if len(norm) < 2:
            return {}
        return {"mean": 0.99 * self.mean + 0.01 * norm.mean(), "std": 0.99 * self.std + 0.01 * norm.std()}


MarginName = Literal[
    "softmax", "am", "arc", "combined", "sphereface", "mv", "curricular", "npc", "circle", "arc_neg", "adacos", "magface",
    "adaface",
]  # fmt: skip
MARGINS: dict[MarginName, type[Margin]] = {
    "softmax": Softmax, "am": AMSoftmax, "arc": ArcSoftmax, "combined": CombinedMargin, "sphereface": SphereFace,
    "mv": MVSoftmax, "curricular": CurricularFace, "npc": NPCFace, "circle": CircleLoss, "arc_neg": ArcNegFace,
    "adacos": AdaCos, "magface": MagFace, "adaface": AdaFace,
}  # fmt: skip
# Those that kernels know by their kind; the others become one of these for each batch.
FUSED: dict[int, type[Margin]] = {m.kind: m for m in reversed(MARGINS.values()) if hasattr(m, "kind")}


def _sine(a: Tensor) -> Tensor:
    """sin(theta), at least MIN_SINE and with no slope below."""
    return ((1 - a) * (1 + a)).clamp_min(MIN_SINE**2).sqrt()


def _cos(x: Parameter) -> Parameter:
    return x.cos() if isinstance(x, Tensor) else math.cos(x)


def _sin(x: Parameter) -> Parameter:
    return x.sin() if isinstance(x, Tensor) else math.sin(x)


def _cos_of_sum(a: Tensor, m: Parameter) -> Tensor:
    """cos(theta + m)."""
    return a * _cos(m) - _sine(a) * _sin(m)


def _arc(a: Tensor, m: Parameter, easy: bool) -> Tensor:
    """ArcFace's psi."""
    limit = 0.0 if easy else -_cos(m)
    return torch.where(a > limit, _cos_of_sum(a, m), a if easy else a - m * _sin(m))


def _column(value: Parameter) -> Parameter:
    """One value per probe, set beside [N, K]."""
    return value[:, None] if isinstance(value, Tensor) and value.dim() == 1 else value


def _check_range(margin: Margin, name: str, low: float, high: float, unit: str) -> None:
    value = getattr(margin, name)
    owner = type(margin).__name__
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.dim() > 1:
            raise ValueError(
                f"{owner}: {name} must be a number or a floating-point tensor [N] or [], got {value.dtype} {list(value.shape)}"
            )
        if value.requires_grad:
            raise ValueError(f"{owner}: {name} must not require a gradient: margins are constants")
    elif not low <= value <= high:
        raise ValueError(f"{owner}: {name} must be {unit} in [{low:g}, {high:g}], got {value!r}")
