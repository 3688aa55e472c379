"""Grids of blocks and strided patterns by the Triton block-sparse kernels: the same calls as their twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from hf_linear_attn.kernels.sparse.launch import block_tile
from hf_linear_attn.kernels.sparse.lists import BlockCSR
from hf_linear_attn.ops.base.compaction import CompactedCall
from hf_linear_attn.ops.base.memo import kept_lists
from hf_linear_attn.ops.base.pieces import merge
from hf_linear_attn.ops.sparse.csr import blocks_csr
from hf_linear_attn.ops.sparse.layout import BlockGrid, Extra
from hf_linear_attn.ops.sparse.patterns import BlockLists
from hf_linear_attn.ops.window.fused import one_dtype, plain_window
from hf_linear_attn.ops.window.layout import from_classes, to_classes

__all__ = ["block_sparse_attention", "column_attention", "strided_attention"]


def block_sparse_attention(
    call: CompactedCall,
    grid: BlockGrid,
    lists: BlockLists | Callable[[], BlockLists],
    *,
    scaling: float,
    extra: Extra | None = None,
    kept_as: tuple[object, ...] | None = None,
) -> torch.Tensor:
    """`ops.sparse.attention.block_sparse_attention`: the same arguments. Rows of padding are 0.

    Causal lists must show whole blocks of the past only, besides the own one.

    Args:
        lists: the lists, or a function that makes them.
        kept_as: a key under which the kernels' lists are kept and found, if they follow from it, the lengths and the
            device alone. It has to name the pattern and whatever else the lists come from.
    """
    from hf_linear_attn.kernels.sparse.op import block_sparse_attention as attend

    q, k, v = one_dtype(call.q, call.k, call.v)
    q_len, k_len, size = q.shape[2], k.shape[2], block_tile(q.dtype, q.shape[-1])

    def build() -> tuple[BlockCSR, bool, torch.Tensor | None]:
        made = lists() if callable(lists) else lists
        return blocks_csr(made, grid, q_len, k_len, tile=size), made.is_causal, made.full_rows

    # A decode step without padding has the lists of every token of its block, and is at another place in it.
    steps = q_len == 1 < k_len == call.tokens
    if kept_as is None:
        csr, is_causal, full_rows = build()
    else:
        length = ("blocks", -(-k_len // grid.block_size)) if steps else k_len
        key = "blocks", kept_as, grid.block_size, q_len, length, q.device, size
        csr, is_causal, full_rows = kept_lists(key, q.device, build)
        if steps:
            csr = replace(csr, q_start=torch.full((1,), k_len - 1, dtype=torch.int32, device=q.device))
    columns = shift = None
    if extra is not None:
        row = call.rank[:, k_len - q_len :] // grid.block_size
        seen = extra.seen(row, is_causal)
        if full_rows is not None:
            seen = seen & ~(row[..., None] == full_rows[:, None, :]).any(-1, keepdim=True)
        columns, shift = (extra.key.to(k.dtype), extra.value.to(v.dtype), seen), extra.shift
    return attend(q, k, v, csr, scaling=scaling, extra=columns, extra_shift=shift)[0]


def strided_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    stride: int,
    scaling: float,
    is_causal: bool,
    key_allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.sparse.strided.strided_attention`: the same arguments.

    The neighbors are a window; the columns, with tokens grouped by column, leave out the neighboring blocks of the
    own column, whose distances the window has. Both are merged by their log-sum-exps.
    """
    q, k, v = one_dtype(q, k, v)
    near, near_lse = plain_window(q, k, v, stride, 0 if is_causal else stride, scaling, key_allowed)
    if stride >= k.shape[2] - 1:
        return near
    far, far_lse = _columns(q, k, v, stride, scaling, is_causal, key_allowed, (-1, 1))
    return merge((near, near_lse), (far, far_lse))[0].to(q.dtype)


def column_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    stride: int,
    scaling: float,
    is_causal: bool,
    key_allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.sparse.strided.column_attention`: the same arguments."""
    q, k, v = one_dtype(q, k, v)
    return _columns(q, k, v, stride, scaling, is_causal, key_allowed, None)[0]


def _columns(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    stride: int,
    scaling: float,
    is_causal: bool,
    key_allowed: torch.Tensor | None,
    hole: tuple[int, int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, q_len, k_len = q.shape[0], q.shape[2], k.shape[2]
    if key_allowed is None and k_len % stride:  # empty places in front
        key_allowed = torch.ones(1, k_len, dtype=torch.bool, device=q.device)
    if key_allowed is not None:
        key_allowed = to_classes(key_allowed.expand(B, -1)[:, None, :, None], stride)[:, 0, :, 0]
    q, k, v = (to_classes(x, stride) for x in (q, k, v))
    length = k.shape[2]
    out, lse = plain_window(q, k, v, length, 0 if is_causal else length, scaling, key_allowed, hole=hole)
    return from_classes(out, stride, q_len), from_classes(lse[..., None], stride, q_len)[..., 0]
