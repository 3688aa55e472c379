"""Keys whose log weight is -inf, in every form: as if they were not there, and rows that see no other key are 0."""

import pytest
import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.ops.features.maps import ParametricMap
from hf_linear_attn.ops.linear.attention import (
    feature_map_attention_with_normalizer,
    init_linear_state,
    linear_attention,
)
from tests.ops.linear import forms
from tests.ops.references import naive_linear_attention

BATCH, HEADS, LENGTH, F64 = 2, 3, 50, torch.float64


def bidirectional(q, k, v, **given):
    return linear_attention(q, k, v, is_causal=False, **given)


def draw(spread=3.0):
    """q, k, v, log weights, and which keys have weight 0: some, the first ones of a head, all of another."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.rand(2, BATCH, HEADS, LENGTH, 5, generator=g, dtype=F64)
    v = torch.randn(BATCH, HEADS, LENGTH, 4, generator=g, dtype=F64)
    weight = spread * torch.randn(BATCH, HEADS, LENGTH, generator=g, dtype=F64)
    gone = torch.rand(BATCH, HEADS, LENGTH, generator=g) < 0.4
    gone[0, 0, :21] = True
    gone[1, 1] = True
    return q, k, v, weight, gone


def options(padded, decay):
    """A mask, and log-decays, each for all features or for every one."""
    g = torch.Generator().manual_seed(1)
    found = {}
    if padded:
        found["token_mask"] = torch.rand(BATCH, LENGTH, generator=g) < 0.7
    if decay:
        shape = (BATCH, HEADS, LENGTH, 5) if decay == "of features" else (BATCH, HEADS, LENGTH)
        found["log_decay"] = -torch.rand(shape, generator=g, dtype=F64)
    return found


@pytest.mark.parametrize("spread", [3.0, 100.0], ids=["mild", "steep"])
@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
@pytest.mark.parametrize(
    ("form", "decay"),
    [
        (bidirectional, None),
        *((form, d) for form in (forms.attend, forms.traced, forms.token_by_token) for d in (None, "of all")),
        (forms.attend, "of features"),
        (forms.traced, "of features"),
    ],
)
def test_it_might_as_well_not_be_there(form, decay, padded, spread, small_blocks):
    q, k, v, weight, gone = draw(spread)
    given = options(padded, decay)
    inputs = [x.requires_grad_() for x in (q, k, v, weight)]
    found = form(q, k, v, key_log_weight=weight.masked_fill(gone, -torch.inf), **given)[0]
    exact_options = {"key_log_weight": weight.masked_fill(gone, weight.min().item()), **given}
    keys = k.masked_fill(gone[..., None], 0)
    expected = naive_linear_attention(q, keys, v, is_causal=form is not bidirectional, **exact_options)
    torch.testing.assert_close(found, expected)
    assert (found[1, 1] == 0).all()
    if form is not bidirectional:
        assert (found[0, 0, :21] == 0).all()
    exact = torch.autograd.grad(expected.square().sum(), inputs)
    for actual, wanted in zip(torch.autograd.grad(found.square().sum(), inputs), exact, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("form", [bidirectional, forms.attend, forms.traced, forms.token_by_token])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_all_log_weights_are_finite(form, dtype, small_blocks):
    q, k, v, weight, gone = draw()
    weight = weight.masked_fill(gone, -torch.inf)
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v, weight)]
    output = form(*inputs[:3], key_log_weight=inputs[3])[0]
    assert output.isfinite().all()
    output.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    assert (inputs[3].grad[gone] == 0).all()


@pytest.mark.parametrize("first", [forms.attend, forms.traced, forms.token_by_token])
@pytest.mark.parametrize("then", [forms.attend, forms.traced, forms.token_by_token])
def test_a_state_of_such_keys_is_one_of_none(first, then, small_blocks):
    q, k, v, weight, gone = draw()
    given = weight.masked_fill(gone, -torch.inf)
    whole = naive_linear_attention(q, k.masked_fill(gone[..., None], 0), v, key_log_weight=weight, is_causal=True)
    state, outputs = init_linear_state(BATCH, HEADS, 5, 4, F64, q.device), []
    for form, now in ((first, slice(0, 19)), (then, slice(19, LENGTH))):  # in a head of the first part, no other keys
        parts = (x[:, :, now] for x in (q, k, v))
        output, state = form(*parts, key_log_weight=given[:, :, now], state=state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 2), whole)
    assert all(x.isfinite().all() for x in state.values())


def test_rows_without_other_keys_weigh_nothing_where_they_are_merged(small_blocks):
    """Their log denominators are those of rows without keys, whatever comes later in their block."""
    q, k, v, weight, gone = draw()
    marked = torch.cat([k, weight.masked_fill(gone, -torch.inf)[..., None]], -1)
    marked[0, 0, 30, -1] = 200.0
    maps = ParametricMap(lambda x: (x, None)), ParametricMap(lambda x: (x[..., :-1], x[..., -1]))
    _, log, _ = feature_map_attention_with_normalizer(q, marked, v, *maps, is_causal=True)
    assert (log[0, 0, :21] < LOG_ZERO / 2).all()
    assert (log[1, 1] < LOG_ZERO / 2).all()
    assert (log[0, 0, 30:] > 100).all()
