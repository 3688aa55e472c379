"""Linear attention with a decay per feature: sums of chunks, their scan, and the output, chunk by chunk.

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
    LOG2E,
    RUNTIME,
    TINY,
    load_tile,
    load_transposed,
    pairs,
    to_middle,
    to_operand,
)

__all__ = ["gated_fwd_kernel", "gated_reach_kernel", "gated_scan_kernel", "gated_sums_kernel"]


@triton.jit(do_not_specialize=RUNTIME)
def gated_reach_kernel(
    decay,
    reach,
    g_batch,
    g_head,
    g_token,
    heads,
    k_length,
    F: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """Running sums of log-decays in each chunk, bounded and in base 2."""
    f_tiles: tl.constexpr = (F + BF - 1) // BF
    pid = tl.program_id(0)
    f, block = pid % f_tiles * BF + tl.arange(0, BF), (pid // f_tiles).to(tl.int64)
    chunks = tl.cdiv(k_length, BT)
    bh, first = block // chunks, block % chunks * BT
    decay += bh // heads * g_batch + bh % heads * g_head + first * g_token
    rows = tl.arange(0, BT)
    inside = rows < k_length - first
    g = tl.maximum(load_tile(decay, g_token, rows, inside, f, F).to(tl.float32), LEAST_LOG_DECAY) * LOG2E
    place = reach + (bh * k_length + first) * F + rows[:, None] * F + f[None, :]
    tl.store(place, tl.cumsum(g, 0), mask=inside[:, None] & (f < F)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def gated_sums_kernel(
    b,
    c,
    reach,
    factor,
    extra,
    state,
    vector,
    b_batch,
    b_head,
    b_token,
    c_batch,
    c_head,
    c_token,
    factor_batch,
    factor_head,
    factor_token,
    heads,
    q_length,
    k_length,
    F: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BF16_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of k v^T with the key scale as of each chunk's end; if REVERSE of q (do / den)^T as of its start."""
    f_tiles: tl.constexpr = (F + BF - 1) // BF
    d_tiles: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    tile, block = pid % (f_tiles * d_tiles), (pid // (f_tiles * d_tiles)).to(tl.int64)
    chunks = tl.cdiv(k_length, BT)
    bh, first = block // chunks, block % chunks * BT
    batch, head = bh // heads, bh % heads
    f, d, rows = tile // d_tiles * BF + tl.arange(0, BF), tile % d_tiles * BD + tl.arange(0, BD), tl.arange(0, BT)
    offset = k_length - q_length if REVERSE else 0
    here = first - offset
    length = tl.minimum(k_length - first, BT).to(tl.int32)
    seen = (rows < length) & (rows + here >= 0)
    b += batch * b_batch + head * b_head + here * b_token
    c += batch * c_batch + head * c_head + here * c_token
    reach += (bh * k_length + first) * F
    x = load_transposed(b, b_token, rows, seen, f, F).to(tl.float32)
    y = load_tile(c, c_token, rows, seen, d, D)
    if HAS_FACTOR:
        factor += batch * factor_batch + head * factor_head + here * factor_token
        w = tl.load(factor + rows * factor_token, mask=seen, other=0.0)
    passed = load_transposed(reach, F, rows, rows < length, f, F)
    if REVERSE:
        x = x * tl.exp2(passed)
        if HAS_FACTOR:
            y = y.to(tl.float32) * w[:, None]
        more = tl.load(extra + bh * q_length + here + rows, mask=seen, other=0.0)
        added = tl.sum(x * more[None, :], 1)
    else:
        if HAS_FACTOR:  # a key of scale 0 counts for nothing, whatever stands there
            x = tl.where(w[None, :] == 0.0, 0.0, x * w[None, :])
            y = tl.where(w[:, None] == 0.0, 0.0, y)
        whole = tl.load(reach + (length - 1) * F + f, mask=f < F, other=0.0)
        x = x * tl.exp2(tl.minimum(whole[:, None] - passed, 0.0))
        added = tl.sum(x, 1)
    sums = tl.dot(to_operand(x, BF16_DOTS), to_operand(y, BF16_DOTS), input_precision=PRECISION)
    place = state + block * F * D + f[:, None] * D + d[None, :]
    tl.store(place, sums, mask=(f[:, None] < F) & (d[None, :] < D))
    if tile % d_tiles == 0:
        tl.store(vector + block * F + f, added, mask=f < F)


@triton.jit(do_not_specialize=RUNTIME)
def gated_scan_kernel(
    state,
    vector,
    before_state,
    before_vector,
    last_state,
    last_vector,
    reach,
    k_length,
    F: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
):
    """Sums of chunks into the state before each (after each if REVERSE), in place, and the state past all."""
    tiles_state: tl.constexpr = (F * D + BLOCK - 1) // BLOCK
    tiles: tl.constexpr = tiles_state + (F + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    tile, bh = pid % tiles, (pid // tiles).to(tl.int64)
    size = tl.where(tile < tiles_state, F * D, F)
    width = tl.where(tile < tiles_state, D, 1)
    if tile >= tiles_state:
        tile -= tiles_state
        state, before_state, last_state = vector, before_vector, last_vector
    at = tile * BLOCK + tl.arange(0, BLOCK)
    ok = at < size
    running = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_BEFORE:
        running = tl.load(before_state + bh * size + at, mask=ok, other=0.0)
    chunks = tl.cdiv(k_length, BT)
    for index in range(chunks):
        chunk = chunks - 1 - index if REVERSE else index
        place = state + (bh * chunks + chunk) * size + at
        end = tl.minimum((chunk + 1) * BT, k_length) - 1
        kept = tl.exp2(tl.load(reach + (bh * k_length + end) * F + at // width, mask=ok, other=0.0))
        sums = tl.load(place, mask=ok, other=0.0)
        tl.store(place, running, mask=ok)
        running = running * kept + sums
    tl.store(last_state + bh * size + at, running, mask=ok)


@triton.jit(do_not_specialize=RUNTIME)
def gated_fwd_kernel(
    q,
    k,
    v,
    reach,
    scale,
    out,
    den,
    state,
    vector,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    scale_batch,
    scale_head,
    scale_token,
    out_batch,
    out_head,
    out_token,
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
    """Output and denominator of one chunk from the state before it."""
    d_tiles: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    tile, block = pid % d_tiles, (pid // d_tiles).to(tl.int64)
    chunks = tl.cdiv(k_length, BT)
    bh, first = block // chunks, block % chunks * BT
    batch, head = bh // heads, bh % heads
    ask = first - (k_length - q_length)  # the chunk's first query
    rows, d = tl.arange(0, BT), tile * BD + tl.arange(0, BD)
    length = tl.minimum(k_length - first, BT).to(tl.int32)
    inside = rows < length
    asks = inside & (rows + ask >= 0)
    q += batch * q_batch + head * q_head + ask * q_token
    k += batch * k_batch + head * k_head + first * k_token
    v += batch * v_batch + head * v_head + first * v_token
    out += batch * out_batch + head * out_head + ask * out_token
    reach += (bh * k_length + first) * F
    weight = tl.where(inside, 1.0, 0.0)
    if HAS_SCALE:
        weight = tl.load(
            scale + batch * scale_batch + head * scale_head + (first + rows) * scale_token, mask=inside, other=0.0
        )
    scores = tl.zeros([BT, BT], dtype=tl.float32)
    result = tl.zeros([BT, BD], dtype=tl.float32)
    total = tl.zeros([BT], dtype=tl.float32)
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        x = load_tile(q, q_token, rows, asks, f, F).to(tl.float32)
        past = x * tl.exp2(load_tile(reach, F, rows, inside, f, F))
        inner = (f[:, None] < F) & (d[None, :] < D)
        before = tl.load(state + block * F * D + f[:, None] * D + d[None, :], mask=inner, other=0.0)
        result += tl.dot(to_operand(past, BF16_DOTS), to_operand(before, BF16_DOTS), input_precision=PRECISION)
        before_z = tl.load(vector + block * F + f, mask=f < F, other=0.0)
        total += tl.sum(past * before_z[None, :], 1)
        y = load_transposed(k, k_token, rows, inside, f, F).to(tl.float32)
        y = tl.where(weight[None, :] == 0.0, 0.0, y * weight[None, :])
        product = tl.dot(to_operand(x, BF16_DOTS), to_operand(y, BF16_DOTS), input_precision=PRECISION)
        scores += tl.where(rows[:, None] == rows[None, :], product, 0.0)
        for level in range(levels):
            right = to_operand(x * to_middle(reach, rows[:, None], length, f[None, :], level, F), BF16_DOTS)
            left = to_operand(y * to_middle(reach, rows[None, :], length, f[:, None], level, F), BF16_DOTS)
            product = tl.dot(right, left, input_precision=PRECISION)
            scores += tl.where(pairs(rows[:, None], rows[None, :], level), product, 0.0)
    values = load_tile(v, v_token, rows, inside, d, D)
    values = to_operand(tl.where(weight[:, None] == 0.0, 0.0, values), BF16_DOTS)
    result += tl.dot(to_operand(scores, BF16_DOTS), values, input_precision=PRECISION)
    total += tl.sum(scores, 1)
    if NORMALIZED:
        safe = tl.where(tl.abs(total) < TINY, tl.where(total < 0.0, -TINY, TINY), total)
        result = result / safe[:, None]
    place = out + rows[:, None] * out_token + d[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=asks[:, None] & (d[None, :] < D))
    if tile == 0:
        tl.store(den + bh * q_length + ask + rows, total, mask=asks)
