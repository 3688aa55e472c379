"""Sequences that grow equal concatenated ones, whoever continues them, and hold at most a bounded room."""

import copy
import gc
import weakref

import pytest
import torch

from hf_linear_attn.ops.base import growing
from hf_linear_attn.ops.base.compaction import heads_apart, take_tokens
from hf_linear_attn.ops.base.growing import append_tokens, last_tokens, may_grow
from hf_linear_attn.testing.on_gpu import OnGpu, Watched, gpu


def draw(tokens, seed=0, batch=2):
    return torch.randn(batch, 3, tokens, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_a_token_at_a_time_copies_seldom_and_keeps_a_bounded_room():
    x = may_grow(draw(100))
    expected, places = x, set()
    for step in range(200):
        token = draw(1, seed=step)
        x, expected = append_tokens(x, token), torch.cat([expected, token], 2)
        assert torch.equal(x, expected)
        assert x.untyped_storage().nbytes() <= 1.25 * x.nbytes + 16 * x[:, :, :1].nbytes
        places.add(x.untyped_storage().data_ptr())
    assert len(places) <= 6


def test_nothing_outlives_its_owner():
    prompt = may_grow(draw(20))
    grown = append_tokens(prompt, draw(1, seed=1))
    of_prompt, of_grown = weakref.ref(prompt), weakref.ref(grown)
    del prompt, grown
    gc.collect()
    assert of_prompt() is None
    assert of_grown() is None


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(growing, "_LEAST_WINDOW", 1)


@pytest.mark.parametrize("window", [21, 10])
def test_two_continuations_of_one_sequence_do_not_meet(window, small_windows):
    x = last_tokens(append_tokens(may_grow(draw(20)), draw(1, seed=1)), window)
    kept = x.clone()
    first, second = append_tokens(x, draw(2, seed=2)), append_tokens(x, draw(2, seed=3))
    assert first.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert torch.equal(x, kept)
    assert torch.equal(first, torch.cat([kept, draw(2, seed=2)], 2))
    assert torch.equal(second, torch.cat([kept, draw(2, seed=3)], 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :, :-1],
        lambda x: x.index_select(0, torch.tensor([1, 1])),
        lambda x: x.repeat_interleave(2, 0),
        lambda x: x.double(),
        copy.deepcopy,
    ],
    ids=["cropped", "beams", "repeated", "dtype", "copied"],
)
def test_what_came_another_way_is_copied(change):
    x = append_tokens(may_grow(draw(20)), draw(1, seed=1))
    kept, changed = x.clone(), change(x)
    new = draw(1, seed=2, batch=len(changed)).to(changed.dtype)
    y = append_tokens(changed, new)
    assert torch.equal(y, torch.cat([changed, new], 2))
    assert y.is_contiguous()
    assert torch.equal(x, kept)


def test_with_gradients_and_across_inference_mode():
    with torch.inference_mode():
        x = append_tokens(may_grow(draw(20)), draw(1, seed=1))
    y = append_tokens(x, draw(1, seed=2))
    assert torch.equal(y, torch.cat([draw(20), draw(1, seed=1), draw(1, seed=2)], 2))
    with torch.enable_grad():
        weight = torch.ones((), requires_grad=True)
        out = (append_tokens(y, draw(1, seed=3) * weight) * weight).sum()
        kept = (y * weight).square().sum()
    append_tokens(y, draw(1, seed=4))  # beside y, which the backward pass reads
    torch.testing.assert_close(torch.autograd.grad(kept, weight)[0], 2 * y.square().sum())
    assert torch.autograd.grad(out, weight)[0].isfinite()


def test_tokens_of_a_view_with_room_are_taken_in_place():
    x = append_tokens(may_grow(draw(20)), draw(1, seed=1))
    assert not x.is_contiguous()
    matrix, first = heads_apart(x)
    assert matrix.data_ptr() == x.data_ptr()
    assert torch.equal(matrix[first + torch.arange(21)], x)
    index = torch.tensor([[3, 20], [0, 7]])
    assert torch.equal(take_tokens(x, index), x.gather(2, index[:, None, :, None].expand(-1, 3, -1, 4)))
    assert heads_apart(x.transpose(1, 2).contiguous().transpose(1, 2)) is None


def test_a_window_slides_along_its_memory(small_windows):
    x = last_tokens(draw(100), 32)
    assert x.untyped_storage().nbytes() == x.nbytes  # nothing keeps the text before it
    expected, places = x, set()
    for step in range(200):
        grown, expected = append_tokens(x, draw(1, seed=step)), torch.cat([expected, draw(1, seed=step)], 2)
        assert torch.equal(grown, expected)
        x, expected = last_tokens(grown, 32), expected[:, :, 1:]
        assert torch.equal(x, expected)
        assert x.untyped_storage().nbytes() <= 1.25 * grown.nbytes + 16 * x[:, :, :1].nbytes
        places.add(x.untyped_storage().data_ptr())
    assert len(places) <= 200 / 16 + 1


def test_the_end_of_a_long_memory_is_copied(small_windows):
    x = append_tokens(may_grow(draw(1000)), draw(1, seed=1))
    window = last_tokens(x, 10)
    assert torch.equal(window, x[:, :, -10:])
    assert window.untyped_storage().nbytes() == window.nbytes
    assert last_tokens(x, 0).shape[2] == 0


def test_a_small_window_is_copied():
    x = append_tokens(may_grow(draw(20)), draw(1, seed=1))
    assert last_tokens(x, 20).is_contiguous()


@pytest.mark.parametrize("captured", [False, True])
def test_a_gpu_copies_no_cache_for_a_token_unless_a_graph_is_captured(captured, monkeypatch):
    """What a captured graph writes behind a cache it would write there for every cache that it is run with."""
    pytest.importorskip("triton", reason="the extra [triton] is not installed")
    x, token = draw(1024), draw(1, seed=1)
    with gpu(), Watched():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
        held = append_tokens(may_grow(OnGpu(x)), OnGpu(token))
        grown = append_tokens(held, OnGpu(token))
        window = last_tokens(grown, 1024)
    wanted = torch.cat([x, token, token], 2)
    assert torch.equal(grown.values, wanted)
    assert torch.equal(window.values, wanted[:, :, -1024:])
    shared = held.values.untyped_storage().data_ptr() == grown.values.untyped_storage().data_ptr()
    assert shared != captured
