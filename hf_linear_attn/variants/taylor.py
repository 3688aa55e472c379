"""Taylor attention: order 1 (linear attention of arXiv:2007.14902) and order 2 (Based, arXiv:2402.18668).

exp(u) is replaced by its series: 1 + u with l2-normalized q and k (order 1), or 1 + u + u^2 / 2, which is always
positive, with u = scaling * q'.k' (order 2). q' = P q + p and k' = R k + r have `num_features` coordinates.
Cost n f d with f = 1 + r + r (r + 1) / 2 features of r coordinates (order 1: 1 + d); decode state f (d + 1) numbers a
head.

With calibration P and R are the principal maps of the head's logits, its best rank r estimate, q and k are centered,
and keys are weighted by exp(scaling * a . k), a the mean query or a part of it, which makes up for it: only
what differs between queries is left to the series. Last, u is stretched. Each head keeps what lowers its output error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.ops.features import maps
from hf_linear_attn.ops.starts import calibration as measure
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, FeatureMapVariant, LayerContext, VariantConfig

__all__ = ["TaylorAttention", "TaylorConfig"]

_STRETCHES = (0.7, 1.5, 2.0)  # of u, tried after the other choices


@dataclass(frozen=True)
class TaylorConfig(VariantConfig):
    """Options of `taylor`.

    Attributes:
        order: of the series, 1 or 2.
        num_features: coordinates that q and k are projected to for order 2, at most head_dim; None (and order 1)
            keeps all. Without calibration the projection is random.
        variance_reducer: weight keys by a calibrated exp(scaling * a . k); without calibration a is 0.
        seed: of the random projection.
    """

    order: int = 2
    num_features: int | None = 16
    variance_reducer: bool = True
    seed: int = 0

    def validate(self) -> None:
        self.require_choice("order", (1, 2))
        self.require_width("num_features", optional=True)
        self.require_bool("variance_reducer")
        self.require_integer("seed", at_least=0)


@register_variant(
    "taylor",
    config=TaylorConfig,
    title="Taylor series (Based)",
    paper="Simple linear attention language models balance the recall-throughput tradeoff, arXiv:2402.18668; "
    "order 1: Linear Attention Mechanism, arXiv:2007.14902",
    cost="n f d",
    guide=("kernel", "generation from a constant state with nothing random"),
    state="constant",
    kernel="linear_attention",
    test_options=({"num_features": 6}, {"order": 1, "variance_reducer": False}),
)
class TaylorAttention(FeatureMapVariant):
    """Attention with the Taylor series of exp.

    Parameters: `query_weight`, `key_weight [H, r, D]`, `query_bias`, `key_bias [H, r]`. Buffer (persistent):
    `query_mean [H, D]` with the variance reducer.
    """

    reads_groups = True
    query_weight: nn.Parameter
    query_bias: nn.Parameter
    key_weight: nn.Parameter
    key_bias: nn.Parameter
    query_mean: torch.Tensor

    def __init__(self, config: TaylorConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        heads, dim = context.num_heads, context.head_dim
        self.rank = dim if config.order == 1 or config.num_features is None else min(config.num_features, dim)
        self.num_features = 1 + self.rank + (self.rank * (self.rank + 1) // 2 if config.order == 2 else 0)
        for name in ("query", "key"):
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(heads, self.rank, dim)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(heads, self.rank)))
        if config.variance_reducer:
            self.register_buffer("query_mean", torch.empty(heads, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published form; a projection is onto random directions, drawn from (seed, layer_idx)."""
        dim = self.context.head_dim
        weight = torch.eye(dim, device="cpu")
        if self.rank < dim:
            generator = self.context.generator(self.config.seed)
            directions = maps.gaussian_orthogonal(self.rank, dim, generator)
            weight = F.normalize(directions, dim=-1) * (dim / self.rank) ** 0.5  # q'.k' estimates q.k without bias
        for name, x in self.state_dict().items():
            x.copy_(weight) if name.endswith("weight") else x.zero_()

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose projection, means and stretch of each head by its output error against softmax."""
        rows, scaling = measure.collect_rows(batches), batches[0].scaling
        errors, present = self.error_meter(rows, scaling), self.state_dict()
        q, k = measure.head_tokens(rows)
        published = {name: x.clone() for name, x in present.items()}
        starts, centered = [published], None
        p = r = torch.eye(self.context.head_dim, device=q.device).expand(q.shape[0], -1, -1)
        for a, q_center, k_center in measure.reducer_starts(q, k):
            if a.any() and not self.config.variance_reducer:
                break
            if self.rank < self.context.head_dim and q_center is not centered:  # several starts have one center
                p, r = measure.principal_maps(q - q_center[:, None], k - k_center[:, None])
                centered = q_center
            start = measure.centered_maps(p[:, : self.rank], r[:, : self.rank], q_center, k_center)
            starts.append({**start, "query_mean": a} if self.config.variance_reducer else start)
        known = measure.choose_start(present, starts, errors)
        chosen = {name: x.clone() for name, x in present.items() if name != "query_mean"}
        stretched = [{name: x * stretch**0.5 for name, x in chosen.items()} for stretch in _STRETCHES]
        measure.choose_start(present, [chosen, *stretched], errors, known)

    def feature_maps(self, scaling: float) -> tuple[maps.FeatureMap, maps.FeatureMap]:
        def query_features(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> maps.Features:
            return self._features(x, weight, bias, scaling)

        def key_features(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> maps.Features:
            features = query_features(x, weight, bias)
            return maps.weighted_by_mean_logit(features, x, self.query_mean, scaling) if reduces else features

        def spelled(weight: torch.Tensor, bias: torch.Tensor, weights: maps.KeyWeights) -> maps.Spelled:
            return maps.TokenMap("projected_pairs", scaling**0.5, weight.mT, bias=bias), weights

        reduces = self.config.variance_reducer
        queries, keys = (self.query_weight, self.query_bias), (self.key_weight, self.key_bias)
        if self.config.order == 1:
            return maps.ParametricMap(query_features, queries), maps.ParametricMap(key_features, keys)
        weights = maps.KeyWeights(scaling, self.query_mean) if reduces else maps.KeyWeights()
        q_map = maps.SpelledMap(query_features, queries, spelled=partial(spelled, *queries, maps.KeyWeights()))
        return q_map, maps.SpelledMap(key_features, keys, spelled=partial(spelled, *keys, weights))

    def _features(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scaling: float) -> maps.Features:
        x = x.to(accumulation_dtype(x.dtype))
        x = x @ weight.to(x.dtype).mT + bias.to(x.dtype)[:, None]  # [B, H, T, r]
        x = F.normalize(x, dim=-1) if self.config.order == 1 else x * scaling**0.5
        return maps.taylor_features(x, self.config.order)
