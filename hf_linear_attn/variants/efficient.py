"""Efficient Attention, arXiv:1812.01243.

y = rho_q(Q) (rho_k(K)^T V): rho_q is a softmax over the features of each query, rho_k a softmax over the positions of
each feature. Features are W_q q + b and W_k k (own form); published are the coordinates of q and k, without scaling.
Every feature is a query shared by all, whose attention is exact. Decoders (own form) normalize rho_k over each prefix.
Cost n f d; decode state f (d + 2) numbers a head.

With calibration, the rows of W_k are scaling times centroids of the head's queries, drawn apart a little, and rho_q
assigns a query to the nearest ones: logits -sharpness * scaling * |q - centroid|^2 / 2. Each head keeps what lowers
its output error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_linear_attn.ops.features.maps import gaussian_orthogonal
from hf_linear_attn.ops.prefix.attention import init_prefix_softmax_state, prefix_softmax_attention
from hf_linear_attn.ops.starts.calibration import choose_start, collect_rows, head_tokens, kmeans
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["EfficientAttention", "EfficientConfig"]

FEATURE_MAPS = ("affine", "identity")
# (sharpness of the assignment, 1 being softmax's own; distance of the centroids from their mean). A query between
# centroids gets a mixture of them, which is flatter than its own attention: centroids further out make up for it.
_STARTS = ((2.0, 1.0), (4.0, 1.0), (1.0, 1.2), (2.0, 1.2), (4.0, 1.2), (1.0, 1.5), (2.0, 1.5))


@dataclass(frozen=True)
class EfficientConfig(VariantConfig):
    """Options of `efficient`.

    Attributes:
        num_features: features f; None is head_dim, as published. Another number starts from random directions
            (from centroids with calibration).
        feature_map: `"affine"`, features with weights, at first as published, that calibration and training set; or
            `"identity"`, coordinates of q and k, as published: no parameters, nothing to calibrate, least time.
        seed: of the random directions and of the centroids.
    """

    num_features: int | None = None
    feature_map: str = "affine"
    seed: int = 0

    def validate(self) -> None:
        self.require_width("num_features", optional=True)
        self.require_choice("feature_map", FEATURE_MAPS)
        if self.feature_map == "identity" and self.num_features is not None:
            raise ValueError(f"num_features={self.num_features}; allowed with feature_map='identity': None.")
        self.require_integer("seed", at_least=0)


@register_variant(
    "efficient",
    config=EfficientConfig,
    title="Efficient Attention",
    paper="Efficient Attention: Attention with Linear Complexities, arXiv:1812.01243",
    cost="n f d",
    guide=("kernel", "encoders at the least cost, with features that are distributions"),
    state="constant",
    test_options=({"num_features": 12}, {"feature_map": "identity"}),
)
class EfficientAttention(AttentionVariant):
    """Softmax over features for queries, over positions for keys.

    Parameters: `query_weight`, `key_weight [H, f, D]`, `query_bias [H, f]`; None with `feature_map="identity"`.
    """

    query_weight: nn.Parameter | None
    query_bias: nn.Parameter | None
    key_weight: nn.Parameter | None

    def __init__(self, config: EfficientConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.num_features = config.num_features or context.head_dim
        shape = (context.num_heads, self.num_features, context.head_dim)
        has_weights = config.feature_map == "affine"
        for name, size in (("query_weight", shape), ("query_bias", shape[:2]), ("key_weight", shape)):
            self.register_parameter(name, nn.Parameter(torch.empty(size)) if has_weights else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published form: features are the coordinates of q and k, or random directions if they are not d."""
        if self.query_weight is None or self.query_bias is None or self.key_weight is None:
            return
        weight = torch.eye(self.context.head_dim)
        if self.num_features != self.context.head_dim:
            dim, generator = self.context.head_dim, self.context.generator(self.config.seed)
            weight = gaussian_orthogonal(self.num_features, dim, generator) * dim**-0.5
        self.query_weight.copy_(weight)
        self.key_weight.copy_(weight)
        self.query_bias.zero_()

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Start each head from centroids of its queries where that lowers the error against softmax."""
        if self.query_weight is None:
            return
        rows, scaling = collect_rows(batches), batches[0].scaling
        present = {name: x.detach() for name, x in self.named_parameters()}
        queries = head_tokens(rows)[0]
        seed = self.context.generator(self.config.seed).initial_seed()
        mean, found = queries.mean(1, keepdim=True), kmeans(queries, self.num_features, seed)  # [H, f, D]
        starts = [{name: x.clone() for name, x in present.items()}]
        for sharpness, distance in _STARTS:
            centroids = mean + distance * (found - mean)
            starts.append(
                {
                    "query_weight": sharpness * scaling * centroids,
                    "query_bias": -0.5 * sharpness * scaling * centroids.square().sum(-1),
                    "key_weight": scaling * centroids,
                }
            )
        choose_start(present, starts, self.error_meter(rows, scaling))

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        heads, dim = self.context.num_heads, self.context.head_dim
        return init_prefix_softmax_state(batch_size, heads, self.num_features, dim, dtype, device)

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        output, state = prefix_softmax_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            query_weight=self.query_weight,
            query_bias=self.query_bias,
            key_weight=self.key_weight,
            token_mask=inputs.token_mask,
            is_causal=inputs.is_causal,
            state=state,
        )
        return output.to(inputs.query.dtype), state
