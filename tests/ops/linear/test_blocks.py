"""Linear attention, prefix softmax and windows in blocks, whose backward passes are their own, against autograd."""

import pytest
import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.ops.features.maps import ParametricMap, exp_features, taylor_features
from hf_linear_attn.ops.linear import blocks as linear_blocks
from hf_linear_attn.ops.linear import sums as linear_sums
from hf_linear_attn.ops.linear.attention import (
    feature_map_attention,
    feature_map_attention_with_normalizer,
    linear_attention,
)
from hf_linear_attn.ops.prefix import blocks as prefix_blocks
from hf_linear_attn.ops.prefix.attention import prefix_softmax_attention
from hf_linear_attn.ops.window import tail_blocks as window_blocks
from hf_linear_attn.ops.window.tail_blocks import window_block_softmax
from tests.ops.references import naive_linear_attention, naive_prefix_softmax

F64 = torch.float64
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens in chunks of 4."""
    monkeypatch.setattr(linear_sums, "_CPU_BLOCK_ROWS", 1)
    monkeypatch.setattr(linear_sums, "_MIN_BLOCK", 16)
    monkeypatch.setattr(linear_sums, "CHUNK", 4)


def draw(length, *, dim=4, batch=2, heads=2, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, length, dim, generator=g, dtype=F64).to(dtype).unbind(0)


def padding_of(length):
    real = torch.ones(2, length, dtype=torch.bool)
    real[0, :3], real[1, length - 2 :], real[1, 5] = False, False, False
    return real


@CAUSAL
def test_gradients_of_maps_with_parameters_and_of_the_normalizer(causal, small_blocks):
    """The features' log scale, weights, parameters and the log denominator all get what finite differences say."""
    q, k, v = (0.5 * x for x in draw(22))
    weight = 0.5 * torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    padding = padding_of(22)

    def run(q, k, v, w):
        maps = [ParametricMap(lambda x, w: exp_features(x @ w.mT), (w,)) for _ in range(2)]
        output, normalizer, _ = feature_map_attention_with_normalizer(
            q, k, v, *maps, token_mask=padding, is_causal=causal
        )
        return output, normalizer.masked_fill(~padding[:, None], 0)

    inputs = [x.requires_grad_() for x in (q, k, v, weight)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-6)


def test_a_map_that_trains_unnamed_tensors_still_trains_them(small_blocks):
    q, k, v = draw(20)
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=F64).requires_grad_()

    def hidden(x):
        return exp_features(x @ weight.mT)

    def named(x, w):
        return exp_features(x @ w.mT)

    gradients = []
    for feature_map in (hidden, ParametricMap(named, (weight,))):
        output, _ = feature_map_attention(q, k, v, feature_map, feature_map, is_causal=True)
        gradients.append(torch.autograd.grad(output.square().sum(), weight)[0])
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
@pytest.mark.parametrize("rise", [0.0, 15.0, 60.0, 400.0])
def test_weights_that_rise_inside_a_block(rise, padded, small_blocks):
    """Outputs and gradients where one P serves a block, and where it does not."""
    q, k, v = draw(30)
    q, k = q.abs(), k.abs()
    weight = torch.linspace(-rise, rise, 30, dtype=F64).expand(2, 2, -1) + torch.randn(2, 2, 30, dtype=F64)
    padding = padding_of(30) if padded else None
    inputs = [x.detach().requires_grad_() for x in (q, k, v, weight)]
    results = []
    for attend in (lambda *a, **o: linear_attention(*a, **o)[0], naive_linear_attention):
        output = attend(*inputs[:3], key_log_weight=inputs[3], token_mask=padding, is_causal=True)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_steep_block_is_found():
    power = torch.zeros(1, 1, 8)
    start = torch.full((1, 1), LOG_ZERO)
    assert not linear_blocks._is_steep(power, start)
    power[..., 5] = 100.0
    assert linear_blocks._is_steep(power, start)
    power[..., :5] = LOG_ZERO  # padding: no row sees less
    assert not linear_blocks._is_steep(power[..., :6], start)


def test_gradients_reach_and_leave_a_state_across_blocks(small_blocks):
    q, k, v = draw(50)
    q, k, inputs = q.abs(), k.abs(), []
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    whole = torch.autograd.grad(linear_attention(*inputs, is_causal=True)[0].square().sum(), inputs)
    empty = {
        "kv": torch.zeros(2, 2, 4, 4, dtype=F64),
        "z": torch.zeros(2, 2, 4, dtype=F64),
        "log_scale": torch.full((2, 2), LOG_ZERO, dtype=F64),
    }
    first, state = linear_attention(*(x[:, :, :23] for x in inputs), is_causal=True, state=empty)
    second, _ = linear_attention(*(x[:, :, 23:] for x in inputs), is_causal=True, state=state)
    parts = torch.autograd.grad(first.square().sum() + second.square().sum(), inputs)
    for actual, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(actual, expected)


def test_training_holds_no_features():
    """Saved for the backward pass: inputs, output, denominators and a state per block, not 128 features a token."""
    saved = []
    x = torch.randn(1, 4, 4096, 8).requires_grad_()

    def wide(x):
        return x.repeat(1, 1, 1, 16).abs(), None

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        output = feature_map_attention(x, x, x, wide, wide, is_causal=True)[0]
    output.sum().backward()  # what it computes again it saves for itself, block by block
    assert sum(saved) < 4 * 4096 * 64


@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
@pytest.mark.parametrize("rise", [1.0, 30.0, 300.0])
def test_prefix_softmax_whose_maxima_rise(rise, padded, small_blocks):
    """Blocks of one pass and of several, outputs and gradients, fewer queries than keys."""
    q, k, v = draw(40)
    k = k * rise
    padding = padding_of(40) if padded else None
    inputs = [x.detach().requires_grad_() for x in (q[:, :, 19:], k, v)]
    results = []
    for attend in (lambda *x, **o: prefix_softmax_attention(*x, **o)[0], naive_prefix_softmax):
        output = attend(*inputs, token_mask=padding, is_causal=True)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_passes_cover_the_rows_once_and_split_at_rises():
    power = torch.zeros(1, 2, 12, 3)
    start = torch.full((1, 2, 3), LOG_ZERO)
    assert prefix_blocks._passes(power, start, False) == [slice(0, 12)]
    power[0, 1, 7, 2], power[0, 0, 9, 0] = 50.0, 90.0
    assert prefix_blocks._passes(power, start, False) == [slice(0, 7), slice(7, 9), slice(9, 12)]


@pytest.mark.parametrize(("left", "right"), [(5, 0), (3, 3), (40, 0), (0, 0)])
def test_window_gradients(left, right, small_blocks, monkeypatch):
    """Of outputs, log denominators and largest logits; more keys than queries, some of them hidden."""
    monkeypatch.setattr(window_blocks, "_CHUNK", 4)
    q, k, v = draw(26)
    allowed = padding_of(26)
    inputs = [x.requires_grad_() for x in (q[:, :, 5:].clone(), k.clone(), v.clone())]
    distance = torch.arange(26) - torch.arange(5, 26)[:, None]
    seen = (distance >= -left) & (distance <= right) & allowed[:, None, None]
    blind = ~seen.any(-1)

    def blocks(q, k, v):
        found = window_block_softmax(q, k, v, left=left, right=min(right, 20), scaling=0.7, key_allowed=allowed)
        return found[0], *(x.masked_fill(blind, 0) for x in found[1:])

    def dense(q, k, v):
        logits = (q @ k.mT * 0.7).masked_fill(~seen, -1e30)
        output = (logits.softmax(-1) @ v).masked_fill(blind[..., None], 0)
        return output, *(x.masked_fill(blind, 0) for x in (logits.logsumexp(-1), logits.amax(-1)))

    results = []
    for attend in (blocks, dense):
        outputs = attend(*inputs)
        loss = sum((i + 1) * x.square().sum() for i, x in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_taylor_features_are_exact_in_float64():
    x, y = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    u = x @ y.mT
    products = taylor_features(x, 2)[0] @ taylor_features(y, 2)[0].mT
    torch.testing.assert_close(products, 1 + u + u.square() / 2, atol=1e-12, rtol=1e-12)
