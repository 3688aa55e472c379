"""The strided pattern of the Sparse Transformer (arXiv:1904.10509) as one softmax over two parts.

A query sees the keys at a distance of at most l, and those at a multiple of l. In a grid of blocks of l tokens the
first are the neighboring blocks and the second a column: two batched products, the second with tokens grouped by
column. Their logits meet in one softmax, segment by segment of query blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.backend import use_triton
from hf_linear_attn.ops.base.masking import causal_mask
from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.ops.exact.dense import row_logits
from hf_linear_attn.ops.sparse.attention import segment_rows
from hf_linear_attn.ops.window.attention import sliding_window_attention

__all__ = ["attend_all", "column_attention", "is_last_row", "naive_strided_attention", "strided_attention"]


def strided_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    stride: int,
    scaling: float,
    is_causal: bool,
    key_allowed: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention where position i sees j with |i - j| <= l or (i - j) mod l = 0 (causal: and j <= i).

    Query row r sits at position Tk - Tq + r. Keys and values must be finite, forbidden ones too.

    Args:
        q: `[B, H, Tq, D]`, Tq <= Tk.
        k, v: `[B, H, Tk, D]`.
        stride: l, in tokens.
        scaling: factor of the logits.
        is_causal: see above.
        key_allowed: bool `[B or 1, Tk]`, False for keys that nobody may see; None when all may be.
        backend: what runs it, see `ops.base.backend`.

    Returns:
        `[B, H, Tq, D]`; a row that may see no key is finite.
    """
    if is_last_row(q, is_causal, key_allowed) and stride < k.shape[2] - 1:
        begin = k.shape[2] - 1 - stride
        listed = (torch.cat([x[:, :, begin % stride : begin : stride], x[:, :, begin:]], dim=2) for x in (k, v))
        return attend_all(q, *listed, scaling=scaling, backend=backend)
    if use_triton(backend, q):
        from hf_linear_attn.ops.sparse import fused
        from hf_linear_attn.ops.window.fused import refusal

        if use_triton(backend, q, refusal(q)):
            given: dict[str, Any] = {"scaling": scaling, "is_causal": is_causal, "key_allowed": key_allowed}
            return fused.strided_attention(q, k, v, stride=stride, **given)
    (B, H, q_len, _), k_len, device = q.shape, k.shape[2], q.device
    if is_exported():
        where: dict[str, Any] = {"is_causal": is_causal, "key_allowed": key_allowed}
        return naive_strided_attention(q, k, v, stride=stride, scaling=scaling, **where)
    if stride >= k_len - 1:
        right = 0 if is_causal else k_len
        return sliding_window_attention(q, k, v, left=k_len, right=right, scaling=scaling, key_allowed=key_allowed)
    if key_allowed is None:
        key_allowed = torch.ones(1, k_len, dtype=torch.bool, device=device)
    if q_len * k_len <= 3 * stride**2:  # a few new tokens: less work than one block
        seen = _pattern(q_len, k_len, stride, is_causal, device) & key_allowed[:, None, None, :]
        mask = (seen | ~seen.any(-1, keepdim=True)).expand(B, -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)

    # Blocks end with the sequence: [B, H, blocks, l, D], empty places in front.
    num_rows, num_columns = -(-q_len // stride), -(-k_len // stride)
    q = F.pad(q, (0, 0, num_rows * stride - q_len, 0)).unflatten(2, (num_rows, stride))
    k, v = (F.pad(x, (0, 0, num_columns * stride - k_len, 0)).unflatten(2, (-1, stride)) for x in (k, v))
    key_allowed = F.pad(key_allowed, (num_columns * stride - k_len, 0)).unflatten(1, (-1, stride))
    sides, wide = (1, 0) if is_causal else (1, 1), torch.promote_types(q.dtype, torch.float32)
    reach = 1 + sum(sides)
    offset = num_columns - num_rows  # the first query block among the key blocks

    distance = stride + torch.arange(stride, device=device)[:, None] - torch.arange(reach * stride, device=device)
    band = (distance <= stride) & (distance >= (0 if is_causal else -stride))  # [l, reach * l]
    step = segment_rows(B * H * stride * (reach * stride + num_columns), q.numel())
    outputs = []
    for begin in range(0, num_rows, step):
        end = min(begin + step, num_rows)
        first, last = begin + offset, end + offset  # blocks of this segment among the key blocks
        rows = q[:, :, begin:end]
        # Neighbors: key blocks first - 1 .. last (bidirectional: last + 1), missing ones empty.
        low, high = max(first - sides[0], 0), min(last + sides[1], num_columns)
        ends = (low - first + sides[0], last + sides[1] - high)
        near_k, near_v = (_windows(F.pad(x[:, :, low:high], (0, 0, 0, 0, *ends)), reach, 2) for x in (k, v))
        near_seen = band & _windows(F.pad(key_allowed[:, low:high], (0, 0, *ends)), reach, 1)[:, :, None]
        near = row_logits(rows, near_k.to(wide))  # [B, H, M, l, reach * l]
        # The column of each query, without the neighboring blocks: there the band has those distances.
        far_len = last if is_causal else num_columns
        far_k, far_v = (x[:, :, :far_len].transpose(2, 3) for x in (k, v))  # [B, H, l, N, D]
        far = row_logits(rows.transpose(2, 3), far_k.to(wide)).transpose(2, 3)  # [B, H, M, l, N]
        apart = torch.arange(first, last, device=device)[:, None] - torch.arange(far_len, device=device)
        apart = (apart if is_causal else apart.abs()) > 1
        far_seen = apart[:, None] & key_allowed[:, :far_len].transpose(1, 2)[:, None]  # [B or 1, M, l, N]
        seen = torch.cat([near_seen.expand(far_seen.shape[0], -1, -1, -1), far_seen], dim=-1)[:, None]
        logits = torch.cat([near, far], dim=-1) * scaling
        weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1).to(v.dtype)
        near, far = weights.split([near.shape[-1], far_len], dim=-1)
        outputs.append(near @ near_v + (far.transpose(2, 3) @ far_v).transpose(2, 3))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return out.flatten(2, 3)[:, :, num_rows * stride - q_len :]


def column_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    stride: int,
    scaling: float,
    is_causal: bool,
    key_allowed: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The second part alone: position i sees j with (i - j) mod l = 0; arguments as in `strided_attention`."""
    if is_last_row(q, is_causal, key_allowed):
        first = (k.shape[2] - 1) % stride
        return attend_all(q, k[:, :, first::stride], v[:, :, first::stride], scaling=scaling, backend=backend)
    if use_triton(backend, q):
        from hf_linear_attn.ops.sparse import fused
        from hf_linear_attn.ops.window.fused import refusal

        if use_triton(backend, q, refusal(q)):
            given: dict[str, Any] = {"scaling": scaling, "is_causal": is_causal, "key_allowed": key_allowed}
            return fused.column_attention(q, k, v, stride=stride, **given)
    if is_exported():
        where: dict[str, Any] = {"is_causal": is_causal, "key_allowed": key_allowed, "near": False}
        return naive_strided_attention(q, k, v, stride=stride, scaling=scaling, **where)
    B, q_len, k_len, device = q.shape[0], q.shape[2], k.shape[2], q.device
    num_rows, num_columns = -(-q_len // stride), -(-k_len // stride)
    if key_allowed is None:
        key_allowed = torch.ones(1, k_len, dtype=torch.bool, device=device)

    def columns(x: torch.Tensor, number: int) -> torch.Tensor:
        """`[B, H, T, D]` to `[B * l, H, N, D]`, empty places in front."""
        x = F.pad(x, (0, 0, number * stride - x.shape[2], 0)).unflatten(2, (number, stride))
        return x.permute(0, 3, 1, 2, 4).flatten(0, 1)

    key_allowed = columns(key_allowed[:, None, :, None].expand(B, -1, -1, -1), num_columns)[:, :, None, :, 0]
    q, k, v = columns(q, num_rows), columns(k, num_columns), columns(v, num_columns)
    step = segment_rows(B * stride * num_columns, q.numel())
    outputs = []
    for begin in range(0, num_rows, step):
        end = min(begin + step, num_rows)
        last = end + num_columns - num_rows if is_causal else num_columns
        mask = key_allowed[..., :last]
        if is_causal:
            mask = mask & causal_mask(end - begin, last, device)
        mask = mask | ~mask.any(-1, keepdim=True)
        rows = q[:, :, begin:end], k[:, :, :last], v[:, :, :last]
        outputs.append(F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scaling))
    out = torch.cat(outputs, dim=2).unflatten(0, (B, stride)).permute(0, 2, 3, 1, 4)
    return out.flatten(2, 3)[:, :, num_rows * stride - q_len :]


def is_last_row(q: torch.Tensor, is_causal: bool, key_allowed: torch.Tensor | None) -> bool:
    """Whether the call is a decode step without padding: its keys are found by slicing."""
    return q.shape[2] == 1 and is_causal and key_allowed is None and not is_exported()


def attend_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float, backend: str) -> torch.Tensor:
    """One query over all of some keys."""
    return sliding_window_attention(q, k, v, left=k.shape[2], right=0, scaling=scaling, backend=backend)


def _windows(x: torch.Tensor, reach: int, dim: int) -> torch.Tensor:
    """Runs of `reach` blocks side by side: `[.., N, l, ..]` to `[.., N - reach + 1, reach * l, ..]`."""
    count = x.shape[dim] - reach + 1
    return torch.cat([x.narrow(dim, i, count) for i in range(reach)], dim=dim + 1)


def _pattern(
    q_len: int, k_len: int, stride: int, is_causal: bool, device: torch.device, near: bool = True
) -> torch.Tensor:
    """bool `[1, 1, Tq, Tk]`."""
    distance = torch.arange(k_len - q_len, k_len, device=device)[:, None] - torch.arange(k_len, device=device)
    seen = distance % stride == 0
    seen = seen | (distance.abs() <= stride) if near else seen
    return (seen & (distance >= 0) if is_causal else seen)[None, None]


def naive_strided_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    stride: int,
    scaling: float,
    is_causal: bool,
    key_allowed: torch.Tensor | None = None,
    near: bool = True,
) -> torch.Tensor:
    """Dense O(n^2) evaluation of `strided_attention`, for exported programs and tests; same arguments.

    Without `near` that of `column_attention`.
    """
    seen = _pattern(q.shape[2], k.shape[2], stride, is_causal, q.device, near)
    if key_allowed is not None:
        seen = seen & key_allowed[:, None, None, :]
    logits = (q @ k.transpose(-1, -2) * scaling).masked_fill(~seen, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0) @ v
