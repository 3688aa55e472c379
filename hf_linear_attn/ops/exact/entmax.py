"""Sparse replacements of softmax: alpha-entmax (arXiv:1905.05702), sparsemax (arXiv:1602.02068) being alpha = 2.

p_i = [(alpha - 1) z_i - tau]_+ ^ e with e = 1 / (alpha - 1), tau such that p sums to 1.

tau is found by Newton's method on the e-norm |[(alpha - 1) z - tau]_+|_e = 1, a convex and almost linear function:
from the left of its root it never steps past it, and needs fewer passes than bisection or sorting.

The weights say all of their derivatives. With s_i = p_i^(2 - alpha) in the support, 0 outside, and q = s / sum_j s_j

    dp_i / dz_j = s_i (delta_ij - q_j),
    dp_i / dalpha = (p_i - q_i) / (alpha - 1)^2 + (h_i - q_i sum_j h_j) / (alpha - 1),    h = -p log p,

the latter after arXiv:1909.00015.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["entmax"]

# On logits of all scales and lengths up to 4096, 10 steps reach machine precision in float64 for every alpha.
NEWTON_STEPS = 12


def entmax(logits: torch.Tensor, alpha: float | torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """alpha-entmax over the last dimension, in float32 at least; training keeps the weights and nothing else.

    Args:
        logits: `[..., N]`.
        alpha: above 1 and at most 2, a number or a tensor that broadcasts against `[..., 1]`.
        allowed: bool, broadcastable to `logits`, or None. Weights are 0 where it is False, and so in all of a row
            without any allowed entry.

    Returns:
        weights of the logits' shape.

    Raises:
        ValueError: for a number alpha out of its range.
    """
    if not isinstance(alpha, torch.Tensor) and not 1 < alpha <= 2:
        raise ValueError(f"alpha={alpha!r}; allowed: above 1 and at most 2 (softmax is the limit at 1).")
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if allowed is not None:
        z = z.masked_fill(~allowed, torch.finfo(z.dtype).min)
    if isinstance(alpha, torch.Tensor):
        alpha = alpha.to(z.dtype)
    weights: torch.Tensor = _Entmax.apply(z, alpha)  # type: ignore[no-untyped-call]
    return weights if allowed is None else weights.masked_fill(~allowed, 0)


class _Entmax(torch.autograd.Function):
    """Autograd records the backward pass, of operations on the weights: there are derivatives of every order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
        return _weights(z, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, float | torch.Tensor], output: torch.Tensor) -> None:
        alpha = inputs[1]
        ctx.number = None if isinstance(alpha, torch.Tensor) else alpha
        ctx.save_for_backward(output, alpha if isinstance(alpha, torch.Tensor) else None)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        weights, learned = ctx.saved_tensors
        alpha = ctx.number if learned is None else learned
        outside = weights == 0
        inside = weights.masked_fill(outside, 1)  # 0 has no logarithm, and its power no derivative
        share = inside.pow(2 - alpha).masked_fill(outside, 0)
        change = share * grad
        mean = change.sum(-1, keepdim=True) / share.sum(-1, keepdim=True)
        d_z = change - share * mean
        if learned is None or not ctx.needs_input_grad[1]:
            return d_z, None
        entropy = -weights * inside.log()
        by_weights, by_entropy = (
            (x * grad).sum(-1, keepdim=True) - mean * x.sum(-1, keepdim=True) for x in (weights, entropy)
        )
        d_alpha = (by_weights / (alpha - 1) + by_entropy) / (alpha - 1)
        return d_z, d_alpha.sum_to_size(learned.shape)


def _weights(z: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    exponent = 1 / (alpha - 1)
    z = (z - z.amax(-1, keepdim=True)) * (alpha - 1)
    tau = torch.full_like(z[..., :1], -1)  # the largest logit alone reaches a sum of 1
    for _ in range(NEWTON_STEPS):
        excess = (z - tau).relu()
        power = excess.pow(exponent - 1).masked_fill_(excess == 0, 0)  # 0 ** 0 is 1
        total = (power * excess).sum(-1, keepdim=True)
        tau = tau + (total - total.pow(1 - 1 / exponent)) / power.sum(-1, keepdim=True)
    return (z - tau).relu().pow(exponent)
