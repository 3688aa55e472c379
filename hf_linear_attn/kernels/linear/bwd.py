"""Kernels of linear attention's backward pass: gradients of denominators, then of queries, keys and values.

Layouts as in `linear_attention_fwd`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear_attn.kernels.linear.device import KEY, QUERY, TINY, VALUE, scan_tile

__all__ = ["linear_attention_bwd_kernel", "linear_attention_delta_kernel"]


@triton.jit(do_not_specialize=["heads", "q_length"])
def linear_attention_delta_kernel(
    d_out,
    out,
    den,
    more,
    keep,
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
    NORMALIZED: tl.constexpr,
    HAS_MORE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    """1 / den of each query and the gradient of its denominator, `more` - <out, d_out> / den."""
    tiles = tl.cdiv(q_length, BT)
    pid = tl.program_id(0)
    bh = (pid // tiles).to(tl.int64)
    batch, head = bh // heads, bh % heads
    first = pid % tiles * BT
    offsets, cols = tl.arange(0, BT), tl.arange(0, BD)
    t = first + offsets
    ok = t < q_length
    if HAS_KEEP:
        ok = ok & (tl.load(keep + bh * q_length + t, mask=ok, other=0.0) != 0.0)
    factor = tl.where(ok, 1.0, 0.0)
    gradient = factor * 0.0
    if HAS_MORE:
        gradient = tl.load(more + bh * q_length + t, mask=ok, other=0.0)
    if NORMALIZED:
        here = first.to(tl.int64)
        inner = ok[:, None] & (cols[None, :] < D)
        d_out += batch * d_out_batch + head * d_out_head + here * d_out_token
        out += batch * out_batch + head * out_head + here * out_token
        x = tl.load(d_out + offsets[:, None] * d_out_token + cols[None, :], mask=inner, other=0.0).to(tl.float32)
        y = tl.load(out + offsets[:, None] * out_token + cols[None, :], mask=inner, other=0.0).to(tl.float32)
        sums = tl.load(den + bh * q_length + t, mask=ok, other=0.0)
        # A row that sees nothing has no gradient through its quotient.
        sees = tl.abs(sums) >= TINY
        factor = tl.where(sees, 1.0 / tl.where(sees, sums, 1.0), 0.0)
        gradient -= tl.sum(x * y, 1) * factor
    inside = t < q_length
    tl.store(inverse + bh * q_length + t, factor, mask=inside)
    tl.store(d_den + bh * q_length + t, gradient, mask=inside)


@triton.jit(do_not_specialize=["heads", "q_length", "k_length", "segments", "segment_length", "batch_heads"])
def linear_attention_bwd_kernel(
    q,
    k,
    v,
    d_out,
    d_q,
    d_k,
    d_v,
    d_scale,
    scale,
    inverse,
    d_den,
    decay,
    state,
    vector,
    d_state,
    d_vector,
    d_first_state,
    d_first_vector,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    d_out_batch,
    d_out_head,
    d_out_token,
    d_q_batch,
    d_q_head,
    d_q_token,
    d_k_batch,
    d_k_head,
    d_k_token,
    d_v_batch,
    d_v_head,
    d_v_token,
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
    batch_heads,
    GROUP: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BD: tl.constexpr,
    TILE_F: tl.constexpr,
    TILE_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_D_STATE: tl.constexpr,
    MAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    WANT_D_SCALE: tl.constexpr,
    BF16_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of q, k and v, each a pass of its own in programs of its own.

    `segments` cut the keys if CAUSAL, else queries and keys alike.
    """
    f_tiles: tl.constexpr = (F + TILE_F - 1) // TILE_F
    tiles: tl.constexpr = 2 * f_tiles + (D + TILE_D - 1) // TILE_D
    pid = tl.program_id(0)
    tile, block = pid % tiles, (pid // tiles).to(tl.int64)
    segment, bh = (block % segments).to(tl.int32), block // segments
    batch, head = bh // heads, bh % heads
    offset, shift = 0, bh * 0
    length = q_length
    place = bh
    if CAUSAL:
        offset = k_length - q_length
        shift += offset  # in 64 bits, as all addresses are
        length = k_length
        place = block
    state += place * F * D
    vector += place * F
    d_state += place * F * D
    d_vector += place * F
    queries = (q + batch * q_batch + head * q_head - shift * q_token, q_token, q_multiplier)
    d_outs = (d_out + batch * d_out_batch + head * d_out_head - shift * d_out_token, d_out_token, 1.0)
    keys = (k + batch * k_batch + head // GROUP * k_head, k_token, k_multiplier)
    values = (v + batch * v_batch + head // GROUP * v_head, v_token, 1.0)
    scale += batch * scale_batch + head * scale_head
    inverse += bh * q_length - shift
    d_den += bh * q_length - shift
    decay += bh * k_length
    start = segment * segment_length
    if tile < f_tiles:
        c0_q = tile * TILE_F
        n_q, cols_q = tl.arange(0, BD), c0_q + tl.arange(0, TILE_F)
        sums_q = tl.zeros([BD, TILE_F], dtype=tl.float32)
        sums_c_q = tl.zeros([TILE_F], dtype=tl.float32)
        if HAS_STATE:
            inner_q = (n_q[:, None] < D) & (cols_q[None, :] < F)
            sums_q = tl.load(state + cols_q[None, :] * D + n_q[:, None], mask=inner_q, other=0.0)
            sums_c_q = tl.load(vector + cols_q, mask=cols_q < F, other=0.0)
        end_q = tl.minimum(start + segment_length, length)
        chunks_q = tl.where(end_q > offset, tl.cdiv(tl.maximum(end_q - start, 0), BT), 0)
        scan_tile(
            d_outs,
            values,
            keys,
            queries,
            d_q + batch * d_q_batch + head * d_q_head - shift * d_q_token,
            d_q_token,
            scale,
            scale_token,
            inverse,
            d_den,
            decay,
            inverse,
            d_scale,
            offset,
            0,
            length,
            start,
            chunks_q,
            sums_q,
            tl.zeros([BD], dtype=tl.float32),
            sums_c_q,
            c0_q,
            False,
            D,
            F,
            BT,
            BD,
            TILE_F,
            QUERY,
            CAUSAL,
            False,
            0,
            0,
            MAP,
            HAS_SCALE,
            HAS_KEEP,
            HAS_DECAY,
            False,
            BF16_DOTS,
            PRECISION,
        )
    elif tile < 2 * f_tiles:
        c0_k = (tile - f_tiles) * TILE_F
        n_k, cols_k = tl.arange(0, BD), c0_k + tl.arange(0, TILE_F)
        sums_k = tl.zeros([BD, TILE_F], dtype=tl.float32)
        sums_c_k = tl.zeros([TILE_F], dtype=tl.float32)
        if HAS_D_STATE:
            inner_k = (n_k[:, None] < D) & (cols_k[None, :] < F)
            sums_k = tl.load(d_state + cols_k[None, :] * D + n_k[:, None], mask=inner_k, other=0.0)
            sums_c_k = tl.load(d_vector + cols_k, mask=cols_k < F, other=0.0)
        _sums_k, _n_k, sums_c_k = scan_tile(
            values,
            d_outs,
            queries,
            keys,
            d_k + batch * d_k_batch + head * d_k_head,
            d_k_token,
            scale,
            scale_token,
            inverse,
            d_den,
            decay,
            inverse,
            d_scale + ((tile - f_tiles) * batch_heads.to(tl.int64) + bh) * k_length,
            0,
            offset,
            k_length,
            start,
            tl.cdiv(tl.maximum(tl.minimum(segment_length, k_length - start), 0), BT),
            sums_k,
            tl.zeros([BD], dtype=tl.float32),
            sums_c_k,
            c0_k,
            False,
            D,
            F,
            BT,
            BD,
            TILE_F,
            KEY,
            CAUSAL,
            False,
            0,
            0,
            MAP,
            HAS_SCALE,
            HAS_KEEP,
            HAS_DECAY,
            WANT_D_SCALE,
            BF16_DOTS,
            PRECISION,
        )
        if CAUSAL:
            if segment == 0:
                tl.store(d_first_vector + bh * F + cols_k, sums_c_k, mask=cols_k < F)
    else:
        c0_v = (tile - 2 * f_tiles) * TILE_D
        n_v, cols_v = tl.arange(0, BF), c0_v + tl.arange(0, TILE_D)
        inner_v = (n_v[:, None] < F) & (cols_v[None, :] < D)
        sums_v = tl.zeros([BF, TILE_D], dtype=tl.float32)
        if HAS_D_STATE:
            sums_v = tl.load(d_state + n_v[:, None] * D + cols_v[None, :], mask=inner_v, other=0.0)
        sums_v, _n_v, _c_v = scan_tile(
            keys,
            queries,
            d_outs,
            values,
            d_v + batch * d_v_batch + head * d_v_head,
            d_v_token,
            scale,
            scale_token,
            inverse,
            d_den,
            decay,
            inverse,
            d_scale,
            0,
            offset,
            k_length,
            start,
            tl.cdiv(tl.maximum(tl.minimum(segment_length, k_length - start), 0), BT),
            sums_v,
            tl.zeros([BF], dtype=tl.float32),
            tl.zeros([TILE_D], dtype=tl.float32),
            c0_v,
            False,
            F,
            D,
            BT,
            BF,
            TILE_D,
            VALUE,
            CAUSAL,
            False,
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
            if segment == 0:
                tl.store(d_first_state + bh * F * D + n_v[:, None] * D + cols_v[None, :], sums_v, mask=inner_v)
