"""Hedgehog, linear attention through learned softmax features, arXiv:2402.04347.

phi(x) = [softmax(W x + b), softmax(-(W x + b))] over features, separate for q and k, learned per head; start W = I,
b = 0. The rows of the second half are parameters of their own here. Cost n 2d d; decode state 2d (d + 1) numbers a
head. Train it as the paper does: first the maps alone on `regression_loss`, then the model.

With calibration a head starts from centroids C: of its keys, phi(q) = softmax(s C q), phi(k) = softmax(-b |k - C|^2),
or of its queries, phi(q) = softmax(-b |q - C|^2), phi(k) = exp(s C (k - c)), c the mean of the attended keys. All are
maps W x + b under another normalizer; each head keeps what lowers its output error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from hf_linear_attn.ops.features import softmax_map as maps
from hf_linear_attn.ops.features.maps import KeyWeights, Spelled, SpelledMap, TokenMap
from hf_linear_attn.ops.starts import calibration as measure
from hf_linear_attn.ops.starts.attention_rows import attended_share, attention_cross_entropy
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, FeatureMapVariant, LayerContext, VariantConfig

__all__ = ["HedgehogAttention", "HedgehogConfig"]


@dataclass(frozen=True)
class HedgehogConfig(VariantConfig):
    """Options of `hedgehog`.

    Attributes:
        num_features: features of each head, even; None means 2 head_dim, as published.
    """

    num_features: int | None = None

    def validate(self) -> None:
        self.require_width("num_features", at_least=2, optional=True)
        if self.num_features is not None and self.num_features % 2:
            raise ValueError(f"num_features={self.num_features}; allowed: an even integer, or None.")


@register_variant(
    "hedgehog",
    config=HedgehogConfig,
    title="Hedgehog",
    paper="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry, arXiv:2402.04347",
    cost="n 2d d",
    guide=("kernel", "decoders distilled from their checkpoint that generate from a constant state"),
    state="constant",
    kernel="linear_attention",
    test_options=({"num_features": 48},),
)
class HedgehogAttention(FeatureMapVariant):
    """Attention through learned softmax features.

    Parameters: `query_weight`, `key_weight [H, F, D]`, `query_bias`, `key_bias [H, F]`. Buffer (persistent): `form
    [H]`, how each head's features are normalized (see `ops.features.softmax_map`).
    """

    reads_groups = True
    form: torch.Tensor

    def __init__(self, config: HedgehogConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        heads, dim = context.num_heads, context.head_dim
        self.num_features = config.num_features or 2 * dim
        self.query_weight = nn.Parameter(torch.empty(heads, self.num_features, dim))
        self.query_bias = nn.Parameter(torch.empty(heads, self.num_features))
        self.key_weight = nn.Parameter(torch.empty(heads, self.num_features, dim))
        self.key_bias = nn.Parameter(torch.empty(heads, self.num_features))
        self.register_buffer("form", torch.empty(heads, dtype=torch.long))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published form: W = [I; -I]."""
        heads, dim = self.context.num_heads, self.context.head_dim
        weight, bias = maps.published_map(heads, self.num_features, dim, self.context.layer_idx)
        for side in (self.query_weight, self.key_weight):
            side.copy_(weight)
        for side in (self.query_bias, self.key_bias):
            side.copy_(bias)
        self.form.fill_(maps.PUBLISHED)

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose each head's start by its output error against softmax on these inputs."""
        causal, scaling = self.context.is_causal, batches[0].scaling
        rows = measure.collect_rows(batches)
        q, k = measure.head_tokens(rows)
        share = attended_share(rows, is_causal=causal, scaling=scaling)
        center = (share[..., None] * k).sum(1)  # the mean attended key
        starts = measure.centroid_starts(q, k - center[:, None], self.num_features, scaling)
        for start in starts:
            start["key_bias"] = start["key_bias"] - (start["key_weight"] @ center[..., None])[..., 0]

        def attend(row: measure.Row) -> torch.Tensor:
            return self(AttentionInputs(*row, is_causal=causal, scaling=scaling))[0]

        errors = measure.error_meter(attend, rows, is_causal=causal, scaling=scaling)
        present = {**dict(self.named_parameters()), "form": self.form}
        measure.choose_start(present, [{}, *starts], errors)

    def regression_loss(self, inputs: AttentionInputs, target: torch.Tensor) -> torch.Tensor:
        """Stage 1 of the paper: cross-entropy between softmax's and these attention weights, on sampled queries."""
        return attention_cross_entropy(
            inputs.query,
            inputs.key,
            *self.feature_maps(inputs.scaling),
            token_mask=inputs.token_mask,
            is_causal=inputs.is_causal,
            scaling=inputs.scaling,
        )

    def feature_maps(self, scaling: float) -> tuple[SpelledMap, SpelledMap]:
        queries = self.query_weight, self.query_bias, maps.KEY_CENTROIDS
        return self._map(*queries), self._map(self.key_weight, self.key_bias, maps.QUERY_CENTROIDS)

    def _map(self, weight: torch.Tensor, bias: torch.Tensor, exp_form: int) -> SpelledMap:
        def spelled() -> Spelled:
            return TokenMap(
                "projected_softmax", weight=weight.mT, bias=bias, form=self.form, exp_form=exp_form
            ), KeyWeights()

        function = partial(maps.softmax_map, form=self.form, exp_form=exp_form)
        return SpelledMap(function, (weight, bias), spelled=spelled)
