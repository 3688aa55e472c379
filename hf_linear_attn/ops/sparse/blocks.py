"""Attention over listed blocks of keys, a few tiles of queries at a time, with a backward pass of its own.

Autograd through one gather per segment makes gradients as long as the whole sequence for each of them: quadratic time.
Here all segments add into the same gradients, and only the inputs, the output and the log-sum-exp are kept: the keys
are gathered again. Blocks are copied whole, into memory that all segments share and that stays in cache. Not
differentiable twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_linear_attn.ops.base.flash_cpu import UNSEEN, attend_backward, attend_with_sums

__all__ = ["Piece", "attend_segments"]

# Keys of a sequence whose gradients are in hand at once, where queries see all of them.
_KEYS_AT_ONCE = 2048


@dataclass(frozen=True)
class Piece:
    """Some tiles of queries and what they see.

    Attributes:
        tiles: r of the R tiles, begin .. end.
        columns: long `[B or 1, H or 1, r, L]`, the blocks of keys of each tile; None for all keys and no columns, with
            the queries of all these tiles as one.
        seen: bool, which keys are seen: `[B or 1, r, t or 1, G + L * b]`, without columns `[B or 1, H or 1, 1, T]` or
            None for all of them. Every query sees a key.
        shift: added to the logits, numbers `[H, 1, G + L * b]`, or None.
    """

    tiles: slice
    columns: torch.Tensor | None
    seen: torch.Tensor | None
    shift: torch.Tensor | None = None

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Of `[B, R, H, t, ...]` these tiles: `[B * r, H, t, ...]`, or as one `[B, H, r * t, ...]`."""
        x = x[:, self.tiles]
        return x.transpose(1, 2).flatten(2, 3) if self.columns is None else x.flatten(0, 1)

    def place(self, x: torch.Tensor, rows: torch.Tensor) -> None:
        """The inverse of `rows`: write them to their tiles of x `[B, R, H, t, ...]`."""
        x = x[:, self.tiles]
        if self.columns is None:
            x.copy_(rows.unflatten(2, (x.shape[1], -1)).transpose(1, 2))
        else:
            x.copy_(rows.unflatten(0, x.shape[:2]))

    def bias(self, q: torch.Tensor) -> torch.Tensor | None:
        """What is added to the logits: `[B * r or B or 1, H or 1, t or 1, keys]`, or None for nothing."""
        if self.seen is None:
            return None
        zero = torch.zeros((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        seen = self.seen
        if self.columns is not None:
            seen = seen.expand(q.shape[0], -1, -1, -1).flatten(0, 1)[:, None]
        return torch.where(seen, zero if self.shift is None else self.shift.to(zero.dtype), zero + UNSEEN)


def attend_segments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extra: tuple[torch.Tensor, torch.Tensor] | None,
    pieces: Callable[[], Iterable[Piece]],
    scaling: float,
    block: int,
) -> torch.Tensor:
    """Softmax attention of tiles of queries, each over G columns for all and blocks of its own.

    Args:
        q: `[B, R, H, t, D]`, on a CPU.
        k, v: `[B, H, T, D]`, whole blocks.
        extra: the columns' keys and values `[B, H, G, D]`, or None for G = 0.
        pieces: makes the pieces, once for each pass; together they hold all R tiles.
        scaling: factor of the logits.
        block: b, in tokens.

    Returns:
        q's shape.
    """
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in (q, k, v, *(extra or ()))])
    more = (None, None) if extra is None else (extra[0].to(dtype), extra[1].to(dtype))
    with torch.autocast(q.device.type, enabled=False):
        given = (*(x.to(dtype) for x in (q, k, v)), *more)
        out: torch.Tensor = _Segments.apply(*given, pieces, scaling, block)  # type: ignore[no-untyped-call]
    return out


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        more_k: torch.Tensor | None,
        more_v: torch.Tensor | None,
        pieces: Callable[[], Iterable[Piece]],
        scaling: float,
        block: int,
    ) -> torch.Tensor:
        B, R, H, t, D = q.shape
        out = q.new_empty(B, R, t, H, D).transpose(2, 3)
        lse = q.new_empty(B, R, H, t, dtype=torch.promote_types(q.dtype, torch.float32))
        keys, values = _Blocks(k, more_k, block), _Blocks(v, more_v, block)
        for piece in pieces():
            index = keys.rows(piece.columns)
            given = piece.rows(q), keys.take(index), values.take(index), piece.bias(q)
            for total, x in zip((out, lse), attend_with_sums(*given, scaling), strict=True):
                piece.place(total, x)
        ctx.save_for_backward(q, k, v, more_k, more_v, out, lse)
        ctx.settings = pieces, scaling, block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, more_k, more_v, out, lse = ctx.saved_tensors
        pieces, scaling, block = ctx.settings
        B, R, H, t, D = q.shape
        d_q = q.new_empty(B, R, t, H, D).transpose(2, 3)
        keys, values = _Blocks(k, more_k, block), _Blocks(v, more_v, block)
        d_keys, d_values = _Gradients(keys), _Gradients(values)
        for piece in pieces():
            index, bias = keys.rows(piece.columns), piece.bias(q)
            d_out, rows, outputs, sums = (piece.rows(x) for x in (grad, q, out, lse))
            of_keys, of_values = keys.take(index), values.take(index)
            total = None
            for part in _parts(of_keys.shape[2], index is None):
                seen = None if bias is None else bias[..., part]
                given = d_out, rows, of_keys[:, :, part], of_values[:, :, part], outputs, sums, seen
                new = attend_backward(*given, scaling)
                total = new[0].to(lse.dtype) if total is None else total + new[0]
                d_keys.add(index, new[1], part)
                d_values.add(index, new[2], part)
            piece.place(d_q, total)
        return (d_q, d_keys.whole(), d_values.whole(), d_keys.columns(), d_values.columns(), None, None, None)


def _parts(keys: int, is_whole: bool) -> list[slice]:
    """Keys to make gradients of at once: all that were gathered, or some of the sequence."""
    step = _KEYS_AT_ONCE if is_whole else keys
    return [slice(begin, begin + step) for begin in range(0, keys, step)]


class _Blocks:
    """Keys or values `[B, H, T, D]` as a matrix that has a row for each block of each head, and G columns for all."""

    def __init__(self, x: torch.Tensor, more: torch.Tensor | None, block: int) -> None:
        self.x, self.more, self.block = x.contiguous(), more, block
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
        G = 0 if self.more is None else self.more.shape[2]
        shape = B, r, H, G + L * self.block, D
        if self.memory is None or self.memory.shape != shape:
            self.memory = self.x.new_empty(shape)
            if self.more is not None:
                self.memory[:, :, :, :G] = self.more[:, None]
        if self.more is None:
            torch.index_select(self.matrix, 0, rows.flatten(), out=self.memory.view(-1, self.matrix.shape[1]))
        else:
            self.memory[:, :, :, G:] = self.matrix.index_select(0, rows.flatten()).view(B, r, H, -1, D)
        return self.memory.flatten(0, 1)


class _Gradients:
    """Gradients of what a `_Blocks` holds, added up in fp32 at least."""

    def __init__(self, blocks: _Blocks) -> None:
        self.dtype, more = blocks.x.dtype, blocks.more
        exact = torch.promote_types(self.dtype, torch.float32)
        self.x = torch.zeros_like(blocks.x, dtype=exact)
        self.matrix = self.x.view_as(blocks.matrix)
        self.more = None if more is None else torch.zeros_like(more, dtype=exact)

    def add(self, rows: torch.Tensor | None, x: torch.Tensor, part: slice) -> None:
        """The inverse of `take`: x `[B * r, H, G + L * b, D]`, or `[B, H, keys, D]` of the keys `part`."""
        if rows is None:
            self.x[:, :, part] += x
            return
        G = 0 if self.more is None else self.more.shape[2]
        if self.more is not None:
            self.more += x[:, :, :G].unflatten(0, rows.shape[:2]).sum(1)
        width = self.matrix.shape[1]
        x = x[:, :, G:].to(self.matrix.dtype).reshape(-1, width)
        self.matrix.scatter_add_(0, rows.reshape(-1, 1).expand(-1, width), x)

    def whole(self) -> torch.Tensor:
        """Of the keys, `[B, H, T, D]`."""
        return self.x.to(self.dtype)

    def columns(self) -> torch.Tensor | None:
        """Of the columns, `[B, H, G, D]`."""
        return None if self.more is None else self.more.to(self.dtype)
