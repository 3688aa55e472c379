"""The lists of key tiles of a grid of blocks show what its dense form sees, each pair once."""

import pytest
import torch

from hf_linear_attn.ops.base.compaction import compact
from hf_linear_attn.ops.sparse.csr import blocks_csr
from hf_linear_attn.ops.sparse.layout import BlockGrid
from hf_linear_attn.ops.sparse.patterns import FULL, BlockLists, bigbird_lists, hashed, own_block_lists, random_blocks
from tests.kernels.sparse.reference import seen_by_lists
from tests.ops.references import naive_block_sparse_attention


def call_of(kind, q_len, k_len):
    places, number = torch.arange(k_len).expand(2, -1), torch.arange(2)[:, None] * 5 + 3
    masks = {"left": places >= number, "right": places < k_len - number, "interior": places % (number + 1) != 1}
    q, k, v = torch.zeros(2, 3, q_len, 4), torch.zeros(2, 3, k_len, 4), torch.eye(k_len).expand(2, 3, -1, -1)
    return compact(q, k, v, masks.get(kind))


def bigbird_of(grid, is_causal):
    codes = hashed(torch.arange(3))
    drawn = random_blocks(grid.row, grid.blocks, codes=codes, number=2, num_window_blocks=3, is_causal=is_causal)
    return bigbird_lists(grid.row, grid.blocks, drawn, 3, is_causal)


PATTERNS = {
    "bigbird": bigbird_of,
    "own block": lambda grid, is_causal: own_block_lists(grid.row, grid.blocks, is_causal),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("kind", [None, "left", "interior"])
@pytest.mark.parametrize(("q_len", "k_len", "block"), [(61, 61, 4), (60, 60, 3), (20, 61, 8), (1, 61, 4), (61, 61, 21)])
def test_grids_of_blocks(pattern, is_causal, kind, q_len, k_len, block):
    """Blocks that are a quarter of a tile, odd, a tile, and several tiles; padding; earlier keys."""
    call = call_of(kind, q_len, k_len)
    grid = BlockGrid(call, block, aligned=kind is None and q_len == k_len)
    lists = PATTERNS[pattern](grid, is_causal)
    real = (call.rank[:, k_len - q_len :] >= 0).expand(2, -1)[:, None, :, None]
    # Padded keys are 0 in a compacted call; here all values are what shows a key.
    call.v = torch.eye(k_len).expand(2, 3, -1, -1)
    expected = (naive_block_sparse_attention(call, grid, lists, scaling=1.0) > 0) & real
    csr = blocks_csr(lists, grid, q_len, k_len, tile=8)
    for transposed in (False, True):
        shown = seen_by_lists(csr, q_len, k_len, transposed=transposed)
        assert torch.equal(shown.expand(2, 3, -1, -1) & real, expected)


def test_the_longest_lists_come_first():
    call = call_of(None, 61, 61)
    grid = BlockGrid(call, 4, aligned=True)
    csr = blocks_csr(bigbird_of(grid, False), grid, 61, 61, tile=8)
    for pointers, order in ((csr.rows, csr.row_order), (csr.cols, csr.col_order)):
        length = (pointers[..., 2] - pointers[..., 0]).gather(-1, order.long())
        assert bool((length.diff(dim=-1) <= 0).all())
        assert bool((order.sort(dim=-1).values == torch.arange(order.shape[-1])).all())


def test_equal_entries_are_one():
    call = call_of(None, 16, 16)
    grid = BlockGrid(call, 4, aligned=True)
    columns = torch.tensor([0, 1, 1, 3]).expand(1, 1, 4, 4)
    lists = BlockLists(columns, torch.full((1, 4, 4), FULL), False)
    seen = seen_by_lists(blocks_csr(lists, grid, 16, 16, tile=8), 16, 16)
    assert torch.equal(seen[0, 0], (torch.arange(16) // 4 != 2).expand(16, 16))
