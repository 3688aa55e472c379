"""Kernels of linear attention from tokens: features are computed as tokens are read, and never written.

    o_i = sum_j w_j phi(q_i) . phi(k_j) v_j / sum_j w_j phi(q_i) . phi(k_j)

with maps phi and weights w_j as `ops.features.maps` spells them out, the scale of key j's features in w_j. Sums are
kept relative to the largest log weight so far, `top`, which is all that a key needs to know of those before it: no
weight overflows, and none reaches an earlier row. `mapped_attention_kernel` runs through a causal sequence in one
launch, state in registers; of a bidirectional one `mapped_sums_kernel` adds up segments of keys first, each relative to
its own top.

Layouts: q, k, v, out, log weights and log-decays by strides of (batch, head, token), the last dimension of the former
contiguous; projections `[H or 1, D, F]` by strides, biases `[H, F]`, `form` `[H]`, `mean` and centers `[H, D]`,
`square` `[H or 1, D, D]` contiguous; masks bool `[B, T]`; states `[B, H, segments, F, C]`, `[B, H, segments, F]` and
`[B, H, segments]`; `normalizer` `[B, H, Tq]`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear_attn.kernels.linear.device import IDENTITY, LEAST_LOG_DECAY, TINY, load_tile, to_dot
from hf_linear_attn.kernels.linear.map_device import (
    LOG2E,
    LOG_ZERO,
    add_keys,
    larger,
    load_side,
    load_weights,
    map_keys,
    map_tile,
)

__all__ = ["mapped_attention_kernel", "mapped_sums_kernel"]


@triton.jit(do_not_specialize=["heads", "length", "segments", "segment_length"])
def mapped_sums_kernel(
    k,
    v,
    state,
    vector,
    tops,
    mask,
    k_weight,
    k_center,
    k_bias,
    k_form,
    mean,
    square,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    k_weight_head,
    k_weight_dim,
    k_weight_feature,
    square_head,
    k_multiplier,
    scaling,
    heads,
    length,
    segments,
    segment_length,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BF: tl.constexpr,
    BC: tl.constexpr,
    K_KIND: tl.constexpr,
    K_EXP_FORM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SQUARE: tl.constexpr,
    BF16_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over each segment of keys, and the top that they are relative to."""
    tiles: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    c0, block = pid % tiles * BC, (pid // tiles).to(tl.int64)
    segment, bh = (block % segments).to(tl.int32), block // segments
    batch, head = bh // heads, bh % heads
    k += batch * k_batch + head // GROUP * k_head
    v += batch * v_batch + head // GROUP * v_head
    mask += batch * length
    offsets, d, n, cols = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BF), c0 + tl.arange(0, BC)
    side = load_side(
        k_weight,
        k_center,
        k_bias,
        k_form,
        head,
        k_weight_head,
        k_weight_dim,
        k_weight_feature,
        D,
        F,
        BD,
        BF,
        K_KIND,
        HAS_CENTER,
        HAS_BIAS,
        BF16_DOTS,
    )
    weights = load_weights(
        mean, square, k_center, head, square_head, D, BD, HAS_MEAN, HAS_SQUARE, HAS_CENTER, BF16_DOTS
    )
    sums = tl.zeros([BF, BC], dtype=tl.float32)
    sums_n = tl.zeros([BF], dtype=tl.float32)
    top = LOG_ZERO + 0.0
    start = segment * segment_length
    end = tl.minimum(start + segment_length, length)
    for index in range(tl.cdiv(tl.maximum(end - start, 0), BT)):
        first = start + index * BT
        ok = first + offsets < end
        if HAS_MASK:
            ok = ok & (tl.load(mask + first + offsets, mask=ok, other=0) != 0)
        x = load_tile((k, k_token, 1.0), first, offsets, ok, d, D, BD, IDENTITY)
        features, log_weight = map_keys(
            x,
            k_multiplier,
            scaling,
            side,
            weights,
            ok,
            F,
            BT,
            BF,
            K_KIND,
            K_EXP_FORM,
            NORMALIZED,
            HAS_MEAN,
            HAS_SQUARE,
            BF16_DOTS,
            PRECISION,
        )
        values = load_tile((v, v_token, 1.0), first, offsets, ok, cols, C, BC, IDENTITY)
        sums, sums_n, top = add_keys(sums, sums_n, top, features, values, log_weight, BF16_DOTS, PRECISION)
    inner = (n[:, None] < F) & (cols[None, :] < C)
    tl.store(state + block * F * C + n[:, None] * C + cols[None, :], sums, mask=inner)
    if c0 == 0:
        tl.store(vector + block * F + n, sums_n, mask=n < F)
        tl.store(tops + block, top)


@triton.jit(do_not_specialize=["heads", "q_length", "k_length", "segments", "segment_length"])
def mapped_attention_kernel(
    q,
    k,
    v,
    out,
    normalizer,
    state,
    vector,
    tops,
    last_state,
    last_vector,
    last_top,
    q_mask,
    k_mask,
    q_weight,
    q_center,
    q_bias,
    q_form,
    k_weight,
    k_center,
    k_bias,
    k_form,
    mean,
    square,
    log_weights,
    decay,
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
    q_weight_head,
    q_weight_dim,
    q_weight_feature,
    k_weight_head,
    k_weight_dim,
    k_weight_feature,
    square_head,
    log_weights_batch,
    log_weights_head,
    log_weights_token,
    decay_batch,
    decay_head,
    decay_token,
    q_multiplier,
    k_multiplier,
    scaling,
    heads,
    q_length,
    k_length,
    segments,
    segment_length,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BF: tl.constexpr,
    BC: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_STATE: tl.constexpr,
    Q_KIND: tl.constexpr,
    K_KIND: tl.constexpr,
    Q_EXP_FORM: tl.constexpr,
    K_EXP_FORM: tl.constexpr,
    HAS_Q_MASK: tl.constexpr,
    HAS_K_MASK: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SQUARE: tl.constexpr,
    HAS_LOG_WEIGHTS: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    BF16_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs and log denominators; causal, of a whole sequence, and the state after it.

    Bidirectional, of a segment of queries beside `segments` sums of keys.
    """
    tiles: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    c0, block = pid % tiles * BC, (pid // tiles).to(tl.int64)
    bh, start, offset = block, 0, 0
    if CAUSAL:
        offset = k_length - q_length
        end = k_length
    else:
        parts = tl.cdiv(q_length, segment_length)
        bh = block // parts
        start = (block % parts).to(tl.int32) * segment_length
        end = tl.minimum(start + segment_length, q_length)
    batch, head = bh // heads, bh % heads
    shifted = bh * 0 + offset  # in 64 bits, as all addresses are
    q += batch * q_batch + head * q_head - shifted * q_token
    k += batch * k_batch + head // GROUP * k_head
    v += batch * v_batch + head // GROUP * v_head
    out += batch * out_batch + head * out_head - shifted * out_token
    normalizer += bh * q_length - shifted
    q_mask += batch * q_length - shifted
    k_mask += batch * k_length
    log_weights += batch * log_weights_batch + head * log_weights_head
    decay += batch * decay_batch + head * decay_head

    offsets, d, n, cols = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BF), c0 + tl.arange(0, BC)
    inner = (n[:, None] < F) & (cols[None, :] < C)
    q_side = load_side(
        q_weight,
        q_center,
        q_bias,
        q_form,
        head,
        q_weight_head,
        q_weight_dim,
        q_weight_feature,
        D,
        F,
        BD,
        BF,
        Q_KIND,
        HAS_CENTER,
        HAS_BIAS,
        BF16_DOTS,
    )
    k_side = load_side(
        k_weight,
        k_center,
        k_bias,
        k_form,
        head,
        k_weight_head,
        k_weight_dim,
        k_weight_feature,
        D,
        F,
        BD,
        BF,
        K_KIND,
        HAS_CENTER,
        HAS_BIAS,
        BF16_DOTS,
    )
    weights = load_weights(
        mean, square, k_center, head, square_head, D, BD, HAS_MEAN, HAS_SQUARE, HAS_CENTER, BF16_DOTS
    )
    sums = tl.zeros([BF, BC], dtype=tl.float32)
    sums_n = tl.zeros([BF], dtype=tl.float32)
    top = LOG_ZERO + 0.0
    if HAS_STATE:
        for segment in range(segments):
            place = bh * segments + segment
            other = tl.load(tops + place)
            after = tl.maximum(top, other)
            kept, added = tl.exp2((top - after) * LOG2E), tl.exp2((other - after) * LOG2E)
            read = tl.load(state + place * F * C + n[:, None] * C + cols[None, :], mask=inner, other=0.0)
            sums = sums * kept + read * added
            sums_n = sums_n * kept + tl.load(vector + place * F + n, mask=n < F, other=0.0) * added
            top = after
    one = tl.full([BT, BC], 1.0, dtype=tl.float32)
    for index in range(tl.cdiv(tl.maximum(end - start, 0), BT)):
        first = start + index * BT
        t = first + offsets
        inside = t < end
        row_ok = inside & (t >= offset)
        read_ok = row_ok
        if HAS_Q_MASK:
            read_ok = row_ok & (tl.load(q_mask + t, mask=row_ok, other=0) != 0)
        x = load_tile((q, q_token, 1.0), first, offsets, read_ok, d, D, BD, IDENTITY)
        at, log_scale = map_tile(
            x, q_multiplier, q_side, read_ok, F, BT, BF, Q_KIND, Q_EXP_FORM, NORMALIZED, BF16_DOTS, PRECISION
        )
        mixed = tl.dot(to_dot(at, BF16_DOTS), to_dot(sums, BF16_DOTS), input_precision=PRECISION)
        den = tl.sum(at.to(tl.float32) * sums_n[None, :], 1)
        if CAUSAL:
            ok = inside
            if HAS_K_MASK:
                ok = inside & (tl.load(k_mask + t, mask=inside, other=0) != 0)
            x = load_tile((k, k_token, 1.0), first, offsets, ok, d, D, BD, IDENTITY)
            bt, log_weight = map_keys(
                x,
                k_multiplier,
                scaling,
                k_side,
                weights,
                ok,
                F,
                BT,
                BF,
                K_KIND,
                K_EXP_FORM,
                NORMALIZED,
                HAS_MEAN,
                HAS_SQUARE,
                BF16_DOTS,
                PRECISION,
            )
            values = load_tile((v, v_token, 1.0), first, offsets, ok, cols, C, BC, IDENTITY)
            if HAS_LOG_WEIGHTS:
                log_weight += tl.load(log_weights + t * log_weights_token, mask=ok, other=0.0)
            reach = tl.zeros([BT], dtype=tl.float32)
            span = 0.0
            if HAS_DECAY:
                # Relative to what has decayed since the chunk began, weights are as they are without decay.
                forgotten = tl.load(decay + t * decay_token, mask=ok, other=0.0)
                forgotten = tl.maximum(forgotten, LEAST_LOG_DECAY)
                reach, span = tl.cumsum(forgotten, 0), tl.sum(forgotten, 0)
                log_weight -= reach
            largest = tl.maximum(tl.associative_scan(log_weight, 0, larger), top)  # that each row sees
            from_state = tl.exp2((top - largest) * LOG2E)
            p = tl.dot(at, tl.trans(bt), input_precision=PRECISION)
            between = tl.minimum(log_weight[None, :] - largest[:, None], 0.0)
            p = tl.where(offsets[:, None] >= offsets[None, :], p * tl.exp2(between * LOG2E), 0.0)
            den = den * from_state + tl.sum(p, 1)
            inner_sums = tl.dot(to_dot(p, BF16_DOTS), to_dot(values, BF16_DOTS), input_precision=PRECISION)
            # No chain of two dot products into one accumulator: it takes a layout that doubles the registers.
            mixed = tl.fma(mixed * from_state[:, None], one, inner_sums)
            sums, sums_n, top = add_keys(sums, sums_n, top, bt, values, log_weight, BF16_DOTS, PRECISION)
            top += span
            log_scale += largest + reach
        else:
            log_scale += top
        if c0 == 0:
            tl.store(normalizer + t, tl.log(tl.maximum(den, TINY)) + log_scale, mask=row_ok)
        den = tl.where(tl.abs(den) < TINY, tl.where(den < 0, -TINY, TINY), den)
        tl.store(
            out + first.to(tl.int64) * out_token + offsets[:, None] * out_token + cols[None, :],
            (mixed / den[:, None]).to(out.dtype.element_ty),
            mask=row_ok[:, None] & (cols[None, :] < C),
        )
    if CAUSAL:
        tl.store(last_state + bh * F * C + n[:, None] * C + cols[None, :], sums, mask=inner)
        if c0 == 0:
            tl.store(last_vector + bh * F + n, sums_n, mask=n < F)
            tl.store(last_top + bh, top)
