"""Sparse replacements of softmax: alpha-entmax (arXiv:1905.05702), sparsemax (arXiv:1602.02068) being alpha = 2.

p_i = [(alpha - 1) z_i - tau]_+ ^ e with e = 1 / (alpha - 1), tau such that p sums to 1.

tau is found by Newton's method on the e-norm |[(alpha - 1) z - tau]_+|_e = 1, a convex and almost linear function:
from the left of its root it never steps past it, and needs fewer passes than bisection or sorting. A last Newton
step with gradients gives tau the derivatives of the implicit function, by the logits and by alpha.
"""

from __future__ import annotations

import torch

__all__ = ["entmax"]

# On logits of all scales and lengths up to 4096, 10 steps reach machine precision in float64 for every alpha.
NEWTON_STEPS = 12


def entmax(logits: torch.Tensor, alpha: float | torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """alpha-entmax over the last dimension, in float32 at least.

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
    z = (z - z.detach().amax(-1, keepdim=True)) * (alpha - 1)
    exponent = 1 / (alpha - 1)
    tau, slope = _threshold(z.detach(), exponent.detach() if isinstance(exponent, torch.Tensor) else exponent)
    tau = tau + ((z - tau).relu().pow(exponent).sum(-1, keepdim=True) - 1) / slope
    weights = (z - tau).relu().pow(exponent)
    return weights if allowed is None else weights.masked_fill(~allowed, 0)


def _threshold(z: torch.Tensor, exponent: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """tau for logits whose largest is 0, and the slope there of sum_i [z_i - tau]_+ ^ e, sign changed."""
    tau = torch.full_like(z[..., :1], -1)  # the largest logit alone reaches a sum of 1
    slope = tau
    for step in range(NEWTON_STEPS + 1):
        excess = (z - tau).relu()
        power = excess.pow(exponent - 1).masked_fill_(excess == 0, 0)  # 0 ** 0 is 1
        slope = power.sum(-1, keepdim=True)
        if step < NEWTON_STEPS:
            total = (power * excess).sum(-1, keepdim=True)
            tau = tau + (total - total.pow(1 - 1 / exponent)) / slope
    return tau, slope * exponent
