"""Device functions of linear attention with a decay per feature: tiles, and the split of a decay between two tokens.

Key j reaches row i through feature f with weight exp(g_{j+1,f} + .. + g_{i,f}), which is no single number, so it is
split between query and key at a token between them: both factors are at most 1 and nothing overflows. Inside a chunk
a tree finds that token: at level l, tokens are paired across the middle of blocks of 2^(l+1), rows of the right half
with keys of the left one, and the weights of all blocks come as one product of full size. A token with itself
is the diagonal. Beyond the chunk the weight is split at its first token (state) and its last (state's gradient).

A tile is computed in each orientation that a product needs it in, from memory: results are never transposed. What
depends on the level is loaded again at each level, which costs less than the registers that would keep it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "LEAST_LOG_DECAY",
    "LOG2E",
    "RUNTIME",
    "TINY",
    "load_scaled",
    "load_tile",
    "load_transposed",
    "pairs",
    "to_middle",
    "to_operand",
]

LOG2E = tl.constexpr(1.4426950408889634)
# Log-decay below which nothing is left in float32. The bound keeps running sums small and their differences accurate.
LEAST_LOG_DECAY = tl.constexpr(-110.0)
TINY = tl.constexpr(1e-30)  # smallest magnitude of a denominator

# Lengths change from call to call: no kernel is compiled again for one that is 1 or a multiple of 16. The number of
# levels belongs to BT, but a loop of known length is unrolled, and then the registers do not do.
RUNTIME = ["heads", "batch_heads", "q_length", "k_length", "levels"]


@triton.jit
def load_tile(base, stride, rows, row_ok, cols, COLS: tl.constexpr):
    """Tile [rows, cols] in the dtype of memory, 0 where masked."""
    ok = row_ok[:, None] & (cols[None, :] < COLS)
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=ok, other=0.0)


@triton.jit
def load_transposed(base, stride, rows, row_ok, cols, COLS: tl.constexpr):
    """The same tile as [cols, rows]."""
    ok = row_ok[None, :] & (cols[:, None] < COLS)
    return tl.load(base + rows[None, :] * stride + cols[:, None], mask=ok, other=0.0)


@triton.jit
def load_scaled(base, stride, rows, row_ok, cols, COLS: tl.constexpr, scale, TIMES: tl.constexpr):
    """Tile [rows, cols] in float32 (times scale if TIMES), 0 where scale is, whatever stands there."""
    x = load_tile(base, stride, rows, row_ok, cols, COLS).to(tl.float32)
    return tl.where(scale[:, None] == 0.0, 0.0, x * scale[:, None] if TIMES else x)


@triton.jit
def to_operand(x, BF16_DOTS: tl.constexpr):
    """Operand of a product: bfloat16, or float32 where float16 could overflow."""
    return x.to(tl.bfloat16 if BF16_DOTS else tl.float32)


@triton.jit
def _load_reach(reach, rows, cols, COLS: tl.constexpr):
    """Rows inside the chunk need no mask; rows and cols broadcast."""
    return tl.load(reach + rows * COLS + cols, mask=cols < COLS, other=0.0)


@triton.jit
def to_middle(reach, rows, length, cols, level, COLS: tl.constexpr):
    """exp of the decay between each token and the middle of its block of 2^(level+1); reach points at the chunk.

    Rows and cols broadcast. Rows past the length get a number between 0 and 1.
    """
    middle = ((rows >> (level + 1)) << (level + 1)) + (1 << level) - 1
    here = _load_reach(reach, tl.minimum(rows, length - 1), cols, COLS)
    return tl.exp2(-tl.abs(here - _load_reach(reach, tl.minimum(middle, length - 1), cols, COLS)))


@triton.jit
def pairs(right, left, level):
    """Where a token of a right half meets one of the left half of the same block; arguments broadcast."""
    return ((right >> (level + 1)) == (left >> (level + 1))) & (((right >> level) & 1) > ((left >> level) & 1))
