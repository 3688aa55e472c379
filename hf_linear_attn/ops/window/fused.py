"""Sliding windows by the Triton block-sparse kernels."""

from __future__ import annotations

import torch

from hf_linear_attn.kernels.sparse.launch import tiles_for
from hf_linear_attn.ops.window.csr import window_csr
from hf_linear_attn.ops.window.layout import Extra, by_dilation

__all__ = ["one_dtype", "plain_window", "refusal", "sliding_window_attention"]

_MOST_DIM = 128


def refusal(q: torch.Tensor) -> str | None:
    """Why the kernels do not serve a call with queries `[B, H, Tq, D]`; None if they do."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, got {q.dtype}"
    if q.shape[-1] > _MOST_DIM:
        return f"the kernels take head_dim up to {_MOST_DIM}, got {q.shape[-1]}"
    return None


def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    left: int,
    right: int,
    scaling: float,
    dilation: int | tuple[int, ...] = 1,
    key_allowed: torch.Tensor | None = None,
    extra: Extra | None = None,
) -> torch.Tensor:
    """`window.attention.sliding_window_attention` of checked arguments, which are the same."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None, part: Extra | None
    ) -> torch.Tensor:
        return plain_window(q, k, v, left, right, scaling, allowed, part)[0]

    q, k, v = one_dtype(q, k, v)
    return by_dilation(attend, q, k, v, dilation, key_allowed, extra)


def plain_window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int,
    right: int,
    scaling: float,
    key_allowed: torch.Tensor | None,
    extra: Extra | None = None,
    hole: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a plain window."""
    from hf_linear_attn.kernels.sparse.op import block_sparse_attention

    if q.shape[2] == 1 and (begin := k.shape[2] - 1 - left) > 0:  # the same lists for every length
        k, v = k[:, :, begin:], v[:, :, begin:]
        key_allowed = None if key_allowed is None else key_allowed[:, begin:]
    k_len = k.shape[2]
    lists = window_csr(q.shape[2], k_len, left, right, q.device, tiles=tiles_for(k.dtype, k.shape[-1]), hole=hole)
    columns = None if extra is None else (extra[0].to(k.dtype), extra[1].to(v.dtype), extra[2])
    k_pos = None
    if key_allowed is not None:
        k_pos = torch.where(key_allowed, torch.arange(k_len, device=q.device), -1).to(torch.int32)
    return block_sparse_attention(q, k, v, lists, scaling=scaling, k_pos=k_pos, extra=columns)


def one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All in the dtype that the first, a query, promotes to with the others; under autocast in its dtype.

    That is what PyTorch's own attention takes then, which rotary embeddings in float32 would keep from half precision.
    """
    dtype, device = tensors[0].dtype, tensors[0].device.type
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in tensors)
