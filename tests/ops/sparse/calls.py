"""Calls and lists of blocks that the tests of block-sparse attention draw."""

import torch

from hf_linear_attn.ops.base.compaction import compact
from hf_linear_attn.ops.sparse.patterns import (
    EMPTY,
    FULL,
    TAIL,
    BlockLists,
    hashed,
    own_block_lists,
    sample_distinct,
)

HEADS, DIM = 3, 4


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padding_of(kind, batch, length):
    places, number = torch.arange(length).expand(batch, -1), torch.arange(batch)[:, None] * 5 + 3
    masks = {"left": places >= number, "right": places < length - number, "interior": places % (number + 1) != 1}
    return masks.get(kind)


def make_call(kind, q_len, k_len, past=None, batch=2):
    q, k, v = (draw(batch, HEADS, n, DIM, seed=s) for s, n in enumerate((q_len, k_len, k_len)))
    return compact(q, k, v, padding_of(kind, batch, k_len), past)


def drawn_lists(grid, heads, is_causal):
    """Blocks drawn without any pattern, other ones for each head, with empty slots."""
    row, blocks = grid.row, grid.blocks
    code = hashed(hashed(torch.arange(heads))[:, None] + row[:, None])
    size = row if is_causal else (blocks[:, None] - 1).expand_as(row)  # the last block has its own kind below
    columns = sample_distinct(code, size[:, None], 3)
    there = torch.arange(3) < size[..., None]
    own = own_block_lists(row, blocks, is_causal)
    if not is_causal:  # its tail for everybody instead of the own block
        own = BlockLists((blocks[:, None] - 1).expand_as(row)[:, None, :, None], torch.full_like(own.kind, TAIL), False)
    columns = torch.cat([columns, own.columns.expand(columns.shape[0], heads, -1, -1)], dim=-1)
    return BlockLists(columns, torch.cat([torch.where(there, FULL, EMPTY), own.kind], dim=-1), is_causal)
