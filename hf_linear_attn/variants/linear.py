"""Linear transformer, "Transformers are RNNs", arXiv:2006.16236.

o_i = phi(q_i) S / (phi(q_i) . z), S = sum_j phi(k_j) v_j^T, z = sum_j phi(k_j), phi(x) = elu(x) + 1.
Both q and k are multiplied by sqrt(scaling) first, which keeps the scale of the checkpoint's logits.
Cost n f d; decode state f (d + 1) numbers a head.

With calibration, phi(k) is weighted by exp(scaling * a . k), a the head's mean query or a part of it: what all
queries share of the logits. Heads that it does not bring closer to softmax keep a = 0, the published form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_linear_attn.ops.features.maps import (
    FeatureMap,
    Features,
    ScaledMap,
    laplace_features,
    weighted_by_mean_logit,
)
from hf_linear_attn.ops.features.named import feature_width
from hf_linear_attn.ops.starts.calibration import choose_start, collect_rows, head_tokens, reducer_starts
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, FeatureMapVariant, LayerContext, VariantConfig

__all__ = ["LinearAttention", "LinearConfig"]


@dataclass(frozen=True)
class LinearConfig(VariantConfig):
    """Options of `linear`.

    Attributes:
        feature_map: `"elu"` (elu + 1), `"relu"`, `"exp"`, `"softmax"`, `"squared_relu"`, `"laplace"` (random Fourier
            features of the kernel exp(-|q - k|_1), of both signs: for small norms only), or a map of your own
            (`register_feature_map`).
        variance_reducer: weight keys by a calibrated exp(scaling * a . k); without calibration a is 0.
        num_features: random features of `"laplace"` (a cosine and a sine each); other maps make head_dim.
        seed: seed of the random features of `"laplace"`.
    """

    feature_map: str = "elu"
    variance_reducer: bool = True
    num_features: int = 128
    seed: int = 0

    def validate(self) -> None:
        self.require_feature_map("feature_map", "laplace")
        self.require_bool("variance_reducer")
        self.require_width("num_features")
        self.require_integer("seed", at_least=0)


@register_variant(
    "linear",
    config=LinearConfig,
    title="Linear transformer",
    paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention, arXiv:2006.16236",
    cost="n f d",
    state="constant",
    kernel="linear_attention",
    test_options=(
        {"feature_map": "exp"},
        {"feature_map": "softmax", "variance_reducer": False},
    ),
)
class LinearAttention(FeatureMapVariant):
    """Attention through a feature map phi, `(phi(q) . phi(k))` in place of `exp(q . k)`.

    Buffers (persistent): `query_mean [H, D]` with the variance reducer, `omega [m, D]` with Laplace features.
    """

    query_mean: torch.Tensor
    omega: torch.Tensor

    def __init__(self, config: LinearConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        if config.variance_reducer:
            self.register_buffer("query_mean", torch.empty(context.num_heads, context.head_dim))
        if config.feature_map != "laplace":
            self.num_features = feature_width(config.feature_map, context.head_dim)
        else:
            self.num_features = 2 * config.num_features
            self.register_buffer("omega", torch.empty(config.num_features, context.head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published form: mean query 0; Cauchy frequencies drawn from (seed, layer_idx)."""
        if self.config.variance_reducer:
            self.query_mean.zero_()
        if self.config.feature_map == "laplace":
            generator = self.context.generator(self.config.seed)
            shape = (self.config.num_features, self.context.head_dim)
            self.omega.copy_(torch.empty(shape, device="cpu").cauchy_(generator=generator))

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Set the mean query in the heads where that lowers the error against softmax on these inputs."""
        if not self.config.variance_reducer:
            return
        rows, scaling = collect_rows(batches), batches[0].scaling
        starts = [{"query_mean": a} for a, _, _ in reducer_starts(*head_tokens(rows), centered=False)]
        choose_start({"query_mean": self.query_mean}, starts, self.error_meter(rows, scaling))

    def feature_maps(self, scaling: float) -> tuple[FeatureMap, FeatureMap]:
        scale, name = scaling**0.5, self.config.feature_map
        query_mean = self.query_mean if self.config.variance_reducer else None
        if name != "laplace":
            return ScaledMap(name, scale), ScaledMap(name, scale, query_mean, scaling)

        def features(x: torch.Tensor) -> Features:
            return laplace_features(x * scale, self.omega)

        def key_features(x: torch.Tensor) -> Features:
            return features(x) if query_mean is None else weighted_by_mean_logit(features(x), x, query_mean, scaling)

        return features, key_features
