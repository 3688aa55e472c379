"""Sliding-window softmax attention in O(n w): blocks of queries against overlapping slices of keys.

Longformer (arXiv:2004.05150) is the source of the pattern: a band, optionally dilated, plus a few columns for
all rows (the global tokens). All blocks share one call of `scaled_dot_product_attention`: the logits are
never held in memory, and on CPU it measured faster than explicit matmuls at every length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.backend import use_triton
from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.ops.base.pieces import serves
from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.ops.window.blocks import attend_band
from hf_linear_attn.ops.window.layout import Extra, by_dilation
from hf_linear_attn.ops.window.step import attend_one

__all__ = [
    "at_least_two",
    "attend_blocks",
    "attend_projected",
    "in_front",
    "naive_sliding_window_attention",
    "sliding_window_attention",
]

# Upper bound on the elements of the key blocks gathered at once (16 MiB in fp32). Longer inputs go through in
# segments, which keeps memory near that of q, k and v.
SEGMENT_ELEMENTS = 1 << 22


def naive_sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    left: int,
    right: int,
    scaling: float,
    dilation: int | tuple[int, ...] = 1,
    key_allowed: torch.Tensor | None = None,
    extra: Extra | None = None,
) -> torch.Tensor:
    """Dense O(n^2) evaluation of `sliding_window_attention`, for exported programs and tests; same arguments."""
    (B, H, q_len, _), k_len, width = q.shape, k.shape[2], v.shape[3]
    q, k, v = _widened(q, k, v, extra)
    distance = torch.arange(k_len, device=q.device) - torch.arange(k_len - q_len, k_len, device=q.device)[:, None]
    step = torch.tensor(dilation, device=q.device).expand(H)[:, None, None]
    allowed = (distance >= -left * step) & (distance <= right * step) & (distance % step == 0)
    allowed = allowed.expand(B, H, q_len, k_len)
    if key_allowed is not None:
        allowed = allowed & key_allowed[:, None, None, :]
    if extra is not None:
        k, v = torch.cat([extra[0], k], dim=2), torch.cat([extra[1], v], dim=2)
        allowed = torch.cat([extra[2][:, None].expand(B, H, q_len, -1), allowed], dim=-1)
    logits = (q @ k.transpose(-1, -2) * scaling).masked_fill(~allowed, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0) @ v[..., :width]


def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    left: int,
    right: int,
    scaling: float,
    dilation: int | tuple[int, ...] = 1,
    key_allowed: torch.Tensor | None = None,
    extra: Extra | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention where query position i sees keys i + d m for -left <= m <= right (d the dilation).

    Query row r sits at position Tk - Tq + r. Every key and value must be finite, forbidden ones too: their
    weights are 0, and 0 times inf would still be nan.

    Args:
        q: `[B, H, Tq, D]`, Tq <= Tk.
        k: `[B, H, Tk, D]`.
        v: `[B, H, Tk, D]`.
        left: steps of `dilation` tokens that a query sees to its left.
        right: the same to its right; 0 is causal.
        scaling: factor of the logits.
        dilation: tokens between neighboring keys of the window, plus one; for all heads, or one per head.
        key_allowed: bool `[B or 1, Tk]`, False for keys that no window may contain; None when all may.
        extra: keys, values and mask of columns seen in addition to the window.
        backend: what runs it, see `ops.base.backend`.

    Returns:
        `[B, H, Tq, D]`; rows that may see no key are 0.

    Raises:
        ValueError: for Tq > Tk, a negative window, dilation < 1 or a dilation list of the wrong length.
        RuntimeError: for `backend="triton"` where the kernels cannot run.
    """
    H, q_len, k_len = q.shape[1], q.shape[2], k.shape[2]
    steps = dilation if isinstance(dilation, tuple) else (dilation,) * H
    if q_len > k_len:
        raise ValueError(f"Sliding-window attention needs Tq <= Tk, got Tq={q_len} and Tk={k_len}.")
    if left < 0 or right < 0 or min(steps) < 1:
        raise ValueError(f"Need left, right >= 0 and dilation >= 1, got {left=}, {right=}, {dilation=}.")
    if len(steps) != H:
        raise ValueError(f"dilation names {len(steps)} heads, the queries have {H}.")
    if use_triton(backend, q):
        from hf_linear_attn.ops.window import fused

        if use_triton(backend, q, fused.refusal(q)):
            width = v.shape[3]
            q, k, v = _widened(q, k, v, extra)
            given: dict[str, Any] = {"dilation": dilation, "key_allowed": key_allowed, "extra": extra}
            out = fused.sliding_window_attention(q, k, v, left=left, right=right, scaling=scaling, **given)
            return out[..., :width]
    if is_exported():
        seen: dict[str, Any] = {"dilation": dilation, "key_allowed": key_allowed, "extra": extra}
        return naive_sliding_window_attention(q, k, v, left=left, right=right, scaling=scaling, **seen)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None, part: Extra | None
    ) -> torch.Tensor:
        return _band_attention(q, k, v, left, right, scaling, allowed, part)

    return by_dilation(attend, q, k, v, dilation, key_allowed, extra)


def _widened(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: Extra | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values as wide as the extra ones: the last channel adds the bias of those and nothing else."""
    if extra is None or extra[0].shape[-1] == k.shape[-1]:
        return q, k, v
    return F.pad(q, (0, 1), value=1.0), F.pad(k, (0, 1)), F.pad(v, (0, 1))


def _band_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int,
    right: int,
    scaling: float,
    key_allowed: torch.Tensor | None,
    extra: Extra | None,
) -> torch.Tensor:
    (B, H, q_len, D), k_len, value_dim = q.shape, k.shape[2], v.shape[3]
    left, right = min(left, k_len - 1), min(right, q_len - 1)
    if left == k_len - 1 and right in (0, q_len - 1) and q_len in (1, k_len) and key_allowed is None and extra is None:
        is_causal = right < q_len - 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scaling)
    if q_len == 1 and extra is not None and q.dtype == accumulation_dtype(q.dtype):
        begin = k_len - 1 - left
        key_allowed = None if key_allowed is None else key_allowed[:, begin:]
        return attend_one(q, k[:, :, begin:], v[:, :, begin:], scaling=scaling, key_allowed=key_allowed, extra=extra)
    on_views = serves(q, v)
    block = min(_block_size(left + right, D, on_views), q_len)
    width = block + left + right
    if k_len <= width or not on_views:
        q, k, v = _widened(q, k, v, extra)
    if k_len <= width:  # one block sees everything
        allowed = _band(q_len, k_len, left + q_len - k_len, left + right, q.device)[None, None]
        if key_allowed is not None:
            allowed = allowed & key_allowed[:, None, None, :]
        columns = None if extra is None else (extra[0], extra[1], extra[2][:, None])
        out = _attend_blocks(q[:, None], k[:, None], v[:, None], allowed, columns, scaling)
        return out[..., :value_dim].transpose(1, 2)

    if on_views:
        where = {"left": left, "right": right, "key_allowed": key_allowed, "extra": extra}
        return attend_band(q, k, v, scaling=scaling, block=block, **where)  # type: ignore[arg-type]

    num_blocks = -(-q_len // block)
    tail = num_blocks * block - q_len
    first = k_len - q_len - left  # position of the first key of the first block
    start, front, back = max(first, 0), max(-first, 0), tail + right
    if key_allowed is None:
        key_allowed = torch.ones(1, k_len, dtype=torch.bool, device=q.device)
    key_allowed = F.pad(key_allowed[:, start:], (front, back)).unfold(1, width, block)  # [B or 1, nb, width]
    # Padding and slicing in the layout [B, T, H, D] makes each block a view.
    q = F.pad(q.transpose(1, 2), (0, 0, 0, 0, 0, tail)).unflatten(1, (num_blocks, block)).transpose(2, 3)
    k, v = (F.pad(x.transpose(1, 2)[:, start:], (0, 0, 0, 0, front, back)) for x in (k, v))
    k, v = (x.unfold(1, width, block).transpose(-1, -2) for x in (k, v))  # [B, nb, H, width, D]
    seen = None if extra is None else extra[2]
    if seen is not None:  # [B or 1, nb, block or 1, G]
        seen = F.pad(seen, (0, 0, 0, num_blocks * block - seen.shape[1])) if seen.shape[1] > 1 else seen
        seen = (
            seen.unflatten(1, (num_blocks, block))
            if seen.shape[1] > 1
            else seen[:, None].expand(-1, num_blocks, -1, -1)
        )
    band = _band(block, width, 0, left + right, q.device)

    step = max(1, SEGMENT_ELEMENTS // (B * H * width * D))
    outputs = []
    for begin in range(0, num_blocks, step):
        part = slice(begin, min(begin + step, num_blocks))
        columns = None if extra is None or seen is None else (extra[0], extra[1], seen[:, part])
        allowed = band & key_allowed[:, part, None, :]
        outputs.append(_attend_blocks(q[:, part], k[:, part], v[:, part], allowed, columns, scaling))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return out[:, :q_len, :, :value_dim].transpose(1, 2)


def _block_size(reach: int, head_dim: int, on_views: bool) -> int:
    """Queries per block for a window of `reach` + 1 keys (measured on CPU)."""
    if on_views:  # windows cost nothing, but for the gradients: the wider they are, the more passes
        return 128 if head_dim >= 64 and reach >= 256 else 64
    return min(max(64, (reach // 2 + 63) // 64 * 64), 256)


def _band(rows: int, columns: int, low: int, reach: int, device: torch.device) -> torch.Tensor:
    """bool `[rows, columns]`, True where 0 <= column - row + low <= reach."""
    distance = torch.arange(columns, device=device) - torch.arange(rows, device=device)[:, None] + low
    return (distance >= 0) & (distance <= reach)


def _attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    extra: Extra | None,
    scaling: float,
) -> torch.Tensor:
    """Blocks as of `attend_blocks`, 0 in rows without any key; the extra columns' mask is `[B or 1, nb, b or 1, G]`.

    Returns `[B, nb * b, H, D]`.
    """
    if extra is not None:
        k, v = in_front(extra[0], k), in_front(extra[1], v)
        batch = max(extra[2].shape[0], allowed.shape[0])
        allowed = torch.cat([x.expand(batch, -1, q.shape[3], -1) for x in (extra[2], allowed)], dim=-1)
    # A row without any key would be nan in some backends: let it see everything and drop the result.
    dead = ~allowed.any(-1, keepdim=True)  # [B or 1, nb, b, 1]
    out = attend_blocks(q, k, v, allowed | dead, scaling).transpose(2, 3)  # [B, nb, b, H, D]
    return out.masked_fill(dead[..., None], 0).flatten(1, 2)


def in_front(columns: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Columns `[B, H, G, D]` in front of the keys of each block `[B, nb, H, K, D]`."""
    return torch.cat([columns[:, None].expand(-1, x.shape[1], -1, -1, -1), x], dim=3)


def attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scaling: float,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """One attention call for nb blocks: q `[B, nb, H, b, D]`, whose shape it returns, k and v `[B, nb, H, K, D]`, and
    bool `seen` `[B or 1, nb, b or 1, K]`: every query sees a key. `shift` `[H, 1, K]` is added to the logits.
    """
    mask = seen.expand(q.shape[0], -1, -1, -1).flatten(0, 1)[:, None]
    if shift is not None:
        mask = torch.where(mask, shift, float("-inf"))
    blocks = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling).unflatten(0, blocks)


def attend_projected(
    q: torch.Tensor,
    hidden: torch.Tensor,
    key: tuple[torch.Tensor, torch.Tensor],
    value: tuple[torch.Tensor, torch.Tensor],
    allowed: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of a few queries over keys and values that are projections of `hidden`.

    With no more queries than channels per head the projections are folded into the queries and applied to the
    weighted sum of `hidden` instead, so that no key or value of the whole sequence is ever computed.

    Args:
        q: `[B, H, G, D]`.
        hidden: `[B, T, C]`, finite everywhere.
        key: weight `[H * D, C]` and bias `[H * D]`.
        value: the same for values.
        allowed: bool, broadcastable to `[B, 1, G, T]`. A row without any key returns something finite.
        scaling: factor of the logits.

    Returns:
        `[B, H, G, D]`.
    """
    H, G, D = q.shape[1:]
    if G > D:
        k, v = (F.linear(hidden, *layer).unflatten(-1, (H, D)).transpose(1, 2) for layer in (key, value))
        mask = allowed | ~allowed.any(-1, keepdim=True)
        mask = mask.expand(q.shape[0], 1, G, hidden.shape[1])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    # In float32 at least: a folded query is a product of two projections, beyond the range of fp16 where q, k are not.
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        queries, hidden = q.to(dtype), hidden.to(dtype)
        w_k, b_k, w_v, b_v = (x.to(dtype).unflatten(0, (H, D)) for x in (*key, *value))
        folded = (queries @ w_k).flatten(1, 2)  # [B, H * G, C]
        logits = (folded @ hidden.transpose(1, 2)).unflatten(1, (H, G)) + (queries * b_k[:, None]).sum(-1, keepdim=True)
        weights = (logits * scaling).masked_fill(~allowed, torch.finfo(dtype).min).softmax(-1)
        mixed = (weights.flatten(1, 2) @ hidden).unflatten(1, (H, G))  # [B, H, G, C]
        return (at_least_two(mixed, 2) @ w_v.transpose(-1, -2) + b_v[:, None])[:, :, :G].to(q.dtype)


def at_least_two(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`x`, a single row of dimension `dim` twice.

    CPU libraries multiply a matrix and one vector in an order that depends on where in memory the matrix lies, and
    weights that were saved and loaded lie elsewhere; with two rows the bits are the same.
    """
    return torch.cat([x, x], dim) if x.shape[dim] == 1 else x
