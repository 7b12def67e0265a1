"""The margins in Triton: the one place of this language that knows their formulas. ``sst_fast/margins.py`` explains them and
``csrc/margin.h`` is the counterpart for the CPU; ``KIND`` is the number all three share."""

import triton
import triton.language as tl

from sst_fast.margins import KINDS
from sst_fast.margins import MIN_SINE as MIN_SINE_OF_ALL

SOFTMAX, AM, ARC, COMBINED, MV, CURRICULAR, NPC, CIRCLE, ARC_NEG = (tl.constexpr(kind) for kind in range(len(KINDS)))

MIN_SINE = tl.constexpr(MIN_SINE_OF_ALL)
PI = tl.constexpr(3.14159265358979323846)


@triton.jit
def sine(a):
    return tl.sqrt(tl.maximum((1.0 - a) * (1.0 + a), MIN_SINE * MIN_SINE))


@triton.jit
def cos_of_sum(a, m):
    return a * tl.cos(m) - sine(a) * tl.sin(m)


@triton.jit
def acos(x):
    """Abramowitz and Stegun 4.4.46, error below 2e-8, mirrored for negative x."""
    y = tl.minimum(tl.abs(x), 1.0)
    p = -0.0012624911
    p = p * y + 0.0066700901
    p = p * y - 0.0170881256
    p = p * y + 0.0308918810
    p = p * y - 0.0501743046
    p = p * y + 0.0889789874
    p = p * y - 0.2145988016
    p = p * y + 1.5707963050
    angle = tl.sqrt(1.0 - y) * p
    return tl.where(x < 0, PI - angle, angle)


@triton.jit
def arc(a, m, easy):
    """Psi and its slope of ArcFace."""
    cos_m, sin_m = tl.cos(m), tl.sin(m)
    s = sine(a)
    inside = a > tl.where(easy != 0, 0.0, -cos_m)
    value = tl.where(inside, a * cos_m - s * sin_m, tl.where(easy != 0, a, a - m * sin_m))
    inner = tl.where(s > MIN_SINE, cos_m + a * sin_m / s, cos_m)
    return value, tl.where(inside, inner, 1.0)


@triton.jit
def combined(a, m1, m2, m3, annealing, hold):
    angle = acos(a) * m1 + m2
    turn = tl.where((angle < 0) | ((hold != 0) & (angle > PI)), 0.0, m1)
    angle = tl.maximum(angle, 0.0)
    angle = tl.where(hold != 0, tl.minimum(angle, PI), angle)
    k = tl.where(hold != 0, 0.0, tl.floor(angle / PI))
    sign = 1.0 - 2.0 * (k - 2.0 * tl.floor(k / 2.0))
    value = sign * tl.cos(angle) - 2.0 * k - m3
    slope = sign * tl.sin(angle) * turn / sine(a)
    return (annealing * a + value) / (annealing + 1.0), (annealing + slope) / (annealing + 1.0)


@triton.jit
def target_margin(a, hard_mean, p0, p1, p2, p3, p4, p5, KIND: tl.constexpr):
    """psi(a) and psi'(a)."""
    value, slope = a, a * 0.0 + 1.0
    if KIND == AM:
        value = a - p0
    elif (KIND == ARC) or (KIND == CURRICULAR) or (KIND == ARC_NEG):
        value, slope = arc(a, p0, p1 if KIND == ARC else p1 * 0.0)
    elif KIND == COMBINED:
        value, slope = combined(a, p0, p1, p2, p3, p4)
    elif KIND == MV:
        of_arc, slope_of_arc = arc(a, p0, p3)
        value = tl.where(p2 != 0, of_arc, tl.where((p3 != 0) & (a <= p0), a, a - p0))
        slope = tl.where(p2 != 0, slope_of_arc, 1.0)
    elif KIND == NPC:
        value, slope = arc(a, tl.minimum(tl.maximum(p0 + p1 * hard_mean, 0.0), PI), p5)
    elif KIND == CIRCLE:
        slope = tl.maximum(1.0 + p0 - a, 0.0)
        value = slope * (a - (1.0 - p0))
    return value, slope


@triton.jit
def phi_row(a, p0, p1, p2, p3, p4, p5, KIND: tl.constexpr):
    """What phi needs to know about a probe: four numbers."""
    r0, r1, r2, r3 = a * 0.0, a * 0.0, a * 0.0, a * 0.0
    if KIND == MV:
        r0 = tl.where(p2 != 0, cos_of_sum(a, p0), a - p0)
        r2 += p1
        r3 += p1 - 1.0
    elif KIND == CURRICULAR:
        r0 = cos_of_sum(a, p0)
        r1 += 1.0
        r2 += p1
    elif KIND == NPC:
        r0 = cos_of_sum(a, p4)
        r2 += p2
        r3 += p3
    elif KIND == CIRCLE:
        r0 += p0
    elif KIND == ARC_NEG:
        r0, _ = arc(a, p0, p0 * 0.0)
        r1 += p1
        r2 += -1.0 / p2
    return r0, r1, r2, r3


@triton.jit
def phi(c, r0, r1, r2, r3, KIND: tl.constexpr):
    """phi(c) and its slope; the weights of Circle loss and ArcNegFace are constants to the gradient."""
    value, slope = c, c * 0.0 + 1.0
    if (KIND == MV) or (KIND == CURRICULAR) or (KIND == NPC):
        hard = c > r0
        value = tl.where(hard, (r1 * c + r2) * c + r3, c)
        slope = tl.where(hard, 2.0 * r1 * c + r2, 1.0)
    elif KIND == CIRCLE:
        slope = tl.where(c + r0 < 0, 0.0, c + r0)
        value = slope * (c - r0)
    elif KIND == ARC_NEG:
        slope = r1 * tl.exp((c - r0) * (c - r0) * r2)
        value = slope * c + slope - 1.0
    return value, slope


@triton.jit
def phi_is_identity(KIND: tl.constexpr):
    """Whether the margin leaves the other slots' cosines alone: then the largest logit is that of the largest cosine."""
    return (KIND == SOFTMAX) or (KIND == AM) or (KIND == ARC) or (KIND == COMBINED)


@triton.jit
def needs_hard_mean(KIND: tl.constexpr):
    """Whether psi takes the mean cosine of the probe's hard slots."""
    return KIND == NPC
