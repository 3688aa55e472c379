"""Bidirectional prefix softmax in blocks, whose backward pass is its own, against the dense formula and autograd."""

import pytest
import torch

from hf_linear_attn.ops.prefix.full_blocks import context_block_attention
from hf_linear_attn.ops.prefix.shares import ShareInputs
from tests.ops.references import naive_prefix_softmax

F64 = torch.float64


@pytest.mark.parametrize("scale", [1.0, 300.0])  # maxima that move from block to block
@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
@pytest.mark.parametrize("queries", [50, 21])
def test_outputs_and_gradients(queries, padded, scale, small_blocks):
    g = torch.Generator().manual_seed(queries)
    q, k, v = (torch.randn(2, 3, n, 4, generator=g, dtype=F64) for n in (queries, 50, 50))
    weight, key_weight = torch.randn(2, 3, 5, 4, generator=g, dtype=F64)
    bias, mask = torch.randn(3, 5, generator=g, dtype=F64), None
    if padded:
        mask = torch.rand(2, 50, generator=g) < 0.6
        mask[0, :20] = False  # a block without a key comes first
    query_mask = mask if queries == 50 else None
    inputs = [x.requires_grad_() for x in (q, k * scale, v, weight, bias, key_weight)]
    output = context_block_attention(ShareInputs(*inputs[:3], mask, query_mask, *inputs[3:]))
    expected = naive_prefix_softmax(
        *inputs[:3],
        query_weight=inputs[3],
        query_bias=inputs[4],
        key_weight=inputs[5],
        token_mask=mask,
        is_causal=False,
    )
    torch.testing.assert_close(output, expected)
    found, exact = (torch.autograd.grad(x.square().sum(), inputs) for x in (output, expected))
    for actual, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_sequences_without_a_key_are_0():
    x = torch.randn(2, 3, 9, 4, dtype=F64).requires_grad_()
    mask = torch.tensor([[True], [False]]).expand(2, 9)
    output = context_block_attention(ShareInputs(x, x, x, mask, mask, None, None, None))
    assert not output[1].any()
    output.square().sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()
