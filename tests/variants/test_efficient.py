"""`efficient` against its dense float64 formula, and its start from query centroids."""

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.efficient import EfficientAttention, EfficientConfig


def build(causal=False, *, heads=3, dim=8, layer_idx=0, **options):
    context = LayerContext(layer_idx, 6, heads * dim, heads, dim, 512, causal)
    return EfficientAttention(EfficientConfig(**options), context)


def draw(length, *, batch=2, heads=3, dim=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, length, dim, generator=g, dtype=dtype).unbind(0)


def attend(module, q, k, v, padding=None, causal=False, scaling=0.3):
    return module(AttentionInputs(q, k, v, padding, causal, scaling))[0]


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("num_features", [None, 5])
def test_is_the_dense_formula(num_features, causal):
    module = build(causal, num_features=num_features).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    for length in (1, 7, 65):
        q, k, v = draw(length)
        rho_q = (q @ module.query_weight.mT + module.query_bias[:, None]).softmax(-1)
        logits = k @ module.key_weight.mT
        expected = torch.empty_like(v)
        for i in range(length):
            seen = slice(i + 1 if causal else length)
            context = logits[:, :, seen].softmax(2).mT @ v[:, :, seen]  # [B, H, f, D]
            expected[:, :, i] = (rho_q[:, :, i, None] @ context)[:, :, 0]
        torch.testing.assert_close(attend(module, q, k, v, causal=causal), expected)


def test_starts_as_published():
    q, k, v = draw(40)
    expected = q.softmax(-1) @ (k.softmax(2).mT @ v)
    for feature_map in ("affine", "identity"):
        torch.testing.assert_close(attend(build(feature_map=feature_map).double(), q, k, v), expected)


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_identity_features_are_those_of_untrained_weights_without_any(causal):
    identity = build(causal, feature_map="identity")
    assert not list(identity.parameters())
    assert not identity.state_dict()
    padding = torch.arange(70) >= torch.tensor([[0], [9]])
    tokens = draw(70)
    identity.calibrate([AttentionInputs(*tokens, padding, causal, 0.3)])
    expected = attend(build(causal).double(), *tokens, padding, causal)
    torch.testing.assert_close(attend(identity, *tokens, padding, causal), expected)


def test_other_feature_numbers_start_from_seeded_directions_of_unit_scale():
    module = build(num_features=200)
    assert module.key_weight.norm(dim=-1).mean().item() == pytest.approx(1, abs=0.1)
    torch.manual_seed(9)
    assert torch.equal(build(num_features=200).key_weight, module.key_weight)
    assert not torch.equal(build(num_features=200, seed=1).key_weight, module.key_weight)
    assert not torch.equal(build(num_features=200, layer_idx=1).key_weight, module.key_weight)


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_calibration_finds_clustered_queries_and_is_never_worse(causal):
    q, k, v = draw(120, dtype=torch.float32)
    centers = 3 * torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    q[:] = 0.1 * q
    q[:, :2] += centers[:2, torch.arange(120) % 4]  # two heads with four kinds of queries, one with none
    padding = torch.arange(120) >= torch.tensor([[0], [30]])
    poisoned = [x.masked_fill(~padding[:, None, :, None], 1e9) for x in (q, k, v)]
    mask = padding[:, None, None] & (torch.ones(120, 120).tril().bool() if causal else True)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)

    def errors(module):
        difference = (attend(module, q, k, v, padding, causal) - exact) * padding[:, None, :, None]
        return difference.square().sum((0, 2, 3)) / (exact * padding[:, None, :, None]).square().sum((0, 2, 3))

    module = build(causal)
    before = errors(module)
    module.calibrate([AttentionInputs(*poisoned, padding, causal, 0.3)])
    after = errors(module)
    assert (after <= before * 1.0001).all()
    assert (after[:2] < 0.05).all()
    assert (before[:2] > 0.2).all()


def test_decode_state_is_d_squared_and_2d():
    state = build(True).init_state(2, torch.float32, torch.device("cpu"))
    assert sum(x[0, 0].numel() for x in state.values()) == 8 * 8 + 2 * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "num_features=0; allowed: an integer of at least 1, or None"),
        ({"seed": -1}, "seed=-1"),
        ({"feature_map": "elu"}, "feature_map='elu'"),
        ({"feature_map": "identity", "num_features": 8}, "num_features=8; allowed with feature_map='identity': None"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EfficientConfig(**options)


def test_is_registered_for_both_sides():
    spec = get_variant("efficient")
    assert (spec.encoder, spec.decoder, spec.state, spec.exact_limit) == (True, True, "constant", None)
