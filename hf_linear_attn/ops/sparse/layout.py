"""What the forms of block-sparse attention share: the grid of blocks of a call, and columns seen besides the lists."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.compaction import CompactedCall, take_tokens
from hf_linear_attn.ops.base.memo import lazy
from hf_linear_attn.ops.base.tracing import blocks_of

__all__ = ["ANYONE", "NOBODY", "BlockGrid", "Extra"]

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


@dataclass(eq=False)
class BlockGrid:
    """Where the queries and keys of a compacted call stand in a grid of blocks, by their ranks.

    Tensors are made when they are first read: a decode step whose lists are kept reads none.

    Attributes:
        call: the call.
        block_size: b, tokens per block.
        aligned: whether there is neither padding nor an earlier key: its blocks are slices.
    """

    call: CompactedCall
    block_size: int
    aligned: bool = False

    @property
    def q_len(self) -> int:
        return self.call.q.shape[2]

    @lazy
    def start(self) -> torch.Tensor:
        """Place of the token of rank 0 among the keys: long `[B or 1]`."""
        return -self.call.rank[:, 0]

    @lazy
    def count(self) -> torch.Tensor:
        """Real tokens among the keys: long `[B or 1]`."""
        return self.call.rank[:, -1] + 1

    @lazy
    def _rank(self) -> torch.Tensor:
        """Of the queries, `[B or 1, Tq]`."""
        return self.call.rank[:, self.call.k.shape[2] - self.q_len :]

    @lazy
    def _first(self) -> torch.Tensor:
        """The block of the first query, `[B or 1, 1]`."""
        return self._rank[:, :1].clamp(min=0) // self.block_size

    @lazy
    def row(self) -> torch.Tensor:
        """The block of each tile of queries: long `[B or 1, R]`."""
        q_len, b = self.q_len, self.block_size
        if q_len == 1:
            return self._first
        # Queries after earlier keys may begin in the middle of a block.
        tiles = blocks_of(q_len, b) if q_len == self.call.k.shape[2] else (q_len + b - 2) // b + 1
        return self._first + torch.arange(tiles, device=self.call.q.device)

    @lazy
    def place(self) -> torch.Tensor:
        """Where the t queries of a tile stand in their block: long `[B or 1, t]`."""
        if self.q_len == 1:  # decoding: one query is a tile, not a block of which one row counts
            return self._rank.clamp(min=0) % self.block_size
        return torch.arange(self.block_size, device=self.call.q.device)[None]

    @lazy
    def _shift(self) -> torch.Tensor:
        """From a place in the tiles to a query, `[B or 1, 1]`."""
        return self._first * self.block_size - self._rank[:, :1]

    @lazy
    def source(self) -> torch.Tensor | None:
        """The query at each place of the tiles, long `[B or 1, R * t]`; None when it is that place."""
        if self.q_len == 1 or self.aligned:
            return None
        places = torch.arange(self.row.shape[1] * self.block_size, device=self.call.q.device)
        return (places + self._shift).clamp(0, self.q_len - 1)

    @lazy
    def back(self) -> torch.Tensor | None:
        """The place of each query, long `[B or 1, Tq]`; None when it is that place."""
        if self.q_len == 1 or self.aligned:
            return None
        return (torch.arange(self.q_len, device=self.call.q.device) - self._shift).clamp(min=0)

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
