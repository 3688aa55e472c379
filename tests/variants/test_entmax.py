"""Entmax attention against a dense float64 evaluation of its formula; starts, options, decode state."""

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.ops.exact import dense
from hf_linear_attn.registry import get_variant
from hf_linear_attn.testing.tools import padding_masks
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.entmax import EntmaxAttention, EntmaxConfig

HEADS, DIM = 3, 8
ALPHAS = ("sparsemax", "entmax15", "learned")


def build(is_causal=False, dtype=torch.float64, **options):
    return EntmaxAttention(EntmaxConfig(**options), LayerContext(0, 2, 24, HEADS, DIM, 64, is_causal)).to(dtype)


def draw(length=20, batch=2, is_causal=False, padding=None, dtype=torch.float64, spread=3.0):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, HEADS, length, DIM, generator=generator, dtype=dtype) for _ in range(3))
    return AttentionInputs(q * spread, k, v, padding, is_causal, DIM**-0.5)


def sparsemax_row(z):
    """Martins and Astudillo's algorithm 1, one row."""
    ordered = sorted(z.tolist(), reverse=True)
    size = max(n for n in range(1, len(ordered) + 1) if 1 + n * ordered[n - 1] > sum(ordered[:n]))
    return (z - (sum(ordered[:size]) - 1) / size).clamp(min=0)


def entmax_row(z, alpha):
    low, high = (z * (alpha - 1)).max() - 1, (z * (alpha - 1)).max()
    for _ in range(80):
        tau = (low + high) / 2
        p = (z * (alpha - 1) - tau).clamp(min=0) ** (1 / (alpha - 1))
        low, high = (tau, high) if p.sum() >= 1 else (low, tau)
    return p


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_equals_the_dense_formula(alpha, is_causal):
    module = build(is_causal, alpha=alpha)
    shares = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    logits_of_alpha = torch.tensor([-2.0, 0.1, 3.0], dtype=torch.float64)
    with torch.no_grad():
        module.mixing.copy_(shares)
        if alpha == "learned":
            module.alpha_logit.copy_(logits_of_alpha)
    padding = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.7
    inputs = draw(is_causal=is_causal, padding=padding)
    output = module(inputs)[0]
    for b in range(2):
        for h in range(HEADS):
            for i in padding[b].nonzero()[:, 0].tolist():
                keys = [j for j in padding[b].nonzero()[:, 0].tolist() if j <= i or not is_causal]
                z = inputs.key[b, h, keys] @ inputs.query[b, h, i] * DIM**-0.5
                if alpha == "sparsemax":
                    sparse = sparsemax_row(z)
                else:
                    sparse = entmax_row(z, 1.5 if alpha == "entmax15" else 1 + logits_of_alpha[h].sigmoid())
                p = (1 - shares[h]) * z.softmax(0) + shares[h] * sparse
                torch.testing.assert_close(output[b, h, i], p @ inputs.value[b, h, keys])


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_starts_as_the_checkpoint_exactly(alpha, is_causal):
    module = build(is_causal, torch.float32, alpha=alpha)
    inputs = draw(is_causal=is_causal, dtype=torch.float32)
    softmax = F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=is_causal)
    torch.testing.assert_close(module(inputs)[0], softmax, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_lambda_learns_from_the_first_step_and_alpha_from_the_second(alpha):
    module = build(alpha=alpha)
    module(draw())[0].square().sum().backward()
    assert module.mixing.grad.all()
    if alpha == "learned":
        assert not module.alpha_logit.grad.any()
        with torch.no_grad():
            module.mixing.fill_(0.1)
        module(draw())[0].square().sum().backward()
        assert module.alpha_logit.grad.all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_most_keys_get_no_weight_at_all(alpha):
    inputs = draw(length=64, batch=1)
    inputs.value = torch.eye(64, dtype=torch.float64).expand(1, HEADS, -1, -1)  # outputs are the weights
    weights = build(alpha=alpha, initial_lambda=1.0)(inputs)[0]
    assert (weights == 0).float().mean() > 0.5
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, HEADS, 64, dtype=torch.float64))


def test_the_decode_state_holds_every_key_and_value():
    module = build(True)
    inputs = draw(9, is_causal=True)
    state = module.init_state(2, torch.float64, torch.device("cpu"))
    state = module(inputs, state)[1]
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        "key": (2, HEADS, 9, DIM),
        "value": (2, HEADS, 9, DIM),
        "count": (2,),
    }


def test_it_says_that_it_is_quadratic():
    spec = get_variant("entmax")
    assert spec.quadratic == "always"
    assert not spec.claims_linear_cost({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": "entmax"}, "alpha='entmax'; allowed: sparsemax, entmax15, learned"),
        ({"alpha": 1.5}, "alpha=1.5; allowed: sparsemax, entmax15, learned"),
        ({"initial_lambda": 2}, "initial_lambda=2; allowed: a number from 0 to 1"),
        ({"initial_lambda": True}, "initial_lambda=True; allowed"),
        ({"trained_lambda": 1.5}, "trained_lambda=1.5; allowed: a number from 0 to 1, or None"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EntmaxConfig.from_dict(options)


def dense_zeros(module, inputs, padding):
    """Zeros and weights of each head, row by row, by the published definitions of the weights."""
    zeros, weights = torch.zeros(2, HEADS, dtype=torch.long)
    real = torch.ones(2, inputs.key.shape[2], dtype=torch.bool) if padding is None else padding
    for b in range(2):
        for h in range(HEADS):
            for i in real[b].nonzero()[:, 0].tolist():
                keys = [j for j in real[b].nonzero()[:, 0].tolist() if j <= i or not inputs.is_causal]
                z = inputs.key[b, h, keys] @ inputs.query[b, h, i] * DIM**-0.5
                sparse = sparsemax_row(z) if module.config.alpha == "sparsemax" else entmax_row(z, 1.5)
                p = (1 - module.mixing[h]) * z.softmax(0) + module.mixing[h] * sparse
                zeros[h] += (p == 0).sum()
                weights[h] += len(keys)
    return zeros, weights


@pytest.mark.parametrize("side", ["none", "left", "interior"])
@pytest.mark.parametrize("alpha", ["sparsemax", "entmax15"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_counts_the_weights_that_are_zero(is_causal, alpha, side, monkeypatch):
    module = build(is_causal, alpha=alpha)
    with torch.no_grad():
        module.mixing.copy_(torch.tensor([0.0, 0.4, 1.0]))
    padding = None if side == "none" else padding_masks(2, 20)[side]
    inputs = draw(is_causal=is_causal, padding=padding)
    expected = dense_zeros(module, inputs, padding)
    for elements in (1 << 18, 40):  # in one chunk of queries, and row by row
        monkeypatch.setattr(dense, "CPU_CHUNK_ELEMENTS", elements)
        zeros, weights = module.zero_weights(inputs)
        assert torch.equal(zeros, expected[0])
        assert torch.equal(weights, expected[1])
    assert zeros[:2].tolist() == [0, 0]
    assert zeros[2] > 0.3 * weights[2]
