"""What a start or a loss reads off softmax attention's weights, in memory linear in the length."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hf_linear_attn.ops.base.masking import query_mask_of, safe_masked_fill
from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype
from hf_linear_attn.ops.features.maps import FeatureMap
from hf_linear_attn.ops.starts.calibration import Row

__all__ = ["attended_share", "attention_cross_entropy"]

_MAX_QUERIES = 128  # sampled queries of a sequence: their rows of weights stand for all
_TINY = 1e-30


@torch.no_grad()
def attended_share(rows: Iterable[Row], *, is_causal: bool, scaling: float) -> torch.Tensor:
    """Each key's share of all softmax attention, over sequences in a line.

    Args:
        rows: sequences without padding, `[1, H, T, D]` each.
        is_causal: decoder (True) or encoder (False).
        scaling: factor of the logits.

    Returns:
        `[H, tokens]`, summing to 1 in each head.
    """
    shares = []
    for q, k, _ in rows:
        index = _sample(q.shape[2], q.device)
        logits = (q[:, :, index] @ k.mT * scaling).masked_fill(~_visible(index, k.shape[2], is_causal, 0), LOG_ZERO)
        shares.append(logits.softmax(-1).mean((0, 2)) * k.shape[2])
    share = torch.cat(shares, -1)
    return share / share.sum(-1, keepdim=True)


def attention_cross_entropy(
    q: torch.Tensor,
    k: torch.Tensor,
    q_map: FeatureMap,
    k_map: FeatureMap,
    *,
    token_mask: torch.Tensor | None = None,
    is_causal: bool,
    scaling: float,
) -> torch.Tensor:
    """Cross-entropy of linear attention's weights against softmax's, averaged over sampled queries and heads.

    It is the loss of Hedgehog (arXiv:2402.04347), on at most 128 evenly spaced queries of each sequence.

    Args:
        q: `[B, H, Tq, D]`.
        k: `[B, H, Tk, D]`.
        q_map, k_map: feature maps with positive products, as for `feature_map_attention`.
        token_mask: bool `[B, Tk]`, True for a real key, or None.
        is_causal: query row r sees keys up to position Tk - Tq + r.
        scaling: factor of the softmax logits.

    Returns:
        a scalar, at least the entropy of softmax attention.
    """
    dtype, (q_len, k_len) = accumulation_dtype(q.dtype), (q.shape[2], k.shape[2])
    index = _sample(q_len, q.device)
    query_mask = query_mask_of(token_mask, q_len, is_causal)
    if query_mask is not None:
        query_mask = query_mask[:, index]
    q, k = safe_masked_fill(q[:, :, index].to(dtype), query_mask), safe_masked_fill(k.to(dtype), token_mask)
    visible = _visible(index, k_len, is_causal, k_len - q_len)
    if token_mask is not None:
        visible = visible & token_mask[:, None, None, :]
    with torch.no_grad():
        target = (q @ k.mT * scaling).masked_fill(~visible, LOG_ZERO).softmax(-1)
    features, log_weight = k_map(k)
    score = (q_map(q)[0] @ features.mT).clamp(min=_TINY).log()  # [B, H, queries, Tk]
    if log_weight is not None:
        score = score + log_weight[:, :, None]
    row = -(target * score.masked_fill(~visible, LOG_ZERO).log_softmax(-1).masked_fill(~visible, 0)).sum(-1)
    if query_mask is None:
        return row.mean()
    return row.masked_fill(~query_mask[:, None], 0).sum() / (query_mask.sum() * row.shape[1]).clamp(min=1)


def _sample(length: int, device: torch.device) -> torch.Tensor:
    """Positions of at most 128 evenly spaced queries, the last one among them."""
    return torch.linspace(0, length - 1, min(length, _MAX_QUERIES), device=device).round().long()


def _visible(index: torch.Tensor, k_len: int, is_causal: bool, offset: int) -> torch.Tensor:
    """bool `[queries, Tk]`: which key the sampled queries may see."""
    if not is_causal:
        return torch.ones(1, k_len, dtype=torch.bool, device=index.device)
    return torch.arange(k_len, device=index.device) <= index[:, None] + offset
