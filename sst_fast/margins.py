"""Margins of the softmax family. The one place in Python that knows a margin's formula.

``a`` is the cosine of a probe with its target prototype, ``c`` the cosine with any other one, theta = acos a. A margin
changes the target's cosine, ``psi(a)``, and may change the others', ``phi(c, a)``; logits are ``scale`` times these.
``csrc/margin.h`` is the counterpart for the compiled kernels; ``tests/test_margins.py`` holds the two together.

A parameter may be a number, a 0-d tensor or a tensor [N], one value per probe. Those that ``trainable`` names may require a
gradient. What else adapts (thresholds, which slots are 'hard', weights that depend on cosines, AdaFace's statistics of norms)
is constant to the gradient, as in the authors' codes. MagFace's margin is not constant, as in its authors' code.

A target row w is taken as it is. With a = x w for the unit probe x, its part across the probe has the length
``sine`` = |w - a x|. cos(theta + m) stands for a cos m - sine sin m, which is |w| cos(theta + m). The slope in ``a`` is that at
constant |w|. It grows without bound towards theta = 0 and pi. But the gradient that it makes, slope times (w - a x), keeps the
finite length |w| sin(theta + m). Where the rows are parallel (sine < 1e-12) there is no direction across. There the gradient of
the margin is 0, the mean over all directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

# Rows whose angle has a smaller sine are parallel: double arithmetic cannot tell in which direction they differ.
MIN_SINE = 1e-12
# The largest inverse temperature. float32 cosines are exact to 1e-7, so logits to 1e-4 at this scale, and gradients to a few
# 1e-5 of the scale; from 1e4 on what should be 0 would be of the size of a gradient. The largest in use is Circle loss's 256.
MAX_SCALE = 1e3
# How far from their ends AdaFace's code keeps cosines and angles.
ADAFACE_EPSILON = 1e-3

# The margins that kernels know, by number: csrc/margin.h lists the same names, and a test compares the two.
KINDS = ("softmax", "am", "arc", "combined", "mv", "curricular", "npc", "circle", "arc_neg", "filtered")

# What psi is where theta + m exceeds pi: ArcFace's rules and those of the combined margin, in the order in which kernels
# number them. A number in the place of ArcFace's rule is "offset".
ARC_RULES = ("linear", "easy", "cosine", "offset")
COMBINED_RULES = ("fall", "hold", "cosine", "clamp")
ArcBeyond = float | Literal["linear", "cosine"]
CombinedBeyond = Literal["fall", "hold", "cosine", "clamp"]

Parameter = float | Tensor
Range = tuple[float, float, str]  # least and largest value, and what they are


@dataclass(frozen=True)
class Seen:
    """What a margin that follows the training may look at: the batch, before the loss.

    ``norm`` [N] of the embeddings, ``target_cosine`` [N], ``counts`` bool [N]: which probes are finite and not ignored,
    ``slots`` K, and ``log_negatives(scale)``: log of the sum of exp(scale c) over each probe's unmasked slots [N], which costs
    a sweep over the queue.
    """

    norm: Tensor
    target_cosine: Tensor
    counts: Tensor
    slots: int
    log_negatives: Callable[[Tensor], Tensor]

    @property
    def total(self) -> Tensor:
        """Number of probes that count, 0-d."""
        return self.counts.sum()

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values`` [N] over the probes that count; 0 if none does."""
        return torch.where(self.counts, values, 0).sum() / self.total.clamp_min(1)


@dataclass(frozen=True)
class Margin:
    """Base of all margins: a frozen set of parameters with the formulas ``psi`` and ``phi``.

    ``kind`` is the number by which kernels know the margin, its place in :data:`KINDS`.
    ``ranges`` says which values its parameters may have. ``running`` names those that follow the training;
    :class:`sst_fast.SemiSiameseLoss` keeps them as buffers. ``trainable`` names those that may require a gradient: psi's alone.
    """

    kind: ClassVar[int]
    ranges: ClassVar[Mapping[str, Range]] = {}
    running: ClassVar[tuple[str, ...]] = ()
    trainable: ClassVar[tuple[str, ...]] = ()
    uses_norm: ClassVar[bool] = False  # for_batch, penalty or scale_for have something to say
    uses_hard_mean: ClassVar[bool] = False  # psi needs the mean cosine of the probe's hard slots

    def __post_init__(self) -> None:
        for name, (low, high, unit) in self.ranges.items():
            value, owner = getattr(self, name), type(self).__name__
            if isinstance(value, Tensor):
                if not value.is_floating_point() or value.dim() > 1:
                    raise ValueError(
                        f"{owner}: {name} must be a number or a floating-point tensor [N] or [], got {value.dtype} "
                        f"{list(value.shape)}"
                    )
                if value.requires_grad and name not in self.trainable:
                    raise ValueError(
                        f"{owner}: {name} must not require a gradient: it is a constant (trainable: "
                        f"{', '.join(self.trainable) or 'none'})"
                    )
            elif type(value) is not float:
                if not isinstance(value, Real):
                    raise ValueError(f"{owner}: {name} must be {unit} in [{low:g}, {high:g}], got {value!r}")
                object.__setattr__(self, name, float(value))  # an integer, or a number of NumPy's
            if not isinstance(value, Tensor) and not low <= value <= high:
                raise ValueError(f"{owner}: {name} must be {unit} in [{low:g}, {high:g}], got {value!r}")

    def check_values(self) -> None:
        """ValueError where a tensor on the CPU holds a value that a number may not have; elsewhere it would wait for the device."""
        for name, (low, high, unit) in self.ranges.items():
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.device.type != "cpu":
                continue
            wrong = ~((value.detach() >= low) & (value.detach() <= high))  # a NaN is wrong too
            if bool(wrong.any()):
                raise ValueError(
                    f"{type(self).__name__}: {name} must be {unit} in [{low:g}, {high:g}], got {value[wrong][0].item()!r}"
                )

    def psi(self, a: Tensor, hard_mean: Tensor | None = None, sine: Tensor | None = None) -> Tensor:
        """Target cosine with the margin applied; ``a``, ``sine`` (a constant) and the result are [N].

        ``sine`` is the length of what the target prototype has across the probe. Near an angle of 0 it is far more exact than
        sqrt(1 - a^2), which takes its place where it is None.
        """
        raise NotImplementedError

    def phi(self, c: Tensor, a: Tensor, sine: Tensor | None = None) -> Tensor:
        """Cosines ``c`` [N, K] of the other slots after the margin; ``a``, ``sine`` [N, 1] are the target's, detached."""
        return c

    def is_hard(self, c: Tensor, a: Tensor, sine: Tensor | None = None) -> Tensor:
        """bool [N, K]: the slots that a mining margin calls hard (where ``uses_hard_mean``)."""
        raise NotImplementedError

    def for_batch(self, norm: Tensor) -> Margin:
        """The margin for these embedding norms [N]: itself, unless it depends on them."""
        return self

    def penalty(self, norm: Tensor) -> Tensor | None:
        """A term [N] added to the loss of each probe, differentiable in the embedding's norm [N]."""
        return None

    def scale_for(self, scale: Parameter, slots: int, norm: Tensor | None = None) -> Parameter:
        """The scale to use: the one asked for, unless the margin sets its own; ``norm`` as for ``for_batch``, if it uses it."""
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
        return any(isinstance(value, Tensor) for value in self.parameters())

    @property
    def trains(self) -> bool:
        """Whether a parameter requires a gradient."""
        return any(isinstance(value, Tensor) and value.requires_grad for value in self.parameters())

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

    def psi(self, a: Tensor, hard_mean: Tensor | None = None, sine: Tensor | None = None) -> Tensor:
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
    ranges: ClassVar[Mapping[str, Range]] = {"margin": (0.0, 2.0, "a cosine")}
    trainable: ClassVar[tuple[str, ...]] = ("margin",)
    margin: Parameter = 0.35

    def psi(self, a: Tensor, hard_mean: Tensor | None = None, sine: Tensor | None = None) -> Tensor:
        """psi(a) = a - margin."""
        return a - self.margin


@dataclass(frozen=True)
class ArcSoftmax(Margin):
    """Additive angular margin: ArcFace (Deng et al., CVPR 2019, eq. 3).

    psi(a) = cos(theta + margin) as long as theta + margin <= pi. Beyond that one of several rules holds.

    Args:
        margin: radians in [0, pi].
        easy: the 'easy margin' rule: targets beyond 90 degrees have no margin.
        beyond: what psi is beyond pi, without ``easy``. 'linear' (default): a - margin * sin(margin). 'cosine': cos(theta + margin)
            as it is, which rises again (insightface's code, FaceX-Zoo's Semi-Siamese Training). A cosine m in [0, 2]: a - m
            (``margin_am`` of FaceX-Zoo's heads, where it is 0).
    """

    kind: ClassVar[int] = KINDS.index("arc")
    ranges: ClassVar[Mapping[str, Range]] = {"margin": (0.0, math.pi, "radians")}
    trainable: ClassVar[tuple[str, ...]] = ("margin",)
    margin: Parameter = 0.5
    easy: bool = False
    beyond: ArcBeyond = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_arc_beyond(self, self.beyond)

    def psi(self, a: Tensor, hard_mean: Tensor | None = None, sine: Tensor | None = None) -> Tensor:
        """cos(theta + margin) or its continuation."""
        _, rule, offset = self.parameters()
        return _arc(a, self.margin, sine, int(rule), float(offset))

    def parameters(self) -> list[Parameter]:
        """The margin, the number of the rule in ARC_RULES, and the offset of "offset"."""
        if self.easy:
            return [self.margin, ARC_RULES.index("easy"), 0.0]
        if isinstance(self.beyond, str):
            return [self.margin, ARC_RULES.index(self.beyond), 0.0]
        return [self.margin, ARC_RULES.index("offset"), float(self.beyond)]


@dataclass(frozen=True)
class CombinedMargin(Margin):
    """Combined margin (Deng et al., CVPR 2019, eq. 4): psi(a) = cos(m1 theta + m2) - m3.

    Args:
        m1: factor of the angle, in [0.5, 16].
        m2: radians in [-pi, pi].
        m3: a cosine in [-2, 2].
        annealing: psi becomes (annealing * a + psi) / (annealing + 1); >= 0.
        beyond: what the cosine of an angle beyond pi is. 'fall' (default): (-1)^k cos - 2k with k = floor(angle / pi), so psi falls
            all the way (SphereFace's). 'hold': the angle is held in [0, pi]. 'cosine': as it is, which rises again (insightface's
            code). 'clamp': a is held in [-0.999, 0.999] and the angle in [0.001, pi - 0.001] (AdaFace's code). An angle below
            0 is held at 0, except with 'cosine'.
    """

    kind: ClassVar[int] = KINDS.index("combined")
    ranges: ClassVar[Mapping[str, Range]] = {
        "m1": (0.5, 16.0, "a factor"),
        "m2": (-math.pi, math.pi, "radians"),
        "m3": (-2.0, 2.0, "a cosine"),
        "annealing": (0.0, math.inf, "a number"),
    }
    trainable: ClassVar[tuple[str, ...]] = ("m1", "m2", "m3", "annealing")
    m1: Parameter = 1.0
    m2: Parameter = 0.3
    m3: Parameter = 0.2
    annealing: Parameter = 0.0
    beyond: CombinedBeyond = "fall"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_combined_beyond(self, self.beyond)

    def psi(self, a: Tensor, hard_mean: Tensor | None = None, sine: Tensor | None = None) -> Tensor:
        """cos(m1 theta + m2) - m3."""
        plain = _combined(a, sine, self.m1, self.m2, self.m3, self.beyond)
        return (self.annealing * a + plain) / (self.annealing + 1)

    def parameters(self) -> list[Parameter]:
        """The numbers, and that of the rule in COMBINED_RULES."""
        return [self.m1, self.m2, self.m3, self.annealing, COMBINED_RULES.index(self.beyond)]


@dataclass(frozen=True)
class FilteredMargin(Margin):
    """Combined margin with a limit on the other slots' cosines: insightface's inter-class filtering.

    psi(a) = cos(m1 theta + m2) - m3. A slot with c > threshold is taken for a wrong label: phi(c) = above, with no gradient.
    m2 = 0.5 is as in ArcFace (default); m2 = 0, m3 = 0.4 as in CosFace. The threshold in insightface's recipes is 0.4.

    Args:
        m1, m2, m3, beyond: as in :class:`CombinedMargin`, but 'cosine' is the default, as in insightface's code.
        threshold: a cosine in [-1, 1].
        above: a cosine in [-1, 1]; 0 in insightface's code.
    """

    kind: ClassVar[int] = KINDS.index("filtered")
    ranges: ClassVar[Mapping[str, Range]] = {
        "m1": (0.5, 16.0, "a factor"),
        "m2": (-math.pi, math.pi, "radians"),
        "m3": (-2.0, 2.0, "a cosine"),
        "threshold": (-1.0, 1.0, "a cosine"),
        "above": (-1.0, 1.0, "a cosine"),
    }
    trainable: ClassVar[tuple[str, ...]] = ("m1", "m2", "m3")
    m1: Parameter = 1.0
    m2: Parameter = 0.5
    m3: Parameter = 0.0
    beyond: CombinedBeyond = "cosine"
    threshold: Parameter = 0.4
    above: Parameter = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_combined_beyond(self, self.beyond)

    def psi(self, a: Tensor, hard_mean: Tensor | None = None, sine: Tensor | None = None) -> Tensor:
        """cos(m1 theta + m2) - m3."""
        return _combined(a, sine, self.m1, self.m2, self.m3, self.beyond)

    def phi(self, c: Tensor, a: Tensor, sine: Tensor | None = None) -> Tensor:
        """``above`` where c > threshold."""
        return torch.where(c > _column(self.threshold), _column(self.above), c)

    def parameters(self) -> list[Parameter]:
        """The numbers, with that of the rule in COMBINED_RULES in its place."""
        return [self.m1, self.m2, self.m3, COMBINED_RULES.index(self.beyond), self.threshold, self.above]


@dataclass(frozen=True)
class SphereFace(CombinedMargin):
    """Multiplicative angular margin: A-softmax (Liu et al., CVPR 2017, eq. 7), psi(a) = (-1)^k cos(m theta) - 2k, k = floor(m theta / pi).

    Args:
        m1: the m above; 4 in the paper, 1.35 to 1.7 in later work.
        annealing: the paper's lambda, mixes in the plain cosine; 5 at the end of its training.
        norm_scale: the scale is the embedding's own norm, with its gradient, as in the paper; the loss's ``scale`` is not
            used.
    """

    uses_norm: ClassVar[bool] = True
    m1: Parameter = 4.0
    m2: Parameter = 0.0
    m3: Parameter = 0.0
    annealing: Parameter = 5.0
    norm_scale: bool = False

    def scale_for(self, scale: Parameter, slots: int, norm: Tensor | None = None) -> Parameter:
        """The embedding's norm with ``norm_scale``."""
        return norm if self.norm_scale and norm is not None else scale


@dataclass(frozen=True)
class MVSoftmax(Margin):
    """Mis-classified vectors: MV-softmax (Wang et al., AAAI 2020, eqs. 5 to 8).

    psi is that of AM-softmax or, with ``arc``, that of ArcFace. A slot with c > psi(a) is hard: phi(c) = t c + t - 1.

    Args:
        margin: a cosine, or radians with ``arc``.
        t: weight of hard slots, in [1, 4].
        arc: margin on the angle.
        positive_only: margin only where a > margin (or a > 0 with ``arc``), as in FaceX-Zoo's heads.
    """

    kind: ClassVar[int] = KINDS.index("mv")
    ranges: ClassVar[Mapping[str, Range]] = {
        "margin": (0.0, 2.0, "a cosine or radians"),
        "t": (1.0, 4.0, "a factor"),
    }
    trainable: ClassVar[tuple[str, ...]] = ("margin",)
    margin: Parameter = 0.35
    t: Parameter = 1.12
    arc: bool = False
    positive_only: bool = False

    def psi(self, a: Tensor, hard_mean: Tensor | None = None, sine: Tensor | None = None) -> Tensor:
        """a - margin, or cos(theta + margin)."""
        if self.arc:
            return _arc(a, self.margin, sine, ARC_RULES.index("easy" if self.positive_only else "linear"))
        return torch.where(a > self.margin, a - self.margin, a) if self.positive_only else a - self.margin

    def phi(self, c: Tensor, a: Tensor, sine: Tensor | None = None) -> Tensor:
        """phi(c) = t c + t - 1 where c exceeds the margined target (the full margin, whatever ``positive_only``)."""
        m, t = _column(self.margin), _column(self.t)
        limit = _cos_of_sum(a, m, sine) if self.arc else a - m
        return torch.where(c > limit, t * c + t - 1, c)


@dataclass(frozen=True)
class CurricularFace(Margin):
    """Adaptive curriculum: CurricularFace (Huang et al., CVPR 2020, eqs. 6 to 10).

    psi is that of ArcFace. A slot with c > cos(theta + margin) is hard: phi(c) = c (t + c). t follows the training:
    t <- 0.99 t + 0.01 mean(a), before the batch's own loss, as in the authors' code.

    Args:
        margin: radians in [0, pi].
        t: the running curriculum, starts at 0.
    """

    kind: ClassVar[int] = KINDS.index("curricular")
    running: ClassVar[tuple[str, ...]] = ("t",)
    ranges: ClassVar[Mapping[str, Range]] = {
        "margin": (0.0, math.pi, "radians"),
        "t": (-1.0, 1.0, "a cosine"),
    }
    trainable: ClassVar[tuple[str, ...]] = ("margin",)
    margin: Parameter = 0.5
    t: Parameter = 0.0

    def psi(self, a: Tensor, hard_mean: Tensor | None = None, sine: Tensor | None = None) -> Tensor:
        """cos(theta + margin) or its continuation."""
        return _arc(a, self.margin, sine)

    def phi(self, c: Tensor, a: Tensor, sine: Tensor | None = None) -> Tensor:
        """phi(c) = c (t + c) where c exceeds cos(theta + margin)."""
        return torch.where(c > _cos_of_sum(a, _column(self.margin), sine), c * (_column(self.t) + c), c)

    def follow(self, seen: Seen) -> dict[str, Tensor]:
        """New t = 0.99 t + 0.01 mean(a)."""
        return {"t": 0.99 * self.t + 0.01 * seen.mean(seen.target_cosine)}


@dataclass(frozen=True)
class NPCFace(Margin):
    """Negative-positive cooperation: NPCFace (Zeng et al., ACCV 2020, eqs. 6 to 9).

    A slot with c > cos(theta + hard_margin) is hard: phi(c) = t c + alpha. psi(a) = cos(theta + m) with
    m = m0 + m1 * (mean cosine of the probe's hard slots), or m0 if it has none. The mean comes from the same sweep: no
    backend needs a second one.

    Args:
        m0, m1: radians.
        t, alpha: slope and offset of phi for hard slots.
        hard_margin: radians; what decides which slots are hard.
        positive_only: margin only where a > 0, as FaceX-Zoo's head does.
    """

    kind: ClassVar[int] = KINDS.index("npc")
    uses_hard_mean: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {
        "m0": (0.0, 1.5, "radians"),
        "m1": (0.0, 1.5, "radians"),
        "t": (0.0, 4.0, "a factor"),
        "alpha": (-2.0, 2.0, "a cosine"),
        "hard_margin": (0.0, math.pi, "radians"),
    }
    m0: Parameter = 0.4
    m1: Parameter = 0.2
    t: Parameter = 1.1
    alpha: Parameter = 0.2
    hard_margin: Parameter = 0.5
    positive_only: bool = False

    def psi(self, a: Tensor, hard_mean: Tensor | None = None, sine: Tensor | None = None) -> Tensor:
        """cos(theta + m0 + m1 hard_mean) or its continuation."""
        mean = torch.zeros_like(a) if hard_mean is None else hard_mean
        m = (self.m0 + self.m1 * mean).clamp(0, math.pi)
        return _arc(a, m, sine, ARC_RULES.index("easy" if self.positive_only else "linear"))

    def phi(self, c: Tensor, a: Tensor, sine: Tensor | None = None) -> Tensor:
        """phi(c) = t c + alpha where hard."""
        return torch.where(self.is_hard(c, a, sine), _column(self.t) * c + _column(self.alpha), c)

    def is_hard(self, c: Tensor, a: Tensor, sine: Tensor | None = None) -> Tensor:
        """Whether c > cos(theta + hard_margin)."""
        return c > _cos_of_sum(a, _column(self.hard_margin), sine)


@dataclass(frozen=True)
class CircleLoss(Margin):
    """Circle loss with class-level labels (Sun et al., CVPR 2020, eqs. 4 to 8); the paper's scale is 256.

    psi(a) = [1 + m - a]+ (a - (1 - m)), phi(c) = [c + m]+ (c - m); the weights [..]+ are constants to the gradient.

    Args:
        m: relaxation in [0, 1].
    """

    kind: ClassVar[int] = KINDS.index("circle")
    ranges: ClassVar[Mapping[str, Range]] = {"m": (0.0, 1.0, "a cosine")}
    m: Parameter = 0.25

    def psi(self, a: Tensor, hard_mean: Tensor | None = None, sine: Tensor | None = None) -> Tensor:
        """[1 + m - a]+ (a - (1 - m))."""
        return (1 + self.m - a.detach()).clamp_min(0) * (a - (1 - self.m))

    def phi(self, c: Tensor, a: Tensor, sine: Tensor | None = None) -> Tensor:
        """[c + m]+ (c - m)."""
        m = _column(self.m)
        return (c.detach() + m).clamp_min(0) * (c - m)


@dataclass(frozen=True)
class ArcNegFace(Margin):
    """Noise-tolerant negatives: ArcNegFace (Liu et al., ICCV workshops 2019, eqs. 5 to 7).

    psi is that of ArcFace. phi(c) = t c + t - 1 with t = alpha exp(-(c - psi(a))^2 / sigma), a constant to the gradient.

    Args:
        margin: radians in [0, pi].
        alpha, sigma: height and width of t over c; sigma > 0.
    """

    kind: ClassVar[int] = KINDS.index("arc_neg")
    ranges: ClassVar[Mapping[str, Range]] = {
        "margin": (0.0, math.pi, "radians"),
        "alpha": (0.0, 4.0, "a factor"),
        "sigma": (1e-3, 1e3, "a number"),
    }
    trainable: ClassVar[tuple[str, ...]] = ("margin",)
    margin: Parameter = 0.5
    alpha: Parameter = 1.2
    sigma: Parameter = 2.0

    def psi(self, a: Tensor, hard_mean: Tensor | None = None, sine: Tensor | None = None) -> Tensor:
        """cos(theta + margin) or its continuation."""
        return _arc(a, self.margin, sine)

    def phi(self, c: Tensor, a: Tensor, sine: Tensor | None = None) -> Tensor:
        """phi(c) = t c + t - 1."""
        limit = _arc(a, _column(self.margin), sine)
        t = _column(self.alpha) * (-((c.detach() - limit) ** 2) / _column(self.sigma)).exp()
        return t * c + t - 1


@dataclass(frozen=True)
class AdaCos(Softmax):
    """Adaptive scale: AdaCos (Zhang et al., CVPR 2019, eqs. 12 to 14). psi(a) = a. It replaces the loss's ``scale``.

    The scale follows the training: scale <- log(mean over the batch of sum exp(scale c)) / cos(min(pi/4, median theta)), before
    the batch's own loss. The sum costs one more sweep over the queue (one product) than other margins need.

    Args:
        scale: the running scale; 0 stands for its first value, sqrt(2) log(K - 1).
    """

    running: ClassVar[tuple[str, ...]] = ("scale",)
    ranges: ClassVar[Mapping[str, Range]] = {"scale": (0.0, MAX_SCALE, "a number")}
    scale: Parameter = 0.0

    def scale_for(self, scale: Parameter, slots: int, norm: Tensor | None = None) -> Parameter:
        """The running scale, or its first value."""
        first = math.sqrt(2) * math.log(max(slots - 1, 2))
        if isinstance(self.scale, Tensor):
            return torch.where(self.scale > 0, self.scale, torch.full_like(self.scale, first))
        return self.scale or first

    def follow(self, seen: Seen) -> dict[str, Tensor]:
        """Eq. 14; unchanged while there is not one negative."""
        old = torch.as_tensor(self.scale_for(0.0, seen.slots), dtype=seen.norm.dtype, device=seen.norm.device)
        each = seen.log_negatives(old).masked_fill(~seen.counts, -torch.inf)
        log_mean = torch.logsumexp(each, 0) - seen.total.clamp_min(1).to(each.dtype).log()
        angles = seen.target_cosine.clamp(-1, 1).acos().masked_fill(~seen.counts, torch.inf).sort().values
        middle = (seen.total - 1).clamp_min(0) // 2  # of an even number the lower, as torch.median
        new = log_mean / angles.take(middle).clamp_max(math.pi / 4).cos()
        return {"scale": torch.where(torch.isfinite(log_mean) & (log_mean > 0), new, old).clamp_max(MAX_SCALE)}

    def parameters(self) -> list[Parameter]:
        """None: the scale is not the kernels' to know."""
        return []


@dataclass(frozen=True)
class MagFace(Margin):
    """Magnitude-aware margin: MagFace (Meng et al., CVPR 2021, eqs. 3 to 5).

    psi is that of ArcFace. The margin grows linearly from ``lower_margin`` to ``upper_margin`` as the norm of the embedding goes
    from ``lower_norm`` to ``upper_norm`` (clamped). The penalty weight * (norm / upper_norm^2 + 1 / norm) of the clamped norm is
    added to each probe's loss. Both have a gradient in the norm. The margin pulls the norm down where the probe is far from its
    target, and the penalty pushes it up. So the norm comes to say how good an image is.

    Args:
        lower_norm, upper_norm: norms > 0.
        lower_margin, upper_margin: radians.
        weight: of the penalty.
        easy: targets beyond 90 degrees have no margin (default), as in the authors' code.
        beyond: without ``easy``, as in :class:`ArcSoftmax`; 0 in FaceX-Zoo's head.
    """

    uses_norm: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {
        "lower_margin": (0.0, math.pi, "radians"),
        "upper_margin": (0.0, math.pi, "radians"),
        "weight": (0.0, math.inf, "a number"),
    }
    lower_norm: float = 10.0
    upper_norm: float = 110.0
    lower_margin: float = 0.45
    upper_margin: float = 0.8
    weight: float = 20.0
    easy: bool = True
    beyond: ArcBeyond = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lower_norm < self.upper_norm:
            raise ValueError(
                f"MagFace: lower_norm must be in (0, upper_norm={self.upper_norm:g}), got {self.lower_norm!r}"
            )
        _check_arc_beyond(self, self.beyond)

    def for_batch(self, norm: Tensor) -> Margin:
        """ArcFace with each probe's own margin, which is differentiable in the norm."""
        share = (norm.clamp(self.lower_norm, self.upper_norm) - self.lower_norm) / (self.upper_norm - self.lower_norm)
        return ArcSoftmax(self.lower_margin + share * (self.upper_margin - self.lower_margin), self.easy, self.beyond)

    def penalty(self, norm: Tensor) -> Tensor:
        """The term weight * (norm / upper_norm^2 + 1 / norm)."""
        clamped = norm.clamp(self.lower_norm, self.upper_norm)
        return self.weight * (clamped / self.upper_norm**2 + 1 / clamped)


@dataclass(frozen=True)
class AdaFace(Margin):
    """Quality-adaptive margin: AdaFace (Kim et al., CVPR 2022, eqs. 10 to 14).

    q = clamp(h (norm - mean) / (std + 1e-3), -1, 1) and psi(a) = cos(theta - m q) - (m + m q), with the angle held in [0, pi].
    mean and std of the norms follow the training: each becomes (1 - t_alpha) old + t_alpha new, with that of the batch as new.
    The norm is a constant to the gradient, as in the authors' code.

    Args:
        m: margin in [0, 1].
        h: concentration.
        mean, std: running statistics of the norms, which are clamped to [1e-3, 100].
        t_alpha: weight of a batch in the statistics; 0.01 in the paper and in the authors' training, 1 in their head's default.
        clamps: hold cosines in [-0.999, 0.999] and angles in [0.001, pi - 0.001], without gradient beyond, as in the authors'
            code. Other slots' cosines are held at 0.999 only: below -0.999 there is nothing in them to learn from.
    """

    running: ClassVar[tuple[str, ...]] = ("mean", "std")
    uses_norm: ClassVar[bool] = True
    ranges: ClassVar[Mapping[str, Range]] = {
        "m": (0.0, 1.0, "a number"),
        "h": (0.0, math.inf, "a number"),
        "mean": (0.0, math.inf, "a norm"),
        "std": (0.0, math.inf, "a norm"),
        "t_alpha": (0.0, 1.0, "a share"),
    }
    m: float = 0.4
    h: float = 0.333
    mean: Parameter = 20.0
    std: Parameter = 100.0
    t_alpha: float = 0.01
    clamps: bool = False

    def for_batch(self, norm: Tensor) -> Margin:
        """The combined margin with each probe's own m2 and m3."""
        quality = (self.h * (norm.detach().clamp(1e-3, 100) - self.mean) / (self.std + 1e-3)).clamp(-1, 1)
        m2, m3 = -self.m * quality, self.m + self.m * quality
        if self.clamps:
            most = 1 - ADAFACE_EPSILON
            return FilteredMargin(1.0, m2, m3, "clamp", threshold=most, above=most)
        return CombinedMargin(1.0, m2, m3, beyond="hold")

    def follow(self, seen: Seen) -> dict[str, Tensor]:
        """Moving averages of the batch's mean and standard deviation; unchanged by fewer than two norms."""
        norm = seen.norm.clamp(1e-3, 100)
        mean = seen.mean(norm)
        n = seen.total
        std = (torch.where(seen.counts, norm - mean, 0).square().sum() / (n - 1).clamp_min(1)).sqrt()
        new = {"mean": (self.mean, mean), "std": (self.std, std)}
        return {
            name: torch.where(n < 2, old, (1 - self.t_alpha) * old + self.t_alpha * batch)
            for name, (old, batch) in new.items()
        }


MarginName = Literal[
    "softmax", "am", "arc", "combined", "sphereface", "mv", "curricular", "npc", "circle", "arc_neg", "adacos", "magface",
    "adaface", "filtered",
]  # fmt: skip
MARGINS: dict[MarginName, type[Margin]] = {
    "softmax": Softmax, "am": AMSoftmax, "arc": ArcSoftmax, "combined": CombinedMargin, "sphereface": SphereFace,
    "mv": MVSoftmax, "curricular": CurricularFace, "npc": NPCFace, "circle": CircleLoss, "arc_neg": ArcNegFace,
    "adacos": AdaCos, "magface": MagFace, "adaface": AdaFace, "filtered": FilteredMargin,
}  # fmt: skip
# Those that kernels know by their kind; the others become one of these for each batch.
FUSED: dict[int, type[Margin]] = {m.kind: m for m in reversed(MARGINS.values()) if hasattr(m, "kind")}


def _sine(a: Tensor, sine: Tensor | None = None) -> Tensor:
    """sin(theta) as a function of ``a``, with the value ``sine`` where that is known; 0 with no slope for parallel rows."""
    near = a.detach()
    square = ((1 - a) * (1 + a)).clamp_min(0) if sine is None else sine**2 + (near - a) * (near + a)
    parallel = square.detach() < MIN_SINE**2
    return torch.where(parallel, 0, torch.where(parallel, 1, square).sqrt())


def _cos(x: Parameter) -> Parameter:
    return x.cos() if isinstance(x, Tensor) else math.cos(x)


def _sin(x: Parameter) -> Parameter:
    return x.sin() if isinstance(x, Tensor) else math.sin(x)


def _cos_of_sum(a: Tensor, m: Parameter, sine: Tensor | None) -> Tensor:
    """cos(theta + m)."""
    return a * _cos(m) - _sine(a, sine) * _sin(m)


def _arc(a: Tensor, m: Parameter, sine: Tensor | None, rule: int = 0, offset: float = 0.0) -> Tensor:
    """ArcFace's psi, by a rule of ARC_RULES."""
    inside = _cos_of_sum(a, m, sine)
    if ARC_RULES[rule] == "cosine":
        return inside
    if ARC_RULES[rule] == "easy":
        return torch.where(a > 0, inside, a)
    return torch.where(a > -_cos(m), inside, a - (offset if ARC_RULES[rule] == "offset" else m * _sin(m)))


def _combined(
    a: Tensor, sine: Tensor | None, m1: Parameter, m2: Parameter, m3: Parameter, beyond: CombinedBeyond
) -> Tensor:
    """cos(m1 theta + m2) - m3, by a rule of COMBINED_RULES."""
    across, near = _sine(a, sine), a.detach()
    parallel = across.detach() == 0
    forward = torch.where(near < 0, -torch.ones_like(near), torch.ones_like(near))
    length = (near**2 + across.detach() ** 2).sqrt()  # of the target row: a constant
    theta = torch.atan2(across, torch.where(parallel, forward, a))
    free = torch.ones_like(parallel)
    if beyond == "clamp":
        most = 1 - ADAFACE_EPSILON
        free = near.abs() <= most
        theta = torch.where(free, theta, near.clamp(-most, most).acos())
    wanted = theta * m1 + m2
    low, high = {
        "fall": (0.0, math.inf),
        "hold": (0.0, math.pi),
        "cosine": (-math.inf, math.inf),
        "clamp": (ADAFACE_EPSILON, math.pi - ADAFACE_EPSILON),
    }[beyond]
    angle = wanted.clamp(low, high)
    free = free & (angle.detach() == wanted.detach())
    k = (angle.detach() / math.pi).floor() if beyond == "fall" else torch.zeros_like(near)
    sign = 1 - 2 * (k % 2)
    value = length * (sign * angle.cos() - 2 * k) - m3
    # sin(m1 theta + m2) m1 / sin(theta) for parallel rows, but for its part that has no bound.
    slope = torch.where(parallel & free, forward * sign * angle.detach().cos() * _constant(m1) ** 2, 0)
    return value + slope * (a - near)


def _constant(value: Parameter) -> Parameter:
    return value.detach() if isinstance(value, Tensor) else value


def _column(value: Parameter) -> Parameter:
    """One value per probe, set beside [N, K]."""
    return value[:, None] if isinstance(value, Tensor) and value.dim() == 1 else value


def _check_arc_beyond(margin: Margin, beyond: object) -> None:
    if isinstance(beyond, Real) and not isinstance(beyond, bool) and 0 <= float(beyond) <= 2:
        return
    if beyond not in ("linear", "cosine"):
        raise ValueError(
            f"{type(margin).__name__}: beyond must be 'linear', 'cosine' or a cosine in [0, 2], got {beyond!r}"
        )


def _check_combined_beyond(margin: Margin, beyond: object) -> None:
    if beyond not in COMBINED_RULES:
        raise ValueError(
            f"{type(margin).__name__}: beyond must be one of {', '.join(map(repr, COMBINED_RULES))}, got {beyond!r}"
        )
