"""Kernel Linformer: kernel attention over projected keys and values, FLuRKA (arXiv:2306.15799).

    y_i = phi(q_i) [phi(E K)^T (F V)] / (phi(q_i) . sum_slots phi(E K)),    E, F: k x n_max

Queries and projected keys are multiplied by sqrt(scaling) before phi, which keeps the scale of the checkpoint's
logits. Cost (n + k) f d besides the projection, encoders only. E = I is the kernel attention of phi.

The kernels of a difference, `rbf` exp(-|q - k|^2 / 2 sigma^2) and `laplace` exp(-|q - k|_1 / sigma), compare queries
with projected keys, by positive random features of both.

With calibration phi sees sharpness (q - a) and sharpness (k - c), a and c the head's mean query and key, and
phi(k) is weighted by exp(scaling a . k), the part of the logits that all queries share. Heads that it does not
bring closer to softmax keep the published form. The sharpness of a kernel is 1 / sigma, of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_linear_attn.ops.base.masking import query_mask_of, safe_masked_fill
from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.ops.features.maps import weighted_by_mean_logit
from hf_linear_attn.ops.features.shift_invariant import SHIFT_INVARIANT, CenteredMap, check_kernel_options
from hf_linear_attn.ops.linear.attention import linear_attention
from hf_linear_attn.ops.pooled.projection import PROJECTION_CHOICES, SequenceProjection, check_projection_options
from hf_linear_attn.ops.starts.calibration import choose_start, collect_rows, head_tokens
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["KernelLinformerAttention", "KernelLinformerConfig"]

REFUSAL = (
    "The projection E of kernel_linformer mixes every position into every slot, the future included. For a "
    "decoder use 'linear' (the same feature maps, without E)."
)


@dataclass(frozen=True)
class KernelLinformerConfig(VariantConfig):
    """Options of `kernel_linformer`; those of the projection are the options of `linformer`.

    Attributes:
        k: slots; one int, or one per layer of the model.
        feature_map: `"elu"` (elu + 1), `"exp"`, `"relu"`, `"softmax"`, `"squared_relu"`, the kernels `"laplace"` and
            `"rbf"`, or a map of your own (`register_feature_map`).
        variance_reducer: use the calibrated means and sharpness; without calibration they change nothing.
        sharing: `"none"`, `"headwise"`, `"key_value"` or `"layerwise"`.
        projection: `"linear"`, `"conv"`, `"mean_pool"` or `"max_pool"`, whose maxima of values lie above what attention
            averages (`linformer` has a `value_pool`).
        init: of learned projections, `"mean_pool"` or `"random"` (N(0, 1/k)).
        seed: of `init="random"`, and of a kernel's directions, which are saved with the model.
        num_features: random directions m of a kernel; other maps make head_dim features, or as many as yours does.
        normalize: let a kernel compare q / |q| and k / |k|.
        bandwidth: sigma of a kernel, before calibration.
    """

    k: int | tuple[int, ...] = 128
    feature_map: str = "elu"
    variance_reducer: bool = True
    sharing: str = "headwise"
    projection: str = "linear"
    init: str = "mean_pool"
    seed: int = 0
    num_features: int = 128
    normalize: bool = False
    bandwidth: float = 1.0
    random_features = "positive"  # few slots share a denominator: features of both signs would not do

    def validate(self) -> None:
        for name, allowed in PROJECTION_CHOICES.items():
            self.require_choice(name, allowed)
        self.require_integer("seed", at_least=0)
        self.require_integer("k", each="layer")
        check_projection_options(self)
        check_kernel_options(self)
        self.require_bool("variance_reducer")

    @property
    def draws_features(self) -> bool:
        return self.feature_map in SHIFT_INVARIANT


@register_variant(
    "kernel_linformer",
    config=KernelLinformerConfig,
    title="Kernel Linformer (FLuRKA)",
    paper="FLuRKA: Fast and accurate unified Low-Rank & Kernel Attention, arXiv:2306.15799",
    cost="(n + k) f d",
    guide=("low-rank", "encoders of one fixed length, with few slots and few features"),
    state="none",
    decoder=False,
    refusal=REFUSAL,
    test_options=(
        {"k": 16, "feature_map": "exp", "sharing": "none"},
        {"k": [8, 36], "projection": "mean_pool", "feature_map": "squared_relu", "variance_reducer": False},
        {"k": 14, "projection": "conv", "feature_map": "softmax", "sharing": "key_value"},
        {"k": 16, "feature_map": "laplace", "num_features": 24, "normalize": True, "bandwidth": 2.0},
    ),
)
class KernelLinformerAttention(AttentionVariant):
    """Kernel attention over k projected keys and values; see `KernelLinformerConfig`.

    Parameters: `key_projection` and `value_projection`, as the sharing says. Buffers (persistent) with the variance
    reducer: `query_mean`, `key_mean [H, D]`, `sharpness [H]`; of a kernel `sharpness [H]`, `omega [m, D]` and, where it
    is Laplace's, `width [m, D]`.

    Raises:
        ValueError: for a causal layer, or a list of k that has not one entry per layer of the model.
    """

    key_projection: nn.Parameter | None
    value_projection: nn.Parameter | None
    query_mean: torch.Tensor
    sharpness: torch.Tensor

    def __init__(self, config: KernelLinformerConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        if context.is_causal:
            raise ValueError(REFUSAL)
        heads, dim = context.num_heads, context.head_dim
        self.map = CenteredMap(config, dim)
        self.projection = SequenceProjection(
            config, context.layer_idx, context.num_layers, heads, dim, context.max_length
        )
        shape, one = self.projection.weight_shape, self.projection.one_matrix
        self.key_projection = None if shape is None else nn.Parameter(torch.empty(shape))
        self.value_projection = None if shape is None or one else nn.Parameter(torch.empty(shape))
        for name in ("query_mean", "key_mean") if config.variance_reducer else ():
            self.register_buffer(name, torch.empty(heads, dim))
        self.map.register(self)
        if config.draws_features or config.variance_reducer:
            self.register_buffer("sharpness", torch.empty(heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published form: projections and bandwidth as the options say, means 0, sharpness 1."""
        generator = self.projection.generator()
        for parameter in self.parameters():
            parameter.copy_(self.projection.start(generator))
        for name, buffer in self.named_buffers():
            buffer.fill_(1 / self.config.bandwidth if name == "sharpness" else 0)
        self.redraw(self.config.seed)

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """New `omega` and `width` of a kernel; sharpness, means and projections stay."""
        self.map.draw(self, self.context.generator(seed))

    def shared_parameters(self) -> tuple[str, ...]:
        names = tuple(name for name, _ in self.named_parameters())
        return names if self.config.sharing == "layerwise" else ()

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose each head's means and sharpness by its output error on the first `max_length` tokens of each row."""
        present = {name: x for name, x in self.named_buffers() if name not in ("omega", "width")}
        if not present:
            return
        rows, scaling = collect_rows(batches, self.context.max_length), batches[0].scaling
        q, k = head_tokens(rows)
        starts = [{name: x for name, x in start.items() if name in present} for start in self.map.starts(q, k, scaling)]
        choose_start(present, starts, self.error_meter(rows, scaling))

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        """See `AttentionVariant.forward`.

        Raises:
            ValueError: for causal inputs, for a decode state, and for more keys than `context.max_length`.
        """
        if inputs.is_causal or state is not None:
            raise ValueError(REFUSAL)
        weights = self.key_projection, self.value_projection
        key, value, in_use = self.projection(inputs.key, inputs.value, inputs.token_mask, *weights)
        full = accumulation_dtype(inputs.query.dtype)
        query = safe_masked_fill(inputs.query, query_mask_of(inputs.token_mask, inputs.query.shape[2], False)).to(full)
        key, value = key.to(full).contiguous(), value.contiguous()  # small; heads lay side by side
        features = self.map.features(self, key, "key", inputs.scaling)
        if self.config.variance_reducer:
            features = weighted_by_mean_logit(features, key, self.query_mean, inputs.scaling)
        output, _ = linear_attention(
            *(self.map.features(self, query, "query", inputs.scaling)[0], features[0], value),
            key_log_weight=features[1],
            token_mask=in_use,
            is_causal=False,
            backend=self.backend,
        )
        return output.to(inputs.query.dtype), None
