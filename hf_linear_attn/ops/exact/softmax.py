"""Softmax attention by PyTorch, of layers that keep it: padding, causality, windows and grouped keys combined."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.groups import of_each_head
from hf_linear_attn.ops.base.masking import causal_mask

__all__ = ["softmax_attention"]


def softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    token_mask: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Softmax attention, `[B, H, Tq, D]`; rows that see no key are 0.

    Keys and values may serve a group of heads each, `[B, H / groups, Tk, D]`; for a single query they are not repeated.

    SDPA drops causality as soon as it is given a mask, so padding, causality and the sliding window (the last
    `sliding_window` tokens of a causal layer, None for all) are combined here.
    """
    (batch, heads, q_len, _), k_len = query.shape, key.shape[2]
    shape = batch, heads, q_len, value.shape[-1]
    if q_len == 1:  # the queries of a group side by side, as those of one head
        query = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    else:
        key, value = of_each_head(key, heads), of_each_head(value, heads)
    windowed = is_causal and sliding_window is not None and k_len > sliding_window
    if token_mask is None and not windowed and (not is_causal or q_len == k_len):
        output = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=is_causal and q_len > 1, scale=scaling
        )
        return output.reshape(shape)
    allowed = torch.ones((1, 1, 1, k_len), dtype=torch.bool, device=query.device)
    if token_mask is not None:
        allowed = token_mask[:, None, None, :]
    if is_causal:
        past = causal_mask(q_len, k_len, query.device)
        allowed = allowed & (past.triu(k_len - q_len - sliding_window + 1) if windowed else past)  # type: ignore[operator]
    sees_a_key = allowed.any(-1, keepdim=True)
    # Rows without a key attend everywhere and are zeroed afterwards: no NaN in the output nor in the gradients.
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed | ~sees_a_key, dropout_p=dropout, scale=scaling
    )
    return output.masked_fill(~sees_a_key, 0.0).reshape(shape)
