"""Linear attention, with or without decay, by the Triton kernels: what their PyTorch twins in `ops` hand over to them.

The kernels know a factor of each key and a log-decay of each token. Weights become that here, see
`layout.relative_to_peaks`. Padding is the factor 0.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_linear_attn.ops.base.groups import of_each_head
from hf_linear_attn.ops.base.masking import safe_masked_fill
from hf_linear_attn.ops.base.numerics import LOG_ZERO, TINY
from hf_linear_attn.ops.features.maps import ExponentialMap, FeatureMap, Features, KeyWeights, TokenMap
from hf_linear_attn.ops.linear.layout import State, relative_to_peaks

__all__ = ["MAPS", "STEP_TOKENS", "attend", "attend_tokens", "decode", "map_features", "refusal"]

MAPS = ("elu", "relu")  # of `feature_maps.FEATURE_MAPS`, those that the kernels apply as they read
STEP_TOKENS = 4  # so many new tokens are decoded one by one, in one launch

_MOST_FEATURES, _MOST_GATED, _MOST_DIM = 256, 128, 128
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST = -120.0  # a log-decay after which nothing is left in float32


def refusal(num_features: int, v: torch.Tensor, *, gated: bool = False) -> str | None:
    """Why the kernels do not serve a call; None if they do.

    Args:
        num_features: F.
        v: `[B, H, T, D]`.
        gated: whether every feature has a log-decay of its own.
    """
    most = _MOST_GATED if gated else _MOST_FEATURES
    if v.dtype not in _DTYPES:
        return f"the kernels take float32, float16 and bfloat16, got {v.dtype}"
    if num_features > most or v.shape[-1] > _MOST_DIM:
        return f"the kernels take up to {most} features and head_dim {_MOST_DIM}, got {num_features}, {v.shape[-1]}"
    return None


def map_features(feature_map: FeatureMap, x: torch.Tensor) -> Features:
    """Features of tokens `[B, H, T, D]` and their log weight, exponential ones by one pass of a kernel."""
    if not isinstance(feature_map, ExponentialMap) or x.dtype not in _DTYPES:
        return feature_map(x)
    weight, bias = feature_map.exponent()
    if weight.shape[2] > _MOST_FEATURES or x.shape[-1] > _MOST_DIM:
        return feature_map(x)
    from hf_linear_attn.kernels.linear.exp_features import exp_features

    features, peak = exp_features(x, weight, bias)
    return features, peak if feature_map.rest is None else peak + feature_map.rest(x)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str = "identity",
    multipliers: tuple[float, float] = (1.0, 1.0),
    log_decay: torch.Tensor | None = None,
    log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
    is_causal: bool,
    normalized: bool = True,
    state: State | None = None,
) -> tuple[torch.Tensor, torch.Tensor, State | None]:
    """Attend, checked arguments given.

    Args:
        q: `[B, H, Tq, F]`, features, or what `feature_map` takes; k: `[B, H / groups, Tk, F]`; v: `[B, H / groups, Tk,
            D]`, each for a group of heads side by side.
        feature_map: `"identity"`, or a map that the kernels apply as they read, of q and k times the multipliers.
        multipliers: of q and of k.
        log_decay: `[B, H, Tk]` or `[B, H, Tk, F]`, at most 0; needs is_causal.
        log_weight: `[B, H, Tk]`, log of each key's weight; needs `normalized`.
        token_mask: bool `[B, Tk]`, True for a real token; what stands at others has no effect, be it nan.
        query_mask: bool `[B, Tq]`, likewise.
        is_causal: query row r sees keys up to position Tk - Tq + r, and the whole state.
        normalized: False gives phi(q_i) S_i as it is, and a state of S alone.
        state: sums over earlier keys.

    Returns:
        output `[B, H, Tq, D]`; log of each row's denominator `[B, H, Tq]` (for positive ones); the state after these
        keys, None if none came.
    """
    q_len, k_len = q.shape[2], k.shape[2]
    start = None if state is None else state.get("log_scale")
    if log_weight is None and start is not None:  # the state may hold weighted keys
        log_weight = v.new_zeros(*q.shape[:2], k_len, dtype=torch.float32)
    scale, decay, peaks = _factors(log_weight, log_decay, token_mask, start, is_causal)
    initial = None
    if state is not None:
        kv = state["kv"].float()
        initial = (kv, state["z"].float()) if normalized else (kv, kv.new_zeros(kv.shape[:3]))
    output, denominator, kv, z = _run(
        *(q.to(v.dtype), k.to(v.dtype), v, scale, decay, initial, query_mask, is_causal, normalized),
        {"feature_map": feature_map, "q_multiplier": multipliers[0], "k_multiplier": multipliers[1]},
    )
    normalizer = denominator.clamp(min=TINY).log()
    if peaks is not None:
        normalizer = normalizer + (peaks[..., k_len - q_len :] if is_causal else peaks[..., -1:])
    if state is None:
        return output, normalizer, None
    if not normalized:
        return output, normalizer, {"kv": kv}
    log_scale = kv.new_zeros(kv.shape[:2]) if peaks is None else peaks[..., -1]
    return output, normalizer, {"kv": kv, "z": z, "log_scale": log_scale}


def attend_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: Any,
    k_map: Any,
    *,
    log_weight: torch.Tensor | None,
    log_decay: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    is_causal: bool,
    state: State | None,
) -> tuple[torch.Tensor, torch.Tensor, State | None] | None:
    """Attend with features that the kernels compute from tokens; None where they do not. Without gradients.

    Args:
        q: `[B, H, Tq, D]`; k: `[B, H / groups, Tk, D]`; v: `[B, H / groups, Tk, C]`.
        q_map, k_map: feature maps.
        log_weight, log_decay: as for `attend`, the decay of all features alike.
        token_mask, query_mask, is_causal, state: as for `attend`.

    Returns:
        as `attend`; the log denominator has the queries' log scale in it.
    """
    from hf_linear_attn.kernels.linear import mapped_op as kernels

    spelled = [getattr(x, "spelled", None) for x in (q_map, k_map)]
    if spelled[0] is None or spelled[1] is None or not (q.dtype == k.dtype == v.dtype):
        return None
    (q_tokens, (_, mean, square)), (k_tokens, weights) = spelled[0](), spelled[1]()
    # The kernels know no weights of queries, and of an encoder's keys those alone that its map spells out.
    unknown = mean is not None or square is not None
    unknown = unknown or (not is_causal and (log_weight is not None or log_decay is not None))
    # Maps without weights `attend` applies as it reads too, and moves no more.
    plain = k_tokens.kind in MAPS and all(x is None for x in (weights.mean, log_weight, log_decay, state))
    if unknown or plain or k_tokens.kind not in kernels.KINDS:
        return None
    if not kernels.serves(q, v, q_tokens, is_causal=is_causal):
        return None
    start = None if state is None else (state["kv"].float(), state["z"].float(), state["log_scale"].float())
    keys = (None if x is None else x.float() for x in (log_weight, log_decay))
    given = q, k, v, q_tokens, k_tokens, weights, query_mask, token_mask, start, *keys
    output, normalizer, after = kernels.mapped_attention(*given, is_causal=is_causal)
    return (
        output,
        normalizer,
        None if state is None or after is None else dict(zip(("kv", "z", "log_scale"), after, strict=True)),
    )


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: Any,
    k_map: Any,
    *,
    log_weight: torch.Tensor | None,
    log_decay: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    state: State,
) -> tuple[torch.Tensor, torch.Tensor, State]:
    """Attend from new tokens, at most `STEP_TOKENS`, to a state and themselves in one launch. Without gradients.

    Arguments and results as those of `attend_tokens`; maps that the kernel does not know give it features.
    """
    from hf_linear_attn.kernels.linear import step as kernels

    spelled = [getattr(x, "spelled", None) for x in (q_map, k_map)]
    query_scale, known = None, False
    if spelled[0] is not None and spelled[1] is not None and q.dtype == k.dtype:
        (q_tokens, (_, mean, square)), (k_tokens, weights) = spelled[0](), spelled[1]()
        known = mean is None and square is None and weights.square is None and k_tokens.kind in kernels.KINDS
    if not known:
        q_tokens, k_tokens, weights = TokenMap("identity"), TokenMap("identity"), KeyWeights()
        q, query_scale = map_features(q_map, safe_masked_fill(q, token_mask))
        k, v = of_each_head(k, q.shape[1]), of_each_head(v, q.shape[1])
        k, of_key = map_features(k_map, safe_masked_fill(k, token_mask))
        log_weight = of_key if log_weight is None else log_weight if of_key is None else log_weight + of_key
    log_weight, log_decay = (None if x is None else x.float() for x in (log_weight, log_decay))
    z, log_scale = (state[name].float() if name in state else None for name in ("z", "log_scale"))
    given = q, k, v, q_tokens, k_tokens, weights, (state["kv"].float(), z, log_scale)
    output, normalizer, after = kernels.decode_step(
        *given, token_mask=token_mask, log_weight=log_weight, log_decay=log_decay
    )
    names = zip(("kv", "z", "log_scale"), after, strict=True)
    named = {name: x for name, x in names if x is not None}
    return output, normalizer if query_scale is None else normalizer + query_scale, named


def _factors(
    log_weight: torch.Tensor | None,
    log_decay: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    start: torch.Tensor | None,
    is_causal: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Factors of keys `[B or 1, H or 1, Tk]`, log-decays `[B, H, Tk, F or 1]`, log scales of the sums `[B, H, Tk]`."""
    decay = log_decay
    if decay is not None:
        decay = decay.float() if decay.ndim == 4 else decay.float()[..., None]
        decay = safe_masked_fill(decay, token_mask).clamp(min=_LEAST)
    if log_weight is None:
        return None if token_mask is None else token_mask[:, None].float(), decay, None
    log_weight = log_weight.float()
    if token_mask is not None:
        log_weight = log_weight.masked_fill(~token_mask[:, None], LOG_ZERO)
    if is_causal:
        scale, shift, peaks = relative_to_peaks(log_weight, decay, None if start is None else start.float())
        decay = (shift[..., None] if decay is None else decay + shift[..., None]).clamp(min=_LEAST)
    else:
        peaks = log_weight.detach().amax(-1, keepdim=True).clamp(min=LOG_ZERO).expand_as(log_weight)
        scale = (log_weight - peaks).exp()
    return scale if token_mask is None else scale.masked_fill(~token_mask[:, None], 0), decay, peaks


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor | None,
    decay: torch.Tensor | None,
    initial: tuple[torch.Tensor, torch.Tensor] | None,
    query_mask: torch.Tensor | None,
    is_causal: bool,
    normalized: bool,
    mapped: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call the kernel that serves the call."""
    from hf_linear_attn.kernels.gated import op as gated
    from hf_linear_attn.kernels.linear import op as plain

    if decay is not None and decay.shape[-1] > 1:
        q = safe_masked_fill(q, query_mask)
        return gated.gated_linear_attention(
            q, k, v, decay, key_scale=scale, initial_state=initial, normalized=normalized
        )
    options: dict[str, Any] = {"key_scale": scale, "normalized": normalized, **mapped}
    options["log_decay"] = None if decay is None else decay[..., 0]
    keep = None if query_mask is None else query_mask[:, None]
    return plain.linear_attention(q, k, v, initial_state=initial, is_causal=is_causal, query_keep=keep, **options)
