"""Linear attention with a decay per feature: gradients, each program those of one chunk.

Layouts: q, k, v, decay, out and their gradients by strides of (batch, head, token), the last dimension contiguous;
reach `[B, H, Tk, F]`, states `[B, H, chunks, F, D]` and `[B, H, chunks, F]`, `den`, `inverse`, `d_den` `[B, H, Tq]`
contiguous. Positions are those of keys; queries, which may be fewer, stand at the last ones. `reach` is the sum of
log-decays, in base 2, from the start of a chunk to each token of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear_attn.kernels.gated.device import (
    LEAST_LOG_DECAY,
    RUNTIME,
    TINY,
    load_scaled,
    load_tile,
    load_transposed,
    pairs,
    to_middle,
    to_operand,
)

__all__ = ["gated_delta_kernel", "gated_query_key_bwd_kernel", "gated_value_bwd_kernel"]


@triton.jit(do_not_specialize=RUNTIME)
def gated_delta_kernel(
    d_out,
    out,
    den,
    more,
    inverse,
    d_den,
    d_out_batch,
    d_out_head,
    d_out_token,
    out_batch,
    out_head,
    out_token,
    heads,
    q_length,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """1 / den and the gradient of den, that through the quotient included; both 0 in rows that see no key."""
    tiles = tl.cdiv(q_length, BT)
    pid = tl.program_id(0)
    first, bh = (pid % tiles * BT).to(tl.int64), (pid // tiles).to(tl.int64)
    batch, head = bh // heads, bh % heads
    d_out += batch * d_out_batch + head * d_out_head + first * d_out_token
    out += batch * out_batch + head * out_head + first * out_token
    rows, d = tl.arange(0, BT), tl.arange(0, BD)
    ok = rows < q_length - first
    x = load_tile(d_out, d_out_token, rows, ok, d, D).to(tl.float32)
    y = load_tile(out, out_token, rows, ok, d, D).to(tl.float32)
    at = bh * q_length + first + rows
    total = tl.load(den + at, mask=ok, other=0.0)
    one_over = tl.where(tl.abs(total) < TINY, 0.0, 1.0 / tl.where(tl.abs(total) < TINY, 1.0, total))
    tl.store(inverse + at, one_over, mask=ok)
    tl.store(d_den + at, tl.load(more + at, mask=ok, other=0.0) - tl.sum(x * y, 1) * one_over, mask=ok)


@triton.jit(do_not_specialize=RUNTIME)
def gated_query_key_bwd_kernel(
    q,
    k,
    v,
    decay,
    reach,
    scale,
    d_out,
    inverse,
    d_den,
    state,
    vector,
    d_state,
    d_vector,
    d_q,
    d_k,
    d_decay,
    d_scale,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    g_batch,
    g_head,
    g_token,
    scale_batch,
    scale_head,
    scale_token,
    d_out_batch,
    d_out_head,
    d_out_token,
    d_q_batch,
    d_q_head,
    d_q_token,
    d_k_batch,
    d_k_head,
    d_k_token,
    heads,
    batch_heads,
    q_length,
    k_length,
    levels,
    F: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BF16_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of queries, keys, decays and key scale (a share for each tile of features) of one chunk.

    The decays' gradient follows from the others': every weight is exp(reach_i - reach_j), so reach_t has gradient
    q_t dq_t - k_t dk_t, and that of the chunk's end the state's. Decay t is in every reach from t on.
    """
    f_tiles: tl.constexpr = (F + BF - 1) // BF
    pid = tl.program_id(0)
    tile, block = pid % f_tiles, (pid // f_tiles).to(tl.int64)
    chunks = tl.cdiv(k_length, BT)
    bh, first = block // chunks, block % chunks * BT
    batch, head = bh // heads, bh % heads
    ask = first - (k_length - q_length)  # the chunk's first query
    rows, f = tl.arange(0, BT), tile * BF + tl.arange(0, BF)
    length = tl.minimum(k_length - first, BT).to(tl.int32)
    inside = rows < length
    asks = inside & (rows + ask >= 0)
    q += batch * q_batch + head * q_head + ask * q_token
    k += batch * k_batch + head * k_head + first * k_token
    v += batch * v_batch + head * v_head + first * v_token
    d_out += batch * d_out_batch + head * d_out_head + ask * d_out_token
    decay += batch * g_batch + head * g_head + first * g_token
    reach += (bh * k_length + first) * F
    weight = tl.where(inside, 1.0, 0.0)
    if HAS_SCALE:
        weight = tl.load(
            scale + batch * scale_batch + head * scale_head + (first + rows) * scale_token, mask=inside, other=0.0
        )
    one_over = tl.where(asks, 1.0, 0.0)
    if NORMALIZED:
        one_over = tl.load(inverse + bh * q_length + ask + rows, mask=asks, other=0.0)
    more = tl.load(d_den + bh * q_length + ask + rows, mask=asks, other=0.0)

    before_z = tl.load(vector + block * F + f, mask=f < F, other=0.0)
    after_z = tl.load(d_vector + block * F + f, mask=f < F, other=0.0)
    whole = tl.load(reach + (length - 1) * F + f, mask=f < F, other=0.0)
    place = block * F * D
    # Queries first, keys then: with both at once the registers would not do.
    d_scores = tl.zeros([BT, BT], dtype=tl.float32) + more[:, None]
    x_grad = tl.zeros([BT, BF], dtype=tl.float32) + more[:, None] * before_z[None, :]
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        given = load_tile(d_out, d_out_token, rows, asks, d, D).to(tl.float32) * one_over[:, None]
        given = to_operand(given, BF16_DOTS)
        values = load_transposed(v, v_token, rows, inside, d, D)
        values = to_operand(tl.where(weight[None, :] == 0.0, 0.0, values), BF16_DOTS)
        d_scores += tl.dot(given, values, input_precision=PRECISION)
        inner = (d[:, None] < D) & (f[None, :] < F)
        before = tl.load(state + place + f[None, :] * D + d[:, None], mask=inner, other=0.0)
        x_grad += tl.dot(given, to_operand(before, BF16_DOTS), input_precision=PRECISION)
    x_grad *= tl.exp2(load_tile(reach, F, rows, inside, f, F))
    own = tl.sum(tl.where(rows[:, None] == rows[None, :], d_scores, 0.0), 1)
    x_grad += own[:, None] * load_scaled(k, k_token, rows, inside, f, F, weight, True)
    shares = to_operand(d_scores, BF16_DOTS)
    for level in range(levels):
        middle = to_middle(reach, rows[:, None], length, f[None, :], level, F)
        part = tl.where(pairs(rows[:, None], rows[None, :], level), shares, 0.0)
        left = load_scaled(k, k_token, rows, inside, f, F, weight, True) * middle
        x_grad += tl.dot(part, to_operand(left, BF16_DOTS), input_precision=PRECISION) * middle
    cols = (f < F)[None, :]
    d_q += batch * d_q_batch + head * d_q_head + ask * d_q_token
    tl.store(d_q + rows[:, None] * d_q_token + f[None, :], x_grad.to(d_q.dtype.element_ty), mask=asks[:, None] & cols)
    d_reach = x_grad * load_tile(q, q_token, rows, asks, f, F).to(tl.float32)

    d_scores = tl.zeros([BT, BT], dtype=tl.float32) + more[None, :]
    y_grad = tl.zeros([BT, BF], dtype=tl.float32) + after_z[None, :]
    d_end = before_z * after_z
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        values = to_operand(load_scaled(v, v_token, rows, inside, d, D, weight, False), BF16_DOTS)
        given = load_transposed(d_out, d_out_token, rows, asks, d, D).to(tl.float32) * one_over[None, :]
        d_scores += tl.dot(values, to_operand(given, BF16_DOTS), input_precision=PRECISION)
        inner = (d[:, None] < D) & (f[None, :] < F)
        after = tl.load(d_state + place + f[None, :] * D + d[:, None], mask=inner, other=0.0)
        y_grad += tl.dot(values, to_operand(after, BF16_DOTS), input_precision=PRECISION)
        before = tl.load(state + place + f[None, :] * D + d[:, None], mask=inner, other=0.0)
        d_end += tl.sum(before * after, 0)
    y_grad *= tl.exp2(tl.minimum(whole[None, :] - load_tile(reach, F, rows, inside, f, F), 0.0))
    y = load_scaled(k, k_token, rows, inside, f, F, weight, True)
    d_end = d_end * tl.exp2(whole) + tl.sum(y * y_grad, 0)
    y_grad += own[:, None] * load_tile(q, q_token, rows, asks, f, F).to(tl.float32)
    shares = to_operand(d_scores, BF16_DOTS)
    for level in range(levels):
        middle = to_middle(reach, rows[:, None], length, f[None, :], level, F)
        part = tl.where(pairs(rows[None, :], rows[:, None], level), shares, 0.0)
        right = load_tile(q, q_token, rows, asks, f, F).to(tl.float32) * middle
        y_grad += tl.dot(part, to_operand(right, BF16_DOTS), input_precision=PRECISION) * middle

    y = load_scaled(k, k_token, rows, inside, f, F, weight, True)
    d_g = tl.cumsum(d_reach - y * y_grad, 0, reverse=True) + d_end[None, :]
    bounded = load_tile(decay, g_token, rows, inside, f, F) <= LEAST_LOG_DECAY
    place = d_decay + (bh * k_length + first) * F + rows[:, None] * F + f[None, :]
    tl.store(place, tl.where(bounded, 0.0, d_g), mask=inside[:, None] & cols)
    if HAS_SCALE:
        unscaled = load_scaled(k, k_token, rows, inside, f, F, weight, False)
        share = tl.sum(unscaled * y_grad, 1)
        tl.store(d_scale + (tile * batch_heads + bh) * k_length + first + rows, share, mask=inside)
        y_grad = y_grad * weight[:, None]
    d_k += batch * d_k_batch + head * d_k_head + first * d_k_token
    tl.store(d_k + rows[:, None] * d_k_token + f[None, :], y_grad.to(d_k.dtype.element_ty), mask=inside[:, None] & cols)


@triton.jit(do_not_specialize=RUNTIME)
def gated_value_bwd_kernel(
    q,
    k,
    reach,
    scale,
    d_out,
    inverse,
    d_state,
    d_v,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    scale_batch,
    scale_head,
    scale_token,
    d_out_batch,
    d_out_head,
    d_out_token,
    d_v_batch,
    d_v_head,
    d_v_token,
    heads,
    q_length,
    k_length,
    levels,
    F: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BF16_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the values of one chunk."""
    d_tiles: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    tile, block = pid % d_tiles, (pid // d_tiles).to(tl.int64)
    chunks = tl.cdiv(k_length, BT)
    bh, first = block // chunks, block % chunks * BT
    batch, head = bh // heads, bh % heads
    ask = first - (k_length - q_length)
    rows, d = tl.arange(0, BT), tile * BD + tl.arange(0, BD)
    length = tl.minimum(k_length - first, BT).to(tl.int32)
    inside = rows < length
    asks = inside & (rows + ask >= 0)
    q += batch * q_batch + head * q_head + ask * q_token
    k += batch * k_batch + head * k_head + first * k_token
    d_out += batch * d_out_batch + head * d_out_head + ask * d_out_token
    reach += (bh * k_length + first) * F
    weight = tl.where(inside, 1.0, 0.0)
    if HAS_SCALE:
        weight = tl.load(
            scale + batch * scale_batch + head * scale_head + (first + rows) * scale_token, mask=inside, other=0.0
        )
    scores = tl.zeros([BT, BT], dtype=tl.float32)
    result = tl.zeros([BT, BD], dtype=tl.float32)
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        x = load_transposed(q, q_token, rows, asks, f, F).to(tl.float32)
        y = load_scaled(k, k_token, rows, inside, f, F, weight, True)
        whole = tl.load(reach + (length - 1) * F + f, mask=f < F, other=0.0)
        coming = y * tl.exp2(tl.minimum(whole[None, :] - load_tile(reach, F, rows, inside, f, F), 0.0))
        inner = (f[:, None] < F) & (d[None, :] < D)
        after = tl.load(d_state + block * F * D + f[:, None] * D + d[None, :], mask=inner, other=0.0)
        result += tl.dot(to_operand(coming, BF16_DOTS), to_operand(after, BF16_DOTS), input_precision=PRECISION)
        product = tl.dot(to_operand(y, BF16_DOTS), to_operand(x, BF16_DOTS), input_precision=PRECISION)
        scores += tl.where(rows[:, None] == rows[None, :], product, 0.0)
        for level in range(levels):
            left = to_operand(y * to_middle(reach, rows[:, None], length, f[None, :], level, F), BF16_DOTS)
            right = to_operand(x * to_middle(reach, rows[None, :], length, f[:, None], level, F), BF16_DOTS)
            product = tl.dot(left, right, input_precision=PRECISION)
            scores += tl.where(pairs(rows[None, :], rows[:, None], level), product, 0.0)
    given = load_tile(d_out, d_out_token, rows, asks, d, D).to(tl.float32)
    if NORMALIZED:
        one_over = tl.load(inverse + bh * q_length + ask + rows, mask=asks, other=0.0)
        given = given * one_over[:, None]
    result += tl.dot(to_operand(scores, BF16_DOTS), to_operand(given, BF16_DOTS), input_precision=PRECISION)
    d_v += batch * d_v_batch + head * d_v_head + first * d_v_token
    place = rows[:, None] * d_v_token + d[None, :]
    tl.store(d_v + place, result.to(d_v.dtype.element_ty), mask=inside[:, None] & (d[None, :] < D))
