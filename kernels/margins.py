"""The margins in Triton: the one place of this language that knows their formulas. ``sst_fast/margins.py`` explains them and
``csrc/margin.h`` is the counterpart for the CPU; ``KIND`` is the number all three share."""

import math

import triton
import triton.language as tl

from sst_fast.margins import ADAFACE_EPSILON, ARC_RULES, COMBINED_RULES, KINDS
from sst_fast.margins import MIN_SINE as MIN_SINE_OF_ALL

SOFTMAX, AM, ARC, COMBINED, MV, CURRICULAR, NPC, CIRCLE, ARC_NEG, FILTERED = (
    tl.constexpr(kind) for kind in range(len(KINDS))
)
LINEAR, EASY, COSINE, OFFSET = (tl.constexpr(float(rule)) for rule in range(len(ARC_RULES)))
FALL, HOLD, RISE, CLAMP = (tl.constexpr(float(rule)) for rule in range(len(COMBINED_RULES)))  # RISE: "cosine"

MIN_SINE = tl.constexpr(MIN_SINE_OF_ALL)
MOST = tl.constexpr(1.0 - ADAFACE_EPSILON)
MOST_SINE = tl.constexpr(math.sqrt(1.0 - (1.0 - ADAFACE_EPSILON) ** 2))
EPSILON = tl.constexpr(ADAFACE_EPSILON)
PI = tl.constexpr(3.14159265358979323846)


@triton.jit
def cos_of_sum(a, sine, m):
    return a * tl.cos(m) - sine * tl.sin(m)


# Of a number and a constant, a choice (tl.where) between two constants included, Triton makes float32: where float64 is to stay exact, such a
# constant meets a tensor first.


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
def angle_of(cosine, sine):
    """The angle whose cosine and sine are given: by polynomials, and then exactly, one step of Newton's from there."""
    square = sine * sine
    small = sine * (1.0 + square * (0.16666667 + square * (0.075 + square * 0.044642857)))
    near = tl.where(sine < 0.1, tl.where(cosine < 0, PI - small, small), acos(cosine))
    return near + (sine * tl.cos(near) - cosine * tl.sin(near))


@triton.jit
def arc(a, sine, m, rule, offset):
    """Psi and its slope of ArcFace."""
    cos_m, sin_m = tl.cos(m), tl.sin(m)
    rule = a * 0.0 + rule  # a number would make a Python truth of the comparisons
    easy = rule == EASY
    inside = (rule == COSINE) | (a > tl.where(easy, 0.0, -cos_m))
    outside = tl.where(easy, a, a - tl.where(rule == OFFSET, offset, m * sin_m))
    value = tl.where(inside, a * cos_m - sine * sin_m, outside)
    across = tl.where(sine > 0, sine, 1.0)
    inner = cos_m + tl.where(sine > 0, a * sin_m / across, 0.0)
    return value, tl.where(inside, inner, 1.0)


@triton.jit
def combined(a, sine, m1, m2, m3, rule):
    """cos(m1 theta + m2) - m3 and its slope."""
    rule = a * 0.0 + rule  # a number would make a Python truth of the comparisons
    length = tl.sqrt(a * a + sine * sine)
    forward = a * 0.0 + tl.where(a < 0, -1.0, 1.0)
    held = (rule == CLAMP) & (tl.abs(a) > MOST)
    hypotenuse = tl.where(length > 0, length, 1.0)
    theta = angle_of(tl.where(held, forward * MOST, a / hypotenuse), tl.where(held, MOST_SINE, sine / hypotenuse))
    angle = theta * m1 + m2
    low = tl.where(rule == CLAMP, EPSILON, rule * 0.0)
    high = low * -1.0 + PI  # in this order: Triton 3.8's interpreter takes no tensor from a constant
    below = (rule != RISE) & (angle < low)
    above = ((rule == HOLD) | (rule == CLAMP)) & (angle > high)
    turn = tl.where(held | below | above, 0.0, m1)
    angle = tl.where(below, low, tl.where(above, high, angle))
    k = tl.where(rule == FALL, tl.floor(angle / PI), 0.0)
    sign = 1.0 - 2.0 * (k - 2.0 * tl.floor(k / 2.0))
    value = length * (sign * tl.cos(angle) - 2.0 * k) - m3
    across = tl.where(sine > 0, sine, 1.0)
    slope = tl.where(sine > 0, length * tl.sin(angle) / across, m1 * forward * tl.cos(angle))
    return value, sign * slope * turn


@triton.jit
def target_margin(a, sine, hard_mean, p0, p1, p2, p3, p4, p5, KIND: tl.constexpr):
    """psi(a) and psi'(a); ``sine``: the length of what the target has across the probe."""
    value, slope = a, a * 0.0 + 1.0
    sine = tl.where(sine < MIN_SINE, 0.0, sine)
    if KIND == AM:
        value = a - p0
    elif KIND == ARC:
        value, slope = arc(a, sine, p0, p1, p2)
    elif (KIND == CURRICULAR) or (KIND == ARC_NEG):
        value, slope = arc(a, sine, p0, p1 * 0.0 + LINEAR, p2 * 0.0)
    elif KIND == COMBINED:
        value, slope = combined(a, sine, p0, p1, p2, p4)
        value, slope = (p3 * a + value) / (p3 + 1.0), (p3 + slope) / (p3 + 1.0)
    elif KIND == FILTERED:
        value, slope = combined(a, sine, p0, p1, p2, p3)
    elif KIND == MV:
        of_arc, slope_of_arc = arc(a, sine, p0, LINEAR + (EASY - LINEAR) * tl.minimum(tl.abs(p3), 1.0), p3 * 0.0)
        value = tl.where(p2 != 0, of_arc, tl.where((p3 != 0) & (a <= p0), a, a - p0))
        slope = tl.where(p2 != 0, slope_of_arc, 1.0)
    elif KIND == NPC:
        m = tl.minimum(tl.maximum(p0 + p1 * hard_mean, 0.0), hard_mean * 0.0 + PI)
        value, slope = arc(a, sine, m, LINEAR + (EASY - LINEAR) * tl.minimum(tl.abs(p5), 1.0), p5 * 0.0)
    elif KIND == CIRCLE:
        slope = tl.maximum(1.0 + p0 - a, 0.0)
        value = slope * (a - (1.0 - p0))
    return value, slope


@triton.jit
def phi_row(a, sine, p0, p1, p2, p3, p4, p5, KIND: tl.constexpr):
    """What phi needs to know about a probe: four numbers."""
    r0, r1, r2, r3 = a * 0.0, a * 0.0, a * 0.0, a * 0.0
    if KIND == MV:
        r0 = tl.where(p2 != 0, cos_of_sum(a, sine, p0), a - p0)
        r2 += p1
        r3 += p1 - 1.0
    elif KIND == CURRICULAR:
        r0 = cos_of_sum(a, sine, p0)
        r1 += 1.0
        r2 += p1
    elif KIND == NPC:
        r0 = cos_of_sum(a, sine, p4)
        r2 += p2
        r3 += p3
    elif KIND == CIRCLE:
        r0 += p0
    elif KIND == ARC_NEG:
        r0, _ = arc(a, sine, p0, p0 * 0.0 + LINEAR, p0 * 0.0)
        r1 += p1
        r2 += -1.0 / p2
    elif KIND == FILTERED:
        r0 += p4
        r3 += p5
    return r0, r1, r2, r3


@triton.jit
def phi(c, r0, r1, r2, r3, KIND: tl.constexpr):
    """phi(c) and its slope; the weights of Circle loss and ArcNegFace are constants to the gradient."""
    value, slope = c, c * 0.0 + 1.0
    if (KIND == MV) or (KIND == CURRICULAR) or (KIND == NPC) or (KIND == FILTERED):
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
def largest_phi(r0, r1, r2, r3, KIND: tl.constexpr):
    """The most that phi can be for cosines up to 1."""
    most = r0 * 0.0 + 1.0
    if (KIND == MV) or (KIND == CURRICULAR) or (KIND == NPC) or (KIND == FILTERED):
        most = tl.maximum(most, r1 + r2 + r3)
    elif KIND == CIRCLE:
        most = 1.0 - r0 * r0
    elif KIND == ARC_NEG:
        most = 2.0 * r1 - 1.0
    return most


@triton.jit
def phi_is_identity(KIND: tl.constexpr):
    """Whether the margin leaves the other slots' cosines alone: then the largest logit is that of the largest cosine."""
    return (KIND == SOFTMAX) or (KIND == AM) or (KIND == ARC) or (KIND == COMBINED)


@triton.jit
def needs_hard_mean(KIND: tl.constexpr):
    """Whether psi takes the mean cosine of the probe's hard slots."""
    return KIND == NPC
