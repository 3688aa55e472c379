"""The sliding window on a CPU: the attention kernels of torch on overlapping views, forward and backward.

Autograd through overlapping slices copies every key as often as windows hold it, and adds the gradients up one by one.
Here windows stay views, and the gradients of all blocks are added in as many passes as a window has blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["UNSEEN", "attend_backward", "attend_band", "attend_with_sums", "serves"]

# Upper bound on the elements of the gradients of keys that are in hand at once (16 MiB in fp32).
SEGMENT_ELEMENTS = 1 << 22
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
        extra: keys and values `[B, H, G, D]` seen besides, and bool `[B or 1, Tq or 1, G]`, which row sees which.
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

    The windows are `width` long, a multiple of the block, and start at key `front` places before the first one.
    """

    def __init__(
        self, q_len: int, k_len: int, left: int, right: int, block: int, num_heads: int, head_dim: int
    ) -> None:
        self.q_len, self.k_len, self.left, self.right, self.block = q_len, k_len, left, right, block
        self.count = -(-q_len // block)
        self.per_window = -(-(block + left + right) // block)
        self.width = self.per_window * block
        first = k_len - q_len - left
        self.start, self.front = max(first, 0), max(-first, 0)
        self.back = (self.count - 1) * block + self.width - self.front - k_len + self.start
        self.step = max(1, SEGMENT_ELEMENTS // (num_heads * self.width * head_dim))

    def segments(self) -> Iterator[slice]:
        for begin in range(0, self.count, self.step):
            yield slice(begin, min(begin + self.step, self.count))

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """`[Tq, H, ...]` as `[blocks, H, block, ...]`, 0 beyond the end."""
        x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, self.count * self.block - self.q_len))
        return x.unflatten(0, (self.count, self.block)).transpose(1, 2)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """`[Tk, H, D]` as overlapping windows `[blocks, H, width, D]`, 0 beyond the ends."""
        x = F.pad(x[self.start :], (0, 0, 0, 0, self.front, self.back))
        return x.unfold(0, self.width, self.block).mT

    def bias(self, key_allowed: torch.Tensor | None, segment: slice, like: torch.Tensor) -> torch.Tensor:
        """`[blocks, 1, block, width]`: `UNSEEN` for keys out of reach; `key_allowed` bool `[Tk]` or None."""
        if key_allowed is None:
            key_allowed = torch.ones(self.k_len, dtype=torch.bool, device=like.device)
        held = F.pad(key_allowed[self.start :], (self.front, self.back)).unfold(0, self.width, self.block)[segment]
        row, column = (torch.arange(x, device=like.device) for x in (self.block, self.width))
        ahead = column - row[:, None]
        seen = ((ahead >= 0) & (ahead <= self.left + self.right)) & held[:, None]
        zero = torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        return torch.where(seen, zero, zero + UNSEEN)[:, None]

    def add_up(self, total: torch.Tensor, part: torch.Tensor, segment: slice) -> None:
        """Add the gradients `[blocks, H, width, D]` of a segment's windows to `total` `[places, block, H, D]`."""
        part = part.transpose(1, 2)
        for number in range(self.per_window):
            where = slice(segment.start + number, segment.stop + number)
            total[where].add_(part[:, number * self.block : (number + 1) * self.block])


class _AttendBand(torch.autograd.Function):
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
        outputs, sums = [], []
        for b in range(B):
            rows = windows.rows(q[b].transpose(0, 1))
            keys, values = (windows.keys(x[b].transpose(0, 1)) for x in (k, v))
            parts = [
                attend_with_sums(rows[s], keys[s], values[s], windows.bias(_row(key_allowed, b), s, q), scaling)
                for s in windows.segments()
            ]
            outputs.append(torch.cat([out.transpose(1, 2).flatten(0, 1) for out, _ in parts])[:q_len])  # [Tq, H, D]
            sums.append(torch.cat([lse.transpose(1, 2).flatten(0, 1) for _, lse in parts])[:q_len])
        out, total = torch.stack(outputs), torch.stack(sums)  # [B, Tq, H, D], [B, Tq, H]
        if more_k is not None and more_v is not None and more_seen is not None:
            part, lse = attend_with_sums(q, more_k, more_v, _bias_of_more(more_seen, q), scaling)
            lse, both = lse.transpose(1, 2), torch.logaddexp(total, lse.transpose(1, 2))
            out = out * (total - both).exp()[..., None] + part.transpose(1, 2) * (lse - both).exp()[..., None]
            total = both
        out = out.masked_fill((total < _NOTHING)[..., None], 0).to(q.dtype)
        ctx.save_for_backward(q, k, v, more_k, more_v, more_seen, key_allowed, out, total)
        ctx.settings = (left, right, scaling, block)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, more_k, more_v, more_seen, key_allowed, out, total = ctx.saved_tensors
        left, right, scaling, block = ctx.settings
        (B, H, q_len, D), k_len = q.shape, k.shape[2]
        windows = _Windows(q_len, k_len, left, right, block, H, D)
        dead = total < _NOTHING
        # A row without keys has weights of 0, not of 1 / 0.
        grad, total = grad.transpose(1, 2).masked_fill(dead[..., None], 0), total.masked_fill(dead, -UNSEEN)
        all_grads: list[list[torch.Tensor]] = [[], [], []]
        for b in range(B):
            rows, of_out, of_grad = (windows.rows(x) for x in (q[b].transpose(0, 1), out[b], grad[b]))
            lse = windows.rows(total[b])
            keys, values = (windows.keys(x[b].transpose(0, 1)) for x in (k, v))
            places = windows.count - 1 + windows.per_window
            dk, dv = (lse.new_zeros(places, block, H, D) for _ in range(2))
            dq = []
            for s in windows.segments():
                bias = windows.bias(_row(key_allowed, b), s, q)
                new = attend_backward(of_grad[s], rows[s], keys[s], values[s], of_out[s], lse[s], bias, scaling)
                dq.append(new[0].transpose(1, 2).flatten(0, 1))
                windows.add_up(dk, new[1], s)
                windows.add_up(dv, new[2], s)
            held = slice(windows.front, windows.front + k_len - windows.start)
            all_grads[0].append(torch.cat(dq)[:q_len])
            for total_grads, x in zip(all_grads[1:], (dk, dv), strict=True):
                total_grads.append(F.pad(x.flatten(0, 1)[held], (0, 0, 0, 0, windows.start, 0)).to(q.dtype))
        q_grad, k_grad, v_grad = (torch.stack(x).transpose(1, 2) for x in all_grads)
        if more_k is None:
            return (q_grad, k_grad, v_grad, *[None] * 8)
        grad, out, lse = (x.transpose(1, 2) for x in (grad, out, total))
        new = attend_backward(grad, q, more_k, more_v, out, lse, _bias_of_more(more_seen, q), scaling)
        return (q_grad + new[0], k_grad, v_grad, new[1], new[2], *[None] * 6)


def _row(x: torch.Tensor | None, b: int) -> torch.Tensor | None:
    """Row b of `x` `[B or 1, ...]`."""
    return None if x is None else x[b if x.shape[0] > 1 else 0]


def _bias_of_more(seen: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """bool `[B or 1, Tq or 1, G]` as a bias `[B, 1, Tq, G]`."""
    zero = torch.zeros((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return torch.where(seen, zero, zero + UNSEEN)[:, None].expand(q.shape[0], 1, q.shape[2], -1)


def attend_with_sums(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scaling: float
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
    bias: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, given the output and the log-sum-exp over all keys and the output's gradient."""
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse.contiguous(), 0.0, False, attn_mask=bias, scale=scaling
        )
    )
    return result
