"""Pooling of tokens over contiguous segments, one set of boundaries per batch row."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.tracing import is_exported

__all__ = [
    "attend_pooled",
    "attend_segments",
    "even_segment_mean",
    "even_segment_starts",
    "mix_tokens",
    "segment_max",
    "segment_mean",
    "segment_of_rank",
]


def mix_tokens(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sums over tokens `[B, H, T, D]` weighted by `[B or 1, slots, T]`, the same for all heads: `[B, H, slots, D]`."""
    # Heads side by side, one large product: a product for each head would give the weight a gradient for each.
    return (weight @ x.transpose(1, 2).flatten(2)).unflatten(-1, (x.shape[1], -1)).transpose(1, 2)


def even_segment_starts(n_real: torch.Tensor, slots: int) -> torch.Tensor:
    """Boundaries of `m = min(slots, n)` even segments of n tokens: rank r is in segment `r * m // n`.

    Args:
        n_real: long `[B]`, tokens of each row.
        slots: segments wanted; a row with fewer tokens leaves the last ones empty.

    Returns:
        long `[B, slots + 1]`: first rank of each segment, and the end of the last.
    """
    used = n_real.clamp(max=slots)[:, None]
    slot = torch.arange(slots + 1, device=n_real.device)[None]
    return -(-slot.minimum(used) * n_real[:, None] // used.clamp(min=1))


def segment_of_rank(starts: torch.Tensor, length: int, rank: torch.Tensor | None = None) -> torch.Tensor:
    """Segment of each rank `[B, length]`; ranks past the last segment get the number of segments."""
    if rank is None:
        rank = torch.arange(length, device=starts.device).expand(starts.shape[0], -1)
    if is_exported():  # ONNX has no search
        return (rank[..., None] >= starts[:, None, 1:]).sum(-1)
    return torch.searchsorted(starts[:, 1:].contiguous(), rank.contiguous(), right=True)


def segment_mean(x: torch.Tensor, starts: torch.Tensor, rank: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of each segment, 0 for an empty one, in float32 at least.

    Args:
        x: `[B, H, T, D]`.
        starts: `[B, slots + 1]`.
        rank: long `[B, T]`, rank of each token, T for padding; None when they stand in rank order, padding last.

    Returns:
        `[B, H, slots, D]`.
    """
    slot = torch.arange(starts.shape[1] - 1, device=x.device)[:, None]
    member = segment_of_rank(starts, x.shape[2], rank)[:, None, :] == slot  # [B, slots, T]
    # A matrix product, not a scatter: the sum has the same order in every run on a GPU.
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return mix_tokens(member.to(dtype) / starts.diff()[:, :, None].clamp(min=1), x.to(dtype))


def even_segment_mean(x: torch.Tensor, slots: int, real: torch.Tensor | None = None) -> torch.Tensor:
    """Means over even segments of the real tokens, 0 for an empty one, in float32 at least.

    Args:
        x: `[B, H, T, D]`.
        slots: segments, as of `even_segment_starts`.
        real: bool `[B, T]`, or None when all tokens are real.

    Returns:
        `[B, H, slots, D]`.
    """
    length = x.shape[2]
    if real is None and not is_exported() and length % slots == 0:
        heads = x.transpose(1, 2).flatten(2)  # side by side, where the mean is quicker
        dtype = torch.promote_types(x.dtype, torch.float32)
        return heads.unflatten(1, (slots, -1)).mean(2, dtype=dtype).unflatten(-1, (x.shape[1], -1)).transpose(1, 2)
    if real is None:
        return segment_mean(x, even_segment_starts(torch.full((1,), length, device=x.device), slots))
    rank = (real.long().cumsum(-1) - 1).masked_fill(~real, length)
    return segment_mean(x, even_segment_starts(real.sum(-1), slots), rank)


def segment_max(x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum of each segment, 0 for an empty one; arguments as `segment_mean`."""
    batch, heads, length, dim = x.shape
    slots = starts.shape[1] - 1
    segment = segment_of_rank(starts, length)[:, None, :, None].expand_as(x)
    lowest = x.new_full((batch, heads, slots + 1, dim), float("-inf"))  # the last one takes the padding
    pooled = lowest.scatter_reduce(2, segment, x, reduce="amax")[:, :, :slots]
    return pooled.masked_fill((starts.diff() == 0)[:, None, :, None], 0)


def attend_pooled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Softmax attention of all queries over a few keys and values that are more precise than the queries.

    Rounded to half precision, a pooled key would move each of its logits by u times the logit, and gradients, which are
    differences of pooled values, by u times the values.

    Args:
        q: `[B, H, Tq, D]`.
        k: `[B, H, slots, D]`, and `v` likewise, in the queries' dtype or a wider one.
        mask: bool, or a bias in k's dtype, broadcastable to `[B, H, Tq, slots]`; None for none.
        scaling: factor of the logits.

    Returns:
        `[B, H, Tq, D]` in the queries' dtype.
    """
    if q.dtype == k.dtype == v.dtype:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(q.to(k.dtype), k, v.to(k.dtype), attn_mask=mask, scale=scaling)
    return out.to(q.dtype)


def attend_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, in_use: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """`attend_pooled` over segments, of which some may be empty; a row of the batch without any gives 0.

    Args:
        query: `[B, H, Tq, D]`.
        key: `[B, H, slots, D]`, and `value` likewise.
        in_use: bool `[B, slots]`, the segments that hold a real token; None if all do.
        scaling: factor of the logits.

    Returns:
        `[B, H, Tq, D]` in the query's dtype.
    """
    allowed = None
    if in_use is not None:
        some = in_use.any(-1)[:, None, None, None]
        # Rows without any segment attend to all, to values of 0: no nan in the output nor in the gradients.
        allowed = in_use[:, None, None, :] | ~some
        value = value.masked_fill(~some, 0)
    return attend_pooled(query, key, value, allowed, scaling)
