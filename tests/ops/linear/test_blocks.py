"""Linear attention in blocks, whose backward pass is its own, against dense formulas and finite differences."""

import pytest
import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.ops.features.maps import ParametricMap, exp_features
from hf_linear_attn.ops.linear import decay, layout
from hf_linear_attn.ops.linear.attention import (
    LogDecay,
    feature_map_attention,
    feature_map_attention_with_normalizer,
    init_linear_state,
    linear_attention,
)
from tests.ops.references import naive_linear_attention

F64 = torch.float64
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
OPTIONS = pytest.mark.parametrize("options", ["plain", "weighted", "raw"])
KINDS = pytest.mark.parametrize("kind", ["scalar", "per_feature"])


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


def decayed(q, k, v, g, **given):
    return linear_attention(q, k, v, log_decay=g, is_causal=True, **given)


def dense_decayed(q, k, v, g, **given):
    return naive_linear_attention(q, k, v, log_decay=g, is_causal=True, **given)


def draw_decayed(length, kind, *, strength=1.0, dtype=F64):
    g = torch.Generator().manual_seed(length)
    q, k = torch.rand(2, 2, 3, length, 5, generator=g, dtype=F64).to(dtype)
    v = torch.randn(2, 3, length, 4, generator=g, dtype=F64).to(dtype)
    shape = (2, 3, length) if kind == "scalar" else (2, 3, length, 5)
    return q, k, v, -strength * torch.rand(shape, generator=g, dtype=F64).to(dtype)


def weights_of(length, options, dtype=F64):
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, length, generator=g, dtype=F64).to(dtype) if options == "weighted" else None


def gradients(attend, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs if x is not None]
    output = attend(*inputs)
    return [output, *torch.autograd.grad(output.square().sum(), inputs)]


@KINDS
@OPTIONS
@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
@pytest.mark.parametrize("strength", [0.0, 0.1, 1.0, 50.0])
@pytest.mark.parametrize("length", [9, 45])
def test_outputs_and_gradients_are_the_dense_formula_s(length, strength, padded, options, kind, small_blocks):
    """None, mild and strong decays; a strength of 50 forgets all within a token or two."""
    inputs = [*draw_decayed(length, kind, strength=strength), weights_of(length, options)]
    given = {"token_mask": padding_of(length) if padded else None, "normalized": options != "raw"}

    def blocks(q, k, v, g, w=None):
        return decayed(q, k, v, g, key_log_weight=w, **given)[0]

    def dense(q, k, v, g, w=None):
        return dense_decayed(q, k, v, g, key_log_weight=w, **given)

    for actual, expected in zip(gradients(blocks, inputs), gradients(dense, inputs), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-7)


@KINDS
@pytest.mark.parametrize("strength", [0.0, 0.5, 50.0])
def test_float32_and_half_gradients_are_close(strength, kind):
    inputs = [*draw_decayed(200, kind, strength=strength), weights_of(200, "weighted")]
    exact = gradients(lambda *x: decayed(*x[:4], key_log_weight=x[4])[0], inputs)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        rounded = [x.to(dtype) if i < 3 else x.float() for i, x in enumerate(inputs)]
        found = gradients(lambda *x: decayed(*x[:4], key_log_weight=x[4])[0], rounded)
        for actual, expected in zip(found, exact, strict=True):
            assert (actual.double() - expected).abs().max() < tolerance * expected.abs().max(), dtype


@KINDS
@OPTIONS
def test_gradients_of_states_in_and_out(options, kind, small_blocks):
    """A state goes in, and outputs and the state after them come out: finite differences agree with both."""
    q, k, v, g = draw_decayed(21, kind)
    normalized, weight, padding = options != "raw", weights_of(21, options), padding_of(21)
    _, start = decayed(
        *draw_decayed(7, kind),
        normalized=normalized,
        state=init_linear_state(2, 3, 5, 4, F64, q.device, normalized=normalized),
    )
    names = ["kv", "z"] if normalized else ["kv"]

    def run(q, k, v, g, *rest):
        state = {**start, **dict(zip(names, rest, strict=False))}
        w = rest[len(names)] if weight is not None else None
        output, after = decayed(q, k, v, g, key_log_weight=w, token_mask=padding, normalized=normalized, state=state)
        return output, *(after[name] for name in names)

    inputs = [q, k, v, g, *(start[name] for name in names), *([] if weight is None else [weight])]
    inputs = [x.detach().requires_grad_() for x in inputs]
    if weight is None:
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-6)
    else:  # the state's own scale follows the weights: only what it stands for is differentiable
        assert torch.autograd.gradcheck(lambda *x: run(*x)[0], inputs, fast_mode=True, atol=1e-6)


def gate(tokens, weight, bias):
    """`[B, 1, T, X]` to log-decays `[B, H, T, F]`."""
    return torch.nn.functional.logsigmoid(tokens @ weight.mT + bias)


def test_gradients_of_maps_and_gates_with_parameters(small_blocks):
    q, k, v, _ = draw_decayed(21, "scalar")
    g = torch.Generator().manual_seed(3)
    tokens = torch.randn(2, 1, 21, 6, generator=g, dtype=F64)
    weight, bias = torch.randn(3, 5, 6, generator=g, dtype=F64), torch.randn(3, 1, 5, generator=g, dtype=F64)
    mixing, padding = 0.5 * torch.randn(5, 5, generator=g, dtype=F64), padding_of(21)

    def run(q, k, v, tokens, weight, bias, mixing):
        maps = [ParametricMap(lambda x, w: exp_features(x @ w.mT), (mixing,)) for _ in range(2)]
        log_decay = LogDecay(gate, tokens, (weight, bias))
        output, _ = feature_map_attention(q, k, v, *maps, log_decay=log_decay, token_mask=padding, is_causal=True)
        return output

    inputs = [x.requires_grad_() for x in (q, k, v, tokens, weight, bias, mixing)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("unnamed", ["gate", "keys"])
def test_what_trains_unnamed_still_trains(unnamed, small_blocks):
    q, k, v, _ = draw_decayed(20, "scalar")
    tokens = torch.randn(2, 1, 20, 5, generator=torch.Generator().manual_seed(3), dtype=F64)
    bias, mixing = torch.zeros(3, 1, 5, dtype=F64).requires_grad_(), torch.eye(5, dtype=F64).requires_grad_()
    found = []
    for named in (True, False):
        log_decay = LogDecay(lambda x, b=bias: gate(x, torch.eye(5, dtype=F64), b), tokens)
        k_map = ParametricMap(lambda x, w=mixing: exp_features(x @ w.mT))
        if named or unnamed == "keys":
            log_decay = LogDecay(log_decay.function, tokens, (bias,))
        if named or unnamed == "gate":
            k_map = ParametricMap(k_map.function, (mixing,))
        output, _ = feature_map_attention(q, k, v, exp_features, k_map, log_decay=log_decay, is_causal=True)
        found.append(torch.autograd.grad(output.square().sum(), [bias, mixing]))
    for actual, expected in zip(*found, strict=True):
        assert expected.any()
        torch.testing.assert_close(actual, expected)


@KINDS
def test_strong_and_mild_blocks_meet(kind, small_blocks, monkeypatch):
    """A call has blocks of both kinds, and both of them run."""
    q, k, v, g = draw_decayed(64, kind, strength=0.5)
    g[:, :, 20:28] *= 100
    seen = []
    split = decay._split
    monkeypatch.setattr(decay, "_split", lambda *x: seen.append(split(*x)) or seen[-1])
    output = decayed(q, k, v, g)[0]
    assert [x is None for x in seen] == [False, True, False, False]
    torch.testing.assert_close(output, dense_decayed(q, k, v, g))


@KINDS
@pytest.mark.parametrize("strength", [0.5, 50.0])
def test_no_row_depends_on_a_later_one(strength, kind):
    q, k, v, g = draw_decayed(150, kind, strength=0.5)
    for position in (1, 30, 64, 149):
        changed = [x.clone() for x in (q, k, v, g)]
        for x, factor in zip(changed, (9.0, 9.0, 9.0, strength), strict=True):
            x[:, :, position:] *= factor
        before, after = (decayed(*x)[0][:, :, :position] for x in ((q, k, v, g), changed))
        torch.testing.assert_close(after, before, atol=1e-12, rtol=1e-12)


def test_log_decays_are_never_held_whole():
    """The gate is asked for a block at a time, forward and backward, and its values are freed."""
    q, k, v, _ = (x.requires_grad_() for x in draw_decayed(5000, "scalar", dtype=torch.float32))
    tokens, lengths = torch.zeros(2, 1, 5000, 5, requires_grad=True), []

    def count(x):
        lengths.append(x.shape[2])
        return torch.nn.functional.logsigmoid(x + 9.0).expand(-1, 3, -1, -1)

    gate = LogDecay(count, tokens)
    feature_map_attention(q, k, v, exp_features, exp_features, log_decay=gate, is_causal=True)[0].sum().backward()
    assert max(lengths) <= layout.block_size(v)
    assert sum(lengths) == 2 * 5000 + 1  # and a look at one token for tensors that train unnamed


@KINDS
def test_a_returned_state_may_change_before_the_backward_pass(kind, small_blocks):
    q, k, v, g = (x.requires_grad_() for x in draw_decayed(45, kind))
    found = []
    for changed in (False, True):
        start = init_linear_state(2, 3, 5, 4, F64, q.device)
        output, state = decayed(q, k, v, g, state=start)
        if changed:
            with torch.no_grad():
                for x in state.values():
                    x.fill_(7.0)
        found.append(torch.autograd.grad(output.square().sum(), [q, k, v, g]))
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)
