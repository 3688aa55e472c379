"""Attention over gathered keys, segment by segment, with a backward pass of its own.

Autograd through one gather per segment makes gradients as long as the whole sequence for each of them: quadratic time.
Here all segments add into the same gradients, and only the inputs, the output and the log-sum-exp are kept: the keys
are gathered again. Not differentiable twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_linear_attn.ops.band_attention import UNSEEN, attend_backward, attend_with_sums

__all__ = ["Piece", "attend_segments"]

# Tiles begin .. end, the keys of each as long `[B or 1, H or 1, R, K]`, and what is added to the logits: numbers
# `[H, 1, G + K]` or None, where a bool `[B or 1, R, t or 1, G + K]` says that a key is seen.
Piece = tuple[slice, torch.Tensor, torch.Tensor | None, torch.Tensor]


def attend_segments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extra: tuple[torch.Tensor, torch.Tensor] | None,
    pieces: Callable[[], Iterable[Piece]],
    scaling: float,
) -> torch.Tensor:
    """Softmax attention of tiles of queries, each over G columns for all and K keys of its own.

    Args:
        q: `[B, R, H, t, D]`, on a CPU.
        k, v: `[B, H, T, D]`.
        extra: the columns' keys and values `[B, H, G, D]`, or None for G = 0.
        pieces: makes the segments, once for each pass; together they hold all R tiles in order. Every query sees a key.
        scaling: factor of the logits.

    Returns:
        q's shape.
    """
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in (q, k, v, *(extra or ()))])
    more = (None, None) if extra is None else (extra[0].to(dtype), extra[1].to(dtype))
    with torch.autocast(q.device.type, enabled=False):
        given = (*(x.to(dtype) for x in (q, k, v)), *more)
        out: torch.Tensor = _Segments.apply(*given, pieces, scaling)  # type: ignore[no-untyped-call]
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
    ) -> torch.Tensor:
        outputs, sums = [], []
        for part, places, shift, seen in pieces():
            tokens = _Tokens(places, q.shape[0])
            keys, values = tokens.gather(k, more_k), tokens.gather(v, more_v)
            out, lse = attend_with_sums(q[:, part].flatten(0, 1), keys, values, _bias(q, shift, seen), scaling)
            outputs.append(out.transpose(1, 2).unflatten(0, (q.shape[0], -1)))  # [B, R, t, H, D], as it lies
            sums.append(lse.unflatten(0, (q.shape[0], -1)))
        out, lse = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in (outputs, sums))
        out = out.transpose(2, 3)
        ctx.save_for_backward(q, k, v, more_k, more_v, out, lse)
        ctx.settings = pieces, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, more_k, more_v, out, lse = ctx.saved_tensors
        pieces, scaling = ctx.settings
        (B, R, H, t, D), T, columns = q.shape, k.shape[2], 0 if more_k is None else more_k.shape[2]
        exact = torch.promote_types(q.dtype, torch.float32)
        d_q = q.new_empty(B, R, t, H, D).transpose(2, 3)
        d_k, d_v = (q.new_zeros(B, T, H, D, dtype=exact) for _ in range(2))
        d_more = [q.new_zeros(B, columns, H, D, dtype=exact) for _ in range(2)]
        for part, places, shift, seen in pieces():
            tokens = _Tokens(places, q.shape[0])
            keys, values = tokens.gather(k, more_k), tokens.gather(v, more_v)
            d_out, rows, outputs, sums = (x[:, part].flatten(0, 1) for x in (grad, q, out, lse))
            new = attend_backward(d_out, rows, keys, values, outputs, sums, _bias(q, shift, seen), scaling)
            d_q[:, part] = new[0].unflatten(0, (B, -1))
            for total, of_more, x in zip((d_k, d_v), d_more, new[1:], strict=True):
                x = x.transpose(1, 2).unflatten(0, (B, -1)).to(exact)  # [B, R, G + K, H, D]
                if columns:
                    of_more += x[:, :, :columns].sum(1)
                tokens.add(total, x[:, :, columns:])
        grads = (x.to(q.dtype).transpose(1, 2) for x in (d_k, d_v))
        more = (None, None) if more_k is None else (x.to(q.dtype).transpose(1, 2) for x in d_more)
        return (d_q, *grads, *more, None, None)


class _Tokens:
    """Places `[B or 1, H or 1, R, K]` in sequences, and the rows of a matrix that hold them."""

    def __init__(self, places: torch.Tensor, batch: int) -> None:
        self.places, self.batch = places, batch
        self.known: dict[tuple[int, int, int], torch.Tensor] = {}

    def rows(self, strides: tuple[int, int, int], heads: int) -> torch.Tensor:
        """Flat, in the order `[B, R, K, heads]`, for strides of batch, head and token."""
        if strides not in self.known:
            row, head = (torch.arange(x, device=self.places.device) for x in (self.batch, heads))
            start = row[:, None] * strides[0] + head * strides[1]
            numbers = self.places.expand(-1, heads, -1, -1) * strides[2] + start[:, :, None, None]
            self.known[strides] = numbers.permute(0, 2, 3, 1).flatten()
        return self.known[strides]

    def together(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x `[B, T, H, D]` as a matrix, and the rows of it: whole tokens, if the places are those of all heads."""
        B, T, H, D = x.shape
        if self.places.shape[1] == 1:
            return x.reshape(B * T, H * D), self.rows((T, 0, 1), 1)
        return x.reshape(B * T * H, D), self.rows((T * H, 1, H), H)

    def gather(self, x: torch.Tensor, more: torch.Tensor | None) -> torch.Tensor:
        """Tokens of x `[B, H, T, D]` after the columns `more`: `[B * R, H, G + K, D]`, the heads of each together."""
        B, H, T, D = x.shape
        R, K = self.places.shape[2:]
        if x.is_contiguous():  # as keys of a decode state are
            matrix, rows = x.view(B * H * T, D), self.rows((H * T, T, 1), H)
        else:
            matrix, rows = self.together(x.transpose(1, 2))
        taken = matrix.index_select(0, rows).view(B, R, K, H, D)
        if more is not None:
            taken = torch.cat([more.transpose(1, 2)[:, None].expand(-1, R, -1, -1, -1), taken], dim=2)
        return taken.flatten(0, 1).transpose(1, 2)

    def add(self, total: torch.Tensor, x: torch.Tensor) -> None:
        """The inverse of `gather`: adds x `[B, R, K, H, D]` to `total` `[B, T, H, D]`, which is contiguous."""
        matrix, rows = self.together(total)
        width = matrix.shape[1]
        matrix.scatter_add_(0, rows[:, None].expand(-1, width), x.reshape(-1, width))


def _bias(q: torch.Tensor, shift: torch.Tensor | None, seen: torch.Tensor) -> torch.Tensor:
    """What is added to the logits: `[B * R, H or 1, t or 1, G + K]`."""
    zero = torch.zeros((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    seen = seen.expand(q.shape[0], -1, -1, -1).flatten(0, 1)[:, None]
    return torch.where(seen, zero if shift is None else shift.to(zero.dtype), zero + UNSEEN)
