"""Calls with their padding in front, against lists of the real tokens of each row."""

import pytest
import torch

from hf_linear_attn.ops.base import compaction


def draw(length=9, queries=9, past=0):
    g = torch.Generator().manual_seed(length + queries + past)
    q, k, v = (torch.randn(3, 2, n, 4, generator=g) for n in (queries, length, length))
    mask = torch.rand(3, length, generator=g) < 0.6
    mask[0], mask[1, :3] = True, False
    return q, k, v, mask


@pytest.mark.parametrize("queries", [9, 4])
def test_real_tokens_are_contiguous_and_come_back(queries):
    q, k, v, mask = draw(queries=queries)
    call = compaction.compact(q, k, v, mask)
    for b in range(3):
        real, rows = mask[b].nonzero()[:, 0], mask[b, -queries:].nonzero()[:, 0]
        for found, given in ((call.k, k), (call.v, v)):
            assert torch.equal(found[b, :, 9 - len(real) :], given[b][:, real])
            assert not found[b, :, : 9 - len(real)].any()
        assert torch.equal(call.q[b, :, queries - len(rows) :], q[b][:, rows])
        assert call.rank[b].tolist() == [i - 9 + len(real) for i in range(9)]
    assert torch.equal(call.restore(call.q), q * mask[:, None, -queries:, None])


def test_keys_before_the_call_stand_before_its_own():
    q, k, v, mask = draw()
    past_key, past_value = torch.randn(2, 3, 2, 5, 4).unbind(0)
    count = torch.tensor([5, 2, 11])  # a full window, one with three empty places, and one that forgot six tokens
    call = compaction.compact(q, k, v, mask, (past_key, past_value, count))
    for b in range(3):
        real, held = mask[b].nonzero()[:, 0], min(int(count[b]), 5)
        expected = torch.cat([past_key[b, :, 5 - held :], k[b][:, real]], 1)
        assert torch.equal(call.k[b, :, 14 - expected.shape[1] :], expected)
        assert int(call.rank[b, -1]) == int(count[b]) + len(real) - 1
    state = compaction.kv_state_after(call)
    assert state["count"].tolist() == (count + mask.sum(-1)).tolist()


def test_without_padding_nothing_moves():
    q, k, v, _ = draw()
    call = compaction.compact(q, k, v, None)
    assert call.q is q
    assert call.k is k
    assert call.restore(q) is q
    assert call.rank.tolist() == [list(range(9))]


@pytest.mark.parametrize("layout", ["contiguous", "heads inside", "with room behind"])
def test_rows_are_taken_from_any_layout(layout):
    x = torch.randn(3, 2, 9, 4)
    if layout == "heads inside":
        x = torch.randn(3, 9, 2, 4).transpose(1, 2)
    elif layout == "with room behind":
        x = torch.randn(3, 2, 12, 4)[:, :, :9]
    index = torch.tensor([[0, 8, 3], [1, 1, 1], [8, 7, 0]])
    expected = x.gather(2, index[:, None, :, None].expand(-1, 2, -1, 4))
    with torch.no_grad():
        assert torch.equal(compaction.take_tokens(x, index), expected)
    assert torch.equal(compaction.take_tokens(x, index), expected)


def test_first_and_marked_tokens():
    q, k, v, mask = draw()
    call = compaction.compact(q, k, v, mask)
    first = compaction.first_tokens(2, call)
    marks = torch.zeros_like(mask)
    for b in range(3):
        marks[b, mask[b].nonzero()[:2, 0]] = True
    marked = compaction.marked_tokens(marks | ~mask, call)  # a mark at padding counts for nothing
    for found in (first, marked):
        assert found.valid.all()
        assert [found.slot[b][found.slot[b] >= 0].tolist() for b in range(3)] == [[0, 1]] * 3
        assert found.in_window.sum(-1).tolist() == (mask.sum(-1) - 2).tolist()
    assert torch.equal(first.position.expand(3, -1), marked.position)
    rows = torch.randn(3, 2, 2, 4)
    placed = call.restore(first.place_rows(rows, torch.zeros_like(call.q)))
    for b in range(3):
        assert torch.equal(placed[b][:, marks[b]], rows[b])
    assert compaction.marked_tokens(torch.zeros_like(mask), call) is None


def _tokens(count):
    return (torch.randn(3, 2, count, 4) for _ in range(3))


def test_all_keys_are_known_to_be_tokens_without_padding_alone():
    """Nothing is read for it: the calls say so, and a state that came another way is asked no more."""
    state = compaction.init_kv_state(3, 2, 4, torch.float32, torch.device("cpu"))

    def extend(state, mask=None):
        return compaction.compact(*_tokens(2), mask, (state["key"], state["value"], state["count"]))

    for total in (2, 4, 6):
        call = extend(state)
        assert call.real is None
        assert call.tokens == total
        state = compaction.kv_state_after(call)
    reordered = {name: x[[1, 0, 2]] for name, x in state.items()}
    assert extend(reordered).real.all()
    padded = compaction.kv_state_after(extend(state, torch.tensor([[True, True], [False, True], [True, True]])))
    call = extend(padded)
    assert call.tokens is None
    assert call.real.tolist() == [[True] * 10, [False] + [True] * 9, [True] * 10]


def test_the_places_of_a_window_are_tokens_once_it_is_full():
    count = compaction.init_count(3, torch.device("cpu"))
    state = {"key": torch.zeros(3, 2, 5, 4), "value": torch.zeros(3, 2, 5, 4), "count": count}
    seen = []
    for _ in range(4):
        call = compaction.compact(*_tokens(2), None, (state["key"], state["value"], state["count"]))
        seen.append(None if call.real is None else call.real[0].tolist())
        state = compaction.window_state_after(call, 5, torch.float32)
    empty = [[False] * 5 + [True] * 2, [False] * 3 + [True] * 4, [False] + [True] * 6]
    assert seen == [*empty, None]
