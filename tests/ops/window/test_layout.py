"""Dilation by classes of tokens, against the dense form."""

import pytest
import torch

from hf_linear_attn.ops.window.attention import naive_sliding_window_attention
from hf_linear_attn.ops.window.layout import by_dilation, from_classes, to_classes
from tests.ops.window.calls import draw


@pytest.mark.parametrize(("length", "number"), [(12, 3), (13, 3), (2, 5), (7, 1)])
def test_classes_end_with_the_sequence_and_come_back(length, number):
    x = draw(2, 3, length, 4)
    classes = to_classes(x, number)
    torch.testing.assert_close(classes[:, :, -1].unflatten(0, (2, number))[:, -1], x[:, :, -1])
    torch.testing.assert_close(from_classes(classes, number, length), x)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dilation", [1, 3, (2, 1, 2)])
def test_heads_of_each_dilation_are_a_plain_window(dilation, per_row):
    q, k, v = draw(2, 3, 11, 4), draw(2, 3, 17, 4, seed=1), draw(2, 3, 17, 4, seed=2)
    allowed = draw(2, 17, seed=3) > -0.5
    extra = draw(2, 3, 2, 4, seed=4), draw(2, 3, 2, 4, seed=5), draw(2, 11 if per_row else 1, 2, seed=6) > 0
    where = {"left": 2, "right": 1, "scaling": 0.5}

    def attend(q, k, v, allowed, part):
        return naive_sliding_window_attention(q, k, v, key_allowed=allowed, extra=part, **where)

    expected = naive_sliding_window_attention(q, k, v, dilation=dilation, key_allowed=allowed, extra=extra, **where)
    torch.testing.assert_close(by_dilation(attend, q, k, v, dilation, allowed, extra), expected)
