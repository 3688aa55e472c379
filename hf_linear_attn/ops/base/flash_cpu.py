"""Torch's attention kernels for CPUs, called with a log-sum-exp and with a backward pass."""

from __future__ import annotations

import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO as UNSEEN
from hf_linear_attn.ops.base.pieces import serves

__all__ = ["UNSEEN", "attend_backward", "attend_with_sums", "serves"]


def attend_with_sums(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[N, H, T, D]` and log-sum-exp `[N, H, T]`."""
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=bias, scale=scaling
    )
    return result


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, given the output and the log-sum-exp over all keys and the output's gradient."""
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse.contiguous(), 0.0, False, attn_mask=bias, scale=scaling
        )
    )
    return result
