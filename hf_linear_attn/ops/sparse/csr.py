"""Lists of key tiles for the block-sparse kernels: grids of blocks of any size.

All of it is arithmetic on tensors whose shapes follow from the arguments: nothing waits for the device, and a compiled
graph contains it. Lists that depend on lengths alone are kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hf_linear_attn.kernels.sparse.lists import ANYWHERE, BlockCSR
from hf_linear_attn.ops.sparse.layout import BlockGrid
from hf_linear_attn.ops.sparse.patterns import CAUSAL, EMPTY, FULL, BlockLists
from hf_linear_attn.ops.window.csr import compress

__all__ = ["blocks_csr"]


def blocks_csr(lists: BlockLists, grid: BlockGrid, q_len: int, k_len: int, *, tile: int) -> BlockCSR:
    """The lists of a grid of blocks, of any block size.

    Blocks smaller than a tile are squares of it, up to 4 x 4, each with a bit; larger ones are several tiles. A block
    takes the next such number of places, its last places without a token. Lists that are causal show whole blocks of
    the past only.

    Args:
        lists: for the R query blocks of the grid, none twice in a row but by `full_rows`.
        grid: of the call.
        q_len: Tq.
        k_len: Tk.
        tile: queries, and keys, of a tile; a power of 2.
    """
    b, R, device = grid.block_size, grid.row.shape[1], grid.row.device
    padded = -(-b // tile) * tile if b > tile else max(tile // 4, 1 << (b - 1).bit_length())
    num_blocks = -(-k_len // b)
    columns, kind = lists.columns, lists.kind[:, None]
    columns, kind = torch.broadcast_tensors(columns, kind.expand(-1, columns.shape[1], -1, -1))
    row = grid.row[:, None, :, None].expand_as(columns)
    if lists.full_rows is not None:
        columns, kind, row = _with_full_rows(columns, kind, row, grid, lists.full_rows, num_blocks)
    else:
        columns, kind, row = columns.flatten(2), kind.flatten(2), row.flatten(2)
    start = grid.row[:, :1, None] * padded // tile  # the tile of the first query block: [B or 1, 1, 1]
    valid = (kind != EMPTY) & (columns >= 0) & (columns < num_blocks)
    past = kind == CAUSAL
    if padded < tile:
        per = tile // padded
        tiles = row // per - start, columns // per
        square = row % per * per + columns % per
        squares, num_rows = per * per, (R + per - 2) // per + 1
    else:
        per = padded // tile
        inside = torch.arange(per, device=device)
        ahead = inside[:, None] < inside  # a later tile of the same block
        rows_of, columns_of, past, valid = (x[..., None, None] for x in (row, columns, past, valid))
        valid = (valid & ~(past & ahead)).flatten(2)
        past = (past & (inside[:, None] == inside)).flatten(2)
        row_tile, col_tile = torch.broadcast_tensors(
            rows_of * per + inside[:, None] - start[..., None, None], columns_of * per + inside
        )
        tiles = row_tile.flatten(2), col_tile.flatten(2)
        square = torch.zeros_like(tiles[0])
        squares, num_rows = 1, R * per
    num_cols = -(-num_blocks * padded // tile)
    # A tile in which blocks are causal, that ends behind the last token, or whose blocks end with empty places.
    whole = (grid.count // b * padded)[:, None, None]
    cut = past | ((tiles[1] + 1) * tile > whole) | (padded > b)
    row_tile, col_tile, word = _join_squares(*tiles, square, cut, valid, (num_rows, num_cols), squares)
    there = word > 0
    full = word == (1 << squares) - 1
    shape = num_rows, num_cols
    bits = word & ((1 << squares) - 1) if squares > 1 else None
    entries = full & there, there, bits
    rows, col_idx, bits = compress(row_tile, col_tile, *entries, *shape)
    cols, row_idx, bits_t = compress(col_tile, row_tile, *entries, *shape[::-1])
    aligned = grid.source is None and q_len == k_len  # all of it starts at place 0
    return BlockCSR(
        rows=rows,
        col_idx=col_idx,
        cols=cols,
        row_idx=row_idx,
        tile=(tile, tile),
        tile_t=(tile, tile),
        bits=bits,
        bits_t=bits_t,
        sub=padded if squares > 1 else 0,
        row_order=_longest_first(rows),
        col_order=_longest_first(cols),
        block=b,
        padded_block=padded,
        band=(0, ANYWHERE) if lists.is_causal else None,
        q_start=None if aligned else (grid.count - q_len).to(torch.int32),
        q_first=None if aligned else (start[:, 0, 0] * tile).to(torch.int32),
        k_start=None if aligned else (-grid.start).to(torch.int32),
    )


def _with_full_rows(
    columns: torch.Tensor,
    kind: torch.Tensor,
    row: torch.Tensor,
    grid: BlockGrid,
    full_rows: torch.Tensor,
    num_blocks: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entries `[B or 1, H or 1, E]` of the lists, and those of the rows that see every block."""
    batch, heads, R, _ = columns.shape
    first = grid.row[:, :1]
    there = (full_rows >= first) & (full_rows < first + R)  # else they are not in this call
    every = torch.arange(num_blocks, device=columns.device).expand(batch, heads, full_rows.shape[1], -1)
    more = full_rows[:, None, :, None].expand_as(every)
    seen = torch.where(there[:, None, :, None], FULL, EMPTY).expand_as(every)
    pairs = (columns, every), (kind, seen), (row, more)
    columns, kind, row = (torch.cat([x.flatten(2), y.flatten(2)], dim=-1) for x, y in pairs)
    return columns, kind, row


def _join_squares(
    row: torch.Tensor,
    col: torch.Tensor,
    square: torch.Tensor,
    cut: torch.Tensor,
    valid: torch.Tensor,
    shape: tuple[int, int],
    squares: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entries of equal tiles made one: `[sets_b, sets_h, E]` each, E as before.

    Returns:
        row and column tiles, and a word: bit s for square s, bit `squares` where one is cut; 0 for an unused entry.
    """
    row, col, square, cut, valid = torch.broadcast_tensors(row, col, square, cut, valid)
    num_rows, num_cols = shape
    unused = num_rows * num_cols
    tile = torch.where(valid, row * num_cols + col, unused)
    # What is cut has a bit of its own: an entry per square and one per cut, sorted, each counted once.
    code = torch.cat([tile * (squares + 1) + square, torch.where(cut, tile, unused) * (squares + 1) + squares], dim=-1)
    code = code.sort(dim=-1).values
    tile, bit = code // (squares + 1), code % (squares + 1)
    new = F.pad(code.diff(dim=-1) > 0, (1, 0), value=True)
    place = F.pad(tile.diff(dim=-1) > 0, (1, 0), value=False).cumsum(-1)  # of the tile among the tiles
    amount = torch.where(new & (tile < unused), torch.bitwise_left_shift(torch.ones_like(bit), bit), 0)
    word = torch.zeros_like(code).scatter_add_(-1, place, amount)
    joined = torch.full_like(code, unused).scatter_(-1, place, tile)
    size = valid.shape[-1] + 1  # tiles, and one place for what is unused
    word, joined = word[..., :size], joined[..., :size]
    return joined // num_cols, joined % num_cols, word


def _longest_first(pointers: torch.Tensor) -> torch.Tensor:
    length = pointers[..., 2] - pointers[..., 0]
    return length.sort(dim=-1, descending=True, stable=True).indices.to(torch.int32).contiguous()
