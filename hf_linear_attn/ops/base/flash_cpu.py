"""The sliding window on a CPU: the attention kernels of torch on overlapping views, forward and backward.

Autograd through overlapping slices copies every key as often as windows hold it, and adds the gradients up one by one.
Here windows stay views, and the gradients of all blocks are added in as many passes as a window has blocks. What is
in hand at once is a few blocks: from 32 MiB on, memory is mapped anew, page by page, each time it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

__all__ = ["UNSEEN", "attend_backward", "attend_band", "attend_with_sums", "serves"]

# Upper bound on the elements of the gradients of keys that are in hand at once (4 MiB in fp32).
SEGMENT_ELEMENTS = 1 << 20
# Added to the logit of a key that a query does not see: finite, so that a row without keys stays finite too.
UNSEEN = -1e30
_NOTHING = UNSEEN / 2  # a log-sum-exp below this is that of a row without keys


def serves(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `attend_band` can run: on a CPU, with values as wide as keys."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def attend_band(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    left: int,
    right: int,
    scaling: float,
    key_allowed: torch.Tensor | None,
    extra: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    block: int,
) -> torch.Tensor:
    """`sliding_window_attention` with dilation 1.

    Args:
        q: `[B, H, Tq, D]`, row r at position Tk - Tq + r.
        k, v: `[B, H, Tk, D]`.
        left, right: keys that a query sees before and after itself.
        scaling: factor of the logits.
        key_allowed: bool `[B or 1, Tk]` or None.
        extra: keys and values `[B, H, G, D]` seen besides, and bool `[B or 1, Tq or 1, G]`, which row sees which;
            or `[B, H, G, D + 1]`, with what `scaling` times the last channel of the keys adds to all of their logits,
            and 0 in that of the values.
        block: queries per block.

    Returns:
        `[B, H, Tq, D]`; rows that see no key are 0.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    more: list[torch.Tensor | None] = [None, None, None]
    if extra is not None:
        more = [extra[0].to(dtype), extra[1].to(dtype), extra[2]]
    with torch.autocast(q.device.type, enabled=False):
        given = (*(x.to(dtype) for x in (q, k, v)), *more, key_allowed)
        out: torch.Tensor = _AttendBand.apply(*given, left, right, scaling, block)  # type: ignore[no-untyped-call]
    return out


class _Windows:
    """One batch row cut into blocks of queries and their windows of keys, in segments of a few blocks.

    The windows are `width` long, a multiple of the block; the first starts at place `first`, which may be negative.
    """

    def __init__(
        self, q_len: int, k_len: int, left: int, right: int, block: int, num_heads: int, head_dim: int
    ) -> None:
        self.q_len, self.k_len, self.left, self.right, self.block = q_len, k_len, left, right, block
        self.count = -(-q_len // block)
        self.per_window = -(-(block + left + right) // block)
        self.width = self.per_window * block
        self.first = k_len - q_len - left
        self.front = max(-self.first, 0)
        self.step = max(1, SEGMENT_ELEMENTS // (num_heads * self.width * head_dim))

    def segments(self) -> Iterator[tuple[slice, slice]]:
        """The blocks of each segment, and their queries."""
        for begin in range(0, self.count, self.step):
            end = min(begin + self.step, self.count)
            yield slice(begin, end), slice(begin * self.block, min(end * self.block, self.q_len))

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """A segment's queries `[T, H, ...]` as `[blocks, H, block, ...]`, 0 beyond the end."""
        if missing := -len(x) % self.block:
            x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing))
        return x.unflatten(0, (-1, self.block)).transpose(1, 2)

    def keys(self, x: torch.Tensor, segment: slice) -> torch.Tensor:
        """`[Tk, ...]` as the overlapping windows of a segment, `[blocks, ..., width]`, 0 beyond the ends."""
        low = self.first + segment.start * self.block
        high = low + (segment.stop - segment.start - 1) * self.block + self.width
        front, back = max(-low, 0), max(high - self.k_len, 0)
        x = x[max(low, 0) : min(high, self.k_len)]
        if front or back:  # only the outermost segments are copied
            x = F.pad(x, (0, 0) * (x.ndim - 1) + (front, back))
        return x.unfold(0, self.width, self.block)

    def bias(self, key_allowed: torch.Tensor | None, segment: slice, like: torch.Tensor) -> torch.Tensor:
        """`[blocks, 1, block, width]`: `UNSEEN` for keys out of reach; `key_allowed` bool `[Tk]` or None."""
        if key_allowed is None:
            key_allowed = torch.ones((), dtype=torch.bool, device=like.device).expand(self.k_len)
        held = self.keys(key_allowed, segment)
        row, column = (torch.arange(x, device=like.device) for x in (self.block, self.width))
        ahead = column - row[:, None]
        seen = ((ahead >= 0) & (ahead <= self.left + self.right)) & held[:, None]
        zero = torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        return torch.where(seen, zero, zero + UNSEEN)[:, None]

    def no_gradients(self, like: torch.Tensor) -> torch.Tensor:
        """Zeros `[places, H, D]` for the gradients of keys; key 0 is at place `front`."""
        places = max(self.first, 0) + (self.count - 1 + self.per_window) * self.block
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.zeros(places, like.shape[1], like.shape[3], dtype=dtype, device=like.device)

    def add_up(self, total: torch.Tensor, part: torch.Tensor, segment: slice) -> None:
        """Add the gradients `[blocks, H, width, D]` of a segment's windows to `total`, as of `no_gradients`."""
        part = part.transpose(1, 2)
        blocks = total[max(self.first, 0) :].unflatten(0, (-1, self.block))
        for number in range(self.per_window):
            where = slice(segment.start + number, segment.stop + number)
            blocks[where].add_(part[:, number * self.block : (number + 1) * self.block])


class _AttendBand(torch.autograd.Function):
    """A segment at a time, written where it belongs: whole sequences in between cost more than the attention."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        more_k: torch.Tensor | None,
        more_v: torch.Tensor | None,
        more_seen: torch.Tensor | None,
        key_allowed: torch.Tensor | None,
        left: int,
        right: int,
        scaling: float,
        block: int,
    ) -> torch.Tensor:
        B, H, q_len, D = q.shape
        windows = _Windows(q_len, k.shape[2], left, right, block, H, D)
        out = q.new_empty(B, q_len, H, D)
        total = q.new_empty(B, q_len, H, dtype=torch.promote_types(q.dtype, torch.float32))
        for b in range(B):
            of_q, of_k, of_v = (x[b].transpose(0, 1) for x in (q, k, v))
            allowed = _row(key_allowed, b)
            for s, rows in windows.segments():
                keys, values = (windows.keys(x, s).mT for x in (of_k, of_v))
                bias = windows.bias(allowed, s, q)
                given = attend_with_sums(windows.rows(of_q[rows]), keys, values, bias, scaling)
                part, lse = (x.transpose(1, 2).flatten(0, 1)[: rows.stop - rows.start] for x in given)
                if more_k is not None and more_v is not None:
                    seen = _bias_of_more(_row(more_seen, b), rows, q)
                    held = _widen(q[b : b + 1, :, rows], more_k, 1.0)
                    given = attend_with_sums(held, more_k[b : b + 1], more_v[b : b + 1], seen, scaling)
                    other, other_lse = (x[0].transpose(0, 1) for x in given)
                    both = torch.logaddexp(lse, other_lse)
                    part = part * (lse - both).exp_()[..., None]
                    part, lse = part.addcmul_(other[..., :D], (other_lse - both).exp_()[..., None]), both
                if key_allowed is not None:  # otherwise each row sees itself
                    part = part.masked_fill((lse < _NOTHING)[..., None], 0)
                out[b, rows], total[b, rows] = part, lse
        ctx.save_for_backward(q, k, v, more_k, more_v, more_seen, key_allowed, out, total)
        ctx.settings = (left, right, scaling, block)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, more_k, more_v, more_seen, key_allowed, out, total = ctx.saved_tensors
        left, right, scaling, block = ctx.settings
        (B, H, q_len, D), k_len = q.shape, k.shape[2]
        windows = _Windows(q_len, k_len, left, right, block, H, D)
        dq = torch.empty_like(out)
        dk, dv = (torch.stack([windows.no_gradients(q)] * B) if B > 1 else windows.no_gradients(q)[None] for _ in "kv")
        more = None if more_k is None else [torch.zeros_like(x, dtype=total.dtype) for x in (more_k, more_v)]
        for b in range(B):
            of_q, of_k, of_v, of_grad = (x[b].transpose(0, 1) for x in (q, k, v, grad))
            allowed = _row(key_allowed, b)
            for s, rows in windows.segments():
                part, lse = of_grad[rows], total[b, rows]
                if key_allowed is not None:  # a row without keys has weights of 0, not of 1 / 0
                    dead = lse < _NOTHING
                    part, lse = part.masked_fill(dead[..., None], 0), lse.masked_fill(dead, -UNSEEN)
                keys, values = (windows.keys(x, s).mT for x in (of_k, of_v))
                d_out, queries, of_out, sums = (windows.rows(x) for x in (part, of_q[rows], out[b, rows], lse))
                bias = windows.bias(allowed, s, q)
                new = attend_backward(d_out, queries, keys, values, of_out, sums, bias, scaling)
                dq[b, rows] = new[0].transpose(1, 2).flatten(0, 1)[: len(part)]
                windows.add_up(dk[b], new[1], s)
                windows.add_up(dv[b], new[2], s)
                if more is not None:
                    seen = _bias_of_more(_row(more_seen, b), rows, q)
                    tensors = (part, 0.0), (of_q[rows], 1.0), (out[b, rows], 0.0)
                    d_out, queries, of_out = (_widen(x.transpose(0, 1)[None], more_k, y) for x, y in tensors)
                    keys, values, lse = more_k[b : b + 1], more_v[b : b + 1], lse.transpose(0, 1)[None]
                    new = attend_backward(d_out, queries, keys, values, of_out, lse, seen, scaling)
                    dq[b, rows] += new[0][0, ..., :D].transpose(0, 1)
                    for sum_more, x in zip(more, new[1:], strict=True):
                        sum_more[b] += x[0]
        held = slice(windows.front, windows.front + k_len)
        grads = (dq, dk[:, held].to(q.dtype), dv[:, held].to(q.dtype))
        of_more = (None, None) if more is None else (x.to(q.dtype) for x in more)
        return (*(x.transpose(1, 2) for x in grads), *of_more, *[None] * 6)


def _row(x: torch.Tensor | None, b: int) -> torch.Tensor | None:
    """Row b of `x` `[B or 1, ...]`."""
    return None if x is None else x[b if x.shape[0] > 1 else 0]


def _bias_of_more(seen: torch.Tensor | None, rows: slice, q: torch.Tensor) -> torch.Tensor:
    """bool `[Tq or 1, G]` as a bias `[1, 1, rows, G]`."""
    if seen is None:
        raise ValueError("Keys seen besides the window came without what sees them.")
    zero = torch.zeros((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    seen = seen[rows] if seen.shape[0] > 1 else seen
    return torch.where(seen, zero, zero + UNSEEN).expand(1, 1, rows.stop - rows.start, -1)


def _widen(x: torch.Tensor, like: torch.Tensor, value: float) -> torch.Tensor:
    """`x` `[..., D]` with one more channel of `value` where `like` has one more."""
    return F.pad(x, (0, 1), value=value) if like.shape[-1] > x.shape[-1] else x


def attend_with_sums(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[N, H, T, D]` and log-sum-exp `[N, H, T]`."""
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=bias, scale=scaling
    )
    return result


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, given the output and the log-sum-exp over all keys and the output's gradient."""
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse.contiguous(), 0.0, False, attn_mask=bias, scale=scaling
        )
    )
    return result
