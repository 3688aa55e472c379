"""Segments of a sequence: attention within them, over the tokens just before them, and a compressed memory.

Segment s holds the real tokens of rank s S .. (s + 1) S - 1. All functions work on a compacted call
(`ops.compaction`) with as many queries as new keys, whose last new token may stand anywhere in its segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.compaction import CompactedCall, take_tokens
from hf_linear_attn.ops.feature_maps import accumulation_dtype
from hf_linear_attn.ops.linear_sums import divide

__all__ = [
    "SegmentLayout",
    "bounded_key_weight",
    "memory_attention",
    "segment_attention",
    "segment_layout",
]

# Bounds on the log of a key's weight in memory, relative to the largest one in calibration: sums stay numbers.
_LEAST_WEIGHT, _MOST_WEIGHT = -60.0, 30.0


@dataclass
class SegmentLayout:
    """The new tokens of a call, cut into the N segments that they touch, at most W of them in each.

    Attributes:
        rank: long `[B or 1, N, W]`, rank of the token in a slot.
        real: bool `[B or 1, N, W]`, whether there is such a token.
        begin: long `[B or 1, N]`, rank of each segment's first token.
        total: long `[B or 1]`, real tokens up to the end of the call.
        slot: long `[B or 1, Tq]`, slot n W + t of each query row (any slot for a row of padding).
        size: tokens of a segment.
    """

    rank: torch.Tensor
    real: torch.Tensor
    begin: torch.Tensor
    total: torch.Tensor
    slot: torch.Tensor
    size: int

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """An output by slot `[B, H, N, W, D]` as rows of the compacted call `[B, H, Tq, D]`."""
        return take_tokens(x.flatten(2, 3), self.slot.expand(x.shape[0], -1))


def segment_layout(call: CompactedCall, size: int, *, aligned: bool) -> SegmentLayout:
    """Cut a call into segments.

    Args:
        call: with as many queries as new keys.
        size: tokens S of a segment.
        aligned: whether every row of the batch begins a segment with this call (a call without a state).
    """
    q_len = call.q.shape[2]
    past, total = call.past[:, None], call.rank[:, -1:] + 1  # [B or 1, 1]
    device, width = past.device, min(size, q_len)
    count = -(-(q_len if aligned else size - 1 + q_len) // size)
    begin = (past // size + torch.arange(count, device=device)) * size  # [B or 1, N]
    start = torch.maximum(begin, past)
    rank = start[..., None] + torch.arange(width, device=device)
    real = rank < torch.minimum(begin + size, total)[..., None]
    row = call.rank[:, -q_len:].maximum(past)
    number = row // size - past // size
    slot = number * width + row - start.expand(row.shape[0], -1).gather(1, number)
    return SegmentLayout(rank, real, begin, total[:, 0], slot, size)


def _take(x: torch.Tensor, rank: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Tokens of `x` `[B, H, T, D]`, whose last one has rank total - 1, by rank `[B or 1, N, W]`: `[B, H, N, W, D]`."""
    place = (rank - total[:, None, None] + x.shape[2]).clamp(0, x.shape[2] - 1)
    return take_tokens(x, place.flatten(1).expand(x.shape[0], -1)).unflatten(2, rank.shape[1:])


def segment_attention(
    call: CompactedCall, layout: SegmentLayout, *, memory_length: int, scaling: float
) -> torch.Tensor:
    """Causal softmax attention within segments, and over the `memory_length` tokens before each segment.

    No gradient flows to keys and values through that memory: they are constants of an earlier segment, as in
    Transformer-XL, arXiv:1901.02860.

    Returns:
        `[B, H, N, W, D]`; slots without a token hold something finite.
    """
    q = _take(call.q, layout.rank, layout.total).transpose(1, 2).flatten(0, 1)  # [B N, H, W, D]
    first, device = layout.begin[..., None], layout.begin.device
    own = first + torch.arange(layout.size, device=device)
    earlier = first - memory_length + torch.arange(memory_length, device=device)
    rank = torch.cat([earlier, own], -1)  # [B or 1, N, M + S]
    seen = (rank >= 0)[:, :, None] & (rank[:, :, None] <= layout.rank[..., None])
    seen = seen | ~layout.real[..., None]  # a slot without a token sees all: some backends make nan of none
    batch = call.k.shape[0]
    mask = seen.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]

    def keys(x: torch.Tensor) -> torch.Tensor:
        parts = [_take(x.detach(), earlier, layout.total)] if memory_length else []
        return torch.cat([*parts, _take(x, own, layout.total)], 3).transpose(1, 2).flatten(0, 1)

    out = F.scaled_dot_product_attention(q, keys(call.k), keys(call.v), attn_mask=mask, scale=scaling)
    return out.unflatten(0, (batch, -1)).transpose(1, 2)


def memory_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    layout: SegmentLayout,
    sums_before: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Linear attention over all *finished* segments before a query's own: Infini-attention, arXiv:2404.07143.

    Args:
        q_features, k_features: `[B, H, Tq, F]` of the new tokens, 0 or more.
        v: `[B, H, Tq, D]`, their values.
        layout: their segments.
        sums_before: before the call, sums phi(k) [v, 1]^T over the finished segments and over the one in progress,
            `[B, H, F, D + 1]` each; None for a call that begins the sequence.

    Returns:
        the output by slot `[B, H, N, W, D]`, 0 while no segment is finished, and both sums after the call.
    """
    dtype = accumulation_dtype(v.dtype)
    q, k, values = (_take(x.to(dtype), layout.rank, layout.total) for x in (q_features, k_features, v))
    zero = q.new_zeros(*q.shape[:2], q.shape[-1], values.shape[-1] + 1)
    memory, pending = sums_before or (zero, zero)
    values = F.pad(values, (0, 1), value=1.0).masked_fill(~layout.real[:, None, ..., None], 0)
    with torch.autocast(v.device.type, enabled=False):
        sums = k.mT @ values  # [B, H, N, F, D + 1]
        sums = torch.cat([sums[:, :, :1] + pending[:, :, None], sums[:, :, 1:]], 2)
        before = torch.cat([memory[:, :, None], sums[:, :, :-1]], 2).cumsum(2)
        output = divide(q @ before, dtype)
        finished = (layout.begin + layout.size <= layout.total[:, None])[:, None, :, None, None]
        memory = memory + sums.masked_fill(~finished, 0).sum(2)
        return output, memory, sums.masked_fill(finished, 0).sum(2)


def bounded_key_weight(
    k: torch.Tensor, query_mean: torch.Tensor, key_peak: torch.Tensor, scaling: float
) -> torch.Tensor:
    """exp(scaling * a . k - peak), the variance reducer as a factor: a constant scale, so that sums need none.

    Args:
        k: `[B, H, T, D]`.
        query_mean: a, `[H, D]`.
        key_peak: largest scaling * a . k to expect, `[H]`; it cancels in the quotient of a read.
        scaling: factor of the logits.

    Returns:
        `[B, H, T, 1]`, kept between e^-60 and e^30.
    """
    dtype = accumulation_dtype(k.dtype)
    with torch.autocast(k.device.type, enabled=False):
        shared = k.to(dtype) @ (query_mean.to(dtype) * scaling)[..., None]
    return (shared - key_peak.to(dtype)[:, None, None]).clamp(_LEAST_WEIGHT, _MOST_WEIGHT).exp()
