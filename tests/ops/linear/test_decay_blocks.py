"""Decayed attention in blocks, whose backward pass is its own, against the dense formula and autograd."""

import pytest
import torch

from hf_linear_attn.ops.features.maps import ParametricMap, exp_features
from hf_linear_attn.ops.linear import decay, decay_chunks
from hf_linear_attn.ops.linear import sums as linear_sums
from hf_linear_attn.ops.linear.decay import (
    LogDecay,
    decay_linear_attention,
    feature_map_decay_attention,
    init_decay_state,
)
from tests.ops.references import naive_decay_linear_attention

F64 = torch.float64
OPTIONS = pytest.mark.parametrize("options", ["plain", "weighted", "raw"])
KINDS = pytest.mark.parametrize("kind", ["scalar", "per_feature"])


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens in chunks of 8."""
    monkeypatch.setattr(linear_sums, "_CPU_BLOCK_ROWS", 1)
    monkeypatch.setattr(linear_sums, "_MIN_BLOCK", 16)
    monkeypatch.setattr(linear_sums, "CHUNK", 8)


def draw(length, kind, *, strength=1.0, dtype=F64):
    g = torch.Generator().manual_seed(length)
    q, k = torch.rand(2, 2, 3, length, 5, generator=g, dtype=F64).to(dtype)
    v = torch.randn(2, 3, length, 4, generator=g, dtype=F64).to(dtype)
    shape = (2, 3, length) if kind == "scalar" else (2, 3, length, 5)
    return q, k, v, -strength * torch.rand(shape, generator=g, dtype=F64).to(dtype)


def weights_of(length, options, dtype=F64):
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, length, generator=g, dtype=F64).to(dtype) if options == "weighted" else None


def padding_of(length):
    real = torch.ones(2, length, dtype=torch.bool)
    real[0, :3], real[1, length - 2 :], real[1, 5] = False, False, False
    return real


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
    inputs = [*draw(length, kind, strength=strength), weights_of(length, options)]
    given = {"token_mask": padding_of(length) if padded else None, "normalised": options != "raw"}

    def blocks(q, k, v, g, w=None):
        return decay_linear_attention(q, k, v, g, key_log_weight=w, **given)[0]

    def dense(q, k, v, g, w=None):
        return naive_decay_linear_attention(q, k, v, g, key_log_weight=w, **given)

    for actual, expected in zip(gradients(blocks, inputs), gradients(dense, inputs), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-7)


@KINDS
@pytest.mark.parametrize("strength", [0.0, 0.5, 50.0])
def test_float32_and_half_gradients_are_close(strength, kind):
    inputs = [*draw(200, kind, strength=strength), weights_of(200, "weighted")]
    exact = gradients(lambda *x: decay_linear_attention(*x[:4], key_log_weight=x[4])[0], inputs)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        rounded = [x.to(dtype) if i < 3 else x.float() for i, x in enumerate(inputs)]
        found = gradients(lambda *x: decay_linear_attention(*x[:4], key_log_weight=x[4])[0], rounded)
        for actual, expected in zip(found, exact, strict=True):
            assert (actual.double() - expected).abs().max() < tolerance * expected.abs().max(), dtype


@KINDS
@OPTIONS
def test_gradients_of_states_in_and_out(options, kind, small_blocks):
    """A state goes in, and outputs and the state after them come out: finite differences agree with both."""
    q, k, v, g = draw(21, kind)
    normalised, weight, padding = options != "raw", weights_of(21, options), padding_of(21)
    _, start = decay_linear_attention(
        *draw(7, kind), normalised=normalised, state=init_decay_state(2, 3, 5, 4, F64, q.device, normalised=normalised)
    )
    names = ["kv", "z"] if normalised else ["kv"]

    def run(q, k, v, g, *rest):
        state = {**start, **dict(zip(names, rest, strict=False))}
        w = rest[len(names)] if weight is not None else None
        output, after = decay_linear_attention(
            q, k, v, g, key_log_weight=w, token_mask=padding, normalised=normalised, state=state
        )
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
    q, k, v, _ = draw(21, "scalar")
    g = torch.Generator().manual_seed(3)
    tokens = torch.randn(2, 1, 21, 6, generator=g, dtype=F64)
    weight, bias = torch.randn(3, 5, 6, generator=g, dtype=F64), torch.randn(3, 1, 5, generator=g, dtype=F64)
    mixing, padding = 0.5 * torch.randn(5, 5, generator=g, dtype=F64), padding_of(21)

    def run(q, k, v, tokens, weight, bias, mixing):
        maps = [ParametricMap(lambda x, w: exp_features(x @ w.mT), (mixing,)) for _ in range(2)]
        output, _ = feature_map_decay_attention(
            q, k, v, LogDecay(gate, tokens, (weight, bias)), *maps, token_mask=padding
        )
        return output

    inputs = [x.requires_grad_() for x in (q, k, v, tokens, weight, bias, mixing)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("unnamed", ["gate", "keys"])
def test_what_trains_unnamed_still_trains(unnamed, small_blocks):
    q, k, v, _ = draw(20, "scalar")
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
        output, _ = feature_map_decay_attention(q, k, v, log_decay, exp_features, k_map)
        found.append(torch.autograd.grad(output.square().sum(), [bias, mixing]))
    for actual, expected in zip(*found, strict=True):
        assert expected.any()
        torch.testing.assert_close(actual, expected)


@KINDS
def test_strong_and_mild_blocks_meet(kind, small_blocks, monkeypatch):
    """A call has blocks of both kinds, and both of them run."""
    q, k, v, g = draw(64, kind, strength=0.5)
    g[:, :, 20:28] *= 100
    seen = []
    split = decay_chunks._split
    monkeypatch.setattr(decay_chunks, "_split", lambda *x: seen.append(split(*x)) or seen[-1])
    output = decay_linear_attention(q, k, v, g)[0]
    assert [x is None for x in seen] == [False, True, False, False]
    torch.testing.assert_close(output, naive_decay_linear_attention(q, k, v, g))


@KINDS
@pytest.mark.parametrize("strength", [0.5, 50.0])
def test_no_row_depends_on_a_later_one(strength, kind):
    q, k, v, g = draw(150, kind, strength=0.5)
    for position in (1, 30, 64, 149):
        changed = [x.clone() for x in (q, k, v, g)]
        for x, factor in zip(changed, (9.0, 9.0, 9.0, strength), strict=True):
            x[:, :, position:] *= factor
        before, after = (decay_linear_attention(*x)[0][:, :, :position] for x in ((q, k, v, g), changed))
        torch.testing.assert_close(after, before, atol=1e-12, rtol=1e-12)


@OPTIONS
def test_what_torch_compile_traces_is_the_same(options, small_blocks, monkeypatch):
    """The form for traced graphs, which autograd differentiates, and the blocks."""
    inputs = [*draw(45, "per_feature"), weights_of(45, options)]
    given = {"token_mask": padding_of(45), "normalised": options != "raw"}

    def attend(q, k, v, g, w=None):
        return decay_linear_attention(q, k, v, g, key_log_weight=w, **given)[0]

    blocks = gradients(attend, inputs)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for actual, expected in zip(gradients(attend, inputs), blocks, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-7)


def test_log_decays_are_never_held_whole():
    """The gate is asked for a block at a time, forward and backward, and its values are freed."""
    q, k, v, _ = (x.requires_grad_() for x in draw(5000, "scalar", dtype=torch.float32))
    tokens, lengths = torch.zeros(2, 1, 5000, 5, requires_grad=True), []

    def count(x):
        lengths.append(x.shape[2])
        return torch.nn.functional.logsigmoid(x + 9.0).expand(-1, 3, -1, -1)

    decay.feature_map_decay_attention(q, k, v, LogDecay(count, tokens), exp_features, exp_features)[0].sum().backward()
    assert max(lengths) <= linear_sums.block_size(v)
    assert sum(lengths) == 2 * 5000 + 1  # and a look at one token for tensors that train unnamed
