"""flex_attention with the masks of our block patterns, or of softmax: the same tokens see each other, compiled."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hf_linear_attn.bench.peers.layers import LayerShape, ProjectedAttention, build_variant
from hf_linear_attn.measure.methods import RefusedError
from hf_linear_attn.variants.base import AttentionVariant

__all__ = ["MASKS", "Visible", "flex_block_mask", "flex_layer"]

Visible = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""flex_attention's `mask_mod`: (batch, head, query, key) positions to whether the query sees the key."""


def window_mask(variant: Any, shape: LayerShape, device: torch.device) -> tuple[Visible, int]:
    """`longformer` without global tokens."""
    size, is_causal = variant.window_size, shape.is_causal
    left, right = (size - 1, 0) if is_causal else (size // 2, size // 2)
    return lambda b, h, q, k: (q - k <= left) & (k - q <= right), 1


def strided_mask(variant: Any, shape: LayerShape, device: torch.device) -> tuple[Visible, int]:
    """`sparse` with pattern="strided"."""
    stride, is_causal = variant.stride, shape.is_causal

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = ((q - k).abs() <= stride) | ((q - k) % stride == 0)
        return seen & (q >= k) if is_causal else seen

    return visible, 1


def bigbird_mask(variant: Any, shape: LayerShape, device: torch.device) -> tuple[Visible, int]:
    """`bigbird` (itc), with the blocks that this layer draws."""
    size, half = variant.config.block_size, variant.config.num_window_blocks // 2
    is_causal, blocks = shape.is_causal, -(-shape.length // variant.config.block_size)
    row = torch.arange(blocks)
    distance = row[:, None] - row
    seen = (distance.abs() <= half) | (row == 0)  # [N, N]
    if not is_causal:
        ends = (row == 0) | (row == blocks - 1)
        seen = seen | ends | ends[:, None]
    if blocks <= variant.full_blocks():
        table = torch.ones(shape.num_heads, blocks, blocks, dtype=torch.bool)
    else:
        columns, there = variant.random_blocks(row[None], torch.tensor([blocks]))  # [1, H, N, r], [1, N, r]
        table = seen.repeat(shape.num_heads, 1, 1)
        # A draw that is not there is sent to column 0, which every query sees.
        table.scatter_(2, columns[0].masked_fill(~there[0], 0), True)
    table = table.to(device)

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = table[h, q // size, k // size]
        return seen & (q >= k) if is_causal else seen

    return visible, shape.num_heads


MASKS: dict[str, Callable[[Any, LayerShape, torch.device], tuple[Visible, int]]] = {
    "longformer": window_mask,
    "sparse": strided_mask,
    "bigbird": bigbird_mask,
}
"""By our key: (variant, shape, device) to the mask and the number of heads that it tells apart (1: all are alike)."""


def flex_block_mask(visible: Visible, heads: int, length: int, block_size: int, device: torch.device) -> BlockMask:
    """The blocks of a mask, from one row of blocks at a time: no tensor of length x length.

    Args:
        visible: the mask.
        heads: how many heads it tells apart.
        length: tokens of queries and of keys.
        block_size: tokens of a block.
        device: where the mask's tensors are.
    """
    number = -(-length // block_size)
    padded = number * block_size
    keys, batch = torch.arange(length, device=device)[None], torch.zeros((), dtype=torch.long, device=device)
    some = torch.zeros(heads, number, number, dtype=torch.bool, device=device)
    every = torch.zeros_like(some)
    for h in range(heads):
        head = torch.tensor(h, device=device)
        for i in range(number):
            queries = torch.arange(i * block_size, min(length, (i + 1) * block_size), device=device)[:, None]
            seen = visible(batch, head, queries, keys)
            tile = torch.zeros(block_size, padded, dtype=torch.bool, device=device)
            tile[: seen.shape[0], :length] = seen
            tile = tile.view(block_size, number, block_size)
            some[h, i], every[h, i] = tile.any(2).any(0), tile.all(2).all(0)
    partial, full = _lists(some & ~every), _lists(every)
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=block_size, mask_mod=visible, seq_lengths=(length, length)
    )


def _lists(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool `[H, N, N]` to counts `[1, H, N]` and column indices, those that count first, `[1, H, N, N]`."""
    counts = blocks.sum(-1, dtype=torch.int32)[None]
    return counts, blocks.int().argsort(dim=-1, descending=True, stable=True).int()[None]


def _call_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask | None, scale: float) -> torch.Tensor:
    return flex_attention(q, k, v, block_mask=mask, scale=scale)  # type: ignore[return-value]


class FlexCore(nn.Module):
    """flex_attention as an attention of `[B, H, T, D]` tensors.

    It compiles, and makes its block mask, in the first call: leave that one out of timings.

    Args:
        shape: of the layer.
        key: our variant whose mask it has; None for softmax over all tokens, or over the past ones.
        variant: the variant itself.
    """

    def __init__(self, shape: LayerShape, key: str | None = None, variant: AttentionVariant | None = None) -> None:
        super().__init__()
        self.shape, self.key, self.variant = shape, key, variant
        self.mask: BlockMask | None = None
        # A code object of its own: dynamo counts recompilations by it, and past a few of them it would run the dense
        # uncompiled form instead.
        own = FunctionType(_call_flex.__code__.replace(), _call_flex.__globals__)
        self._compiled = torch.compile(own, dynamic=False, fullgraph=True)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if q.requires_grad and q.device.type == "cpu":  # what PyTorch says of it gets lost in the compiler
            raise RefusedError("flex_attention has no backward pass on a CPU")
        if self.mask is None or self.mask.kv_num_blocks.device != q.device:
            self.mask = self._block_mask(q.device)
        return self._compiled(q, k, v, self.mask, q.shape[-1] ** -0.5)

    def _block_mask(self, device: torch.device) -> BlockMask | None:
        if self.key is not None:
            visible, heads = MASKS[self.key](self.variant, self.shape, device)
        elif self.shape.is_causal:
            visible, heads = _past, 1
        else:
            return None
        size = getattr(self.variant.config, "block_size", 128) if self.variant is not None else 128
        return flex_block_mask(visible, heads, self.shape.length, size, device)


def _past(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q >= k


def flex_layer(shape: LayerShape, key: str | None = None, options: dict[str, Any] | None = None) -> ProjectedAttention:
    """A layer that runs flex_attention with the mask of our variant `key`, or of softmax, in evaluation mode."""
    variant = None if key is None else build_variant(shape, key, options or {})
    return ProjectedAttention(shape, FlexCore(shape, key, variant)).eval()
