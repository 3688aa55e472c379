"""Decode steps of a window with a tail beside the dense form of the whole text, in float64."""

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.ops.features.maps import ParametricMap, TaylorMap
from hf_linear_attn.ops.linear.attention import init_linear_state
from hf_linear_attn.ops.window.tail import naive_window_tail_attention, window_tail_attention
from tests.ops.window.test_tail import SCALING, draw, weighted

WINDOW, LENGTH = 4, 19


def coordinates(x):
    return 0.5 * x, x.sum(-1)


def steps(q, k, v, features, num_features, pads, **given):
    """One token after another, `pads` of them padding in the second text."""
    state = init_linear_state(2, 2, num_features, 4, torch.float64, "cpu")
    k, v = (F.pad(x, (0, 0, WINDOW, 0)) for x in (k, v))
    first = torch.tensor([[WINDOW], [WINDOW + pads]])
    outputs = []
    for t in range(LENGTH):
        held = slice(t, t + WINDOW + 1)
        call = q[:, :, t : t + 1], k[:, :, held], v[:, :, held], features, features
        real = torch.arange(t, t + WINDOW + 1) >= first
        output, state = window_tail_attention(*call, token_mask=real, state=state, **given)
        outputs.append(output)
    return torch.cat(outputs, 2)


@pytest.mark.parametrize("pads", [0, 3, 9], ids="{} padded".format)
@pytest.mark.parametrize(
    ("features", "num_features"), [(weighted, 4), (TaylorMap(coordinates), 15)], ids=["exponential", "taylor"]
)
@pytest.mark.parametrize("relative", [None, [False, True]], ids=["absolute", "relative"])
def test_steps_are_the_dense_form_forward_and_backward(relative, features, num_features, pads):
    q, k, v = (x.requires_grad_() for x in draw(LENGTH))
    log_factor = torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True)
    given = {"left": WINDOW - 1, "right": 0, "is_causal": True, "scaling": SCALING, "window_log_factor": log_factor}
    given["relative"] = None if relative is None else torch.tensor(relative)
    real = torch.arange(LENGTH) >= torch.tensor([[0], [pads]])
    results = []
    for output in (
        steps(q, k, v, features, num_features, pads, **given),
        naive_window_tail_attention(q, k, v, features, features, **given, token_mask=real),
    ):
        seen = output.transpose(1, 2)[real]
        results.append([seen, *torch.autograd.grad(seen.square().sum(), [q, k, v, log_factor])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_step_trains_what_the_maps_name():
    """The sums are kept by autograd: a map's parameter has the gradient of the dense form."""
    q, k, v = draw(LENGTH)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    features = ParametricMap(lambda x, s: ((s * x).exp(), s * x.sum(-1)), (scale,))
    given = {"left": WINDOW - 1, "right": 0, "is_causal": True, "scaling": SCALING}
    given["window_log_factor"] = torch.zeros(2, dtype=torch.float64)
    actual, expected = (
        torch.autograd.grad(output.square().sum(), scale)[0]
        for output in (
            steps(q, k, v, features, 4, 0, **given),
            naive_window_tail_attention(q, k, v, features, features, **given),
        )
    )
    torch.testing.assert_close(actual, expected)
