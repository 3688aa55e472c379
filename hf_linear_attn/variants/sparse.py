"""Sparse Transformer (arXiv:1904.10509): factorized patterns of stride l, in O(n sqrt(n)) for l near sqrt(n).

`strided`: A1 = {j: i - l <= j <= i}, A2 = {j: (i - j) mod l = 0}. `fixed`, in blocks of l tokens: A1 = the own block,
A2 = the last c tokens of each block. `block_local`: A1 of `fixed`. Causal: j <= i; encoders take the patterns
symmetric (|i - j| <= l; the whole own block; c tokens of all blocks, also of a short last one). One softmax over A1
and A2, or heads of each.

Of p > 2 factors each shows about l keys, n times the p-th root of n in all, and p steps reach every token: of `strided`
factor m = 0 .. p - 1 distances a l^m with a <= l, the last one any a; of `fixed` the last c tokens of each block of l^m
tokens (of 1 for m = 0) in the own block of l^(m+1), the last one in all. A1 and A2 are p = 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hf_linear_attn.ops.base.compaction import CompactedCall, compact, init_kv_state, kv_state_after, take_tokens
from hf_linear_attn.ops.base.tracing import blocks_of, is_exported
from hf_linear_attn.ops.sparse.attention import NOBODY, BlockGrid, Extra, block_sparse_attention
from hf_linear_attn.ops.sparse.factored import FactoredPattern, factored_attention
from hf_linear_attn.ops.sparse.patterns import own_block_lists
from hf_linear_attn.ops.sparse.strided import attend_all, column_attention, is_last_row, strided_attention
from hf_linear_attn.ops.window.attention import sliding_window_attention
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["SparseAttention", "SparseConfig"]

PATTERNS = ("strided", "fixed", "block_local")
PARTS = ("union", "near", "far")


@dataclass(frozen=True)
class SparseConfig(VariantConfig):
    """Options of `sparse`.

    Attributes:
        pattern: `"strided"`, `"fixed"` (suits text) or `"block_local"`.
        stride: l, in tokens; None means the smallest power of two that is at least max_length^(1/p).
        num_summary_tokens: c of `fixed`; more than l acts as l.
        heads: `"union"`, every head sees A1 and A2, which starts closer to a checkpoint; `"split"`, the first
            half of the heads `near` and the others `far`; or for each head one of `"union"`, `"near"` (A1) and `"far"`
            (A2; of `fixed` with the own block, else some would see nothing). With more than two factors `"union"` of
            all, or `"split"`, head h factor h mod p.
        factors: p, of `strided` and `fixed`.
    """

    pattern: str = "fixed"
    stride: int | None = None
    num_summary_tokens: int = 8
    heads: str | tuple[str, ...] = "union"
    factors: int = 2

    def validate(self) -> None:
        self.require_choice("pattern", PATTERNS)
        self.require_integer("stride", optional=True)
        self.require_integer("num_summary_tokens")
        given = self.heads
        listed = isinstance(given, tuple) and bool(given) and all(part in PARTS for part in given)
        if given not in ("union", "split") and not listed:
            raise ValueError(f"heads={given!r}; allowed: union, split, or a list of {', '.join(PARTS)}.")
        if self.pattern == "block_local" and given != "union":
            raise ValueError(f"heads={given!r}; allowed: union, since pattern='block_local' has one part.")
        self.require_integer("factors", at_least=2, at_most=16)
        if self.pattern == "block_local" and self.factors != 2:
            raise ValueError(f"factors={self.factors}; allowed: 2, since pattern='block_local' has one part.")
        if self.factors > 2 and listed:
            raise ValueError(f"heads={given!r}; allowed with factors={self.factors}: union, split.")


def _exact_limit(length: int, is_causal: bool) -> dict[str, Any]:
    return {"pattern": "strided", "stride": length}


@register_variant(
    "sparse",
    config=SparseConfig,
    title="Sparse Transformer (strided, fixed and block-local patterns)",
    paper="Generating Long Sequences with Sparse Transformers, arXiv:1904.10509",
    cost="n sqrt(n) d, n^(1+1/p) d with p factors",
    guide=("local-global", "patterns that repeat at a fixed stride: rows, tables, code"),
    state="kv",
    kernel="block_sparse",
    exact_limit=_exact_limit,
    test_options=(
        {"stride": 8, "num_summary_tokens": 3, "heads": ["far", "near", "far", "union"]},
        {"pattern": "strided", "stride": 5, "heads": ["far", "near", "union", "far"]},
        {"pattern": "block_local", "stride": 8},
        {"pattern": "strided", "stride": 6, "factors": 3},
        {"pattern": "fixed", "stride": 6, "factors": 3, "num_summary_tokens": 1},
    ),
    masked_export=True,
    not_exported="pattern='fixed', the default, whose summaries are as many as the length has blocks",
)
class SparseAttention(AttentionVariant):
    """Sparse attention of one layer, without parameters. Positions are ranks among the real tokens.

    Raises:
        ValueError: for a list of heads that has not one entry per head, or split heads in a layer of one head.
    """

    config: SparseConfig

    def __init__(self, config: SparseConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        heads, number, factors = config.heads, context.num_heads, config.factors
        if heads == "split" and number < factors:
            raise ValueError(
                f"heads='split' needs at least {factors} heads, the layer has {number}. Allowed here: 'union'."
            )
        if isinstance(heads, tuple) and len(heads) != number:
            raise ValueError(f"heads names {len(heads)} heads, the layer has {number}.")
        parts: tuple[Any, ...] = heads if isinstance(heads, tuple) else ("union",) * number
        if heads == "split" and factors == 2:
            parts = ("near",) * -(-number // 2) + ("far",) * (number // 2)
        elif heads == "split":
            parts = tuple(head % factors for head in range(number))
        self.groups = {part: [h for h in range(number) if parts[h] == part] for part in dict.fromkeys(parts)}
        self.stride = config.stride or 1 << max(0, math.ceil(math.log2(context.max_length) / factors))

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        return init_kv_state(batch_size, self.context.num_heads, self.context.head_dim, dtype, device)

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        past = None if state is None else (state["key"], state["value"], state["count"])
        call = compact(inputs.query, inputs.key, inputs.value, inputs.token_mask, past)
        attend = self._strided if self.config.pattern == "strided" else self._fixed
        attend = self._factored if self.config.factors > 2 else attend
        outputs = []
        for part, heads in self.groups.items():
            some = call
            if len(self.groups) > 1:
                some = replace(call, q=call.q[:, heads], k=call.k[:, heads], v=call.v[:, heads])
            outputs.append(attend(some, inputs, part, state is None))
        out = outputs[0]
        if len(outputs) > 1:
            order = [head for heads in self.groups.values() for head in heads]
            out = torch.cat(outputs, dim=1)[:, [order.index(head) for head in range(len(order))]]
        return call.restore(out), None if state is None else kv_state_after(call)

    def _factored(self, call: CompactedCall, inputs: AttentionInputs, part: Any, is_first: bool) -> torch.Tensor:
        config, seen = self.config, None if part == "union" else part
        number = min(config.num_summary_tokens, self.stride)
        pattern = FactoredPattern(config.pattern, self.stride, config.factors, number, seen, inputs.is_causal)
        return factored_attention(call, pattern, scaling=inputs.scaling, backend=self.backend)

    def _strided(self, call: CompactedCall, inputs: AttentionInputs, part: str, is_first: bool) -> torch.Tensor:
        # The pattern knows distances only, and with the padding in front places differ as ranks do.
        stride, is_causal = self.stride, inputs.is_causal
        where: dict[str, Any] = {"scaling": inputs.scaling, "key_allowed": call.real, "backend": self.backend}
        if part == "near":
            where.update(left=stride, right=0 if is_causal else stride)
            return sliding_window_attention(call.q, call.k, call.v, **where)
        attend = column_attention if part == "far" else strided_attention
        return attend(call.q, call.k, call.v, stride=stride, is_causal=is_causal, **where)

    def _fixed(self, call: CompactedCall, inputs: AttentionInputs, part: str, is_first: bool) -> torch.Tensor:
        k_len = call.k.shape[2]
        if is_last_row(call.q, inputs.is_causal, call.real):
            k, v = self._fixed_of_last(call, part)
            return attend_all(call.q, k, v, scaling=inputs.scaling, backend=self.backend)
        aligned = is_first and inputs.token_mask is None and inputs.query.shape[2] == k_len
        whole = not is_exported() and self.stride >= k_len
        grid = BlockGrid(call, k_len if whole else self.stride, aligned=aligned)  # one block: of the tokens there are
        alone = part == "near" or self.config.pattern == "block_local" or whole
        extra = None if alone else self._summaries(call, grid)
        lists = partial(own_block_lists, grid.row, grid.blocks, inputs.is_causal)
        kept_as = ("own block", inputs.is_causal) if aligned else None
        given: dict[str, Any] = {"extra": extra, "kept_as": kept_as, "backend": self.backend}
        return block_sparse_attention(call, grid, lists, scaling=inputs.scaling, **given)

    def _fixed_of_last(self, call: CompactedCall, part: str) -> list[torch.Tensor]:
        """The keys and the values that the last token sees: earlier blocks' last c tokens, and its own block."""
        own = (call.k.shape[2] - 1) // self.stride * self.stride
        if part == "near" or self.config.pattern == "block_local":
            return [x[:, :, own:] for x in (call.k, call.v)]
        earlier = [x[:, :, :own].unflatten(2, (own // self.stride, self.stride)) for x in (call.k, call.v)]
        number = min(self.config.num_summary_tokens, self.stride)
        summaries = [x[:, :, :, self.stride - number :].flatten(2, 3) for x in earlier]
        return [torch.cat([s, x[:, :, own:]], 2) for s, x in zip(summaries, (call.k, call.v), strict=True)]

    def _summaries(self, call: CompactedCall, grid: BlockGrid) -> Extra:
        """The last c tokens of each block, as columns for the others; of the last block its last real ones."""
        (B, _, k_len, _), stride = call.k.shape, self.stride
        if isinstance(k_len, torch.SymInt):
            raise ValueError("pattern='fixed' exports at one length only. Allowed with any length: pattern='strided'.")
        number = min(self.config.num_summary_tokens, stride)
        column = torch.arange(blocks_of(k_len, stride) * number, device=call.k.device)
        block, first = column // number, column // number * stride
        end = (first + stride).minimum(grid.count[:, None])  # [B or 1, blocks * c]
        rank = end - number + column % number
        block = torch.where(rank >= first, block, NOBODY)
        place = (grid.start[:, None] + rank).clamp(0, k_len - 1).expand(B, -1)
        return Extra(take_tokens(call.k, place), take_tokens(call.v, place), block)
