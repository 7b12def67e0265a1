"""Every margin: Python and C++ state the same formula, slopes are slopes, parameters are checked."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import MARGINS

from sst_fast.backends.extension import compiled
from sst_fast.margins import (
    COMBINED_RULES,
    FUSED,
    KINDS,
    AdaFace,
    AMSoftmax,
    ArcSoftmax,
    CombinedMargin,
    FilteredMargin,
    MagFace,
    Margin,
    MVSoftmax,
    NPCFace,
    SphereFace,
)  # fmt: skip

EXAMPLES = [
    *MARGINS, AMSoftmax(0.0), ArcSoftmax(2.0), ArcSoftmax(0.5, beyond="cosine"), ArcSoftmax(0.5, beyond=0.1),
    *(CombinedMargin(1.2, -0.4, 0.1, 0.0, rule) for rule in COMBINED_RULES), SphereFace(1.7, annealing=0.0),
    CombinedMargin(2.0, 0.3, beyond="hold"), MVSoftmax(positive_only=True), MVSoftmax(0.5, 1.1, True, True),
    NPCFace(positive_only=True), FilteredMargin(1.0, -0.2, 0.3, "clamp", 0.999, 0.999),
]  # fmt: skip

needs_extension = pytest.mark.skipif(compiled is None, reason="the extension was not built")


def sine_of(a: float, length: float = 1.0) -> float:
    """Of the angle that a target row of this length makes where its cosine with the probe is ``a``."""
    return math.sqrt(max(length**2 - a**2, 0.0))


def with_slope(function, x: float) -> tuple[float, float]:
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = function(leaf)
    (slope,) = torch.autograd.grad(value, leaf)
    return value.item(), slope.item()


def slope(margin: Margin, a: float) -> float:
    return with_slope(margin.psi, a)[1]


COSINES = st.floats(-1, 1) | st.sampled_from([-1.0, 1.0, 0.0, 1 - 1e-7, 1 - 4.9e-7, 1 - 5.1e-7])


@needs_extension
@pytest.mark.parametrize("margin", EXAMPLES, ids=repr)
@given(a=COSINES, c=COSINES, hard_mean=st.floats(-1, 1), length=st.sampled_from([1.0, 1.0, 0.99, 1.003]))
def test_cpp_agrees_with_python(margin, a, c, hard_mean, length):
    sine = sine_of(a, length)
    psi, psi_slope, phi, phi_slope = compiled.margin(margin.kind, margin.parameters(), a, sine, c, hard_mean)
    mean, own, sine = (torch.tensor(x, dtype=torch.float64) for x in (hard_mean, a, sine))
    expected = (
        *with_slope(lambda x: margin.psi(x, mean, sine), a),
        *with_slope(lambda x: margin.phi(x, own, sine) + 0 * x, c),
    )
    assert (psi, psi_slope, phi, phi_slope) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@needs_extension
def test_every_margin_is_compiled_and_tested():
    assert tuple(compiled.kinds) == KINDS
    assert sorted(FUSED) == list(range(len(KINDS)))
    assert {margin.kind for margin in EXAMPLES} == set(FUSED)


@given(a=st.floats(-0.999, 0.999))
def test_special_cases_of_the_combined_margin(a):
    """Against the plain margins, which share no code with it."""
    a = torch.tensor(a, dtype=torch.float64)
    assert CombinedMargin(1.0, 0.0, 0.35).psi(a).item() == pytest.approx(AMSoftmax(0.35).psi(a).item())
    if math.acos(a) + 0.5 < math.pi:
        assert CombinedMargin(1.0, 0.5, 0.0).psi(a).item() == pytest.approx(ArcSoftmax(0.5).psi(a).item())
    k = math.floor(4 * math.acos(a) / math.pi)
    expected = (-1) ** k * math.cos(4 * math.acos(a)) - 2 * k
    assert SphereFace(4.0, annealing=0.0).psi(a).item() == pytest.approx(expected, abs=1e-9)
    assert SphereFace(4.0, annealing=3.0).psi(a).item() == pytest.approx((3 * a.item() + expected) / 4, abs=1e-9)


def test_magface_and_adaface_depend_on_the_norm():
    norm = torch.tensor([5.0, 60.0, 200.0])
    assert torch.allclose(MagFace().for_batch(norm).margin, torch.tensor([0.45, 0.625, 0.8]))
    assert torch.allclose(MagFace().penalty(torch.tensor([60.0])), torch.tensor([20 * (60 / 12100 + 1 / 60)]))
    fused = AdaFace(mean=20.0, std=10.0).for_batch(torch.tensor([20.0, 100.0, 1.0]))
    quality = torch.tensor([0.0, 1.0, -0.333 * 19 / 10.001])
    assert torch.allclose(fused.m2, -0.4 * quality)
    assert torch.allclose(fused.m3, 0.4 + 0.4 * quality)


@given(a=st.floats(-0.99, 0.99), m=st.floats(0, 1.5))
def test_arc_is_the_cosine_of_the_widened_angle(a, m):
    theta = math.acos(a)
    if theta + m < math.pi - 1e-3:
        assert ArcSoftmax(m).psi(torch.tensor(a, dtype=torch.float64)).item() == pytest.approx(math.cos(theta + m))


@given(a=st.floats(-0.999, 0.999), length=st.sampled_from([0.99, 1.003]), margin=st.sampled_from(EXAMPLES))
def test_psi_of_a_row_that_is_no_unit_row(a, length, margin):
    """Nothing jumps: psi is near that of the unit row in the same direction."""
    values = [
        margin.psi(torch.tensor(r * a, dtype=torch.float64), None, torch.tensor(sine_of(r * a, r), dtype=torch.float64))
        for r in (1.0, length)
    ]
    jumps = min(abs(a - x) for x in (0.0, 0.999, *(-math.cos(m) for m in (0.4, 0.5, 2.0)), 0.35))  # where rules change
    if jumps > 0.02:
        assert (values[0] - values[1]).abs() <= 0.2


@given(a=st.floats(-1, 1), m=st.floats(0, math.pi))
def test_rules_beyond_pi(a, m):
    theta = math.acos(a)
    cosine = torch.tensor(a, dtype=torch.float64)
    assert ArcSoftmax(m, beyond="cosine").psi(cosine).item() == pytest.approx(math.cos(theta + m), abs=1e-7)
    assert CombinedMargin(1.0, m, 0.0, beyond="cosine").psi(cosine).item() == pytest.approx(
        math.cos(theta + m), abs=1e-7
    )
    if abs(theta + m - math.pi) > 1e-6:
        expected = math.cos(theta + m) if theta + m < math.pi else a - 0.3
        assert ArcSoftmax(m, beyond=0.3).psi(cosine).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("margin", EXAMPLES, ids=repr)
def test_slope_is_finite_at_the_ends(margin):
    for a in (-1.0, 1.0, 1 + 1e-7):
        assert math.isfinite(slope(margin, a))


@pytest.mark.parametrize(
    ("margin", "value"), [(AMSoftmax, -0.1), (AMSoftmax, 2.1), (ArcSoftmax, 4.0), (ArcSoftmax, math.nan)]
)
def test_bad_parameters_are_named(margin, value):
    with pytest.raises(ValueError, match=rf"{margin.__name__}: margin must be .*got"):
        margin(value)
    for tensor in (torch.tensor(value), torch.tensor([0.1, value])):
        with pytest.raises(ValueError, match=rf"{margin.__name__}: margin must be .*got"):
            margin(tensor).check_values()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: MVSoftmax(t=torch.tensor(1.1, requires_grad=True)),
            r"t must not require a gradient.*trainable: margin",
        ),
        (lambda: NPCFace(m0=torch.tensor(0.3, requires_grad=True)), r"m0 must not require a gradient.*trainable: none"),
        (lambda: ArcSoftmax(0.5, beyond="linaer"), "ArcSoftmax: beyond must be .*got 'linaer'"),
        (lambda: MagFace(beyond=-1.0), "MagFace: beyond must be .*got -1.0"),
        (lambda: CombinedMargin(beyond=True), "CombinedMargin: beyond must be one of .*got True"),
        (lambda: AMSoftmax("0.35"), "AMSoftmax: margin must be .*got '0.35'"),
        (lambda: AdaFace(t_alpha=1.5), r"AdaFace: t_alpha must be a share in \[0, 1\], got 1.5"),
    ],
)
def test_bad_rules_and_gradients_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_of_numpy_are_numbers():
    for number in (np.float32(0.5), np.float64(0.5), np.int64(1)):
        margin = ArcSoftmax(number)
        assert type(margin.margin) is float
        assert margin == ArcSoftmax(float(number))
