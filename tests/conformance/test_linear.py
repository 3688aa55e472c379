"""`linear` against flash-linear-attention's naive reference: same features, normalized."""

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.linear import LinearAttention, LinearConfig

pytestmark = pytest.mark.conformance
HEADS, DIM, SCALING = 3, 16, 0.25
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def naive():
    from fla.ops.linear_attn import naive

    return naive


def draw(length):
    return torch.randn(3, 2, HEADS, length, DIM, generator=torch.Generator().manual_seed(length)).unbind(0)


def attend(q, k, v, **options):
    module = LinearAttention(LinearConfig(**options), LayerContext(0, 2, HEADS * DIM, HEADS, DIM, 512, True))
    return module(AttentionInputs(q, k, v, None, True, SCALING))[0]


@pytest.mark.parametrize("length", [1, 63, 200])
@pytest.mark.parametrize("feature_map", ["elu", "relu", "exp"])
def test_the_recurrent_reference(naive, feature_map, length):
    phi = {"elu": lambda x: F.elu(x) + 1, "relu": torch.relu, "exp": torch.exp}[feature_map]
    q, k, v = draw(length)
    q_features, k_features = (phi(SCALING**0.5 * x).transpose(1, 2) for x in (q, k))
    theirs, _ = naive.naive_recurrent_linear_attn(q_features, k_features, v.transpose(1, 2), scale=1.0, normalize=True)
    torch.testing.assert_close(attend(q, k, v, feature_map=feature_map), theirs.transpose(1, 2), **TOLERANCE)


def test_the_chunked_reference(naive):
    """Their chunked form takes lengths divisible by 64 only."""
    q, k, v = draw(128)
    features = ((F.elu(SCALING**0.5 * x) + 1).transpose(1, 2) for x in (q, k))
    theirs = naive.naive_chunk_linear_attn(*features, v.transpose(1, 2), scale=1.0, normalize=True)
    torch.testing.assert_close(attend(q, k, v), theirs.transpose(1, 2), **TOLERANCE)


def test_a_huge_key_is_nan_in_theirs_and_not_in_ours(naive):
    """Exponential features: ours are kept relative to their largest, theirs overflow."""
    q, k, v = draw(20)
    k[:, :, 10] = 2000.0
    q_features, k_features = ((SCALING**0.5 * x).exp().transpose(1, 2) for x in (q, k))
    theirs, _ = naive.naive_recurrent_linear_attn(q_features, k_features, v.transpose(1, 2), scale=1.0, normalize=True)
    assert theirs.isnan().any()
    ours = attend(q, k, v, feature_map="exp")
    assert ours.isfinite().all()
    torch.testing.assert_close(ours[:, :, 10:], v[:, :, 10:11].expand(-1, -1, 10, -1), **TOLERANCE)
