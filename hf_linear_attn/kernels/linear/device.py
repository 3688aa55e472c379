"""Device functions of the linear attention kernels: tiles, feature maps, and the scan that every pass is.

Forward and backward are one computation on different operands. With C, A, B and a state, row i of a pass is

    out_i = sum_j P_ij C_j + A_i State,    P_ij = decay_ij (A_i . B_j) r_i c_j,    State = sum_j decay_j c_j B_j^T C_j

over the keys j that row i sees inside its chunk, the state holding the rest:

| pass    | A   | B   | C   | direction | row factor | column factor | extra column (A, B) |
| ------- | --- | --- | --- | --------- | ---------- | ------------- | ------------------- |
| FORWARD | q   | k   | v   | forward   | 1          | key scale     | none; C gets a 1: den |
| QUERY   | do  | v   | k   | forward   | 1 / den    | key scale     | (d den, 1)          |
| KEY     | v   | do  | q   | backward  | key scale  | 1 / den       | (1, d den)          |
| VALUE   | k   | q   | do  | backward  | key scale  | 1 / den       | none                |

Programs of a pass own a tile of C's columns and a segment of tokens, and keep the state of that tile in registers
from chunk to chunk. The extra column, by which the denominator and its gradient come along, is kept apart as
vectors, so that no tile widens. Log-decays are in base 2 in here.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FORWARD", "KEY", "LEAST_LOG_DECAY", "QUERY", "TINY", "VALUE", "feature_map", "scan_tile", "sum_tile"]

FORWARD = tl.constexpr(0)
QUERY = tl.constexpr(1)
KEY = tl.constexpr(2)
VALUE = tl.constexpr(3)

IDENTITY = tl.constexpr(0)
ELU = tl.constexpr(1)
RELU = tl.constexpr(2)

_LOG2E = tl.constexpr(1.4426950408889634)
# Log-decay below which nothing is left in float32. The bound keeps running sums small and their differences accurate.
LEAST_LOG_DECAY = tl.constexpr(-110.0)
TINY = tl.constexpr(1e-30)  # smallest magnitude of a denominator


@triton.jit
def feature_map(x, multiplier, MAP: tl.constexpr):
    """phi(multiplier x) in float32: elu + 1, relu, or x itself."""
    x = x.to(tl.float32)
    if MAP == ELU:
        x = x * multiplier
        return tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == RELU:
        return tl.maximum(x * multiplier, 0.0)
    else:
        return x


@triton.jit
def feature_map_slope(x, multiplier, MAP: tl.constexpr):
    """d phi(multiplier x) / d x in float32."""
    x = x.to(tl.float32)
    if MAP == ELU:
        return tl.exp(tl.minimum(x * multiplier, 0.0)) * multiplier
    elif MAP == RELU:
        return tl.where(x * multiplier > 0, multiplier, 0.0)
    else:
        return x * 0.0 + 1.0


@triton.jit
def load_tile(source, first, rows, row_ok, cols, COLS: tl.constexpr, BLOCK: tl.constexpr, MAP: tl.constexpr):
    """Features of tokens first + rows as a tile [rows, cols] in the dtype of memory; 0 where masked."""
    base, stride, multiplier = source
    base += first.to(tl.int64) * stride
    ok = row_ok[:, None]
    if BLOCK != COLS:
        ok = ok & (cols[None, :] < COLS)
    x = tl.load(base + rows[:, None] * stride + cols[None, :], mask=ok, other=0.0)
    if MAP != IDENTITY:
        x = tl.where(ok, feature_map(x, multiplier, MAP), 0.0).to(x.dtype)
    return x


@triton.jit
def load_transposed(source, first, rows, row_ok, cols, COLS: tl.constexpr, BLOCK: tl.constexpr, MAP: tl.constexpr):
    """The same tile as [cols, rows]: loaded so, never transposed in registers."""
    base, stride, multiplier = source
    base += first.to(tl.int64) * stride
    ok = row_ok[None, :]
    if BLOCK != COLS:
        ok = ok & (cols[:, None] < COLS)
    x = tl.load(base + rows[None, :] * stride + cols[:, None], mask=ok, other=0.0)
    if MAP != IDENTITY:
        x = tl.where(ok, feature_map(x, multiplier, MAP), 0.0).to(x.dtype)
    return x


@triton.jit
def load_log_decay(decay, t, inside):
    """Log-decays of a chunk in base 2, their running sums, and their total."""
    g = tl.load(decay + t, mask=inside, other=0.0)
    g = tl.maximum(g, LEAST_LOG_DECAY) * _LOG2E
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit
def to_dot(x, BF16_DOTS: tl.constexpr):
    """Operand of a dot product that holds sums: bfloat16, or float32 where float16 could overflow."""
    if BF16_DOTS:
        return x.to(tl.bfloat16)
    else:
        return x.to(tl.float32)


@triton.jit
def split_columns(x, column, BF16_DOTS: tl.constexpr):
    """Operand of a dot product: of `x` the part that bfloat16 holds where `column` is even, what it drops where odd."""
    high = to_dot(x, BF16_DOTS)
    return tl.where(column % 2 == 0, high, to_dot(x - high.to(tl.float32), BF16_DOTS))


@triton.jit
def sum_tile(
    b,
    c,
    factor,
    factor_stride,
    extra,
    decay,
    column_from,
    length,
    start,
    chunks,
    n0,
    c0,
    N: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    REVERSE: tl.constexpr,
    B_MAP: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    GUARD: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    BF16_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """State [BN, BC], vector [BN] and total log-decay of a segment, as of its end (its start if REVERSE).

    `b` and `c` are (pointer, stride, multiplier); pointers stand at token 0 of a head. `extra` is the column beside
    C: ones if not REVERSE.
    """
    offsets = tl.arange(0, BT)
    n = n0 + tl.arange(0, BN)
    cols = c0 + tl.arange(0, BC)
    state = tl.zeros([BN, BC], dtype=tl.float32)
    vector = tl.zeros([BN], dtype=tl.float32)
    total = 0.0
    for index in range(chunks):
        first = start + index * BT
        if REVERSE:
            first = start + (chunks - 1 - index) * BT
        t = first + offsets
        inside = t < length
        ok = inside & (t >= column_from)
        weight = tl.where(ok, 1.0, 0.0)
        if HAS_FACTOR:
            weight = tl.load(factor + t * factor_stride, mask=ok, other=0.0)
        extra_weight = weight
        if REVERSE:
            extra_weight = tl.load(extra + t, mask=ok, other=0.0)
        if GUARD:
            ok = ok & ((weight != 0.0) | (extra_weight != 0.0))
        bt = load_transposed(b, first, offsets, ok, n, N, BN, B_MAP)
        ct = load_tile(c, first, offsets, ok, cols, C, BC, IDENTITY)
        if HAS_DECAY:
            reach, span = load_log_decay(decay, t, inside)
            if not REVERSE:
                reach = span - reach
            reach = tl.exp2(reach)
            weight *= reach
            extra_weight *= reach
            kept = tl.exp2(span)
            state *= kept
            vector *= kept
            total += span
        weighted = bt.to(tl.float32)
        if REVERSE:
            vector += tl.sum(weighted * extra_weight[None, :], 1)
        if HAS_FACTOR or HAS_DECAY:
            weighted *= weight[None, :]
        if not REVERSE:
            vector += tl.sum(weighted, 1)
        state += tl.dot(to_dot(weighted, BF16_DOTS), to_dot(ct, BF16_DOTS), input_precision=PRECISION)
    return state, vector, total


@triton.jit
def scan_tile(
    a,
    b,
    c,
    own,
    out,
    out_stride,
    scale,
    scale_stride,
    inverse,
    d_den,
    decay,
    den,
    d_scale,
    row_from,
    column_from,
    length,
    start,
    chunks,
    state,
    vector_n,
    vector_c,
    c0,
    write_den,
    N: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    PASS: tl.constexpr,
    CAUSAL: tl.constexpr,
    NORMALIZED: tl.constexpr,
    A_MAP: tl.constexpr,
    B_MAP: tl.constexpr,
    C_MAP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    WANT_D_SCALE: tl.constexpr,
    BF16_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the output rows of a segment, columns from `c0`; return the state after it.

    Pointers stand at token 0 of a head; rows and columns that the operands do not have (`row_from`, `column_from`)
    are never read.

    Args:
        a, b, c: operands as (pointer, stride, multiplier).
        own: likewise, the inputs whose gradient `out` is.
        scale, inverse, d_den: key scale, 1 / den of the queries (0: without gradient), and gradient of den.
        state: [BN, BC] before the segment (after it if the pass runs backward); `vector_n` [BN] and
            `vector_c` [BC] its extra column and row.
    """
    REVERSE: tl.constexpr = PASS >= 2
    offsets = tl.arange(0, BT)
    n = tl.arange(0, BN)
    cols = c0 + tl.arange(0, BC)
    # Sums of B weighted, in 16 columns: 0 and 1 by the high parts of the weights, 2 and 3 by the low ones.
    column = tl.arange(0, 16)[None, :]
    ones_sums = tl.where(column < 2, vector_n[:, None], 0.0)
    ones = to_dot(tl.where(column < 2, tl.full([BT, 16], 1.0, dtype=tl.float32), 0.0), BF16_DOTS)
    one = tl.full([BT, BC], 1.0, dtype=tl.float32)
    for index in range(chunks):
        first = start + index * BT
        if REVERSE:
            first = start + (chunks - 1 - index) * BT
        t = first + offsets
        inside = t < length
        row_ok = inside & (t >= row_from)
        column_ok = inside & (t >= column_from)

        # Factors of rows and columns; what has factor 0 is not read, be it nan.
        row_factor = tl.where(row_ok, 1.0, 0.0)
        row_extra = row_factor
        if PASS == QUERY:
            row_factor = tl.load(inverse + t, mask=row_ok, other=0.0)
            row_extra = tl.load(d_den + t, mask=row_ok, other=0.0)
            if HAS_KEEP:
                row_ok = row_ok & ((row_factor != 0.0) | (row_extra != 0.0))
        if PASS == FORWARD:
            if HAS_KEEP:
                row_ok = row_ok & (tl.load(inverse + t, mask=row_ok, other=0.0) != 0.0)
        if REVERSE:
            if HAS_SCALE:
                row_factor = tl.load(scale + t * scale_stride, mask=row_ok, other=0.0)
                read_ok = row_ok & (row_factor != 0.0)
            else:
                read_ok = row_ok
        else:
            read_ok = row_ok
        at = load_tile(a, first, offsets, read_ok, n, N, BN, A_MAP)

        span = 0.0
        reach = row_factor
        if HAS_DECAY:
            reach, span = load_log_decay(decay, t, inside)

        mixed = tl.dot(to_dot(at, BF16_DOTS), to_dot(state, BF16_DOTS), input_precision=PRECISION)  # [BT, BC]
        if PASS == FORWARD:
            # A narrow dot product leaves the tile where it is; a sum would first bring it into registers.
            split = split_columns(ones_sums, column, BF16_DOTS)
            den_row = tl.sum(tl.dot(to_dot(at, BF16_DOTS), split, input_precision=PRECISION), 1)
            if HAS_DECAY:
                den_row *= tl.exp2(reach)
        if PASS == QUERY:
            mixed = mixed * row_factor[:, None] + row_extra[:, None] * vector_c[None, :]
        if PASS == KEY:
            mixed = mixed + vector_c[None, :]
        if HAS_DECAY:
            if REVERSE:
                mixed *= tl.exp2(span - reach)[:, None]
            else:
                mixed *= tl.exp2(reach)[:, None]

        if CAUSAL:
            weight = tl.where(column_ok, 1.0, 0.0)
            column_extra = weight
            if REVERSE:
                weight = tl.load(inverse + t, mask=column_ok, other=0.0)
                column_extra = weight
                if PASS == KEY:
                    column_extra = tl.load(d_den + t, mask=column_ok, other=0.0)
                if HAS_KEEP:
                    column_ok = column_ok & ((weight != 0.0) | (column_extra != 0.0))
            elif HAS_SCALE:
                weight = tl.load(scale + t * scale_stride, mask=column_ok, other=0.0)
                column_extra = weight
                column_ok = column_ok & (weight != 0.0)
            bt = load_transposed(b, first, offsets, column_ok, n, N, BN, B_MAP)
            ct = load_tile(c, first, offsets, column_ok, cols, C, BC, C_MAP)

            p = tl.dot(at, bt, input_precision=PRECISION)  # [BT, BT]
            if PASS == QUERY:
                p = p * row_factor[:, None] + row_extra[:, None]
                if HAS_SCALE:
                    p *= weight[None, :]
            elif PASS == KEY:
                p = p * weight[None, :] + column_extra[None, :]
            elif REVERSE or HAS_SCALE:
                p *= weight[None, :]
            if REVERSE:
                visible = offsets[:, None] <= offsets[None, :]
            else:
                visible = offsets[:, None] >= offsets[None, :]
            if HAS_DECAY:
                between = reach[:, None] - reach[None, :]
                if REVERSE:
                    between = reach[None, :] - reach[:, None]
                p *= tl.exp2(tl.minimum(between, 0.0))
            p = tl.where(visible, p, 0.0)
            if PASS == FORWARD:
                den_row += tl.sum(p, 1)
            # No chain of two dot products into one accumulator: it takes a layout that doubles the registers.
            mixed = tl.fma(mixed, one, tl.dot(to_dot(p, BF16_DOTS), to_dot(ct, BF16_DOTS), input_precision=PRECISION))

            if HAS_DECAY:
                passed = reach
                if not REVERSE:
                    passed = span - reach
                passed = tl.exp2(passed)
                weight *= passed
                column_extra *= passed
                kept = tl.exp2(span)
                state *= kept
                ones_sums *= kept
                vector_c *= kept
            # The weights go to C, whose tile is the smaller one: B goes to the tensor cores as it was loaded.
            if HAS_SCALE or HAS_DECAY or REVERSE:
                weighted = to_dot(ct.to(tl.float32) * weight[:, None], BF16_DOTS)
            else:
                weighted = to_dot(ct, BF16_DOTS)
            state += tl.dot(to_dot(bt, BF16_DOTS), weighted, input_precision=PRECISION)
            if PASS == FORWARD:
                if HAS_SCALE or HAS_DECAY:
                    ones = split_columns(tl.where(column < 4, weight[:, None], 0.0), column >> 1, BF16_DOTS)
                ones_sums += tl.dot(to_dot(bt, BF16_DOTS), ones, input_precision=PRECISION)
            if PASS == QUERY or PASS == KEY:
                vector_c += tl.sum(ct.to(tl.float32) * column_extra[:, None], 0)

        store_ok = inside[:, None] & (t >= row_from)[:, None]
        if BC != C:
            store_ok = store_ok & (cols[None, :] < C)
        if PASS == FORWARD:
            if write_den:
                tl.store(den + t, den_row, mask=inside & (t >= row_from))
            if NORMALIZED:
                den_row = tl.where(tl.abs(den_row) < TINY, tl.where(den_row < 0, -TINY, TINY), den_row)
                mixed = mixed / den_row[:, None]
        if PASS == KEY:
            if WANT_D_SCALE:
                features = load_tile(own, first, offsets, read_ok, cols, C, BC, C_MAP)
                slope = tl.sum(mixed * features.to(tl.float32), 1)
                tl.store(d_scale + t, tl.where(read_ok, slope, 0.0), mask=inside)
        if REVERSE:
            if HAS_SCALE:
                mixed = tl.where(read_ok[:, None], mixed * row_factor[:, None], 0.0)
        if PASS == QUERY or PASS == KEY:
            if C_MAP != IDENTITY:
                raw = load_tile(own, first, offsets, read_ok, cols, C, BC, IDENTITY)
                mixed *= feature_map_slope(raw, own[2], C_MAP)
        tl.store(
            out + first.to(tl.int64) * out_stride + offsets[:, None] * out_stride + cols[None, :],
            mixed.to(out.dtype.element_ty),
            mask=store_ok,
        )
    return state, tl.sum(tl.where((column == 0) | (column == 2), ones_sums, 0.0), 1), vector_c
