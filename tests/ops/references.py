"""Dense formulas, quadratic in the length: what ops are held against."""

from __future__ import annotations

import torch

from hf_linear_attn.ops.base.compaction import CompactedCall
from hf_linear_attn.ops.base.masking import query_mask_of, safe_masked_fill
from hf_linear_attn.ops.sparse.layout import BlockGrid, Extra
from hf_linear_attn.ops.sparse.patterns import CAUSAL, FULL, TAIL, BlockLists


def naive_linear_attention(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    v: torch.Tensor,
    *,
    log_decay: torch.Tensor | None = None,
    key_log_weight: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    normalized: bool = True,
) -> torch.Tensor:
    """The dense formula with n x n x F weights, for the arguments of `linear_attention`."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, values = q_features.to(dtype), k_features.to(dtype), v.to(dtype)
    q_len, k_len = q.shape[2], k.shape[2]
    visible = torch.ones(v.shape[0], 1, q_len, k_len, dtype=torch.bool, device=v.device)
    if is_causal:
        visible = visible.tril(k_len - q_len)
    if token_mask is not None:
        visible = visible & token_mask[:, None, None, :]
        values = values.masked_fill(~token_mask[:, None, :, None], 0)
    exponent = torch.zeros_like(values[..., None, :, :1])  # [B, H, 1 or Tq, Tk, 1 or F]
    if key_log_weight is not None:
        exponent = key_log_weight.to(dtype)[:, :, None, :, None]
    if log_decay is not None:
        decay = log_decay.to(dtype) if log_decay.ndim == 4 else log_decay.to(dtype)[..., None]
        if token_mask is not None:
            decay = decay.masked_fill(~token_mask[:, None, :, None], 0)
        row, key = torch.arange(k_len - q_len, k_len)[:, None, None], torch.arange(k_len)
        between = (torch.arange(k_len)[:, None] > key) & (torch.arange(k_len)[:, None] <= row)  # [Tq, t, Tk]
        between = between.permute(0, 2, 1).to(dtype)  # of row i and key j: the tokens t that come after j, up to i
        exponent = exponent + torch.einsum("ijt,bhtf->bhijf", between, decay.clamp(min=-1e4))
    exponent = exponent.masked_fill(~visible[..., None], -1e30)
    if normalized:
        exponent = exponent - exponent.detach().amax((3, 4), keepdim=True)
    weight = exponent.exp() * visible[..., None]
    scores = (q[..., :, None, :] * k[..., None, :, :] * weight).sum(-1)
    if not normalized:
        return (scores @ values).to(v.dtype)
    total = scores.sum(-1, keepdim=True)
    return (scores @ values / torch.where(total.abs() < 1e-30, 1.0, total)).to(v.dtype)


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
