"""Causal linear attention that forgets: S_i = diag(exp(g_i)) S_{i-1} + w_i phi(k_i) v_i^T, z likewise.

o_i = phi(q_i) S_i / (phi(q_i) . z_i), with log-decays g <= 0 per token and head (retention, gated RFA) or per
feature too (gated linear attention). Key j reaches row i with weight w_j exp(g_{j+1} + .. + g_i): every
exponential is of such a sum of log-decays between two tokens, so none overflows however long the input.
Padded tokens neither decay nor add: a decay counts real tokens.

Shapes: features `[B, H, T, F]`, values `[B, H, T, D]`, log_decay `[B, H, T]` or `[B, H, T, F]`, key_log_weight
`[B, H, T]`, token_mask bool `[B, T]`. Sums are float32 (float64 for float64 input).
"""

from __future__ import annotations

import torch

from hf_linear_attn.ops.base.backend import use_triton
from hf_linear_attn.ops.base.masking import query_mask_of, safe_masked_fill
from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype, full_precision
from hf_linear_attn.ops.features.gradients import trains_unnamed
from hf_linear_attn.ops.features.maps import FeatureMap, Features, ParametricMap
from hf_linear_attn.ops.linear import fused
from hf_linear_attn.ops.linear.attention import init_linear_state
from hf_linear_attn.ops.linear.decay_blocks import LEAST_GIVEN, LogDecay, block_decay_attention, require_no_weight
from hf_linear_attn.ops.linear.decay_chunks import LEAST, accumulate, chunk_block, relative_to_peaks
from hf_linear_attn.ops.linear.sums import CHUNK, State, block_size, divide, pack_state, prepare_keys, unpack_state

__all__ = [
    "LogDecay",
    "chunk_decay_linear_attention",
    "decay_linear_attention",
    "feature_map_decay_attention",
    "init_decay_state",
    "recurrent_decay_linear_attention",
]


def init_decay_state(
    batch_size: int,
    num_heads: int,
    num_features: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    normalised: bool = True,
) -> State:
    """The state before any token: that of `init_linear_state`, or `{"kv": [B, H, F, D]}` without a normaliser."""
    state = init_linear_state(batch_size, num_heads, num_features, head_dim, dtype, device)
    return state if normalised else {"kv": state["kv"]}


def decay_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    is_causal: bool = True,
    normalised: bool = True,
    state: State | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    """Linear attention with decay in the form that fits the call: blocks of chunks, or one decode step.

    Args:
        q_features: `[B, H, Tq, F]`; row r stands at position Tk - Tq + r.
        k_features: `[B, H, Tk, F]`, finite also at padded keys.
        v: `[B, H, Tk, D]`.
        log_decay: `[B, H, Tk]` or `[B, H, Tk, F]`, at most 0 (-inf forgets everything): what happens to the sums
            over earlier keys when token t comes, before its own key is added.
        key_log_weight: `[B, H, Tk]`, log of each key's weight; None for weight 1.
        token_mask: bool `[B, Tk]`, True for a real token.
        is_causal: must be True.
        normalised: False gives phi(q_i) S_i as it is, and a state of S alone.
        state: sums over earlier keys (`init_decay_state`); needs Tq == Tk.
        backend: what runs it, see `ops.base.backend`.

    Returns:
        output `[B, H, Tq, D]` in v's dtype, 0 in rows that see no key, and the state after these keys (None if
        none came).

    Raises:
        ValueError: when not causal, for more queries than keys, a state that does not fit the call, or key
            weights without a normaliser.
        RuntimeError: for `backend="triton"` where the kernels cannot run.

    Sources: retention arXiv:2307.08621, gated linear attention arXiv:2312.06635.
    """
    maps = _as_they_are, _as_they_are
    given = q_features, k_features, v, log_decay, *maps, key_log_weight, token_mask, None
    return _attend(*given, is_causal, normalised, state, backend)


def _as_they_are(features: torch.Tensor) -> Features:
    return features, None


def feature_map_decay_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | LogDecay,
    q_map: FeatureMap,
    k_map: FeatureMap,
    *,
    key_log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    is_causal: bool = True,
    normalised: bool = True,
    state: State | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    """`decay_linear_attention(q_map(q), k_map(k), v, log_decay)`, with padded tokens of any content, be it nan.

    Neither the features of a long sequence nor its log-decays are held at once where they can be computed in blocks.

    Args:
        log_decay: as a tensor, or how to compute it from tokens.
        q_map: `x -> (features, log scale)`; the log scale is dropped, it cancels.
        k_map: `x -> (features, log weight [B, H, T] or None)`.
        key_log_weight: `[B, H, Tk]`, added to that of `k_map`.
    """
    query_mask = query_mask_of(token_mask, q.shape[2], is_causal)
    given = q, k, v, log_decay, q_map, k_map, key_log_weight, token_mask, query_mask
    return _attend(*given, is_causal, normalised, state, backend)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | LogDecay,
    q_map: FeatureMap,
    k_map: FeatureMap,
    key_log_weight: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    is_causal: bool,
    normalised: bool,
    state: State | None,
    backend: str,
) -> tuple[torch.Tensor, State | None]:
    """Attention by the form that fits the call: kernels, blocks of tokens, or one decode step."""
    q_len, k_len = q.shape[2], k.shape[2]
    if not is_causal:
        raise ValueError("Decay has a direction: is_causal must be True, got False.")
    if q_len > k_len:
        raise ValueError(f"Causal attention needs at least as many keys as queries, got {q_len} > {k_len}.")
    if state is not None and q_len != k_len:
        raise ValueError(f"A decode state needs as many queries as new keys, got {q_len} and {k_len}.")
    decay = log_decay if isinstance(log_decay, LogDecay) else _given(log_decay)
    triton = use_triton(backend, v)
    if not triton and 1 < q_len == k_len and not torch.compiler.is_compiling():
        gate = ParametricMap(lambda x, *parameters: (decay.function(x, *parameters), None), decay.parameters)
        # A map that trains tensors which it does not name needs autograd to find them.
        if not trains_unnamed((q_map, q), (k_map, k), (gate, decay.tokens)):
            output, after = block_decay_attention(
                q,
                k,
                v,
                decay,
                q_map,
                k_map,
                key_log_weight=key_log_weight,
                token_mask=token_mask,
                query_mask=query_mask,
                normalised=normalised,
                state=state,
            )
            return output, None if state is None else after
    q_features, _ = q_map(safe_masked_fill(q, query_mask))
    k_features, log_weight = k_map(safe_masked_fill(k, token_mask))
    if key_log_weight is not None:
        log_weight = key_log_weight if log_weight is None else log_weight + key_log_weight
    require_no_weight(normalised, log_weight)
    whole = log_decay(token_mask) if isinstance(log_decay, LogDecay) else log_decay
    if triton and use_triton(backend, v, fused.refusal(k_features.shape[-1], v, gated=whole.ndim == 4)):
        output, _, state = fused.attend(
            q_features,
            k_features,
            v,
            log_decay=whole,
            log_weight=log_weight,
            token_mask=token_mask,
            is_causal=True,
            normalised=normalised,
            state=state,
        )
        return output, state
    return _traced(q_features, k_features, v, whole, log_weight, token_mask, normalised, state)


def _given(log_decay: torch.Tensor) -> LogDecay:
    return LogDecay(lambda x: x, log_decay if log_decay.ndim == 4 else log_decay[..., None])


def _traced(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_weight: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    normalised: bool,
    state: State | None,
) -> tuple[torch.Tensor, State | None]:
    """Attention in blocks, differentiated by autograd: for traced graphs, fewer queries than keys, and decoding."""
    q_len, k_len = q_features.shape[2], k_features.shape[2]
    block, outputs = block_size(v), []
    with full_precision(v):
        carry, peak = _start(q_features, v, normalised, state)
        q = q_features.to(carry.dtype)
        k, v1, decay, peak = _prepare(k_features, v, log_decay, log_weight, token_mask, carry.dtype, normalised, peak)
        # Keys before the first query are only summed. Splits, not slices: their gradients are joined, not added up.
        sizes = [[min(block, length - i) for i in range(0, length, block)] for length in (k_len - q_len, q_len)]
        parts = list(zip(*(x.split(sizes[0] + sizes[1], 2) for x in (k, v1, decay)), strict=True))
        for keys in parts[: len(sizes[0])]:
            carry = accumulate(carry, *keys)
        for rows, (k, v1, decay) in zip(q.split(sizes[1], 2), parts[len(sizes[0]) :], strict=True):
            if q_len == 1:
                carry = accumulate(carry, k, v1, decay)
                sums = rows @ carry
            else:
                sums, carry = chunk_block(rows, k, v1, decay, carry, CHUNK)
            outputs.append(_finish(sums, v.dtype, normalised))
    output = outputs[0]
    if len(outputs) > 1:
        # [B, T, H, D] in memory: what the output projection reads next
        output = torch.cat([o.transpose(1, 2) for o in outputs], 1).transpose(1, 2)
    return output, None if state is None else _end(carry, peak, normalised)


def chunk_decay_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    normalised: bool = True,
    state: State | None = None,
    chunk_size: int = CHUNK,
) -> tuple[torch.Tensor, State]:
    """Dense inside chunks, by decayed sums over earlier chunks beyond; always returns the state.

    Arguments as `decay_linear_attention` with Tq == Tk; `chunk_size` is a power of two.
    """
    with full_precision(v):
        carry, peak = _start(q_features, v, normalised, state)
        k, v1, decay, peak = _prepare(
            k_features, v, log_decay, key_log_weight, token_mask, carry.dtype, normalised, peak
        )
        sums, carry = chunk_block(q_features.to(k.dtype), k, v1, decay, carry, chunk_size)
    return _finish(sums, v.dtype, normalised), _end(carry, peak, normalised)


def recurrent_decay_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    normalised: bool = True,
    state: State | None = None,
) -> tuple[torch.Tensor, State]:
    """One token at a time, to decode a token or a few. Arguments as `chunk_decay_linear_attention`."""
    rows = []
    with full_precision(v):
        carry, peak = _start(q_features, v, normalised, state)
        k, v1, decay, peak = _prepare(
            k_features, v, log_decay, key_log_weight, token_mask, carry.dtype, normalised, peak
        )
        for t in range(v.shape[2]):
            now = slice(t, t + 1)
            carry = accumulate(carry, k[:, :, now], v1[:, :, now], decay[:, :, now])
            rows.append(q_features[:, :, now].to(carry.dtype) @ carry)
    return _finish(torch.cat(rows, 2), v.dtype, normalised), _end(carry, peak, normalised)


def _start(
    q: torch.Tensor, v: torch.Tensor, normalised: bool, state: State | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sums before the call, z as last column, and their log scale; None for sums without one."""
    if state is not None:
        if not normalised:
            return state["kv"], None
        carry, peak = pack_state(state)
        return carry.masked_fill((peak <= LOG_ZERO / 2)[..., None, None], 0), peak
    columns = v.shape[-1] + int(normalised)
    return q.new_zeros(*q.shape[:2], q.shape[-1], columns, dtype=accumulation_dtype(v.dtype)), None


def _end(carry: torch.Tensor, peak: torch.Tensor | None, normalised: bool) -> State:
    if not normalised:
        return {"kv": carry}
    return unpack_state((carry, carry.new_zeros(carry.shape[:2]) if peak is None else peak))


def _finish(sums: torch.Tensor, dtype: torch.dtype, normalised: bool) -> torch.Tensor:
    return divide(sums, dtype) if normalised else sums.to(dtype)


def _prepare(
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    log_weight: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    dtype: torch.dtype,
    normalised: bool,
    peak: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys, weighted values (with a column of ones if normalised), log-decays `[B, H, T, F or 1]`, last log scale.

    Weights and log-decays are relative to a peak where there are weights, see `relative_to_peaks`.
    """
    decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    decay = safe_masked_fill(decay.to(dtype), token_mask).clamp(min=LEAST_GIVEN)
    k = k.to(dtype)
    if not normalised:
        return k, safe_masked_fill(v.to(dtype), token_mask), decay.clamp(min=LEAST), None
    if log_weight is None and peak is not None:  # the state may hold weighted keys
        log_weight = torch.zeros_like(v[..., 0], dtype=dtype)
    v1, log_weight = prepare_keys(v, log_weight, token_mask, dtype)
    if log_weight is None:
        return k, v1, decay.clamp(min=LEAST), None
    start = log_weight.new_full(log_weight.shape[:2], LOG_ZERO) if peak is None else peak
    weight, shift, peak = relative_to_peaks(log_weight, decay, start)
    return k, v1 * weight[..., None], (decay + shift[..., None]).clamp(min=LEAST), peak
