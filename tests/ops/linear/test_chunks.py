"""Causal sums in chunks, forward and backward, against products with n x n weights and autograd."""

import pytest
import torch

from hf_linear_attn.ops.linear import chunks

F64 = torch.float64
LENGTH, CHUNK, FEATURES, DIM = 21, 4, 5, 3  # six chunks, the last one of a single token


def draw():
    g = torch.Generator().manual_seed(0)
    q, k = torch.rand(2, 2, 3, LENGTH, FEATURES, generator=g, dtype=F64)
    v = torch.randn(2, 3, LENGTH, DIM, generator=g, dtype=F64)
    kv, z = torch.randn(2, 3, FEATURES, DIM, generator=g, dtype=F64), torch.rand(2, 3, FEATURES, generator=g, dtype=F64)
    return [x.requires_grad_() for x in (q, k, v, kv, z)]


def dense(q, k, v, kv, z, left=None):
    """`left`, `[B, H, N + 1, F or 1]`: what is left of the sums at the borders of the chunks."""
    chunk = torch.arange(LENGTH) // CHUNK
    left = torch.ones(2, 3, int(chunk[-1]) + 2, 1, dtype=F64) if left is None else left
    passed = left.log().cumsum(2)  # after border n
    between = (passed[:, :, chunk][:, :, :, None] - passed[:, :, chunk][:, :, None]).exp()  # [B, H, i, j, F or 1]
    weight = between * torch.ones(LENGTH, LENGTH, dtype=F64).tril()[..., None]
    scores = (q[..., :, None, :] * k[..., None, :, :] * weight).sum(-1)
    start = q * passed[:, :, chunk].exp()
    at_end = k * (passed[:, :, -1:] - passed[:, :, chunk]).exp()
    last = passed[:, :, -1].exp()
    return (
        scores @ v + start @ kv,
        scores.sum(-1) + (start * z[:, :, None]).sum(-1),
        at_end.mT @ v + kv * last[..., None],
        at_end.sum(2) + z * last,
    )


@pytest.mark.parametrize("width", [None, 1, FEATURES], ids=["no decay", "one for all features", "per feature"])
@pytest.mark.parametrize("normalized", [True, False])
def test_sums_and_gradients(normalized, width):
    inputs = draw()
    left = None
    if width:
        left = 0.2 + 0.8 * torch.rand(2, 3, 7, width, generator=torch.Generator().manual_seed(1), dtype=F64)
    expected = dense(*inputs, left)
    given = [torch.randn_like(x) for x in expected]
    q, k, v, kv, z = (x.detach() for x in inputs)
    if not normalized:
        z, given[1], given[3] = None, None, None
    found = chunks.causal(q, k, v, kv, z, CHUNK, left)
    pairs = [(x, g) for x, g in zip(expected, given, strict=True) if g is not None]
    wanted = inputs if normalized else inputs[:4]
    gradients = torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs])
    d_num, d_den, d_kv, d_z = given
    back = chunks.causal_backward(q, k, v, kv, z, d_num, d_den, d_kv, d_z, CHUNK, left)
    for actual, exact in zip((*found, *back), (*expected, *gradients), strict=normalized):
        if actual is not None:
            torch.testing.assert_close(actual, exact.detach())


def test_steep_weights_are_the_weighted_sums():
    q, k, v, kv, z = (x.detach() for x in draw())
    power = torch.randint(-60, 60, (2, 3, LENGTH), generator=torch.Generator().manual_seed(1)).double()
    peak = torch.full((2, 3), -5.0, dtype=F64)
    numerator, denominator, row, (after, z_after, last) = chunks.steep(q, k, v, power, kv, z, peak, CHUNK)
    weighted = dense(q, k * power.exp2()[..., None], v, kv * 2.0**-5, z * 2.0**-5)
    for x, scale, expected in zip(
        (numerator, denominator, after, z_after),
        (row[..., None], row, last[..., None, None], last[..., None]),
        weighted,
        strict=True,
    ):
        torch.testing.assert_close(x * scale.exp2(), expected)
