"""`rfa` against its dense float64 formula, its limit, its gate, and its calibrated start."""

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.registry import get_variant
from hf_linear_attn.testing import Subject, applicable_laws
from hf_linear_attn.variants.base import AttentionInputs
from hf_linear_attn.variants.rfa import RFAAttention, RFAConfig
from tests.variants.kernels import (
    DIM,
    HEADS,
    SCALING,
    attend,
    context,
    dense,
    draw,
    errors_before_and_after_calibration,
    mean_weight,
    randomize,
)

SIDES = pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
KERNELS = ("arccos", "sincos", "positive")


def build(causal=False, *, layer_idx=0, **options):
    return RFAAttention(RFAConfig(**options), context(causal, layer_idx=layer_idx))


def scores_of(module, q, k):
    """phi(q_i) . phi(k_j), by the formulas of the paper."""

    def projected(x, center):
        x = x - center[:, None]
        x = module.sigma[:, None] * x / x.norm(dim=-1, keepdim=True) / module.tau[:, None, None]
        return x, x @ module.omega.mT

    (x, a), (y, b) = projected(q, module.query_center), projected(k, module.key_center)
    if module.config.kernel == "arccos":
        scores = a.relu() @ b.relu().mT
    elif module.config.kernel == "sincos":
        scores = a.cos() @ b.cos().mT + a.sin() @ b.sin().mT
    else:
        half = 0.5 * y.square().sum(-1)[:, :, None]
        scores = a.exp() @ b.exp().mT * (-half).exp() * (-0.5 * x.square().sum(-1)[..., None]).exp()
    return scores * mean_weight(module.query_mean, k)


@SIDES
@pytest.mark.parametrize("kernel", KERNELS)
def test_is_the_dense_formula(kernel, causal):
    module = build(causal, kernel=kernel, num_features=64).double()
    module = randomize(module, ["sigma", "query_mean", "query_center", "key_center"], 0.2)
    module.tau.fill_(2.0)
    for length in (1, 7, 65):
        q, k, v = draw(length)
        torch.testing.assert_close(attend(module, q, k, v), dense(scores_of(module, q, k), v, causal).nan_to_num(0))


@SIDES
@pytest.mark.parametrize("kernel", ["sincos", "positive"])
def test_many_features_give_softmax_of_normalized_queries_and_keys(kernel, causal):
    q, k, v = draw(20)
    module = build(causal, kernel=kernel, num_features=20_000).double()
    x, y = (F.normalize(z, dim=-1) for z in (q, k))
    expected = F.scaled_dot_product_attention(x, y, v, is_causal=causal, scale=1.0)
    torch.testing.assert_close(attend(module, q, k, v), expected, atol=0.03, rtol=0)


@SIDES
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gate_forgets_in_the_directions_that_are_read(kernel, causal):
    """S <- g S + (1 - g) phi(k) v^T, all pairs: sincos has denominators of both signs, summed before the quotient."""
    module = build(causal, gate=True, num_features=16, kernel=kernel).double()
    module = randomize(module, ["gate_weight", "query_mean", "query_center", "key_center"])
    module.gate_bias.data.copy_(torch.tensor([0.5, 1.0, 2.0]))
    q, k, v = draw(30)
    hidden = torch.randn(2, 30, HEADS * DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    gate = torch.sigmoid(torch.einsum("btc,hc->bht", hidden, module.gate_weight) + module.gate_bias[:, None])
    reach = F.pad(gate.log().cumsum(-1), (1, 0))  # log of what is left after so many tokens
    past = reach[..., 1:, None] - reach[..., None, 1:]  # of the tokens after j up to i
    later = reach[..., None, :-1] - reach[..., :-1, None]  # of the tokens from i on, before j
    kept = torch.where(torch.ones(30, 30).tril().bool(), past, later).exp() * (1 - gate)[:, :, None]
    expected = dense(scores_of(module, q, k) * kept, v, causal).nan_to_num(0)
    torch.testing.assert_close(attend(module, q, k, v, hidden=hidden), expected)


def test_the_gate_is_the_recurrence_of_the_paper():
    """S <- g S + (1 - g) phi(k) v^T, token by token, z likewise."""
    module = randomize(build(True, gate=True, num_features=16).double(), ["gate_weight"])
    module.gate_bias.data.copy_(torch.tensor([0.5, 1.0, 2.0]))
    q, k, v = draw(30)
    hidden = torch.randn(2, 30, HEADS * DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    gate = torch.sigmoid(torch.einsum("btc,hc->bht", hidden, module.gate_weight) + module.gate_bias[:, None])
    q_features, k_features = ((F.normalize(x, dim=-1) @ module.omega.mT).relu() for x in (q, k))
    output = attend(module, q, k, v, hidden=hidden)
    s, z = torch.zeros(2, HEADS, 16, DIM, dtype=torch.float64), torch.zeros(2, HEADS, 16, dtype=torch.float64)
    for t in range(30):
        g = gate[:, :, t, None]
        s = g[..., None] * s + (1 - g)[..., None] * k_features[:, :, t, :, None] * v[:, :, t, None]
        z = g * z + (1 - g) * k_features[:, :, t]
        expected = (q_features[:, :, t, None] @ s)[:, :, 0] / (q_features[:, :, t] * z).sum(-1, keepdim=True)
        torch.testing.assert_close(output[:, :, t], expected.nan_to_num(0))


@SIDES
def test_the_gate_starts_almost_open(causal):
    q, k, v = draw(200)
    hidden = torch.randn(2, 200, HEADS * DIM, dtype=torch.float64)
    gated, plain = build(causal, gate=True).double(), build(causal).double()
    assert torch.sigmoid(gated.gate_bias[0]).item() == pytest.approx(1 - 1 / (10 * 512 + 1), abs=1e-6)
    difference = attend(gated, q, k, v, hidden=hidden) - attend(plain, q, k, v)
    assert difference.norm() < 0.02 * v.norm()


def test_the_gate_needs_hidden_states():
    with pytest.raises(ValueError, match="gate of rfa needs the hidden states of all 9 keys"):
        attend(build(True, gate=True), *draw(9, dtype=torch.float32))


@SIDES
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.filterwarnings("ignore:rfa, layer")
def test_calibration_is_never_worse_in_any_head(kernel, causal):
    before, after = errors_before_and_after_calibration(build(causal, kernel=kernel))
    assert (after <= before * 1.0001).all()
    assert after[0] < 0.9 * before[0]


@pytest.mark.filterwarnings("ignore:rfa, layer")
def test_calibration_without_the_reducer_sets_the_temperature():
    q, k, v = (x.float() for x in draw(80))
    module = build(kernel="positive", num_features=2000, variance_reducer=False)
    module.calibrate([AttentionInputs(6 * q, k, v, None, False, SCALING)])
    tau = (SCALING * 6 * q.norm(dim=-1).mean((0, 2)) * k.norm(dim=-1).mean((0, 2))).rsqrt()
    assert all(min(abs(module.tau[h] / tau[h] - width) for width in (1, 1.5, 2)) < 1e-4 for h in range(HEADS))


def test_negative_denominators_are_reported():
    q, k, v = (x.float() for x in draw(80))
    module = build(kernel="sincos", num_features=4)
    module.tau.fill_(0.1)
    with pytest.warns(UserWarning, match=r"rfa, layer 0: \d+\.\d% of the denominators of kernel='sincos'"):
        module.calibrate([AttentionInputs(40 * q, k, v, None, False, SCALING)])


def test_directions_are_seeded_per_layer():
    omega = build().omega
    torch.manual_seed(8)
    assert torch.equal(build().omega, omega)
    assert not torch.equal(build(seed=1).omega, omega)
    assert not torch.equal(build(layer_idx=1).omega, omega)


@pytest.mark.parametrize(("kernel", "features"), [("arccos", 6), ("sincos", 12), ("positive", 6)])
def test_decode_state_size(kernel, features):
    state = build(True, kernel=kernel, num_features=6).init_state(2, torch.float32, torch.device("cpu"))
    assert state["kv"].shape == (2, HEADS, features, DIM)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "relu"}, "kernel='relu'; allowed: arccos, sincos, positive"),
        ({"num_features": 0}, "num_features=0; allowed: an integer of at least 1"),
        ({"gate": 1}, "gate=1; allowed: True or False"),
        ({"variance_reducer": 1}, "variance_reducer=1; allowed: True or False"),
        ({"seed": -1}, "seed=-1; allowed: an integer of at least 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RFAConfig(**options)


def test_is_registered_for_both_sides():
    spec = get_variant("rfa")
    assert (spec.encoder, spec.decoder, spec.state, spec.exact_limit) == (True, True, "constant", None)
    assert RFAConfig().gate is False


# Sine and cosine features make denominators of both signs: near 0, rounding the inputs changes the output at will.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "subject"),
    [
        pytest.param(law, subject, id=f"{law.name}-{'decoder' if subject.is_causal else 'encoder'}")
        for subject in (Subject(get_variant("rfa"), causal, {"kernel": "sincos"}) for causal in (False, True))
        for law in applicable_laws(subject)
        if law.name in ("decode", "padding", "causality", "fully_masked_rows", "gradients")
    ],
)
def test_contract_with_sine_and_cosine_features(law, subject):
    law(subject)
