"""Sparse Transformer (arXiv:1904.10509): factorised patterns of stride l, in O(n sqrt(n)) for l near sqrt(n).

`strided`: A1 = {j: i - l <= j <= i}, A2 = {j: (i - j) mod l = 0}. `fixed`, in blocks of l tokens: A1 = the own block,
A2 = the last c tokens of each block. `block_local`: A1 of `fixed`. Causal: j <= i; encoders take the patterns
symmetric (|i - j| <= l; the whole own block; c tokens of all blocks). One softmax over A1 and A2, or heads of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_linear_attn.ops.block_patterns import own_block_lists
from hf_linear_attn.ops.block_sparse import BlockGrid, Extra, block_grid, block_sparse_attention
from hf_linear_attn.ops.compaction import CompactedCall, compact, init_kv_state, kv_state_after, take_tokens
from hf_linear_attn.ops.sliding_window import sliding_window_attention
from hf_linear_attn.ops.strided import strided_attention
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["SparseAttention", "SparseConfig"]

PATTERNS = ("strided", "fixed", "block_local")
HEADS = ("union", "split")


@dataclass(frozen=True)
class SparseConfig(VariantConfig):
    """Options of `sparse`.

    Attributes:
        pattern: `"strided"`, `"fixed"` (suits text) or `"block_local"`.
        stride: l, in tokens; None means the smallest power of two that is at least sqrt(max_length).
        num_summary_tokens: c of `fixed`; more than l acts as l.
        heads: `"union"`, every head sees A1 and A2, which starts closer to a checkpoint; or `"split"`, the first
            half of the heads A1, the others A2 (of `fixed` with the own block, else some would see nothing).
    """

    pattern: str = "fixed"
    stride: int | None = None
    num_summary_tokens: int = 8
    heads: str = "union"

    def validate(self) -> None:
        for name, allowed in (("pattern", PATTERNS), ("heads", HEADS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in ("stride", "num_summary_tokens"):
            given = getattr(self, name)
            if name == "stride" and given is None:
                continue
            if isinstance(given, bool) or not isinstance(given, int) or given < 1:
                raise ValueError(f"{name} must be an int >= 1{' or None' * (name == 'stride')}, got {given!r}.")
        if self.pattern == "block_local" and self.heads == "split":
            raise ValueError("heads='split' needs two patterns to split: pattern='block_local' takes heads='union'.")


def _exact_limit(length: int, is_causal: bool) -> dict[str, Any]:
    return {"pattern": "strided", "stride": length}


@register_variant(
    "sparse",
    config=SparseConfig,
    title="Sparse Transformer (strided, fixed and block-local patterns)",
    paper="Generating Long Sequences with Sparse Transformers, arXiv:1904.10509",
    cost="n sqrt(n) d",
    state="kv",
    exact_limit=_exact_limit,
    test_options=(
        {"pattern": "fixed", "stride": 8, "num_summary_tokens": 2},
        {"pattern": "strided", "stride": 6},
        {"pattern": "strided", "stride": 4, "heads": "split"},
        {"pattern": "fixed", "stride": 8, "num_summary_tokens": 3, "heads": "split"},
        {"pattern": "block_local", "stride": 8},
    ),
)
class SparseAttention(AttentionVariant):
    """Sparse attention of one layer, without parameters. Positions are ranks among the real tokens.

    Raises:
        ValueError: for split heads in a layer of one head.
    """

    config: SparseConfig

    def __init__(self, config: SparseConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        if config.heads == "split" and context.num_heads < 2:
            raise ValueError("heads='split' needs at least 2 heads, the layer has 1: heads='union' is allowed.")
        self.stride = config.stride or 1 << max(0, math.ceil(math.log2(context.max_length) / 2))

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        return init_kv_state(batch_size, self.context.num_heads, self.context.head_dim, dtype, device)

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        past = None if state is None else (state["key"], state["value"], state["count"])
        call = compact(inputs.query, inputs.key, inputs.value, inputs.key_padding, past)
        aligned = inputs.key_padding is None and state is None and inputs.query.shape[2] == call.k.shape[2]
        if self.config.pattern == "strided":
            out = self._strided(call, inputs)
        else:
            out = self._blocks(call, inputs, aligned)
        return call.restore(out), None if state is None else kv_state_after(call)

    def _strided(self, call: CompactedCall, inputs: AttentionInputs) -> torch.Tensor:
        # The pattern knows distances only, and with the padding in front places differ as ranks do.
        real, scaling, l, n = call.rank >= 0, inputs.scaling, self.stride, call.k.shape[2]
        qkv = call.q, call.k, call.v
        if self.config.heads == "union":
            return strided_attention(*qkv, stride=l, scaling=scaling, is_causal=inputs.is_causal, key_allowed=real)
        outputs = []
        for heads, reach, dilation in zip(self._halves(), (l, -(-n // l)), (1, l), strict=True):
            q, k, v = (x[:, heads] for x in qkv)
            right = 0 if inputs.is_causal else reach
            where: dict[str, Any] = {"left": reach, "right": right, "dilation": dilation, "key_allowed": real}
            outputs.append(sliding_window_attention(q, k, v, scaling=scaling, **where))
        return torch.cat(outputs, dim=1)

    def _blocks(self, call: CompactedCall, inputs: AttentionInputs, aligned: bool) -> torch.Tensor:
        k_len = call.k.shape[2]
        grid = block_grid(call, min(self.stride, k_len), aligned=aligned)  # in one block the pattern is the same
        lists = own_block_lists(grid.row, grid.blocks, inputs.is_causal)
        if self.config.pattern == "block_local" or self.stride >= k_len:
            return block_sparse_attention(call, grid, lists, scaling=inputs.scaling)
        if self.config.heads == "union":
            extra = self._summaries(call, grid, inputs.is_causal)
            return block_sparse_attention(call, grid, lists, scaling=inputs.scaling, extra=extra)
        own, both = (replace(call, q=call.q[:, h], k=call.k[:, h], v=call.v[:, h]) for h in self._halves())
        extra = self._summaries(both, grid, inputs.is_causal)
        first = block_sparse_attention(own, grid, lists, scaling=inputs.scaling)
        return torch.cat([first, block_sparse_attention(both, grid, lists, scaling=inputs.scaling, extra=extra)], dim=1)

    def _summaries(self, call: CompactedCall, grid: BlockGrid, is_causal: bool) -> Extra:
        """The last c tokens of each block, for the queries of the other blocks (causal: the later ones)."""
        (B, _, k_len, _), l = call.k.shape, self.stride
        block = torch.arange(-(-k_len // l), device=call.k.device)
        summary = torch.arange(max(0, l - self.config.num_summary_tokens), l, device=block.device)
        rank = (block[:, None] * l + summary).flatten()
        place = (grid.start[:, None] + rank).clamp(max=k_len - 1).expand(B, -1)
        row, block = grid.row[:, :, None], rank // l
        seen = ((block < row) if is_causal else (block != row)) & (rank < grid.count[:, None, None])
        return take_tokens(call.k, place), take_tokens(call.v, place), seen, 0.0

    def _halves(self) -> tuple[slice, slice]:
        half = (self.context.num_heads + 1) // 2
        return slice(0, half), slice(half, None)
