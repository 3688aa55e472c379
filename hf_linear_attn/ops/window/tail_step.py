"""One decode step of a window with a linear tail: the key that leaves joins the sums, one softmax weighs them all.

The tail counts as one more key of that softmax: its logit is the log of the tail's denominator, its value the tail's
output. `ops.window.tail` has the formula.
"""

from __future__ import annotations

import torch

from hf_linear_attn.ops.base.numerics import LOG_ZERO
from hf_linear_attn.ops.features.maps import FeatureMap
from hf_linear_attn.ops.linear.attention import State, feature_map_attention_with_normalizer

__all__ = ["decode_step"]


def decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    *,
    scaling: float,
    window_log_factor: torch.Tensor,
    relative: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    state: State,
    backend: str,
) -> tuple[torch.Tensor, State | None]:
    """`window_tail_attention` of one query; arguments as there, in the dtype of the sums.

    Args:
        q: `[B, H, 1, D]`.
        k: `[B, H, 1 + w, D]`: the key that leaves, and the window.
        v: `[B, H, 1 + w, D]`.
    """
    leaves = None if token_mask is None else token_mask[:, :1].expand(len(q), -1)
    joins = k[:, :, :1], v[:, :, :1]
    tail, log, after = feature_map_attention_with_normalizer(
        q, *joins, q_map, k_map, token_mask=leaves, is_causal=True, state=state, backend=backend
    )
    logits = (q @ k[:, :, 1:].mT)[:, :, 0] * scaling  # [B, H, w]
    if token_mask is not None:
        logits = logits.masked_fill(~token_mask[:, None, 1:], LOG_ZERO)
    if relative is not None:
        log = log + torch.where(relative[:, None], logits.amax(-1, keepdim=True), 0.0)
    scores = torch.cat([logits + window_log_factor.to(logits.dtype)[:, None], log], -1)
    weights = scores.softmax(-1)[:, :, None]  # [B, H, 1, w + 1]
    return weights[..., :-1] @ v[:, :, 1:] + weights[..., -1:] * tail, after
