"""Linear attention on tensors, o_i = phi(q_i) S_i / (phi(q_i) . z_i): S sums w phi(k) v^T over keys, z sums w phi(k).

A call may forget: S_i = diag(exp(g_i)) S_{i-1} + w_i phi(k_i) v_i^T, z likewise, with log-decays g <= 0 per token and
head (retention, gated RFA) or per feature too (gated linear attention). Key j then reaches row i with weight
w_j exp(g_{j+1} + .. + g_i); without causality later keys reach it too, see `ops.linear.both_ways`.

The weights are w_j = exp(a_j) with log weights a. They are never formed: everything is kept relative to the largest
weight that a row may see, so no key, however large, overflows or reaches an earlier row. Exponentials are of sums of
log-decays between two tokens, so none overflows however long the input. Padded tokens neither add nor decay: they are
dropped from numerator and denominator alike, and a decay counts real tokens.

Shapes: features `[B, H, T, F]`, values `[B, H, T, D]`, log weights `[B, H, T]`, log-decays `[B, H, T]` or
`[B, H, T, F]`, token_mask bool `[B, T]`. Sums are float32 (float64 for float64 input); the output has the dtype of `v`.

Sources: linear attention arXiv:2006.16236, retention arXiv:2307.08621, gated linear attention arXiv:2312.06635.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_linear_attn.ops.base.backend import use_triton
from hf_linear_attn.ops.base.groups import of_each_head
from hf_linear_attn.ops.base.masking import query_mask_of, safe_masked_fill
from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype, full_precision
from hf_linear_attn.ops.features.gradients import map_parts, trains_unnamed
from hf_linear_attn.ops.features.maps import FeatureMap, Features, ParametricMap, ScaledMap
from hf_linear_attn.ops.linear import blocks, both_ways, fused, plain, step
from hf_linear_attn.ops.linear.layout import Call, LogDecay, Options, State

__all__ = [
    "LogDecay",
    "State",
    "feature_map_attention",
    "feature_map_attention_with_normalizer",
    "init_linear_state",
    "linear_attention",
]


ONE_DIRECTION = "the kernels forget in one direction, encoders do in both"


def init_linear_state(
    batch_size: int,
    num_heads: int,
    num_features: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    normalized: bool = True,
) -> State:
    """The state before any token; float32 unless `dtype` is float64; `{"kv": [B, H, F, D]}` without a normalizer."""
    dtype = accumulation_dtype(dtype)
    kv = torch.zeros(batch_size, num_heads, num_features, head_dim, dtype=dtype, device=device)
    if not normalized:
        return {"kv": kv}
    return {"kv": kv, "z": torch.zeros_like(kv[..., 0]), "log_scale": torch.full_like(kv[..., 0, 0], LOG_ZERO)}


def linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    *,
    log_decay: torch.Tensor | None = None,
    key_log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    is_causal: bool,
    normalized: bool = True,
    state: State | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    """Linear attention in the form that fits the call: kernels, blocks of tokens, or one decode step.

    Args:
        q_features: `[B, H, Tq, F]`.
        k_features: `[B, H / groups, Tk, F]`, each for a group of heads side by side, finite also at padded keys.
        v: `[B, H / groups, Tk, D]`.
        log_decay: `[B, H, Tk]` or `[B, H, Tk, F]`, at most 0 (-inf forgets everything): what happens to the sums over
            earlier keys when token t comes, before its own key is added; without is_causal, to those over later keys
            too. None for none.
        key_log_weight: `[B, H, Tk]`, log of each key's weight (-inf: as if it were not there); None for weight 1.
        token_mask: bool `[B, Tk]`, True for a real token.
        is_causal: query row r sees keys up to position Tk - Tq + r, and the whole state.
        normalized: False gives phi(q_i) S_i as it is, and a state of S alone. Needs is_causal or log_decay.
        state: sums over earlier keys (`init_linear_state`); needs is_causal and Tq == Tk.
        backend: what runs it, see `ops.base.backend`.

    Returns:
        output `[B, H, Tq, D]`, 0 in rows that see no key, and the state after these keys (None if none came).

    Raises:
        ValueError: for heads that keys and values do not divide into groups, a state without causality, no normalizer
            with neither causality nor decay, more queries than keys with either, a state that does not fit the call,
            or key weights without a normalizer.
        RuntimeError: for `backend="triton"` where the kernels cannot run.
    """
    maps = ParametricMap(_as_they_are), ParametricMap(_as_they_are)
    given = q_features, k_features, v, *maps, log_decay, key_log_weight, token_mask, None
    return _attend(*given, is_causal, normalized, state, backend)[::2]


def _as_they_are(features: torch.Tensor) -> Features:
    return features, None


def feature_map_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    *,
    log_decay: torch.Tensor | LogDecay | None = None,
    key_log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    is_causal: bool,
    normalized: bool = True,
    state: State | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, State | None]:
    """`linear_attention(q_map(q), k_map(k), v)`, with padded tokens of any content, be it nan.

    Neither the features of a long sequence nor its log-decays are held at once where they can be computed in blocks.

    Args:
        q: `[B, H, Tq, D]`; k, v: `[B, H / groups, Tk, D]`, each for a group of heads side by side.
        q_map: `x -> (features, log scale)`; the log scale cancels. Maps see a key for each of its heads.
        k_map: `x -> (features, log weight [B, H, T] or None)`.
        log_decay: as a tensor, or how to compute it from tokens.
        key_log_weight: `[B, H, Tk]`, added to that of `k_map`.
        token_mask, is_causal, normalized, state, backend: as for `linear_attention`.
    """
    query_mask = query_mask_of(token_mask, q.shape[2], is_causal or log_decay is not None)
    given = q, k, v, q_map, k_map, log_decay, key_log_weight, token_mask, query_mask
    return _attend(*given, is_causal, normalized, state, backend)[::2]


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
        (in rows that see no key the log of `TINY` at most, with weights about `LOG_ZERO`); and the state.
    """
    query_mask = query_mask_of(token_mask, q.shape[2], is_causal)
    given = q, k, v, q_map, k_map, None, None, token_mask, query_mask
    output, normalizer, state = _attend(*given, is_causal, True, state, backend)
    assert normalizer is not None
    return output, normalizer, state


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    log_decay: torch.Tensor | LogDecay | None,
    log_weight: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    is_causal: bool,
    normalized: bool,
    state: State | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None, State | None]:
    """Output, log denominator (None with decay or without a normalizer) and state, by the form that fits the call."""
    q_len, k_len, heads = q.shape[2], v.shape[2], q.shape[1]
    _check(q, k, v, log_decay, is_causal, normalized, state)
    by_kernels = use_triton(backend, v, ONE_DIRECTION if log_decay is not None and not is_causal else None)
    if not by_kernels:
        k, v = of_each_head(k, heads), of_each_head(v, heads)
    (q_function, q_parameters), (k_function, k_parameters) = map_parts(q_map), map_parts(k_map)
    decay = _given(log_decay) if isinstance(log_decay, torch.Tensor) else log_decay
    options = Options(
        q_map=q_function,
        k_map=k_function,
        decay=None if decay is None else decay.function,
        counts=(len(q_parameters), len(k_parameters)),
        is_causal=is_causal,
        normalized=normalized,
    )
    start = (None, None, None) if state is None else (state["kv"], state.get("z"), state.get("log_scale"))
    tokens, d_parameters = (None, ()) if decay is None else (decay.tokens, decay.parameters)
    tensors = q, k, v, log_weight, tokens, token_mask, query_mask, *start
    call = Call(options, (*tensors, *q_parameters, *k_parameters, *d_parameters))
    if by_kernels:
        with full_precision(v):
            found = _attend_fused(call, q_map, k_map, decay, state, backend)
        if found is not None:
            return found
        if k.shape[1] != heads:
            rest = log_decay, log_weight, token_mask, query_mask, is_causal, normalized, state, "torch"
            return _attend(q, k, v, q_map, k_map, *rest)
    if state is not None and q_len == 1:
        return step.attend(call)
    # A traced graph has no reentrant backward, and a map that trains tensors which it does not name needs autograd to
    # find them.
    recorded = torch.compiler.is_compiling() or _trains_unnamed(call, q_map, k_map, decay)
    if decay is not None and not is_causal:
        return both_ways.attend(call, recorded=recorded), None, None
    if q_len > 1 and (decay is None or q_len == k_len) and not recorded:
        output, normalizer, after = blocks.attend(call)
        return output, normalizer, None if state is None else after
    return plain.attend(call)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: Any,
    is_causal: bool,
    normalized: bool,
    state: State | None,
) -> None:
    heads, (shared, k_len), q_len = q.shape[1], v.shape[1:3], q.shape[2]
    if k.shape[1] != shared or shared == 0 or heads % shared:
        raise ValueError(f"Keys and values must have H / groups heads, got {k.shape[1]} and {shared} for H = {heads}.")
    if not normalized and not is_causal and log_decay is None:
        raise ValueError("normalized=False needs is_causal=True or log_decay, got neither.")
    if (is_causal or log_decay is not None) and q_len > k_len:
        what = "Causal attention" if is_causal else "Decay"
        raise ValueError(f"{what} needs at least as many keys as queries, got {q_len} > {k_len}.")
    if state is not None and (not is_causal or q_len != k_len):
        raise ValueError(
            "A decode state needs causal attention over the new tokens only, got "
            f"is_causal={is_causal}, {q_len} queries and {k_len} keys."
        )
    if state is not None and set(state) != (expected := {"kv", "z", "log_scale"} if normalized else {"kv"}):
        raise ValueError(f"normalized={normalized} needs a state of {sorted(expected)}, got {sorted(state)}.")


def _given(log_decay: torch.Tensor) -> LogDecay:
    return LogDecay(lambda x: x, log_decay if log_decay.ndim == 4 else log_decay[..., None])


def _trains_unnamed(call: Call, q_map: FeatureMap, k_map: FeatureMap, decay: LogDecay | None) -> bool:
    maps = [(q_map, call.q), (k_map, call.k)]
    if decay is not None:
        gate = ParametricMap(lambda x, *parameters: (decay.function(x, *parameters), None), decay.parameters)
        maps.append((gate, decay.tokens))
    return trains_unnamed(*maps)


def _trains(call: Call) -> bool:
    """Whether a gradient may be asked of a call."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in call.tensors)


def _attend_fused(
    call: Call, q_map: FeatureMap, k_map: FeatureMap, decay: LogDecay | None, state: State | None, backend: str
) -> tuple[torch.Tensor, torch.Tensor | None, State | None] | None:
    """Attention by the Triton kernels; None for features that they do not take."""
    q, k, v, token_mask, query_mask = call.q, call.k, call.v, call.token_mask, call.query_mask
    heads = q.shape[1]
    log_decay = None if decay is None else decay(token_mask)
    given: dict[str, Any] = {
        "log_decay": log_decay,
        "token_mask": token_mask,
        "query_mask": query_mask,
        "is_causal": call.options.is_causal,
        "normalized": call.options.normalized,
        "state": state,
    }
    gated = log_decay is not None and log_decay.shape[-1] > 1
    if not _trains(call):
        shared = None if log_decay is None or gated else log_decay[..., 0]
        weights = {"log_weight": call.log_weight, "token_mask": token_mask, "state": state}
        if call.options.normalized and not gated and use_triton(backend, v, fused.refusal(q.shape[-1], v)):
            given_tokens = {
                "log_decay": shared,
                "query_mask": query_mask,
                "is_causal": call.options.is_causal,
                **weights,
            }
            if (found := fused.attend_tokens(q, k, v, q_map, k_map, **given_tokens)) is not None:
                return found
        if state is not None and q.shape[2] <= fused.STEP_TOKENS:
            if not use_triton(backend, v, fused.refusal(state["kv"].shape[2], v)):
                return None
            return fused.decode(q, k, v, q_map, k_map, log_decay=log_decay if gated else shared, **weights)
    if isinstance(q_map, ScaledMap) and isinstance(k_map, ScaledMap) and k_map.name in fused.MAPS and not gated:
        if not use_triton(backend, v, fused.refusal(q.shape[-1], v)):
            return None
        given |= {"feature_map": k_map.name, "multipliers": (q_map.multiplier, k_map.multiplier)}
        weight = None if k_map.query_mean is None else k_map.log_weight(of_each_head(k, heads))
        return fused.attend(q, k, v, log_weight=call.weigh(weight, call.log_weight), **given)
    k, v = of_each_head(k, heads), of_each_head(v, heads)
    k_features, weight = fused.map_features(k_map, safe_masked_fill(k, token_mask))
    if not use_triton(backend, v, fused.refusal(k_features.shape[-1], v, gated=gated)):
        return None
    q_features, log_scale = fused.map_features(q_map, safe_masked_fill(q, query_mask))
    weight = call.weigh(weight, call.log_weight)
    output, normalizer, state = fused.attend(q_features, k_features, v, log_weight=weight, **given)
    return output, normalizer if log_scale is None else normalizer + log_scale, state
