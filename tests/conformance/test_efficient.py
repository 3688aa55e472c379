"""`efficient` against linear-attention-transformer's `linear_attn`.

Theirs multiplies the output by head_dim^-1/2, a constant that the paper's formula does not have.
"""

import pytest
import torch

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.efficient import EfficientAttention, EfficientConfig

pytestmark = pytest.mark.conformance
HEADS, DIM = 3, 16
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def theirs():
    from linear_attention_transformer import linear_attention_transformer

    return linear_attention_transformer


def draw(length):
    return torch.randn(3, 2, HEADS, length, DIM, generator=torch.Generator().manual_seed(length)).unbind(0)


def attend(q, k, v, padding=None, causal=False, feature_map="affine"):
    config = EfficientConfig(feature_map=feature_map)
    module = EfficientAttention(config, LayerContext(0, 2, HEADS * DIM, HEADS, DIM, 512, causal))
    return module(AttentionInputs(q, k, v, padding, causal, DIM**-0.5))[0]


@pytest.mark.parametrize("feature_map", ["affine", "identity"])
@pytest.mark.parametrize("length", [1, 63, 200, 3000])
def test_the_bidirectional_form(theirs, length, feature_map):
    q, k, v = draw(length)
    expected = theirs.linear_attn(q, k, v) * DIM**0.5
    torch.testing.assert_close(attend(q, k, v, feature_map=feature_map), expected, **TOLERANCE)


def test_padding(theirs):
    q, k, v = draw(65)
    padding = torch.arange(65) < torch.tensor([[65], [40]])
    expected = theirs.linear_attn(q.clone(), k.clone(), v.clone(), padding) * DIM**0.5  # theirs writes into k and v
    ours = attend(q, k, v, padding)
    torch.testing.assert_close(ours.mT[1, ..., :40], expected.mT[1, ..., :40], **TOLERANCE)
    torch.testing.assert_close(ours[0], expected[0], **TOLERANCE)


def test_their_causal_form_is_another_function_which_overflows(theirs):
    """Theirs has one normalizer for all features and unscaled exp(k); ours a normalizer per feature and prefix."""
    q, k, v = draw(40)
    ours = attend(q, k, v, causal=True)
    assert not torch.allclose(ours, theirs.causal_linear_attn(q, k, v, bucket_size=1) * DIM**0.5, atol=0.05)
    for last in (1, 17, 40):  # the bidirectional form of each prefix is what a row of ours is
        prefix = [x[:, :, :last] for x in (q, k, v)]
        torch.testing.assert_close(ours[:, :, last - 1], attend(*prefix)[:, :, -1], **TOLERANCE)
    k[:, :, 20] = 100.0
    assert theirs.causal_linear_attn(q, k, v, bucket_size=1).isnan().any()
    assert attend(q, k, v, causal=True).isfinite().all()
