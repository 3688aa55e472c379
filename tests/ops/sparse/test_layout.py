"""The grid of blocks of a call."""

import torch

from hf_linear_attn.ops.sparse.attention import block_sparse_attention
from hf_linear_attn.ops.sparse.layout import BlockGrid
from tests.ops.references import naive_block_sparse_attention
from tests.ops.sparse.calls import DIM, HEADS, draw, drawn_lists, make_call


def test_earlier_keys_shift_the_grid():
    """7 and 10 real tokens came before, 9 come now: blocks are counted from each row's first token."""
    past = draw(2, HEADS, 10, DIM, seed=3), draw(2, HEADS, 10, DIM, seed=4), torch.tensor([7, 10])
    call = make_call(None, 9, 9, past)
    grid = BlockGrid(call, 4, aligned=False)
    assert grid.row[:, 0].tolist() == [1, 2]
    assert grid.start.tolist() == [3, 0]
    assert grid.count.tolist() == [16, 19]
    assert grid.blocks.tolist() == [4, 5]
    torch.testing.assert_close(grid.untile(grid.tiles(call.q), 9), call.q)
    lists = drawn_lists(grid, HEADS, True)
    actual, expected = (
        f(call, grid, lists, scaling=0.7) for f in (block_sparse_attention, naive_block_sparse_attention)
    )
    torch.testing.assert_close(actual, expected)
