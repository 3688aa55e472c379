"""What the forms of block-sparse attention share: the grid of blocks of a call, and columns seen besides the lists."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.compaction import CompactedCall, take_tokens
from hf_linear_attn.ops.base.tracing import blocks_of

__all__ = ["ANYONE", "NOBODY", "BlockGrid", "Extra", "block_grid"]

# In `Extra.block`: a column that every query sees, and one that is not there.
ANYONE, NOBODY = -1, -2


@dataclass(frozen=True)
class Extra:
    """G columns that queries of other blocks see besides their lists: later blocks when causal, else all others.

    Attributes:
        key, value: `[B, H, G, D]`.
        block: long `[B or 1, G]`, the block that a column belongs to, whose own queries have it in their lists.
        shift: `[H]`, added to the logits of these columns, or None.
    """

    key: torch.Tensor
    value: torch.Tensor
    block: torch.Tensor
    shift: torch.Tensor | None = None

    def seen(self, row: torch.Tensor, is_causal: bool) -> torch.Tensor:
        """Which of the query blocks `row` `[B or 1, R]` sees which column: bool `[B or 1, R, G]`."""
        block = self.block[:, None]
        return ((block < row[..., None]) if is_causal else (block != row[..., None])) & (block != NOBODY)


@dataclass(frozen=True)
class BlockGrid:
    """Where the queries and keys of a compacted call stand in a grid of blocks, by their ranks.

    Attributes:
        block_size: b, tokens per block.
        row: long `[B or 1, R]`, the block of each tile of queries.
        place: long `[B or 1, t]`, where the t queries of a tile stand in their block.
        start: long `[B or 1]`, place of the token of rank 0 among the keys.
        count: long `[B or 1]`, real tokens among the keys.
        source: long `[B or 1, R * t]`, the query at each place of the tiles; None when it is that place.
        back: long `[B or 1, Tq]`, the place of each query; None likewise.
        aligned: whether there is neither padding nor an earlier key: blocks are slices.
    """

    block_size: int
    row: torch.Tensor
    place: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    source: torch.Tensor | None
    back: torch.Tensor | None
    aligned: bool = False

    @property
    def blocks(self) -> torch.Tensor:
        """Number of blocks of each sequence, at least 1: long `[B or 1]`."""
        return (-(-self.count // self.block_size)).clamp(min=1)

    def tiles(self, q: torch.Tensor) -> torch.Tensor:
        """Queries `[B, H, Tq, D]` as `[B, R, H, t, D]`; places without a query hold anything finite."""
        R, t = self.row.shape[1], self.place.shape[1]
        if self.source is not None:
            q = take_tokens(q, self.source.expand(q.shape[0], -1))
        elif R * t != q.shape[2]:
            q = F.pad(q, (0, 0, 0, R * t - q.shape[2]))
        return q.unflatten(2, (R, t)).transpose(1, 2)

    def in_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values `[B, H, Tk, D]` by rank, whole blocks of them: anything finite at ranks without a token."""
        T = x.shape[2]
        length = -(-T // self.block_size) * self.block_size
        if self.aligned:
            return x if length == T else F.pad(x, (0, 0, 0, length - T))
        place = self.start[:, None] + torch.arange(length, device=x.device)
        return take_tokens(x, place.clamp(0, T - 1).expand(x.shape[0], -1))

    def untile(self, out: torch.Tensor, q_len: int) -> torch.Tensor:
        """The inverse of `tiles`."""
        out = out.transpose(1, 2).flatten(2, 3)
        return out[:, :, :q_len] if self.back is None else take_tokens(out, self.back.expand(out.shape[0], -1))


def block_grid(call: CompactedCall, block_size: int, *, aligned: bool) -> BlockGrid:
    """The grid of blocks of `block_size` ranks.

    Args:
        call: the compacted call.
        block_size: b, in tokens.
        aligned: whether the call has neither padding nor earlier keys; its blocks are then slices.
    """
    q_len, k_len, device = call.q.shape[2], call.k.shape[2], call.q.device
    start, count = -call.rank[:, 0], call.rank[:, -1] + 1
    rank = call.rank[:, k_len - q_len :]
    if q_len == 1:  # decoding: one query is a tile, not a block of which one row counts
        rank = rank.clamp(min=0)
        return BlockGrid(block_size, rank // block_size, rank % block_size, start, count, None, None, aligned)
    # Queries after earlier keys may begin in the middle of a block.
    num_tiles = blocks_of(q_len, block_size) if q_len == k_len else (q_len + block_size - 2) // block_size + 1
    first = rank[:, :1].clamp(min=0) // block_size
    row = first + torch.arange(num_tiles, device=device)
    place = torch.arange(block_size, device=device)[None]
    if aligned:
        return BlockGrid(block_size, row, place, start, count, None, None, aligned)
    shift = first * block_size - rank[:, :1]  # from a place in the tiles to a query
    source = (torch.arange(num_tiles * block_size, device=device) + shift).clamp(0, q_len - 1)
    back = (torch.arange(q_len, device=device) - shift).clamp(min=0)
    return BlockGrid(block_size, row, place, start, count, source, back)
