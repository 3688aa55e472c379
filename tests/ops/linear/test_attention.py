"""Linear attention ops against the dense float64 formula, written out in this file."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_linear_attn.ops.linear import layout
from hf_linear_attn.ops.linear.attention import feature_map_attention, init_linear_state, linear_attention
from tests.ops.linear import forms
from tests.ops.references import naive_linear_attention

LENGTHS = (1, 7, 36, 65, 130, 300)
F64 = torch.float64


def draw(length, *, batch=2, heads=3, features=5, dim=4, spread=3.0, dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k = torch.rand(2, batch, heads, length, features, generator=g, dtype=F64).to(dtype)
    v = torch.randn(batch, heads, length, dim, generator=g, dtype=F64).to(dtype)
    weight = (torch.randn(batch, heads, length, generator=g, dtype=F64) * spread).to(dtype)
    return q, k, v, weight


def dense(q, k, v, weight=None, padding=None, *, causal):
    """The formula, row by row, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    output = torch.zeros(*q.shape[:3], v.shape[-1], dtype=F64)
    factor = torch.ones_like(v[..., 0]) if weight is None else weight.double().exp()
    if padding is not None:
        factor = factor * padding[:, None]
        v = torch.where(padding[:, None, :, None], v, torch.zeros_like(v))
    for r in range(q.shape[2]):
        last = k.shape[2] - q.shape[2] + r + 1 if causal else k.shape[2]
        score = (q[:, :, r, None] * k[:, :, :last]).sum(-1) * factor[:, :, :last]
        total = score.sum(-1, keepdim=True)
        row = (score[..., None] * v[:, :, :last]).sum(2) / total
        output[:, :, r] = torch.where(total == 0, torch.zeros_like(row), row)
    return output


def masks(length, batch=2):
    g = torch.Generator().manual_seed(length)
    ends = torch.randint(1, length + 1, (batch,), generator=g)
    right = torch.arange(length) < ends[:, None]
    interior = torch.rand(batch, length, generator=g) < 0.6
    return {"right": right, "left": right.flip(1), "interior": interior}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_form_is_the_dense_formula(length, causal, weighted):
    q, k, v, weight = draw(length)
    weight = weight if weighted else None
    expected = dense(q, k, v, weight, causal=causal)
    outputs = {
        "naive": naive_linear_attention(q, k, v, key_log_weight=weight, is_causal=causal),
        "entry": linear_attention(q, k, v, key_log_weight=weight, is_causal=causal)[0],
    }
    if causal:
        for size in (1, 16, 64, 128):
            outputs[f"chunks of {size}"] = forms.traced(q, k, v, key_log_weight=weight, chunk=size)[0]
        outputs["token by token"] = forms.token_by_token(q, k, v, key_log_weight=weight)[0]
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_blocks_of_a_long_sequence_join_exactly(causal, monkeypatch):
    monkeypatch.setattr(layout, "_CPU_BLOCK_ROWS", 1)
    monkeypatch.setattr(layout, "_MIN_BLOCK", 64)
    for length in (64, 65, 129, 300):
        q, k, v, weight = draw(length)
        padding = masks(length)["interior"]
        for w in (None, weight):
            output = linear_attention(q, k, v, key_log_weight=w, token_mask=padding, is_causal=causal)[0]
            torch.testing.assert_close(output, dense(q, k, v, w, padding, causal=causal))
            state = init_linear_state(2, 3, 5, 4, F64, q.device) if causal else None
            again = linear_attention(q, k, v, key_log_weight=w, token_mask=padding, is_causal=causal, state=state)[0]
            torch.testing.assert_close(again, output)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("split", [(1,) * 70, (70,), (33, 1, 1, 35), (69, 1), (7,) * 10])
def test_any_split_with_a_state_is_the_whole(split, weighted):
    q, k, v, weight = draw(70)
    weight = weight if weighted else None
    expected = dense(q, k, v, weight, causal=True)
    for form in (forms.attend, forms.traced, forms.token_by_token):
        state, outputs = init_linear_state(2, 3, 5, 4, F64, q.device), []
        for part in torch.arange(70).split(split):
            w = None if weight is None else weight[:, :, part]
            output, state = form(q[:, :, part], k[:, :, part], v[:, :, part], key_log_weight=w, state=state)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, 2), expected)


def test_a_state_from_weighted_keys_takes_unweighted_ones():
    q, k, v, weight = draw(20)
    weight[:, :, 10:] = 0
    parts = (x[:, :, :10] for x in (q, k, v))
    _, state = forms.token_by_token(*parts, key_log_weight=weight[:, :, :10] - 500)
    output, _ = linear_attention(q[:, :, 10:], k[:, :, 10:], v[:, :, 10:], is_causal=True, state=state)
    weight[:, :, :10] -= 500
    torch.testing.assert_close(output, dense(q, k, v, weight, causal=True)[:, :, 10:])


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("queries", [1, 7, 64, 129])
def test_fewer_queries_than_keys(queries, causal):
    q, k, v, weight = draw(130)
    q = q[:, :, -queries:]
    for w in (None, weight):
        output = linear_attention(q, k, v, key_log_weight=w, is_causal=causal)[0]
        torch.testing.assert_close(output, dense(q, k, v, w, causal=causal))


@pytest.mark.parametrize("queries", [4, 21])
def test_without_a_normalizer(queries, small_blocks):
    """Sums as they are, without decay too, and their gradients; fewer queries than keys are the last."""
    q, k, v, _ = draw(21)
    inputs = [x.requires_grad_() for x in (q[:, :, -queries:], k, v)]
    found = linear_attention(*inputs, is_causal=True, normalized=False)[0]
    expected = (inputs[0] @ k.mT).tril(21 - queries) @ v
    torch.testing.assert_close(found, expected)
    exact = torch.autograd.grad(expected.square().sum(), inputs)
    for actual, wanted in zip(torch.autograd.grad(found.square().sum(), inputs), exact, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 70])
def test_a_state_of_another_dtype(length, dtype, decayed):
    q, k, v, _ = (x.float() for x in draw(length + 5))
    decay = -torch.rand(2, 3, length + 5, generator=torch.Generator().manual_seed(1)) if decayed else None
    whole = linear_attention(q, k, v, log_decay=decay, is_causal=True)[0]
    parts = [[None if x is None else x[:, :, i:j] for x in (q, k, v, decay)] for i, j in ((0, 5), (5, None))]
    empty = init_linear_state(2, 3, 5, 4, torch.float32, q.device)
    _, state = linear_attention(*parts[0][:3], log_decay=parts[0][3], is_causal=True, state=empty)
    state = {name: x.to(dtype) for name, x in state.items()}
    output, after = linear_attention(*parts[1][:3], log_decay=parts[1][3], is_causal=True, state=state)
    tolerance = 1e-5 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(output, whole[:, :, 5:], atol=tolerance, rtol=tolerance)
    assert {x.dtype for x in after.values()} == {torch.float32}


def test_impossible_calls_say_so():
    q, k, v, _ = draw(8)
    for normalized in (True, False):
        other = init_linear_state(2, 3, 5, 4, F64, q.device, normalized=not normalized)
        with pytest.raises(ValueError, match=f"normalized={normalized} needs a state of"):
            linear_attention(q, k, v, is_causal=True, normalized=normalized, state=other)
    with pytest.raises(ValueError, match="normalized=False needs is_causal=True"):
        linear_attention(q, k, v, is_causal=False, normalized=False)
    with pytest.raises(ValueError, match="got 8 > 5"):
        linear_attention(q, k[:, :, :5], v[:, :, :5], is_causal=True)
    state = init_linear_state(2, 3, 5, 4, F64, q.device)
    with pytest.raises(ValueError, match="is_causal=False"):
        linear_attention(q, k, v, is_causal=False, state=state)
    with pytest.raises(ValueError, match="4 queries and 8 keys"):
        linear_attention(q[:, :, :4], k, v, is_causal=True, state=state)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("side", ["right", "left", "interior"])
def test_padded_keys_are_absent(side, weighted, causal):
    for length in (7, 65, 130):
        q, k, v, weight = draw(length)
        padding = masks(length)[side]
        weight = weight if weighted else None
        expected = dense(q, k, v, weight, padding, causal=causal)
        pads = ~padding[:, None, :, None]
        v = v.masked_fill(pads, 1e9)
        k = k.masked_fill(pads, 1e9)
        if weighted:
            weight = weight.masked_fill(pads[..., 0], 1e9)
        for form in (naive_linear_attention, linear_attention):
            output = form(q, k, v, key_log_weight=weight, token_mask=padding, is_causal=causal)
            output = output[0] if isinstance(output, tuple) else output
            torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_rows_without_a_key_are_zero_with_finite_gradients(weighted, causal):
    q, k, v, weight = (x.float().requires_grad_() for x in draw(80))
    padding = torch.ones(2, 80, dtype=torch.bool)
    padding[0] = False
    padding[1, :70] = False
    w = weight if weighted else None
    output = linear_attention(q, k, v, key_log_weight=w, token_mask=padding, is_causal=causal)[0]
    assert (output[0] == 0).all()
    if causal:
        assert (output[1, :, :70] == 0).all()
    assert (output[1, :, 70:] != 0).any()
    output.square().sum().backward()
    for x in (q, k, v, *((weight,) if weighted else ())):
        assert x.grad.isfinite().all()
        assert (x.grad[0] == 0).all()


@pytest.mark.parametrize("position", [1, 40, 64, 100, 129])
def test_a_huge_later_key_changes_no_earlier_bit(position):
    q, k, v, weight = (x.float() for x in draw(130))
    before = linear_attention(q, k, v, key_log_weight=weight, is_causal=True)[0]
    for size in (1e3, 1e6):
        k2, v2, w2 = k.clone(), v.clone(), weight.clone()
        k2[:, :, position] *= size
        v2[:, :, position] *= size
        w2[:, :, position] += size
        after = linear_attention(q, k2, v2, key_log_weight=w2, is_causal=True)[0]
        assert torch.equal(after[:, :, :position], before[:, :, :position])
        # a weight of e^size leaves nothing but this key
        torch.testing.assert_close(after[:, :, position], v2[:, :, position])
        assert after.isfinite().all()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("shift", [-1e4, -200.0, 200.0, 1e4])
def test_a_common_factor_of_the_weights_cancels(shift, causal):
    q, k, v, weight = (x.float() for x in draw(130))
    expected = dense(q, k, v, weight, causal=causal)
    output = linear_attention(q, k, v, key_log_weight=weight + shift, is_causal=causal)[0]
    torch.testing.assert_close(output.double(), expected, atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_gradcheck(causal, monkeypatch):
    monkeypatch.setattr(layout, "CHUNK", 4)
    for length in (1, 10):
        q, k, v, weight = (x.requires_grad_() for x in draw(length, batch=1, heads=2, spread=1.0))
        padding = torch.arange(length)[None] != 1

        def run(q, k, v, w, padding=padding):
            return linear_attention(q, k, v, key_log_weight=w, token_mask=padding, is_causal=causal)[0]

        assert torch.autograd.gradcheck(run, (q, k, v, weight))
        assert torch.autograd.gradcheck(lambda q, k, v, run=run: run(q, k, v, None), (q, k, v))


def test_gradients_flow_through_a_state():
    inputs = [x.requires_grad_() for x in draw(30)]
    whole = torch.autograd.grad(
        linear_attention(*inputs[:3], key_log_weight=inputs[3], is_causal=True)[0].square().sum(), inputs
    )
    state, total = init_linear_state(2, 3, 5, 4, F64, torch.device("cpu")), 0
    for part in torch.arange(30).split([12, 1, 17]):
        q, k, v, w = (x[:, :, part] for x in inputs)
        output, state = linear_attention(q, k, v, key_log_weight=w, is_causal=True, state=state)
        total = total + output.square().sum()
    for actual, expected in zip(torch.autograd.grad(total, inputs), whole, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype, causal):
    q, k, v, weight = draw(300, dtype=dtype, spread=1.0)
    expected = dense(q, k, v, weight, causal=causal)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            output = linear_attention(q, k, v, key_log_weight=weight, is_causal=causal)[0]
        assert output.dtype == dtype
        # what remains is the rounding of the output
        torch.testing.assert_close(output.double(), expected, atol=torch.finfo(dtype).eps, rtol=1e-2)
    if causal:
        state = init_linear_state(2, 3, 5, 4, dtype, q.device)
        _, state = linear_attention(q, k, v, key_log_weight=weight, is_causal=True, state=state)
        assert {x.dtype for x in state.values()} == {torch.float32}


def test_denominators_of_both_signs():
    q, k = torch.tensor([[[[1.0]]]]), torch.tensor([[[[-1.0], [-2.0], [1.0]]]])
    v = torch.tensor([[[[3.0], [5.0], [2.0]]]])
    output = linear_attention(q, k, v, is_causal=False)[0]
    assert output.item() == pytest.approx((-3 - 10 + 2) / -2)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_batch_rows_and_heads_are_independent(causal):
    q, k, v, weight = draw(130, batch=3)
    padding = masks(130, 3)["left"]
    full = linear_attention(q, k, v, key_log_weight=weight, token_mask=padding, is_causal=causal)[0]
    for b in range(3):
        for h in range(3):
            row = [x[b : b + 1, h : h + 1] for x in (q, k, v, weight)]
            alone = linear_attention(*row[:3], key_log_weight=row[3], token_mask=padding[b : b + 1], is_causal=causal)[
                0
            ]
            torch.testing.assert_close(full[b : b + 1, h : h + 1], alone)


class LargestTensor(TorchDispatchMode):
    """Records the shapes and sizes of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes += [tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_no_tensor_is_quadratic_in_length(causal, weighted):
    for length in (300, 1000, 5000):
        q, k, v, weight = (x.float() for x in draw(length, batch=1))
        with LargestTensor() as recorder:
            linear_attention(q, k, v, key_log_weight=weight if weighted else None, is_causal=causal)
        assert recorder.shapes
        assert not [s for s in recorder.shapes if sum(n >= length for n in s) > 1]
        # A mixing matrix over chunks is allowed: it is small beside the features.
        assert max(torch.Size(s).numel() for s in recorder.shapes) <= 64 * 3 * (length + 63)


def test_features_of_a_long_sequence_are_never_held_at_once():
    x = torch.randn(1, 12, 4096, 8)

    def wide(x):
        return x.repeat(1, 1, 1, 16).abs(), None

    for causal in (False, True):
        with LargestTensor() as recorder:
            output = feature_map_attention(x, x, x, wide, wide, is_causal=causal)[0]
        largest = max(torch.Size(s).numel() for s in recorder.shapes)
        assert largest < 12 * 4096 * 128 / 4
        expected = linear_attention(wide(x)[0], wide(x)[0], x, is_causal=causal)[0]
        torch.testing.assert_close(output, expected)
