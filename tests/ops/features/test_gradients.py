"""Quotients and their gradients, and maps that are computed again."""

import pytest
import torch

from hf_linear_attn.ops.base.numerics import TINY
from hf_linear_attn.ops.features import gradients
from hf_linear_attn.ops.features.maps import ParametricMap

F64 = torch.float64


def draw():
    g = torch.Generator().manual_seed(0)
    numerator = torch.randn(2, 3, 7, 4, generator=g, dtype=F64)
    denominator = torch.randn(2, 3, 7, generator=g, dtype=F64)  # of both signs, as Fourier features have
    denominator[0, 0, :2] = torch.tensor([0.0, -TINY / 9])
    return numerator, denominator


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_denominators_are_kept_away_from_0_with_their_signs(dtype):
    numerator, denominator = (x.to(dtype) for x in draw())
    output = torch.empty(2, 7, 3, 4, dtype=dtype).transpose(1, 2)
    gradients.divide_into(output, numerator, denominator)
    safe = denominator.clone()
    safe[0, 0, :2] = torch.tensor([TINY, -TINY])
    torch.testing.assert_close(output, numerator / safe[..., None])


@pytest.mark.parametrize("given", ["output", "log", "both"])
def test_gradients_of_a_quotient_and_of_its_log_denominator(given):
    numerator, denominator = draw()
    denominator[0, 0, :2] = 1.0
    rows, g = slice(2, 7), torch.Generator().manual_seed(1)
    d_output = torch.randn(2, 3, 7, 4, generator=g, dtype=F64) if given != "log" else None
    d_log = torch.randn(2, 3, 5, generator=g, dtype=F64) if given != "output" else None
    inputs = [numerator[:, :, rows].clone().requires_grad_(), denominator[:, :, rows].clone().requires_grad_()]
    output = inputs[0] / inputs[1][..., None]
    loss = 0.0 if d_output is None else (output * d_output[:, :, rows]).sum()
    if d_log is not None:  # rows with a negative denominator have no log
        loss = loss + (inputs[1].clamp(min=TINY).log() * d_log).sum()
    expected = torch.autograd.grad(loss, inputs, allow_unused=True)
    whole = numerator / denominator[..., None]
    found = gradients.quotient_backward(d_output, whole, denominator[:, :, rows], d_log, rows)
    for actual, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, torch.zeros_like(actual) if exact is None else exact)


def test_a_denominator_that_was_kept_away_from_0_is_a_constant():
    numerator, denominator = draw()
    output = torch.zeros_like(numerator)
    _, d_den = gradients.quotient_backward(torch.ones_like(output), output, denominator, None, slice(0, 7))
    assert d_den.isfinite().all()
    assert not d_den[0, 0, :2].any()


def test_parameters_get_the_sum_over_blocks_and_inputs_theirs():
    weight = torch.randn(4, 4, dtype=F64).requires_grad_()
    x = torch.randn(1, 1, 6, 4, dtype=F64)
    expected = torch.autograd.grad((x @ weight).square().sum(), weight)[0]
    collected, leaves = gradients.MapGradients((weight,)), (gradients.leaf(weight),)
    for now in (slice(0, 2), slice(2, 6)):
        inputs = [gradients.leaf(x[:, :, now], False)]
        output = inputs[0] @ leaves[0]
        (change,) = collected.through((output, None), (2 * output.detach(), None), inputs, leaves)
        assert not change.any()  # it does not train
    torch.testing.assert_close(collected.parameters[0], expected)


def test_what_trains_without_a_name_is_found():
    hidden, x = torch.ones(4).requires_grad_(), torch.zeros(1, 1, 3, 4)
    named = ParametricMap(lambda x, w: (x * w, None), (hidden,))
    unnamed = ParametricMap(lambda x: (x * hidden, None))
    assert not gradients.trains_unnamed((named, x))
    assert gradients.trains_unnamed((named, x), (unnamed, x))
    with torch.no_grad():
        assert not gradients.trains_unnamed((unnamed, x))
