"""Dense formulas, quadratic in the length: what ops are held against."""

from __future__ import annotations

import torch

from hf_linear_attn.ops.base.compaction import CompactedCall
from hf_linear_attn.ops.base.masking import causal_mask, query_mask_of, safe_masked_fill
from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype, full_precision
from hf_linear_attn.ops.linear.decay import _finish, _prepare, _start
from hf_linear_attn.ops.linear.sums import divide
from hf_linear_attn.ops.sparse.layout import BlockGrid, Extra
from hf_linear_attn.ops.sparse.patterns import CAUSAL, FULL, TAIL, BlockLists


def naive_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """The dense O(n^2) formula, for the arguments of `linear_attention`."""
    dtype = accumulation_dtype(v.dtype)
    q_features, k_features, values = q_features.to(dtype), k_features.to(dtype), v.to(dtype)
    visible = torch.ones(v.shape[0], 1, q_features.shape[2], v.shape[2], dtype=torch.bool, device=v.device)
    if is_causal:
        visible = visible & causal_mask(q_features.shape[2], v.shape[2], v.device)
    if token_mask is not None:
        visible = visible & token_mask[:, None, None, :]
        values = values.masked_fill(~token_mask[:, None, :, None], 0)
    log_weight = torch.zeros_like(values[..., 0]) if key_log_weight is None else key_log_weight.to(dtype)
    log_weight = log_weight[:, :, None, :].masked_fill(~visible, LOG_ZERO)  # [B, H, Tq, Tk]
    weight = (log_weight - log_weight.amax(-1, keepdim=True)).exp().masked_fill(~visible, 0)
    scores = (q_features @ k_features.mT) * weight
    return divide(torch.cat([scores @ values, scores.sum(-1, keepdim=True)], -1), v.dtype)


def naive_decay_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    key_log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    normalised: bool = True,
) -> torch.Tensor:
    """The formula with n x n (x F) weights, for the arguments of `decay_linear_attention`."""
    q_len, k_len = q_features.shape[2], k_features.shape[2]
    with full_precision(v):
        carry, peak = _start(q_features, v, normalised, None)
        k, v1, decay, _ = _prepare(k_features, v, log_decay, key_log_weight, token_mask, carry.dtype, normalised, peak)
        later = torch.ones(k_len, k_len, dtype=torch.bool, device=v.device).tril(-1)[:, :, None]
        between = torch.where(later, decay[..., :, None, :], 0).cumsum(-3)  # [B, H, i, j, F or 1]
        weight = between.exp() * torch.ones(k_len, k_len, dtype=torch.bool, device=v.device).tril()[:, :, None]
        scores = (q_features.to(k.dtype)[..., :, None, :] * k[..., None, :, :] * weight[:, :, k_len - q_len :]).sum(-1)
        return _finish(scores @ v1, v.dtype, normalised)


def naive_prefix_softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    query_weight: torch.Tensor | None = None,
    query_bias: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    is_causal: bool,
) -> torch.Tensor:
    """The dense formula, O(n^2 F), for the arguments of `prefix_softmax_attention`."""
    q_len, k_len = q.shape[2], v.shape[2]
    q = safe_masked_fill(q, query_mask_of(token_mask, q_len, is_causal))
    k, v = (safe_masked_fill(x, token_mask) for x in (k, v))
    a = q if query_weight is None else q @ query_weight.mT
    a = (a if query_bias is None else a + query_bias[:, None]).softmax(-1)
    logits = k if key_weight is None else k @ key_weight.mT
    visible = torch.ones(q_len, k_len, dtype=torch.bool, device=v.device)
    visible = (visible.tril(k_len - q_len) if is_causal else visible)[None]
    if token_mask is not None:
        visible = visible & token_mask[:, None, :]  # [B, Tq, Tk]
    logits = logits[:, :, None].masked_fill(~visible[:, None, :, :, None], -torch.inf)  # [B, H, Tq, Tk, F]
    weights = logits.softmax(3).nan_to_num(0.0)  # no visible key: 0
    return torch.einsum("bhif,bhijf,bhjd->bhid", a, weights, v)


def naive_block_sparse_attention(
    call: CompactedCall, grid: BlockGrid, lists: BlockLists, *, scaling: float, extra: Extra | None = None
) -> torch.Tensor:
    """The dense formula for the arguments of `block_sparse_attention`."""
    q, rank, b = call.q, call.rank, grid.block_size
    B, H, q_len, _ = q.shape
    k_len = call.k.shape[2]
    R, L = lists.columns.shape[2:]
    columns, kind = lists.columns.expand(B, H, R, L), lists.kind[:, None].expand(B, H, R, L)
    rows = rank[:, k_len - q_len :].expand(B, q_len)
    tile = (rows // b - grid.row[:, :1]).clamp(0, R - 1)[:, None, :, None].expand(B, H, q_len, L)
    columns, kind = columns.gather(2, tile)[..., None], kind.gather(2, tile)[..., None]  # [B, H, Tq, L, 1]
    key = rank[:, None, None, None, :]
    past = (kind == CAUSAL) & (key <= rows[:, None, :, None, None])
    seen = ((key // b == columns) & ((kind == FULL) | (kind == TAIL) | past)).any(3)
    full = seen.new_zeros(1, 1, 1, 1)
    if lists.full_rows is not None:
        full = (rows[..., None] // b == lists.full_rows[:, None, :]).any(-1)[:, None, :, None]
    seen = (seen | full) & (rank >= 0)[:, None, None, :]
    logits = (q @ call.k.transpose(-1, -2) * scaling).masked_fill(~seen, float("-inf"))
    v = call.v
    if extra is not None:
        shown = extra.seen(rows // b, lists.is_causal)[:, None] & ~full
        more = q @ extra.key.transpose(-1, -2) * scaling
        more = more if extra.shift is None else more + extra.shift[:, None, None]
        more = more.masked_fill(~shown, float("-inf"))
        logits, v = torch.cat([more, logits], dim=-1), torch.cat([extra.value, v], dim=2)
    return logits.softmax(-1).nan_to_num(0.0) @ v
