"""Softmax attention, exact, whose memory beyond its inputs and outputs is O(sqrt n): Rabe and Staats, arXiv:2112.05682.

Queries and keys are taken in chunks. Per chunk of queries a running maximum m, sum of exponentials l and weighted
sum of values a are carried over the chunks of keys; at the end o = a / l. The backward pass recomputes the weights
of each pair of chunks from log l + m, so training holds no n x n tensor either. Time stays n^2 d.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.derivatives import once_differentiable
from hf_linear_attn.ops.base.masking import safe_masked_fill
from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype
from hf_linear_attn.ops.base.tracing import is_exported

__all__ = ["chunked_softmax_attention"]

_MIN_CHUNK = 256  # smaller matrices cost more time than they save memory


def chunked_softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    token_mask: torch.Tensor | None = None,
    is_causal: bool,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Softmax attention chunk by chunk; not differentiable twice.

    Args:
        q: `[B, H, Tq, D]`, finite; when causal, row r stands at position Tk - Tq + r.
        k, v: `[B, H, Tk, D]`. What stands at padded keys has no effect, be it nan.
        scaling: factor of the logits.
        token_mask: bool `[B or 1, Tk]`, True for a real key, or None.
        is_causal: whether a query sees keys up to its own position only.
        chunk_size: queries and keys per chunk, in tokens; None takes sqrt(Tk), at least 256, or leaves the choice to
            torch's own kernel, where that serves the call (on a CPU, without padding).

    Returns:
        `[B, H, Tq, D]` in v's dtype, computed in float32 (float64 for float64); 0 in rows that see no key.

    Raises:
        ValueError: for causal attention with more queries than keys, or a chunk size below 1.
    """
    q_len, k_len = q.shape[2], k.shape[2]
    if is_causal and q_len > k_len:
        raise ValueError(f"Causal attention needs Tq <= Tk, got Tq={q_len} and Tk={k_len}.")
    if chunk_size is None and q.device.type == "cpu" and token_mask is None and (not is_causal or q_len == k_len):
        # torch's CPU kernel is this algorithm in one piece, with chunks that fit the cache.
        dtype = accumulation_dtype(v.dtype)
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(
                q.to(dtype), k.to(dtype), v.to(dtype), is_causal=is_causal and q_len > 1, scale=scaling
            ).to(v.dtype)
    if is_exported() and not is_causal:
        return _whole(q, k, v, scaling, token_mask)
    if chunk_size is None:
        chunk_size = max(_MIN_CHUNK, math.isqrt(k_len - 1) + 1)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be None or an int >= 1, got {chunk_size!r}.")
    k, v = safe_masked_fill(k, token_mask), safe_masked_fill(v, token_mask)
    return _ChunkedSoftmax.apply(q, k, v, token_mask, is_causal, scaling, chunk_size)


def _whole(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, token_mask: torch.Tensor | None
) -> torch.Tensor:
    """All of it in torch's own kernel, for exported programs: the chunks are the runtime's business."""
    dtype, mask = accumulation_dtype(v.dtype), None
    q, k, v_full = q.to(dtype), safe_masked_fill(k, token_mask).to(dtype), safe_masked_fill(v, token_mask).to(dtype)
    if token_mask is not None:  # a row without any key attends to values of 0
        mask = (token_mask | ~token_mask.any(-1, keepdim=True))[:, None, None]
    return F.scaled_dot_product_attention(q, k, v_full, attn_mask=mask, scale=scaling).to(v.dtype)


class _ChunkedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        token_mask: torch.Tensor | None,
        is_causal: bool,
        scaling: float,
        chunk_size: int,
    ) -> torch.Tensor:
        dtype, outputs, log_sums = accumulation_dtype(v.dtype), [], []
        ctx.options = is_causal, scaling, chunk_size
        with torch.autocast(v.device.type, enabled=False):
            for rows, columns in _pairs(q.shape[2], k.shape[2], is_causal, chunk_size):
                queries = q[:, :, rows].to(dtype) * scaling
                peak = queries.new_full((*queries.shape[:3], 1), LOG_ZERO)
                total = torch.zeros_like(peak)
                output = queries.new_zeros(*queries.shape[:3], v.shape[-1])
                for keys in columns:
                    logits = queries @ k[:, :, keys].to(dtype).mT
                    hidden = _hidden(rows, keys, k.shape[2] - q.shape[2], is_causal, token_mask, logits.device)
                    if hidden is not None:
                        logits = logits.masked_fill(hidden, LOG_ZERO)
                    higher = torch.maximum(peak, logits.amax(-1, keepdim=True))
                    weights, kept = (logits - higher).exp(), (peak - higher).exp()
                    if hidden is not None:  # in a row without keys so far, LOG_ZERO is the maximum
                        weights = weights.masked_fill(hidden, 0)
                    total = total * kept + weights.sum(-1, keepdim=True)
                    output = output * kept + weights @ v[:, :, keys].to(dtype)
                    peak = higher
                total = torch.where(total == 0, 1, total)
                outputs.append((output / total).to(v.dtype))
                log_sums.append(peak + total.log())
        result, log_sum = torch.cat(outputs, 2), torch.cat(log_sums, 2)
        ctx.save_for_backward(q, k, v, token_mask, result, log_sum)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, token_mask, result, log_sum = ctx.saved_tensors
        is_causal, scaling, chunk_size = ctx.options
        dtype = accumulation_dtype(v.dtype)
        dq, (dk, dv) = [], (torch.zeros_like(x, dtype=dtype) for x in (k, v))
        for rows, columns in _pairs(q.shape[2], k.shape[2], is_causal, chunk_size):
            queries, gradient = q[:, :, rows].to(dtype) * scaling, gradients[0][:, :, rows].to(dtype)
            mean = (gradient * result[:, :, rows].to(dtype)).sum(-1, keepdim=True)
            total = torch.zeros_like(queries)
            for keys in columns:
                these, values = k[:, :, keys].to(dtype), v[:, :, keys].to(dtype)
                logits = queries @ these.mT
                hidden = _hidden(rows, keys, k.shape[2] - q.shape[2], is_causal, token_mask, logits.device)
                if hidden is not None:
                    logits = logits.masked_fill(hidden, -torch.inf)
                weights = (logits - log_sum[:, :, rows]).exp()
                change = weights * (gradient @ values.mT - mean)  # of the logits
                dv[:, :, keys] += weights.mT @ gradient
                dk[:, :, keys] += change.mT @ queries
                total = total + change @ these
            dq.append(total * scaling)
        return torch.cat(dq, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _pairs(q_len: int, k_len: int, is_causal: bool, size: int) -> list[tuple[slice, list[slice]]]:
    """Chunks of queries, and for each the chunks of keys that it may see."""

    def chunks(length: int) -> list[slice]:
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]

    offset = k_len - q_len
    return [(rows, chunks(min(k_len, rows.stop + offset) if is_causal else k_len)) for rows in chunks(q_len)]


def _hidden(
    rows: slice, keys: slice, offset: int, is_causal: bool, token_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Which keys of a chunk which rows may not see: bool, broadcastable to `[B, H, rows, keys]`; None for no pair."""
    hidden = None if token_mask is None else ~token_mask[:, None, None, keys]
    if is_causal and keys.stop > rows.start + offset + 1:
        position = torch.arange(rows.start + offset, rows.stop + offset, device=device)[:, None]
        future = torch.arange(keys.start, keys.stop, device=device) > position
        hidden = future if hidden is None else hidden | future
    return hidden
