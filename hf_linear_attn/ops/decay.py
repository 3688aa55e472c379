"""Causal linear attention that forgets: S_i = diag(exp(g_i)) S_{i-1} + w_i phi(k_i) v_i^T, z likewise.

o_i = phi(q_i) S_i / (phi(q_i) . z_i), with log-decays g <= 0 per token and head (retention, gated RFA) or per
feature too (gated linear attention). Key j reaches row i with weight w_j exp(g_{j+1} + .. + g_i): every
exponential is of such a sum of log-decays between two tokens, so none overflows however long the input.
Padded tokens neither decay nor add: a decay counts real tokens.

Shapes: features `[B, H, T, F]`, values `[B, H, T, D]`, log_decay `[B, H, T]` or `[B, H, T, F]`, key_log_weight
`[B, H, T]`, key_padding bool `[B, T]`. Sums are float32 (float64 for float64 input).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hf_linear_attn.ops import fused_linear_attention
from hf_linear_attn.ops.backend import use_triton
from hf_linear_attn.ops.feature_maps import FeatureMap, accumulation_dtype
from hf_linear_attn.ops.linear_attention import init_linear_state
from hf_linear_attn.ops.linear_sums import (
    LOG_ZERO,
    State,
    block_size,
    divide,
    full_precision,
    pack_state,
    prepare_keys,
    unpack_state,
)
from hf_linear_attn.ops.masking import query_padding, safe_masked_fill

__all__ = [
    "chunk_decay_linear_attention",
    "decay_linear_attention",
    "feature_map_decay_attention",
    "init_decay_state",
    "naive_decay_linear_attention",
    "recurrent_decay_linear_attention",
]

_CHUNK = 64  # tokens per chunk
_LEAST_GIVEN = -1e4  # log-decay in place of -inf: finite, so that sums and differences are numbers
# Log-decay, relative to the scale of the sums, below which nothing is left of them even in float64. A bound
# keeps the running sums inside a chunk small, and so their differences accurate.
_LEAST = -120.0
# What a chunk may decay in all, in each feature, to be computed with one split for all its pairs of tokens: e^20 and
# e^-20 are the largest and smallest factors.
_MOST_IN_CHUNK = 40.0


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
    key_padding: torch.Tensor | None = None,
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
        key_padding: bool `[B, Tk]`, True for a real token.
        is_causal: must be True.
        normalised: False gives phi(q_i) S_i as it is, and a state of S alone.
        state: sums over earlier keys (`init_decay_state`); needs Tq == Tk.
        backend: what runs it, see `ops.backend`.

    Returns:
        output `[B, H, Tq, D]` in v's dtype, 0 in rows that see no key, and the state after these keys (None if
        none came).

    Raises:
        ValueError: when not causal, for more queries than keys, a state that does not fit the call, or key
            weights without a normaliser.
        RuntimeError: for `backend="triton"` where the kernels cannot run.

    Sources: retention arXiv:2307.08621, gated linear attention arXiv:2312.06635.
    """
    q_len, k_len = q_features.shape[2], k_features.shape[2]
    if not is_causal:
        raise ValueError("Decay has a direction: is_causal must be True, got False.")
    if q_len > k_len:
        raise ValueError(f"Causal attention needs at least as many keys as queries, got {q_len} > {k_len}.")
    if state is not None and q_len != k_len:
        raise ValueError(f"A decode state needs as many queries as new keys, got {q_len} and {k_len}.")
    if not normalised and key_log_weight is not None:
        raise ValueError("key_log_weight needs normalised=True: without a normaliser its scale does not cancel.")
    refused = fused_linear_attention.refusal(k_features.shape[-1], v, gated=log_decay.ndim == 4)
    if use_triton(backend, v, refused):
        output, _, state = fused_linear_attention.attend(
            q_features,
            k_features,
            v,
            log_decay=log_decay,
            log_weight=key_log_weight,
            key_real=key_padding,
            is_causal=True,
            normalised=normalised,
            state=state,
        )
        return output, state
    block, outputs = block_size(v), []
    with full_precision(v):
        carry, peak = _start(q_features, v, normalised, state)
        q = q_features.to(carry.dtype)
        k, v1, decay, peak = _prepare(
            k_features, v, log_decay, key_log_weight, key_padding, carry.dtype, normalised, peak
        )
        # Keys before the first query are only summed. Splits, not slices: their gradients are joined, not added up.
        sizes = [[min(block, length - i) for i in range(0, length, block)] for length in (k_len - q_len, q_len)]
        parts = list(zip(*(x.split(sizes[0] + sizes[1], 2) for x in (k, v1, decay)), strict=True))
        for keys in parts[: len(sizes[0])]:
            carry = _accumulate(carry, *keys)
        for rows, (k, v1, decay) in zip(q.split(sizes[1], 2), parts[len(sizes[0]) :], strict=True):
            if q_len == 1:
                carry = _accumulate(carry, k, v1, decay)
                sums = rows @ carry
            else:
                sums, carry = _chunk_block(rows, k, v1, decay, carry, _CHUNK)
            outputs.append(_finish(sums, v.dtype, normalised))
    output = outputs[0]
    if len(outputs) > 1:
        # [B, T, H, D] in memory: what the output projection reads next
        output = torch.cat([o.transpose(1, 2) for o in outputs], 1).transpose(1, 2)
    return output, None if state is None else _end(carry, peak, normalised)


def feature_map_decay_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    *,
    key_padding: torch.Tensor | None = None,
    is_causal: bool = True,
    normalised: bool = True,
    state: State | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    """`decay_linear_attention(q_map(q), k_map(k), v, log_decay)`, with padded tokens of any content, be it nan.

    Args:
        q_map: `x -> (features, log scale)`; the log scale is dropped, it cancels.
        k_map: `x -> (features, log weight [B, H, T] or None)`.
    """
    q_features, _ = q_map(safe_masked_fill(q, query_padding(key_padding, q.shape[2], is_causal)))
    k_features, log_weight = k_map(safe_masked_fill(k, key_padding))
    return decay_linear_attention(
        q_features,
        k_features,
        v,
        log_decay,
        key_log_weight=log_weight,
        key_padding=key_padding,
        is_causal=is_causal,
        normalised=normalised,
        state=state,
        backend=backend,
    )


def naive_decay_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    key_padding: torch.Tensor | None = None,
    normalised: bool = True,
) -> torch.Tensor:
    """The formula with n x n (x F) weights, reference of the other forms. Arguments as `decay_linear_attention`."""
    q_len, k_len = q_features.shape[2], k_features.shape[2]
    with full_precision(v):
        carry, peak = _start(q_features, v, normalised, None)
        k, v1, decay, _ = _prepare(k_features, v, log_decay, key_log_weight, key_padding, carry.dtype, normalised, peak)
        later = torch.ones(k_len, k_len, dtype=torch.bool, device=v.device).tril(-1)[:, :, None]
        between = torch.where(later, decay[..., :, None, :], 0).cumsum(-3)  # [B, H, i, j, F or 1]
        weight = between.exp() * torch.ones(k_len, k_len, dtype=torch.bool, device=v.device).tril()[:, :, None]
        scores = (q_features.to(k.dtype)[..., :, None, :] * k[..., None, :, :] * weight[:, :, k_len - q_len :]).sum(-1)
        return _finish(scores @ v1, v.dtype, normalised)


def chunk_decay_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    key_padding: torch.Tensor | None = None,
    normalised: bool = True,
    state: State | None = None,
    chunk_size: int = _CHUNK,
) -> tuple[torch.Tensor, State]:
    """Dense inside chunks, by decayed sums over earlier chunks beyond; always returns the state.

    Arguments as `decay_linear_attention` with Tq == Tk; `chunk_size` is a power of two.
    """
    with full_precision(v):
        carry, peak = _start(q_features, v, normalised, state)
        k, v1, decay, peak = _prepare(
            k_features, v, log_decay, key_log_weight, key_padding, carry.dtype, normalised, peak
        )
        sums, carry = _chunk_block(q_features.to(k.dtype), k, v1, decay, carry, chunk_size)
    return _finish(sums, v.dtype, normalised), _end(carry, peak, normalised)


def recurrent_decay_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    key_padding: torch.Tensor | None = None,
    normalised: bool = True,
    state: State | None = None,
) -> tuple[torch.Tensor, State]:
    """One token at a time, to decode a token or a few. Arguments as `chunk_decay_linear_attention`."""
    rows = []
    with full_precision(v):
        carry, peak = _start(q_features, v, normalised, state)
        k, v1, decay, peak = _prepare(
            k_features, v, log_decay, key_log_weight, key_padding, carry.dtype, normalised, peak
        )
        for t in range(v.shape[2]):
            now = slice(t, t + 1)
            carry = _accumulate(carry, k[:, :, now], v1[:, :, now], decay[:, :, now])
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
    key_padding: torch.Tensor | None,
    dtype: torch.dtype,
    normalised: bool,
    peak: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys, weighted values (with a column of ones if normalised), log-decays `[B, H, T, F or 1]`, last log scale.

    With weights, sums are kept relative to a peak p_t = max(p_{t-1} + max_f g_tf, log w_t), which bounds every
    weight that row t sees. Relative to it key t has weight exp(log w_t - p_t) and the log-decay is
    g_t + p_{t-1} - p_t: neither exceeds 1, and the peak cancels in the quotient. The largest weight is at the
    peak when features decay alike; when they are reset one by one it may fall below it, so weights per key
    should then stay within e^80 of each other.
    """
    decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    decay = safe_masked_fill(decay.to(dtype), key_padding).clamp(min=_LEAST_GIVEN)
    k = k.to(dtype)
    if not normalised:
        return k, safe_masked_fill(v.to(dtype), key_padding), decay.clamp(min=_LEAST), None
    if log_weight is None and peak is not None:  # the state may hold weighted keys
        log_weight = torch.zeros_like(v[..., 0], dtype=dtype)
    v1, log_weight = prepare_keys(v, log_weight, key_padding, dtype)
    if log_weight is None:
        return k, v1, decay.clamp(min=_LEAST), None
    start = log_weight.new_full(log_weight.shape[:2], LOG_ZERO) if peak is None else peak
    elapsed = decay.detach().amax(-1).cumsum(-1)  # [B, H, T]
    latest = torch.maximum((log_weight.detach() - elapsed).cummax(-1).values, start[..., None])
    peaks = elapsed + latest
    before = torch.cat([start[..., None], peaks[..., :-1]], -1)
    shift = torch.where(before > LOG_ZERO / 2, before - peaks, 0.0)  # nothing decays before the first key
    v1 = v1 * (log_weight - peaks).exp()[..., None]
    return (
        k,
        v1,
        (decay + shift[..., None]).clamp(min=_LEAST),
        peaks[..., -1].clone(),
    )  # a view would keep all of them in the state


def _after(decay: torch.Tensor) -> torch.Tensor:
    """Log-decay from each token to the last one: the sum over later tokens, in the dimension before the last."""
    return F.pad(decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _accumulate(carry: torch.Tensor, k: torch.Tensor, v1: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """The sums `[B, H, F, D+1]` after further keys."""
    kept = carry * decay.sum(-2)[..., None].exp()
    return kept + ((k * _after(decay).exp()).mT @ v1 if k.shape[2] > 1 else k.mT * v1)


def _chunk_block(
    q: torch.Tensor, k: torch.Tensor, v1: torch.Tensor, decay: torch.Tensor, carry: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal sums [B, H, T, D+1] of a block after the keys in `carry`, and the carry after the block."""
    length = k.shape[2]
    size = min(chunk_size, 1 << (length - 1).bit_length())
    chunks = -(-length // size)
    missing = chunks * size - length
    if missing:  # zeros: they neither decay nor add
        q, k, v1, decay = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v1, decay))
    q, k, v1, decay = (x.unflatten(2, (chunks, size)) for x in (q, k, v1, decay))  # [B, H, N, C, *]
    if decay.shape[-1] > 1 and not torch.compiler.is_compiling():
        reach = torch.ones(size, size, dtype=decay.dtype, device=decay.device).tril() @ decay
        if bool((reach[..., -1, :] >= -_MOST_IN_CHUNK).all()):
            sums, carry = _mild_chunks(q, k, v1, reach, carry)
            return sums.flatten(2, 3)[:, :, :length], carry
    reach = decay.cumsum(-2)  # from before the chunk to each token
    states = (k * _after(decay).exp()).mT @ v1  # [B, H, N, F, D+1]
    before, carry = _states_before(states, reach[..., -1, :, None].exp(), carry)
    sums = (q * reach.exp()) @ before
    if decay.shape[-1] == 1:
        future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        between = (reach - reach.mT).masked_fill(future, LOG_ZERO)
        sums = sums + (q @ k.mT * between.exp()) @ v1
    else:
        sums = sums + _inside_chunks(q, k, v1, decay)
    return sums.flatten(2, 3)[:, :, :length], carry


def _states_before(states: torch.Tensor, kept: torch.Tensor, carry: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums before each chunk, `[B, H, N, F, D+1]`, and after all, `kept` of earlier ones being left after a chunk."""
    before = []
    for state, left in zip(states.unbind(2), kept.unbind(2), strict=True):
        before.append(carry)
        carry = carry * left + state
    return torch.stack(before, 2), carry


def _mild_chunks(
    q: torch.Tensor, k: torch.Tensor, v1: torch.Tensor, reach: torch.Tensor, carry: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal sums `[B, H, N, C, D+1]` where no chunk forgets much, and the carry after them.

    The decay between two tokens is split between query and key at half of what the chunk decays in all: neither
    factor is far from 1.
    """
    last = reach[..., -1:, :]
    middle = (0.5 * last).detach()
    factor = (reach - middle).exp()
    q, k = q * factor, k / factor
    states = (k.mT @ v1) * (last - middle).exp().mT
    before, carry = _states_before(states, last.exp().mT, carry)
    return (q @ k.mT).tril() @ v1 + q @ (before * middle.exp().mT), carry


def _inside_chunks(q: torch.Tensor, k: torch.Tensor, v1: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Causal sums inside chunks of C tokens (a power of two) with a decay per feature: [..., C, D+1].

    The decay between two tokens is no single number, so it is split between query and key at a token between
    them: the middle of the smallest block (of 2, 4, .. C tokens) that holds both.
    """
    sums = (q * k).sum(-1, keepdim=True) * v1  # each token's own key
    half = 1
    while half < q.shape[-2]:
        _, q_right = q.unflatten(-2, (-1, 2, half)).unbind(-3)
        (k_left, _), (v_left, _) = (x.unflatten(-2, (-1, 2, half)).unbind(-3) for x in (k, v1))
        left, right = decay.unflatten(-2, (-1, 2, half)).unbind(-3)
        scores = (q_right * right.cumsum(-2).exp()) @ (k_left * _after(left).exp()).mT
        part = scores @ v_left
        sums = sums + torch.stack([torch.zeros_like(part), part], -3).flatten(-4, -2)
        half *= 2
    return sums
