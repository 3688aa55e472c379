"""Linformer: keys and values are projected along the sequence to k slots (arXiv:2006.04768).

    y_i = softmax(s q_i (E K)^T) (F V),    E, F: k x n_max

Cost n k d, encoders only. A row of fewer tokens than n_max spreads over all columns of E, wherever its padding is: its
tokens share all k slots, see `ops.pooled.projection`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_linear_attn.ops.base.masking import query_mask_of, safe_masked_fill
from hf_linear_attn.ops.base.numerics import accumulation_dtype, full_precision
from hf_linear_attn.ops.pooled.pooling import attend_segments
from hf_linear_attn.ops.pooled.projection import PROJECTION_CHOICES, SequenceProjection, check_projection_options
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["LinformerAttention", "LinformerConfig"]

REFUSAL = (
    "Linformer's projection E mixes every position into every slot, the future included, and a triangular "
    "n x k mask still leaks. For a decoder use 'longformer' (local) or 'performer' (global)."
)


@dataclass(frozen=True)
class LinformerConfig(VariantConfig):
    """Options of Linformer.

    Attributes:
        k: slots; one int, or one per layer of the model. More than the model's `max_length` acts as that.
        sharing: `"none"` E and F per head and layer (2 h L matrices), `"headwise"` per layer (2 L),
            `"key_value"` E = F (L), `"layerwise"` one matrix for the whole model (1).
        projection: `"linear"` learned k x n_max; `"conv"` learned, kernel = stride = n_max / k (rounded up);
            `"mean_pool"`, `"max_pool"` no parameters, slots spread over the real tokens of each row.
        init: `"mean_pool"` starts learned projections as `projection="mean_pool"`, at every length. `"random"` is the
            paper's N(0, 1/k), far from the checkpoint; a linear E that starts so keeps the paper's columns as well,
            shorter inputs use the first ones.
        seed: of `init="random"`.
    """

    k: int | tuple[int, ...] = 128
    sharing: str = "headwise"
    projection: str = "linear"
    init: str = "mean_pool"
    seed: int = 0

    def validate(self) -> None:
        for name, allowed in PROJECTION_CHOICES.items():
            self.require_choice(name, allowed)
        self.require_integer("seed", at_least=0)
        self.require_integer("k", each="layer")
        check_projection_options(self)


def _exact_limit(length: int, is_causal: bool) -> dict[str, Any]:
    # Pooling over the real tokens has segments of one token for k >= n whatever the model's max_length is.
    return {"k": length, "projection": "mean_pool"}


@register_variant(
    "linformer",
    config=LinformerConfig,
    title="Linformer",
    paper="Linformer: Self-Attention with Linear Complexity (arXiv:2006.04768)",
    cost="n k d",
    guide=("low-rank", "encoders of one fixed length, cheap at any"),
    state="none",
    decoder=False,
    refusal=REFUSAL,
    exact_limit=_exact_limit,
    test_options=(
        {"k": 16, "sharing": "none"},
        {"k": [8, 12], "sharing": "key_value"},
        {"k": 24, "sharing": "layerwise", "init": "random", "seed": 3},
        *({"k": 16, "projection": pool} for pool in ("mean_pool", "max_pool")),
        {"k": 16, "projection": "conv", "sharing": "none"},
        {"k": 14, "projection": "conv", "sharing": "layerwise", "init": "random"},
    ),
)
class LinformerAttention(AttentionVariant):
    """Softmax attention over k projected keys and values; see `LinformerConfig`.

    Raises:
        ValueError: for a causal layer, or a list of k that has not one entry per layer of the model.
    """

    key_projection: nn.Parameter | None
    value_projection: nn.Parameter | None

    def __init__(self, config: LinformerConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        if context.is_causal:
            raise ValueError(REFUSAL)
        self.projection = SequenceProjection(
            config, context.layer_idx, context.num_layers, context.num_heads, context.head_dim, context.max_length
        )
        shape, one = self.projection.weight_shape, self.projection.one_matrix
        self.key_projection = None if shape is None else nn.Parameter(torch.empty(shape))
        self.value_projection = None if shape is None or one else nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        generator = self.projection.generator()
        for parameter in self.parameters():
            parameter.copy_(self.projection.start(generator))

    def shared_parameters(self) -> tuple[str, ...]:
        names = tuple(name for name, _ in self.named_parameters())
        return names if self.config.sharing == "layerwise" else ()

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        """See `AttentionVariant.forward`.

        Raises:
            ValueError: for causal inputs, for a decode state, and for more keys than `context.max_length`.
        """
        if inputs.is_causal or state is not None:
            raise ValueError(REFUSAL)
        weights = self.key_projection, self.value_projection
        full = accumulation_dtype(inputs.key.dtype)
        with full_precision(inputs.key):
            key, value = inputs.key.to(full), inputs.value.to(full)
            key, value, in_use = self.projection(key, value, inputs.token_mask, *weights)
        query = safe_masked_fill(inputs.query, query_mask_of(inputs.token_mask, inputs.query.shape[2], False))
        return attend_segments(query, key, value, in_use, inputs.scaling), None
