"""Synthesizer (arXiv:2005.00743): attention logits made without comparing tokens.

    y = softmax(Z) V,   Z_ij = (W2 relu(W1 x_i + b1) + b2)_j   dense
                             = R_ij                             random
                             = (R1 R2^T)_ij                     factorized random, rank k
                             = scaling q_i . k_j + one of them  mixture, the logits summed

i, j are ranks among real tokens. Cost n^2 d in all forms: factorizing saves parameters only. What is synthetic starts
at 0, so a mixture is the checkpoint exactly and the others are uniform attention; with calibration the random forms
start from each head's mean softmax weight by distance, where that is closer. W1 starts as the query projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_linear_attn.ops.base.compaction import compact, init_kv_state, kv_state_after
from hf_linear_attn.ops.base.numerics import accumulation_dtype, full_precision
from hf_linear_attn.ops.exact.dense import attend_in_chunks, masked_softmax, row_logits
from hf_linear_attn.ops.starts.calibration import Row, choose_start, collect_rows
from hf_linear_attn.ops.starts.position_weights import low_rank_factors, position_log_weights
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["SynthesizerAttention", "SynthesizerConfig"]

COMPONENTS = ("dense", "random", "factorized_random")


@dataclass(frozen=True)
class SynthesizerConfig(VariantConfig):
    """Options of `synthesizer`.

    Attributes:
        form: `"dense"`, `"random"`, `"factorized_random"` or `"mixture"`.
        component: what the mixture adds to q . k: one of the three others. `"random"` holds a number per head for
            every pair of the model's positions.
        rank: k of the factorized form.
        seed: of the factor that does not start at 0.
    """

    form: str = "mixture"
    component: str = "factorized_random"
    rank: int = 8
    seed: int = 0

    def validate(self) -> None:
        self.require_choice("form", (*COMPONENTS, "mixture"))
        self.require_choice("component", COMPONENTS)
        self.require_width("rank")
        self.require_integer("seed", at_least=0)


def _exact_limit(length: int, is_causal: bool) -> dict[str, Any]:
    return {"form": "mixture"}


@register_variant(
    "synthesizer",
    config=SynthesizerConfig,
    title="Synthesizer (dense, random, factorized random, mixture)",
    paper="Synthesizer: Rethinking Self-Attention for Transformer Models, arXiv:2005.00743",
    cost="n^2 d",
    guide=("learned weights", "attention that compares no tokens; as a mixture it starts as the checkpoint"),
    state="kv",
    exact_limit=_exact_limit,
    linear_cost=False,
    quadratic="always",
    test_options=(
        {"form": "mixture", "component": "dense"},
        {"form": "random"},
        {"form": "factorized_random", "rank": 3},
    ),
)
class SynthesizerAttention(AttentionVariant):
    """Synthetic logits of one layer, n the model's `max_length`.

    Parameters: dense `hidden_weight [H D, hidden_size]`, `hidden_bias [H D]`, `output_weight [H, n, D]`,
    `output_bias [H, n]`; random `table [H, n, n]`; factorized `query_table`, `key_table [H, n, rank]`. The decode
    state holds all values, and all keys of a mixture.
    """

    config: SynthesizerConfig

    def __init__(self, config: SynthesizerConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.component = config.component if config.form == "mixture" else config.form
        self.width = context.head_dim if config.form == "mixture" else 0  # channels of q and k that are compared
        heads, dim, length = context.num_heads, context.head_dim, context.max_length
        if self.component == "dense":
            self.hidden_weight = nn.Parameter(torch.empty(heads * dim, context.hidden_size))
            self.hidden_bias = nn.Parameter(torch.empty(heads * dim))
            self.output_weight = nn.Parameter(torch.empty(heads, length, dim))
            self.output_bias = nn.Parameter(torch.empty(heads, length))
        elif self.component == "random":
            self.table = nn.Parameter(torch.empty(heads, length, length))
        else:
            self.query_table = nn.Parameter(torch.empty(heads, length, config.rank))
            self.key_table = nn.Parameter(torch.empty(heads, length, config.rank))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Synthetic logits 0, by one factor only: with both at 0 neither would learn."""
        for parameter in self.parameters():
            parameter.zero_()
        if self.component != "random":
            generator = self.context.generator(self.config.seed)
            factor = self.hidden_weight if self.component == "dense" else self.key_table
            factor.copy_(torch.randn(factor.shape, generator=generator, device="cpu") * factor.shape[-1] ** -0.5)

    @torch.no_grad()
    def load_projections(
        self,
        query: tuple[torch.Tensor, torch.Tensor | None],
        key: tuple[torch.Tensor, torch.Tensor | None],
        value: tuple[torch.Tensor, torch.Tensor | None],
    ) -> None:
        if self.component == "dense":
            self.hidden_weight.copy_(query[0])
            self.hidden_bias.copy_(torch.zeros_like(self.hidden_bias) if query[1] is None else query[1])

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Heads of a random form start from their mean weight by distance where that is closer to softmax."""
        if self.config.form not in ("random", "factorized_random"):
            return
        n, scaling = self.context.max_length, batches[0].scaling
        rows: list[Row] = [(q[:, :, :n], k[:, :, :n], v[:, :, :n]) for q, k, v in collect_rows(batches)]
        table = position_log_weights(rows, n, is_causal=self.context.is_causal, scaling=scaling)
        table = table - table.mean(-1, keepdim=True)  # a constant per row cancels
        factors = (table,) if self.config.form == "random" else low_rank_factors(table, self.config.rank)
        start = dict(zip(dict(self.named_parameters()), factors, strict=True))
        choose_start(dict(self.named_parameters()), [{}, start], self.error_meter(rows, scaling))

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        state = init_kv_state(batch_size, self.context.num_heads, self.context.head_dim, dtype, device)
        return {**state, "key": state["key"][..., : self.width]}

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        """See `AttentionVariant.forward`.

        Raises:
            ValueError: for more keys than `context.max_length`, or a dense component without hidden states.
        """
        query, past = inputs.query[..., : self.width], None
        if self.component == "dense":
            query = torch.cat([query, self._hidden_features(inputs)], -1)
        if state is not None:
            past = state["key"], state["value"], state["count"]
        call = compact(query, inputs.key[..., : self.width], inputs.value, inputs.token_mask, past)
        q_len, k_len, most = call.q.shape[2], call.k.shape[2], self.context.max_length
        if k_len > most:
            raise ValueError(
                f"Synthesizer was built for {most} tokens and got {k_len}. Convert with max_length={k_len}."
            )
        rank = call.rank.clamp(min=0)  # [B or 1, Tk]
        query, key = self._factors(call.q, call.k.to(accumulation_dtype(call.k.dtype)) * inputs.scaling, rank)

        def weights(rows: slice, allowed: torch.Tensor) -> torch.Tensor:
            logits = row_logits(query[:, :, rows], key)  # [B, H, rows, Tk]
            if self.component == "random":
                own = rank[:, k_len - q_len :][:, rows, None]
                logits = logits + self.table[:, own, rank[:, None]].transpose(0, 1).to(logits.dtype)
            return masked_softmax(logits, allowed)

        output = call.restore(attend_in_chunks(call, weights, is_causal=inputs.is_causal))
        return output.to(inputs.query.dtype), None if state is None else kv_state_after(call)

    def _hidden_features(self, inputs: AttentionInputs) -> torch.Tensor:
        """relu(W1 x + b1) and a 1 for b2, `[B, H, Tq, D + 1]`."""
        if inputs.hidden_states is None:
            raise ValueError("A dense synthesizer needs hidden_states, got None.")
        x = inputs.hidden_states.to(accumulation_dtype(inputs.hidden_states.dtype))
        if inputs.token_mask is not None:
            x = x.masked_fill(~inputs.token_mask[:, -x.shape[1] :, None], 0)
        with full_precision(x):
            hidden = F.linear(x, self.hidden_weight.to(x.dtype), self.hidden_bias.to(x.dtype)).relu()
        hidden = hidden.unflatten(-1, (self.context.num_heads, self.context.head_dim)).transpose(1, 2)
        return F.pad(hidden, (0, 1), value=1)

    def _factors(self, q: torch.Tensor, k: torch.Tensor, rank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, in the keys' dtype, with the factors of the synthetic logits as further channels."""
        q = q.to(k.dtype)
        if self.component == "random":
            return q, k
        if self.component == "dense":
            table = torch.cat([self.output_weight, self.output_bias[..., None]], -1)
        else:
            table = self.key_table
            own = self.query_table[:, rank[:, rank.shape[1] - q.shape[2] :]].transpose(0, 1).to(k.dtype)
            q = torch.cat([q, own.expand(q.shape[0], -1, -1, -1)], -1)
        synthetic = table[:, rank].transpose(0, 1).to(k.dtype)
        return q, torch.cat([k, synthetic.expand(k.shape[0], -1, -1, -1)], -1)
