"""`rfa`: no package of the index has it; its parts against performer-pytorch and flash-linear-attention.

On normalized queries and keys, `positive` features are FAVOR+ ones and `arccos` features the generalized ReLU
kernel (without its 1e-3), on the same directions; the gate is the decay of simple gated linear attention.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.rfa import RFAAttention, RFAConfig

pytestmark = pytest.mark.conformance
HEADS, DIM = 3, 16
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def draw(length):
    return torch.randn(3, 2, HEADS, length, DIM, generator=torch.Generator().manual_seed(length)).unbind(0)


def build(causal, **options):
    module = RFAAttention(
        RFAConfig(num_features=64, **options), LayerContext(0, 2, HEADS * DIM, HEADS, DIM, 512, causal)
    )
    module.tau.fill_(0.7)
    return module


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("kernel", ["arccos", "positive"])
def test_features_of_performer_on_unit_vectors(monkeypatch, kernel, causal):
    from performer_pytorch import performer_pytorch as package

    functions = {"softmax_kernel": {"eps": 0}, "generalized_kernel": {"kernel_epsilon": 0}}
    for name, options in {**functions, "causal_linear_attention_noncuda": {"eps": 0}}.items():
        monkeypatch.setattr(package, name, partial(getattr(package, name), **options))
    module = build(causal, kernel=kernel)
    theirs = package.FastAttention(DIM, nb_features=64, causal=causal, generalized_attention=kernel == "arccos")
    theirs.projection_matrix.copy_(module.omega)
    q, k, v = draw(65)
    unit = (F.normalize(x, dim=-1) / 0.7 * DIM**0.25 for x in (q, k))  # theirs multiplies by DIM^-1/4
    ours = module(AttentionInputs(q, k, v, None, causal, DIM**-0.5))[0]
    torch.testing.assert_close(ours, theirs(*unit, v), **TOLERANCE)


def test_the_gate_is_a_decay_with_complementary_keys():
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    module = build(True, gate=True)
    torch.manual_seed(0)
    with torch.no_grad():
        module.gate_weight.normal_()
        module.gate_bias.fill_(1.0)
    q, k, v = draw(65)
    hidden = torch.randn(2, 65, HEADS * DIM) * 0.2
    ours = module(AttentionInputs(q, k, v, None, True, DIM**-0.5, hidden))[0]
    logits = F.linear(hidden, module.gate_weight, module.gate_bias)  # [B, T, H]
    q_features, k_features = ((F.normalize(x, dim=-1) @ module.omega.mT).relu().transpose(1, 2) for x in (q, k))
    k_features = k_features * torch.sigmoid(-logits)[..., None]
    ones = torch.cat([v, torch.ones_like(v[..., :1])], -1).transpose(1, 2)
    sums, _ = naive_recurrent_simple_gla(q_features, k_features, ones, F.logsigmoid(logits), scale=1.0)
    expected = (sums[..., :-1] / sums[..., -1:]).transpose(1, 2)
    torch.testing.assert_close(ours, expected, **TOLERANCE)
