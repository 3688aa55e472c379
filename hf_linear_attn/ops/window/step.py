"""One query against a window and extra columns: what a decode step asks, without a copy of the window."""

from __future__ import annotations

import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.ops.window.layout import Extra

__all__ = ["attend_one"]


def attend_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    key_allowed: torch.Tensor | None,
    extra: Extra,
) -> torch.Tensor:
    """Softmax attention of one query over keys and extra columns, in the dtype of the sums.

    Args:
        q: `[B, H, 1, D]`, float32 or float64.
        k, v: `[B, H, w, D]`, the keys of its window.
        scaling: factor of the logits.
        key_allowed: bool `[B or 1, w]`; None when all may be seen.
        extra: columns, as of `sliding_window_attention`.

    Returns:
        `[B, H, 1, D]`; 0 where it sees no key.
    """
    columns, values, seen = extra
    width, G = k.shape[-1], columns.shape[2]
    allowed = seen.expand(-1, 1, -1)  # [B or 1, 1, G]
    if key_allowed is None:
        key_allowed = torch.ones(1, k.shape[2], dtype=torch.bool, device=q.device)
    batch = max(len(allowed), len(key_allowed))
    allowed = torch.cat([allowed.expand(batch, -1, -1), key_allowed.expand(batch, -1)[:, None]], -1)[:, None]
    of_columns = q @ columns[..., :width].mT
    if columns.shape[-1] > width:  # a bias of the logits
        of_columns = of_columns + columns[..., width:].mT
    logits = torch.cat([of_columns, q @ k.mT], -1) * scaling
    weights = logits.masked_fill(~allowed, LOG_ZERO).softmax(-1)
    out = weights[..., :G] @ values[..., : v.shape[-1]] + weights[..., G:] @ v
    return out.masked_fill(~allowed.any(-1, keepdim=True), 0)
