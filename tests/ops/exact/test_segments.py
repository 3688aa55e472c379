"""Segments of a call, row by row, against the rank of every token."""

import pytest
import torch

from hf_linear_attn.ops.base.compaction import compact
from hf_linear_attn.ops.exact.segments import (
    bounded_key_weight,
    memory_attention,
    segment_attention,
    segment_layout,
)

F64 = torch.float64
SIZE = 4


def draw(length=11, past=0, padded=True):
    g = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 2, 3, length, 5, generator=g, dtype=F64)
    mask = None
    if padded:
        mask = torch.rand(2, length, generator=g) < 0.7
        mask[0] = True
    before = None
    if past:
        earlier = torch.randn(2, 2, 3, past, 5, generator=g, dtype=F64)
        before = earlier[0], earlier[1], torch.full((2,), past)
    return compact(q, k, v, mask, before)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("past", [0, 6])
def test_tokens_are_cut_by_rank_and_restored(past, padded):
    call = draw(past=past, padded=padded)
    layout = segment_layout(call, SIZE, aligned=not past)
    cut = layout.cut(call.q)
    ranks = call.rank[:, -11:].expand(2, -1)
    for b in range(2):
        real = layout.real.expand(2, -1, -1)[b]
        assert layout.rank.expand(2, -1, -1)[b][real].tolist() == [r for r in ranks[b].tolist() if r >= past]
        first = layout.rank.expand(2, -1, -1)[b] // SIZE * SIZE
        assert torch.equal(first[real], layout.begin.expand(2, -1)[b][:, None].expand_as(first)[real])
    rows = layout.restore(cut)
    valid = (ranks >= past)[:, None, :, None].expand_as(rows)
    assert torch.equal(rows[valid], call.q[valid])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("past", "memory"), [(0, 0), (0, 3), (6, 0), (6, 3)])
def test_rows_see_their_segment_and_the_tokens_just_before_it(past, memory, padded):
    call = draw(past=past, padded=padded)
    layout = segment_layout(call, SIZE, aligned=not past)
    output = layout.restore(segment_attention(call, layout, memory_length=memory, scaling=0.5))
    key, row = call.rank.expand(2, -1)[:, None], call.rank.expand(2, -1)[:, -11:, None]
    seen = (key >= 0) & (key <= row) & (key >= row // SIZE * SIZE - memory)
    logits = (call.q @ call.k.mT * 0.5).masked_fill(~seen[:, None], -torch.inf)
    expected = logits.softmax(-1).nan_to_num(0.0) @ call.v
    valid = (row >= past)[:, None].expand_as(output)
    torch.testing.assert_close(output[valid], expected[valid])


@pytest.mark.parametrize("length", [8, 11])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("memory", [0, 3])
def test_rows_of_encoders_see_their_segment_and_the_tokens_on_either_side(memory, padded, length):
    call = draw(length, padded=padded)
    layout = segment_layout(call, SIZE, aligned=True)
    found = segment_attention(call, layout, memory_length=memory, scaling=0.5, is_causal=False)
    key, row = call.rank.expand(2, -1)[:, None], call.rank.expand(2, -1)[..., None]
    begin = row // SIZE * SIZE
    seen = (key >= 0) & (key >= begin - memory) & (key < begin + SIZE + memory)
    logits = (call.q @ call.k.mT * 0.5).masked_fill(~seen[:, None], -torch.inf)
    output, expected = layout.restore(found), logits.softmax(-1).nan_to_num(0.0) @ call.v
    valid = (row[..., 0] >= 0)[:, None, :, None].expand_as(output)
    torch.testing.assert_close(output[valid], expected[valid])


def test_memory_holds_finished_segments_alone():
    call = draw(padded=False)
    layout = segment_layout(call, SIZE, aligned=True)
    q, k, v = (layout.cut(x) for x in (call.q.abs(), call.k.abs(), call.v))
    k = k * layout.real[:, None, ..., None]
    zero = torch.zeros(2, 3, 5, 6, dtype=F64)
    output, memory, pending = memory_attention(q, k, v, layout, (zero, zero))
    key, row = torch.arange(11), torch.arange(11)[:, None]
    scores = (call.q.abs() @ call.k.abs().mT).masked_fill(key >= row // SIZE * SIZE, 0)
    total = scores.sum(-1, keepdim=True)
    expected = scores @ call.v / torch.where(total == 0, 1.0, total)
    torch.testing.assert_close(layout.restore(output), expected)
    values = torch.cat([call.v, torch.ones_like(call.v[..., :1])], -1)
    torch.testing.assert_close(memory, call.k.abs()[:, :, :8].mT @ values[:, :, :8])
    torch.testing.assert_close(pending, call.k.abs()[:, :, 8:].mT @ values[:, :, 8:])


def test_weights_are_bounded():
    k = torch.tensor([[[[0.0], [1.0], [1e4], [-1e4]]]], dtype=F64)
    weight = bounded_key_weight(k, torch.ones(1, 1, dtype=F64), torch.full((1,), 2.0, dtype=F64), 0.5)
    expected = torch.tensor([-2.0, -1.5, 30.0, -60.0], dtype=F64).exp()
    torch.testing.assert_close(weight[0, 0, :, 0], expected)
