"""Small kernels for the tests of the inspection: a good one, and some that each have one fault."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_linear_attn.kernels.launch import Launch


@triton.jit
def product_kernel(a, b, out, SIZE: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr):
    row, inner = tl.arange(0, SIZE), tl.arange(0, INNER)
    x = tl.load(a + row[:, None] * INNER + inner[None, :])
    y = tl.load(b + inner[:, None] * SIZE + row[None, :])
    tl.store(out + row[:, None] * SIZE + row[None, :], tl.dot(x, y, input_precision=PRECISION))


@triton.jit
def spilling_kernel(a, out, SIZE: tl.constexpr):
    """A tile of 128 x 128 lives in the registers of one warp: 512 for each thread."""
    row, col = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x = tl.load(a + row * SIZE + col)
    tl.store(out + row * SIZE + col, tl.sum(x, 0)[None, :] * x)


def _product(name: str, kind: str, size: int, precision: str = "ieee", inner: int = 64, **options: int) -> Launch:
    signature = {"a": f"*{kind}", "b": f"*{kind}", "out": "*fp32"}
    constants = {"SIZE": size, "INNER": inner, "PRECISION": precision}
    return Launch(product_kernel, name, signature, constants, **options)


def shipped_launches() -> list[Launch]:
    spilling = {"a": "*fp32", "out": "*fp32"}, {"SIZE": 128}
    return [
        _product("good", "bf16", 64),
        _product("small-tile", "bf16", 16),
        _product("dot-claimed-in-vain", "fp32", 16),
        # 2 x 64 x 1024 x 2 bytes
        _product("large", "bf16", 64, inner=1024, num_warps=16, uses_dot=False, is_default=False),
        Launch(spilling_kernel, "spills", *spilling, num_warps=1, uses_dot=False),
    ]
