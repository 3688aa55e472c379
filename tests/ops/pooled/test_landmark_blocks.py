"""Norms and landmarks block by block, beside the same in one pass over the whole sequence."""

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.ops.pooled import landmark_blocks
from hf_linear_attn.ops.pooled.landmarks import pool_landmarks

B, H, D, R = 2, 3, 5, 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 64 tokens."""
    monkeypatch.setattr(landmark_blocks, "BLOCK_ELEMENTS", 1)


def tensors(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, inputs, weights)


@pytest.mark.parametrize("length", [1, 64, 131])
def test_norm_and_its_gradients(length):
    x, gate, weight, bias = inputs = tensors((B, H, length, D), (H,), (H, D), (H, D))
    dense = x + gate[:, None, None] * (F.layer_norm(x, (D,)) * weight[:, None] + bias[:, None] - x)
    out = landmark_blocks.norm_by_blocks(*inputs)
    torch.testing.assert_close(out, dense)
    for got, expected in zip(gradients([out], inputs), gradients([dense], inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_norm_gives_gradients_to_what_asks_for_them():
    x, gate, weight, bias = tensors((B, H, 130, D), (H,), (H, D), (H, D))
    expected = gradients([landmark_blocks.norm_by_blocks(x, gate, weight, bias)], [weight])[0]
    out = landmark_blocks.norm_by_blocks(x.detach(), gate.detach(), weight, bias.detach())
    torch.testing.assert_close(gradients([out], [weight])[0], expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 64, 131])
def test_pool_and_its_gradients(length, masked):
    inputs = tensors((B, H, length, D), (B, H, length, D), (H, D, R))
    allowed = torch.ones(B, H, length, R, dtype=torch.bool)
    if masked:
        allowed = torch.rand(allowed.shape, generator=torch.Generator().manual_seed(2)) < 0.5
        allowed[0, :, :100] = False  # the first block has nothing for any landmark
        allowed[1, 1, :, 2] = False  # a landmark without any token
    results = []
    for pool in (landmark_blocks.pool_by_blocks, pool_landmarks):
        keys, values, entropy = pool(*inputs, allowed)
        results.append((keys, values, entropy.where(allowed.any(2), 0)))  # that of no token means nothing
    found, dense = results
    for got, expected in zip(found, dense, strict=True):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(gradients(found, inputs), gradients(dense, inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_pool_in_bfloat16_keeps_sums_in_float32():
    inputs = tensors((B, H, 1000, D), (B, H, 1000, D), (H, D, R))
    allowed = torch.ones(1, 1, 1000, 1, dtype=torch.bool)
    low = [x.detach().bfloat16() for x in inputs]
    found = landmark_blocks.pool_by_blocks(*low, allowed)
    dense = pool_landmarks(*(x.double() for x in low), allowed)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for got, expected in zip(found, dense, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)
