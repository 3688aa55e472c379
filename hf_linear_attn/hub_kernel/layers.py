"""The ops as modules without weights, whose `forward` takes the place of a layer's own under `kernelize`.

A layer is replaced by one with as many parameters, of the same kinds, in the same order. Shapes: queries and keys
`[B, H, T, D]`, values `[B, H, T, D]`, `token_mask` bool `[B, Tk]`, True for a real token; outputs as the queries.
"""

from __future__ import annotations

import torch
from torch import nn

from hf_linear_attn.ops.features.maps import ScaledMap
from hf_linear_attn.ops.linear.attention import feature_map_attention, linear_attention
from hf_linear_attn.ops.window.attention import sliding_window_attention

__all__ = ["DecayAttention", "LinearAttention", "SlidingWindowAttention"]


class LinearAttention(nn.Module):
    """Linear attention with the features elu(x) + 1, "Transformers are RNNs", arXiv:2006.16236."""

    can_torch_compile = True

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Attend; what stands at padded tokens has no effect, be it nan.

        Raises:
            ValueError: for more queries than keys with `is_causal`.
        """
        elu = ScaledMap("elu", 1.0)
        return feature_map_attention(query, key, value, elu, elu, token_mask=token_mask, is_causal=is_causal)[0]


class DecayAttention(nn.Module):
    """Causal linear attention that forgets, o_i = q_i S_i with S_i = diag(exp(g_i)) S_{i-1} + k_i v_i^T.

    With one decay a head it is retention (arXiv:2307.08621), with one a feature gated linear attention
    (arXiv:2312.06635); both apply their own scale to the queries, and normalize the output, outside of it.
    """

    can_torch_compile = True

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_decay: torch.Tensor,
        token_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; `log_decay` g is `[B, H, Tk]` or `[B, H, Tk, D]`, at most 0. Padded tokens neither add nor decay.

        Raises:
            ValueError: for more queries than keys.
        """
        return linear_attention(
            query, key, value, log_decay=log_decay, token_mask=token_mask, is_causal=True, normalized=False
        )[0]


class SlidingWindowAttention(nn.Module):
    """Softmax attention of each query to the keys from `left` places before it to `right` places behind it.

    The pattern of Longformer (arXiv:2004.05150); `right=0` is causal.
    """

    can_torch_compile = True

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        left: int,
        right: int,
        scaling: float,
        token_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; keys and values are finite at padded tokens too, and rows that see no key are 0.

        Raises:
            ValueError: for more queries than keys, or a negative window.
        """
        return sliding_window_attention(
            query, key, value, left=left, right=right, scaling=scaling, key_allowed=token_mask
        )
