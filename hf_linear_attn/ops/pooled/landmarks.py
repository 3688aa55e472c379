"""Landmarks pooled from keys and values with weights that the keys decide, Long-Short Transformer (arXiv:2107.02192).

A landmark is (sum_i p_i k_i, sum_i p_i v_i), p = softmax over positions of k . w. When p estimates how some query
weighs the keys, log sum_i exp(s q . k_i) >= s q . (sum_i p_i k_i) + H(p) with equality for that query (the
tangent of a convex function): so the entropy H(p), log n for equal weights, is what the landmark's logit lacks to
stand for all of its tokens. It travels as one more channel of queries and keys, which fused attention takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from hf_linear_attn.ops.base.compaction import CompactedCall, take_tokens, window_state_after
from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype
from hf_linear_attn.ops.base.pieces import Piece, attend_pieces, serves
from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.ops.pooled.landmark_blocks import gated_norm, norm_by_blocks, pool_by_blocks
from hf_linear_attn.ops.pooled.pooling import even_segment_starts, segment_of_rank

__all__ = [
    "GatedNorm",
    "attend_window_and_segments",
    "pool_landmarks",
    "pool_segments",
    "pool_sequence",
    "with_channel",
]

BLOCK = 64  # queries that share one attention call (measured on CPU)


# Keys and values `[B, H, landmarks, D]`, and what the logits lack to stand for all pooled tokens `[B, H, landmarks]`.
Pooled = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def with_channel(x: torch.Tensor, channel: torch.Tensor | float) -> torch.Tensor:
    """`x` `[..., D]` with one more channel, a number or `[...]`."""
    if isinstance(channel, torch.Tensor):
        return torch.cat([x, channel[..., None].to(x.dtype)], -1)
    return F.pad(x, (0, 1), value=channel)


class GatedNorm(nn.Module):
    """x + gate (LN(x) - x) on `[B, H, T, D]`, one gate and one LayerNorm a head.

    Its owner calls `reset_parameters`: only that one knows where the gate starts.
    """

    def __init__(self, num_heads: int, dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_heads))
        self.weight = nn.Parameter(torch.empty(num_heads, dim))
        self.bias = nn.Parameter(torch.empty(num_heads, dim))

    @torch.no_grad()
    def reset_parameters(self, gate: float) -> None:
        """A plain LayerNorm behind a gate at `gate`."""
        self.gate.fill_(gate)
        self.weight.fill_(1.0)
        self.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and not is_exported():
            return norm_by_blocks(x, self.gate, self.weight, self.bias)
        return gated_norm(x, self.gate[:, None, None], self.weight[:, None], self.bias[:, None])


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
    dtype = torch.promote_types(k.dtype, torch.float32)
    with torch.autocast(k.device.type, enabled=False):
        keys = k.to(dtype)
        logits = keys @ weight.to(dtype)  # [..., T, r]
        if allowed is not None:
            logits = logits.masked_fill(~allowed, LOG_ZERO)
        p = logits.softmax(-2)
        entropy = (logits.logsumexp(-2) - (p * logits).sum(-2)).clamp(min=0)
        if not is_exported():  # but for rounding it is never more
            entropy = entropy.clamp(max=math.log(max(k.shape[-2], 1)))
        p = p.transpose(-1, -2)
        return (p @ keys).to(k.dtype), (p @ v.to(dtype)).to(v.dtype), entropy


def pool_sequence(
    k: torch.Tensor, v: torch.Tensor, rank: torch.Tensor, weight: torch.Tensor, segmented: torch.Tensor
) -> tuple[Pooled, torch.Tensor]:
    """Landmarks of a whole sequence, pooled from all of its tokens or from an even segment each.

    Args:
        k: `[B, H, T, D]`, 0 at padding, and `v` likewise.
        rank: long `[B or 1, T]`, rank of each key, negative for padding; the last place has the highest.
        weight: `[H, D, r]`.
        segmented: bool `[H]`, the heads whose landmarks pool a segment each.

    Returns:
        keys and values `[B, H, r, D]` with what their logits lack, `[B, H, r]`: the entropy, less log r where r
        landmarks share the same tokens; and the landmarks in use, bool `[B or 1, r]`: at most one a token.
    """
    n_real, landmarks = rank[:, -1] + 1, torch.arange(weight.shape[-1], device=k.device)
    used = n_real.clamp(1, len(landmarks))[:, None]
    places = rank.masked_fill(rank < 0, k.shape[2])
    segment = segment_of_rank(even_segment_starts(n_real, len(landmarks)), k.shape[2], places)
    own, real = segment[:, None, :, None] == landmarks, (rank >= 0)[:, None, :, None]
    cut = segmented[:, None, None]
    # [B or 1, H, T, r]; onnxruntime has no `where` of bools
    allowed = (own & cut) | (real & ~cut) if is_exported() else torch.where(cut, own, real)
    pool = pool_by_blocks if k.device.type == "cpu" and not is_exported() else pool_landmarks
    keys, values, entropy = pool(k, v, weight, allowed)
    shared = used.to(entropy.dtype).log().masked_fill(segmented, 0)  # [B or 1, H]
    return (keys, values, entropy - shared[..., None]), landmarks < used


def pool_segments(
    call: CompactedCall,
    weight: torch.Tensor,
    *,
    segment_size: int,
    window_size: int,
    state: dict[str, torch.Tensor] | None,
) -> tuple[Pooled, dict[str, torch.Tensor]]:
    """Landmarks of all complete segments so far; segment s holds ranks s c .. s c + c - 1.

    Args:
        call: the call, behind the window that `state` holds.
        weight: `[H, D, r]`.
        segment_size: c, at most window_size.
        window_size: w.
        state: what the last call returned, or None when no cache is in use.

    Returns:
        keys and values `[B, H, S * r, D]` with what their logits lack, `[B, H, S * r]`, the entropies less log r; and
        the state, a window with `landmark_key` (the lack in its last channel) and `landmark_value`, or {} without one.
        Segments that a row has not completed are something finite.
    """
    B, _, k_len, _ = call.k.shape
    c, r = segment_size, weight.shape[-1]
    # Those that this call may complete, one more than all tokens new to it can fill when some were held before.
    count = k_len // c if state is None else (call.q.shape[2] + c - 1) // c
    complete = call.past.div(c, rounding_mode="floor")
    place = torch.arange(count * c, device=call.k.device) + complete[:, None] * c - call.rank[:, :1]
    place = place.clamp(0, k_len - 1).expand(B, -1)
    k, v = (take_tokens(x, place).unflatten(2, (count, c)) for x in (call.k, call.v))  # [B, H, count, c, D]
    k, v, lack = (x.flatten(2, 3) for x in pool_landmarks(k, v, weight[:, None]))
    lack = lack - math.log(r)
    if state is None:
        return (k, v, lack), {}
    # The state keeps a window of w - 1 tokens and as many more as came since the last multiple of c, padding
    # included: with that every row agrees on the number of segments, and none is read from the device.
    since = state["key"].shape[2] - (window_size - 1) + call.q.shape[2]
    slots = torch.arange(state["landmark_key"].shape[2] + since // c * r, device=k.device)
    kept = complete[:, None] * r
    index = torch.where(slots < kept, slots, slots - kept + state["landmark_key"].shape[2])
    new = {"landmark_key": with_channel(k, lack), "landmark_value": v}
    merged = {name: torch.cat([state[name].to(x.dtype), x], 2) for name, x in new.items()}
    merged = {name: take_tokens(x, index.clamp(max=x.shape[2] - 1)) for name, x in merged.items()}
    k, lack = merged["landmark_key"][..., :-1], merged["landmark_key"][..., -1]
    after = window_state_after(call, window_size - 1 + since % c, state["key"].dtype)
    after |= {name: x.to(state[name].dtype).contiguous() for name, x in merged.items()}
    return (k, merged["landmark_value"], lack), after


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
    sizes = window_size, segment_size, per_segment, from_start
    if serves(q, v):
        given = q.transpose(1, 2), k, v, *landmarks, rank
        out = attend_pieces(partial(_Segments, sizes), *given, scaling=scaling, may_be_blind=False).transpose(1, 2)
    else:
        parts = []
        for rows, start, seen, mask in _blocks(q.shape[2], k.shape[2], landmarks[0].shape[2], rank, sizes):
            end = start + mask.shape[-1] - seen
            keys, values = (
                torch.cat([x[:, :, start:end], y[:, :, :seen]], 2) for x, y in zip((k, v), landmarks, strict=True)
            )
            mask = mask[:, None].expand(q.shape[0], -1, -1, -1)
            parts.append(F.scaled_dot_product_attention(q[:, :, rows], keys, values, attn_mask=mask, scale=scaling))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return out.masked_fill((rank[:, k.shape[2] - q.shape[2] :] < 0)[:, None, :, None], 0)


def _blocks(
    q_len: int, k_len: int, landmarks: int, rank: torch.Tensor, sizes: tuple[int, int, int, bool]
) -> Iterator[tuple[slice, int, int, torch.Tensor]]:
    """The blocks of queries: their rows, the first key of their windows, how many landmarks are in reach, and what
    they see of these keys and landmarks, bool `[B or 1, rows, keys + landmarks]`; rows of padding see everything.
    """
    window_size, segment_size, per_segment, from_start = sizes
    offset = k_len - q_len
    for begin in range(offset, k_len, BLOCK):
        end = min(begin + BLOCK, k_len)
        start = max(begin - window_size + 1, 0)
        # Landmarks after the last that this block may see are left out where that is known without reading ranks.
        seen = min((end - 1) // segment_size * per_segment, landmarks) if from_start else landmarks
        query_rank, key_rank = rank[:, begin:end, None], rank[:, None, start:end]
        distance = query_rank - key_rank
        window = (distance >= 0) & (distance < window_size) & (key_rank >= 0)
        segment = torch.arange(seen, device=rank.device) // per_segment
        past = segment < query_rank.div(segment_size, rounding_mode="floor")
        yield slice(begin - offset, end - offset), start, seen, torch.cat([window, past], -1) | (query_rank < 0)


class _Segments:
    """Blocks of queries `[B, Tq, H, D]`, with keys, values and landmarks `[B, H, T, D]` and ranks `[B or 1, Tk]`."""

    def __init__(self, sizes: tuple[int, int, int, bool], q: torch.Tensor, *tensors: torch.Tensor) -> None:
        self.sizes, self.q = sizes, q
        *self.tensors, self.rank = tensors

    def __iter__(self) -> Iterator[Piece]:
        k, _, marks, _ = self.tensors
        for block in _blocks(self.q.shape[1], k.shape[2], marks.shape[2], self.rank, self.sizes):
            yield _Block(self, *block)

    def zero_gradients(self) -> None:
        self.grads = [torch.zeros_like(x) for x in self.tensors]

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(self.grads)


class _Block(Piece):
    """A block of queries over keys from `start` on and the first `seen` landmarks, which come last."""

    def __init__(self, of: _Segments, queries: slice, start: int, seen: int, mask: torch.Tensor) -> None:
        self.of, self.tokens, self.seen, self.mask = of, queries, seen, mask
        self.window = slice(start, start + mask.shape[-1] - seen)

    def rows(self, x: torch.Tensor, fill: float | None = None) -> torch.Tensor:
        return x[:, self.tokens].transpose(1, 2)

    def place(self, total: torch.Tensor, x: torch.Tensor) -> None:
        total[:, self.tokens] = x.transpose(1, 2)

    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        k, v, *marks = self.of.tensors
        keys, values = (
            torch.cat([x[:, :, self.window], y[:, :, : self.seen]], 2) for x, y in zip((k, v), marks, strict=True)
        )
        return keys, values

    def add(self, part: slice, d_keys: torch.Tensor, d_values: torch.Tensor) -> None:
        width = self.mask.shape[-1] - self.seen
        for total, more, x in zip(self.of.grads[:2], self.of.grads[2:], (d_keys, d_values), strict=True):
            total[:, :, self.window].add_(x[:, :, :width])
            more[:, :, : self.seen].add_(x[:, :, width:])

    def bias(self) -> torch.Tensor:
        """`[B, 1, rows, keys + landmarks]`."""
        bias = self.mask.to(accumulation_dtype(self.of.q.dtype)).sub_(1).mul_(-LOG_ZERO)
        return bias[:, None].expand(len(self.of.q), -1, -1, -1)
