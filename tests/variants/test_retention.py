"""`retention` against its dense float64 formula, its decays and its calibrated start."""

import pytest
import torch

from hf_linear_attn.ops.linear.attention import linear_attention
from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.retention import RetentionAttention, RetentionConfig

PHI = {
    "elu": lambda x: torch.nn.functional.elu(x) + 1,
    "exp": torch.exp,
    "relu": torch.relu,
    "softmax": lambda x: torch.softmax(x, -1),
    "squared_relu": lambda x: torch.relu(x) ** 2,
}
SCALING = 0.3
SIDES = pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])


def build(causal=True, *, heads=3, dim=8, **options):
    return RetentionAttention(RetentionConfig(**options), LayerContext(0, 6, heads * dim, heads, dim, 512, causal))


def draw(length, *, batch=2, heads=3, dim=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, batch, heads, length, dim, generator=g, dtype=dtype).unbind(0)


def attend(module, q, k, v, padding=None, state=None):
    return module(AttentionInputs(q, k, v, padding, module.context.is_causal, SCALING), state)


def decay_matrix(gamma, length, causal=True):
    """gamma_h^|i - j|, the D of the paper, below the diagonal on decoders: `[H, n, n]`."""
    distance = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    weights = gamma[:, None, None] ** distance
    return weights.tril() if causal else weights


@SIDES
@pytest.mark.parametrize("length", [1, 7, 65, 130])
@pytest.mark.parametrize("feature_map", sorted(PHI))
def test_is_the_dense_formula_with_the_published_decays(feature_map, length, causal):
    q, k, v = draw(length)
    module = build(causal, feature_map=feature_map, init="published").double()
    phi = PHI[feature_map]
    gamma = 1 - 2.0 ** (-5 - torch.arange(3, dtype=torch.float64))
    scores = phi(q * SCALING**0.5) @ phi(k * SCALING**0.5).mT * decay_matrix(gamma, length, causal)
    total = scores.sum(-1, keepdim=True)
    expected = torch.where(total == 0, 0.0, scores @ v / total)
    torch.testing.assert_close(attend(module, q, k, v)[0], expected, atol=1e-6, rtol=1e-5)  # decays start in float32


@SIDES
def test_the_identity_kernel_is_retnet_without_a_normalizer(causal):
    q, k, v = draw(70)
    module = build(causal, feature_map="identity", init="published")
    gamma = (-module.decay_rate.double().abs()).exp()
    expected = (q @ k.mT * SCALING * decay_matrix(gamma, 70, causal)) @ v
    torch.testing.assert_close(attend(module, q, k, v)[0], expected)


@SIDES
@pytest.mark.parametrize("learnable", [True, False])
def test_undecayed_equals_the_linear_transformer(learnable, causal):
    q, k, v = draw(130, dtype=torch.float32)
    module = build(causal, learnable=learnable)
    q_features, k_features = (PHI["elu"](x * SCALING**0.5) for x in (q, k))
    expected = linear_attention(q_features, k_features, v, is_causal=causal)[0]
    torch.testing.assert_close(attend(module, q, k, v)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_learned_decay_leaves_its_start():
    """At exactly 0 the absolute value has no slope; the start is beside it."""
    q, k, v = draw(40, dtype=torch.float32)
    module = build()
    target = attend(build(init="published"), q, k, v)[0].detach()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (attend(module, q, k, v)[0] - target).square().sum().backward()
        optimizer.step()
    assert module.decay_rate.abs()[0].item() == pytest.approx(2**-5, rel=0.2)


def test_fixed_decays_are_a_buffer_and_stay():
    module = build(init="published", learnable=False)
    assert not list(module.parameters())
    before = module.decay_rate.clone()
    module.calibrate([AttentionInputs(*draw(100, dtype=torch.float32), None, True, SCALING)])
    assert torch.equal(module.decay_rate, before)


def recent(length=200, dim=8):
    """Keys that turn slowly and queries like the key at hand: attention to the recent past."""
    _, _, v = draw(length, dim=dim, dtype=torch.float32)
    angle = torch.arange(length) / 12
    k = torch.stack([angle.cos(), angle.sin()] * (dim // 2), -1).expand_as(v).contiguous()
    return 3 * k, k, v


@SIDES
@pytest.mark.parametrize("options", [{}, {"init": "published"}, {"feature_map": "identity"}], ids=str)
def test_calibration_is_never_worse_in_any_head_and_finds_decays(options, causal):
    q, k, v = recent()
    padding = torch.ones(2, 200, dtype=torch.bool)
    padding[0, 150:], padding[1, :30] = False, False
    poisoned = [x.masked_fill(~padding[:, None, :, None], 1e9) for x in (q, k, v)]
    module = build(causal, **options)
    mask = padding[:, None, None, :] & (torch.ones(200, 200).tril().bool() | (not causal))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALING)

    def errors():
        difference = (attend(module, q, k, v, padding)[0] - exact) * padding[:, None, :, None]
        return difference.square().sum((0, 2, 3))

    before = errors()
    module.calibrate([AttentionInputs(*poisoned, padding, causal, SCALING)])
    after = errors()
    assert (after <= before * 1.0001).all()
    assert (after < 0.9 * before).any()
    assert (module.decay_rate > 1e-3).any()


@pytest.mark.parametrize(("feature_map", "numbers"), [("elu", 8 * 9 + 1), ("identity", 8 * 8)])
def test_decode_state_size(feature_map, numbers):
    """f (d + 1) numbers a head and the log of their scale; d^2 without a normalizer."""
    module = build(feature_map=feature_map)
    q, k, v = draw(20, dtype=torch.float32)
    state = module.init_state(2, torch.float32, q.device)
    for _ in range(2):
        assert sum(x[0, 0].numel() for x in state.values()) == numbers
        _, state = attend(module, q, k, v, state=state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "gelu"}, "feature_map='gelu'; allowed: elu, exp, relu, softmax, squared_relu, identity"),
        ({"init": "big"}, "init='big'; allowed: undecayed, published"),
        ({"learnable": 1}, "learnable=1"),
        ({"variance_reducer": None}, "variance_reducer=None"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RetentionConfig(**options)


def test_is_registered_for_both_sides():
    spec = get_variant("retention")
    assert (spec.encoder, spec.decoder, spec.refusal) == (True, True, "")
    assert (spec.has_kernel(False), spec.has_kernel(True)) == (False, True)


def test_an_encoder_of_reversed_tokens_is_the_reversed_encoder():
    """The decays know no direction."""
    given = draw(70)
    module = build(False, init="published").double()
    reversed_ = attend(module, *(x.flip(2) for x in given))[0]
    torch.testing.assert_close(reversed_.flip(2), attend(module, *given)[0])
