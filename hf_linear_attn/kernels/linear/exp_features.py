"""Exponential features of a projection, exp(x W + b) relative to their largest, in one pass over x.

    features = exp(u - peak),   peak = max over features of u,   u = x W_h + b_h

Projection, maximum and exponential stay in registers: x is read once and the features are written once, in x's
dtype. These are the positive random features of Performer (arXiv:2009.14794) and the maps of Hedgehog
(arXiv:2402.04347); a key's peak belongs to its weight, a query's cancels in the quotient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hf_linear_attn.kernels.launch import NAMESPACE, check_launches, on_device, readable
from hf_linear_attn.kernels.linear.tiles import block_of, dot_constants, precision_of

__all__ = ["exp_features", "exp_features_constants", "exp_features_kernel"]

_LARGEST_FEATURES, _LARGEST_DIM = 256, 128
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["heads", "length"])
def exp_features_kernel(
    x,
    weight,
    bias,
    features,
    peak,
    x_batch,
    x_head,
    x_token,
    weight_head,
    bias_head,
    heads,
    length,
    D: tl.constexpr,
    F: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Features [B, H, T, F] and peak [B, H, T], contiguous, of a tile of tokens."""
    tiles = tl.cdiv(length, BT)
    pid = tl.program_id(0)
    bh = (pid // tiles).to(tl.int64)
    batch, head = bh // heads, bh % heads
    first = pid % tiles * BT
    rows, n, d = tl.arange(0, BT), tl.arange(0, BF), tl.arange(0, BD)
    ok = first + rows < length
    x += batch * x_batch + head * x_head + first.to(tl.int64) * x_token
    tile = tl.load(x + rows[:, None] * x_token + d[None, :], mask=ok[:, None] & (d[None, :] < D), other=0.0)
    directions = tl.load(
        weight + head * weight_head + d[:, None] * F + n[None, :],
        mask=(d[:, None] < D) & (n[None, :] < F),
        other=0.0,
    )
    u = tl.dot(tile.to(tl.float32), directions, input_precision=PRECISION)  # [BT, BF]
    if HAS_BIAS:
        u += tl.load(bias + head * bias_head + n, mask=n < F, other=0.0)[None, :]
    if BF != F:
        u = tl.where(n[None, :] < F, u, float("-inf"))
    largest = tl.max(u, 1)
    place = bh * length + first
    tl.store(peak + place + rows, largest, mask=ok)
    tl.store(
        features + place * F + rows[:, None] * F + n[None, :],
        tl.exp(u - largest[:, None]).to(features.dtype.element_ty),
        mask=ok[:, None] & (n[None, :] < F),
    )


def exp_features(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features exp(x W + b - peak), at most 1, and their peak, with gradients for x, W and b.

    The peak counts as a constant: features times exp(peak) do not depend on it, so whoever uses both, or drops a
    factor common to a token's features, has the right gradient.

    Args:
        x: `[B, H, T, D]`, D at most 128, any strides.
        weight: W, float32 `[H or 1, D, F]`, F at most 256.
        bias: b, float32 `[H or 1, F]`.

    Returns:
        features `[B, H, T, F]` in x's dtype and peak `[B, H, T]` float32.

    Raises:
        ValueError: for shapes or dtypes that do not fit as said above, or a device without Triton.
    """
    heads, dim = x.shape[1], x.shape[-1]
    if x.ndim != 4 or x.dtype not in _DTYPES or 0 in x.shape or dim > _LARGEST_DIM:
        raise ValueError(
            "x must be float32, float16 or bfloat16 [B, H, T, D] with D at most 128, not empty; got "
            f"{x.dtype} {tuple(x.shape)}."
        )
    fits = weight.ndim == 3 and weight.shape[0] in (1, heads) and weight.shape[1] == dim
    if not fits or weight.shape[2] > _LARGEST_FEATURES or weight.dtype != torch.float32:
        raise ValueError(
            f"weight must be float32 [1 or {heads}, {dim}, at most 256], got {weight.dtype} {tuple(weight.shape)}."
        )
    if bias is not None and (
        bias.ndim != 2
        or bias.shape[0] not in (1, heads)
        or bias.shape[1] != weight.shape[2]
        or bias.dtype != torch.float32
    ):
        raise ValueError(
            f"bias must be float32 [1 or {heads}, {weight.shape[2]}], got {bias.dtype} {tuple(bias.shape)}."
        )
    return _forward(x, weight, bias)


@torch.library.custom_op(f"{NAMESPACE}::exp_features", mutates_args=())
def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    check_launches(x.device)
    (batch, heads, length, dim), num_features = x.shape, weight.shape[2]
    x = readable(x)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    features = torch.empty(batch, heads, length, num_features, dtype=x.dtype, device=x.device)
    peak = torch.empty(batch, heads, length, dtype=torch.float32, device=x.device)
    constants = exp_features_constants(dim, num_features, bias is not None, precision_of(x.dtype))
    with on_device(x.device):
        exp_features_kernel[(batch * heads * -(-length // constants["BT"]),)](
            *(x, weight, weight if bias is None else bias, features, peak),
            *(x.stride(0), x.stride(1), x.stride(2), weight.stride(0) if weight.shape[0] > 1 else 0),
            *(0 if bias is None or bias.shape[0] == 1 else bias.stride(0), heads, length),
            **constants,
            num_warps=8,
        )
    return features, peak


@_forward.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(*x.shape[:3], weight.shape[2]), x.new_empty(x.shape[:3], dtype=torch.float32)


def exp_features_constants(dim: int, num_features: int, has_bias: bool, precision: str) -> dict[str, Any]:
    """Constants of the kernel, for a precision as `precision_of` has it.

    Inputs of 16 bits are exact in tf32; the directions lose what tf32 does. Three tf32 products hold their operands
    twice, and so fewer tokens.
    """
    tile = {"BT": 32 if precision == "tf32x3" else 64, "BD": block_of(dim), "BF": block_of(num_features)}
    precision = dot_constants(precision)["PRECISION"]
    return {"D": dim, "F": num_features, **tile, "HAS_BIAS": has_bias, "PRECISION": precision}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight, output[0])
    ctx.bias_shape = None if bias is None else bias.shape
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, d_features: torch.Tensor, d_peak: Any) -> tuple[torch.Tensor | None, ...]:
    x, weight, features = ctx.saved_tensors
    d_u = (d_features * features).to(x.dtype)  # [B, H, T, F]
    d_x = d_w = d_b = None
    if ctx.needs_input_grad[0]:
        d_x = d_u @ weight.to(x.dtype).mT
    if ctx.needs_input_grad[1]:
        d_w = torch.einsum("bhtd,bhtf->hdf", x, d_u).to(weight.dtype).sum_to_size(weight.shape)
    if ctx.bias_shape is not None and ctx.needs_input_grad[2]:
        d_b = d_u.sum((0, 2), dtype=torch.float32).sum_to_size(ctx.bias_shape)
    return d_x, d_w, d_b


_forward.register_autograd(_differentiate, setup_context=_setup)
