"""The lists of key tiles, by rows and by columns, show what the twins' dense forms see, each pair once."""

import pytest
import torch

from hf_linear_attn.ops.base.compaction import compact
from hf_linear_attn.ops.base.memo import kept_lists
from hf_linear_attn.ops.sparse.csr import blocks_csr
from hf_linear_attn.ops.sparse.layout import block_grid
from hf_linear_attn.ops.sparse.patterns import FULL, BlockLists, bigbird_lists, hashed, own_block_lists, random_blocks
from hf_linear_attn.ops.window.attention import naive_sliding_window_attention
from hf_linear_attn.ops.window.csr import window_csr
from tests.kernels.sparse.reference import seen_by_lists
from tests.ops.references import naive_block_sparse_attention

CPU = torch.device("cpu")
TILES = ((16, 8), (8, 16)), ((8, 8), (8, 8))


def seen_of(attend, q_len, k_len):
    """What a twin sees: the keys whose values, unit vectors, show in the output."""
    return attend(torch.zeros(1, 1, q_len, 4), torch.zeros(1, 1, k_len, 4), torch.eye(k_len)[None, None]) > 0


@pytest.mark.parametrize("tiles", TILES, ids=["wide", "square"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (9, 20), (100, 0), (3, 100), (100, 100)])
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 40), (16, 16), (37, 37), (9, 50)])
def test_windows(q_len, k_len, left, right, tiles):
    lists = window_csr(q_len, k_len, left, right, CPU, tiles=tiles)

    def twin(q, k, v):
        return naive_sliding_window_attention(q, k, v, left=left, right=right, scaling=1.0)

    expected = seen_of(twin, q_len, k_len)
    for transposed in (False, True):
        assert torch.equal(seen_by_lists(lists, q_len, k_len, transposed=transposed), expected)


@pytest.mark.parametrize("hole", [(-1, 1), (0, 0), (-20, 3)])
def test_holes(hole):
    distance = torch.arange(11, 40)[:, None] - torch.arange(40)
    expected = (distance <= 30) & (distance >= -7) & ((distance < hole[0]) | (distance > hole[1]))
    for tiles in TILES:
        lists = window_csr(29, 40, 30, 7, CPU, tiles=tiles, hole=hole)
        for transposed in (False, True):
            assert torch.equal(seen_by_lists(lists, 29, 40, transposed=transposed)[0, 0], expected)


def test_a_wide_window_is_mostly_full():
    lists = window_csr(256, 256, 128, 128, CPU, tiles=((16, 8), (8, 16)))
    for pointers in (lists.rows, lists.cols):
        masked, full = (pointers[0, 0, 8, 1] - pointers[0, 0, 8, 0]), (pointers[0, 0, 8, 2] - pointers[0, 0, 8, 1])
        assert int(masked) <= 6
        assert int(full) >= 14 if pointers is lists.cols else int(full) >= 28


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
    grid = block_grid(call, block, aligned=kind is None and q_len == k_len)
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
    grid = block_grid(call, 4, aligned=True)
    csr = blocks_csr(bigbird_of(grid, False), grid, 61, 61, tile=8)
    for pointers, order in ((csr.rows, csr.row_order), (csr.cols, csr.col_order)):
        length = (pointers[..., 2] - pointers[..., 0]).gather(-1, order.long())
        assert bool((length.diff(dim=-1) <= 0).all())
        assert bool((order.sort(dim=-1).values == torch.arange(order.shape[-1])).all())


def test_equal_entries_are_one():
    call = call_of(None, 16, 16)
    grid = block_grid(call, 4, aligned=True)
    columns = torch.tensor([0, 1, 1, 3]).expand(1, 1, 4, 4)
    lists = BlockLists(columns, torch.full((1, 4, 4), FULL), False)
    seen = seen_by_lists(blocks_csr(lists, grid, 16, 16, tile=8), 16, 16)
    assert torch.equal(seen[0, 0], (torch.arange(16) // 4 != 2).expand(16, 16))


def test_lists_are_kept_per_pattern_and_length():
    made = [window_csr(n, 32, left, 2, CPU, tiles=TILES[0]) for n, left in ((32, 5), (32, 5), (32, 6), (16, 5))]
    assert made[0] is made[1]
    assert len({id(x) for x in made}) == 3
    with torch.inference_mode():
        lists = kept_lists(("of this test",), CPU, lambda: torch.zeros(1))
    assert not lists.is_inference()
