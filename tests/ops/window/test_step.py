"""One query over a window and extra columns: the pattern written out, and no copy of the window."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_linear_attn.ops.window.attention import naive_sliding_window_attention, sliding_window_attention
from hf_linear_attn.ops.window.step import attend_one
from tests.ops.window.calls import draw


class LargestResult(TorchDispatchMode):
    """The elements of the largest tensor that an operator allocated."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.elements = max(self.elements, result.numel())
        return result


def call(k_len=9, columns=2, bias=False):
    q, k, v = draw(2, 3, 1, 4), draw(2, 3, k_len, 4, seed=1), draw(2, 3, k_len, 4, seed=2)
    extra_k, extra_v = draw(2, 3, columns, 4 + bias, seed=3), draw(2, 3, columns, 4 + bias, seed=4)
    if bias:
        extra_v[..., -1] = 0
    seen = torch.tensor([[True, False], [True, True]])[:, None, :columns]
    return q, k, v, (extra_k, extra_v, seen)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [None, 1, 2])
@pytest.mark.parametrize("left", [0, 4, 30])
def test_equals_the_dense_window(left, batch, bias):
    q, k, v, extra = call(bias=bias)
    allowed = None if batch is None else draw(batch, 9, seed=5) > -0.5
    given = {"scaling": 0.5, "key_allowed": allowed, "extra": extra}
    expected = naive_sliding_window_attention(q, k, v, left=left, right=0, **given)
    torch.testing.assert_close(sliding_window_attention(q, k, v, left=left, right=0, **given), expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_without_a_key_is_zero_and_so_is_its_gradient(rows):
    q, k, v, extra = call()
    q.requires_grad_()
    nothing = torch.zeros(rows, 9, dtype=torch.bool)
    out = attend_one(q, k, v, scaling=0.5, key_allowed=nothing, extra=(*extra[:2], nothing[:, None, :2]))
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), q)[0].any()


def test_the_window_is_not_copied():
    q, k, v, extra = call(k_len=100)
    room = torch.cat([k, k], 2)[:, :, 50:150]  # a view with room behind
    with LargestResult() as largest, torch.no_grad():
        sliding_window_attention(q, room, v, left=90, right=0, scaling=0.5, extra=extra)
    assert 0 < largest.elements < 2 * 3 * 103
