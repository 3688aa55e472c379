"""Random Feature Attention, arXiv:2103.02143.

Softmax of normalized queries and keys at a temperature, exp(x.y / tau^2) for x = q / |q|, y = k / |k|, through random
features of W x, W = omega sigma / tau with Gaussian omega and learned sigma: `arccos` relu(W x), a kernel of its own;
`sincos` [cos W x, sin W x] / sqrt(m); `positive` exp(W x - |sigma x|^2 / 2 tau^2) / sqrt(m), which both estimate it.
There may be a gate g = sigmoid(w . x + b) of each token and head: S <- g S + (1 - g) phi(k) v^T, z likewise; with it
encoders read in both directions, the sums joined before the quotient, own keys once (`ops.linear.both_ways`).
Cost n m d; decode state f (d + 1) numbers a head, f = m, or 2m for `sincos`.

With calibration tau^2 = 1 / (scaling E|q||k|), the scale of the checkpoint's logits, or a multiple of it; keys are
weighted by exp(scaling * a . k), a the head's mean query or a part of it, and queries and keys may be centered
before they are normalized. Each head keeps what lowers its output error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.ops.features import maps
from hf_linear_attn.ops.linear.attention import feature_map_attention, init_linear_state
from hf_linear_attn.ops.starts import calibration as measure
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["RFAAttention", "RFAConfig"]

_MEANS = ("query_mean", "query_center", "key_center")
# Multiples of the calibrated tau to try: flatter kernels vary less. arccos is homogeneous, its width is no choice.
_WIDTHS = {"arccos": (1.0,), "sincos": (2.0, 3.0), "positive": (1.0, 1.5, 2.0)}


@dataclass(frozen=True)
class RFAConfig(VariantConfig):
    """Options of `rfa`.

    Attributes:
        kernel: random features, `"arccos"`, `"sincos"` (of both signs: for small logits only) or `"positive"`.
        num_features: random directions m; `sincos` makes two features of each.
        gate: forget with a learned gate.
        variance_reducer: use the calibrated key weights and centers; without calibration they change nothing.
        seed: of the directions, which are saved with the model.
    """

    kernel: str = "arccos"
    num_features: int = 128
    gate: bool = False
    variance_reducer: bool = True
    seed: int = 0
    draws_features = True

    def validate(self) -> None:
        self.require_choice("kernel", _WIDTHS)
        self.require_width("num_features")
        self.require_integer("seed", at_least=0)
        self.require_bool("gate", "variance_reducer")


@register_variant(
    "rfa",
    config=RFAConfig,
    title="Random Feature Attention",
    paper="Random Feature Attention, arXiv:2103.02143",
    cost="n m d",
    guide=("kernel", "random features of one of several kernels; with its gate, a state that forgets"),
    state="constant",
    kernel="linear_attention",
    not_exported="gate=True, whose sums go from chunk to chunk",
    test_options=({"kernel": "positive", "num_features": 24, "gate": True}, {"variance_reducer": False}),
)
class RFAAttention(AttentionVariant):
    """Attention through random features of normalized queries and keys.

    Parameters: `sigma [H, D]`; with the gate `gate_weight [H, hidden_size]` and `gate_bias [H]`. Buffers (persistent):
    `omega [m, D]`, `tau [H]`; with the variance reducer `query_mean`, `query_center`, `key_center [H, D]`.
    """

    reads_groups = True
    omega: torch.Tensor
    tau: torch.Tensor

    def __init__(self, config: RFAConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        heads, dim = context.num_heads, context.head_dim
        self.sigma = nn.Parameter(torch.empty(heads, dim))
        if config.gate:
            self.gate_weight = nn.Parameter(torch.empty(heads, context.hidden_size))
            self.gate_bias = nn.Parameter(torch.empty(heads))
        self.register_buffer("omega", torch.empty(config.num_features, dim))
        self.register_buffer("tau", torch.empty(heads))
        for name in _MEANS if config.variance_reducer else ():
            self.register_buffer(name, torch.empty(heads, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """sigma = tau = 1, directions drawn from (seed, layer_idx); gates that keep a token for 10 x max_length."""
        for name, x in self.state_dict().items():
            x.fill_(name in ("sigma", "tau"))
        self.redraw(self.config.seed)
        if self.config.gate:
            self.gate_bias.fill_(math.log(10 * self.context.max_length))

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """New `omega`; sigma, tau, centers, key weights and gates stay."""
        self.omega.copy_(maps.gaussian_orthogonal(len(self.omega), self.context.head_dim, self.context.generator(seed)))

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose each head's start by its error, without gates; warn when denominators are not positive."""
        rows, scaling = measure.collect_rows(batches), batches[0].scaling
        (q, k), present = measure.head_tokens(rows), {n: x for n, x in self.named_buffers() if n != "omega"}
        starts = [{name: x.clone() for name, x in present.items()}]
        for means in measure.reducer_starts(q, k) if self.config.variance_reducer else [(0 * q[:, 0],) * 3]:
            norms = [(x - center[:, None]).norm(dim=-1).mean(1) for x, center in zip((q, k), means[1:], strict=True)]
            tau = (scaling * norms[0] * norms[1]).clamp(min=1e-6).rsqrt()
            start = {name: x for name, x in zip(_MEANS, means, strict=True) if name in present}
            starts += [{**start, "tau": width * tau} for width in _WIDTHS[self.config.kernel]]

        def attend(row: measure.Row) -> torch.Tensor:
            return self._attend(AttentionInputs(*row, is_causal=self.context.is_causal, scaling=scaling), None, None)[0]

        q_map, k_map = self._map(False, scaling), self._map(True, scaling)
        meter = measure.error_meter(attend, rows, is_causal=self.context.is_causal, scaling=scaling)
        measure.choose_start(present, starts, meter)
        measure.warn_of_nonpositive(
            *(f"rfa, layer {self.context.layer_idx}", f"kernel={self.config.kernel!r}"),
            ((q_map(q)[0], *k_map(k)) for q, k, _ in rows),
            is_causal=self.context.is_causal,
            advice="Use another kernel or more features.",
        )

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        num_features = self.config.num_features * (2 if self.config.kernel == "sincos" else 1)
        given = batch_size, self.context.num_heads, num_features, self.context.head_dim
        return init_linear_state(*given, dtype, device)

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        output, state = self._attend(inputs, state, self._gate_logits(inputs) if self.config.gate else None)
        return output.to(inputs.query.dtype), state

    def _attend(
        self, inputs: AttentionInputs, state: State | None, gate: torch.Tensor | None
    ) -> tuple[torch.Tensor, State | None]:
        q_map, k_map = self._map(False, inputs.scaling), self._map(True, inputs.scaling)
        return feature_map_attention(
            *(inputs.query, inputs.key, inputs.value, q_map, k_map),
            log_decay=None if gate is None else F.logsigmoid(gate),
            key_log_weight=None if gate is None else F.logsigmoid(-gate),
            token_mask=inputs.token_mask,
            is_causal=inputs.is_causal,
            state=state,
            backend=self.backend,
        )

    def _map(self, is_key: bool, scaling: float) -> maps.ParametricMap:
        features = partial(self._features, is_key=is_key, scaling=scaling)
        if self.config.kernel != "arccos":
            return maps.ParametricMap(features, (self.sigma,))
        return maps.SpelledMap(features, (self.sigma,), spelled=partial(self._spelled, is_key, scaling))

    def _spelled(self, is_key: bool, scaling: float) -> maps.Spelled:
        """The map of a side in tensors; directions in float32."""
        weight = self.omega.mT * (self.sigma.float() / self.tau[:, None])[..., None]  # [H, D, m]
        means = dict(self.named_buffers())
        token_map = maps.TokenMap("projected_relu", 1.0, weight, means.get(_MEANS[1 + is_key]), normalized=True)
        return token_map, maps.KeyWeights(scaling, means.get("query_mean") if is_key else None)

    def _features(self, x: torch.Tensor, sigma: torch.Tensor, *, is_key: bool, scaling: float) -> maps.Features:
        given, x = x, x.to(accumulation_dtype(x.dtype))
        if self.config.variance_reducer:
            x = x - self.get_buffer(_MEANS[1 + is_key]).to(x.dtype)[:, None]
        x = F.normalize(x, dim=-1) * (sigma / self.tau[:, None]).to(x.dtype)[:, None]
        projected = x @ self.omega.to(x.dtype).mT  # [B, H, T, m]
        if self.config.kernel == "positive" and not is_key:
            features: maps.Features = maps.query_random_features(projected, "positive"), None
        elif self.config.kernel == "positive":
            features = maps.key_random_features(projected, x, 1.0, "positive")
        else:
            features = maps.fourier_features(projected) if self.config.kernel == "sincos" else projected.relu(), None
        if is_key and self.config.variance_reducer:
            features = maps.weighted_by_mean_logit(features, given, self.get_buffer("query_mean"), scaling)
        return features

    def _gate_logits(self, inputs: AttentionInputs) -> torch.Tensor:
        hidden = inputs.hidden_states
        if hidden is None or hidden.shape[1] != inputs.key.shape[2]:
            raise ValueError(f"The gate of rfa needs the hidden states of all {inputs.key.shape[2]} keys of the call.")
        if inputs.token_mask is not None:
            hidden = hidden.masked_fill(~inputs.token_mask[..., None], 0)
        dtype = accumulation_dtype(inputs.value.dtype)
        return (F.linear(hidden, self.gate_weight.to(hidden.dtype)).to(dtype) + self.gate_bias.to(dtype)).mT
