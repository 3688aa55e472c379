"""Kernels of linear attention: sums of segments, their scan, and the forward pass.

A long sequence is cut into segments so that few heads fill a GPU: `sums` adds up each segment's keys on its own,
`scan` turns the sums into the state before each segment, then `fwd` (or the backward pass) runs through every segment
with its state in registers. One segment needs only the last launch. Bidirectional attention has one state for all.

Layouts: q, k, v, out and their gradients by strides of (batch, head, token), the last dimension contiguous; states
`[B, H, segments, F, D]` and `[B, H, segments, F]`; `den`, `inverse`, `d_den`, `keep` `[B, H, Tq]` and `decay`
`[B, H, Tk]` contiguous. All grids are one-dimensional, tiles of one segment side by side: they read the same tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear_attn.kernels.linear.device import (
    FORWARD,
    LEAST_LOG_DECAY,
    scan_tile,
    sum_tile,
)

__all__ = [
    "LEAST_LOG_DECAY",
    "linear_attention_fwd_kernel",
    "linear_attention_scan_kernel",
    "linear_attention_sums_kernel",
]

# Lengths change from call to call: no kernel is compiled again for one that is 1 or a multiple of 16.


@triton.jit(do_not_specialize=["heads", "q_length", "k_length", "segments", "segment_length"])
def linear_attention_sums_kernel(
    b,
    c,
    factor,
    extra,
    decay,
    keep_decay,
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
    b_multiplier,
    heads,
    q_length,
    k_length,
    segments,
    segment_length,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    REVERSE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MAP: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    GUARD: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    BF16_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over each segment: of (k, v) with the key scale, or if REVERSE of (q, do) with 1 / den and d den."""
    n_tiles: tl.constexpr = (N + BN - 1) // BN
    c_tiles: tl.constexpr = (C + BC - 1) // BC
    tiles: tl.constexpr = n_tiles * c_tiles
    pid = tl.program_id(0)
    tile, block = pid % tiles, (pid // tiles).to(tl.int64)
    segment, bh = (block % segments).to(tl.int32), block // segments
    batch, head = bh // heads, bh % heads
    n0, c0 = tile // c_tiles * BN, tile % c_tiles * BC
    # Positions are those of keys; queries, which may be fewer, stand at the last ones.
    offset, shift = 0, bh * 0
    length = k_length
    if REVERSE:
        if CAUSAL:
            offset = k_length - q_length
            shift += offset  # in 64 bits, as all addresses are
        else:
            length = q_length
        extra += bh * q_length - shift
    b += batch * b_batch + head // GROUP * b_head - shift * b_token
    c += batch * c_batch + head // GROUP * c_head - shift * c_token
    factor += batch * factor_batch + head * factor_head - shift * factor_token
    start = segment * segment_length
    end = tl.minimum(start + segment_length, length)  # chunks here need not be those that cut the segments
    chunks = tl.cdiv(tl.maximum(end - start, 0), BT)
    sums, sums_n, total = sum_tile(
        (b, b_token, b_multiplier),
        (c, c_token, 1.0),
        factor,
        factor_token,
        extra,
        decay + bh * k_length,
        offset,
        end,
        start,
        chunks,
        n0,
        c0,
        N,
        C,
        BT,
        BN,
        BC,
        REVERSE,
        MAP,
        HAS_FACTOR,
        GUARD,
        HAS_DECAY,
        BF16_DOTS,
        PRECISION,
    )
    n, cols = n0 + tl.arange(0, BN), c0 + tl.arange(0, BC)
    place = state + block * N * C + n[:, None] * C + cols[None, :]
    tl.store(place, sums, mask=(n[:, None] < N) & (cols[None, :] < C))
    if c0 == 0:
        tl.store(vector + block * N + n, sums_n, mask=n < N)
    if HAS_DECAY:
        if tile == 0:
            tl.store(keep_decay + block, total)


@triton.jit(do_not_specialize=["segments"])
def linear_attention_scan_kernel(
    state,
    vector,
    before_state,
    before_vector,
    total_state,
    total_vector,
    decay,
    segments,
    SIZE_STATE: tl.constexpr,
    SIZE_VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_DECAY: tl.constexpr,
):
    """Sums of segments into the state before each (after each if REVERSE), in place, or into their total only."""
    tiles_state: tl.constexpr = (SIZE_STATE + BLOCK - 1) // BLOCK
    tiles: tl.constexpr = tiles_state + (SIZE_VECTOR + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    tile, bh = pid % tiles, (pid // tiles).to(tl.int64)
    size = tl.where(tile < tiles_state, SIZE_STATE, SIZE_VECTOR)
    if tile >= tiles_state:
        tile -= tiles_state
        state, before_state, total_state = vector, before_vector, total_vector
    offsets = tile * BLOCK + tl.arange(0, BLOCK)
    ok = offsets < size
    running = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_BEFORE:
        running = tl.load(before_state + bh * size + offsets, mask=ok, other=0.0)
    for index in range(segments):
        segment = index
        if REVERSE:
            segment = segments - 1 - index
        place = state + (bh * segments + segment) * size + offsets
        sums = tl.load(place, mask=ok, other=0.0)
        if EXCLUSIVE:
            tl.store(place, running, mask=ok)
        if HAS_DECAY:
            running *= tl.exp2(tl.load(decay + bh * segments + segment))
        running += sums
    if not EXCLUSIVE:
        tl.store(total_state + bh * size + offsets, running, mask=ok)


@triton.jit(do_not_specialize=["heads", "q_length", "k_length", "segments", "segment_length"])
def linear_attention_fwd_kernel(
    q,
    k,
    v,
    out,
    den,
    scale,
    keep,
    decay,
    state,
    vector,
    last_state,
    last_vector,
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
    scale_batch,
    scale_head,
    scale_token,
    q_multiplier,
    k_multiplier,
    heads,
    q_length,
    k_length,
    segments,
    segment_length,
    GROUP: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
    CAUSAL: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    MAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    BF16_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and denominator of a segment; causal, the last segment also writes the state after all keys."""
    tiles: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    c0, block = pid % tiles * BD, (pid // tiles).to(tl.int64)
    segment, bh = (block % segments).to(tl.int32), block // segments
    batch, head = bh // heads, bh % heads
    offset, shift = 0, bh * 0
    length = q_length
    if CAUSAL:
        offset = k_length - q_length
        shift += offset  # in 64 bits, as all addresses are
        length = k_length
    q += batch * q_batch + head * q_head - shift * q_token
    k += batch * k_batch + head // GROUP * k_head
    v += batch * v_batch + head // GROUP * v_head
    out += batch * out_batch + head * out_head - shift * out_token
    den += bh * q_length - shift
    keep += bh * q_length - shift
    scale += batch * scale_batch + head * scale_head

    n, cols = tl.arange(0, BF), c0 + tl.arange(0, BD)
    inner = (n[:, None] < F) & (cols[None, :] < D)
    sums = tl.zeros([BF, BD], dtype=tl.float32)
    sums_n = tl.zeros([BF], dtype=tl.float32)
    if HAS_STATE:
        place = bh
        if CAUSAL:
            place = block
        sums = tl.load(state + place * F * D + n[:, None] * D + cols[None, :], mask=inner, other=0.0)
        sums_n = tl.load(vector + place * F + n, mask=n < F, other=0.0)
    start = segment * segment_length
    end = tl.minimum(start + segment_length, length)
    last = segment == segments - 1
    # Where no query stands there is nothing to do, but the last segment carries the state to the end.
    chunks = tl.where((end > offset) | last, tl.cdiv(tl.maximum(end - start, 0), BT), 0)
    sums, sums_n, _ = scan_tile(
        (q, q_token, q_multiplier),
        (k, k_token, k_multiplier),
        (v, v_token, 1.0),
        (q, q_token, q_multiplier),
        out,
        out_token,
        scale,
        scale_token,
        keep,
        keep,
        decay + bh * k_length,
        den,
        den,
        offset,
        0,
        length,
        start,
        chunks,
        sums,
        sums_n,
        tl.zeros([BD], dtype=tl.float32),
        c0,
        c0 == 0,
        F,
        D,
        BT,
        BF,
        BD,
        FORWARD,
        CAUSAL,
        NORMALIZED,
        MAP,
        MAP,
        0,
        HAS_SCALE,
        HAS_KEEP,
        HAS_DECAY,
        False,
        BF16_DOTS,
        PRECISION,
    )
    if CAUSAL:
        if last:
            tl.store(last_state + bh * F * D + n[:, None] * D + cols[None, :], sums, mask=inner)
            if c0 == 0:
                tl.store(last_vector + bh * F + n, sums_n, mask=n < F)
