"""Gated linear attention (GLA), arXiv:2312.06635: linear attention whose features are forgotten at gated rates.

S_i = diag(alpha_i) S_{i-1} + phi(k_i) v_i^T, z_i = alpha_i z_{i-1} + phi(k_i), o_i = phi(q_i) S_i / (phi(q_i) . z_i),
alpha_i = sigmoid(x_i W_1 W_2 + b)^(1/16) per feature, x the layer's input. GLA's own kernel, the identity, has no
such normalizer: o_i = scaling q_i S_i. Cost n f d; decode state f (d + 1) numbers a head, d^2 with the identity.
Only the attention of GLA: its output gate and norm would change what the checkpoint's next layer receives.

Encoders read in both directions by the same gates: the sums of a second scan, from the end, join S and z before the
quotient, each token's own key once (`ops.linear.both_ways`). ViG (arXiv:2405.18425), a GLA for images, reads in both
directions too, with gates of their own.

With calibration each head takes the decay (in b), and a mean query a that weights phi(k) by exp(scaling * a . k),
that bring it closest to softmax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.ops.features.maps import FeatureMap, ParametricMap, ScaledMap
from hf_linear_attn.ops.features.named import feature_width
from hf_linear_attn.ops.linear.attention import LogDecay, feature_map_attention, init_linear_state
from hf_linear_attn.ops.starts.calibration import (
    Row,
    choose_start,
    collect_rows,
    error_meter,
    head_tokens,
    reducer_starts,
)
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["GatedConfig", "GatedLinearAttention"]

INITS = ("undecayed", "published")
# What calibration tries as -log alpha: memories of 1 to 1024 tokens.
RATES = (1.0, 0.5, 2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-10)
TEMPERATURE = 16.0  # the root that keeps gates near 1, as published


@dataclass(frozen=True)
class GatedConfig(VariantConfig):
    """Options of `gated`.

    Attributes:
        feature_map: `"elu"` (elu + 1), `"relu"`, `"exp"`, `"softmax"`, `"squared_relu"` or a map of your own, all with
            a normalizer; or `"identity"`, GLA's kernel without one, whose outputs are on a scale of their own.
        gate_rank: width of the gate's low-rank map.
        init: start of the gates, `"undecayed"` (W_2 = 0 and a bias that keeps all but 1/160 over the position
            table's length) or `"published"` (W_2 random as linear layers are, b = 0: memories of about 23 tokens).
        variance_reducer: weight keys by a calibrated exp(scaling * a . k); without calibration, and with
            `"identity"`, a is 0.
    """

    feature_map: str = "elu"
    gate_rank: int = 16
    init: str = "undecayed"
    variance_reducer: bool = True

    def validate(self) -> None:
        self.require_feature_map("feature_map", "identity")
        self.require_width("gate_rank")
        self.require_choice("init", INITS)
        self.require_bool("variance_reducer")


@register_variant(
    "gated",
    config=GatedConfig,
    title="Gated linear attention (GLA)",
    paper="Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv:2312.06635",
    cost="n f d",
    guide=("recurrent", "much training: what is forgotten depends on the token"),
    state="constant",
    kernel="gated_linear_attention",
    kernel_sides=("decoder",),
    any_length=False,
    test_options=(
        {"init": "published", "gate_rank": 4},
        {"init": "published", "feature_map": "identity"},
    ),
)
class GatedLinearAttention(AttentionVariant):
    """Linear attention with data-dependent forgetting, of one layer.

    Parameters: `gate_down [r, hidden_size]` (W_1), `gate_up [H D, r]` (W_2), `gate_bias [H, D]` (b). Buffer with the
    variance reducer: `query_mean [H, D]`.
    """

    reads_groups = True
    query_mean: torch.Tensor

    def __init__(self, config: GatedConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        heads, dim = context.num_heads, context.head_dim
        self.normalized = config.feature_map != "identity"
        self.reduces = config.variance_reducer and self.normalized
        width = feature_width(config.feature_map, dim)
        if width != dim:
            raise ValueError(f"feature_map={config.feature_map!r} makes {width} features; allowed: {dim}, one a gate.")
        self.gate_down = nn.Parameter(torch.empty(config.gate_rank, context.hidden_size))
        self.gate_up = nn.Parameter(torch.empty(heads * dim, config.gate_rank))
        self.gate_bias = nn.Parameter(torch.empty(heads, dim))
        if self.reduces:
            self.register_buffer("query_mean", torch.empty(heads, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gates as `init` says, drawn from the layer's index; mean query 0."""
        generator = torch.Generator("cpu").manual_seed(self.context.layer_idx)
        for weight in (self.gate_down, self.gate_up):
            uniform = torch.rand(weight.shape, generator=generator, device="cpu") * 2 - 1
            weight.copy_(uniform * weight.shape[1] ** -0.5)
        self.gate_bias.zero_()
        if self.config.init == "undecayed":
            self.gate_up.zero_()
            self.gate_bias.fill_(math.log(10 * self.context.max_length))
        if self.reduces:
            self.query_mean.zero_()

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose bias and mean query in each head by its error against softmax on these inputs."""
        rows, scaling, is_causal = collect_rows(batches), batches[0].scaling, self.context.is_causal
        hidden = [dataclasses.replace(x, query=h, key=h, value=h) for x in batches for h in [_hidden(x)[:, None]]]
        hidden_of = {id(row): h[:, 0] for row, (h, _, _) in zip(rows, collect_rows(hidden), strict=True)}

        def attend(row: Row) -> torch.Tensor:
            given: dict[str, Any] = {"is_causal": is_causal, "scaling": scaling, "hidden_states": hidden_of[id(row)]}
            return self(AttentionInputs(*row, **given))[0]

        errors = error_meter(attend, rows, is_causal=is_causal, scaling=scaling)
        known = None
        if self.reduces:
            means = reducer_starts(*head_tokens(rows), centered=False)
            known = choose_start({"query_mean": self.query_mean}, [{"query_mean": a} for a, _, _ in means], errors)
        bias = self.gate_bias.clone()
        # sigmoid(b) = exp(-TEMPERATURE * rate)
        decayed = [torch.full_like(bias, -math.log(math.expm1(TEMPERATURE * rate))) for rate in RATES]
        # Or every other feature only: what all queries attend to, a first token say, then stays in the rest.
        every_other = torch.arange(bias.shape[1], device=bias.device) % 2 == 0
        starts = [bias, *decayed, *(torch.where(every_other, x, bias) for x in decayed)]
        choose_start({"gate_bias": self.gate_bias}, [{"gate_bias": x} for x in starts], errors, known)

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        heads, dim = self.context.num_heads, self.context.head_dim
        return init_linear_state(batch_size, heads, dim, dim, dtype, device, normalized=self.normalized)

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        output, state = feature_map_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            *self._maps(inputs.scaling),
            log_decay=self._log_decay(inputs),
            token_mask=inputs.token_mask,
            is_causal=inputs.is_causal,
            normalized=self.normalized,
            state=state,
            backend=self.backend,
        )
        return output.to(inputs.query.dtype), state

    def _log_decay(self, inputs: AttentionInputs) -> LogDecay:
        """log alpha, `[B, H, T, D]`."""
        dtype = accumulation_dtype(inputs.value.dtype)

        def gates(hidden: torch.Tensor, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            low = F.linear(hidden[:, 0], down.to(hidden.dtype)).to(dtype)
            gate = F.linear(low, up.to(dtype), bias.to(dtype).flatten()).unflatten(-1, bias.shape)
            return F.logsigmoid(gate).div_(TEMPERATURE).transpose(1, 2)

        return LogDecay(gates, _hidden(inputs)[:, None], (self.gate_down, self.gate_up, self.gate_bias))

    def _maps(self, scaling: float) -> tuple[FeatureMap, FeatureMap]:
        name, multiplier = self.config.feature_map, scaling**0.5
        if not self.normalized:
            return (ParametricMap(lambda x: (x.to(accumulation_dtype(x.dtype)) * multiplier, None)),) * 2
        mean = self.query_mean if self.reduces else None
        return ScaledMap(name, multiplier), ScaledMap(name, multiplier, mean, scaling)


def _hidden(inputs: AttentionInputs) -> torch.Tensor:
    hidden, length = inputs.hidden_states, inputs.key.shape[2]
    if hidden is None or hidden.shape[1] != length:
        given = "None" if hidden is None else f"those of {hidden.shape[1]}"
        raise ValueError(f"The gates of gated need the hidden states of all {length} keys, got {given}.")
    return hidden
