"""`t2r` with flash-linear-attention's T2R feature map and its naive linear attention."""

import pytest
import torch

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.t2r import T2RAttention, T2RConfig

pytestmark = pytest.mark.conformance
HEADS, DIM = 3, 16


@pytest.mark.parametrize("length", [1, 63, 200])
def test_learned_relu_features(length):
    """Theirs is one map for all heads and a separate one for queries and keys, as ours is per head."""
    from fla.modules.feature_map import T2RFeatureMap
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    torch.manual_seed(0)
    module = T2RAttention(T2RConfig(num_features=40), LayerContext(0, 2, HEADS * DIM, HEADS, DIM, 512, True))
    q_map, k_map = (T2RFeatureMap(DIM, 40, bias=True) for _ in range(2))
    with torch.no_grad():
        for name, theirs in (("query", q_map), ("key", k_map)):
            module.get_parameter(f"{name}_weight").copy_(theirs.layer.weight)
            module.get_parameter(f"{name}_bias").copy_(theirs.layer.bias)
    q, k, v = torch.randn(3, 2, HEADS, length, DIM).unbind(0)
    ours = module(AttentionInputs(q, k, v, None, True, DIM**-0.5))[0]
    features = (phi(x.transpose(1, 2)) for phi, x in ((q_map, q), (k_map, k)))
    theirs, _ = naive_recurrent_linear_attn(*features, v.transpose(1, 2), scale=1.0, normalize=True)
    torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-4, rtol=1e-4)
