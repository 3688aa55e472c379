"""Attention over listed blocks of keys, a few tiles of queries at a time, on a CPU.

Blocks are copied whole, into memory that all pieces share and that stays in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype
from hf_linear_attn.ops.base.pieces import Piece, attend_pieces

__all__ = ["Tiled", "Tiles", "attend_tiles"]

# Keys of a sequence whose gradients are in hand at once, where queries see all of them.
_KEYS_AT_ONCE = 2048


def attend_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extra: tuple[torch.Tensor, torch.Tensor] | None,
    tiles: Callable[[Tiled], Iterator[Tiles]],
    scaling: float,
    block: int,
) -> torch.Tensor:
    """Softmax attention of tiles of queries, each over G columns for all and blocks of its own.

    Args:
        q: `[B, R, H, t, D]`, on a CPU.
        k, v: `[B, H, T, D]`, whole blocks.
        extra: the columns' keys and values `[B, H, G, D]`, or None for G = 0.
        tiles: makes the pieces of a pass; together they hold all R tiles.
        scaling: factor of the logits.
        block: b, in tokens.

    Returns:
        q's shape.
    """
    given = q.transpose(2, 3), k, v, *(extra or ())
    return attend_pieces(partial(Tiled, tiles, block), *given, scaling=scaling, may_be_blind=False).transpose(2, 3)


class Tiled:
    """All tiles of queries `[B, R, t, H, D]`, and the keys and values that they take their blocks from."""

    def __init__(
        self,
        tiles: Callable[[Tiled], Iterator[Tiles]],
        block: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        more_k: torch.Tensor | None = None,
        more_v: torch.Tensor | None = None,
    ) -> None:
        self.tiles, self.batch, self.dtype = tiles, q.shape[0], accumulation_dtype(q.dtype)
        self.of_keys, self.of_values = _Blocks(k, more_k, block), _Blocks(v, more_v, block)

    def __iter__(self) -> Iterator[Tiles]:
        return self.tiles(self)

    def zero_gradients(self) -> None:
        self.of_keys.zero_gradients()
        self.of_values.zero_gradients()

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        (of_keys, of_more_keys), (of_values, of_more_values) = self.of_keys.gradients(), self.of_values.gradients()
        return of_keys, of_values, of_more_keys, of_more_values


@dataclass
class Tiles(Piece):
    """Some tiles of queries and what they see.

    Attributes:
        of: what they are tiles of.
        tiles: r of the R tiles, begin .. end.
        columns: long `[B or 1, H or 1, r, L]`, the blocks of keys of each tile; None for all keys and no columns, with
            the queries of all these tiles as one.
        seen: bool, which keys are seen: `[B or 1, r, t or 1, G + L * b]`, without columns `[B or 1, H or 1, 1, T]` or
            None for all of them. Every query sees a key.
        shift: added to the logits, numbers `[H, 1, G + L * b]`, or None.
    """

    of: Tiled
    tiles: slice
    columns: torch.Tensor | None
    seen: torch.Tensor | None
    shift: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.whole, self.index = self.columns is None, self.of.of_keys.rows(self.columns)
        if self.whole:
            length = self.of.of_keys.x.shape[2]
            self.parts = tuple(slice(begin, begin + _KEYS_AT_ONCE) for begin in range(0, length, _KEYS_AT_ONCE))

    def rows(self, x: torch.Tensor, fill: float | None = None) -> torch.Tensor:
        """Of `[B, R, t, H, ...]` these tiles: `[B * r, H, t, ...]`, or as one `[B, H, r * t, ...]`."""
        x = x[:, self.tiles]
        return (x.flatten(1, 2) if self.whole else x.flatten(0, 1)).transpose(1, 2)

    def place(self, total: torch.Tensor, x: torch.Tensor) -> None:
        total = total[:, self.tiles]
        x = x.transpose(1, 2)
        total.copy_(x.unflatten(1, (total.shape[1], -1)) if self.whole else x.unflatten(0, total.shape[:2]))

    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.of.of_keys.take(self.index), self.of.of_values.take(self.index)

    def add(self, part: slice, d_keys: torch.Tensor, d_values: torch.Tensor) -> None:
        self.of.of_keys.add(self.index, d_keys, part)
        self.of.of_values.add(self.index, d_values, part)

    def bias(self) -> torch.Tensor | None:
        """`[B * r or B or 1, H or 1, t or 1, keys]`."""
        seen, shift = self.seen, self.shift
        if seen is None:
            return None
        if not self.whole:
            seen = seen.expand(self.of.batch, -1, -1, -1).flatten(0, 1)[:, None]
        zero = torch.zeros((), dtype=self.of.dtype, device=seen.device)
        return torch.where(seen, zero if shift is None else shift.to(zero.dtype), zero + LOG_ZERO)


class _Blocks:
    """Keys or values `[B, H, T, D]` as a matrix that has a row for each block of each head, and G columns for all."""

    def __init__(self, x: torch.Tensor, more: torch.Tensor | None, block: int) -> None:
        self.x, self.more, self.block = x.contiguous(), more, block
        self.columns = 0 if more is None else more.shape[2]
        self.matrix = self.x.view(-1, block * x.shape[-1])
        self.memory: torch.Tensor | None = None

    def rows(self, columns: torch.Tensor | None) -> torch.Tensor | None:
        """Rows of the matrix for blocks `[B or 1, H or 1, r, L]`: `[B, r, H, L]`."""
        if columns is None:
            return None
        B, H, T, _ = self.x.shape
        sequence = torch.arange(B * H, device=columns.device).view(B, H, 1, 1)
        return (columns + sequence * (T // self.block)).transpose(1, 2)

    def take(self, rows: torch.Tensor | None) -> torch.Tensor:
        """The columns and the blocks in those rows, `[B * r, H, G + L * b, D]`, or all keys; good until the next."""
        if rows is None:
            return self.x
        (B, r, H, L), D = rows.shape, self.x.shape[-1]
        shape = B, r, H, self.columns + L * self.block, D
        if self.memory is None or self.memory.shape != shape:
            self.memory = self.x.new_empty(shape)
            if self.more is not None:
                self.memory[:, :, :, : self.columns] = self.more[:, None]
        if self.more is None:
            torch.index_select(self.matrix, 0, rows.flatten(), out=self.memory.view(-1, self.matrix.shape[1]))
        else:
            taken = self.matrix.index_select(0, rows.flatten())
            self.memory[:, :, :, self.columns :] = taken.view(B, r, H, -1, D)
        return self.memory.flatten(0, 1)

    def zero_gradients(self) -> None:
        dtype = accumulation_dtype(self.x.dtype)
        self.d_x = torch.zeros_like(self.x, dtype=dtype)
        self.d_more = None if self.more is None else torch.zeros_like(self.more, dtype=dtype)

    def add(self, rows: torch.Tensor | None, x: torch.Tensor, part: slice) -> None:
        """The inverse of `take`: x `[B * r, H, G + L * b, D]`, or `[B, H, keys, D]` of the keys `part`."""
        if rows is None:
            self.d_x[:, :, part] += x
            return
        if self.d_more is not None:
            self.d_more += x[:, :, : self.columns].unflatten(0, rows.shape[:2]).sum(1)
        matrix = self.d_x.view_as(self.matrix)
        x = x[:, :, self.columns :].to(matrix.dtype).reshape(-1, matrix.shape[1])
        matrix.scatter_add_(0, rows.reshape(-1, 1).expand_as(x), x)

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the keys `[B, H, T, D]` and the columns `[B, H, G, D]`."""
        return self.d_x.to(self.x.dtype), None if self.d_more is None else self.d_more.to(self.x.dtype)
