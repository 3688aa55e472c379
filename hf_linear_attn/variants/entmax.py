"""Entmax attention (arXiv:1905.05702; alpha learned per head: arXiv:1909.00015): weights that can be exactly 0.

    y_i = sum_j p_ij v_j,    p_i = (1 - lambda) softmax(z_i) + lambda entmax_alpha(z_i),    z_ij = scaling q_i . k_j

with one lambda a head, 0 at the start: the checkpoint, exactly. A weight is 0 only where lambda is 1: training raises
the least lambda to that, linearly over its first half (of a recipe, over half of its stages). alpha = 2 is sparsemax
(arXiv:1602.02068). Cost n^2 d, several times that of softmax: what it brings is sparsity, not speed. Queries go through
in chunks, so that inference holds the logits of one chunk only; training keeps them all, unless the layer is
checkpointed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_linear_attn.ops.base.compaction import CompactedCall, compact, init_kv_state, kv_state_after
from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.ops.exact.dense import Weights, attend_in_chunks, count_zeros, masked_softmax, row_logits
from hf_linear_attn.ops.exact.entmax import entmax
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["EntmaxAttention", "EntmaxConfig"]

FIXED_ALPHAS = {"sparsemax": 2.0, "entmax15": 1.5}


@dataclass(frozen=True)
class EntmaxConfig(VariantConfig):
    """Options of `entmax`.

    Attributes:
        alpha: `"sparsemax"` (alpha = 2), `"entmax15"` (1.5), or `"learned"`: alpha = 1 + sigmoid(a), one a per
            head, from 1.5.
        initial_lambda: share of entmax in every head at the start; 0 is softmax, 1 the published form.
        trained_lambda: the least lambda of every head at the end of training, which keeps it at most 1; None leaves
            lambda to the loss, which need not make any weight 0.
    """

    alpha: str = "entmax15"
    initial_lambda: float = 0.0
    trained_lambda: float | None = 1.0

    def validate(self) -> None:
        self.require_choice("alpha", (*FIXED_ALPHAS, "learned"))
        self.require_number("initial_lambda", at_least=0, at_most=1)
        self.require_number("trained_lambda", at_least=0, at_most=1, optional=True)


def _exact_limit(length: int, is_causal: bool) -> dict[str, Any]:
    return {"initial_lambda": 0.0}


@register_variant(
    "entmax",
    config=EntmaxConfig,
    title="Entmax (sparsemax, 1.5-entmax, learned alpha)",
    paper="Adaptively Sparse Transformers, arXiv:1909.00015",
    cost="n^2 d",
    guide=("content-based", "weights that are exactly 0, to read who attends to what; quadratic, for short inputs"),
    state="kv",
    exact_limit=_exact_limit,
    linear_cost=False,
    quadratic="always",
    test_options=(
        {"alpha": "learned", "initial_lambda": 0.5},
        {"alpha": "sparsemax", "initial_lambda": 1.0},
    ),
)
class EntmaxAttention(AttentionVariant):
    """A mixture of softmax and entmax.

    Parameters: `mixing [H]`, lambda, in training no less than its schedule says (`anneal`); with a learned alpha
    `alpha_logit [H]`, the a of alpha = 1 + sigmoid(a). The decode state holds all keys and values.
    """

    config: EntmaxConfig

    def __init__(self, config: EntmaxConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.mixing = nn.Parameter(torch.empty(context.num_heads))
        if config.alpha == "learned":
            self.alpha_logit = nn.Parameter(torch.empty(context.num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """lambda = `initial_lambda`, alpha = 1.5 where it is learned."""
        self.mixing.fill_(self.config.initial_lambda)
        if self.config.alpha == "learned":
            self.alpha_logit.zero_()

    @torch.no_grad()
    def anneal(self, share: float) -> None:
        if self.config.trained_lambda is not None and self.mixing.requires_grad:
            self.mixing.clamp_(min=share * self.config.trained_lambda, max=1.0)

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        return init_kv_state(batch_size, self.context.num_heads, self.context.head_dim, dtype, device)

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        past = None if state is None else (state["key"], state["value"], state["count"])
        call = compact(inputs.query, inputs.key, inputs.value, inputs.token_mask, past)
        weights = self._weights_of(call, inputs.scaling)
        output = call.restore(attend_in_chunks(call, weights, is_causal=inputs.is_causal))
        return output.to(inputs.query.dtype), None if state is None else kv_state_after(call)

    @torch.no_grad()
    def zero_weights(self, inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
        call = compact(inputs.query, inputs.key, inputs.value, inputs.token_mask)
        return count_zeros(call, self._weights_of(call, inputs.scaling), is_causal=inputs.is_causal)

    def _weights_of(self, call: CompactedCall, scaling: float) -> Weights:
        """The weights of a slice of a call's query rows, `[B, H, rows, Tk]`."""
        keys = call.k.to(accumulation_dtype(call.k.dtype)) * scaling
        alpha: float | torch.Tensor = (
            1 + self.alpha_logit.sigmoid()[:, None, None]
            if self.config.alpha == "learned"
            else FIXED_ALPHAS[self.config.alpha]
        )

        def weights(rows: slice, allowed: torch.Tensor) -> torch.Tensor:
            logits = row_logits(call.q[:, :, rows], keys)
            share = self.mixing[:, None, None]
            return (1 - share) * masked_softmax(logits, allowed) + share * entmax(logits, alpha, allowed)

        return weights
