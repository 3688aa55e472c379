"""Blocks of queries over views of their windows, against blocks that are gathered and the dense form."""

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.ops.window import attention, blocks
from hf_linear_attn.ops.window.attention import (
    naive_sliding_window_attention,
    sliding_window_attention,
)
from tests.ops.window.calls import draw, set_block_size


def test_rows_without_a_key_are_zero_and_pass_no_gradient(monkeypatch):
    set_block_size(monkeypatch, 8)
    q, k, v = (draw(1, 1, 40, 4, seed=i).requires_grad_() for i in range(3))
    allowed = torch.arange(40)[None] >= 20
    out = sliding_window_attention(q, k, v, left=3, right=0, scaling=0.5, key_allowed=allowed)
    assert (out[:, :, :20] == 0).all()
    out.sum().backward()
    assert (q.grad[:, :, :20] == 0).all()
    assert (k.grad[:, :, :20] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("on_views", [True, False])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("segment", [1, 1 << 22])
@pytest.mark.parametrize(("left", "right"), [(9, 0), (5, 70), (230, 200)])
def test_views_and_gathered_blocks_agree_with_the_dense_form(on_views, biased, segment, left, right, monkeypatch):
    """The first path is that of a CPU, the second one that of other devices; a bias is one more channel of extras."""
    monkeypatch.setattr(attention, "serves", lambda q, v: on_views)
    for module in (blocks, attention):
        monkeypatch.setattr(module, "SEGMENT_ELEMENTS", segment)
    generator = torch.Generator().manual_seed(left)
    q, k, v = (torch.randn(2, 2, n, 6, generator=generator, dtype=torch.float64) for n in (200, 230, 230))
    extra = [torch.randn(2, 2, 3, n, generator=generator, dtype=torch.float64) for n in (6 + biased, 6)]
    seen = torch.rand(2, 200, 3, generator=generator) < 0.5
    allowed = torch.arange(230) >= torch.tensor([[60], [0]])
    results = []
    for function in (sliding_window_attention, naive_sliding_window_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, *extra)]
        more = (leaves[3], F.pad(leaves[4], (0, int(biased))), seen)
        out = function(*leaves[:3], left=left, right=right, scaling=0.4, key_allowed=allowed, extra=more)
        out.sin().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_last_channel_of_wider_extra_keys_is_a_bias():
    """Against keys and queries that carry that channel themselves."""
    q, k, v = draw(2, 2, 90, 4), draw(2, 2, 90, 4, seed=1), draw(2, 2, 90, 4, seed=2)
    keys, values = draw(2, 2, 3, 5, seed=3), F.pad(draw(2, 2, 3, 4, seed=4), (0, 1))
    logits = torch.cat([q @ keys[..., :4].mT + keys[..., 4][:, :, None], q @ k.mT], -1) * 0.5
    distance = torch.arange(90) - torch.arange(90)[:, None]
    logits[..., 3:].masked_fill_((distance < -3) | (distance > 2), float("-inf"))
    expected = logits.softmax(-1) @ torch.cat([values[..., :4], v], 2)
    extra = keys, values, torch.ones(1, 1, 3, dtype=torch.bool)
    options = {"left": 3, "right": 2, "scaling": 0.5, "extra": extra}
    torch.testing.assert_close(sliding_window_attention(q, k, v, **options), expected)
    torch.testing.assert_close(naive_sliding_window_attention(q, k, v, **options), expected)
