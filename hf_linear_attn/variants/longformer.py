"""Longformer (arXiv:2004.05150): a sliding window, optionally dilated, plus global tokens.

A local token i sees keys |i - j| <= d w/2, (i - j) mod d = 0 (causal: i - j in {0, d, .., (w-1) d}) and the
global tokens; a global token sees all tokens through projections of its own. Cost O(n w) per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_linear_attn.ops.base.compaction import compact, global_tokens, init_count, take_tokens, window_state_after
from hf_linear_attn.ops.base.text_pairs import GlobalChoice, tokens_of_task, tokens_with_ids
from hf_linear_attn.ops.window.attention import sliding_window_attention
from hf_linear_attn.ops.window.global_rows import check_hidden, check_marks, keep_old, rows_over_all, rows_over_first
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["LongformerAttention", "LongformerConfig"]


@dataclass(frozen=True)
class LongformerConfig(VariantConfig):
    """Options of `longformer`.

    Attributes:
        window_size: w in tokens (even on encoders, half on each side), or one per layer of the model.
        dilation: distance between neighboring keys of the window in tokens, or one per head.
        num_global_tokens: so many first real tokens are global unless the call names others; None means 1 on
            encoders and on decoders with rotary embeddings, 0 on other decoders. With 0, or rotary embeddings, the
            layer has no global projections and takes no global mask. With None, encoders under a head for question
            answering take the question's tokens instead, and under one for multiple choice the choice's.
        global_token_ids: encoders only: the tokens with these ids are global instead, unless the call names others.
    """

    window_size: int | tuple[int, ...] = 512
    dilation: int | tuple[int, ...] = 1
    num_global_tokens: int | None = None
    global_token_ids: int | tuple[int, ...] | None = None

    def validate(self) -> None:
        self.require_integer("window_size", each="layer")
        self.require_integer("dilation", each="head")
        self.require_integer("num_global_tokens", at_least=0, optional=True)
        self.require_integer("global_token_ids", at_least=0, optional=True, each="token that is global")
        if self.global_token_ids is not None and self.num_global_tokens is not None:
            raise ValueError(f"num_global_tokens={self.num_global_tokens}; allowed: None beside global_token_ids.")


@register_variant(
    "longformer",
    config=LongformerConfig,
    title="Longformer (window, dilation and global tokens)",
    paper="Longformer: The Long-Document Transformer, arXiv:2004.05150",
    cost="n w d",
    guide=("local-global", "long documents with tokens that stand for the whole; decoders that keep few keys"),
    state="window",
    kernel="block_sparse",
    exact_limit=lambda length, is_causal: {"window_size": length if is_causal else max(2, 2 * (length - 1))},
    uses_global_mask=True,
    test_options=(
        {"window_size": 8},
        {"window_size": 4, "dilation": 3, "num_global_tokens": 1},
        {"window_size": 2, "num_global_tokens": 0},
    ),
    masked_export=True,
)
class LongformerAttention(AttentionVariant):
    """Window and global attention of one layer.

    Position means rank among the real tokens, so padding may stand anywhere. The decode state holds the last
    (w - 1) d keys and values, the count of tokens and, with global tokens, their keys and values.

    Raises:
        ValueError: for an odd window or rotary global tokens on an encoder, or a list of the wrong length.
    """

    config: LongformerConfig

    def __init__(self, config: LongformerConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        window, dilation = config.window_size, config.dilation
        if isinstance(window, tuple) and len(window) != context.num_layers:
            raise ValueError(f"window_size names {len(window)} layers, the model has {context.num_layers}.")
        if isinstance(dilation, tuple) and len(dilation) != context.num_heads:
            raise ValueError(f"dilation names {len(dilation)} heads, the layer has {context.num_heads}.")
        self.window_size = window[context.layer_idx] if isinstance(window, tuple) else window
        if not context.is_causal and self.window_size % 2:
            raise ValueError(f"window_size must be even on an encoder (half on each side), got {self.window_size}.")
        g = config.num_global_tokens
        self.num_global_tokens = g if g is not None else int(context.is_causal == context.rotary)
        if self.num_global_tokens > 0 and context.rotary and not context.is_causal:
            raise ValueError(f"num_global_tokens={g}: global rows would lack the rotary embeddings. Allowed here: 0.")
        # A projection of hidden_states lacks the rotation; the first tokens of a decoder see none but each other.
        self.projects = self.num_global_tokens > 0 and not context.rotary
        if config.global_token_ids is not None and (context.is_causal or not self.projects):
            raise ValueError("global_token_ids serves encoders without rotary embeddings. Allowed here: None.")
        if self.projects:
            width = context.num_heads * context.head_dim
            self.query_global = nn.Linear(context.hidden_size, width)
            self.key_global = nn.Linear(context.hidden_size, width)
            self.value_global = nn.Linear(context.hidden_size, width)
        self.reset_parameters()

    def _projections(self) -> list[nn.Linear]:
        return [self.query_global, self.key_global, self.value_global] if self.projects else []

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # Drawn on the CPU by a generator of its own: the same start on every device, and after meta loading.
        generator = torch.Generator("cpu").manual_seed(self.context.layer_idx)
        for layer in self._projections():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, device="cpu") * 0.02)
            layer.bias.zero_()

    @torch.no_grad()
    def load_projections(
        self,
        query: tuple[torch.Tensor, torch.Tensor | None],
        key: tuple[torch.Tensor, torch.Tensor | None],
        value: tuple[torch.Tensor, torch.Tensor | None],
    ) -> None:
        for layer, (weight, bias) in zip(self._projections(), (query, key, value), strict=False):
            layer.weight.copy_(weight)
            layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)

    def global_choice(self, task: str | None) -> GlobalChoice | None:
        if self.config.global_token_ids is not None:
            return tokens_with_ids(self.config.global_token_ids)
        chosen = self.config.num_global_tokens is not None or self.context.is_causal or not self.projects
        return None if chosen else tokens_of_task(task)

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        def empty(length: int) -> torch.Tensor:
            shape = (batch_size, self.context.num_heads, length, self.context.head_dim)
            return torch.zeros(shape, dtype=dtype, device=device)

        dilation = self.config.dilation
        span = (self.window_size - 1) * (max(dilation) if isinstance(dilation, tuple) else dilation)
        state = {"key": empty(span), "value": empty(span)}
        state["count"] = init_count(batch_size, device)
        if self.num_global_tokens > 0:
            names = ("key", "value", "key_projected", "value_projected")[: 4 if self.projects else 2]
            state.update({f"global_{name}": empty(self.num_global_tokens) for name in names})
        return state

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        self._check(inputs, state)
        past = None if state is None else (state["key"], state["value"], state["count"])
        call = compact(inputs.query, inputs.key, inputs.value, inputs.token_mask, past)
        q_len, k_len = call.q.shape[2], call.k.shape[2]
        tokens = global_tokens(inputs.global_mask, self.num_global_tokens, call)
        in_window, extra, rows = call.real, None, None
        kept: State = {}
        if tokens is not None:
            in_window = tokens.in_window
            place = tokens.position.clamp(0, k_len - 1).expand(call.k.shape[0], -1)
            kept = {"global_key": take_tokens(call.k, place), "global_value": take_tokens(call.v, place)}
            kept = keep_old(kept, tokens, state)
            extra = kept["global_key"], kept["global_value"], tokens.seen_by(q_len, k_len, inputs.is_causal)
        if tokens is not None and self.projects and inputs.hidden_states is not None:
            given = call, tokens, inputs.hidden_states, self._projections(), inputs.scaling
            if inputs.is_causal and inputs.global_mask is None:
                rows, new = rows_over_first(*given, state)
                kept.update(new)
            else:
                rows = rows_over_all(*given, inputs.is_causal)
        w, d = self.window_size, self.config.dilation
        left, right = (w - 1, 0) if inputs.is_causal else (w // 2, w // 2)
        where: dict[str, Any] = {"left": left, "right": right, "dilation": d, "key_allowed": in_window, "extra": extra}
        out = sliding_window_attention(call.q, call.k, call.v, scaling=inputs.scaling, backend=self.backend, **where)
        if tokens is not None and rows is not None:
            out = tokens.place_rows(rows, out)
        out = call.restore(out)
        if state is None:
            return out, None
        kept = {name: x.to(state[name].dtype).contiguous() for name, x in kept.items()}
        return out, {**window_state_after(call, state["key"].shape[2], state["key"].dtype), **kept}

    def _check(self, inputs: AttentionInputs, state: State | None) -> None:
        (B, _, q_len, _), k_len = inputs.query.shape, inputs.key.shape[2]
        built, marked = self.context.is_causal, inputs.global_mask is not None
        if inputs.is_causal != built:
            raise ValueError(f"Layer built for is_causal={built}, called with {inputs.is_causal}.")
        if state is not None and not inputs.is_causal:
            raise ValueError("A decode state needs causal attention; this layer is bidirectional.")
        if state is not None and q_len != k_len:
            raise ValueError(f"With a decode state Tq must equal Tk (new tokens), got {q_len} and {k_len}.")
        check_marks(inputs.global_mask, B, q_len, self.projects, state is not None)
        if self.projects and inputs.hidden_states is None:
            raise ValueError("The global tokens of longformer need hidden_states, got None.")
        if self.projects:
            check_hidden(q_len, inputs.token_mask, k_len, self.num_global_tokens, marked)
