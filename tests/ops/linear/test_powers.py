"""Weights of keys as powers of two, of any spread."""

import pytest
import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.ops.linear import powers
from hf_linear_attn.ops.linear.attention import linear_attention
from tests.ops.references import naive_linear_attention

F64 = torch.float64


@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
@pytest.mark.parametrize("rise", [0.0, 15.0, 60.0, 400.0])
def test_weights_that_rise_inside_a_block(rise, padded, small_blocks):
    """Outputs and gradients where one P serves a block, and where it does not."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 30, 4, generator=g, dtype=F64)
    q, k = q.abs(), k.abs()
    weight = torch.linspace(-rise, rise, 30, dtype=F64).expand(2, 2, -1) + torch.randn(2, 2, 30, generator=g, dtype=F64)
    padding = None
    if padded:
        padding = torch.ones(2, 30, dtype=torch.bool)
        padding[0, :3], padding[1, 28:], padding[1, 5] = False, False, False
    inputs = [x.detach().requires_grad_() for x in (q, k, v, weight)]
    results = []
    for attend in (lambda *a, **o: linear_attention(*a, **o)[0], naive_linear_attention):
        output = attend(*inputs[:3], key_log_weight=inputs[3], token_mask=padding, is_causal=True)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_steep_block_is_found():
    power = torch.zeros(1, 1, 8)
    start = torch.full((1, 1), LOG_ZERO)
    assert not powers._rows(power, start)[1]
    power[..., 5] = 100.0
    assert powers._rows(power, start)[1]
    power[..., :5] = LOG_ZERO  # nothing to see: no row sees less
    seen, steep = powers._rows(power[..., :6], start)
    assert seen.flatten().tolist() == [False] * 5 + [True]
    assert not steep
