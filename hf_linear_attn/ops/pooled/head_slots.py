"""Attention over projected keys and values where heads may have slots of their own (Linformer, arXiv:2006.04768)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hf_linear_attn.ops.base.masking import query_mask_of, safe_masked_fill
from hf_linear_attn.ops.base.numerics import accumulation_dtype, full_precision
from hf_linear_attn.ops.pooled.pooling import attend_segments
from hf_linear_attn.ops.pooled.projection import SequenceProjection

__all__ = ["HeadSlots"]


@dataclass(frozen=True)
class HeadSlots:
    """The projections of a layer, one for the heads of each number of slots.

    Attributes:
        parts: each with its heads; None for all heads of the layer.
    """

    parts: list[tuple[SequenceProjection, list[int] | None]]

    @classmethod
    def of(cls, projection: SequenceProjection, sizes: int | Sequence[int] | None) -> HeadSlots:
        """For heads with so many slots: all alike, one number each, or (None) as the projection says.

        Raises:
            ValueError: for a list that has not one entry per head.
        """
        if sizes is None or isinstance(sizes, int):
            return cls([(replace(projection, size=sizes), None)])
        if len(sizes) != projection.num_heads:
            raise ValueError(f"head_k={list(sizes)} has {len(sizes)} entries for {projection.num_heads} heads.")
        heads: dict[int, list[int]] = {}
        for head, size in enumerate(sizes):
            heads.setdefault(size, []).append(head)
        if len(heads) == 1:
            return cls([(replace(projection, size=sizes[0]), None)])
        return cls([(replace(projection, size=size, num_heads=len(own)), own) for size, own in heads.items()])

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        """Shape of E, `SequenceProjection.weight_shape` of the part with the most rows; None for pooling."""
        shapes = [shape for part, _ in self.parts if (shape := part.weight_shape) is not None]
        return (sum(x[0] for x in shapes), max(x[1] for x in shapes), *shapes[0][2:]) if shapes else None

    def start(self, weight: torch.Tensor, generator: torch.Generator) -> None:
        """Set E, in place, to what it starts as; rows that a head does not use are 0."""
        weight.zero_()
        for part, heads in self.parts:
            start = part.start(generator).to(weight)
            weight[slice(None) if heads is None else heads, : start.shape[1]] = start

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_mask: torch.Tensor | None,
        weights: Sequence[torch.Tensor | None],
        scaling: float,
    ) -> torch.Tensor:
        """Softmax attention over the slots.

        Args:
            query: `[B, H, Tq, D]`.
            key: `[B, H, T, D]`, and `value` likewise.
            token_mask: bool `[B, T]`, True for a real token, or None.
            weights: E and F of `weight_shape`; None for pooling, F also for F = E.
            scaling: factor of the logits.

        Returns:
            `[B, H, Tq, D]` in the query's dtype.

        Raises:
            ValueError: for more tokens than `max_length`.
        """
        query = safe_masked_fill(query, query_mask_of(token_mask, query.shape[2], False))
        of_head: dict[int, torch.Tensor] = {}
        for part, heads in self.parts:
            if heads is None:
                return _attend(part, query, key, value, token_mask, weights, scaling)
            q, k, v = (_of_heads(x, heads, 1) for x in (query, key, value))
            rows = None if part.weight_shape is None else part.weight_shape[1]
            own = [None if w is None else _of_heads(w[:, :rows], heads, 0) for w in weights]
            output = _attend(part, q, k, v, token_mask, own, scaling)
            of_head |= {head: output[:, i] for i, head in enumerate(heads)}
        return torch.stack([of_head[head] for head in range(len(of_head))], 1)


def _of_heads(x: torch.Tensor, heads: list[int], dim: int) -> torch.Tensor:
    """Some of the heads, a view where they are neighbors."""
    first, count = heads[0], len(heads)
    if heads[-1] - first == count - 1:
        return x.narrow(dim, first, count)
    # Not by an index tensor: it would have to be copied to the device in each call.
    return torch.stack([x.select(dim, head) for head in heads], dim)


def _attend(
    projection: SequenceProjection,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    token_mask: torch.Tensor | None,
    weights: Sequence[torch.Tensor | None],
    scaling: float,
) -> torch.Tensor:
    full = accumulation_dtype(key.dtype)
    with full_precision(key):
        key, value, in_use = projection(key.to(full), value.to(full), token_mask, *weights)
    return attend_segments(query, key, value, in_use, scaling)
