"""Gated norms and pooled landmarks on a CPU, a block of tokens at a time, computed again in the backward pass.

As one pass each over the whole sequence they take a dozen tensors as large as the keys; from 32 MiB on, memory is
mapped anew, page by page, each time it is asked for, which costs more than the arithmetic. Not differentiable twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.derivatives import once_differentiable
from hf_linear_attn.ops.base.numerics import LOG_ZERO, exp_

__all__ = ["gated_norm", "norm_by_blocks", "pool_by_blocks"]

# Elements of a block of keys, or of its logits (1 MiB in fp32).
BLOCK_ELEMENTS = 1 << 18


def gated_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x + gate (LN(x) - x) of `[..., D]`, with a plain LayerNorm's weight and bias; broadcast."""
    gate, weight, bias = (y.to(x.dtype) for y in (gate, weight, bias))
    return torch.lerp(x, torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]).to(x.dtype), weight), gate)


def norm_by_blocks(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`gated_norm` of `[B, H, T, D]`, a gate `[H]`, a weight and a bias `[H, D]`.

    The result lies in memory as `[B, T, H, D]`, as projections of hidden states do.
    """
    gate = gate[:, None]
    with torch.autocast(x.device.type, enabled=False):
        if x.numel() <= BLOCK_ELEMENTS:
            return gated_norm(x.transpose(1, 2), gate, weight, bias).transpose(1, 2)
        out: torch.Tensor = _Norm.apply(x, gate, weight, bias)  # type: ignore[no-untyped-call]
    return out


def pool_by_blocks(
    k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, allowed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`dynamic_projection.pool_landmarks` of a sequence `[B, H, T, D]`.

    Args:
        k: `[B, H, T, D]`, and `v` likewise.
        weight: `[H, D, r]`.
        allowed: bool `[B or 1, H or 1, T, r or 1]`, the tokens of each landmark.

    Returns:
        keys and values `[B, H, r, D]`, and the entropies `[B, H, r]`, float32 at least; a landmark without any token
        is a mean of all of them.
    """
    with torch.autocast(k.device.type, enabled=False):
        weight = weight.to(torch.promote_types(k.dtype, torch.float32))
        keys, values, entropy = _Pool.apply(k, v, weight, allowed)  # type: ignore[no-untyped-call]
    # Cast here: traced by PyTorch 2.11, a result that `_Pool` itself casts to the dtype that it has gets no gradient.
    return keys.to(k.dtype), values.to(k.dtype), entropy.clamp(min=0, max=math.log(max(k.shape[2], 1)))


def _blocks(x: torch.Tensor, width: int) -> Iterator[slice]:
    """Blocks of the tokens of `[B, H, T, D]` that take `width` elements each a row and head."""
    size = max(64, BLOCK_ELEMENTS // (x.shape[0] * x.shape[1] * width))
    for begin in range(0, x.shape[2], size):
        yield slice(begin, min(begin + size, x.shape[2]))


def _like(x: torch.Tensor) -> torch.Tensor:
    """Empty `[B, H, T, D]` that lies in memory as `[B, T, H, D]`."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        out = _like(x)
        for rows in _blocks(x, x.shape[3]):
            out[:, :, rows] = gated_norm(x[:, :, rows].transpose(1, 2), *parameters).transpose(1, 2)
        ctx.save_for_backward(x, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        own = [y.detach().requires_grad_(need) for y, need in zip(parameters, ctx.needs_input_grad[1:], strict=True)]
        sums = [torch.zeros_like(y) if y.requires_grad else None for y in own]
        dx = _like(x) if ctx.needs_input_grad[0] else None
        for rows in _blocks(x, x.shape[3]):
            with torch.enable_grad():
                part = x[:, :, rows].transpose(1, 2).detach().requires_grad_(dx is not None)
                out = gated_norm(part, *own)
            wanted = [y for y in (part, *own) if y.requires_grad]
            grads = list(torch.autograd.grad(out, wanted, grad[:, :, rows].transpose(1, 2)))
            if dx is not None:
                dx[:, :, rows] = grads.pop(0).transpose(1, 2)
            for total, new in zip([y for y in sums if y is not None], grads, strict=True):
                total += new
        return (dx, *sums)


def _logits(k: torch.Tensor, weight: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """`[B, H, rows, r]`."""
    return (k @ weight).masked_fill_(~allowed, LOG_ZERO)


class _Pool(torch.autograd.Function):
    """A softmax over all tokens, its sums taken block by block below a running maximum, in the dtype of `weight`.

    That is float32 at least: sums over thousands of tokens leave the range of fp16 long before their mean does.
    """

    @staticmethod
    def forward(
        ctx: Any, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, allowed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (B, H, _, D), r = k.shape, weight.shape[-1]
        dtype = weight.dtype
        highest = k.new_full((B, H, r), float("-inf"), dtype=dtype)
        sums = [k.new_zeros(B, H, r, n, dtype=dtype) for n in (D, D, 1, 1)]  # keys, values, weights, their logits
        for rows in _blocks(k, max(D, r)):
            own_k, own_v = k[:, :, rows].to(dtype), v[:, :, rows].to(dtype)
            logits = _logits(own_k, weight, allowed[:, :, rows])
            before, highest = highest, torch.maximum(highest, logits.amax(-2))
            p = exp_(logits - highest[..., None, :])
            new = p.mT @ own_k, p.mT @ own_v, p.sum(-2)[..., None], (p * logits).sum(-2)[..., None]
            scale = (before - highest).exp_()[..., None]
            for total, part in zip(sums, new, strict=True):
                total.mul_(scale).add_(part)
        keys, values, mean = (sums[i] / sums[2] for i in (0, 1, 3))
        mean, total = mean[..., 0], sums[2][..., 0]
        ctx.save_for_backward(k, v, weight, allowed, keys, values, highest, total, mean)
        return keys, values, highest + total.log() - mean

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_keys: torch.Tensor, grad_values: torch.Tensor, grad_entropy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        k, v, weight, allowed, keys, values, highest, total, mean = ctx.saved_tensors
        # d out / d logit = p (x - out), and d entropy / d logit = -p (logit - mean logit).
        level = (grad_keys * keys + grad_values * values).sum(-1) - grad_entropy * mean
        dk, dv = _like(k), _like(v)
        d_weight = torch.zeros_like(weight)
        for rows in _blocks(k, max(k.shape[3], weight.shape[2])):
            own_k, own_v, seen = k[:, :, rows].to(weight.dtype), v[:, :, rows].to(weight.dtype), allowed[:, :, rows]
            logits = _logits(own_k, weight, seen)
            p = exp_(logits - highest[..., None, :]).div_(total[..., None, :])
            ahead = own_k @ grad_keys.mT + own_v @ grad_values.mT
            d_logits = (logits.mul_(-grad_entropy[..., None, :]) + ahead).sub_(level[..., None, :]).mul_(p)
            d_logits = d_logits.masked_fill_(~seen, 0)
            dk[:, :, rows] = p @ grad_keys + d_logits @ weight.mT
            dv[:, :, rows] = p @ grad_values
            d_weight += (own_k.mT @ d_logits).sum(0)
        return dk, dv, d_weight, None
