"""The sliding window on a CPU: blocks of queries over windows of keys that stay views.

The gradients of all windows are added in as many passes as a window has blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype
from hf_linear_attn.ops.base.pieces import Piece, attend_pieces
from hf_linear_attn.ops.window.layout import Extra

__all__ = ["attend_band"]

# Upper bound on the elements of the gradients of keys that are in hand at once (4 MiB in fp32).
SEGMENT_ELEMENTS = 1 << 20


def attend_band(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    left: int,
    right: int,
    scaling: float,
    key_allowed: torch.Tensor | None,
    extra: Extra | None,
    block: int,
) -> torch.Tensor:
    """`sliding_window_attention` with dilation 1, of checked arguments; `block` queries share a window."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    make, may_be_blind = partial(_Windows, left, right, block), key_allowed is not None
    out = attend_pieces(make, q, k, v, key_allowed, *(extra or ()), scaling=scaling, may_be_blind=may_be_blind)
    return out.transpose(1, 2)


class _Windows:
    """Rows of the batch cut into blocks of queries and their windows of keys, in segments of a few blocks.

    The windows are `width` long, a multiple of the block; the first starts at place `first`, which may be negative.
    Queries, keys and values are `[B, T, H, D]`, the keys that windows may contain bool `[B or 1, Tk]` or None for all.
    Columns for all are an `Extra`, of no tensors if there are none.
    """

    def __init__(
        self,
        left: int,
        right: int,
        block: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_allowed: torch.Tensor | None,
        *extra: torch.Tensor,
    ) -> None:
        self.left, self.right, self.block = left, right, block
        self.q, self.k, self.v, self.key_allowed, self.extra = q, k, v, key_allowed, extra
        (_, self.q_len, num_heads, head_dim), self.k_len = q.shape, k.shape[1]
        self.count = -(-self.q_len // block)
        self.per_window = -(-(block + left + right) // block)
        self.width = self.per_window * block
        self.first = self.k_len - self.q_len - left
        self.step = max(1, SEGMENT_ELEMENTS // (num_heads * self.width * head_dim))

    def __iter__(self) -> Iterator[Piece]:
        for b in range(self.q.shape[0]):
            for begin in range(0, self.count, self.step):
                window = _Window(self, b, begin, min(begin + self.step, self.count))
                yield window
                if self.extra:
                    yield _Columns(self, b, window.tokens)

    def zero_gradients(self) -> None:
        """Key 0 is at place `max(-first, 0)`."""
        places = max(self.first, 0) + (self.count - 1 + self.per_window) * self.block
        shape, dtype = (len(self.k), places, *self.k.shape[2:]), accumulation_dtype(self.k.dtype)
        self.d_k, self.d_v = (self.k.new_zeros(shape, dtype=dtype) for _ in "kv")
        self.d_extra = [torch.zeros_like(x, dtype=dtype) for x in self.extra[:2]]

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        front = max(-self.first, 0)
        of_keys = (x[:, front : front + self.k_len].to(self.k.dtype) for x in (self.d_k, self.d_v))
        return (*of_keys, None, *(x.to(self.k.dtype) for x in self.d_extra))

    def unfold(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """`[Tk, ...]` as windows of blocks `begin` .. `end`: `[blocks, ..., width]`, 0 beyond the ends."""
        low = self.first + begin * self.block
        high = low + (end - begin - 1) * self.block + self.width
        front, back = max(-low, 0), max(high - self.k_len, 0)
        x = x[max(low, 0) : min(high, self.k_len)]
        if front or back:  # only the outermost segments are copied
            x = F.pad(x, (0, 0) * (x.ndim - 1) + (front, back))
        return x.unfold(0, self.width, self.block)


class _Window(Piece):
    """Blocks `begin` .. `end` of row b of the batch."""

    def __init__(self, of: _Windows, b: int, begin: int, end: int) -> None:
        self.of, self.b, self.begin, self.end = of, b, begin, end
        self.tokens = slice(begin * of.block, min(end * of.block, of.q_len))

    def rows(self, x: torch.Tensor, fill: float | None = None) -> torch.Tensor:
        """`[B, Tq, H, ...]` as `[blocks, H, block, ...]`."""
        x = x[self.b, self.tokens]
        if missing := -len(x) % self.of.block:
            x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing), value=fill)
        return x.unflatten(0, (-1, self.of.block)).transpose(1, 2)

    def place(self, total: torch.Tensor, x: torch.Tensor) -> None:
        tokens = self.tokens
        total[self.b, tokens] = x.transpose(1, 2).flatten(0, 1)[: tokens.stop - tokens.start]

    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (self.of.unfold(x[self.b], self.begin, self.end).mT for x in (self.of.k, self.of.v))
        return k, v

    def add(self, part: slice, d_keys: torch.Tensor, d_values: torch.Tensor) -> None:
        of, block = self.of, self.of.block
        for total, x in (of.d_k, d_keys), (of.d_v, d_values):
            blocks = total[self.b, max(of.first, 0) :].unflatten(0, (-1, block))
            x = x.transpose(1, 2)
            for number in range(of.per_window):
                where = slice(self.begin + number, self.end + number)
                blocks[where].add_(x[:, number * block : (number + 1) * block])

    def bias(self) -> torch.Tensor:
        """`[blocks, 1, block, width]`: `LOG_ZERO` for keys out of reach."""
        of, device = self.of, self.of.q.device
        allowed = of.key_allowed
        if allowed is None:
            allowed = torch.ones((), dtype=torch.bool, device=device).expand(1, of.k_len)
        allowed = of.unfold(allowed[self.b if len(allowed) > 1 else 0], self.begin, self.end)
        row, column = (torch.arange(x, device=device) for x in (of.block, of.width))
        ahead = column - row[:, None]
        seen = ((ahead >= 0) & (ahead <= of.left + of.right)) & allowed[:, None]
        return _as_bias(seen[:, None], of.q)


class _Columns(Piece):
    """The columns that queries of row b of the batch see besides their windows."""

    again = True

    def __init__(self, of: _Windows, b: int, tokens: slice) -> None:
        self.of, self.b, self.tokens = of, b, tokens
        self.k, self.v, self.seen = (x[b : b + 1] if len(x) > 1 else x for x in of.extra)

    def rows(self, x: torch.Tensor, fill: float | None = None) -> torch.Tensor:
        """`[B, Tq, H, ...]` as `[1, H, T, ...]`, with one more channel where the columns have one."""
        return self._widen(x[self.b : self.b + 1, self.tokens].transpose(1, 2), 0.0)

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        return self._widen(q[self.b : self.b + 1, self.tokens].transpose(1, 2), 1.0)

    def earlier(self, out: torch.Tensor) -> torch.Tensor:
        return out[self.b : self.b + 1, self.tokens].transpose(1, 2)

    def _widen(self, x: torch.Tensor, value: float) -> torch.Tensor:
        missing = self.k.shape[-1] - self.of.q.shape[-1]
        return F.pad(x, (0, missing), value=value) if missing and x.ndim == 4 else x

    def place(self, total: torch.Tensor, x: torch.Tensor) -> None:
        total[self.b, self.tokens] = self._narrow(x)

    def place_more(self, total: torch.Tensor, x: torch.Tensor) -> None:
        total[self.b, self.tokens].add_(self._narrow(x))

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        x = x[0].transpose(0, 1)
        return x[..., : self.of.q.shape[-1]] if x.ndim == 3 else x

    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k, self.v

    def add(self, part: slice, d_keys: torch.Tensor, d_values: torch.Tensor) -> None:
        for total, x in zip(self.of.d_extra, (d_keys, d_values), strict=True):
            total[self.b] += x[0]

    def bias(self) -> torch.Tensor:
        """`[1, 1, T, G]`."""
        seen = self.seen[:, self.tokens] if self.seen.shape[1] > 1 else self.seen
        return _as_bias(seen[:, None], self.of.q).expand(-1, -1, self.tokens.stop - self.tokens.start, -1)


def _as_bias(seen: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros((), dtype=accumulation_dtype(like.dtype), device=like.device)
    return torch.where(seen, zero, zero + LOG_ZERO)
