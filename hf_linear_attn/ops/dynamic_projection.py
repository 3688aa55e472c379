"""Landmarks pooled from keys and values with weights that the keys decide, Long-Short Transformer (arXiv:2107.02192).

A landmark is (sum_i p_i k_i, sum_i p_i v_i), p = softmax over positions of k . w. When p estimates how some query
weighs the keys, log sum_i exp(s q . k_i) >= s q . (sum_i p_i k_i) + H(p) with equality for that query (the
tangent of a convex function): so the entropy H(p), log n for equal weights, is what the landmark's logit lacks to
stand for all of its tokens. It travels as one more channel of queries and keys, which fused attention takes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.compaction import take_tokens

__all__ = [
    "attend_window_and_segments",
    "merge_segments",
    "pool_landmarks",
    "pool_segments",
    "with_channel",
]

BLOCK = 256  # queries that share one attention call


def with_channel(x: torch.Tensor, channel: torch.Tensor | float) -> torch.Tensor:
    """`x` `[..., D]` with one more channel, a number or `[...]`."""
    if isinstance(channel, torch.Tensor):
        return torch.cat([x, channel[..., None].to(x.dtype)], -1)
    return F.pad(x, (0, 1), value=channel)


def pool_landmarks(
    k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Landmarks over all tokens of the second-last dimension.

    Args:
        k: `[..., T, D]`, and `v` likewise.
        weight: `[..., D, r]`.
        allowed: bool, broadcastable to `[..., T, r]`: the tokens of each landmark; None for all.

    Returns:
        keys and values `[..., r, D]`, and the entropies `[..., r]`, float32 at least; a landmark without any token
        is a mean of all of them.
    """
    logits = k @ weight.to(k.dtype)  # [..., T, r]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if allowed is not None:
        # The finite fill keeps gradients finite where nothing is allowed.
        logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    p = logits.softmax(-2)
    cross = (p * (logits if allowed is None else logits.masked_fill(~allowed, 0))).sum(-2)
    entropy = (logits.logsumexp(-2) - cross).clamp(min=0, max=math.log(max(k.shape[-2], 1)))
    p = p.to(k.dtype).transpose(-1, -2)
    return p @ k, p @ v, entropy


def pool_segments(
    k: torch.Tensor,
    v: torch.Tensor,
    rank: torch.Tensor,
    weight: torch.Tensor,
    first: torch.Tensor,
    count: int,
    segment_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The landmarks of `count` segments of c tokens; those that are not complete come out as something finite.

    Args:
        k: `[B, H, Tk, D]` with padding in front, and `v` likewise.
        rank: long `[B or 1, Tk]`, rank of each key.
        weight: `[H, D, r]`.
        first: long `[B or 1]`, the first of the segments; segment s holds ranks s c .. s c + c - 1.
        count: segments.
        segment_size: c.

    Returns:
        as `pool_landmarks`, `[B, H, count * r, D]` twice and `[B, H, count * r]`.
    """
    place = torch.arange(count * segment_size, device=k.device) + first[:, None] * segment_size - rank[:, :1]
    place = place.clamp(0, k.shape[2] - 1).expand(k.shape[0], -1)
    k, v = (take_tokens(x, place).unflatten(2, (count, segment_size)) for x in (k, v))  # [B, H, count, c, D]
    keys, values, entropy = pool_landmarks(k, v, weight[:, None])
    return keys.flatten(2, 3), values.flatten(2, 3), entropy.flatten(2)


def merge_segments(
    old: torch.Tensor, new: torch.Tensor, complete: torch.Tensor, num_slots: int, per_segment: int
) -> torch.Tensor:
    """Landmarks of all segments so far, each batch row's new ones behind its own complete ones.

    Args:
        old: `[B, H, S * r, D]`, what earlier calls left.
        new: `[B, H, count * r, D]`.
        complete: long `[B]`, complete segments in `old`.
        num_slots: segments to return.
        per_segment: r.

    Returns:
        `[B, H, num_slots * r, D]`.
    """
    slots = torch.arange(num_slots * per_segment, device=old.device)
    kept = complete[:, None] * per_segment
    index = torch.where(slots < kept, slots, slots - kept + old.shape[2])
    return take_tokens(torch.cat([old, new], 2), index.clamp(max=old.shape[2] + new.shape[2] - 1))


def attend_window_and_segments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rank: torch.Tensor,
    landmarks: tuple[torch.Tensor, torch.Tensor],
    *,
    window_size: int,
    segment_size: int,
    per_segment: int,
    scaling: float,
    from_start: bool,
) -> torch.Tensor:
    """Causal softmax attention over a window and the landmarks of segments that ended before the query's own.

    The queries are the last Tq places. Time Tq (w + n r / c) D: the landmarks grow with the length, though c / r times
    slower; memory is proportional to the length.

    Args:
        q: `[B, H, Tq, D]`.
        k: `[B, H, Tk, D]`, padding in front, and `v` likewise.
        rank: long `[B or 1, Tk]`, rank of each key, negative for padding.
        landmarks: keys and values `[B, H, S * r, D]` of segments 0 .. S - 1.
        window_size: w, a query sees itself and w - 1 tokens before.
        segment_size: c.
        per_segment: r.
        scaling: factor of the logits.
        from_start: whether place 0 is rank 0 or padding, so that a place is never below its rank.

    Returns:
        `[B, H, Tq, D]`, 0 in rows of padding.
    """
    offset = k.shape[2] - q.shape[2]
    outputs = []
    for begin in range(offset, k.shape[2], BLOCK):
        end = min(begin + BLOCK, k.shape[2])
        start = max(begin - window_size + 1, 0)
        # Landmarks after the last that this block may see are left out where that is known without reading ranks.
        seen = min((end - 1) // segment_size * per_segment, landmarks[0].shape[2]) if from_start else None
        keys, values = (torch.cat([x[:, :, start:end], y[:, :, :seen]], 2) for x, y in zip((k, v), landmarks))
        query_rank, key_rank = rank[:, begin:end, None], rank[:, None, start:end]
        distance = query_rank - key_rank
        window = (distance >= 0) & (distance < window_size) & (key_rank >= 0)
        segment = torch.arange(keys.shape[2] - window.shape[2], device=q.device) // per_segment
        past = segment < query_rank.div(segment_size, rounding_mode="floor")
        mask = torch.cat([window, past], -1)  # [B or 1, block, keys]
        dead = query_rank < 0
        out = F.scaled_dot_product_attention(
            q[:, :, begin - offset : end - offset],
            keys,
            values,
            attn_mask=(mask | dead)[:, None].expand(q.shape[0], -1, -1, -1),
            scale=scaling,
        )
        outputs.append(out.masked_fill(dead[:, None], 0))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
