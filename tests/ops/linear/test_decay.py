"""Linear attention with decay against the recurrence and the dense formula in float64, written out here."""

import pytest
import torch

from hf_linear_attn.ops.linear import layout
from hf_linear_attn.ops.linear.attention import init_linear_state, linear_attention
from tests.ops.linear import forms
from tests.ops.references import naive_linear_attention

LENGTHS = (1, 7, 36, 65, 130)
KINDS = ("scalar", "per_feature")
F64 = torch.float64
FORMS = (forms.attend, forms.traced, forms.token_by_token)


def draw(length, kind="scalar", *, strength=1.0, spread=3.0, dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k = torch.rand(2, 2, 3, length, 5, generator=g, dtype=F64).to(dtype)
    v = torch.randn(2, 3, length, 4, generator=g, dtype=F64).to(dtype)
    shape = (2, 3, length) if kind == "scalar" else (2, 3, length, 5)
    decay = -strength * torch.rand(shape, generator=g, dtype=F64).to(dtype) ** 4
    weight = (torch.randn(2, 3, length, generator=g, dtype=F64) * spread).to(dtype)
    return q, k, v, decay, weight


def dense(q, k, v, decay, weight=None, padding=None, normalized=True):
    """Row by row and key by key: exp of the sum of the log-decays of the real tokens in between."""
    q, k, v, decay = (x.double() for x in (q, k, v, decay))
    if decay.ndim == 3:
        decay = decay[..., None].expand_as(k)
    real = torch.ones(v.shape[0], v.shape[2], dtype=torch.bool) if padding is None else padding
    decay = torch.where(real[:, None, :, None], decay, 0.0)
    v = torch.where(real[:, None, :, None], v, 0.0)
    factor = torch.ones_like(v[..., 0]) if weight is None else weight.double().exp()
    factor = factor * real[:, None]
    output = torch.zeros(*q.shape[:3], v.shape[-1], dtype=F64)
    for r in range(q.shape[2]):
        i = k.shape[2] - q.shape[2] + r
        total = torch.zeros_like(output[:, :, 0, :1])
        for j in range(i + 1):
            kept = decay[:, :, j + 1 : i + 1].sum(2).exp()
            score = (q[:, :, r] * k[:, :, j] * kept).sum(-1, keepdim=True) * factor[:, :, j, None]
            output[:, :, r] += score * v[:, :, j]
            total += score
        if normalized:
            output[:, :, r] /= torch.where(total == 0, 1.0, total)
    return output


def masks(length):
    g = torch.Generator().manual_seed(length)
    ends = torch.randint(1, length + 1, (2,), generator=g)
    right = torch.arange(length) < ends[:, None]
    return {"right": right, "left": right.flip(1), "interior": torch.rand(2, length, generator=g) < 0.6}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["plain", "weighted", "raw"])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_form_is_the_dense_formula(length, options, kind):
    q, k, v, decay, weight = draw(length, kind)
    given = {"key_log_weight": weight if options == "weighted" else None, "normalized": options != "raw"}
    expected = dense(q, k, v, decay, given["key_log_weight"], normalized=given["normalized"])
    outputs = {
        "naive": naive_linear_attention(q, k, v, log_decay=decay, is_causal=True, **given),
        "entry": forms.attend(q, k, v, log_decay=decay, **given)[0],
        "chunks of 1": forms.traced(q, k, v, log_decay=decay, chunk=1, **given)[0],
        "chunks of 16": forms.traced(q, k, v, log_decay=decay, chunk=16, **given)[0],
        "token by token": forms.token_by_token(q, k, v, log_decay=decay, **given)[0],
    }
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_no_decay_is_linear_attention(weighted, kind):
    q, k, v, decay, weight = draw(130, kind)
    weight = weight if weighted else None
    expected = linear_attention(q, k, v, key_log_weight=weight, is_causal=True)[0]
    output, _ = forms.attend(q, k, v, log_decay=torch.zeros_like(decay), key_log_weight=weight)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["plain", "weighted", "raw"])
@pytest.mark.parametrize("side", ["right", "left", "interior"])
def test_padded_tokens_neither_decay_nor_add(side, options, kind):
    q, k, v, decay, weight = draw(40, kind)
    padding = masks(40)[side]
    given = {"key_log_weight": weight if options == "weighted" else None, "normalized": options != "raw"}
    expected = dense(q, k, v, decay, given["key_log_weight"], padding, given["normalized"])
    v = v.masked_fill(~padding[:, None, :, None], torch.nan)
    k = k.masked_fill(~padding[:, None, :, None], 1e9)
    decay = decay.masked_fill(~padding[:, None, :].view(2, 1, 40, *[1] * (decay.ndim - 3)), torch.nan)
    for form in FORMS:
        output = form(q, k, v, log_decay=decay, token_mask=padding, **given)[0]
        torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["plain", "weighted", "raw"])
@pytest.mark.parametrize("split", [(1,) * 70, (70,), (33, 1, 1, 35), (7,) * 10])
def test_any_split_with_a_state_is_the_whole(split, options, kind):
    q, k, v, decay, weight = draw(70, kind)
    weight, normalized = weight if options == "weighted" else None, options != "raw"
    padding = masks(70)["interior"]
    expected = dense(q, k, v, decay, weight, padding, normalized)
    for form in FORMS:
        state, outputs = init_linear_state(2, 3, 5, 4, F64, q.device, normalized=normalized), []
        for part in torch.arange(70).split(split):
            w = None if weight is None else weight[:, :, part]
            q_part, k_part, v_part, decay_part = (x[:, :, part] for x in (q, k, v, decay))
            options_now = {"key_log_weight": w, "token_mask": padding[:, part], "normalized": normalized}
            output, state = form(q_part, k_part, v_part, log_decay=decay_part, **options_now, state=state)
            outputs.append(output)
        assert set(state) == ({"kv", "z", "log_scale"} if normalized else {"kv"})
        torch.testing.assert_close(torch.cat(outputs, 2), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queries", [1, 7, 64])
def test_fewer_queries_than_keys_are_the_last(queries, kind, monkeypatch):
    monkeypatch.setattr(layout, "_CPU_BLOCK_ROWS", 1)
    monkeypatch.setattr(layout, "_MIN_BLOCK", 16)  # and blocks join exactly
    q, k, v, decay, weight = draw(70, kind)
    whole = forms.attend(q, k, v, log_decay=decay, key_log_weight=weight)[0]
    torch.testing.assert_close(whole, dense(q, k, v, decay, weight))
    output = forms.attend(q[:, :, -queries:], k, v, log_decay=decay, key_log_weight=weight)[0]
    torch.testing.assert_close(output, whole[:, :, -queries:])
    naive = naive_linear_attention(q[:, :, -queries:], k, v, log_decay=decay, key_log_weight=weight, is_causal=True)
    torch.testing.assert_close(naive, whole[:, :, -queries:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [30.0, 1e4, torch.inf], ids=str)
def test_strong_decay_and_large_weights_stay_accurate_in_float32(strength, kind):
    """exp(g) exp(-g) overflows here; gates that close altogether (log-decay -inf) forget exactly."""
    q, k, v, decay, weight = draw(130, kind, spread=40.0 if kind == "scalar" else 6.0)
    decay = torch.where(torch.rand(decay.shape, generator=torch.Generator().manual_seed(1)) < 0.1, -strength, decay)
    expected = dense(q, k, v, decay, weight)
    for form in FORMS:
        q32, k32, v32, decay32, weight32 = (x.float() for x in (q, k, v, decay, weight))
        output = form(q32, k32, v32, log_decay=decay32, key_log_weight=weight32)[0]
        torch.testing.assert_close(output.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_weight_that_has_decayed_no_longer_counts():
    """The scale of the sums decays with them: a heavy key of long ago does not make the present vanish."""
    q, k, v, _, weight = draw(130, dtype=torch.float32)
    weight[:, :, 0] = 300.0
    decay = torch.full_like(weight, -5.0)
    output = forms.attend(q, k, v, log_decay=decay, key_log_weight=weight)[0]
    expected = dense(q, k, v, decay, weight)
    torch.testing.assert_close(output[:, :, 100:].double(), expected[:, :, 100:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["plain", "weighted", "raw"])
def test_gradients(options, kind):
    q, k, v, decay, weight = (x.requires_grad_() for x in draw(10, kind))
    padding = masks(10)["interior"]
    normalized = options != "raw"
    state = init_linear_state(2, 3, 5, 4, F64, q.device, normalized=normalized)
    state["kv"] = torch.randn_like(state["kv"]).requires_grad_()

    def run(form, *tensors):
        q, k, v, decay, kv, *weight = tensors
        now = {**state, "kv": kv}
        options_now = {"key_log_weight": weight[0] if weight else None, "normalized": normalized, "state": now}
        output, after = form(q, k, v, log_decay=decay, token_mask=padding, **options_now)
        return output, after["kv"] * after["log_scale"].exp()[..., None, None] if normalized else after["kv"]

    inputs = (q, k, v, decay, state["kv"], *([weight] if options == "weighted" else []))
    for form in FORMS:
        assert torch.autograd.gradcheck(lambda *x, form=form: run(form, *x), inputs, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_where_gates_close(kind):
    q, k, v, decay, weight = (x.requires_grad_() for x in draw(80, kind, dtype=torch.float32))
    closed = torch.where(torch.arange(80).view(-1, *[1] * (decay.ndim - 3)) % 9 == 0, -torch.inf, decay)
    forms.attend(q, k, v, log_decay=closed, key_log_weight=weight)[0].square().sum().backward()
    for x in (q, k, v, decay, weight):
        assert x.grad.isfinite().all()


def test_rows_without_keys_are_zero():
    q, k, v, decay, weight = draw(40)
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[0], padding[1, :9] = False, False
    for w in (None, weight):
        output = forms.attend(q, k, v, log_decay=decay, key_log_weight=w, token_mask=padding)[0]
        assert output.isfinite().all()
        assert not output[0].any()
        assert not output[1, :, :9].any()


def test_half_precision_is_summed_in_full():
    q, k, v, decay, _ = draw(300, strength=0.1, dtype=torch.bfloat16)
    output = forms.attend(q, k, v, log_decay=decay)[0]
    assert output.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(forms.attend(q, k, v, log_decay=decay)[0], output)
    expected = forms.attend(*(x.double() for x in (q, k, v)), log_decay=decay.double())[0]
    torch.testing.assert_close(output.double(), expected, atol=0.01, rtol=0.01)


def test_impossible_calls_say_so():
    q, k, v, decay, weight = draw(8)
    with pytest.raises(ValueError, match="got 8 > 5"):
        forms.attend(q, k[:, :, :5], v[:, :, :5], log_decay=decay[:, :, :5])
    state = init_linear_state(2, 3, 5, 4, F64, q.device)
    with pytest.raises(ValueError, match="4 queries and 8 keys"):
        forms.attend(q[:, :, :4], k, v, log_decay=decay, state=state)
    with pytest.raises(ValueError, match="normalized=True"):
        forms.attend(q, k, v, log_decay=decay, key_log_weight=weight, normalized=False)
