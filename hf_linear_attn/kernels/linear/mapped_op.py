"""Linear attention from tokens, features computed inside the kernels, as a custom operator; without gradients."""

from __future__ import annotations

from typing import Any

import torch

from hf_linear_attn.kernels.launch import NAMESPACE, check_launches, group_of, on_device, readable
from hf_linear_attn.kernels.linear import tiles as config
from hf_linear_attn.kernels.linear.mapped import mapped_attention_kernel, mapped_sums_kernel

__all__ = ["KINDS", "either", "mapped_attention", "serves", "weight_strides"]

# Kinds of maps, and the code that the kernels know each by.
KINDS = {"elu": 1, "relu": 2, "projected_relu": 3, "projected_exp": 4, "projected_softmax": 5}

Optional = torch.Tensor | None
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def serves(q: torch.Tensor, v: torch.Tensor, q_map: Any, *, is_causal: bool) -> bool:
    """Whether the kernels fit this call, and a causal sequence of few heads is not so long that it should be cut."""
    (batch, heads, length, dim), width = q.shape, v.shape[-1]
    features = dim if q_map.weight is None else q_map.weight.shape[-1]
    shared, processors = config.device_limits(q.device)
    precision = config.precision_of(q.dtype, v.dtype)
    tiles = config.mapped_tiles_for(dim, features, width, precision, shared, is_causal=is_causal, length=length)
    if tiles is None or not is_causal:
        return tiles is not None
    return config.forward_segments_for(length, batch * heads * -(-width // tiles.values), tiles, processors)[0] == 1


def mapped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: Any,
    k_map: Any,
    weights: Any,
    query_mask: Optional = None,
    token_mask: Optional = None,
    state: State | None = None,
    log_weight: Optional = None,
    log_decay: Optional = None,
    *,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, State | None]:
    """Linear attention over a whole sequence, or over tokens that come after a state.

    Args:
        q: `[B, H, Tq, D]`; k: `[B, H / group, Tk, D]` and v: `[B, H / group, Tk, C]`, each for a group of heads side by
            side; of one dtype, any strides.
        q_map, k_map, weights: features of queries and of keys, as many of both, and what else keys weigh; a `TokenMap`
            each, and `KeyWeights`, of `ops.features.maps`.
        query_mask, token_mask: bool `[B, Tq]` and `[B, Tk]`, True for a token; what stands at others has no effect.
        state: kv `[B, H, F, C]`, z `[B, H, F]` and the log scale of both `[B, H]`, float32; causal with Tq == Tk only.
        log_weight: float32 `[B, H, Tk]`, of keys beside `weights`, any strides; causal only.
        log_decay: float32 `[B, H, Tk]`, at most 0, any strides, causal only: what happens to the sums over earlier keys
            when token t comes.
        is_causal: query r sees keys up to position Tk - Tq + r.

    Returns:
        output `[B, H, Tq, C]`, `[B, T, H, C]` in memory, 0 in rows that see no key; the log of each row's denominator
        `[B, H, Tq]`, that of `TINY` at least; and the state after all keys, None if not causal.

    Raises:
        ValueError: for a device on which no kernel can start, what is causal only without causality, one map alone with
            a center or bias or normalized, a bias of normalized ones, a projection that does not go with the kind, or
            heads that k and v do not divide.
    """
    if not is_causal and not (state is None and log_weight is None and log_decay is None):
        raise ValueError("state, log_weight and log_decay need is_causal=True, got False.")
    q_has, k_has = ((x.center is None, x.bias is None, x.normalized) for x in (q_map, k_map))
    if q_has != k_has or (q_map.normalized and q_map.bias is not None):
        raise ValueError(
            "Both maps or none must have a center, likewise a bias, or be normalized, which takes no bias."
        )
    for kind, _, weight, *_ in (q_map, k_map):
        if (weight is not None) != kind.startswith("projected"):
            raise ValueError(f"{kind!r} {'needs a' if weight is None else 'takes no'} projection.")
    out, normalizer, *after = _forward(
        *(q, k, v, query_mask, token_mask, *(state or (None, None, None)), log_weight, log_decay),
        *(KINDS[q_map.kind], *q_map[1:], KINDS[k_map.kind], *k_map[1:], *weights, is_causal),
    )
    return out, normalizer, (after[0], after[1], after[2]) if is_causal else None


@torch.library.custom_op(f"{NAMESPACE}::mapped_attention", mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_mask: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    kv: torch.Tensor | None,
    z: torch.Tensor | None,
    log_scale: torch.Tensor | None,
    log_weight: torch.Tensor | None,
    log_decay: torch.Tensor | None,
    q_kind: int,
    q_multiplier: float,
    q_weight: torch.Tensor | None,
    q_center: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    q_normalized: bool,
    q_form: torch.Tensor | None,
    q_exp_form: int,
    k_kind: int,
    k_multiplier: float,
    k_weight: torch.Tensor | None,
    k_center: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    k_normalized: bool,
    k_form: torch.Tensor | None,
    k_exp_form: int,
    scaling: float,
    mean: torch.Tensor | None,
    square: torch.Tensor | None,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_launches(q.device)
    q, k, v = readable(q), readable(k), readable(v)
    (batch, heads, q_len, dim), k_len, width = q.shape, k.shape[2], v.shape[-1]
    features = dim if q_weight is None else q_weight.shape[-1]
    out, normalizer, *after = _results(q, v, features)
    shared, processors = config.device_limits(q.device)
    precision = config.precision_of(q.dtype, v.dtype)
    tiles = config.mapped_tiles_for(dim, features, width, precision, shared, is_causal=is_causal, length=q_len)
    assert tiles is not None  # `serves` was asked
    programs = batch * heads * -(-width // tiles.values)
    constants = {
        **{"GROUP": group_of(q, k, v), "D": dim, "F": features, "C": width, "BT": tiles.tokens, "BC": tiles.values},
        **{"BD": config.block_of(dim), "BF": config.block_of(features)},
        **{"K_KIND": k_kind, "K_EXP_FORM": k_exp_form, "NORMALIZED": k_normalized, "HAS_CENTER": k_center is not None},
        **{"HAS_MEAN": mean is not None, "HAS_SQUARE": square is not None, "HAS_BIAS": k_bias is not None},
        **config.dot_constants(precision),
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    nothing = normalizer  # stands for what there is not: the kernel never reads it
    key_side = [either(x, nothing) for x in (k_weight, k_center, k_bias, k_form, mean, square)]
    k_strides, square_head = weight_strides(k_weight), weight_strides(square)[0]
    kv, z, log_scale, query_mask, token_mask = (
        None if x is None else x.contiguous() for x in (kv, z, log_scale, query_mask, token_mask)
    )
    count = 1
    with on_device(q.device):
        if not is_causal:
            count, size = config.segments_for(k_len, programs, tiles, processors, has_decay=False)
            kv, z, log_scale = (
                q.new_empty(shape, dtype=torch.float32)
                for shape in (
                    (batch, heads, count, features, width),
                    (batch, heads, count, features),
                    (batch, heads, count),
                )
            )
            mapped_sums_kernel[(programs * count,)](
                *(k, v, kv, z, log_scale, either(token_mask, nothing), *key_side),
                *(*k.stride()[:3], *v.stride()[:3], *k_strides, square_head, k_multiplier, scaling),
                *(heads, k_len, count, size),
                HAS_MASK=token_mask is not None,
                **constants,
                **options,
            )
            parts, size = config.segments_for(q_len, programs, tiles, processors, has_decay=False)
            programs *= parts
        else:
            size = k_len
        keys, values = (k, v) if is_causal else (q, q)  # read by the sums alone
        mapped_attention_kernel[(programs,)](
            *(q, keys, values, out, normalizer, *(either(x, nothing) for x in (kv, z, log_scale)), *after),
            *(either(x, nothing) for x in (query_mask, token_mask, q_weight, q_center, q_bias, q_form)),
            *(*key_side, either(log_weight, nothing), either(log_decay, nothing)),
            *(*q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *out.stride()[:3]),
            *(*weight_strides(q_weight), *k_strides, square_head),
            *(
                *either(log_weight, nothing).stride(),
                *either(log_decay, nothing).stride(),
                q_multiplier,
                k_multiplier,
                scaling,
            ),
            *(heads, q_len, k_len, count, size),
            CAUSAL=is_causal,
            HAS_STATE=kv is not None,
            Q_KIND=q_kind,
            Q_EXP_FORM=q_exp_form,
            HAS_Q_MASK=query_mask is not None,
            HAS_K_MASK=token_mask is not None,
            HAS_LOG_WEIGHTS=log_weight is not None,
            HAS_DECAY=log_decay is not None,
            **constants,
            **options,
        )
    return out, normalizer, after[0], after[1], after[2]


def either(x: Optional, other: torch.Tensor) -> torch.Tensor:
    """`x`, or what stands for it where there is none and no kernel reads it."""
    return other if x is None else x


def weight_strides(x: Optional) -> tuple[int, int, int]:
    """Of heads (0 where all share one), coordinates and features."""
    return (0, 0, 0) if x is None else (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1), x.stride(2))


def _results(q: torch.Tensor, v: torch.Tensor, features: int) -> tuple[torch.Tensor, ...]:
    (batch, heads, length), width = q.shape[:3], v.shape[-1]
    out = v.new_empty(batch, length, heads, width).transpose(1, 2)
    sums = [(length,), (features, width), (features,), ()]
    return out, *(q.new_empty((batch, heads, *shape), dtype=torch.float32) for shape in sums)


@_forward.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    q_weight = rest[9]
    return _results(q, v, q.shape[-1] if q_weight is None else q_weight.shape[-1])
