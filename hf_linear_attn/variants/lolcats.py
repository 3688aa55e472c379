"""LoLCATs, softmax over a window and linear attention over every other key in one normalizer, arXiv:2410.10254.

y_i = (sum_window g e^l_ij v_j + phi(q_i) S_i) / (sum_window g e^l_ij + phi(q_i) . z_i), l_ij the softmax logits, S_i
and z_i sums of phi(k) v^T and phi(k) over keys outside the window. Decode state: w keys and values, f (d + 1) sums.

The window's scale sets the balance with the tail. As published phi is Hedgehog's, relative to the largest term of the
window, and g = 0.1. `taylor`, and `centroids` once calibrated, estimate the logits themselves, with g = 1: e^{s q.k} =
e^{s (q-a).(k-c)} e^{s a.k} e^{s (q-a).c}, phi for the first factor, a the mean query and c the mean attended key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_linear_attn.ops.base.compaction import compact, init_count, window_state_after
from hf_linear_attn.ops.features import softmax_map as maps
from hf_linear_attn.ops.features.maps import FeatureMap, Features, ParametricMap, TaylorMap
from hf_linear_attn.ops.linear.attention import init_linear_state
from hf_linear_attn.ops.starts import calibration as measure
from hf_linear_attn.ops.starts.attention_rows import attended_share
from hf_linear_attn.ops.window.attention import sliding_window_attention
from hf_linear_attn.ops.window.tail import centered_features, window_tail_attention
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["LolcatsAttention", "LolcatsConfig"]

_TAILS = ("taylor", "hedgehog", "centroids", None)
_FACTOR_STEPS = (-0.5, 0.5, 1.0, 2.0, 4.0)  # of log g, tried by calibration; the last leaves little but the window


@dataclass(frozen=True)
class LolcatsConfig(VariantConfig):
    """Options of `lolcats`.

    Attributes:
        window_size: w in tokens (even on encoders, half on each side); None means 64, or an eighth of the longest
            input where that is less.
        tail: features of keys outside the window: `"hedgehog"` (as published), `"centroids"` (so too until calibrated)
            or `"taylor"` (order 2 on a projection); None means centroids on decoders, Taylor's on encoders.
        num_features: features of `centroids` and `hedgehog`, even; None means 2 head_dim.
        projection_size: channels that `taylor` projects q and k to, at most head_dim.
    """

    window_size: int | None = None
    tail: str | None = None
    num_features: int | None = None
    projection_size: int = 16

    def validate(self) -> None:
        self.require_choice("tail", _TAILS)
        self.require_integer("window_size", optional=True)
        self.require_width("num_features", optional=True)
        self.require_width("projection_size")
        if self.num_features is not None and self.num_features % 2:
            raise ValueError(f"num_features={self.num_features}; allowed: an even integer, or None.")


@register_variant(
    "lolcats",
    config=LolcatsConfig,
    title="LoLCATs (window softmax with a linear tail)",
    paper="LoLCATs: On Low-Rank Linearizing of Large Language Models, arXiv:2410.10254",
    cost="n (w+f) d",
    guide=("local-global", "decoders that stay close to their checkpoint and generate from a bounded state"),
    state="window",
    exact_limit=lambda length, is_causal: {"window_size": length if is_causal else max(2, 2 * (length - 1))},
    # An odd window is for decoders only.
    test_options=({"window_size": 8, "tail": "centroids"}, *({"window_size": 5, "tail": x} for x in _TAILS[1::-1])),
    masked_export=True,
)
class LolcatsAttention(AttentionVariant):
    """Window and tail of one layer.

    Parameters: `window_log_factor [H]` (log g); `query_center`, `key_center [H, D]` (a and c); `query_weight`,
    `key_weight [H, rows, D]`, and for `centroids` and `hedgehog` `query_bias`, `key_bias [H, rows]`. Buffer
    (persistent) of these two: `form [H]` (see `ops.features.softmax_map`).

    Raises:
        ValueError: for an odd window on an encoder.
    """

    query_weight: torch.Tensor
    query_center: torch.Tensor
    key_center: torch.Tensor
    form: torch.Tensor

    def __init__(self, config: LolcatsConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        heads, dim = context.num_heads, context.head_dim
        self.window_size = config.window_size or min(64, max(2, context.max_length // 16 * 2))
        if not context.is_causal and self.window_size % 2:
            raise ValueError(f"window_size={self.window_size}; allowed on an encoder: even, half on each side.")
        self.tail = config.tail or ("centroids" if context.is_causal else "taylor")
        self.taylor, self.has_tail = self.tail == "taylor", True
        rows = min(config.projection_size, dim) if self.taylor else config.num_features or 2 * dim
        self.num_features = 1 + rows + rows * (rows + 1) // 2 if self.taylor else rows
        self.window_log_factor = nn.Parameter(torch.empty(heads))
        for side in ("query", "key"):
            self.register_parameter(f"{side}_center", nn.Parameter(torch.empty(heads, dim)))
            self.register_parameter(f"{side}_weight", nn.Parameter(torch.empty(heads, rows, dim)))
            if not self.taylor:
                self.register_parameter(f"{side}_bias", nn.Parameter(torch.empty(heads, rows)))
        if not self.taylor:
            self.register_buffer("form", torch.empty(heads, dtype=torch.long))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Centers 0; W = [I; -I] and g = 0.1 as published, or for `taylor` the first channels and g = 1."""
        heads, rows, dim = self.query_weight.shape
        start = {"log": torch.zeros(heads, device="cpu"), "center": torch.zeros(heads, dim, device="cpu")}
        start["weight"], start["bias"] = maps.published_map(heads, rows, dim, self.context.layer_idx)
        if self.taylor:
            start["weight"] = torch.eye(rows, dim, device="cpu").expand(heads, -1, -1)
        else:
            start["log"] += math.log(0.1)
            self.form.fill_(maps.PUBLISHED)
        for name, parameter in self.named_parameters():
            parameter.copy_(start[name.split("_")[1]])

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose each head's tail, then its g, by its output error against softmax on these inputs."""
        rows, causal, scaling = measure.collect_rows(batches), self.context.is_causal, batches[0].scaling
        q, k = measure.head_tokens(rows)
        a, c = q.mean(1), (attended_share(rows, is_causal=causal, scaling=scaling)[..., None] * k).sum(1)
        q, k = q - a[:, None], k - c[:, None]
        starts: list[dict[str, torch.Tensor]] = [{}]
        if self.taylor:
            projections = zip(("query_weight", "key_weight"), measure.principal_maps(q, k), strict=True)
            starts = [{name: x[:, : self.query_weight.shape[1]] for name, x in projections}]
        elif self.tail == "centroids":
            starts = measure.centroid_starts(q, k, self.num_features, scaling)
        centers = {} if self.tail == "hedgehog" else {"query_center": a, "key_center": c}
        errors = self.error_meter(rows, scaling)
        present = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        starts = [{**start, **centers, "window_log_factor": torch.zeros_like(a[:, 0])} for start in starts]
        known = measure.choose_start(present, [{}, *starts], errors)
        steps = [{"window_log_factor": self.window_log_factor + step} for step in _FACTOR_STEPS]
        measure.choose_start({"window_log_factor": self.window_log_factor}, [{}, *steps], errors, known)

    def drop_linear_branch(self) -> bool:
        had, self.has_tail = self.has_tail, False
        return had

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        heads, dim = self.context.num_heads, self.context.head_dim
        shape = (batch_size, heads, self.window_size, dim)
        return {
            **{name: torch.zeros(shape, dtype=dtype, device=device) for name in ("key", "value")},
            "count": init_count(batch_size, device),
            **init_linear_state(batch_size, heads, self.num_features, dim, dtype, device),
        }

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        if inputs.is_causal != self.context.is_causal:
            raise ValueError(f"Layer built for is_causal={self.context.is_causal}, called with {inputs.is_causal}.")
        w, s = self.window_size, inputs.scaling
        past = None if state is None else (state["key"], state["value"], state["count"])
        call = compact(inputs.query, inputs.key, inputs.value, inputs.token_mask, past)
        real = call.real
        if real is not None:
            real = call.rank >= (call.past - w).clamp(min=0)[:, None]  # older keys have left for the sums
        sums = None if state is None else {name: state[name] for name in ("kv", "z", "log_scale")}
        left, right = (w - 1, 0) if inputs.is_causal else (w // 2, w // 2)
        band: dict[str, Any] = {"left": left, "right": right, "scaling": s, "backend": self.backend}
        if self.has_tail:
            tail = self._feature_map("query", s), self._feature_map("key", s)
            band |= {"is_causal": inputs.is_causal, "window_log_factor": self.window_log_factor}
            band |= {"relative": None if self.taylor else self.form == maps.PUBLISHED, "state": sums}
            output, sums = window_tail_attention(call.q, call.k, call.v, *tail, token_mask=real, **band)
        else:
            output = sliding_window_attention(call.q, call.k, call.v, key_allowed=real, **band)
        output = call.restore(output.to(inputs.query.dtype))
        if state is None or sums is None:
            return output, None
        return output, {**window_state_after(call, w, state["key"].dtype), **sums}

    def _feature_map(self, side: str, scaling: float) -> FeatureMap:
        function, names = partial(_project, scaling=scaling), ["weight"]
        if not self.taylor:
            exp_form = maps.KEY_CENTROIDS if side == "query" else maps.QUERY_CENTROIDS
            function, names = partial(maps.softmax_map, form=self.form, exp_form=exp_form), ["weight", "bias"]
        features = ParametricMap(function, tuple(getattr(self, f"{side}_{name}") for name in names))
        center, other = (getattr(self, f"{name}_center") for name in (side, "key" if side == "query" else "query"))
        centered = centered_features(features, center, other, scaling, raw=side == "key")
        return TaylorMap(centered) if self.taylor else centered


def _project(x: torch.Tensor, weight: torch.Tensor, *, scaling: float) -> Features:
    return x @ (weight.to(x.dtype).mT * scaling**0.5), None
