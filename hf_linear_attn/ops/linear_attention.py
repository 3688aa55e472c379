"""Linear attention on tensors, o_i = phi(q_i) . sum_j w_j phi(k_j) v_j^T / (phi(q_i) . sum_j w_j phi(k_j)).

The weights are w_j = exp(a_j) with `key_log_weight` a. They are never formed: everything is kept relative to
the largest a_j that the row may see, so no key, however large, overflows or reaches an earlier row. Padded
keys are dropped from numerator and denominator alike.

Shapes: features `[B, H, T, F]`, values `[B, H, T, D]`, log weights `[B, H, T]`, key_padding bool `[B, T]`.
Sums are float32 (float64 for float64 input); the output has the dtype of `v`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.feature_maps import FeatureMap, Features, accumulation_dtype
from hf_linear_attn.ops.masking import causal_mask, query_padding, safe_masked_fill

__all__ = [
    "LOG_ZERO",
    "State",
    "bidirectional_linear_attention",
    "chunk_linear_attention",
    "feature_map_attention",
    "feature_map_attention_with_normalizer",
    "init_linear_state",
    "linear_attention",
    "naive_linear_attention",
    "recurrent_linear_attention",
]

# {"kv": [B, H, F, D], "z": [B, H, F], "log_scale": [B, H]}: sums over past keys / exp(log_scale).
State = dict[str, torch.Tensor]

LOG_ZERO = -1e30  # log weight of nothing: finite, so that differences of two of them are numbers
_CHUNK = 64  # tokens per causal chunk
# Tokens x heads x batch whose features are held at once: small enough for a CPU cache, which at long lengths
# is nearly twice as fast as whole sequences, and keeps memory small.
_CPU_BLOCK_ROWS = 6144
_BLOCK_ROWS = 1 << 19
_MIN_BLOCK = 256
_TINY = 1e-30  # smallest magnitude of a denominator

_Carry = tuple[torch.Tensor, torch.Tensor]  # sums [B, H, F, D+1] with z as last column, their log scale [B, H]


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
    key_padding: torch.Tensor | None = None,
    is_causal: bool,
    state: State | None = None,
) -> tuple[torch.Tensor, State | None]:
    """Linear attention in the form that fits the call: two matmuls, chunks, or one decode step.

    Args:
        q_features: `[B, H, Tq, F]`.
        k_features: `[B, H, Tk, F]`, finite also at padded keys.
        v: `[B, H, Tk, D]`.
        key_log_weight: `[B, H, Tk]`, log of each key's weight; None for weight 1.
        key_padding: bool `[B, Tk]`, True for a real key.
        is_causal: query row r sees keys up to position Tk - Tq + r, and the whole state.
        state: sums over earlier keys; needs is_causal and Tq == Tk.

    Returns:
        output `[B, H, Tq, D]`, 0 in rows that see no key, and the state after these keys (None if none came).

    Raises:
        ValueError: for causal attention with more queries than keys, or a state that does not fit the call.
    """

    def k_map(start: int, stop: int) -> Features:
        weight = None if key_log_weight is None else key_log_weight[:, :, start:stop]
        return k_features[:, :, start:stop], weight

    def q_map(start: int, stop: int) -> Features:
        return q_features[:, :, start:stop], None

    with _full_precision(v):
        output, _, state = _attend(q_map, k_map, q_features.shape[2], v, key_padding, is_causal, state)
    return output, state


def feature_map_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    *,
    key_padding: torch.Tensor | None = None,
    is_causal: bool,
    state: State | None = None,
) -> tuple[torch.Tensor, State | None]:
    """`linear_attention(q_map(q), k_map(k), v)` without ever holding the features of a long sequence at once.

    Args:
        q: `[B, H, Tq, D]`; k, v: `[B, H, Tk, D]`. What stands at padded tokens has no effect, be it nan.
        q_map: `x -> (features, log scale)`; the log scale cancels.
        k_map: `x -> (features, log weight [B, H, T] or None)`.
        key_padding, is_causal, state: as for `linear_attention`.
    """
    output, _, state = feature_map_attention_with_normalizer(
        q, k, v, q_map, k_map, key_padding=key_padding, is_causal=is_causal, state=state
    )
    return output, state


def feature_map_attention_with_normalizer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    *,
    key_padding: torch.Tensor | None = None,
    is_causal: bool,
    state: State | None = None,
) -> tuple[torch.Tensor, torch.Tensor, State | None]:
    """`feature_map_attention` with the log of each row's denominator, by which it can be merged with other keys.

    Returns:
        output; log denominator `[B, H, Tq]` with the query's log scale, for features whose products are positive
        (about `LOG_ZERO` in rows that see no key); and the state.
    """
    query_real = query_padding(key_padding, q.shape[2], is_causal)

    def map_queries(start: int, stop: int) -> Features:
        real = None if query_real is None else query_real[:, start:stop]
        return q_map(safe_masked_fill(q[:, :, start:stop], real))

    def map_keys(start: int, stop: int) -> Features:
        real = None if key_padding is None else key_padding[:, start:stop]
        return k_map(safe_masked_fill(k[:, :, start:stop], real))

    with _full_precision(v):
        return _attend(map_queries, map_keys, q.shape[2], v, key_padding, is_causal, state)


def naive_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    key_padding: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """The dense O(n^2) formula, reference of the other forms. Arguments as `linear_attention`."""
    dtype = accumulation_dtype(v.dtype)
    q_features, k_features, values = q_features.to(dtype), k_features.to(dtype), v.to(dtype)
    visible = torch.ones(v.shape[0], 1, q_features.shape[2], v.shape[2], dtype=torch.bool, device=v.device)
    if is_causal:
        visible = visible & causal_mask(q_features.shape[2], v.shape[2], v.device)
    if key_padding is not None:
        visible = visible & key_padding[:, None, None, :]
        values = values.masked_fill(~key_padding[:, None, :, None], 0)
    log_weight = torch.zeros_like(values[..., 0]) if key_log_weight is None else key_log_weight.to(dtype)
    log_weight = log_weight[:, :, None, :].masked_fill(~visible, LOG_ZERO)  # [B, H, Tq, Tk]
    weight = (log_weight - log_weight.amax(-1, keepdim=True)).exp().masked_fill(~visible, 0)
    scores = (q_features @ k_features.mT) * weight
    return _divide(torch.cat([scores @ values, scores.sum(-1, keepdim=True)], -1), v.dtype)


def bidirectional_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    key_padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every query sees every real key: two matmuls. Arguments as `linear_attention`."""
    return linear_attention(
        q_features, k_features, v, key_log_weight=key_log_weight, key_padding=key_padding, is_causal=False
    )[0]


def chunk_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    key_padding: torch.Tensor | None = None,
    state: State | None = None,
    chunk_size: int = _CHUNK,
) -> tuple[torch.Tensor, State]:
    """Causal attention, dense inside chunks of `chunk_size` tokens, by sums over earlier chunks beyond.

    Arguments as `linear_attention` with Tq == Tk; the state is always returned.
    """
    dtype = accumulation_dtype(v.dtype)
    if key_log_weight is None and state is not None:
        key_log_weight = torch.zeros_like(v[..., 0], dtype=dtype)
    with _full_precision(v):
        keys = _prepare_keys(v, key_log_weight, key_padding, dtype)
        carry = None if state is None else _pack(state)
        sums, _, carry = _chunk_block(q_features.to(dtype), k_features.to(dtype), *keys, carry, chunk_size)
    return _divide(sums, v.dtype), _unpack(carry)


def recurrent_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    key_padding: torch.Tensor | None = None,
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
    v1, log_weight = _prepare_keys(v, key_log_weight, key_padding, dtype)
    assert log_weight is not None
    q_features, k_features = q_features.to(dtype), k_features.to(dtype)
    carry, rows = _pack(state), []
    with _full_precision(v):
        for t in range(length):
            now = slice(t, t + 1)
            carry = _accumulate(carry, k_features[:, :, now], v1[:, :, now], log_weight[:, :, now])
            rows.append(q_features[:, :, now] @ carry[0])
    return _divide(torch.cat(rows, 2), v.dtype), _unpack(carry)


def _full_precision(x: torch.Tensor) -> AbstractContextManager[None]:
    """Autocast off: sums over thousands of tokens and exponentials do not survive half precision."""
    return torch.autocast(x.device.type, enabled=False)


def _block_size(v: torch.Tensor) -> int:
    """Tokens of a block, whole chunks."""
    rows = _CPU_BLOCK_ROWS if v.device.type == "cpu" else _BLOCK_ROWS
    return max(_MIN_BLOCK, rows // (v.shape[0] * v.shape[1]) // _CHUNK * _CHUNK)


def _attend(
    q_map: Callable[[int, int], Features],
    k_map: Callable[[int, int], Features],
    q_len: int,
    v: torch.Tensor,
    key_padding: torch.Tensor | None,
    is_causal: bool,
    state: State | None,
) -> tuple[torch.Tensor, torch.Tensor, State | None]:
    """Attention in blocks of tokens; `q_map` and `k_map` give the features of a range of positions."""
    k_len, dtype, block = v.shape[2], accumulation_dtype(v.dtype), _block_size(v)
    if is_causal and q_len > k_len:
        raise ValueError(f"Causal attention needs at least as many keys as queries, got {q_len} > {k_len}.")
    if state is not None and (not is_causal or q_len != k_len):
        raise ValueError(
            "A decode state needs causal attention over the new tokens only, got "
            f"is_causal={is_causal}, {q_len} queries and {k_len} keys."
        )

    def keys(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        features, weight = k_map(start, stop)
        if weight is None and state is not None:  # the state may hold weighted keys
            weight = torch.zeros_like(features[..., 0], dtype=dtype)
        padding = None if key_padding is None else key_padding[:, start:stop]
        return features.to(dtype), *_prepare_keys(v[:, :, start:stop], weight, padding, dtype)

    carry = None if state is None else _pack(state)
    # Keys before the first query's own position (all of them when bidirectional) are only summed.
    offset = k_len - q_len if is_causal else k_len
    for start in range(0, offset, block):
        carry = _accumulate(carry, *keys(start, min(start + block, offset)))
    outputs, normalizers = [], []
    for start in range(0, q_len, block):
        stop = min(start + block, q_len)
        queries, log_scale = q_map(start, stop)
        queries = queries.to(dtype)
        if not is_causal:
            assert carry is not None
            sums, peak = queries @ carry[0], carry[1][..., None]
        elif stop - start == 1 and carry is not None:
            carry = _accumulate(carry, *keys(offset + start, offset + stop))
            sums, peak = queries @ carry[0], carry[1][..., None]
        else:
            sums, peak, carry = _chunk_block(queries, *keys(offset + start, offset + stop), carry, _CHUNK)
        outputs.append(_divide(sums, v.dtype))
        peak = peak if log_scale is None else peak + log_scale
        normalizers.append(sums[..., -1].clamp(min=_TINY).log() + peak)
    output = outputs[0]
    if len(outputs) > 1:
        # [B, T, H, D] in memory: what the output projection reads next
        output = torch.cat([o.transpose(1, 2) for o in outputs], 1).transpose(1, 2)
    return output, torch.cat(normalizers, 2), None if state is None or carry is None else _unpack(carry)


def _prepare_keys(
    v: torch.Tensor, log_weight: torch.Tensor | None, key_padding: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values with a column of ones, whose sum is the denominator; 0 and weight nothing at padded keys."""
    v1 = F.pad(v.to(dtype), (0, 1), value=1.0)  # [B, H, T, D+1]
    if log_weight is not None:
        log_weight = log_weight.to(dtype)
    if key_padding is not None:
        v1 = v1.masked_fill(~key_padding[:, None, :, None], 0)
        if log_weight is not None:
            log_weight = log_weight.masked_fill(~key_padding[:, None, :], LOG_ZERO)
    return v1, log_weight


def _accumulate(carry: _Carry | None, k: torch.Tensor, v1: torch.Tensor, log_weight: torch.Tensor | None) -> _Carry:
    """Add keys to the sums, kept relative to the largest log weight so far (0 for unweighted keys)."""
    if log_weight is None:
        # v^T k: its long dimension is F, which suits matrix products better than D + 1
        sums = (v1.mT @ k).mT
        return (sums if carry is None else carry[0] + sums), sums.new_zeros(sums.shape[:2])
    peak = log_weight.detach().amax(-1)  # [B, H]
    if carry is not None:
        peak = torch.maximum(peak, carry[1])
    sums = ((v1 * (log_weight - peak[..., None]).exp()[..., None]).mT @ k).mT
    if carry is not None:
        sums = sums + carry[0] * (carry[1] - peak).exp()[..., None, None]
    return sums, peak


def _chunk_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v1: torch.Tensor,
    log_weight: torch.Tensor | None,
    carry: _Carry | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor, _Carry]:
    """Causal sums [B, H, T, D+1] of a block after the keys in `carry`, their log scale [B, H, T], the carry after."""
    batch, heads, length, num_features = k.shape
    size = min(chunk_size, length)
    chunks = -(-length // size)
    missing = chunks * size - length
    if missing:
        q, k, v1 = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v1))
        log_weight = None if log_weight is None else F.pad(log_weight, (0, missing), value=LOG_ZERO)
    q, k, v1 = (x.reshape(batch, heads, chunks, size, -1) for x in (q, k, v1))  # [B, H, N, C, *]
    scores = q @ k.mT  # [B, H, N, C, C]
    if log_weight is None:
        sums = scores.tril() @ v1
        states = (v1.mT @ k).mT  # [B, H, N, F, D+1]
        before = F.pad(states.cumsum(2), (0, 0, 0, 0, 1, 0))  # [B, H, N+1, F, D+1]
        if carry is not None:
            before = before + carry[0][:, :, None]
        sums = sums + q @ before[:, :, :-1]
        last: _Carry = (before[:, :, -1], before.new_zeros(batch, heads))
        return sums.reshape(batch, heads, chunks * size, -1)[:, :, :length], last[1][..., None], last

    # Running maxima: of each row, and of everything before each chunk.
    start = log_weight.new_full((batch, heads), LOG_ZERO) if carry is None else carry[1]
    row_peak = torch.maximum(log_weight.detach().cummax(-1).values, start[..., None])
    row_peak = row_peak.reshape(batch, heads, chunks, size)
    log_weight = log_weight.reshape(batch, heads, chunks, size)
    chunk_peak = row_peak[..., -1]  # [B, H, N]
    peak_before = torch.cat([start[..., None], chunk_peak[..., :-1]], -1)

    future = causal_mask(size, size, q.device).logical_not()
    weight = log_weight[..., None, :] - row_peak[..., :, None]  # at most 0 where visible
    sums = (scores * weight.masked_fill(future, LOG_ZERO).exp()) @ v1
    states = ((v1 * (log_weight - chunk_peak[..., None]).exp()[..., None]).mT @ k).mT
    # Sums before chunk c: earlier chunks rescaled from their own running maximum to that of chunk c - 1.
    earlier = torch.ones(chunks, chunks, dtype=torch.bool, device=q.device).tril(-1)
    mixing = (chunk_peak[..., None, :] - peak_before[..., :, None]).masked_fill(~earlier, LOG_ZERO).exp()
    before = (mixing @ states.flatten(3)).unflatten(3, (num_features, -1))
    if carry is not None:
        before = before + carry[0][:, :, None] * (start[..., None] - peak_before).exp()[..., None, None]
    sums = sums + (q @ before) * (peak_before[..., None] - row_peak).exp()[..., None]
    decay = (peak_before[..., -1] - chunk_peak[..., -1]).exp()[..., None, None]
    last = (before[:, :, -1] * decay + states[:, :, -1], chunk_peak[..., -1])
    return sums.reshape(batch, heads, chunks * size, -1)[:, :, :length], row_peak.flatten(2)[..., :length], last


def _divide(sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numerator over denominator, the latter kept away from 0 with its sign (Fourier features have both)."""
    numerator, denominator = sums[..., :-1], sums[..., -1:]
    tiny = torch.full_like(denominator, _TINY).copysign(denominator)
    return (numerator / torch.where(denominator.abs() < _TINY, tiny, denominator)).to(dtype)


def _pack(state: State) -> _Carry:
    return torch.cat([state["kv"], state["z"][..., None]], -1), state["log_scale"]


def _unpack(carry: _Carry) -> State:
    return {"kv": carry[0][..., :-1], "z": carry[0][..., -1], "log_scale": carry[1]}
