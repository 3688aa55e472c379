"""Prefix softmax in blocks, whose backward pass is its own, against autograd."""

import pytest
import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.ops.prefix import blocks
from hf_linear_attn.ops.prefix.attention import prefix_softmax_attention
from tests.ops.references import naive_prefix_softmax

F64 = torch.float64


@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
@pytest.mark.parametrize("rise", [1.0, 30.0, 300.0])
def test_prefix_softmax_whose_maxima_rise(rise, padded, small_blocks):
    """Blocks of one pass and of several, outputs and gradients, fewer queries than keys."""
    q, k, v = torch.randn(3, 2, 2, 40, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    k = k * rise
    padding = None
    if padded:
        padding = torch.ones(2, 40, dtype=torch.bool)
        padding[0, :3], padding[1, 38:], padding[1, 5] = False, False, False
    inputs = [x.detach().requires_grad_() for x in (q[:, :, 19:], k, v)]
    results = []
    for attend in (lambda *x, **o: prefix_softmax_attention(*x, **o)[0], naive_prefix_softmax):
        output = attend(*inputs, token_mask=padding, is_causal=True)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_passes_cover_the_rows_once_and_split_at_rises():
    power = torch.zeros(1, 2, 12, 3)
    start = torch.full((1, 2, 3), LOG_ZERO)
    assert blocks._passes(power, start, False) == [slice(0, 12)]
    power[0, 1, 7, 2], power[0, 0, 9, 0] = 50.0, 90.0
    assert blocks._passes(power, start, False) == [slice(0, 7), slice(7, 9), slice(9, 12)]
