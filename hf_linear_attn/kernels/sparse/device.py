"""Device functions that the block-sparse kernels share: places of tokens, masks, dropout."""

# Triton reads the annotations of kernels, tensors have none.
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["kept", "list_set", "load_rows", "seen_pairs", "token_of"]


@triton.jit
def token_of(place, start, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Number of the token at a place (>= 0), token 0 being at place `start`."""
    if BLOCK != PADDED:
        place = place // PADDED * BLOCK + place % PADDED
    return place - start


@triton.jit
def list_set(b, h, SET_B: tl.constexpr, SET_H: tl.constexpr):
    """Number of the list set of a batch row and head; an index of 64 bits."""
    return (b * SET_B + h * SET_H).to(tl.int64)


@triton.jit
def load_rows(base, row, stride, inside, channel, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr):
    """Rows `[.., D_PAD]` of a matrix; 0 where `inside` is False, if MASKED says that this occurs."""
    pointers = base + row.to(tl.int64)[:, None] * stride + channel[None, :]
    if D != D_PAD:
        mask = channel[None, :] < D
        if MASKED:
            mask = mask & inside[:, None]
        loaded = tl.load(pointers, mask=mask, other=0.0)
    elif MASKED:
        loaded = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        loaded = tl.load(pointers)
    return loaded


@triton.jit
def seen_pairs(
    q_place, k_place, k_real, q_inside, k_inside, q_bucket, k_bucket, word, lo, hi, hole_lo, hole_hi,
    TILE_N: tl.constexpr, SUB: tl.constexpr, BAND: tl.constexpr, HOLE: tl.constexpr, BUCKET: tl.constexpr,
):  # fmt: skip
    """Which pairs of a tile are seen, bool of the arguments' common shape: one of `[M, 1]`, `[1, N]` or transposed."""
    seen = k_real
    if BAND:
        distance = q_place - k_place
        seen = seen & (distance >= lo) & (distance <= hi)
    if HOLE:
        apart = q_place - k_place
        seen = seen & ((apart < hole_lo) | (apart > hole_hi))
    if SUB > 0:
        square = (q_inside // SUB) * (TILE_N // SUB) + k_inside // SUB
        seen = seen & (((word >> square) & 1) == 1)
    if BUCKET:
        seen = seen & (q_bucket == k_bucket)
    return seen


@triton.jit
def kept(seed, q_token, k_token, head, dropout, LIKE):
    """Which weights dropout keeps: a function of the seed, the head of the batch and the two tokens."""
    zero = tl.zeros_like(LIKE).to(tl.int32)
    word, _, _, _ = tl.philox(seed, q_token.to(tl.int32) + zero, k_token.to(tl.int32) + zero, head + zero, zero)
    return tl.uint_to_uniform_float(word) >= dropout
