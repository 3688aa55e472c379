"""Global tokens beside the sequence, which every query sees as columns of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.compaction import CompactedCall, take_tokens
from hf_linear_attn.ops.sparse.layout import ANYONE, Extra
from hf_linear_attn.ops.window.attention import attend_blocks

__all__ = [
    "column_starts",
    "global_columns",
    "place_end_rows",
    "projected_embeddings",
    "traveling_columns",
    "traveling_starts",
]

# What all tokens that travel may weigh together beside one token of the text, in logits. They start with little: a
# checkpoint was not trained to read them (MiniLM, 512 tokens: the more they weigh, the further are its final states).
_TRAVELING_SHIFTS = (-2.0, -4.0, 0.0)


def global_columns(call: CompactedCall, tokens: torch.Tensor, shift: torch.Tensor, scaling: float) -> Extra:
    """G columns for all: additional tokens that read the whole sequence, with what each has read as its value.

    Args:
        call: the compacted call; not causal.
        tokens: `[H, 2, G, D]`, their queries and keys.
        shift: `[H]`, added to the logits of the columns.
        scaling: factor of the logits.
    """
    B = call.k.shape[0]
    query, key = tokens.to(call.k.dtype).expand(B, -1, -1, -1, -1).unbind(2)
    real = call.rank >= 0
    mask = (real | ~real.any(-1, keepdim=True)).expand(B, -1)[:, None, None, :]
    read = F.scaled_dot_product_attention(query, call.k, call.v, attn_mask=mask, scale=scaling)
    return Extra(key, read, torch.full((1, key.shape[2]), ANYONE, device=key.device), shift)


def traveling_columns(tokens: torch.Tensor, shift: torch.Tensor) -> Extra:
    """G columns for all: tokens beside the sequence, `[B, H, 2, G, D]` keys and values; `shift` `[H]` is added."""
    key, value = tokens.unbind(2)
    return Extra(key, value, torch.full((1, key.shape[2]), ANYONE, device=key.device), shift)


def place_end_rows(
    out: torch.Tensor, call: CompactedCall, block_size: int, extra: Extra | None, scaling: float
) -> torch.Tensor:
    """`out` `[B, H, Tq, D]` with the rows of the first and the last block over all keys and the columns.

    What `BlockLists.full_rows` is without columns.
    """
    (B, _, q_len, _), b = call.q.shape, block_size
    rank = call.rank[:, call.rank.shape[1] - q_len :]
    last = call.rank[:, -1:].clamp(min=0) // b * b  # rank of the last block's first token
    slot = torch.where(rank < b, rank, torch.where(rank >= last, rank - last + b, -1))
    inside = torch.arange(b, device=rank.device)
    ranks = torch.cat([torch.zeros_like(last) + inside, last + inside], dim=1)  # [B or 1, 2 b]
    query = take_tokens(call.q, (ranks - rank[:, :1]).clamp(0, q_len - 1).expand(B, -1))
    keys, values, shift, allowed = call.k, call.v, None, call.rank >= 0
    if extra is not None:
        G = extra.key.shape[2]
        keys, values = (torch.cat([x, y], dim=2) for x, y in ((extra.key, keys), (extra.value, values)))
        allowed = F.pad(allowed, (G, 0), value=True)
        if extra.shift is not None:
            shift = F.pad(extra.shift.to(query.dtype)[:, None, None].expand(-1, 1, G), (0, call.k.shape[2]))
    allowed = (allowed | ~allowed.any(-1, keepdim=True))[:, None, None]
    rows = attend_blocks(query[:, None], keys[:, None], values[:, None], allowed, scaling, shift)[:, 0]
    rows = take_tokens(rows, slot.clamp(min=0).expand(B, -1))
    return torch.where((slot >= 0)[:, None, :, None], rows, out)


def projected_embeddings(
    number: int,
    query: tuple[torch.Tensor, torch.Tensor | None],
    key: tuple[torch.Tensor, torch.Tensor | None],
    num_heads: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Queries and keys `[H, 2, G, D]` of random embeddings, N(0, 0.02); weight `[H * D, C]` and bias of each."""
    embeddings = 0.02 * torch.randn(number, query[0].shape[1], generator=generator, device="cpu").to(query[0])
    both = torch.stack([F.linear(embeddings, weight, bias) for weight, bias in (query, key)])
    return both.unflatten(-1, (num_heads, -1)).permute(2, 0, 1, 3)


def column_starts(
    rows: Sequence[tuple[torch.Tensor, ...]], tokens: torch.Tensor, shift: torch.Tensor, generator: torch.Generator
) -> list[dict[str, torch.Tensor]]:
    """Starts of a layer's own global tokens: no change, the mean first token ([CLS]) plus noise, real tokens.

    Args:
        rows: q, k (and v) `[1, H, T, D]` of sequences without padding, at least one.
        tokens: `[H, 2, G, D]`.
        shift: `[H]`, added to the logits of the columns.
    """
    real = torch.cat([torch.stack(row[:2])[:, 0] for row in rows], dim=2).transpose(0, 1)  # [H, 2, N, D]
    first = torch.stack([torch.stack(row[:2])[:, 0, :, :1] for row in rows]).mean(0).transpose(0, 1)
    noise = torch.randn(tokens.shape, generator=generator, device="cpu").to(first)
    places = torch.randint(real.shape[2], (tokens.shape[2],), generator=generator, device="cpu")
    starts: list[dict[str, torch.Tensor]] = [{}, {"tokens": first + 0.1 * first.std(-1, keepdim=True) * noise}]
    return starts + [{"tokens": real[:, :, places], "shift": torch.full_like(shift, c)} for c in (0.0, 1.5, 3.0)]


def traveling_starts(number: int, shift: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Starts of the weight of G tokens that travel, from one token's to nearly none, as values of `shift` `[H]`."""
    return [{"shift": torch.full_like(shift, c - math.log(number))} for c in _TRAVELING_SHIFTS]
