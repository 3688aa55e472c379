"""Block-sparse attention against its dense form."""

import pytest
import torch

from hf_linear_attn.ops.sparse import attention as block_sparse
from hf_linear_attn.ops.sparse.attention import block_sparse_attention
from hf_linear_attn.ops.sparse.layout import ANYONE, NOBODY, BlockGrid, Extra
from hf_linear_attn.ops.sparse.patterns import (
    BlockLists,
    bigbird_lists,
    hashed,
    random_blocks,
)
from tests.ops.references import naive_block_sparse_attention
from tests.ops.sparse.calls import DIM, HEADS, draw, drawn_lists, make_call


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads", [1, HEADS], ids=["shared lists", "lists per head"])
@pytest.mark.parametrize("kind", [None, "left", "right", "interior"])
@pytest.mark.parametrize(("q_len", "k_len", "block"), [(33, 33, 4), (32, 32, 8), (11, 33, 4), (1, 33, 4), (5, 5, 8)])
def test_equals_the_dense_form(is_causal, heads, kind, q_len, k_len, block):
    call = make_call(kind, q_len, k_len)
    grid = BlockGrid(call, block, aligned=kind is None and q_len == k_len)
    lists = drawn_lists(grid, heads, is_causal)
    actual, expected = (
        f(call, grid, lists, scaling=0.7) for f in (block_sparse_attention, naive_block_sparse_attention)
    )
    real = call.rank[:, k_len - q_len :].expand(2, -1) >= 0
    torch.testing.assert_close(actual.transpose(1, 2)[real], expected.transpose(1, 2)[real])
    assert actual.isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("segment", [1, 2000])
@pytest.mark.parametrize("kind", [None, "left"])
def test_columns_full_rows_and_segments(is_causal, segment, kind, monkeypatch):
    """Columns with a shift, for other blocks, for all and for nobody; rows that see everything; pieces of any size."""
    monkeypatch.setattr(block_sparse, "SEGMENT_ELEMENTS", segment)
    call = make_call(kind, 30, 30)
    grid = BlockGrid(call, 4, aligned=kind is None)
    lists = drawn_lists(grid, HEADS, is_causal)
    full = None if is_causal else torch.stack([grid.blocks - 1, torch.ones_like(grid.blocks)], dim=1)
    lists = BlockLists(lists.columns, lists.kind, is_causal, full)
    block = torch.tensor([[0, 2, 3, ANYONE, NOBODY]])
    extra = Extra(draw(2, HEADS, 5, DIM, seed=7), draw(2, HEADS, 5, DIM, seed=8), block, torch.tensor([-1.5, 0.5, 2.0]))
    actual, expected = (
        f(call, grid, lists, scaling=0.7, extra=extra) for f in (block_sparse_attention, naive_block_sparse_attention)
    )
    real = call.rank.expand(2, -1) >= 0
    torch.testing.assert_close(actual.transpose(1, 2)[real], expected.transpose(1, 2)[real])
    without = block_sparse_attention(call, grid, lists, scaling=0.7)
    assert not torch.allclose(actual, without)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_equal_those_of_the_dense_form(is_causal):
    results = []
    for function in (block_sparse_attention, naive_block_sparse_attention):
        call = make_call(None, 22, 22)
        call.q, call.k, call.v = (x.requires_grad_() for x in (call.q, call.k, call.v))
        grid = BlockGrid(call, 4, aligned=True)
        out = function(call, grid, drawn_lists(grid, HEADS, is_causal), scaling=0.7)
        results.append(torch.autograd.grad((out * draw(*out.shape, seed=5)).sum(), (call.q, call.k, call.v)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("heads", [1, HEADS], ids=["shared lists", "lists per head"])
@pytest.mark.parametrize("kind", [None, "left", "right", "interior"])
@pytest.mark.parametrize(("q_len", "k_len"), [(33, 33), (11, 33)])
@pytest.mark.parametrize("factor", [0.0, 100.0], ids=["gathered", "behind a mask"])
def test_gathered_keys_and_all_keys_behind_a_mask_are_the_same(heads, kind, q_len, k_len, factor, monkeypatch):
    monkeypatch.setattr(block_sparse, "DENSE_FACTOR", factor)
    results = []
    for function in (block_sparse_attention, naive_block_sparse_attention):
        call = make_call(kind, q_len, k_len)
        leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
        call.q, call.k, call.v = leaves
        grid = BlockGrid(call, 4, aligned=kind is None and q_len == k_len)
        lists = drawn_lists(grid, heads, False)
        full = torch.stack([grid.blocks - 1, torch.ones_like(grid.blocks)], dim=1)
        out = function(call, grid, BlockLists(lists.columns, lists.kind, False, full), scaling=0.7)
        real = call.rank[:, k_len - q_len :].expand(2, -1) >= 0
        loss = (out.transpose(1, 2)[real].sin()).sum()
        results.append([out.transpose(1, 2)[real], *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("blocks", "behind_a_mask"), [(8, True), (11, True), (12, False), (64, False)])
def test_all_keys_are_read_while_the_lists_name_most_of_them(blocks, behind_a_mask):
    """BigBird's lists: a window of 3, the first and the last block, 3 random ones; two rows see everything."""
    call = make_call(None, 2 * blocks, 2 * blocks)
    grid = BlockGrid(call, 2, aligned=True)
    given = {"codes": hashed(torch.arange(HEADS)), "number": 3, "num_window_blocks": 3, "is_causal": False}
    lists = bigbird_lists(grid.row, grid.blocks, random_blocks(grid.row, grid.blocks, **given), 3, False)
    assert block_sparse._dense_is_cheaper(lists, blocks, blocks) == behind_a_mask
    actual, expected = (
        f(call, grid, lists, scaling=0.7) for f in (block_sparse_attention, naive_block_sparse_attention)
    )
    torch.testing.assert_close(actual, expected)
