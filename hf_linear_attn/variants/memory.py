"""Linear-memory attention: chunked (arXiv:2112.05682), infini (arXiv:2404.07143), transformer_xl (arXiv:1901.02860).

`chunked`: softmax attention itself, in chunks with a running maximum and sum. n^2 d time, O(sqrt n) memory.
`infini`: causal softmax within segments of s tokens, mixed by a gate per head with linear attention over all
finished segments: g phi(q_i) M / (phi(q_i) . z) + (1 - g) local_i, M = sum phi(k) v^T, z = sum phi(k), phi = elu + 1,
g = sigmoid(beta), beta = -8 at start; no gate in the first segment, whose memory is empty. Of encoders a token sees all
of its segment, and M holds all other segments, before and behind (own). Cost n (s + d) d; decode state
2 d (d + 1) + 2 s d. With calibration phi(k) is weighted by exp(scaling * a . k), a the head's mean query or a
part of it: memory then keeps what all queries attend to, and gates open where that helps.
`transformer_xl`: causal softmax within segments and over the m tokens before them, without a gradient through these;
of encoders over all of the segment and the m tokens on either side (own). Cost n (s + m) d; decode state
2 (s + m) d. Positions stay the model's: absolute ones go on to the end of its table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_linear_attn.ops.base.compaction import CompactedCall, compact, init_kv_state, kv_state_after, window_state_after
from hf_linear_attn.ops.base.numerics import accumulation_dtype
from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.ops.exact.chunked import chunked_softmax_attention
from hf_linear_attn.ops.exact.segments import gated_memory, segment_attention, segment_layout
from hf_linear_attn.ops.starts.calibration import choose_start, collect_rows, head_tokens, reducer_starts
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["MemoryAttention", "MemoryConfig"]

FORMS = ("chunked", "infini", "transformer_xl")
GATE = -8.0  # beta at start: .03% memory
GATES = (-3.0, -1.5, 0.0, 1.5)  # what calibration tries besides


@dataclass(frozen=True)
class MemoryConfig(VariantConfig):
    """Options of `memory`.

    Attributes:
        form: `"chunked"` (exact), `"infini"` or `"transformer_xl"`.
        segment_size: real tokens per segment of the two memories.
        mem_length: tokens before its segment, of encoders also behind it, that a query of `"transformer_xl"` sees.
        chunk_size: tokens per chunk of `"chunked"`; None takes sqrt(n), at least 256.
        variance_reducer: weight the keys in memory of `"infini"` by a calibrated exp(scaling a . k); without
            calibration a is 0.
    """

    form: str = "chunked"
    segment_size: int = 512
    mem_length: int = 512
    chunk_size: int | None = None
    variance_reducer: bool = True

    def validate(self) -> None:
        self.require_choice("form", FORMS)
        self.require_integer("segment_size")
        self.require_integer("mem_length", at_least=0)
        self.require_integer("chunk_size", optional=True)
        self.require_bool("variance_reducer")


@register_variant(
    "memory",
    config=MemoryConfig,
    title="Linear-memory attention (exact chunked, Infini, Transformer-XL)",
    paper=(
        "Self-attention Does Not Need O(n^2) Memory, arXiv:2112.05682; Infini-attention, arXiv:2404.07143; "
        "Transformer-XL, arXiv:1901.02860"
    ),
    cost="n^2 d (chunked), n (s+d) d (infini), n (s+m) d (transformer_xl)",
    guide=("recurrent", "softmax itself in little memory; its other forms carry segments along"),
    state="kv",
    exact_limit=lambda length, is_causal: {"form": "chunked"},
    test_options=(
        {"form": "infini", "segment_size": 8},
        {"form": "transformer_xl", "segment_size": 8, "mem_length": 12},
    ),
    linear_cost=lambda config: config.form != "chunked",
    quadratic="form='chunked', the default: n^2 time, though never n x n memory",
    not_exported="form='infini' and form='transformer_xl', whose segments are as many as the length has",
)
class MemoryAttention(AttentionVariant):
    """Attention of one layer whose memory is linear in n, or constant while decoding.

    Of `infini`: parameter `beta [H]`; with the reducer buffers `query_mean [H, D]` and `key_peak [H]`, the log of the
    largest key weight in calibration. Decode state: all keys and values (`chunked`), or the last ones that the
    segment in progress needs, their count and, for `infini`, the sums over the finished segments (`memory`) and over
    the one in progress (`pending`), `[B, H, D, D + 1]` each.
    """

    config: MemoryConfig
    query_mean: torch.Tensor
    key_peak: torch.Tensor

    def __init__(self, config: MemoryConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        if config.form == "infini":
            self.beta = nn.Parameter(torch.empty(context.num_heads))
        self.reduces = config.form == "infini" and config.variance_reducer
        if self.reduces:
            self.register_buffer("query_mean", torch.empty(context.num_heads, context.head_dim))
            self.register_buffer("key_peak", torch.empty(context.num_heads))
        self.mem_length = config.mem_length if config.form == "transformer_xl" else 0
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.config.form == "infini":
            self.beta.fill_(GATE)
        if self.reduces:
            self.query_mean.zero_()
            self.key_peak.zero_()

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose gate and mean query in the heads that memory brings closer to softmax on these inputs."""
        if self.config.form != "infini":
            return
        rows, scaling = collect_rows(batches), batches[0].scaling
        starts = [{"beta": torch.full_like(self.beta, beta)} for beta in (GATE, *GATES)]
        if self.reduces:
            q, k = head_tokens(rows)
            means = [a for a, _, _ in reducer_starts(q, k, centered=False)]
            reducers = [{"query_mean": a, "key_peak": scaling * (k @ a[..., None]).amax((1, 2))} for a in means]
            starts = [{**gate, **reducer} for reducer in reducers for gate in starts]
        choose_start(dict(self.state_dict(keep_vars=True)), starts, self.error_meter(rows, scaling))

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        heads, dim = self.context.num_heads, self.context.head_dim
        state = init_kv_state(batch_size, heads, dim, dtype, device)
        if self.config.form == "chunked":
            return state
        window = (batch_size, heads, self.config.segment_size - 1 + self.mem_length, dim)
        state.update({name: torch.zeros(window, dtype=dtype, device=device) for name in ("key", "value")})
        if self.config.form == "infini":
            sums, dtype = (batch_size, heads, dim, dim + 1), accumulation_dtype(dtype)
            state.update({name: torch.zeros(sums, dtype=dtype, device=device) for name in ("memory", "pending")})
        return state

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        self._check(inputs, state)
        query, q_len = inputs.query, inputs.query.shape[2]
        missing = inputs.key.shape[2] - q_len
        if self.config.form != "chunked" and missing:  # the layout of segments is one of queries with their keys
            query = F.pad(query, (0, 0, missing, 0))
        past = None if state is None else (state["key"], state["value"], state["count"])
        call = compact(query, inputs.key, inputs.value, inputs.token_mask, past)
        if self.config.form == "chunked":
            given: dict[str, Any] = {"is_causal": inputs.is_causal, "chunk_size": self.config.chunk_size}
            out = chunked_softmax_attention(
                call.q, call.k, call.v, scaling=inputs.scaling, token_mask=call.real, **given
            )
            after = kv_state_after(call)
        else:
            out, after = self._memory(inputs, call, state)
        out = call.restore(out)[:, :, -q_len:].to(inputs.query.dtype)
        return out, None if state is None else after

    def _check(self, inputs: AttentionInputs, state: State | None) -> None:
        q_len, k_len, built = inputs.query.shape[2], inputs.key.shape[2], self.context.is_causal
        if inputs.is_causal != built:
            raise ValueError(f"Layer built for is_causal={built}, called with {inputs.is_causal}.")
        if state is not None and (not built or q_len != k_len):
            raise ValueError(f"A decode state needs causal attention and Tq == Tk, got {q_len} and {k_len}.")
        if (built or self.config.form != "chunked") and q_len > k_len:
            what = "Causal attention" if built else f"form={self.config.form!r}"
            raise ValueError(f"{what} needs Tq <= Tk, got Tq={q_len} and Tk={k_len}.")
        if self.config.form != "chunked" and isinstance(k_len, torch.SymInt) and is_exported():
            raise ValueError(
                f"form={self.config.form!r} exports at one length only. Allowed with any length: form='chunked'."
            )

    def _memory(self, inputs: AttentionInputs, call: CompactedCall, state: State | None) -> tuple[torch.Tensor, State]:
        """The output `[B, H, Tq, D]` of a memory, and its state after the call (of decoders)."""
        size, k_len, beside = self.config.segment_size, call.k.shape[2], self.mem_length
        layout = segment_layout(call, size, aligned=state is None)
        if state is None:  # no more tokens than there are beside a segment
            beside = min(beside, (k_len - 1) // size * size)
        common: dict[str, Any] = {"scaling": inputs.scaling, "is_causal": inputs.is_causal}
        out = segment_attention(call, layout, memory_length=beside, **common)
        after = {} if state is None else window_state_after(call, size - 1 + self.mem_length, state["key"].dtype)
        if self.config.form == "infini":
            k, v = (x[:, :, -call.q.shape[2] :] for x in (call.k, call.v))  # of the new tokens
            common["reducer"] = (self.query_mean, self.key_peak) if self.reduces else None
            common["sums_before"] = None if state is None else (state["memory"], state["pending"])
            gate = self.beta.to(accumulation_dtype(v.dtype)).sigmoid()
            out, sums = gated_memory(out, call.q, k, v, layout, gate, **common)
            if sums:
                after["memory"], after["pending"] = sums
        return layout.restore(out), after
