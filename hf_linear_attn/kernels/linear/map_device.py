"""Device functions of the kernels that compute features from tokens: projections, maps, weights of keys, their sums."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear_attn.kernels.linear.device import RELU, feature_map, to_dot

__all__ = ["LOG2E", "LOG_ZERO", "add_keys", "larger", "load_side", "load_weights", "map_keys", "map_tile"]

# Codes of `mapped_op.KINDS`; up to RELU they are those of `device.feature_map`.
PROJECTED_RELU = tl.constexpr(3)
EXP = tl.constexpr(4)
SOFTMAX = tl.constexpr(5)
PUBLISHED = tl.constexpr(0)  # that of `ops.features.softmax_map`

LOG2E = tl.constexpr(1.4426950408889634)
LOG_ZERO = tl.constexpr(-1e30)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def load_parts(place, mask, BF16_DOTS: tl.constexpr):
    """A factor of a dot product as bfloat16 and what that drops, or in float32 (twice)."""
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if BF16_DOTS:
        high = x.to(tl.bfloat16)
        return high, (x - high.to(tl.float32)).to(tl.bfloat16)
    else:
        return x, x


@triton.jit
def project(x, high, low, BF16_DOTS: tl.constexpr, PRECISION: tl.constexpr):
    """x W in float32; `high` and `low` as `load_parts` gives them."""
    if BF16_DOTS:
        return tl.dot(x, low, tl.dot(x, high))
    else:
        return tl.dot(x.to(tl.float32), high, input_precision=PRECISION)


@triton.jit
def map_tile(
    x,
    multiplier,
    side,
    ok,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    KIND: tl.constexpr,
    EXP_FORM: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BF16_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Features of a tile of tokens in x's dtype, 0 where not `ok`, and their log scale [ROWS].

    Kinds: elu(m x) + 1 and relu(m x); relu(u), exp(u) relative to its largest, and the softmax of
    `ops.features.softmax_map` by the head's `form`.

    Args:
        x: tokens [ROWS, D].
        side: as `load_side` gives it.
    """
    high, low, bias, form, center = side
    log_scale = tl.zeros([ROWS], dtype=tl.float32)
    n = tl.arange(0, BN)[None, :]
    inside = n < N
    if KIND <= RELU:
        features = feature_map(x, multiplier, KIND)
    else:
        u = (project(x, high, low, BF16_DOTS, PRECISION) + bias) * multiplier
        if NORMALIZED:
            moved = x.to(tl.float32) - center
            u /= tl.maximum(tl.sqrt(tl.sum(moved * moved, 1)), 1e-12)[:, None]
        if KIND == PROJECTED_RELU:
            features = tl.maximum(u, 0.0)
        elif KIND == EXP:
            log_scale = tl.max(tl.where(inside, u, float("-inf")), 1)
            features = tl.exp2((u - log_scale[:, None]) * LOG2E)
        else:
            first = n < N // 2
            second = inside & (n >= N // 2)
            peak = tl.max(tl.where(first, u, float("-inf")), 1)
            other_peak = tl.max(tl.where(second, u, float("-inf")), 1)
            shift = tl.where(first, peak[:, None], other_peak[:, None])
            features = tl.where(inside, tl.exp2((u - shift) * LOG2E), 0.0)
            total = tl.sum(tl.where(first, features, 0.0), 1)
            other_total = tl.sum(tl.where(second, features, 0.0), 1)
            largest = tl.maximum(peak, other_peak)
            whole = total * tl.exp2((peak - largest) * LOG2E) + other_total * tl.exp2((other_peak - largest) * LOG2E)
            # Each half by its own sum, or both by that of all.
            factor = tl.where(form == PUBLISHED, 1 / total, tl.exp2((peak - largest) * LOG2E) / whole)
            other_factor = tl.where(form == PUBLISHED, 1 / other_total, tl.exp2((other_peak - largest) * LOG2E) / whole)
            features *= tl.where(first, factor[:, None], other_factor[:, None])
            log_scale = tl.where(form == EXP_FORM, largest + tl.log(whole), log_scale)
    return tl.where(inside & ok[:, None], features, 0.0).to(x.dtype), log_scale


@triton.jit
def load_side(
    weight,
    center,
    bias,
    form,
    head,
    head_stride,
    d_stride,
    n_stride,
    D: tl.constexpr,
    F: tl.constexpr,
    BD: tl.constexpr,
    BF: tl.constexpr,
    KIND: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BF16_DOTS: tl.constexpr,
):
    """What `map_tile` needs of a head: W in parts, the row b - c W, form, the row c; 0 in place of what is not."""
    d, n = tl.arange(0, BD)[:, None], tl.arange(0, BF)[None, :]
    high = 0.0
    low = 0.0
    b = 0.0
    f = 0
    c = 0.0
    if KIND > RELU:
        place = weight + head * head_stride + d * d_stride + n * n_stride
        high, low = load_parts(place, (d < D) & (n < F), BF16_DOTS)
        if HAS_BIAS:
            b = tl.load(bias + head * F + n, mask=n < F, other=0.0).to(tl.float32)
        if HAS_CENTER:
            b = b - _centered(center + head * D + d, d < D, high, low, BF16_DOTS)
            row = tl.arange(0, BD)[None, :]
            c = tl.load(center + head * D + row, mask=row < D, other=0.0).to(tl.float32)
    if KIND == SOFTMAX:
        f = tl.load(form + head)
    return high, low, b, f, c


@triton.jit
def _centered(place, mask, high, low, BF16_DOTS: tl.constexpr):
    """The row c W."""
    c = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    moved = c * high.to(tl.float32)
    if BF16_DOTS:
        moved += c * low.to(tl.float32)
    return tl.sum(moved, 0)[None, :]


@triton.jit
def load_weights(
    mean,
    square,
    center,
    head,
    square_head,
    D: tl.constexpr,
    BD: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SQUARE: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    BF16_DOTS: tl.constexpr,
):
    """What `map_keys` needs of a head for weights: the row a, A in parts, the row c A; 0 in place of what is not."""
    rows, columns = tl.arange(0, BD)[:, None], tl.arange(0, BD)[None, :]
    a = 0.0
    high = 0.0
    low = 0.0
    c = 0.0
    if HAS_MEAN:
        a = tl.load(mean + head * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    if HAS_SQUARE:
        place = square + head * square_head + rows * D + columns
        high, low = load_parts(place, (rows < D) & (columns < D), BF16_DOTS)
        if HAS_CENTER:
            c = _centered(center + head * D + rows, rows < D, high, low, BF16_DOTS)
    return a, high, low, c


@triton.jit
def map_keys(
    x,
    multiplier,
    scaling,
    side,
    weights,
    ok,
    F: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    KIND: tl.constexpr,
    EXP_FORM: tl.constexpr,
    NORMALIZED: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SQUARE: tl.constexpr,
    BF16_DOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Features [BT, F] of keys and their log weights [BT], that of nothing where not `ok`."""
    features, log_weight = map_tile(
        x, multiplier, side, ok, F, BT, BF, KIND, EXP_FORM, NORMALIZED, BF16_DOTS, PRECISION
    )
    a, high, low, c = weights
    if HAS_MEAN:
        log_weight += scaling * tl.sum(x.to(tl.float32) * a, 1)
    if HAS_SQUARE:
        moved = project(x, high, low, BF16_DOTS, PRECISION) - c
        log_weight -= 0.5 * scaling * tl.sum(moved * moved, 1)
    return features, tl.where(ok, log_weight, LOG_ZERO)


@triton.jit
def add_keys(state, vector, top, features, values, log_weight, BF16_DOTS: tl.constexpr, PRECISION: tl.constexpr):
    """The sums [F, C] and [F] with a chunk of keys, and the top that they are relative to then."""
    after = tl.maximum(top, tl.max(log_weight, 0))
    kept = tl.exp2((top - after) * LOG2E)
    weight = tl.exp2((log_weight - after) * LOG2E)
    weighted = to_dot(values.to(tl.float32) * weight[:, None], BF16_DOTS)
    vector = vector * kept + tl.sum(features.to(tl.float32) * weight[:, None], 0)
    sums = tl.dot(tl.trans(to_dot(features, BF16_DOTS)), weighted, input_precision=PRECISION)
    return state * kept + sums, vector, after
