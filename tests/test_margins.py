"""Every margin: Python and C++ state the same formula, slopes are slopes, parameters are checked."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sst_fast import AMSoftmax, ArcSoftmax, Margin, Softmax
from sst_fast.dispatch import compiled
from sst_fast.margins import MARGINS

EXAMPLES = [Softmax(), AMSoftmax(0.35), AMSoftmax(0.0), ArcSoftmax(0.5), ArcSoftmax(0.5, easy=True), ArcSoftmax(2.0)]

needs_extension = pytest.mark.skipif(compiled is None, reason="the extension was not built")


def slope(margin: Margin, a: float) -> float:
    leaf = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(margin.psi(leaf), leaf)[0].item()


@needs_extension
@pytest.mark.parametrize("margin", EXAMPLES, ids=repr)
@given(a=st.floats(-1, 1) | st.sampled_from([-1.0, 1.0, 0.0, 1 - 1e-7, 1 - 4.9e-7, 1 - 5.1e-7]))
def test_cpp_agrees_with_python(margin, a):
    value, derivative = compiled.target_margin(margin.kind, margin.parameters(), a)
    assert value == pytest.approx(margin.psi(torch.tensor(a, dtype=torch.float64)).item(), rel=1e-12, abs=1e-12)
    assert derivative == pytest.approx(slope(margin, a), rel=1e-9, abs=1e-9)


@needs_extension
def test_every_margin_has_a_compiled_kind():
    assert sorted(MARGINS) == list(range(compiled.kinds))
    assert {type(margin) for margin in EXAMPLES} == set(MARGINS.values())


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
