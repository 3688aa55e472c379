"""Decay in both directions against the dense formula in float64, written out here."""

from unittest.mock import patch

import pytest
import torch

from hf_linear_attn.ops.linear import layout
from hf_linear_attn.ops.linear.attention import init_linear_state, linear_attention
from tests.ops.linear.test_decay import KINDS, LENGTHS, draw, masks

F64 = torch.float64


def dense(q, k, v, decay, weight=None, padding=None, normalized=True):
    """All pairs: a later key reaches a row through the log-decays of the real tokens from that row to before the key,
    as an earlier one through those after the key up to the row."""
    q, k, v, decay = (x.double() for x in (q, k, v, decay))
    decay = decay[..., None].expand_as(k) if decay.ndim == 3 else decay
    real = torch.ones(v.shape[0], v.shape[2], dtype=torch.bool) if padding is None else padding
    decay = torch.where(real[:, None, :, None], decay, 0.0)
    factor = (torch.ones_like(v[..., 0]) if weight is None else weight.double().exp()) * real[:, None]
    v, scores = torch.where(real[:, None, :, None], v, 0.0), v.new_zeros(*q.shape[:3], k.shape[2])
    for r in range(q.shape[2]):
        i = k.shape[2] - q.shape[2] + r
        for j in range(k.shape[2]):
            between = decay[:, :, j + 1 : i + 1] if j <= i else decay[:, :, i:j]
            scores[:, :, r, j] = (q[:, :, r] * k[:, :, j] * between.sum(2).exp()).sum(-1) * factor[:, :, j]
    total = scores.sum(-1, keepdim=True) if normalized else torch.ones_like(scores[..., :1])
    return scores @ v / torch.where(total == 0, 1.0, total)


def attend(q, k, v, **given):
    return linear_attention(q, k, v, is_causal=False, **given)[0]


def traced(q, k, v, **given):
    with patch.object(torch.compiler, "is_compiling", lambda: True):
        return attend(q, k, v, **given)


FORMS = (attend, traced)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["plain", "weighted", "raw"])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_form_is_the_dense_formula(length, options, kind):
    q, k, v, decay, weight = draw(length, kind)
    given = {"key_log_weight": weight if options == "weighted" else None, "normalized": options != "raw"}
    expected = dense(q, k, v, decay, given["key_log_weight"], normalized=given["normalized"])
    for form in FORMS:
        output = form(q, k, v, log_decay=decay, **given)
        torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-9, msg=lambda m, f=form: f"{f}: {m}")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_decay_is_linear_attention_of_an_encoder(kind, weighted):
    """Each token's own weight counts once."""
    q, k, v, decay, weight = draw(130, kind)
    given = {"key_log_weight": weight if weighted else None}
    expected = linear_attention(q, k, v, is_causal=False, **given)[0]
    for form in FORMS:
        torch.testing.assert_close(form(q, k, v, log_decay=torch.zeros_like(decay), **given), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["plain", "weighted", "raw"])
@pytest.mark.parametrize("side", ["right", "left", "interior"])
def test_padded_tokens_neither_decay_nor_add(side, options, kind):
    q, k, v, decay, weight = draw(70, kind)
    padding = masks(70)[side]
    given = {"key_log_weight": weight if options == "weighted" else None, "normalized": options != "raw"}
    expected = dense(q, k, v, decay, given["key_log_weight"], padding, given["normalized"])
    v = v.masked_fill(~padding[:, None, :, None], torch.nan)
    k = k.masked_fill(~padding[:, None, :, None], 1e9)
    decay = decay.masked_fill(~padding[:, None, :].view(2, 1, 70, *[1] * (decay.ndim - 3)), torch.nan)
    for form in FORMS:
        output = form(q, k, v, log_decay=decay, token_mask=padding, **given)
        torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queries", [1, 7, 64])
def test_fewer_queries_than_keys_are_the_last(queries, kind, monkeypatch):
    monkeypatch.setattr(layout, "_CPU_BLOCK_ROWS", 1)
    monkeypatch.setattr(layout, "_MIN_BLOCK", 16)  # and blocks join exactly, the last of them of one row
    q, k, v, decay, weight = draw(65, kind)
    expected = dense(q, k, v, decay, weight)
    for form in FORMS:
        torch.testing.assert_close(form(q, k, v, log_decay=decay, key_log_weight=weight), expected)
        output = form(q[:, :, -queries:], k, v, log_decay=decay, key_log_weight=weight)
        torch.testing.assert_close(output, expected[:, :, -queries:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [30.0, 1e4, torch.inf], ids=str)
def test_strong_decay_and_large_weights_stay_accurate_in_float32(strength, kind):
    q, k, v, decay, weight = draw(130, kind, spread=40.0 if kind == "scalar" else 6.0)
    decay = torch.where(torch.rand(decay.shape, generator=torch.Generator().manual_seed(1)) < 0.1, -strength, decay)
    expected = dense(q, k, v, decay, weight)
    for form in FORMS:
        q32, k32, v32, decay32, weight32 = (x.float() for x in (q, k, v, decay, weight))
        output = form(q32, k32, v32, log_decay=decay32, key_log_weight=weight32)
        torch.testing.assert_close(output.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_weight_far_away_no_longer_counts():
    q, k, v, _, weight = draw(200, dtype=torch.float32)
    weight[:, :, 0], weight[:, :, -1] = 300.0, 300.0
    decay = torch.full_like(weight, -5.0)
    expected = dense(q, k, v, decay, weight)
    for form in FORMS:
        output = form(q, k, v, log_decay=decay, key_log_weight=weight)
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_denominators_of_both_signs_are_summed_before_the_quotient():
    q, k, v, decay, weight = draw(40)
    q, k = q - 0.5, k - 0.3
    expected = dense(q, k, v, decay, weight)
    for form in FORMS:
        torch.testing.assert_close(form(q, k, v, log_decay=decay, key_log_weight=weight), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["plain", "weighted", "raw"])
def test_gradients(options, kind, monkeypatch):
    monkeypatch.setattr(layout, "_CPU_BLOCK_ROWS", 1)
    monkeypatch.setattr(layout, "_MIN_BLOCK", 4)
    q, k, v, decay, weight = (x.requires_grad_() for x in draw(10, kind))
    padding = masks(10)["interior"]

    def run(form, q, k, v, decay, *weight):
        given = {"key_log_weight": weight[0] if weight else None, "normalized": options != "raw"}
        return form(q, k, v, log_decay=decay, token_mask=padding, **given)

    inputs = (q, k, v, decay, *([weight] if options == "weighted" else []))
    for form in FORMS:
        assert torch.autograd.gradcheck(lambda *x, form=form: run(form, *x), inputs, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_where_gates_close(kind):
    q, k, v, decay, weight = (x.requires_grad_() for x in draw(80, kind, dtype=torch.float32))
    closed = torch.where(torch.arange(80).view(-1, *[1] * (decay.ndim - 3)) % 9 == 0, -torch.inf, decay)
    attend(q, k, v, log_decay=closed, key_log_weight=weight).square().sum().backward()
    for x in (q, k, v, decay, weight):
        assert x.grad.isfinite().all()


def test_rows_without_keys_are_zero():
    q, k, v, decay, weight = draw(40)
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[0] = False
    for w in (None, weight):
        for form in FORMS:
            output = form(q, k, v, log_decay=decay, key_log_weight=w, token_mask=padding)
            assert output.isfinite().all()
            assert not output[0].any()


def test_half_precision_is_summed_in_full():
    q, k, v, decay, _ = draw(300, strength=0.1, dtype=torch.bfloat16)
    output = attend(q, k, v, log_decay=decay)
    assert output.dtype == torch.bfloat16
    expected = attend(*(x.double() for x in (q, k, v)), log_decay=decay.double())
    torch.testing.assert_close(output.double(), expected, atol=0.01, rtol=0.01)


def test_impossible_calls_say_so():
    q, k, v, decay, _ = draw(8)
    with pytest.raises(ValueError, match="got 8 > 5"):
        attend(q, k[:, :, :5], v[:, :, :5], log_decay=decay[:, :, :5])
    with pytest.raises(ValueError, match="normalized=False needs is_causal=True or log_decay"):
        attend(q, k, v, normalized=False)
    with pytest.raises(ValueError, match="is_causal=False"):
        attend(q, k, v, log_decay=decay, state=init_linear_state(2, 3, 5, 4, F64, q.device))
