"""Linear transformer, "Transformers are RNNs", arXiv:2006.16236.

o_i = phi(q_i) S / (phi(q_i) . z), S = sum_j phi(k_j) v_j^T, z = sum_j phi(k_j), phi(x) = elu(x) + 1.
Both q and k are multiplied by sqrt(scaling) first, which keeps the scale of the checkpoint's logits.
Cost n f d; decode state f (d + 1) numbers a head.

With calibration, phi(k) is weighted by exp(scaling * a . k), a the head's mean query or a part of it: what all
queries share of the logits. Heads that it does not bring closer to softmax keep a = 0, the published form.

The kernels of a difference, `rbf` exp(-|q - k|^2 / 2 sigma^2) and `laplace` exp(-|q - k|_1 / sigma), have random
features. Calibration chooses their bandwidth sigma with a, and whether the head's mean query and key are taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from hf_linear_attn.ops.base.memo import known_zero
from hf_linear_attn.ops.features import shift_invariant
from hf_linear_attn.ops.features.maps import FeatureMap, Features, ScaledMap, weighted_by_mean_logit
from hf_linear_attn.ops.features.named import feature_width
from hf_linear_attn.ops.starts import calibration as measure
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, FeatureMapVariant, LayerContext, VariantConfig

__all__ = ["LinearAttention", "LinearConfig"]

MEANS = ("query_mean", "query_center", "key_center")


@dataclass(frozen=True)
class LinearConfig(VariantConfig):
    """Options of `linear`.

    Attributes:
        feature_map: `"elu"` (elu + 1), `"relu"`, `"exp"`, `"softmax"`, `"squared_relu"`, the kernels
            `"laplace"` and `"rbf"`, or a map of your own (`register_feature_map`).
        variance_reducer: weight keys by a calibrated exp(scaling * a . k), and center what a kernel compares; without
            calibration it changes nothing.
        num_features: random directions m of a kernel; other maps make head_dim features, or as many as yours does.
        seed: seed of the directions, which are saved with the model.
        random_features: of a kernel, `"positive"`, or `"fourier"`, a cosine and a sine of each direction, as published:
            of both signs, for small norms only.
        normalize: let a kernel compare q / |q| and k / |k|.
        bandwidth: sigma of a kernel, before calibration.
    """

    feature_map: str = "elu"
    variance_reducer: bool = True
    num_features: int = 128
    seed: int = 0
    random_features: str = "positive"
    normalize: bool = False
    bandwidth: float = 1.0

    def validate(self) -> None:
        shift_invariant.check_kernel_options(self)
        self.require_bool("variance_reducer")
        self.require_integer("seed", at_least=0)

    @property
    def draws_features(self) -> bool:
        return self.feature_map in shift_invariant.SHIFT_INVARIANT


@register_variant(
    "linear",
    config=LinearConfig,
    title="Linear transformer",
    paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention, arXiv:2006.16236",
    cost="n f d",
    guide=("kernel", "the least cost and the smallest state, where training can bring the quality back"),
    state="constant",
    kernel="linear_attention",
    test_options=(
        {"feature_map": "exp"},
        {"feature_map": "softmax", "variance_reducer": False},
        {"feature_map": "rbf", "num_features": 24, "bandwidth": 2.0},
        {"feature_map": "laplace", "num_features": 24, "normalize": True},
    ),
)
class LinearAttention(FeatureMapVariant):
    """Attention through a feature map phi, `(phi(q) . phi(k))` in place of `exp(q . k)`.

    Buffers (persistent): with the variance reducer `query_mean [H, D]`; of a kernel `omega [m, D]`, `bandwidth [H]`,
    with the reducer `query_center`, `key_center [H, D]`, and for positive features of Laplace's `width [m, D]`.
    """

    reads_groups = True
    query_mean: torch.Tensor
    query_center: torch.Tensor
    key_center: torch.Tensor
    kernel: shift_invariant.RandomKernel
    bandwidth: torch.Tensor

    def __init__(self, config: LinearConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        heads, dim = context.num_heads, context.head_dim
        for name in MEANS[: 3 if config.draws_features else 1] if config.variance_reducer else ():
            self.register_buffer(name, torch.empty(heads, dim))
        if not config.draws_features:
            self.num_features = feature_width(config.feature_map, dim)
        else:
            self.kernel = shift_invariant.RandomKernel(config, dim)
            self.num_features = self.kernel.num_features
            self.kernel.register(self)
            self.register_buffer("bandwidth", torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published form: means 0, the bandwidth of the options; directions drawn from (seed, layer_idx)."""
        for buffer in self.buffers():
            buffer.zero_()
        if self.config.draws_features:
            self.bandwidth.fill_(self.config.bandwidth)
            self.redraw(self.config.seed)

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """New `omega` and `width` of a kernel; bandwidth, means and centers stay."""
        if self.config.draws_features:
            self.kernel.draw(self, self.context.generator(seed))

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose each head's mean query, and a kernel's bandwidth and centers, by its error against softmax; warn where
        denominators are not positive."""
        present = {name: x for name, x in self.named_buffers() if name not in ("omega", "width")}
        if not present:
            return
        rows, scaling = measure.collect_rows(batches), batches[0].scaling
        q, k = measure.head_tokens(rows)
        means = measure.reducer_starts(q, k, centered=self.config.draws_features)
        starts = [dict(zip(MEANS, start, strict=True)) for start in means]
        if self.config.draws_features:
            tried = starts if self.config.variance_reducer else starts[:1]
            starts = [{**starts[0], "bandwidth": torch.full_like(self.bandwidth, self.config.bandwidth)}]
            for start in tried:
                sigmas = self.kernel.bandwidths(q, k, start["query_center"], start["key_center"], scaling)
                starts += [{**start, "bandwidth": sigma} for sigma in sigmas]
        starts = [{name: x for name, x in start.items() if name in present} for start in starts]
        measure.choose_start(present, starts, self.error_meter(rows, scaling))
        if self.config.random_features == "fourier":
            q_map, k_map = self.feature_maps(scaling)
            measure.warn_of_nonpositive(
                f"linear, layer {self.context.layer_idx}",
                f"feature_map={self.config.feature_map!r}, random_features='fourier'",
                ((q_map(q)[0], *k_map(k)) for q, k, _ in rows),
                is_causal=self.context.is_causal,
                advice="Use random_features='positive', or another variant for the layer.",
            )

    def feature_maps(self, scaling: float) -> tuple[FeatureMap, FeatureMap]:
        # Where it is all 0, as without calibration, all keys weigh the same: no weight is computed.
        query_mean = None if not self.config.variance_reducer or known_zero(self.query_mean) else self.query_mean
        if self.config.draws_features:
            features = partial(self._features, scaling=scaling)
            return partial(features, side="query"), partial(features, side="key")
        scale, name = scaling**0.5, self.config.feature_map
        return ScaledMap(name, scale), ScaledMap(name, scale, query_mean, scaling)

    def _features(self, x: torch.Tensor, side: str, scaling: float) -> Features:
        """Random features of a kernel, `[B, H, T, m or 2m]`."""
        reduced = self.config.variance_reducer
        center = self.get_buffer(f"{side}_center") if reduced else None
        features = self.kernel.features(self, x, center, self.bandwidth, scaling)
        if side == "query" or not reduced:
            return features
        return weighted_by_mean_logit(features, x, self.query_mean, scaling)
