"""How much attention goes to which position, measured on real inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.starts.calibration import Row

__all__ = ["low_rank_factors", "position_log_weights"]


def position_log_weights(rows: Sequence[Row], length: int, *, is_causal: bool, scaling: float) -> torch.Tensor:
    """Logarithm of the mean softmax weight by distance, the first token apart, for every pair of positions.

    A mean by distance is over as many pairs as there are tokens, where one by pair of positions would be over as many
    as there are sequences. Distances that no sequence has take the weight of the nearest one that was seen.

    Args:
        rows: sequences without padding.
        length: positions wanted.
        is_causal: whether later positions count; their logarithms are 0 otherwise.
        scaling: factor of the logits.

    Returns:
        `[H, length, length]`, query position by key position.
    """
    heads, seen = rows[0][0].shape[1], max(row[0].shape[2] for row in rows)
    total = torch.zeros(heads, 2 * seen - 1, device=rows[0][0].device)  # by distance key - query, from 1 - seen
    count, first = torch.zeros_like(total), torch.zeros_like(total[:, 0])
    for q, k, _ in rows:
        places = torch.arange(q.shape[2], device=q.device)
        distance = places - places[:, None]
        logits = q[0] @ k[0].mT * scaling
        if is_causal:
            logits = logits.masked_fill(distance > 0, -torch.inf)
        weights = logits.softmax(-1)
        first += weights[:, :, 0].mean(-1) / len(rows)
        counted = (places > 0) & ((distance <= 0) | (not is_causal))
        bins = distance[counted] + seen - 1
        total.index_add_(1, bins, weights[:, counted])
        count.index_add_(1, bins, torch.ones_like(weights[:, counted]))
    places = torch.arange(length, device=total.device)
    known = count[0].nonzero()[:, 0]
    if not len(known):  # single tokens
        return total.new_zeros(heads, length, length)
    distance = (places - places[:, None] + seen - 1).clamp(int(known[0]), int(known[-1]))
    table = (total / count.clamp(min=1)).clamp(min=1e-8).log()[:, distance]
    table[:, :, 0] = first.clamp(min=1e-8).log()[:, None]
    return table.tril() if is_causal else table


def low_rank_factors(table: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors `[H, n, rank]` of the rank-k table that is nearest to `table [H, n, n]`, of equal norms.

    Their last columns are 0 where n is less than the rank.
    """
    u, s, vh = torch.linalg.svd(table, full_matrices=False)
    root, missing = s[:, None, :rank].sqrt(), max(0, rank - s.shape[-1])
    left, right = (F.pad(x[..., :rank] * root, (0, missing)) for x in (u, vh.mT))
    return left, right
