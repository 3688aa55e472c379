"""cosFormer, "Rethinking Softmax in Attention", arXiv:2202.08791.

The weight of key j for query i is relu(q_i) . relu(k_j) cos(pi (i - j) / 2M), in kernel form with features
relu(x) [cos, sin](pi i / 2M): nearer tokens weigh more. i is the rank among real tokens, and M the model's longest
sequence: with the length of each call, as the authors have it, decoding would not give what the prefill gives.
Cost n 2d d; decode state 2d (d + 1) numbers a head and a counter.

With calibration, keys are weighted by exp(scaling * a . k), a the head's mean query or a part of it, and
queries and keys may be centered. Each head keeps what lowers its output error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from hf_linear_attn.ops.base.masking import real_token_rank
from hf_linear_attn.ops.base.memo import known_zero
from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.ops.features import maps
from hf_linear_attn.ops.linear.attention import feature_map_attention, init_linear_state
from hf_linear_attn.ops.starts import calibration as measure
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["CosformerAttention", "CosformerConfig"]


@dataclass(frozen=True)
class CosformerConfig(VariantConfig):
    """Options of `cosformer`.

    Attributes:
        variance_reducer: use the calibrated key weights and centers; without calibration they change nothing.
    """

    variance_reducer: bool = True

    def validate(self) -> None:
        self.require_bool("variance_reducer")


@register_variant(
    "cosformer",
    config=CosformerConfig,
    title="cosFormer",
    paper="cosFormer: Rethinking Softmax in Attention, arXiv:2202.08791",
    cost="n 2d d",
    guide=("kernel", "linear cost where near keys matter most: weights fall with the distance"),
    state="constant",
    kernel="linear_attention",
    test_options=({"variance_reducer": False},),
)
class CosformerAttention(AttentionVariant):
    """ReLU attention reweighted by the cosine of the distance.

    Buffers (persistent), with the variance reducer: `query_mean`, `query_center`, `key_center [H, D]`.
    """

    reads_groups = True
    query_mean: torch.Tensor
    query_center: torch.Tensor
    key_center: torch.Tensor

    def __init__(self, config: CosformerConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.longest = context.max_length  # further apart, the cosine is negative
        self._angle = math.pi / 2 / self.longest  # of one token
        if config.variance_reducer:
            for name in ("query_mean", "query_center", "key_center"):
                self.register_buffer(name, torch.empty(context.num_heads, context.head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published form: means and centers 0."""
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose each head's means and centers by its output error against softmax on these inputs."""
        if not self.config.variance_reducer:
            return
        rows, present = measure.collect_rows(batches, self.context.max_length), dict(self.named_buffers())
        candidates = measure.reducer_starts(*measure.head_tokens(rows))
        starts = [dict(zip(("query_mean", "query_center", "key_center"), x, strict=True)) for x in candidates]
        measure.choose_start(present, starts, self.error_meter(rows, batches[0].scaling))

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        heads, dim = self.context.num_heads, self.context.head_dim
        count = torch.zeros(batch_size, dtype=torch.long, device=device)
        return {**init_linear_state(batch_size, heads, 2 * dim, dim, dtype, device), "count": count}

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        q_len, k_len = inputs.query.shape[2], inputs.key.shape[2]
        if q_len > k_len or k_len > self.context.max_length:
            raise ValueError(
                f"cosformer takes at most max_length={self.context.max_length} tokens and as many queries as keys, "
                f"the last ones; got {q_len} queries and {k_len} keys. Convert with max_length={k_len} or more."
            )
        real = inputs.token_mask
        rank = torch.arange(k_len, device=inputs.key.device)[None] if real is None else real_token_rank(real)
        sums = None
        if state is not None:
            rank = rank + state["count"][:, None]
            sums = {name: x for name, x in state.items() if name != "count"}
        output, sums = feature_map_attention(
            _with_rank(inputs.query, rank[:, k_len - q_len :]),
            _with_rank(inputs.key, rank),
            inputs.value,
            *self._maps(inputs.scaling),
            token_mask=real,
            is_causal=inputs.is_causal,
            state=sums,
            backend=self.backend,
        )
        if state is None or sums is None:
            return output.to(inputs.query.dtype), None
        count = state["count"] + (k_len if real is None else real.sum(-1))
        return output.to(inputs.query.dtype), {**sums, "count": count}

    def _maps(self, scaling: float) -> tuple[maps.SpelledMap, maps.SpelledMap]:
        """Of tokens with their rank as a last coordinate."""
        centers = (self.query_center, self.key_center) if self.config.variance_reducer else (None, None)
        # Without calibration all keys weigh the same.
        weighs = self.config.variance_reducer and not known_zero(self.query_mean)
        weights = maps.KeyWeights(scaling, self.query_mean) if weighs else maps.KeyWeights()

        def key_features(x: torch.Tensor) -> maps.Features:
            x, rank = x[..., :-1], x[..., -1:]
            features = self._features(x, rank, centers[1])
            return maps.weighted_by_mean_logit(features, x, self.query_mean, scaling) if weighs else features

        def spelled(center: torch.Tensor | None, weights: maps.KeyWeights) -> maps.Spelled:
            return maps.TokenMap("turned_relu", self._angle, center=center), weights

        of_queries, of_keys = partial(spelled, centers[0], maps.KeyWeights()), partial(spelled, centers[1], weights)
        q_map = maps.SpelledMap(lambda x: self._features(x[..., :-1], x[..., -1:], centers[0]), spelled=of_queries)
        return q_map, maps.SpelledMap(key_features, spelled=of_keys)

    def _features(self, x: torch.Tensor, rank: torch.Tensor, center: torch.Tensor | None) -> maps.Features:
        angle = rank * self._angle
        x = (x if center is None else x - center.to(x.dtype)[:, None]).relu()
        return torch.cat([x * angle.cos(), x * angle.sin()], -1), None  # [B, H, T, 2D]


def _with_rank(x: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """`x` with each token's rank `[B or 1, T]` as a last coordinate, in full precision: `[B, H, T, D + 1]`."""
    dtype = accumulation_dtype(x.dtype)
    return torch.cat([x, rank[:, None, :, None].to(dtype).expand(*x.shape[:-1], 1)], -1)
