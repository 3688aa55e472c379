"""Backward kernels of block-sparse attention: query tiles over their lists, key tiles over the transposed lists.

Weights are recomputed from the saved log-sum-exp. Each program owns what it writes: no atomics, equal results in every
run. The logits of a key tile are computed as `k q^T`, so that no computed tile is ever transposed.
"""

# Triton reads the annotations of kernels, tensors have none.
from __future__ import annotations

import triton
import triton.language as tl

from hf_linear_attn.kernels.sparse.device import kept, list_set, load_rows, seen_pairs, token_of

__all__ = ["block_sparse_dkv_kernel", "block_sparse_dq_kernel", "block_sparse_dx_kernel"]

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _base2(log_sum):
    """The log-sum-exp as base-2 pivot of a row; one without keys gets a pivot that makes all weights 0."""
    return tl.where(log_sum > -1e29, log_sum * _LOG2E, 1e30)


@triton.jit
def _dq_step(dq, s, key, value, d_out, pivot, delta, keep, dropout, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of dq; `s` `[M, N]` are base-2 logits, -inf where nothing is seen."""
    p = tl.exp2(s - pivot[:, None])
    dp = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
    if DROPOUT:
        dp = tl.where(keep, dp / (1.0 - dropout), 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)


@triton.jit
def _dkv_step(
    dk, dv, s, value, query, d_out, pivot, delta, keep, dropout, DROPOUT: tl.constexpr, PRECISION: tl.constexpr
):
    """One tile of dk and dv; `s` `[N, M]` are base-2 logits, -inf where nothing is seen."""
    p = tl.exp2(s - pivot[None, :])
    dp = tl.dot(value, tl.trans(d_out), input_precision=PRECISION)
    shown = p
    if DROPOUT:
        shown = tl.where(keep, p / (1.0 - dropout), 0.0)
        dp = tl.where(keep, dp / (1.0 - dropout), 0.0)
    dv = tl.dot(shown.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["q_len", "k_len", "x_len", "num_rows", "num_entries", "lo", "hi", "hole_lo", "hole_hi"])
def block_sparse_dq_kernel(
    q, k, v, o, d_out, lse, d_lse, dq, delta, xk, xv, x_allowed, x_shift,
    rows, col_idx, bits, row_order, q_start, q_first, k_start, q_pos, k_pos, q_bucket, k_bucket, seed,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st, do_sb, do_sh, do_st, dq_sb, dq_sh, dq_st,
    xk_sb, xk_sh, xk_st, xv_sb, xv_sh, xv_st, xa_sb, xa_st, qp_sb, kp_sb, qb_sb, qb_sh, kb_sb, kb_sh,
    num_heads, q_len, k_len, x_len, num_rows, num_entries, lo, hi, hole_lo, hole_hi, scaling, dropout,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, SUB: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, BAND: tl.constexpr, HOLE: tl.constexpr, ORDER: tl.constexpr,
    SET_B: tl.constexpr, SET_H: tl.constexpr, Q_START: tl.constexpr, K_START: tl.constexpr, START_B: tl.constexpr,
    Q_POS: tl.constexpr, K_POS: tl.constexpr, BUCKET: tl.constexpr, EXTRA: tl.constexpr, TILE_X: tl.constexpr,
    X_ALLOWED: tl.constexpr,
    X_SHIFT: tl.constexpr, D_LSE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one row tile, and delta = sum(o do) - dlse `[B, H, Tq]` for the kernels of keys and values."""
    head, tile = tl.program_id(0), tl.program_id(1)
    b, h = (head // num_heads).to(tl.int64), (head % num_heads).to(tl.int64)
    lists = list_set(b, h, SET_B, SET_H)
    if ORDER:
        tile = tl.load(row_order + lists * num_rows + tile)
    channel, i, j = tl.arange(0, D_PAD), tl.arange(0, TILE_M), tl.arange(0, TILE_N)
    first, start, k_first = 0, 0, 0
    if Q_START:
        first, start = tl.load(q_first + b * START_B), tl.load(q_start + b * START_B)
    if K_START:
        k_first = tl.load(k_start + b * START_B)
    place = first + tile * TILE_M + i
    row = token_of(place, start, BLOCK, PADDED)
    row_in = (row >= 0) & (row < q_len)
    if BLOCK != PADDED:
        row_in = row_in & (place % PADDED < BLOCK)
    q_place = place
    if Q_POS:
        q_place = tl.load(q_pos + b * qp_sb + row, mask=row_in, other=0)
    bucket = place
    if BUCKET:
        bucket = tl.load(q_bucket + b * qb_sb + h * qb_sh + row, mask=row_in, other=-1)
    q += b * q_sb + h * q_sh
    k += b * k_sb + h * k_sh
    v += b * v_sb + h * v_sh
    query = load_rows(q, row, q_st, row_in, channel, D, D_PAD, True)
    output_gradient = load_rows(d_out + b * do_sb + h * do_sh, row, do_st, row_in, channel, D, D_PAD, True)
    output = load_rows(o + b * o_sb + h * o_sh, row, o_st, row_in, channel, D, D_PAD, True)
    at = head.to(tl.int64) * q_len + row
    mean = tl.sum(output.to(tl.float32) * output_gradient.to(tl.float32), 1)
    if D_LSE:
        mean -= tl.load(d_lse + at, mask=row_in, other=0.0)
    tl.store(delta + at, mean, mask=row_in)
    pivot = _base2(tl.load(lse + at, mask=row_in, other=-1e30))
    scale = scaling * _LOG2E
    acc = tl.zeros([TILE_M, D_PAD], tl.float32)
    noise = 0
    if DROPOUT:
        noise = tl.load(seed)

    if EXTRA:
        xk += b * xk_sb + h * xk_sh
        xv += b * xv_sb + h * xv_sh
        shift = 0.0
        if X_SHIFT:
            shift = tl.load(x_shift + h).to(tl.float32) * _LOG2E
        for x_first in range(0, x_len, TILE_X):
            x = x_first + tl.arange(0, TILE_X)
            x_in = x < x_len
            key = load_rows(xk, x, xk_st, x_in, channel, D, D_PAD, True)
            s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale + shift
            seen = x_in[None, :]
            if X_ALLOWED:
                inside = row_in[:, None] & seen
                allowed = x_allowed + b * xa_sb + row.to(tl.int64)[:, None] * xa_st + x[None, :]
                seen = tl.load(allowed, mask=inside, other=0) != 0
            s = tl.where(seen, s, float("-inf"))
            keep = s  # unused without dropout
            if DROPOUT:
                keep = kept(noise, row[:, None], k_len + x[None, :], head, dropout, s)
            value = load_rows(xv, x, xv_st, x_in, channel, D, D_PAD, True)
            acc = _dq_step(acc, s, key, value, output_gradient, pivot, mean, keep, dropout, DROPOUT, PRECISION)

    rows += (lists * num_rows + tile) * 3
    begin, middle, end = tl.load(rows), tl.load(rows + 1), tl.load(rows + 2)
    col_idx += lists * num_entries
    bits += lists * num_entries
    for entry in range(begin, middle):
        k_place = tl.load(col_idx + entry) * TILE_N + j
        token = token_of(k_place, k_first, BLOCK, PADDED)
        real = (token >= 0) & (token < k_len)
        if BLOCK != PADDED:
            real = real & (k_place % PADDED < BLOCK)
        if K_POS:
            k_place = tl.load(k_pos + b * kp_sb + token, mask=real, other=-1)
            real = real & (k_place >= 0)
        k_bucket_of = k_place
        if BUCKET:
            k_bucket_of = tl.load(k_bucket + b * kb_sb + h * kb_sh + token, mask=real, other=-2)
        word = 0
        if SUB > 0:
            word = tl.load(bits + entry)
        key = load_rows(k, token, k_st, real, channel, D, D_PAD, True)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        seen = seen_pairs(
            q_place[:, None], k_place[None, :], real[None, :], i[:, None], j[None, :], bucket[:, None],
            k_bucket_of[None, :], word, lo, hi, hole_lo, hole_hi, TILE_N, SUB, BAND, HOLE, BUCKET,
        )  # fmt: skip
        s = tl.where(seen, s, float("-inf"))
        keep = s
        if DROPOUT:
            keep = kept(noise, row[:, None], token[None, :], head, dropout, s)
        value = load_rows(v, token, v_st, real, channel, D, D_PAD, True)
        acc = _dq_step(acc, s, key, value, output_gradient, pivot, mean, keep, dropout, DROPOUT, PRECISION)
    for entry in range(middle, end):
        token = token_of(tl.load(col_idx + entry) * TILE_N + j, k_first, BLOCK, PADDED)
        real = j >= 0
        if K_POS:
            real = tl.load(k_pos + b * kp_sb + token) >= 0
        key = load_rows(k, token, k_st, real, channel, D, D_PAD, K_POS)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        if K_POS:
            s = tl.where(real[None, :], s, float("-inf"))
        keep = s
        if DROPOUT:
            keep = kept(noise, row[:, None], token[None, :], head, dropout, s)
        value = load_rows(v, token, v_st, real, channel, D, D_PAD, K_POS)
        acc = _dq_step(acc, s, key, value, output_gradient, pivot, mean, keep, dropout, DROPOUT, PRECISION)

    dq += b * dq_sb + h * dq_sh + row.to(tl.int64)[:, None] * dq_st + channel[None, :]
    stored = row_in[:, None]
    if D != D_PAD:
        stored = stored & (channel[None, :] < D)
    tl.store(dq, (acc * scaling).to(dq.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["q_len", "k_len", "num_cols", "num_entries", "lo", "hi", "hole_lo", "hole_hi"])
def block_sparse_dkv_kernel(
    q, k, v, d_out, lse, delta, dk, dv,
    cols, row_idx, bits_t, col_order, q_start, q_first, k_start, q_pos, k_pos, q_bucket, k_bucket, seed,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, do_sb, do_sh, do_st, dk_sb, dk_sh, dk_st,
    dv_sb, dv_sh, dv_st, qp_sb, kp_sb, qb_sb, qb_sh, kb_sb, kb_sh,
    num_heads, q_len, k_len, num_cols, num_entries, lo, hi, hole_lo, hole_hi, scaling, dropout,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr,
    SUB: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, BAND: tl.constexpr, HOLE: tl.constexpr, ORDER: tl.constexpr,
    SET_B: tl.constexpr, SET_H: tl.constexpr, Q_START: tl.constexpr, K_START: tl.constexpr, START_B: tl.constexpr,
    Q_POS: tl.constexpr, K_POS: tl.constexpr, BUCKET: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one column tile; listed row tiles are taken in steps of STEP rows, to save registers."""
    head, tile = tl.program_id(0), tl.program_id(1)
    b, h = (head // num_heads).to(tl.int64), (head % num_heads).to(tl.int64)
    lists = list_set(b, h, SET_B, SET_H)
    if ORDER:
        tile = tl.load(col_order + lists * num_cols + tile)
    channel, step, j = tl.arange(0, D_PAD), tl.arange(0, STEP), tl.arange(0, TILE_N)
    PARTS: tl.constexpr = TILE_M // STEP
    first, start, k_first = 0, 0, 0
    if Q_START:
        first, start = tl.load(q_first + b * START_B), tl.load(q_start + b * START_B)
    if K_START:
        k_first = tl.load(k_start + b * START_B)
    k_place = tile * TILE_N + j
    token = token_of(k_place, k_first, BLOCK, PADDED)
    real = (token >= 0) & (token < k_len)
    if BLOCK != PADDED:
        real = real & (k_place % PADDED < BLOCK)
    stored = real
    if K_POS:
        k_place = tl.load(k_pos + b * kp_sb + token, mask=real, other=-1)
        real = real & (k_place >= 0)
    k_bucket_of = k_place
    if BUCKET:
        k_bucket_of = tl.load(k_bucket + b * kb_sb + h * kb_sh + token, mask=real, other=-2)
    key = load_rows(k + b * k_sb + h * k_sh, token, k_st, real, channel, D, D_PAD, True)
    value = load_rows(v + b * v_sb + h * v_sh, token, v_st, real, channel, D, D_PAD, True)
    q += b * q_sb + h * q_sh
    d_out += b * do_sb + h * do_sh
    lse += head.to(tl.int64) * q_len
    delta += head.to(tl.int64) * q_len
    scale = scaling * _LOG2E
    dk_acc = tl.zeros([TILE_N, D_PAD], tl.float32)
    dv_acc = tl.zeros([TILE_N, D_PAD], tl.float32)
    noise = 0
    if DROPOUT:
        noise = tl.load(seed)

    cols += (lists * num_cols + tile) * 3
    begin, middle, end = tl.load(cols), tl.load(cols + 1), tl.load(cols + 2)
    row_idx += lists * num_entries
    bits_t += lists * num_entries
    for part in range(begin * PARTS, middle * PARTS):
        entry = part // PARTS
        i = part % PARTS * STEP + step
        place = first + tl.load(row_idx + entry) * TILE_M + i
        row = token_of(place, start, BLOCK, PADDED)
        row_in = (row >= 0) & (row < q_len)
        if BLOCK != PADDED:
            row_in = row_in & (place % PADDED < BLOCK)
        q_place = place
        if Q_POS:
            q_place = tl.load(q_pos + b * qp_sb + row, mask=row_in, other=0)
        bucket = place
        if BUCKET:
            bucket = tl.load(q_bucket + b * qb_sb + h * qb_sh + row, mask=row_in, other=-1)
        word = 0
        if SUB > 0:
            word = tl.load(bits_t + entry)
        query = load_rows(q, row, q_st, row_in, channel, D, D_PAD, True)
        pivot = _base2(tl.load(lse + row, mask=row_in, other=-1e30))
        s = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale
        seen = seen_pairs(
            q_place[None, :], k_place[:, None], real[:, None], i[None, :], j[:, None], bucket[None, :],
            k_bucket_of[:, None], word, lo, hi, hole_lo, hole_hi, TILE_N, SUB, BAND, HOLE, BUCKET,
        )  # fmt: skip
        s = tl.where(seen, s, float("-inf"))
        keep = s
        if DROPOUT:
            keep = kept(noise, row[None, :], token[:, None], head, dropout, s)
        gradient = load_rows(d_out, row, do_st, row_in, channel, D, D_PAD, True)
        mean = tl.load(delta + row, mask=row_in, other=0.0)
        dk_acc, dv_acc = _dkv_step(
            dk_acc, dv_acc, s, value, query, gradient, pivot, mean, keep, dropout, DROPOUT, PRECISION
        )
    for part in range(middle * PARTS, end * PARTS):
        place = first + tl.load(row_idx + part // PARTS) * TILE_M + part % PARTS * STEP + step
        row = token_of(place, start, BLOCK, PADDED)
        row_in = (row >= 0) & (row < q_len)
        if BLOCK != PADDED:
            row_in = row_in & (place % PADDED < BLOCK)
        query = load_rows(q, row, q_st, row_in, channel, D, D_PAD, True)
        pivot = _base2(tl.load(lse + row, mask=row_in, other=-1e30))
        s = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale
        if K_POS:
            s = tl.where(real[:, None], s, float("-inf"))
        keep = s
        if DROPOUT:
            keep = kept(noise, row[None, :], token[:, None], head, dropout, s)
        gradient = load_rows(d_out, row, do_st, row_in, channel, D, D_PAD, True)
        mean = tl.load(delta + row, mask=row_in, other=0.0)
        dk_acc, dv_acc = _dkv_step(
            dk_acc, dv_acc, s, value, query, gradient, pivot, mean, keep, dropout, DROPOUT, PRECISION
        )

    inside = stored[:, None]
    if D != D_PAD:
        inside = inside & (channel[None, :] < D)
    dk += b * dk_sb + h * dk_sh + token.to(tl.int64)[:, None] * dk_st + channel[None, :]
    dv += b * dv_sb + h * dv_sh + token.to(tl.int64)[:, None] * dv_st + channel[None, :]
    tl.store(dk, (dk_acc * scaling).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv, dv_acc.to(dv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["q_len", "k_len", "x_len", "chunk"])
def block_sparse_dx_kernel(
    q, xk, xv, x_allowed, x_shift, d_out, lse, delta, dxk, dxv, seed,
    q_sb, q_sh, q_st, xk_sb, xk_sh, xk_st, xv_sb, xv_sh, xv_st, xa_sb, xa_st, do_sb, do_sh, do_st,
    num_heads, q_len, k_len, x_len, chunk, scaling, dropout,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    X_ALLOWED: tl.constexpr, X_SHIFT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of extra columns from one chunk of queries: fp32 `[chunks, B, H, G, D]`, to be summed."""
    head, tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (head // num_heads).to(tl.int64), (head % num_heads).to(tl.int64)
    channel, i = tl.arange(0, D_PAD), tl.arange(0, TILE_M)
    x = tile * TILE_N + tl.arange(0, TILE_N)
    x_in = x < x_len
    key = load_rows(xk + b * xk_sb + h * xk_sh, x, xk_st, x_in, channel, D, D_PAD, True)
    value = load_rows(xv + b * xv_sb + h * xv_sh, x, xv_st, x_in, channel, D, D_PAD, True)
    q += b * q_sb + h * q_sh
    d_out += b * do_sb + h * do_sh
    lse += head.to(tl.int64) * q_len
    delta += head.to(tl.int64) * q_len
    scale = scaling * _LOG2E
    shift = 0.0
    if X_SHIFT:
        shift = tl.load(x_shift + h).to(tl.float32) * _LOG2E
    noise = 0
    if DROPOUT:
        noise = tl.load(seed)
    dk_acc = tl.zeros([TILE_N, D_PAD], tl.float32)
    dv_acc = tl.zeros([TILE_N, D_PAD], tl.float32)
    for first in range(part * chunk, tl.minimum(part * chunk + chunk, q_len), TILE_M):
        row = first + i
        row_in = row < q_len
        query = load_rows(q, row, q_st, row_in, channel, D, D_PAD, True)
        pivot = _base2(tl.load(lse + row, mask=row_in, other=-1e30))
        s = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale + shift
        seen = x_in[:, None]
        if X_ALLOWED:
            inside = row_in[None, :] & seen
            allowed = x_allowed + b * xa_sb + row.to(tl.int64)[None, :] * xa_st + x[:, None]
            seen = tl.load(allowed, mask=inside, other=0) != 0
        s = tl.where(seen, s, float("-inf"))
        keep = s
        if DROPOUT:
            keep = kept(noise, row[None, :], k_len + x[:, None], head, dropout, s)
        gradient = load_rows(d_out, row, do_st, row_in, channel, D, D_PAD, True)
        mean = tl.load(delta + row, mask=row_in, other=0.0)
        dk_acc, dv_acc = _dkv_step(
            dk_acc, dv_acc, s, value, query, gradient, pivot, mean, keep, dropout, DROPOUT, PRECISION
        )
    stored = x_in[:, None]
    if D != D_PAD:
        stored = stored & (channel[None, :] < D)
    heads = tl.num_programs(0)
    at = ((part.to(tl.int64) * heads + head) * x_len + x)[:, None] * D + channel[None, :]
    tl.store(dxk + at, dk_acc * scaling, mask=stored)
    tl.store(dxv + at, dv_acc, mask=stored)
