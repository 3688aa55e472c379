"""Shares and logits of blocks, and their gradients, against autograd on the whole."""

import pytest
import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.ops.prefix.shares import ShareGradients, ShareInputs

F64 = torch.float64
BLOCKS = (slice(0, 4), slice(4, 9))


def draw(options):
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 4, generator=g, dtype=F64)
    weight, key_weight = torch.randn(2, 3, 5, 4, generator=g, dtype=F64)
    bias = torch.randn(3, 5 if options == "all" else 4, generator=g, dtype=F64)
    mask = torch.rand(2, 9, generator=g) < 0.7
    q[0, 0, 2] = torch.where(mask[0, 2], q[0, 0, 2], torch.nan)
    weights = {"all": (weight, bias, key_weight), "bias": (None, bias, None), "none": (None, None, None)}[options]
    return ShareInputs(q, k, v, mask, mask, *weights)


def dense(given):
    """Shares, logits and values of all tokens."""
    real = given.token_mask[:, None, :, None]
    q, k, v = (torch.where(real, x, 0.0) for x in (given.q, given.k, given.v))
    a = q if given.query_weight is None else torch.einsum("bhtd,hfd->bhtf", q, given.query_weight)
    a = a if given.query_bias is None else a + given.query_bias[:, None]
    logits = k if given.key_weight is None else torch.einsum("bhtd,hfd->bhtf", k, given.key_weight)
    return a.softmax(-1), logits.masked_fill(~real, LOG_ZERO), v


@pytest.mark.parametrize("options", ["all", "bias", "none"])
def test_blocks_are_those_of_the_whole(options):
    given = draw(options)
    a, logits, v = dense(given)
    for now in BLOCKS:
        torch.testing.assert_close(given.shares(given.queries(now)), a[:, :, now])
        torch.testing.assert_close(given.logits(given.keys(now), now), logits[:, :, now])
        torch.testing.assert_close(given.values(now), v[:, :, now])
    assert given.num_features == logits.shape[-1]


@pytest.mark.parametrize("options", ["all", "bias", "none"])
def test_gradients_are_those_of_autograd(options):
    given = draw(options)
    tensors = [x if x is None or x.dtype == torch.bool else x.requires_grad_() for x in given.arguments()]
    a, logits, v = dense(ShareInputs(*tensors))
    real = given.token_mask[:, None, :, None]
    d_a, d_v, d_logits = torch.randn_like(a), torch.randn_like(v), torch.randn_like(logits) * real
    wanted = [x for x in tensors if x is not None and x.dtype != torch.bool]
    expected = torch.autograd.grad([a, logits, v], wanted, [d_a, d_logits, d_v], allow_unused=True)
    found = ShareGradients(given)
    with torch.no_grad():
        for now in BLOCKS:
            q = given.queries(now)
            found.of_shares(now, d_a[:, :, now].clone(), given.shares(q), q)
            found.of_logits(now, d_logits[:, :, now], given.keys(now))
            found.of_values(now, d_v[:, :, now])
    for actual, exact in zip([x for x in found.arguments() if x is not None], expected, strict=True):
        torch.testing.assert_close(actual, exact)
