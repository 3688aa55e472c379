"""Retention (RetNet), arXiv:2307.08621: linear attention whose memory decays by gamma per token and head.

S_i = gamma S_{i-1} + phi(k_i) v_i^T, z_i = gamma z_{i-1} + phi(k_i), o_i = phi(q_i) S_i / (phi(q_i) . z_i).
RetNet's own kernel, the identity, has no such normalizer: o_i = scaling q_i S_i. Cost n f d; decode state
f (d + 1) numbers a head, d^2 with the identity. gamma = 1 is the linear transformer.

Encoders read in both directions, weights gamma^|i - j|: the sums of a second scan, from the end, join S and z before
the quotient, each token's own key once (`ops.linear.both_ways`), as bidirectional RetNets for images do (RMT,
arXiv:2309.11523).

With calibration each head takes the decay, and a mean query a that weights phi(k) by exp(scaling * a . k), that
bring it closest to softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_linear_attn.ops.base.memo import known_zero
from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.ops.features.maps import FeatureMap, ScaledMap
from hf_linear_attn.ops.features.named import feature_width
from hf_linear_attn.ops.linear.attention import feature_map_attention, init_linear_state
from hf_linear_attn.ops.starts.calibration import choose_start, collect_rows, head_tokens, reducer_starts
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["RetentionAttention", "RetentionConfig"]

INITS = ("undecayed", "published")
# What calibration tries as -log gamma: memories of 1 to 1024 tokens.
RATES = (1.0, 0.5, 2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-10)
# The start of a learned decay: gamma is 1 in float64, and |x| has a slope here that it lacks at 0.
UNDECAYED = 1e-18


@dataclass(frozen=True)
class RetentionConfig(VariantConfig):
    """Options of `retention`.

    Attributes:
        feature_map: `"elu"` (elu + 1), `"relu"`, `"exp"`, `"softmax"`, `"squared_relu"` or a map of your own
            (`register_feature_map`), all with a normalizer, or `"identity"`, RetNet's kernel without one: its
            outputs are on a scale of their own.
        init: start of the decays, `"undecayed"` (gamma = 1) or `"published"` (gamma = 1 - 2^(-5-h) in head h).
        learnable: whether decays are parameters, and calibrated; False keeps them as `init` sets them.
        variance_reducer: weight keys by a calibrated exp(scaling * a . k); without calibration, and with
            `"identity"`, a is 0.
    """

    feature_map: str = "elu"
    init: str = "undecayed"
    learnable: bool = True
    variance_reducer: bool = True

    def validate(self) -> None:
        self.require_feature_map("feature_map", "identity")
        self.require_choice("init", INITS)
        self.require_bool("learnable", "variance_reducer")


@register_variant(
    "retention",
    config=RetentionConfig,
    title="Retention (RetNet)",
    paper="Retentive Network: A Successor to Transformer for Large Language Models, arXiv:2307.08621",
    cost="n f d",
    guide=("recurrent", "much training: weights fall by a fixed rate in each head"),
    state="constant",
    kernel="linear_attention",
    kernel_sides=("decoder",),
    any_length=False,
    test_options=(
        {"init": "published", "learnable": False},
        {"init": "published", "feature_map": "identity"},
    ),
)
class RetentionAttention(AttentionVariant):
    """Decayed linear attention of one layer.

    `decay_rate [H]`, -log gamma (its absolute value counts), is a parameter if learnable, else a buffer;
    `query_mean [H, D]` a buffer with the variance reducer.
    """

    reads_groups = True
    decay_rate: torch.Tensor
    query_mean: torch.Tensor

    def __init__(self, config: RetentionConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.normalized = config.feature_map != "identity"
        self.reduces = config.variance_reducer and self.normalized
        self.num_features = feature_width(config.feature_map, context.head_dim)
        if config.learnable:
            self.decay_rate = nn.Parameter(torch.empty(context.num_heads))
        else:
            self.register_buffer("decay_rate", torch.empty(context.num_heads))
        if self.reduces:
            self.register_buffer("query_mean", torch.empty(context.num_heads, context.head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decays as `init` says; mean query 0."""
        if self.config.init == "published":
            head = torch.arange(self.context.num_heads, dtype=torch.float64, device="cpu")
            self.decay_rate.copy_(-torch.log1p(-torch.exp2(-5 - head)))
        else:
            self.decay_rate.fill_(UNDECAYED if self.config.learnable else 0.0)
        if self.reduces:
            self.query_mean.zero_()

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose decay and mean query in each head by its error against softmax on these inputs."""
        rows, scaling = collect_rows(batches), batches[0].scaling
        present, errors, known = dict(self.state_dict(keep_vars=True)), self.error_meter(rows, scaling), None
        if self.reduces:
            means = reducer_starts(*head_tokens(rows), centered=False)
            known = choose_start(present, [{"query_mean": a} for a, _, _ in means], errors)
        if self.config.learnable:
            rates = [self.decay_rate.clone(), *(torch.full_like(self.decay_rate, rate) for rate in RATES)]
            choose_start(present, [{"decay_rate": x} for x in rates], errors, known)

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        heads, dim = self.context.num_heads, self.context.head_dim
        return init_linear_state(batch_size, heads, self.num_features, dim, dtype, device, normalized=self.normalized)

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        (batch, heads), length = inputs.query.shape[:2], inputs.key.shape[2]
        dtype = accumulation_dtype(inputs.value.dtype)
        log_decay = -self.decay_rate.to(dtype).abs()[:, None].expand(batch, heads, length)
        output, state = feature_map_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            *self._maps(inputs.scaling),
            log_decay=log_decay,
            token_mask=inputs.token_mask,
            is_causal=inputs.is_causal,
            normalized=self.normalized,
            state=state,
            backend=self.backend,
        )
        return output.to(inputs.query.dtype), state

    def _maps(self, scaling: float) -> tuple[FeatureMap, FeatureMap]:
        if not self.normalized:
            return lambda x: (x.to(accumulation_dtype(x.dtype)) * scaling, None), lambda x: (x, None)
        # Where it is all 0, as without calibration, all keys weigh the same: no weight is computed.
        query_mean = self.query_mean if self.reduces and not known_zero(self.query_mean) else None
        name, scale = self.config.feature_map, scaling**0.5
        return ScaledMap(name, scale), ScaledMap(name, scale, query_mean, scaling)
