"""The blocked window against dense float64 softmax with the pattern written out entry by entry."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_linear_attn.ops.window import attention, blocks
from hf_linear_attn.ops.window.attention import (
    attend_projected,
    naive_sliding_window_attention,
    sliding_window_attention,
)
from tests.ops.window.calls import draw, set_block_size


def dense(q, k, v, allowed, extra=None):
    """Softmax over the keys named by `allowed(b, h, i, j)`, i being the query's position among the keys."""
    B, H, q_len, D = q.shape
    k_len = k.shape[2]
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for r in range(q_len):
                keys = [(k[b, h, j], v[b, h, j]) for j in range(k_len) if allowed(b, h, k_len - q_len + r, j)]
                if extra is not None:
                    seen = extra[2].expand(B, q_len, -1)
                    keys += [(extra[0][b, h, g], extra[1][b, h, g]) for g in range(seen.shape[2]) if seen[b, r, g]]
                if keys:
                    logits = torch.stack([q[b, h, r] @ key for key, _ in keys]) / math.sqrt(D)
                    out[b, h, r] = logits.softmax(0) @ torch.stack([value for _, value in keys])
    return out


def in_band(i, j, left, right, d):
    return (j - i) % d == 0 and -left * d <= j - i <= right * d


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 9), (7, 7), (13, 30), (36, 36)])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (2, 2), (40, 40)])
@pytest.mark.parametrize("dilation", [1, 3, (1, 2)])
def test_equals_the_dense_pattern(q_len, k_len, left, right, dilation, monkeypatch):
    q, k, v = draw(2, 2, q_len, 4), draw(2, 2, k_len, 4, seed=1), draw(2, 2, k_len, 4, seed=2)
    steps = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    expected = dense(q, k, v, lambda b, h, i, j: in_band(i, j, left, right, steps[h]))
    for block_size in (None, 1, 4):
        if block_size is not None:
            set_block_size(monkeypatch, block_size)
        actual = sliding_window_attention(q, k, v, left=left, right=right, scaling=0.5, dilation=dilation)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dilation", [1, 2, (3, 1)])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("segment", [1, 1 << 22])
def test_forbidden_keys_and_extra_columns(dilation, per_row, segment, monkeypatch):
    for module in (blocks, attention):
        monkeypatch.setattr(module, "SEGMENT_ELEMENTS", segment)
    set_block_size(monkeypatch, 4)
    q, k, v = draw(2, 2, 17, 4), draw(2, 2, 21, 4, seed=1), draw(2, 2, 21, 4, seed=2)
    key_allowed = draw(2, 21, seed=3) > -0.3
    seen = draw(2, 17 if per_row else 1, 3, seed=4) > 0
    extra = draw(2, 2, 3, 4, seed=5), draw(2, 2, 3, 4, seed=6), seen
    steps = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    expected = dense(q, k, v, lambda b, h, i, j: in_band(i, j, 2, 1, steps[h]) and key_allowed[b, j], extra)
    options = {
        "left": 2,
        "right": 1,
        "scaling": 0.5,
        "dilation": dilation,
        "key_allowed": key_allowed,
        "extra": extra,
    }
    torch.testing.assert_close(sliding_window_attention(q, k, v, **options), expected)
    torch.testing.assert_close(naive_sliding_window_attention(q, k, v, **options), expected)


def test_gradients(monkeypatch):
    set_block_size(monkeypatch, 4)
    q, k, v, gk, gv = (draw(1, 2, t, 3, seed=t).requires_grad_() for t in (9, 11, 11, 2, 2))

    def run(q, k, v, gk, gv):
        extra = gk, gv, torch.ones(1, 1, 2, dtype=torch.bool)
        return sliding_window_attention(q, k, v, left=2, right=1, scaling=0.5, dilation=(1, 2), extra=extra)

    assert torch.autograd.gradcheck(run, (q, k, v, gk, gv))


class _Shapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.seen.append(tuple(x.shape))
        return out


@pytest.mark.parametrize("dilation", [1, 4])
def test_no_tensor_is_quadratic(dilation):
    T = 512
    q, k, v = (torch.randn(2, 2, T, 4) for _ in range(3))
    with _Shapes() as shapes:
        sliding_window_attention(q, k, v, left=64, right=64, scaling=0.5, dilation=dilation)
    assert len(shapes.seen) > 5
    assert not [s for s in shapes.seen if sum(size >= T for size in s) > 1]
    # Less than the logits alone would take: they are never held, and masks are shared by the heads.
    assert max(math.prod(s) for s in shapes.seen) < 2 * 2 * T * 129


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(dtype):
    q, k, v = (draw(1, 2, 100, 16, seed=i) for i in range(3))
    exact = sliding_window_attention(q, k, v, left=8, right=8, scaling=0.25)
    half = sliding_window_attention(*(x.to(dtype) for x in (q, k, v)), left=8, right=8, scaling=0.25)
    assert half.dtype == dtype
    torch.testing.assert_close(half.double(), exact, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    "options",
    [{"left": -1}, {"dilation": 0}, {"dilation": (1, 2, 3)}, {"right": -2}],
    ids=lambda o: next(iter(o)),
)
def test_bad_arguments_are_named(options):
    q = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match=next(iter(options))):
        sliding_window_attention(q, q, q, **{"left": 1, "right": 1, "scaling": 1.0, **options})
    with pytest.raises(ValueError, match="Tq=5 and Tk=4"):
        sliding_window_attention(q, q[:, :, :4], q[:, :, :4], left=1, right=1, scaling=1.0)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_attend_projected_equals_projecting_first(count):
    """Both its branches (3 queries of 4 channels fold the projections in, 6 do not)."""
    q, hidden = draw(2, 2, count, 4), draw(2, 9, 5, seed=1)
    (w_k, b_k), (w_v, b_v) = ((draw(8, 5, seed=s), draw(8, seed=s + 1)) for s in (2, 4))
    allowed = draw(2, 1, count, 9, seed=6) > -0.5
    k, v = (F.linear(hidden, w, b).view(2, 9, 2, 4).transpose(1, 2) for w, b in ((w_k, b_k), (w_v, b_v)))
    logits = (q @ k.transpose(-1, -2) * 0.5).masked_fill(~allowed, float("-inf"))
    actual = attend_projected(q, hidden, (w_k, b_k), (w_v, b_v), allowed, 0.5)
    torch.testing.assert_close(actual, logits.softmax(-1) @ v)
