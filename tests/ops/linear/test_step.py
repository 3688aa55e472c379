"""A decode step beside the call over all tokens at once."""

import pytest
import torch

from hf_linear_attn.ops.linear.attention import init_linear_state
from tests.ops.linear import forms
from tests.ops.linear.test_plain import OPTIONS, draw, padding_of


@pytest.mark.parametrize("padded", [False, True], ids=["real", "padded"])
@pytest.mark.parametrize("decayed", [None, "scalar", "per_feature"])
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_are_the_call_forward_and_backward(options, decayed, padded):
    q, k, v, weight, decay = draw(21, decayed)
    inputs = [q, k, v, *([weight] if options == "weighted" else []), *([] if decay is None else [decay])]
    inputs = [x.requires_grad_() for x in inputs]
    given = {"token_mask": padding_of(21) if padded else None, "normalized": options != "raw"}
    given |= {"log_decay": inputs[-1]} if decayed else {}
    given |= {"key_log_weight": inputs[3]} if options == "weighted" else {}
    results = []
    for form in (forms.token_by_token, forms.attend):
        output = form(*inputs[:3], **given)[0]
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_padded_token_of_any_content_leaves_the_state_as_it_is(normalized):
    q, k, v, weight, _ = draw(3)
    start = init_linear_state(2, 3, 5, 4, v.dtype, v.device, normalized=normalized)
    given = {"key_log_weight": weight} if normalized else {}
    _, before = forms.token_by_token(q, k, v, state=start, normalized=normalized, **given)
    for state in (start, before):
        padded = {"token_mask": torch.zeros(2, 1, dtype=torch.bool), "normalized": normalized}
        nothing = (torch.full_like(x[:, :, :1], y) for x, y in ((q, 7.0), (k, 7.0), (v, float("nan"))))
        output, after = forms.attend(*nothing, state=state, **padded)
        assert output.isfinite().all()
        assert all(torch.equal(after[name], x) for name, x in state.items())
