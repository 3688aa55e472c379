"""`lolcats` against its dense float64 formula: window, tails, starts, limits, decode state."""

import math

import pytest
import torch

from hf_linear_attn.ops.features import softmax_map as maps
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.lolcats import LolcatsAttention, LolcatsConfig

SCALING = 0.35
SIDES = pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])


def build(causal=False, *, heads=3, dim=8, max_length=512, **options):
    context = LayerContext(0, 6, heads * dim, heads, dim, max_length, causal)
    return LolcatsAttention(LolcatsConfig(**options), context).double()


def draw(length, *, batch=2, heads=3, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, length, dim, generator=g, dtype=torch.float64).unbind(0)


def attend(module, q, k, v, padding=None):
    return module(AttentionInputs(q, k, v, padding, module.context.is_causal, SCALING))[0]


def dense(q, k, v, tail, window, causal, log_factor):
    """Softmax of logits in the window and of log tail weights outside it."""
    n = q.shape[2]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    inside = (i - j < window) if causal else (i - j).abs() <= window // 2
    logits = torch.where(inside, q @ k.mT * SCALING + log_factor, tail)
    return logits.masked_fill((j > i) & causal, -torch.inf).softmax(-1) @ v


def halves(x):
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


@SIDES
@pytest.mark.parametrize("tail", ["hedgehog", "centroids"])
def test_starts_as_published(causal, tail):
    """Hedgehog's features relative to the largest term of the window, the window times 0.1."""
    q, k, v = draw(150)
    i, j = torch.arange(150)[:, None], torch.arange(150)
    inside = ((i - j < 16) & (i >= j)) if causal else (i - j).abs() <= 8
    peak = (q @ k.mT * SCALING).masked_fill(~inside, -torch.inf).amax(-1, keepdim=True)
    log_tail = (halves(q) @ halves(k).mT).log() + peak
    expected = dense(q, k, v, log_tail, 16, causal, math.log(0.1))
    torch.testing.assert_close(attend(build(causal, tail=tail, window_size=16), q, k, v), expected)


def set_tail(module, seed=5):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g))
    return (x[:, None] for x in (module.query_center, module.key_center))


def rest_of_the_logits(q, k, a, c):
    return SCALING * ((k @ a.mT).mT + (q - a) @ c.mT)


@SIDES
def test_taylor_is_its_formula(causal):
    q, k, v = draw(100)
    module = build(causal, tail="taylor", window_size=10, projection_size=4)
    a, c = set_tail(module)
    u = SCALING * ((q - a) @ module.query_weight.mT) @ ((k - c) @ module.key_weight.mT).mT
    log_tail = (1 + u + u**2 / 2).log() + rest_of_the_logits(q, k, a, c)
    expected = dense(q, k, v, log_tail, 10, causal, module.window_log_factor[:, None, None])
    torch.testing.assert_close(attend(module, q, k, v), expected)


@SIDES
def test_centroids_are_their_formula(causal):
    q, k, v = draw(100)
    module = build(causal, window_size=10, tail="centroids", num_features=6)
    a, c = set_tail(module)
    module.form.copy_(torch.tensor([maps.KEY_CENTROIDS, maps.QUERY_CENTROIDS, maps.KEY_CENTROIDS]))
    u_q = (q - a) @ module.query_weight.mT + module.query_bias[:, None]
    u_k = (k - c) @ module.key_weight.mT + module.key_bias[:, None]
    by_key = (module.form == maps.KEY_CENTROIDS)[:, None, None]
    kernel = torch.where(by_key, u_q.exp() @ u_k.softmax(-1).mT, u_q.softmax(-1) @ u_k.exp().mT)
    log_tail = kernel.log() + rest_of_the_logits(q, k, a, c)
    expected = dense(q, k, v, log_tail, 10, causal, module.window_log_factor[:, None, None])
    torch.testing.assert_close(attend(module, q, k, v), expected)


@SIDES
@pytest.mark.parametrize("tail", ["taylor", "centroids", "hedgehog"])
def test_a_window_over_everything_is_softmax(causal, tail):
    q, k, v = draw(40)
    module = build(causal, tail=tail, window_size=40 if causal else 78)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=SCALING)
    torch.testing.assert_close(attend(module, q, k, v), want)


@SIDES
def test_taylor_is_near_softmax_where_logits_are_small(causal):
    """The tail stands on the scale of the logits: an exact expansion needs no balancing."""
    q, k, v = draw(60)
    module = build(causal, tail="taylor", window_size=4, projection_size=8)
    want = torch.nn.functional.scaled_dot_product_attention(0.3 * q, 0.3 * k, v, is_causal=causal, scale=SCALING)
    torch.testing.assert_close(attend(module, 0.3 * q, 0.3 * k, v), want, atol=2e-3, rtol=0)


@SIDES
@pytest.mark.parametrize(("tail", "gain"), [("taylor", 0.4), ("centroids", 0.5), ("hedgehog", 1.0)])
def test_calibration_is_never_worse_in_any_head(causal, tail, gain):
    q, k, v = draw(120)
    q[:, 0] += 1.5  # head 0: what all queries share makes the logits large
    k[:, 0] += torch.linspace(-2, 2, 8, dtype=torch.float64)
    padding = torch.ones(2, 120, dtype=torch.bool)
    padding[0, 100:] = False
    module = build(causal, tail=tail, window_size=8)
    seen = padding[:, None, None, :] & (torch.ones(120, 120).tril().bool() if causal else True)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALING)

    def errors():
        return ((attend(module, q, k, v, padding) - want) * padding[:, None, :, None]).square().sum((0, 2, 3))

    before = errors()
    poisoned = [x.masked_fill(~padding[:, None, :, None], 1e9) for x in (q, k, v)]
    module.calibrate([AttentionInputs(*poisoned, padding, causal, SCALING)])
    assert (errors() <= before * 1.0001).all()
    assert errors()[0] < gain * before[0]


@SIDES
def test_the_default_tail_is_the_one_that_lasts_on_its_side(causal):
    module, named = (build(causal, tail=tail) for tail in (None, "centroids" if causal else "taylor"))
    assert module.state_dict().keys() == named.state_dict().keys()
    assert LolcatsConfig().to_dict()["tail"] is None, "a saved model keeps what it was told"


def test_a_tail_is_turned_down_until_the_model_is_no_worse_than_its_window_alone():
    """Tokens that attend to their like: most of what features give to keys outside the window is wrong."""
    q, _, v = draw(200)
    q = 3 * q
    module = build(True, window_size=16, tail="hedgehog")
    want = torch.nn.functional.scaled_dot_product_attention(q, q, v, is_causal=True, scale=SCALING)
    module.calibrate([AttentionInputs(q, q, v, None, True, SCALING)])
    error = (attend(module, q, q, v) - want).square().sum()
    module.drop_linear_branch()
    assert error < (attend(module, q, q, v) - want).square().sum()


def test_decode_state_is_the_window_and_the_sums():
    module = build(True, tail="taylor", window_size=6, projection_size=4)
    state = module.init_state(2, torch.float32, "cpu")
    assert state["key"].shape == state["value"].shape == (2, 3, 6, 8)
    features = 1 + 4 + 4 * 5 // 2
    assert state["kv"].shape == (2, 3, features, 8)
    _, state = module(AttentionInputs(*draw(50), None, True, SCALING), module.init_state(2, torch.float64, "cpu"))
    assert state["key"].shape == (2, 3, 6, 8)
    assert state["kv"].shape == (2, 3, features, 8)
    torch.testing.assert_close(state["key"], draw(50)[1][:, :, -6:])


@SIDES
@pytest.mark.parametrize("tail", ["taylor", "centroids", "hedgehog"])
def test_without_its_linear_branch_it_is_the_window_alone(causal, tail):
    q, k, v = draw(90)
    module = build(causal, tail=tail, window_size=10)
    set_tail(module)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with_tail = attend(module, q, k, v)
    assert module.drop_linear_branch()
    nothing = torch.tensor(-torch.inf, dtype=torch.float64)
    expected = dense(q, k, v, nothing, 10, causal, 0.0)
    assert not torch.allclose(with_tail, expected)
    torch.testing.assert_close(attend(module, q, k, v), expected)
    real = torch.arange(90) % 3 != 1
    padded = attend(module, *(x.masked_fill(~real[:, None], 1e9) for x in (q, k, v)), real.expand(2, -1))
    alone = dense(*(x[:, :, real] for x in (q, k, v)), nothing, 10, causal, 0.0)
    torch.testing.assert_close(padded[:, :, real], alone)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert not module.drop_linear_branch(), "there is none any more"


def test_without_its_linear_branch_it_decodes_from_the_window():
    q, k, v = draw(50)
    module = build(True, tail="taylor", window_size=6, projection_size=4)
    set_tail(module)
    module.drop_linear_branch()
    state, rows = module.init_state(2, torch.float64, "cpu"), []
    for part in (slice(0, 20), *(slice(t, t + 1) for t in range(20, 50))):
        row, state = module(AttentionInputs(*(x[:, :, part] for x in (q, k, v)), None, True, SCALING), state)
        rows.append(row)
    torch.testing.assert_close(torch.cat(rows, 2), attend(module, q, k, v))
    assert not state["kv"].any()


@pytest.mark.parametrize(("max_length", "window"), [(512, 64), (8192, 64), (160, 20), (16, 2)])
def test_the_default_window_suits_the_longest_input(max_length, window):
    assert build(max_length=max_length).window_size == window


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tail": "elu"}, "tail='elu'; allowed: taylor, hedgehog, centroids, None"),
        ({"window_size": 0}, "window_size=0; allowed: an integer of at least 1, or None"),
        ({"num_features": 5}, "num_features=5; allowed: an even integer, or None"),
        ({"num_features": True}, "num_features=True"),
        ({"projection_size": None}, "projection_size=None; allowed: an integer of at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LolcatsConfig(**options)


def test_an_encoder_window_is_even():
    with pytest.raises(ValueError, match="window_size=5; allowed on an encoder: even"):
        build(window_size=5)
    assert build(True, window_size=5).window_size == 5


def test_the_other_side_is_refused():
    q, k, v = draw(5)
    with pytest.raises(ValueError, match="is_causal=False"):
        build()(AttentionInputs(q, k, v, None, True, SCALING))
