"""`gated` against its recurrence in float64, its gates and its calibrated start."""

import math

import pytest
import torch

from hf_linear_attn.ops.linear.attention import linear_attention
from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.gated import GatedConfig, GatedLinearAttention

SCALING = 0.3
HEADS, DIM = 3, 8
SIDES = pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])


def build(causal=True, *, layer_idx=0, **options):
    context = LayerContext(layer_idx, 6, HEADS * DIM, HEADS, DIM, 512, causal)
    return GatedLinearAttention(GatedConfig(**options), context)


def draw(length, *, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, HEADS, length, DIM, generator=g, dtype=torch.float64).to(dtype)
    return q, k, v, torch.randn(2, length, HEADS * DIM, generator=g, dtype=torch.float64).to(dtype)


def attend(module, q, k, v, hidden, padding=None, state=None):
    return module(AttentionInputs(q, k, v, padding, module.context.is_causal, SCALING, hidden), state)


def recurrence(module, q, k, v, hidden, padding=None):
    """Token by token; the gate opens sigmoid(x W_1 W_2 + b)^(1/16). Encoders read from the end too, but own keys."""
    identity = module.config.feature_map == "identity"
    q, k = (x * SCALING**0.5 if identity else torch.nn.functional.elu(x * SCALING**0.5) + 1 for x in (q, k))
    gate = hidden @ module.gate_down.double().mT @ module.gate_up.double().mT
    alpha = (gate.unflatten(-1, (HEADS, DIM)) + module.gate_bias.double()).sigmoid() ** (1 / 16)  # [B, T, H, D]
    numerator, denominator = torch.zeros_like(v), torch.zeros_like(v[..., :1])
    for own in (True,) if module.context.is_causal else (True, False):
        for b in range(v.shape[0]):
            s, z = v.new_zeros(HEADS, DIM, DIM), v.new_zeros(HEADS, DIM)
            for t in range(v.shape[2]) if own else reversed(range(v.shape[2])):
                if padding is None or padding[b, t]:
                    s, z = alpha[b, t][..., None] * s, alpha[b, t] * z
                    before = s, z
                    s, z = s + k[b, :, t, :, None] * v[b, :, t, None], z + k[b, :, t]
                    read, total = (s, z) if own else before
                    numerator[b, :, t] += (q[b, :, t, :, None] * read).sum(1)
                    denominator[b, :, t] += (q[b, :, t] * total).sum(-1, keepdim=True)
    return numerator if identity else numerator / torch.where(denominator == 0, 1.0, denominator)


@pytest.mark.parametrize("options", [{}, {"init": "published"}, {"init": "published", "feature_map": "identity"}])
@SIDES
@pytest.mark.parametrize("length", [1, 7, 65, 130])
def test_is_the_recurrence(length, options, causal):
    given = draw(length)
    module = build(causal, **options).double()
    with torch.no_grad():
        module.gate_up.normal_(generator=torch.Generator().manual_seed(1))
        padding = torch.rand(2, length, generator=torch.Generator().manual_seed(2)) < 0.7
        for mask in (None, padding):
            output, expected = attend(module, *given, mask)[0], recurrence(module, *given, mask)
            if mask is not None:
                output = output.transpose(1, 2)[mask]
                expected = expected.transpose(1, 2)[mask]
            torch.testing.assert_close(output, expected)


@SIDES
def test_starts_next_to_the_linear_transformer(causal):
    q, k, v, hidden = draw(130)
    module = build(causal).double()
    features = [torch.nn.functional.elu(x * SCALING**0.5) + 1 for x in (q, k)]
    expected = linear_attention(*features, v, is_causal=causal)[0]
    torch.testing.assert_close(attend(module, q, k, v, hidden)[0], expected, atol=2e-3, rtol=1e-2)
    kept = module.gate_bias.sigmoid().log() / 16 * module.context.max_length
    assert (kept.exp() > 1 - 1 / 150).all()
    with torch.no_grad():
        module.gate_bias.fill_(60.0)
    torch.testing.assert_close(attend(module, q, k, v, hidden)[0], expected)


def test_published_gates_are_seeded_by_layer():
    module = build(init="published")
    torch.manual_seed(3)
    assert torch.equal(build(init="published").gate_up, module.gate_up)
    assert not torch.equal(build(init="published", layer_idx=1).gate_up, module.gate_up)
    assert module.gate_up.abs().max() <= module.config.gate_rank**-0.5


@SIDES
@pytest.mark.parametrize("init", ["undecayed", "published"])
def test_calibration_is_never_worse_in_any_head_and_finds_decays(init, causal):
    _, _, v, hidden = draw(200, dtype=torch.float32)
    angle = torch.arange(200) / 12  # keys that turn, queries like the key at hand: attention to the recent past
    k = torch.stack([angle.cos(), angle.sin()] * (DIM // 2), -1).expand_as(v).contiguous()
    padding = torch.ones(2, 200, dtype=torch.bool)
    padding[0, 150:], padding[1, :30] = False, False
    poisoned = [x.masked_fill(~padding[:, None, :, None], 1e9) for x in (3 * k, k, v)]
    poisoned_hidden = hidden.masked_fill(~padding[..., None], 1e9)
    module = build(causal, init=init)
    mask = padding[:, None, None, :] & (torch.ones(200, 200).tril().bool() | (not causal))
    exact = torch.nn.functional.scaled_dot_product_attention(3 * k, k, v, attn_mask=mask, scale=SCALING)

    def errors():
        difference = (attend(module, 3 * k, k, v, hidden, padding)[0] - exact) * padding[:, None, :, None]
        return difference.square().sum((0, 2, 3))

    bias, before = module.gate_bias.clone(), errors()
    module.calibrate([AttentionInputs(*poisoned, padding, causal, SCALING, poisoned_hidden)])
    after = errors()
    assert (after <= before * 1.0001).all()
    assert (after < 0.97 * before).any()
    assert not torch.equal(module.gate_bias, bias)


@pytest.mark.parametrize(("feature_map", "numbers"), [("elu", DIM * (DIM + 1) + 1), ("identity", DIM * DIM)])
def test_decode_state_size(feature_map, numbers):
    """f (d + 1) numbers a head and the log of their scale; d^2 without a normalizer."""
    module = build(feature_map=feature_map)
    state = module.init_state(2, torch.float32, torch.device("cpu"))
    for _ in range(2):
        assert sum(x[0, 0].numel() for x in state.values()) == numbers
        _, state = attend(module, *draw(20, dtype=torch.float32), state=state)


def test_gates_need_the_hidden_states_of_all_keys():
    q, k, v, hidden = draw(20)
    module = build().double()
    with pytest.raises(ValueError, match="hidden states of all 20 keys, got None"):
        attend(module, q, k, v, None)
    with pytest.raises(ValueError, match="hidden states of all 20 keys, got those of 5"):
        attend(module, q[:, :, -5:], k, v, hidden[:, -5:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "gelu"}, "feature_map='gelu'; allowed: elu, exp, relu, softmax, squared_relu, identity"),
        ({"init": "big"}, "init='big'; allowed: undecayed, published"),
        ({"gate_rank": 0}, "gate_rank=0"),
        ({"variance_reducer": None}, "variance_reducer=None"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GatedConfig(**options)


def test_is_registered_for_both_sides():
    spec = get_variant("gated")
    assert (spec.encoder, spec.decoder, spec.refusal) == (True, True, "")
    assert (spec.has_kernel(False), spec.has_kernel(True)) == (False, True)


def test_published_memory_is_short():
    """The number that the options' docstring gives: sigmoid(0)^(1/16) forgets with a time constant of 23 tokens."""
    assert 16 / math.log(2) == pytest.approx(23, abs=0.1)


@pytest.mark.slow
@SIDES
def test_compiles_without_a_mask_too(causal):
    """Forward and backward: gates that lie transposed in memory had views that the compiled backward refused."""
    module, tokens = build(causal), [x.requires_grad_() for x in draw(36, dtype=torch.float32)]
    expected = attend(module, *tokens)[0]
    exact = torch.autograd.grad(expected.square().sum(), tokens)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    output = compiled(AttentionInputs(*tokens[:3], None, causal, SCALING, tokens[3]))[0]
    torch.testing.assert_close(output, expected)
    for actual, wanted in zip(torch.autograd.grad(output.square().sum(), tokens), exact, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)
