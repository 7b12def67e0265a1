"""Every margin: Python and C++ state the same formula, slopes are slopes, parameters are checked."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import MARGINS

from sst_fast.backends.extension import compiled
from sst_fast.margins import (
    FUSED,
    KINDS,
    AdaFace,
    AMSoftmax,
    ArcSoftmax,
    CombinedMargin,
    MagFace,
    Margin,
    MVSoftmax,
    NPCFace,
    SphereFace,
)  # fmt: skip

EXAMPLES = [
    *MARGINS, AMSoftmax(0.0), ArcSoftmax(2.0), CombinedMargin(1.2, -0.4, 0.1, 0.0, True), SphereFace(1.7, annealing=0.0),
    MVSoftmax(positive_only=True), MVSoftmax(0.5, 1.1, True, True), NPCFace(positive_only=True),
]  # fmt: skip

needs_extension = pytest.mark.skipif(compiled is None, reason="the extension was not built")


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
@given(a=COSINES, c=COSINES, hard_mean=st.floats(-1, 1))
def test_cpp_agrees_with_python(margin, a, c, hard_mean):
    psi, psi_slope, phi, phi_slope = compiled.margin(margin.kind, margin.parameters(), a, c, hard_mean)
    mean = torch.tensor(hard_mean, dtype=torch.float64)
    expected = (
        *with_slope(lambda x: margin.psi(x, mean), a),
        *with_slope(lambda x: margin.phi(x, torch.tensor(a, dtype=torch.float64)) + 0 * x, c),
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
