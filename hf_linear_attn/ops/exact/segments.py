"""Segments of a sequence: attention within them, over the tokens just before them, and a compressed memory.

Segment s holds the real tokens of rank s S .. (s + 1) S - 1. All functions work on a compacted call
(`ops.base.compaction`) with as many queries as new keys, whose last new token may stand anywhere in its segment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.compaction import CompactedCall, take_tokens
from hf_linear_attn.ops.base.numerics import TINY, accumulation_dtype
from hf_linear_attn.ops.exact.scan import scan
from hf_linear_attn.ops.features.maps import elu_features, mean_logit

__all__ = [
    "SegmentLayout",
    "bounded_key_weight",
    "gated_memory",
    "memory_attention",
    "segment_attention",
    "segment_layout",
]

_Tensors = tuple[torch.Tensor, ...]

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
        aligned: whether every row of the batch begins a segment with this call.
        plain: whether slot i is token i in every row, and those beyond the last token are empty.
    """

    rank: torch.Tensor
    real: torch.Tensor
    begin: torch.Tensor
    total: torch.Tensor
    slot: torch.Tensor
    size: int
    aligned: bool
    plain: bool

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens of `x` `[B, H, T, D]`, whose last one ends the call, by slot `[B, H, N, W, D]`."""
        if not self.plain:
            return _take(x, self.rank, self.total)
        missing = self.rank[0].numel() - x.shape[2]
        return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, self.rank.shape[1:])

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """An output by slot `[B, H, N, W, D]` as rows of the compacted call `[B, H, Tq, D]`."""
        x = x.flatten(2, 3)
        return x[:, :, : self.slot.shape[1]] if self.plain else take_tokens(x, self.slot.expand(x.shape[0], -1))

    def part(self, segments: slice) -> SegmentLayout:
        """The layout of some of the segments."""
        return replace(self, rank=self.rank[:, segments], real=self.real[:, segments], begin=self.begin[:, segments])


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
    return SegmentLayout(rank, real, begin, total[:, 0], slot, size, aligned, aligned and call.perm is None)


def _take(x: torch.Tensor, rank: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Tokens of `x` `[B, H, T, D]`, whose last one has rank total - 1, by rank `[B or 1, N, W]`: `[B, H, N, W, D]`."""
    place = (rank - total[:, None, None] + x.shape[2]).clamp(0, x.shape[2] - 1)
    return take_tokens(x, place.flatten(1).expand(x.shape[0], -1)).unflatten(2, rank.shape[1:])


def segment_attention(
    call: CompactedCall, layout: SegmentLayout, *, memory_length: int, scaling: float, is_causal: bool = True
) -> torch.Tensor:
    """Softmax attention within segments, and over the `memory_length` tokens before each segment.

    Causal attention sees its segment up to itself; else a token sees all of its segment, and as many tokens behind the
    segment as before it. No gradient flows to keys and values of other segments: they are constants, as in
    Transformer-XL, arXiv:1901.02860.

    Returns:
        `[B, H, N, W, D]`; slots without a token hold something finite.
    """
    batch = call.k.shape[0]
    q = _by_segment(layout.cut(call.q))
    filled = layout.plain and layout.rank[0].numel() == call.k.shape[2]  # each slot holds a token
    if layout.aligned and not memory_length and (is_causal or filled):  # slots of queries and keys are the same
        k, v = (_by_segment(layout.cut(x)) for x in (call.k, call.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scaling)
        return out.unflatten(0, (batch, -1)).transpose(1, 2)
    first, device = layout.begin[..., None], layout.begin.device
    own, beside = first + torch.arange(layout.size, device=device), torch.arange(memory_length, device=device)
    places = [first - memory_length + beside, own, first + layout.size + beside]
    places = [own] if not memory_length else places[: 2 if is_causal else 3]
    rank = torch.cat(places, -1)  # [B or 1, N, M + S], of encoders M + S + M
    if is_causal:
        seen = (rank >= 0)[:, :, None] & (rank[:, :, None] <= layout.rank[..., None])
        seen = seen | ~layout.real[..., None]  # a slot without a token sees all: some backends make nan of none
    else:
        seen = ((rank >= 0) & (rank < layout.total[:, None, None]))[:, :, None]
        seen = seen | ~seen.any(-1, keepdim=True)
    mask = seen.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]  # [B N, 1, W or 1, keys]

    def keys(x: torch.Tensor) -> torch.Tensor:
        parts = [_take(x if place is own else x.detach(), place, layout.total) for place in places]
        return _by_segment(torch.cat(parts, 3))

    out = F.scaled_dot_product_attention(q, keys(call.k), keys(call.v), attn_mask=mask, scale=scaling)
    return out.unflatten(0, (batch, -1)).transpose(1, 2)


def _by_segment(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, N, W, D]` as `[B N, H, W, D]`."""
    return x.transpose(1, 2).flatten(0, 1)


def gated_memory(
    local: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: SegmentLayout,
    gate: torch.Tensor,
    *,
    reducer: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float,
    sums_before: _Tensors | None = None,
    is_causal: bool = True,
) -> tuple[torch.Tensor, _Tensors]:
    """g memory + (1 - g) local, Infini-attention, arXiv:2404.07143; local alone while no segment is finished.

    Without causality the memory of a segment holds all others, those behind it too, and local stands alone in a
    sequence of one segment.

    Args:
        local: attention within the segments, by slot `[B, H, N, W, D]`.
        q, k, v: the new tokens, `[B, H, Tq, D]`.
        layout: their segments.
        gate: g, `[H]`.
        reducer: `query_mean` and `key_peak` of `bounded_key_weight`, or None for keys of equal weights.
        scaling: factor of the logits.
        sums_before: before the call, sums phi(k) [v, 1]^T over the finished segments and over the one in progress,
            `[B, H, D, D + 1]` each; None for a call that begins the sequence.
        is_causal: whether the memory holds earlier segments alone.

    Returns:
        the output by slot, and both sums after the call; none of them without causality.
    """
    dtype = accumulation_dtype(v.dtype)

    def key_features(k: torch.Tensor, own: SegmentLayout) -> torch.Tensor:
        weight = own.real[:, None, ..., None].to(dtype)
        if reducer is not None:
            weight = weight * bounded_key_weight(k.flatten(2, 3), *reducer, scaling).unflatten(2, k.shape[2:4])
        return elu_features(k)[0] * weight

    def mix(local: torch.Tensor, read: torch.Tensor, g: torch.Tensor, is_empty: torch.Tensor) -> torch.Tensor:
        g = g.to(dtype)[:, None, None, None].masked_fill(is_empty[:, None, :, None, None], 0)
        return torch.lerp(local.to(dtype), read, g).to(local.dtype)

    def step(segments: slice, parts: _Tensors, sums: _Tensors, parameters: _Tensors) -> tuple[torch.Tensor, _Tensors]:
        (local, q, k, v), own = parts, layout.part(segments)
        read, *after = memory_attention(elu_features(q)[0], key_features(k, own), v.to(dtype), own, sums)
        return mix(local, read, parameters[0], own.begin == 0), tuple(after)

    def read_others(
        segments: slice, parts: _Tensors, _: _Tensors, parameters: _Tensors
    ) -> tuple[torch.Tensor, _Tensors]:
        (local, q, others), own = parts, layout.part(segments)
        alone = (own.total <= own.size)[:, None]
        return mix(local, _read(elu_features(q)[0], others), parameters[0], alone), ()

    with torch.autocast(v.device.type, enabled=False):
        q, k, v = (layout.cut(x) for x in (q, k, v))
        if not is_causal:
            k, v = k.contiguous(), v.contiguous()  # worth a copy, as in the pieces of a scan
            others = _sums_of_others(_segment_sums(key_features(k, layout), v.to(dtype)))
            return scan(read_others, (local, q, others), (), (gate,))
        if sums_before is None:
            zero = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1] + 1, dtype=dtype)
            sums_before = zero, zero
        return scan(step, (local, q, k, v), sums_before, (gate,))


def _segment_sums(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Sums phi(k) [v, 1]^T of each segment, `[B, H, N, F, D + 1]`."""
    # Matrix products dislike a width of D + 1, and backward passes gradients of the features that lie transposed.
    return torch.cat([(v.mT @ k).mT, k.sum(-2)[..., None]], -1)


def _sums_of_others(sums: torch.Tensor) -> torch.Tensor:
    """For each segment the sums over all others: those before and those behind, not a difference of large numbers."""
    nothing = torch.zeros_like(sums[:, :, :1])
    before = torch.cat([nothing, sums[:, :, :-1]], 2).cumsum(2)
    behind = torch.cat([sums[:, :, 1:], nothing], 2).flip(2).cumsum(2).flip(2)
    return before + behind


def _read(q: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Linear attention of features `[B, H, N, W, F]` over the sums of their segment; 0 where these are 0."""
    denominator = (q * sums[..., None, :, -1]).sum(-1, keepdim=True)
    return q @ sums[..., :-1] / denominator.clamp(min=TINY)


def memory_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SegmentLayout, sums_before: _Tensors
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Linear attention over all *finished* segments before a query's own.

    Args:
        q, k: features by slot `[B, H, N, W, F]`, 0 or more; those of keys 0 in slots without a token.
        v: values by slot `[B, H, N, W, D]`.
        layout: the segments.
        sums_before: as of `gated_memory`.

    Returns:
        the output by slot `[B, H, N, W, D]`, 0 while no segment is finished, and both sums after these segments.
    """
    memory, pending = sums_before
    sums = _segment_sums(k, v)
    sums = torch.cat([sums[:, :, :1] + pending[:, :, None], sums[:, :, 1:]], 2)
    before = torch.cat([memory[:, :, None], sums[:, :, :-1]], 2).cumsum(2)
    output = _read(q, before)
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
        shared = mean_logit(k, query_mean, scaling)[..., None]
    return (shared - key_peak.to(dtype)[:, None, None]).clamp(_LEAST_WEIGHT, _MOST_WEIGHT).exp()
