"""Long-Short Transformer against dense float64 formulas written here, its starts, state and options."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.ops.pooled import landmarks as dynamic_projection
from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.long_short import LongShortAttention, LongShortConfig

HEADS, DIM = 3, 8


def build(is_causal, **options):
    context = LayerContext(0, 1, HEADS * DIM, HEADS, DIM, 64, is_causal)
    module = LongShortAttention(LongShortConfig.from_dict(options), context).double()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def draw(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, length, DIM, generator=generator, dtype=torch.float64) for _ in range(3)]


def attend(module, q, k, v, padding=None):
    is_causal = module.context.is_causal
    with torch.no_grad():
        return module(AttentionInputs(q, k, v, token_mask=padding, is_causal=is_causal, scaling=DIM**-0.5))[0]


def norm(module, x):
    plain = F.layer_norm(x, (DIM,)) * module.weight[:, None] + module.bias[:, None]
    return x + module.gate[:, None, None] * (plain - x)


def pool(k, v, w):
    """One landmark per column of w `[H, D, r]` over all tokens given, and the entropy of its weights."""
    p = torch.softmax(k @ w, -2)
    return p.mT @ k, p.mT @ v, -(p * p.log()).sum(-2)


def attention(module, q, k, v, landmarks, near, past):
    """Softmax over [window ; landmarks]; landmarks are (keys, values, bias)."""
    keys, values, bias = landmarks
    local = q @ norm(module.window_norm, k).mT / math.sqrt(DIM)
    far = q @ norm(module.landmark_norm, keys).mT / math.sqrt(DIM)
    far = far + (bias + module.landmark_bias[:, None])[:, :, None]
    logits = torch.cat([local.masked_fill(~near, -math.inf), far.masked_fill(~past, -math.inf)], -1)
    return logits.softmax(-1) @ torch.cat([norm(module.window_norm, v), norm(module.landmark_norm, values)], 2)


def encoder_formula(module, q, k, v, window, r, segmented=False):
    n = k.shape[2]
    if segmented:
        parts = []
        for j in range(r):
            tokens = [i for i in range(n) if i * r // n == j]
            parts.append(pool(k[:, :, tokens], v[:, :, tokens], module.projection[..., j : j + 1]))
        keys, values = (torch.cat([part[i] for part in parts], 2) for i in (0, 1))
        bias = torch.cat([part[2] for part in parts], -1)
    else:
        keys, values, entropy = pool(k, v, module.projection)
        bias = entropy - math.log(r)
    place = torch.arange(n)
    near = (place[:, None] - place).abs() <= window // 2
    return attention(module, q, k, v, (keys, values, bias), near, torch.ones(n, r, dtype=torch.bool))


def decoder_formula(module, q, k, v, window, c, r):
    n = k.shape[2]
    parts = [pool(k[:, :, s : s + c], v[:, :, s : s + c], module.projection) for s in range(0, n // c * c, c)]
    keys, values = (torch.cat([part[i] for part in parts], 2) for i in (0, 1))
    bias = torch.cat([part[2] for part in parts], -1) - math.log(r)
    place = torch.arange(n)
    distance = place[:, None] - place
    ends = torch.arange(len(parts)).repeat_interleave(r)
    near, past = (distance >= 0) & (distance < window), ends < place[:, None] // c
    return attention(module, q, k, v, (keys, values, bias), near, past)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("side", ["none", "left", "holes"])
def test_encoder_is_its_formula_on_the_real_tokens(segmented, side):
    place = torch.arange(40)
    real = {"none": place >= 0, "left": place >= 11, "holes": place % 3 != 1}[side]
    module = build(False, window_size=6, num_landmarks=4)
    module.segmented.fill_(segmented)
    q, k, v = draw(1, 40)
    output = attend(module, q, k, v, None if side == "none" else real[None])[:, :, real]
    expected = encoder_formula(module, *(x[:, :, real] for x in (q, k, v)), 6, 4, segmented)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("side", ["none", "right", "holes"])
def test_decoder_is_its_formula_on_the_real_tokens(r, side):
    place = torch.arange(43)
    real = {"none": place >= 0, "right": place < 30, "holes": place % 3 != 1}[side]
    module = build(True, window_size=7, num_landmarks=r, segment_size=5)
    q, k, v = draw(1, 43)
    output = attend(module, q, k, v, None if side == "none" else real[None])[:, :, real]
    torch.testing.assert_close(output, decoder_formula(module, *(x[:, :, real] for x in (q, k, v)), 7, 5, r))


def test_several_blocks_of_queries_are_one_formula():
    module = build(True, window_size=16, num_landmarks=1, segment_size=16)
    q, k, v = draw(1, 600)
    torch.testing.assert_close(attend(module, q, k, v), decoder_formula(module, q, k, v, 16, 16, 1))


def test_the_start_gives_each_landmark_the_weight_of_its_share():
    """Nearly equal weights: r landmarks near the mean of all keys, at log(n / r) each."""
    context = LayerContext(0, 1, HEADS * DIM, HEADS, DIM, 64, is_causal=False)
    module = LongShortAttention(LongShortConfig(window_size=2, num_landmarks=4), context).double()
    q, k, v = draw(1, 40)
    place = torch.arange(40)
    local = (q @ k.mT / math.sqrt(DIM)).masked_fill((place[:, None] - place).abs() > 1, -math.inf)
    far = q @ k.mean(2, keepdim=True).mT / math.sqrt(DIM) + math.log(40)
    expected = torch.cat([local, far], -1).softmax(-1) @ torch.cat([v, v.mean(2, keepdim=True)], 2)
    torch.testing.assert_close(attend(module, q, k, v), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_landmarks_a_window_over_everything_is_softmax(is_causal):
    options = get_variant("long_short").exact_limit(13, is_causal)
    context = LayerContext(0, 1, HEADS * DIM, HEADS, DIM, 64, is_causal)
    q, k, v = (x.float() for x in draw(2, 13))
    output = attend(LongShortAttention(LongShortConfig.from_dict(options), context), q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_calibration_pools_with_the_weights_of_the_queries(is_causal):
    """Queries that share a direction pick out a few keys far away: the mean of all keys does not find them."""

    def text(seed):
        q, k, v = (x.float() for x in draw(1, 64, seed))
        return AttentionInputs(q + 2, 1.5 * k, v, is_causal=is_causal, scaling=DIM**-0.5)

    context = LayerContext(0, 1, HEADS * DIM, HEADS, DIM, 64, is_causal)
    config, held_out = LongShortConfig(window_size=16, num_landmarks=1 if is_causal else 4), text(3)
    exact = F.scaled_dot_product_attention(held_out.query, held_out.key, held_out.value, is_causal=is_causal)
    module = LongShortAttention(config, context)
    before = (module(held_out)[0] - exact).norm() / exact.norm()
    module.calibrate([text(1), text(2)])
    assert (module(held_out)[0] - exact).norm() / exact.norm() < 0.7 * before
    start = module.projection.detach().clone()
    module.reset_parameters()
    assert not torch.equal(module.projection, start)
    assert not module.segmented.any()


def test_state_is_a_window_and_one_landmark_per_segment():
    module = build(True, window_size=8, num_landmarks=1, segment_size=8)
    q, k, v = draw(2, 50)
    state = module.init_state(2, torch.float64, torch.device("cpu"))
    for t in range(50):
        step = AttentionInputs(*(x[:, :, t : t + 1] for x in (q, k, v)), is_causal=True, scaling=DIM**-0.5)
        _, state = module(step, state)
        assert 7 <= state["key"].shape[2] < 7 + 8
    assert state["landmark_key"].shape == (2, HEADS, 50 // 8, DIM + 1)
    assert state["landmark_value"].shape == (2, HEADS, 50 // 8, DIM)


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_its_linear_branch_it_is_the_window_alone(is_causal):
    module = build(is_causal, window_size=8, num_landmarks=2, segment_size=5 if is_causal else None)
    q, k, v = draw(2, 50)
    with_landmarks = attend(module, q, k, v)
    assert module.drop_linear_branch()
    place = torch.arange(50)
    distance = place[:, None] - place
    near = (distance >= 0) & (distance < 8) if is_causal else distance.abs() <= 4
    logits = (q @ norm(module.window_norm, k).mT / math.sqrt(DIM)).masked_fill(~near, -math.inf)
    expected = logits.softmax(-1) @ norm(module.window_norm, v)
    assert not torch.allclose(with_landmarks, expected)
    torch.testing.assert_close(attend(module, q, k, v), expected)
    assert "projection" in module.state_dict()
    assert not module.drop_linear_branch(), "there is none any more"
    assert not build(is_causal, window_size=8, num_landmarks=0).drop_linear_branch()


def test_without_its_linear_branch_it_decodes_from_the_window():
    module = build(True, window_size=8, num_landmarks=1, segment_size=8)
    module.drop_linear_branch()
    q, k, v = draw(2, 50)
    state, rows = module.init_state(2, torch.float64, torch.device("cpu")), []
    for t in range(50):
        step = AttentionInputs(*(x[:, :, t : t + 1] for x in (q, k, v)), is_causal=True, scaling=DIM**-0.5)
        row, state = module(step, state)
        rows.append(row)
    assert state.keys() == {"key", "value", "count"}
    torch.testing.assert_close(torch.cat(rows, 2), attend(module, q, k, v))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, "window_size=0"),
        ({"num_landmarks": -1}, "num_landmarks=-1"),
        ({"segment_size": 0}, "segment_size=0"),
        ({"norm_gate": "on"}, "norm_gate='on'; allowed: a number, or None"),
        ({"landmark_bias": None}, "landmark_bias=None; allowed: a number"),
        ({"seed": True}, "seed=True"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LongShortConfig(**options)


@pytest.mark.parametrize(
    ("is_causal", "options", "message"),
    [
        (False, {"window_size": 5}, "window_size=5"),
        (False, {"segment_size": 4}, "segment_size=4"),
        (True, {"window_size": 8, "segment_size": 9}, "at most window_size=8"),
    ],
)
def test_options_of_the_other_side_are_refused(is_causal, options, message):
    with pytest.raises(ValueError, match=message):
        build(is_causal, **options)


@pytest.mark.parametrize("from_start", [False, True])
@pytest.mark.parametrize("q_len", [150, 70])
def test_blocks_of_a_decoder_and_their_gradients_do_not_depend_on_the_kernels(from_start, q_len, monkeypatch):
    """The kernels of the CPU with sums of their own, and what other devices run."""
    generator = torch.Generator().manual_seed(3)
    lengths = q_len, 150, 150, 60, 60
    tensors = [torch.randn(2, HEADS, n, DIM, generator=generator, dtype=torch.float64) for n in lengths]
    rank = torch.arange(150) - torch.tensor([[0], [90]])  # in the second row 90 places of padding
    sizes = {"window_size": 21, "segment_size": 5, "per_segment": 2, "scaling": 0.6, "from_start": from_start}
    results = []
    for serves in (True, False):
        monkeypatch.setattr(dynamic_projection, "serves", lambda *_, serves=serves: serves)
        q, k, v, *landmarks = leaves = [x.clone().requires_grad_() for x in tensors]
        out = dynamic_projection.attend_window_and_segments(q, k, v, rank, tuple(landmarks), **sizes)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert (results[0][0][1, :, : max(0, 90 - 150 + q_len)] == 0).all()
