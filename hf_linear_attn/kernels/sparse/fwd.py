"""Forward kernel of block-sparse attention: online softmax over the listed key tiles of one query tile."""

# Triton reads the annotations of kernels, tensors have none.
from __future__ import annotations

import triton
import triton.language as tl

from hf_linear_attn.kernels.sparse.device import kept, list_set, load_rows, seen_pairs, token_of

__all__ = ["block_sparse_fwd_kernel"]

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _step(acc, peak, total, s, v, keep, dropout, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of the online softmax: `s` `[M, N]` are base-2 logits, -inf where nothing is seen."""
    higher = tl.maximum(peak, tl.max(s, 1))
    pivot = tl.where(higher == float("-inf"), 0.0, higher)  # finite: a row without keys so far stays 0, not nan
    p = tl.exp2(s - pivot[:, None])
    shrink = tl.exp2(peak - pivot)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(keep, p / (1.0 - dropout), 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, higher, total


@triton.jit(do_not_specialize=["q_len", "k_len", "x_len", "num_rows", "num_entries", "lo", "hi", "hole_lo", "hole_hi"])
def block_sparse_fwd_kernel(
    q, k, v, o, lse, xk, xv, x_allowed, x_shift,
    rows, col_idx, bits, row_order, q_start, q_first, k_start, q_pos, k_pos, q_bucket, k_bucket, seed,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st,
    xk_sb, xk_sh, xk_st, xv_sb, xv_sh, xv_st, xa_sb, xa_st, qp_sb, kp_sb, qb_sb, qb_sh, kb_sb, kb_sh,
    num_heads, q_len, k_len, x_len, num_rows, num_entries, lo, hi, hole_lo, hole_hi, scaling, dropout,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, SUB: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, BAND: tl.constexpr, HOLE: tl.constexpr, ORDER: tl.constexpr,
    SET_B: tl.constexpr, SET_H: tl.constexpr, Q_START: tl.constexpr, K_START: tl.constexpr, START_B: tl.constexpr,
    Q_POS: tl.constexpr, K_POS: tl.constexpr, BUCKET: tl.constexpr, EXTRA: tl.constexpr, TILE_X: tl.constexpr,
    X_ALLOWED: tl.constexpr,
    X_SHIFT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o `[B, H, Tq, D]` and the natural log-sum-exp `[B, H, Tq]` of one row tile; -1e30 where no key is seen."""
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
    scale = scaling * _LOG2E
    acc = tl.zeros([TILE_M, D_PAD], tl.float32)
    peak = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
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
            acc, peak, total = _step(acc, peak, total, s, value, keep, dropout, DROPOUT, PRECISION)

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
        acc, peak, total = _step(acc, peak, total, s, value, keep, dropout, DROPOUT, PRECISION)
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
        acc, peak, total = _step(acc, peak, total, s, value, keep, dropout, DROPOUT, PRECISION)

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    log_sum = tl.where(empty, -1e30, (peak + tl.log2(tl.where(empty, 1.0, total))) * _LN2)
    tl.store(lse + head.to(tl.int64) * q_len + row, log_sum, mask=row_in)
    o += b * o_sb + h * o_sh + row.to(tl.int64)[:, None] * o_st + channel[None, :]
    stored = row_in[:, None]
    if D != D_PAD:
        stored = stored & (channel[None, :] < D)
    tl.store(o, acc.to(o.dtype.element_ty), mask=stored)
