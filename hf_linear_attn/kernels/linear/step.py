"""A decode step of linear attention over one token or a few in one launch, from tokens or features; without gradients.

    S_t = exp(g_t) S_{t-1} + w_t phi(k_t) v_t^T,   o_t = phi(q_t) S_t / (phi(q_t) . z_t),   z likewise of w_t phi(k_t)

with log-decays g of a token or of each of its features. Sums are kept relative to `top`, the largest log weight so
far, which decays with them as `ops.linear.step` has it: no weight overflows. State in, state out, no dot products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_linear_attn.kernels.launch import NAMESPACE, check_launches, group_of, on_device, readable
from hf_linear_attn.kernels.linear import tiles as config
from hf_linear_attn.kernels.linear.device import LEAST_LOG_DECAY, TINY, feature_map
from hf_linear_attn.kernels.linear.map_device import LOG2E, LOG_ZERO
from hf_linear_attn.kernels.linear.mapped_op import either, weight_strides

__all__ = ["KINDS", "decode_step", "linear_attention_step_kernel", "step_warps"]

# Kinds of maps of `ops.features.maps`, and the code that the kernel knows each by.
KINDS = {"identity": 0, "elu": 1, "relu": 2, "turned_relu": 3, "projected_pairs": 4}
TURNED = tl.constexpr(3)
PAIRS = tl.constexpr(4)
HALF_PI = tl.constexpr(1.5707963267948966)

Optional = torch.Tensor | None
State = tuple[torch.Tensor, Optional, Optional]


@triton.jit
def _sine(x):
    """sin x for x in [-pi / 2, pi / 2], in float32 by its series: what serves any x takes local memory."""
    y, tail = x * x, x * 0.0
    for i in tl.static_range(6, 0, -1):
        tail = -y / ((2 * i) * (2 * i + 1)) * (1.0 + tail)
    return x * (1.0 + tail)


@triton.jit
def _token_features(
    x,
    multiplier,
    weight,
    bias,
    center,
    real,
    F: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    KIND: tl.constexpr,
    HAS_CENTER: tl.constexpr,
):
    """Features [F] of the token at x in float32, 0 unless `real`; `weight` is a place and its two strides."""
    n = tl.arange(0, BF)
    ok = (n < F) & real
    if KIND == PAIRS:
        place, d_stride, r_stride = weight
        r, d = tl.arange(0, BR), tl.arange(0, BD)
        inner = (r[:, None] < R) & (d[None, :] < D)
        w = tl.load(place + r[:, None] * r_stride + d[None, :] * d_stride, mask=inner, other=0.0).to(tl.float32)
        token = tl.load(x + d, mask=(d < D) & real, other=0.0).to(tl.float32)
        u = (tl.sum(w * token[None, :], 1) + tl.load(bias + r, mask=r < R, other=0.0).to(tl.float32)) * multiplier
        # Pairs i <= j of 0 for a 1 and the coordinates from 1 on, by rows; row i begins after those before it.
        begins = (r + 1) * (R + 1) - (r + 1) * r // 2
        i = tl.sum(((r < R)[None, :] & (begins[None, :] <= n[:, None])).to(tl.int32), 1)
        j = n - (i * (R + 1) - i * (i - 1) // 2) + i
        first = tl.where(i == 0, 1.0, tl.sum(tl.where(r[None, :] == i[:, None] - 1, u[None, :], 0.0), 1))
        second = tl.where(j == 0, 1.0, tl.sum(tl.where(r[None, :] == j[:, None] - 1, u[None, :], 0.0), 1))
        features = first * second * tl.where((i == j) & (i > 0), 0.7071067811865476, 1.0)  # a square counts half
    elif KIND == TURNED:
        place = n % D
        token = tl.load(x + place, mask=ok, other=0.0).to(tl.float32)
        if HAS_CENTER:
            token -= tl.load(center + place, mask=n < F, other=0.0).to(tl.float32)
        angle = tl.load(x + D, mask=real, other=0.0) * multiplier
        features = tl.maximum(token, 0.0) * _sine(tl.where(n < D, HALF_PI - angle, angle))
    else:
        features = feature_map(tl.load(x + n, mask=ok, other=0.0), multiplier, KIND)
    return tl.where(ok, features, 0.0)


@triton.jit(do_not_specialize=["heads", "steps"])
def linear_attention_step_kernel(
    q,
    k,
    v,
    out,
    normalizer,
    state,
    vector,
    top,
    next_state,
    next_vector,
    next_top,
    mask,
    log_weights,
    decay,
    q_weight,
    q_bias,
    q_center,
    k_weight,
    k_bias,
    k_center,
    mean,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_batch,
    out_head,
    out_token,
    log_weights_batch,
    log_weights_head,
    log_weights_token,
    decay_batch,
    decay_head,
    decay_token,
    q_weight_head,
    q_weight_dim,
    q_weight_feature,
    k_weight_head,
    k_weight_dim,
    k_weight_feature,
    q_multiplier,
    k_multiplier,
    scaling,
    heads,
    steps,
    GROUP: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BF: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    KIND: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LOG_WEIGHTS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    GATED: tl.constexpr,
):
    """Outputs and log denominators of `steps` tokens, and the state after them; a program has a tile of values."""
    tiles: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    tile, bh = pid % tiles, (pid // tiles).to(tl.int64)
    batch, head = bh // heads, bh % heads
    n, cols, d = tl.arange(0, BF), tile * BC + tl.arange(0, BC), tl.arange(0, BD)
    place = bh * F * C + n[:, None] * C + cols[None, :]
    inner = (n[:, None] < F) & (cols[None, :] < C)
    sums = tl.load(state + place, mask=inner, other=0.0)
    if NORMALIZED:
        sums_n = tl.load(vector + bh * F + n, mask=n < F, other=0.0)
        before = tl.load(top + bh)
    else:
        sums_n = tl.zeros([BF], dtype=tl.float32)
        before = 0.0
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // GROUP * k_head
    v += batch * v_batch + head // GROUP * v_head
    out += batch * out_batch + head * out_head
    log_weights += batch * log_weights_batch + head * log_weights_head
    decay += batch * decay_batch + head * decay_head
    q_side = (q_weight + head * q_weight_head, q_weight_dim, q_weight_feature)
    k_side = (k_weight + head * k_weight_head, k_weight_dim, k_weight_feature)
    for t in range(steps):
        real = True
        if HAS_MASK:
            real = tl.load(mask + batch * steps + t) != 0
        features = _token_features(
            k + t * k_token,
            k_multiplier,
            k_side,
            k_bias + head * R,
            k_center + head * D,
            real,
            F,
            D,
            R,
            BF,
            BD,
            BR,
            KIND,
            HAS_CENTER,
        )
        left = tl.zeros([BF], dtype=tl.float32)
        if HAS_DECAY:
            if GATED:
                left = tl.load(decay + t * decay_token + n, mask=(n < F) & real, other=0.0)
                left = tl.maximum(left, LEAST_LOG_DECAY)
            else:
                left += tl.maximum(tl.load(decay + t * decay_token, mask=real, other=0.0), LEAST_LOG_DECAY)
        if NORMALIZED:
            log_weight = 0.0
            if HAS_LOG_WEIGHTS:
                log_weight += tl.load(log_weights + t * log_weights_token, mask=real, other=0.0)
            if HAS_MEAN:
                token = tl.load(k + t * k_token + d, mask=(d < D) & real, other=0.0).to(tl.float32)
                a = tl.load(mean + head * D + d, mask=d < D, other=0.0).to(tl.float32)
                log_weight += scaling * tl.sum(token * a, 0)
            log_weight = tl.where(real, tl.maximum(log_weight, LOG_ZERO), LOG_ZERO)
            # What is left of the least forgotten feature bounds what is left of all.
            largest = tl.maximum(before + tl.max(tl.where(n < F, left, float("-inf")), 0), log_weight)
            left += before - largest
            features *= tl.exp2((log_weight - largest) * LOG2E)
            before = largest
        kept = tl.exp2(left * LOG2E)
        row = tl.load(v + t * v_token + cols, mask=(cols < C) & real, other=0.0).to(tl.float32)
        sums = sums * kept[:, None] + features[:, None] * row[None, :]
        sums_n = sums_n * kept + features
        features = _token_features(
            q + t * q_token,
            q_multiplier,
            q_side,
            q_bias + head * R,
            q_center + head * D,
            real,
            F,
            D,
            R,
            BF,
            BD,
            BR,
            KIND,
            HAS_CENTER,
        )
        result = tl.sum(sums * features[:, None], 0)
        if NORMALIZED:
            below = tl.sum(sums_n * features, 0)
            if tile == 0:
                tl.store(normalizer + bh * steps + t, tl.log(tl.maximum(below, TINY)) + before)
            result /= tl.where(tl.abs(below) < TINY, tl.where(below < 0, -TINY, TINY), below)
        tl.store(out + t * out_token + cols, result.to(out.dtype.element_ty), mask=cols < C)
    tl.store(next_state + place, sums, mask=inner)
    if NORMALIZED and tile == 0:
        tl.store(next_vector + bh * F + n, sums_n, mask=n < F)
        tl.store(next_top + bh, before)


def decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: Any,
    k_map: Any,
    weights: Any,
    state: State,
    *,
    token_mask: Optional = None,
    log_weight: Optional = None,
    log_decay: Optional = None,
) -> tuple[torch.Tensor, torch.Tensor, State]:
    """A decode step over new tokens, one after the other.

    Args:
        q: `[B, H, T, D]`, tokens, or features `[B, H, T, F]` for maps of kind `"identity"`; for `"turned_relu"` with
            the token's rank as a last coordinate, in float32.
        k, v: `[B, H / group, T, D]` and `[B, H / group, T, C]`, which serve a group of heads each; k like q.
        q_map, k_map, weights: two `TokenMap` of one of `KINDS`, and `KeyWeights` without `square`, of
            `ops.features.maps`.
        state: kv `[B, H, F, C]`, z `[B, H, F]` and the log scale of both `[B, H]`, float32; without z and the scale,
            outputs are sums as they are, and keys have no weights.
        token_mask: bool `[B, T]`, True for a token; what stands at others has no effect, and their output is 0.
        log_weight: float32 `[B, H, T]`, of keys beside `weights`.
        log_decay: float32 `[B, H, T]` or `[B, H, T, F]`, at most 0.

    Returns:
        output `[B, H, T, C]`, `[B, T, H, C]` in memory; the log of each row's denominator `[B, H, T]` (that of `TINY`
        at least; nothing in it without z); and the state after these tokens.

    Raises:
        ValueError: for a device on which no kernel can start, maps of two kinds or of one that is not known, or
            weights of keys without z; for heads that k and v do not divide.
    """
    kv, z, log_scale = state
    if q_map.kind != k_map.kind or q_map.kind not in KINDS or (q_map.center is None) != (k_map.center is None):
        raise ValueError(f"Allowed: two maps of one of {', '.join(KINDS)}; got {q_map.kind!r}, {k_map.kind!r}.")
    if weights.square is not None or (z is None and not (log_weight is None and weights.mean is None)):
        raise ValueError("A step without z takes no weights of keys, and none takes a square.")
    out, normalizer, *after = _step(
        *(q, k, v, kv, z, log_scale, token_mask, log_weight, log_decay, KINDS[q_map.kind]),
        *(value for side in (q_map, k_map) for value in side[1:5]),
        *(weights.scaling, weights.mean),
    )
    return out, normalizer, (after[0], *((None, None) if z is None else after[1:]))


def step_warps(kind: int) -> int:
    """Warps of a program: pairs are picked from a table that takes more registers."""
    return 8 if kind == KINDS["projected_pairs"] else 4


@torch.library.custom_op(f"{NAMESPACE}::linear_attention_step", mutates_args=())
def _step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: torch.Tensor,
    z: torch.Tensor | None,
    log_scale: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    log_weight: torch.Tensor | None,
    log_decay: torch.Tensor | None,
    kind: int,
    q_multiplier: float,
    q_weight: torch.Tensor | None,
    q_center: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    k_multiplier: float,
    k_weight: torch.Tensor | None,
    k_center: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    scaling: float,
    mean: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_launches(q.device)
    q, k, v = readable(q), readable(k), readable(v)
    if log_decay is not None and log_decay.ndim == 4:
        log_decay = readable(log_decay)
    kv = kv.contiguous()
    z, log_scale, token_mask, q_bias, k_bias, q_center, k_center, mean = (
        None if x is None else x.contiguous()
        for x in (z, log_scale, token_mask, q_bias, k_bias, q_center, k_center, mean)
    )
    (batch, heads, length, dim), (features, width) = q.shape, kv.shape[2:]
    dim -= kind == KINDS["turned_relu"]
    out, normalizer, *after = _results(q, v, kv)
    constants = config.step_constants(
        *(features, width, dim, 0 if k_weight is None else k_weight.shape[-1]),
        GROUP=group_of(q, k, v),
        KIND=kind,
        NORMALIZED=z is not None,
        HAS_MASK=token_mask is not None,
        HAS_LOG_WEIGHTS=log_weight is not None,
        HAS_MEAN=mean is not None,
        HAS_CENTER=k_center is not None,
        HAS_DECAY=log_decay is not None,
        GATED=log_decay is not None and log_decay.ndim == 4,
    )
    nothing = normalizer  # stands for what there is not: the kernel never reads it
    sides = (q_weight, q_bias, q_center, k_weight, k_bias, k_center, mean)
    strides = [x.stride()[:3] for x in (q, k, v, out, either(log_weight, nothing), either(log_decay, nothing))]
    strides += [weight_strides(x) for x in (q_weight, k_weight)]
    with on_device(q.device):
        linear_attention_step_kernel[(batch * heads * -(-width // constants["BC"]),)](
            *(q, k, v, out, normalizer, kv, either(z, nothing), either(log_scale, nothing), *after),
            *(either(x, nothing) for x in (token_mask, log_weight, log_decay, *sides)),
            *(x for of_one in strides for x in of_one),
            *(q_multiplier, k_multiplier, scaling, heads, length),
            num_warps=step_warps(kind),
            **constants,
        )
    return out, normalizer, after[0], after[1], after[2]


def _results(q: torch.Tensor, v: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    (batch, heads, length), width = q.shape[:3], v.shape[-1]
    out = v.new_empty(batch, length, heads, width).transpose(1, 2)
    sums = [(length,), tuple(kv.shape[2:]), (kv.shape[2],), ()]
    return out, *(q.new_empty((batch, heads, *shape), dtype=torch.float32) for shape in sums)


@_step.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return _results(q, v, kv)
