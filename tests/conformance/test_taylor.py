"""`taylor` of order 2 against flash-linear-attention's Based."""

import pytest
import torch

from hf_linear_attn.ops.features.maps import taylor_features
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.taylor import TaylorAttention, TaylorConfig

pytestmark = pytest.mark.conformance
HEADS, DIM = 3, 16
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def based():
    from fla.ops.based import naive

    return naive


def draw(length):
    return torch.randn(3, 2, HEADS, length, DIM, generator=torch.Generator().manual_seed(length)).unbind(0)


def build(num_features):
    context = LayerContext(0, 2, HEADS * DIM, HEADS, DIM, 512, True)
    return TaylorAttention(TaylorConfig(num_features=num_features), context)


@pytest.mark.parametrize("length", [1, 63, 256])
def test_the_parallel_reference(based, length):
    q, k, v = draw(length)
    ours = build(None)(AttentionInputs(q, k, v, None, True, DIM**-0.5))[0]
    torch.testing.assert_close(ours, based.naive_parallel_based(q, k, v), **TOLERANCE)


def test_the_chunked_reference_on_a_projection(based):
    """Their chunked form takes lengths divisible by its chunk, and scales by the projection's own dimension."""
    q, k, v = draw(128)
    module = build(6)
    projected = (x @ weight.mT for x, weight in ((q, module.query_weight), (k, module.key_weight)))
    theirs = based.naive_chunk_based(*projected, v, chunk_size=64)
    ours = module(AttentionInputs(q, k, v, None, True, 6**-0.5))[0]
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_features_span_the_kernel_of_their_feature_map():
    from fla.modules.feature_map import TaylorFeatureMap

    theirs, (q, k, _) = TaylorFeatureMap(DIM), draw(20)
    kernels = [theirs(q) @ theirs(k).mT, taylor_features(q / DIM**0.25, 2)[0] @ taylor_features(k / DIM**0.25, 2)[0].mT]
    torch.testing.assert_close(*kernels, **TOLERANCE)
    assert theirs(q).shape[-1] == taylor_features(q, 2)[0].shape[-1]
