"""Linear attention on tensors, o_i = phi(q_i) . sum_j w_j phi(k_j) v_j^T / (phi(q_i) . sum_j w_j phi(k_j)).

The weights are w_j = exp(a_j) with `key_log_weight` a. They are never formed: everything is kept relative to
the largest a_j that the row may see, so no key, however large, overflows or reaches an earlier row. Padded
keys are dropped from numerator and denominator alike.

Shapes: features `[B, H, T, F]`, values `[B, H, T, D]`, log weights `[B, H, T]`, token_mask bool `[B, T]`.
Sums are float32 (float64 for float64 input); the output has the dtype of `v`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_linear_attn.ops.base.backend import use_triton
from hf_linear_attn.ops.base.masking import query_mask_of, safe_masked_fill
from hf_linear_attn.ops.base.numerics import LOG_ZERO, TINY, accumulation_dtype, full_precision
from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.ops.features.gradients import trains_unnamed
from hf_linear_attn.ops.features.maps import FeatureMap, Features, ScaledMap
from hf_linear_attn.ops.linear import fused
from hf_linear_attn.ops.linear.blocks import block_linear_attention
from hf_linear_attn.ops.linear.sums import (
    CHUNK,
    State,
    accumulate,
    block_size,
    chunk_block,
    divide,
    pack_state,
    prepare_keys,
    unpack_state,
)

__all__ = [
    "LOG_ZERO",
    "State",
    "bidirectional_linear_attention",
    "chunk_linear_attention",
    "feature_map_attention",
    "feature_map_attention_with_normalizer",
    "init_linear_state",
    "linear_attention",
    "recurrent_linear_attention",
]


def init_linear_state(
    batch_size: int,
    num_heads: int,
    num_features: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> State:
    """The state before any token; float32 unless `dtype` is float64."""
    dtype = accumulation_dtype(dtype)
    return {
        "kv": torch.zeros(batch_size, num_heads, num_features, head_dim, dtype=dtype, device=device),
        "z": torch.zeros(batch_size, num_heads, num_features, dtype=dtype, device=device),
        "log_scale": torch.full((batch_size, num_heads), LOG_ZERO, dtype=dtype, device=device),
    }


def linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    is_causal: bool,
    state: State | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    """Linear attention in the form that fits the call: two matmuls, chunks, or one decode step.

    Args:
        q_features: `[B, H, Tq, F]`.
        k_features: `[B, H, Tk, F]`, finite also at padded keys.
        v: `[B, H, Tk, D]`.
        key_log_weight: `[B, H, Tk]`, log of each key's weight; None for weight 1.
        token_mask: bool `[B, Tk]`, True for a real key.
        is_causal: query row r sees keys up to position Tk - Tq + r, and the whole state.
        state: sums over earlier keys; needs is_causal and Tq == Tk.
        backend: what runs it, see `ops.base.backend`.

    Returns:
        output `[B, H, Tq, D]`, 0 in rows that see no key, and the state after these keys (None if none came).

    Raises:
        ValueError: for causal attention with more queries than keys, or a state that does not fit the call.
        RuntimeError: for `backend="triton"` where the kernels cannot run.
    """
    maps = _as_they_are, _as_they_are
    return _attend(q_features, k_features, v, *maps, key_log_weight, token_mask, None, is_causal, state, backend)[::2]


def feature_map_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    *,
    token_mask: torch.Tensor | None = None,
    is_causal: bool,
    state: State | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    """`linear_attention(q_map(q), k_map(k), v)` without ever holding the features of a long sequence at once.

    Args:
        q: `[B, H, Tq, D]`; k, v: `[B, H, Tk, D]`. What stands at padded tokens has no effect, be it nan.
        q_map: `x -> (features, log scale)`; the log scale cancels.
        k_map: `x -> (features, log weight [B, H, T] or None)`.
        token_mask, is_causal, state, backend: as for `linear_attention`.
    """
    output, _, state = feature_map_attention_with_normalizer(
        q, k, v, q_map, k_map, token_mask=token_mask, is_causal=is_causal, state=state, backend=backend
    )
    return output, state


def feature_map_attention_with_normalizer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    *,
    token_mask: torch.Tensor | None = None,
    is_causal: bool,
    state: State | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, State | None]:
    """`feature_map_attention` with the log of each row's denominator, by which it can be merged with other keys.

    Returns:
        output; log denominator `[B, H, Tq]` with the query's log scale, for features whose products are positive
        (about `LOG_ZERO` in rows that see no key); and the state.
    """
    query_mask = query_mask_of(token_mask, q.shape[2], is_causal)
    return _attend(q, k, v, q_map, k_map, None, token_mask, query_mask, is_causal, state, backend)


def _as_they_are(features: torch.Tensor) -> Features:
    return features, None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    log_weight: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    is_causal: bool,
    state: State | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, State | None]:
    """Attention by the form that fits the call: kernels, or blocks of tokens."""
    q_len, k_len = q.shape[2], v.shape[2]
    if is_causal and q_len > k_len:
        raise ValueError(f"Causal attention needs at least as many keys as queries, got {q_len} > {k_len}.")
    if state is not None and (not is_causal or q_len != k_len):
        raise ValueError(
            "A decode state needs causal attention over the new tokens only, got "
            f"is_causal={is_causal}, {q_len} queries and {k_len} keys."
        )
    if use_triton(backend, v):
        found = _attend_fused(q, k, v, q_map, k_map, log_weight, token_mask, query_mask, is_causal, state, backend)
        if found is not None:
            return found
    # A traced graph has no reentrant backward, a decode step no use for one, and a map that trains tensors which it
    # does not name needs autograd to find them.
    if q_len > 1 and not torch.compiler.is_compiling() and not trains_unnamed((q_map, q), (k_map, k)):
        output, normalizer, after = block_linear_attention(
            q,
            k,
            v,
            q_map,
            k_map,
            log_weight=log_weight,
            token_mask=token_mask,
            query_mask=query_mask,
            is_causal=is_causal,
            state=state,
        )
        return output, normalizer, None if state is None else after

    def map_queries(start: int, stop: int) -> Features:
        real = None if query_mask is None else query_mask[:, start:stop]
        return q_map(safe_masked_fill(q[:, :, start:stop], real))

    def map_keys(start: int, stop: int) -> Features:
        real = None if token_mask is None else token_mask[:, start:stop]
        features, weight = k_map(safe_masked_fill(k[:, :, start:stop], real))
        if log_weight is not None:
            weight = log_weight[:, :, start:stop] if weight is None else weight + log_weight[:, :, start:stop]
        return features, weight

    with full_precision(v):
        return _traced(map_queries, map_keys, q_len, v, token_mask, is_causal, state)


def _attend_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    log_weight: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    is_causal: bool,
    state: State | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, State | None] | None:
    """Attention by the Triton kernels; None for features that they do not take."""
    call: dict[str, Any] = {"token_mask": token_mask, "query_mask": query_mask, "is_causal": is_causal, "state": state}
    if isinstance(q_map, ScaledMap) and isinstance(k_map, ScaledMap) and k_map.name in fused.MAPS:
        if not use_triton(backend, v, fused.refusal(q.shape[-1], v)):
            return None
        call |= {"feature_map": k_map.name, "multipliers": (q_map.multiplier, k_map.multiplier)}
        return fused.attend(q, k, v, log_weight=k_map.log_weight(k), **call)
    k_features, weight = fused.map_features(k_map, safe_masked_fill(k, token_mask))
    if not use_triton(backend, v, fused.refusal(k_features.shape[-1], v)):
        return None
    q_features, log_scale = fused.map_features(q_map, safe_masked_fill(q, query_mask))
    if log_weight is not None:
        weight = log_weight if weight is None else weight + log_weight
    output, normalizer, state = fused.attend(q_features, k_features, v, log_weight=weight, **call)
    return output, normalizer if log_scale is None else normalizer + log_scale, state


def bidirectional_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Every query sees every real key: two matmuls. Arguments as `linear_attention`."""
    return linear_attention(
        *(q_features, k_features, v),
        key_log_weight=key_log_weight,
        token_mask=token_mask,
        is_causal=False,
        backend=backend,
    )[0]


def chunk_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    state: State | None = None,
    chunk_size: int = CHUNK,
) -> tuple[torch.Tensor, State]:
    """Causal attention, dense inside chunks of `chunk_size` tokens, by sums over earlier chunks beyond.

    Arguments as `linear_attention` with Tq == Tk; the state is always returned.
    """
    dtype = accumulation_dtype(v.dtype)
    if key_log_weight is None and state is not None:
        key_log_weight = torch.zeros_like(v[..., 0], dtype=dtype)
    with full_precision(v):
        keys = prepare_keys(v, key_log_weight, token_mask, dtype)
        carry = None if state is None else pack_state(state)
        sums, _, carry = chunk_block(q_features.to(dtype), k_features.to(dtype), *keys, carry, chunk_size)
    return divide(sums, v.dtype), unpack_state(carry)


def recurrent_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    state: State | None = None,
) -> tuple[torch.Tensor, State]:
    """Causal attention one token at a time, to decode a token or a few; longer input is for chunks.

    Arguments as `chunk_linear_attention`.
    """
    dtype = accumulation_dtype(v.dtype)
    batch, heads, length, dim = v.shape
    if state is None:
        state = init_linear_state(batch, heads, q_features.shape[-1], dim, dtype, v.device)
    if key_log_weight is None:
        key_log_weight = torch.zeros_like(v[..., 0], dtype=dtype)
    v1, log_weight = prepare_keys(v, key_log_weight, token_mask, dtype)
    assert log_weight is not None
    q_features, k_features = q_features.to(dtype), k_features.to(dtype)
    carry, rows = pack_state(state), []
    with full_precision(v):
        for t in range(length):
            now = slice(t, t + 1)
            carry = accumulate(carry, k_features[:, :, now], v1[:, :, now], log_weight[:, :, now])
            rows.append(q_features[:, :, now] @ carry[0])
    return divide(torch.cat(rows, 2), v.dtype), unpack_state(carry)


def _traced(
    q_map: Callable[[int, int], Features],
    k_map: Callable[[int, int], Features],
    q_len: int,
    v: torch.Tensor,
    token_mask: torch.Tensor | None,
    is_causal: bool,
    state: State | None,
) -> tuple[torch.Tensor, torch.Tensor, State | None]:
    """Attention in blocks, differentiated by autograd; `q_map` and `k_map` give features of a range of positions."""
    k_len, dtype = v.shape[2], accumulation_dtype(v.dtype)

    def keys(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        features, weight = k_map(start, stop)
        if weight is None and state is not None:  # the state may hold weighted keys
            weight = torch.zeros_like(features[..., 0], dtype=dtype)
        padding = None if token_mask is None else token_mask[:, start:stop]
        return features.to(dtype), *prepare_keys(v[:, :, start:stop], weight, padding, dtype)

    carry = None if state is None else pack_state(state)
    if is_exported() and not is_causal:  # in one piece: no block depends on the length
        carry = accumulate(None, *keys(0, k_len))
        queries, log_scale = q_map(0, q_len)
        sums, peak = queries.to(dtype) @ carry[0], carry[1][..., None]
        peak = peak if log_scale is None else peak + log_scale
        return divide(sums, v.dtype), sums[..., -1].clamp(min=TINY).log() + peak, None
    block = block_size(v)
    # Keys before the first query's own position (all of them when bidirectional) are only summed.
    offset = k_len - q_len if is_causal else k_len
    for start in range(0, offset, block):
        carry = accumulate(carry, *keys(start, min(start + block, offset)))
    outputs, normalizers = [], []
    for start in range(0, q_len, block):
        stop = min(start + block, q_len)
        queries, log_scale = q_map(start, stop)
        queries = queries.to(dtype)
        if not is_causal:
            assert carry is not None
            sums, peak = queries @ carry[0], carry[1][..., None]
        elif stop - start == 1 and carry is not None:
            carry = accumulate(carry, *keys(offset + start, offset + stop))
            sums, peak = queries @ carry[0], carry[1][..., None]
        else:
            sums, peak, carry = chunk_block(queries, *keys(offset + start, offset + stop), carry, CHUNK)
        outputs.append(divide(sums, v.dtype))
        peak = peak if log_scale is None else peak + log_scale
        normalizers.append(sums[..., -1].clamp(min=TINY).log() + peak)
    output = outputs[0]
    if len(outputs) > 1:
        # [B, T, H, D] in memory: what the output projection reads next
        output = torch.cat([o.transpose(1, 2) for o in outputs], 1).transpose(1, 2)
    return output, torch.cat(normalizers, 2), None if state is None or carry is None else unpack_state(carry)
