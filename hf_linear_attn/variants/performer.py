"""Performer (FAVOR+), softmax attention through random features, arXiv:2009.14794.

exp(q'.k') = E phi(q') . phi(k') for q' = sqrt(scaling) q, k' = sqrt(scaling) k and Gaussian omega; `positive`
phi(x) = exp(omega x - |x|^2 / 2) / sqrt(m). Cost n m d; decode state m (d + 1) numbers a head, twice that for
`hyperbolic` and `trig`. The error falls as m^-1/2, from a level of exp(|q' + k'|^2 / 2).

With calibration that level is lowered: exp(q'.k') differs from exp(q".k") exp(a'.k'), with q" = M (q' - a'),
k" = M^-T (k' - c'), only by factors of the query, which cancel. a, c are the head's mean query and key, and M
balances their second moments. Each head keeps what lowers its output error: nothing, the means, or all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.ops.features import maps
from hf_linear_attn.ops.starts import calibration as measure
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, FeatureMapVariant, LayerContext, VariantConfig

__all__ = ["PerformerAttention", "PerformerConfig"]


@dataclass(frozen=True)
class PerformerConfig(VariantConfig):
    """Options of `performer`.

    Attributes:
        num_features: random directions m; `hyperbolic` and `trig` make two features of each.
        kernel: `"positive"`, `"hyperbolic"`, `"trig"` (all estimate softmax) or `"relu"` (a kernel of its
            own). `trig` has features of both signs: for small norms only.
        orthogonal: directions orthogonal in blocks of head_dim.
        seed: seed of the directions, which are saved with the model.
        variance_reducer: use the calibrated means and balancing; without calibration they change nothing.
    """

    num_features: int = 128
    kernel: str = "positive"
    orthogonal: bool = True
    seed: int = 0
    variance_reducer: bool = True
    draws_features = True

    def validate(self) -> None:
        self.require_choice("kernel", maps.RANDOM_FEATURE_KERNELS)
        self.require_width("num_features")
        self.require_integer("seed", at_least=0)
        self.require_bool("orthogonal", "variance_reducer")


@register_variant(
    "performer",
    config=PerformerConfig,
    title="Performer (FAVOR+)",
    paper="Rethinking Attention with Performers, arXiv:2009.14794",
    cost="n m d",
    guide=("kernel", "an unbiased estimate of softmax, where many random features can be afforded"),
    state="constant",
    kernel="linear_attention",
    test_options=(
        {"kernel": "hyperbolic", "num_features": 24},
        {"kernel": "relu", "variance_reducer": False, "orthogonal": False},
    ),
)
class PerformerAttention(FeatureMapVariant):
    """Attention through random features.

    Buffers (persistent): `omega [m, D]`; with the variance reducer `query_mean`, `key_mean [H, D]` and
    `query_map`, `key_map [H, D, D]`, applied as `(q - query_mean) @ query_map`.
    """

    reads_groups = True
    omega: torch.Tensor
    query_mean: torch.Tensor
    key_mean: torch.Tensor

    def __init__(self, config: PerformerConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        heads, dim = context.num_heads, context.head_dim
        self.num_features = config.num_features * (2 if config.kernel in ("hyperbolic", "trig") else 1)
        self.register_buffer("omega", torch.empty(config.num_features, dim))
        if config.variance_reducer:
            for side in ("query", "key"):
                self.register_buffer(f"{side}_mean", torch.empty(heads, dim))
                self.register_buffer(f"{side}_map", torch.empty(heads, dim, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published form: directions drawn from (seed, layer_idx), means 0, maps the identity."""
        self.redraw(self.config.seed)
        if self.config.variance_reducer:
            for name in ("query", "key"):
                self.get_buffer(f"{name}_mean").zero_()
                self.get_buffer(f"{name}_map").copy_(torch.eye(self.context.head_dim))

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """New `omega`; means and maps stay, with which any directions estimate the same kernel."""
        generator = self.context.generator(seed)
        given = *self.omega.shape, generator
        self.omega.copy_(maps.gaussian_orthogonal(*given, orthogonal=self.config.orthogonal))

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose each head's start by its error against softmax on these inputs; warn where m features are too few."""
        if not self.config.variance_reducer:
            return
        rows, scaling = measure.collect_rows(batches), batches[0].scaling
        q, k = measure.head_tokens(rows)
        identity = torch.eye(q.shape[-1], device=q.device).expand(q.shape[0], -1, -1)
        a, c = q.mean(1), k.mean(1)
        moves = [(x * a, x * c, identity, identity) for x in (0, 1)]
        if self.config.kernel != "relu":
            moves.append((a, c, *measure.balancing_maps(q - a[:, None], k - c[:, None])))
        present = {name: self.get_buffer(name) for name in ("query_mean", "key_mean", "query_map", "key_map")}
        starts = [dict(zip(present, move, strict=True)) for move in moves]
        measure.choose_start(present, starts, self.error_meter(rows, scaling))
        if self.config.kernel != "relu":
            a, c, query_map, key_map = (x.to(q) for x in present.values())
            self._warn_if_hopeless((q - a[:, None]) @ query_map, (k - c[:, None]) @ key_map, scaling)

    def feature_maps(self, scaling: float) -> tuple[maps.FeatureMap, maps.FeatureMap]:
        query, key = partial(self._query_features, scaling=scaling), partial(self._key_features, scaling=scaling)
        if self.config.kernel in ("relu", "trig"):
            return query, key
        spelled = [partial(self._spelled, side, scaling) for side in ("query", "key")]
        rest = partial(self._key_rest, scaling=scaling)
        return maps.ExponentialMap(query, spelled[0]), maps.ExponentialMap(key, spelled[1], rest)

    def _spelled(self, side: str, scaling: float) -> maps.Spelled:
        """The map of a side in tensors; directions in float32."""
        weight, center, mean, square = self.omega.float().mT[None], None, None, None
        if self.config.variance_reducer:
            center, balance = self.get_buffer(f"{side}_mean"), self.get_buffer(f"{side}_map")
            weight = balance.float() @ weight
            mean, square = self.query_mean, balance
        elif side == "key":
            square = torch.eye(self.context.head_dim, device=weight.device)[None]
        if self.config.kernel == "hyperbolic":
            weight = torch.cat([weight, -weight], -1)
        token_map = maps.TokenMap("projected_exp", scaling**0.5, weight, center)
        return token_map, maps.KeyWeights(scaling, mean, square) if side == "key" else maps.KeyWeights()

    def _query_features(self, x: torch.Tensor, scaling: float) -> maps.Features:
        x = x.to(accumulation_dtype(x.dtype))
        directions = self.omega.to(x.dtype).mT * scaling**0.5  # [D, m]
        if self.config.variance_reducer and self.config.kernel != "relu":
            x = x - self.query_mean.to(x.dtype)[:, None]
            directions = self.get_buffer("query_map").to(x.dtype) @ directions  # [H, D, m]
        return maps.query_random_features(x @ directions, self.config.kernel), None  # [B, H, T, m]

    def _key_features(self, x: torch.Tensor, scaling: float) -> maps.Features:
        x, shared = self._balanced(x, scaling)
        projected = x @ (self.omega.to(x.dtype).mT * scaling**0.5)  # [B, H, T, m]
        features, log_weight = maps.key_random_features(projected, x, scaling, self.config.kernel)
        given = [x for x in (log_weight, shared) if x is not None]
        return features, sum(given[1:], given[0]) if given else None

    def _key_rest(self, x: torch.Tensor, scaling: float) -> torch.Tensor:
        """What a key's log weight has beside its largest exponent, `[B, H, T]`."""
        x, shared = self._balanced(x, scaling)
        return (0 if shared is None else shared) - 0.5 * scaling * x.square().sum(-1)

    def _balanced(self, x: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Centered and balanced keys, and what the reducer takes out of all logits of a key."""
        x = x.to(accumulation_dtype(x.dtype))
        if not self.config.variance_reducer:
            return x, None
        shared = maps.mean_logit(x, self.query_mean, scaling)  # [B, H, T]
        if self.config.kernel != "relu":
            x = (x - self.key_mean.to(x.dtype)[:, None]) @ self.get_buffer("key_map").to(x.dtype)
        return x, shared

    def _warn_if_hopeless(self, q: torch.Tensor, k: torch.Tensor, scaling: float) -> None:
        """Variance of an estimate over its square: (exp(|q'+k'|^2) - 1) / m, or with q' - k' for `trig`."""
        trig, limit = self.config.kernel == "trig", math.log(self.config.num_features)
        level = scaling * measure.mean_squared_sum(q, -k if trig else k).mean().item()
        if level > limit:
            warnings.warn(
                f"performer, layer {self.context.layer_idx}: mean |q' {'-' if trig else '+'} k'|^2 is {level:.1f}, "
                f"above log(num_features) = {limit:.1f}: the random features do not estimate this layer's softmax. "
                "Train the model after conversion, or choose another variant for the layer.",
                stacklevel=3,
            )
