"""Gated linear attention against the naive reference of flash-linear-attention: same q, k, v, same gates."""

import pytest
import torch

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.gated import GatedConfig, GatedLinearAttention

pytestmark = pytest.mark.conformance
HEADS, DIM = 4, 16
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def gla():
    """Their recurrence in our layout, `[B, H, T, D]`."""
    from fla.ops.gla.naive import naive_recurrent_gla

    return lambda *tensors: naive_recurrent_gla(*(x.transpose(1, 2) for x in tensors))[0].transpose(1, 2)


def draw(length):
    g = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 2, HEADS, length, DIM, generator=g)
    return q, k, v, torch.randn(2, length, HEADS * DIM, generator=g)


def build(**options):
    context = LayerContext(0, 2, HEADS * DIM, HEADS, DIM, 512, True)
    return GatedLinearAttention(GatedConfig(init="published", **options), context)


def gates(module, hidden):
    """log alpha as the paper's layer computes it: two linear maps, logsigmoid, over 16."""
    gate = hidden @ module.gate_down.mT @ module.gate_up.mT + module.gate_bias.flatten()
    return (torch.nn.functional.logsigmoid(gate) / 16).unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def attend(module, q, k, v, hidden, padding=None):
    return module(AttentionInputs(q, k, v, padding, True, DIM**-0.5, hidden))[0]


@pytest.mark.parametrize("length", [1, 63, 200])
def test_the_identity_kernel_is_gla_s(gla, length):
    q, k, v, hidden = draw(length)
    module = build(feature_map="identity")
    theirs = gla(q, k, v, gates(module, hidden))
    torch.testing.assert_close(attend(module, q, k, v, hidden), theirs, **TOLERANCE)


@pytest.mark.parametrize("length", [1, 63, 200])
def test_ours_is_normalized_and_theirs_is_not(gla, length):
    """Our default divides by z: theirs on the same features, over theirs with ones in place of v."""
    q, k, v, hidden = draw(length)
    module = build()
    q_features, k_features = (torch.nn.functional.elu(x * DIM**-0.25) + 1 for x in (q, k))
    given = gates(module, hidden)
    sums, total = (gla(q_features, k_features, x, given) for x in (v, torch.ones_like(v)))
    ours = attend(module, q, k, v, hidden)
    torch.testing.assert_close(ours, sums / total, **TOLERANCE)
    if length > 1:
        assert (ours - sums).norm() > 0.1 * ours.norm()


def test_padding_decays_in_theirs_and_not_in_ours(gla):
    """They take no mask: zeros in the middle of a sequence still count as time, so a row depends on its padding."""
    q, k, v, hidden = draw(60)
    real = torch.ones(2, 60, dtype=torch.bool)
    real[:, 10:50] = False
    q, k, v = (x.masked_fill(~real[:, None, :, None], 0) for x in (q, k, v))
    module = build(feature_map="identity")
    alone = gla(*(x[:, :, real[0]] for x in (q, k, v, gates(module, hidden))))
    ours = attend(module, q, k, v, hidden, real)[:, :, real[0]]
    torch.testing.assert_close(ours, alone, **TOLERANCE)
    assert (gla(q, k, v, gates(module, hidden))[:, :, real[0]] - alone).abs().max() > 0.1
