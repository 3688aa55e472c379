"""T2R, learned ReLU feature maps, "Finetuning Pretrained Transformers into RNNs", arXiv:2103.13076.

o_i = phi(q_i) S / (phi(q_i) . z), S = sum_j phi(k_j) v_j^T, z = sum_j phi(k_j), phi(x) = relu(W x + b), W and b learned
for each head, here for queries and keys apart; start W = [I; -I], b = 0. Cost n f d; decode state f (d + 1) numbers a
head.

With calibration W becomes [P; -P] with the principal maps P of the head's logits, b centers q and k, and keys are
weighted by exp(scaling * a . k), a the mean query or a part of it. Each head keeps what lowers its output error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from hf_linear_attn.ops.base.memo import known_zero
from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.ops.features import maps
from hf_linear_attn.ops.starts import calibration as measure
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, FeatureMapVariant, LayerContext, VariantConfig

__all__ = ["T2RAttention", "T2RConfig"]


@dataclass(frozen=True)
class T2RConfig(VariantConfig):
    """Options of `t2r`.

    Attributes:
        num_features: features f; None is 2 head_dim, which W = [I; -I] fills. Beyond that, and in an odd place,
            rows of W are random directions; with fewer, the first f / 2 coordinates are used.
        variance_reducer: weight keys by a calibrated exp(scaling * a . k); without calibration a is 0.
        seed: of the random directions.
    """

    num_features: int | None = None
    variance_reducer: bool = True
    seed: int = 0

    def validate(self) -> None:
        self.require_width("num_features", at_least=2, optional=True)
        self.require_bool("variance_reducer")
        self.require_integer("seed", at_least=0)


@register_variant(
    "t2r",
    config=T2RConfig,
    title="T2R",
    paper="Finetuning Pretrained Transformers into RNNs, arXiv:2103.13076",
    cost="n f d",
    guide=("kernel", "decoders finetuned into recurrent networks with few learned features"),
    state="constant",
    kernel="linear_attention",
    test_options=({"num_features": 9}, {"num_features": 40, "variance_reducer": False}),
)
class T2RAttention(FeatureMapVariant):
    """Attention through a learned ReLU feature map.

    Parameters: `query_weight`, `key_weight [H, f, D]`, `query_bias`, `key_bias [H, f]`. Buffer (persistent):
    `query_mean [H, D]` with the variance reducer.
    """

    reads_groups = True
    query_weight: nn.Parameter
    query_bias: nn.Parameter
    key_weight: nn.Parameter
    key_bias: nn.Parameter
    query_mean: torch.Tensor

    def __init__(self, config: T2RConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        heads, dim = context.num_heads, context.head_dim
        self.num_features = config.num_features or 2 * dim
        for name in ("query", "key"):
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(heads, self.num_features, dim)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(heads, self.num_features)))
        if config.variance_reducer:
            self.register_buffer("query_mean", torch.empty(heads, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W = [I; -I], b = 0; rows beyond that drawn from (seed, layer_idx)."""
        weight = self._signed(torch.eye(self.context.head_dim, device="cpu"))
        for name, x in self.state_dict().items():
            x.copy_(weight) if name.endswith("weight") else x.zero_()

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose coordinates, means and the share of the mean query of each head by its error against softmax."""
        rows, scaling = measure.collect_rows(batches), batches[0].scaling
        q, k = measure.head_tokens(rows)
        present = self.state_dict()
        starts = [{name: x.clone() for name, x in present.items()}]
        identity, centered = torch.eye(self.context.head_dim, device=q.device).expand(q.shape[0], -1, -1), None
        for a, q_center, k_center in measure.reducer_starts(q, k):
            if a.any() and not self.config.variance_reducer:
                break
            if q_center is not centered:  # several starts have one center
                principal, centered = measure.principal_maps(q - q_center[:, None], k - k_center[:, None]), q_center
            for p, r in ((identity, identity), principal):
                start = measure.centered_maps(self._signed(p), self._signed(r), q_center, k_center)
                starts.append({**start, "query_mean": a} if self.config.variance_reducer else start)
        measure.choose_start(present, starts, self.error_meter(rows, scaling))

    def feature_maps(self, scaling: float) -> tuple[maps.FeatureMap, maps.FeatureMap]:
        def key_features(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> maps.Features:
            features = _features(x, weight, bias)
            return maps.weighted_by_mean_logit(features, x, self.query_mean, scaling) if reduces else features

        def spelled(weight: torch.Tensor, bias: torch.Tensor, weights: maps.KeyWeights) -> maps.Spelled:
            return maps.TokenMap("projected_relu", weight=weight.mT, bias=bias), weights

        reduces = self.config.variance_reducer and not known_zero(self.query_mean)  # without calibration it is 0
        weights = maps.KeyWeights(scaling, self.query_mean) if reduces else maps.KeyWeights()
        queries, keys = (self.query_weight, self.query_bias), (self.key_weight, self.key_bias)
        q_map = maps.SpelledMap(_features, queries, spelled=partial(spelled, *queries, maps.KeyWeights()))
        return q_map, maps.SpelledMap(key_features, keys, spelled=partial(spelled, *keys, weights))

    def _signed(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows; -rows] `[..., D, D]` cut or filled up to f rows."""
        half = rows[..., : self.num_features // 2, :]
        missing = self.num_features - 2 * half.shape[-2]
        generator = self.context.generator(self.config.seed)
        dim = self.context.head_dim
        random = maps.gaussian_orthogonal(missing, dim, generator) if missing else torch.empty(0, dim, device="cpu")
        random = (random * dim**-0.5).to(rows).expand(*rows.shape[:-2], -1, -1)
        return torch.cat([half, -half, random], -2)


def _features(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> maps.Features:
    x = x.to(accumulation_dtype(x.dtype))
    return maps.relu_features(x @ weight.to(x.dtype).mT + bias.to(x.dtype)[:, None])  # [B, H, T, f]
