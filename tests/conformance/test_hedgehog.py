"""`hedgehog` beside flash-linear-attention's Hedgehog: the same attention, another normalizer of the features."""

from __future__ import annotations

import pytest
import torch
from fla.modules.feature_map import HedgehogFeatureMap
from fla.ops.linear_attn.naive import naive_chunk_linear_attn

from hf_linear_attn.ops.features import softmax_map as maps
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.hedgehog import HedgehogAttention, HedgehogConfig

pytestmark = pytest.mark.conformance

HEADS, DIM, LENGTH = 3, 16, 128


def ours(num_features: int | None = None) -> HedgehogAttention:
    context = LayerContext(0, 1, HEADS * DIM, HEADS, DIM, LENGTH, True)
    return HedgehogAttention(HedgehogConfig(num_features), context)


def inputs() -> AttentionInputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, HEADS, LENGTH, DIM, generator=generator).unbind(0)
    return AttentionInputs(q, k, v, None, True, DIM**-0.5)


def theirs(phi_q: torch.Tensor, phi_k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    output = naive_chunk_linear_attn(*(x.transpose(1, 2) for x in (phi_q, phi_k, v)), normalize=True)
    return output.transpose(1, 2)


def test_attention_with_the_published_features() -> None:
    call = inputs()

    def phi(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)

    expected = theirs(phi(call.query), phi(call.key), call.value)
    torch.testing.assert_close(ours()(call)[0], expected, atol=1e-4, rtol=1e-4)


def test_their_feature_map_is_one_softmax_over_both_signs_at_twice_the_scale() -> None:
    """Theirs: softmax([2x, -2x]); the paper, and ours: [softmax(x), softmax(-x)].

    Ours is theirs with W = [2 I; -2 I] in the form of one normalizer (a query's own cancels).
    """
    call, feature_map = inputs(), HedgehogFeatureMap(DIM)
    with torch.no_grad():
        expected = theirs(feature_map(call.query), feature_map(call.key), call.value)
    module = ours()
    with torch.no_grad():
        assert not torch.allclose(module(call)[0], expected, atol=1e-2)
        module.query_weight.mul_(2)
        module.key_weight.mul_(2)
        module.form.fill_(maps.KEY_CENTROIDS)
        torch.testing.assert_close(module(call)[0], expected, atol=1e-4, rtol=1e-4)
