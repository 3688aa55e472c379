"""Retention against the naive references of flash-linear-attention: same q, k, v, same decays."""

import pytest
import torch

from hf_linear_attn.ops.linear.attention import linear_attention
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.retention import RetentionAttention, RetentionConfig

pytestmark = pytest.mark.conformance
HEADS, DIM = 4, 16
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def retention():
    from fla.ops.retention.naive import naive_retention

    return naive_retention


@pytest.fixture(scope="module")
def simple_gla():
    from fla.ops.simple_gla import naive

    return naive


def draw(length):
    return torch.randn(3, 2, HEADS, length, DIM, generator=torch.Generator().manual_seed(length)).unbind(0)


def attend(q, k, v, padding=None, **options):
    context = LayerContext(0, 2, HEADS * DIM, HEADS, DIM, 512, True)
    module = RetentionAttention(RetentionConfig(init="published", **options), context)
    return module(AttentionInputs(q, k, v, padding, True, DIM**-0.5))[0]


@pytest.mark.parametrize("length", [1, 63, 300])
def test_the_identity_kernel_with_published_decays_is_retnet_s(retention, length):
    q, k, v = draw(length)
    torch.testing.assert_close(attend(q, k, v, feature_map="identity"), retention(q, k, v), **TOLERANCE)


@pytest.mark.parametrize("length", [1, 63, 300])
def test_ours_is_normalized_and_theirs_is_not(retention, length):
    """Our default divides by z: theirs on the same features, with a column of ones beside v, over that column."""
    q, k, v = draw(length)
    features = [torch.nn.functional.elu(x * DIM**-0.25) + 1 for x in (q, k)]
    sums = retention(*features, torch.cat([v, torch.ones_like(v[..., :1])], -1))
    ours = attend(q, k, v)
    torch.testing.assert_close(ours, sums[..., :-1] / sums[..., -1:], **TOLERANCE)
    if length > 1:
        assert (ours - sums[..., :-1]).norm() > 0.1 * ours.norm()


@pytest.mark.parametrize("form", ["naive_chunk_simple_gla", "naive_recurrent_simple_gla", "naive_parallel_simple_gla"])
@pytest.mark.parametrize("length", [63, 200])
def test_decays_per_token_and_head_are_simple_gla_s(simple_gla, form, length):
    q, k, v = draw(length)
    decay = torch.nn.functional.logsigmoid(torch.randn(2, HEADS, length, generator=torch.Generator().manual_seed(1)))
    ours = linear_attention(q * DIM**-0.5, k, v, log_decay=decay, is_causal=True, normalized=False)[0]
    theirs = getattr(simple_gla, form)(*(x.transpose(1, 2) for x in (q, k, v, decay)))[0].transpose(1, 2)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_padding_decays_in_theirs_and_not_in_ours(retention):
    """They take no mask: zeros in the middle of a sequence still count as time, so a row depends on its padding."""
    q, k, v = draw(40)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[:, 10:30] = False
    q, k, v = (x.masked_fill(~real[:, None, :, None], 0) for x in (q, k, v))
    kept = [x[:, :, real[0]] for x in (q, k, v)]
    alone = retention(*kept)
    ours = attend(q, k, v, real, feature_map="identity")[:, :, real[0]]
    torch.testing.assert_close(ours, alone, **TOLERANCE)
    assert (retention(q, k, v)[:, :, real[0]] - alone).abs().max() > 0.1
