"""Windows, grids of blocks and strided patterns by the Triton block-sparse kernels: the same calls as their twins."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from hf_linear_attn.kernels.sparse.launch import block_tile, tiles_for
from hf_linear_attn.kernels.sparse.lists import BlockCSR
from hf_linear_attn.ops.base.compaction import CompactedCall
from hf_linear_attn.ops.base.memo import kept_lists
from hf_linear_attn.ops.sparse.attention import BlockGrid, Extra
from hf_linear_attn.ops.sparse.csr import Tiles, blocks_csr, window_csr
from hf_linear_attn.ops.sparse.patterns import BlockLists
from hf_linear_attn.ops.window.attention import Extra as WindowExtra
from hf_linear_attn.ops.window.attention import by_dilation

__all__ = [
    "block_sparse_attention",
    "column_attention",
    "merge_by_lse",
    "refusal",
    "sliding_window_attention",
    "strided_attention",
]

_MOST_DIM = 128


def refusal(q: torch.Tensor) -> str | None:
    """Why the kernels do not serve a call with queries `[B, H, Tq, D]`; None if they do."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, got {q.dtype}"
    if q.shape[-1] > _MOST_DIM:
        return f"the kernels take head_dim up to {_MOST_DIM}, got {q.shape[-1]}"
    return None


def merge_by_lse(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over two sets of keys from those over each: output `[B, H, T, D]` and log-sum-exp `[B, H, T]`.

    A row whose log-sum-exp is -1e30 in both has seen no key: 0, as it was.
    """
    lse = torch.logaddexp(lse1, lse2)
    share = (lse1 - lse).exp()[..., None], (lse2 - lse).exp()[..., None]
    return (o1 * share[0] + o2 * share[1]).to(o1.dtype), lse


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
    extra: WindowExtra | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """`ops.window.attention.sliding_window_attention` of checked arguments, which are the same, but the tiles."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d: int, part: WindowExtra | None) -> torch.Tensor:
        return _dilated(q, k, v, left, right, scaling, d, key_allowed, part, tiles)

    q, k, v = _one_dtype(q, k, v)
    return by_dilation(attend, q, k, v, dilation, extra)


def _dilated(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int,
    right: int,
    scaling: float,
    dilation: int,
    key_allowed: torch.Tensor | None,
    extra: WindowExtra | None,
    tiles: Tiles | None,
) -> torch.Tensor:
    (B, _, q_len, _), k_len = q.shape, k.shape[2]
    if dilation == 1 or k_len == 1:
        return _window(q, k, v, left, right, scaling, key_allowed, extra, tiles)[0]
    # Tokens of one residue class see each other only: classes become batch rows and the pattern a plain band.
    if key_allowed is None:
        key_allowed = torch.ones(1, k_len, dtype=torch.bool, device=q.device)
    key_allowed = _to_classes(key_allowed.expand(B, -1)[:, None, :, None], dilation)[:, 0, :, 0]
    if extra is not None:
        rows = extra[2].expand(B, -1, -1)  # [B, Tq or 1, G]
        if rows.shape[1] == q_len:
            rows = _to_classes(rows[:, None], dilation)[:, 0]
        else:
            rows = rows.repeat_interleave(dilation, dim=0)
        extra = (extra[0].repeat_interleave(dilation, 0), extra[1].repeat_interleave(dilation, 0), rows)
    q, k, v = (_to_classes(x, dilation) for x in (q, k, v))
    out, _ = _window(q, k, v, left, right, scaling, key_allowed, extra, tiles)
    return _from_classes(out, dilation, q_len)


def _to_classes(x: torch.Tensor, number: int) -> torch.Tensor:
    """`[B, C, T, D]` to `[B * number, C, ceil(T / number), D]`, padded in front: ends stay aligned."""
    x = F.pad(x, (0, 0, -x.shape[2] % number, 0))
    return x.unflatten(2, (-1, number)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def _from_classes(x: torch.Tensor, number: int, length: int) -> torch.Tensor:
    """The inverse of `_to_classes`: `[B, C, length, D]`."""
    x = x.unflatten(0, (-1, number)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return x[:, :, x.shape[2] - length :]


def _one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All in the dtype that the first, a query, promotes to with the others."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in tensors)


def _window(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int,
    right: int,
    scaling: float,
    key_allowed: torch.Tensor | None,
    extra: WindowExtra | None = None,
    tiles: Tiles | None = None,
    hole: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a plain window."""
    from hf_linear_attn.kernels.sparse.op import block_sparse_attention

    k_len = k.shape[2]
    lists = window_csr(
        q.shape[2], k_len, left, right, q.device, tiles=tiles or tiles_for(k.dtype, k.shape[-1]), hole=hole
    )
    columns = None if extra is None else (extra[0].to(k.dtype), extra[1].to(v.dtype), extra[2])
    k_pos = None
    if key_allowed is not None:
        k_pos = torch.where(key_allowed, torch.arange(k_len, device=q.device), -1).to(torch.int32)
    return block_sparse_attention(q, k, v, lists, scaling=scaling, k_pos=k_pos, extra=columns)


def block_sparse_attention(
    call: CompactedCall,
    grid: BlockGrid,
    lists: BlockLists | Callable[[], BlockLists],
    *,
    scaling: float,
    extra: Extra | None = None,
    kept_as: tuple[object, ...] | None = None,
    tile: int | None = None,
) -> torch.Tensor:
    """`ops.sparse.attention.block_sparse_attention`: the same arguments and more. Rows of padding are 0.

    Causal lists must show whole blocks of the past only, besides the own one.

    Args:
        lists: the lists, or a function that makes them.
        kept_as: a key under which the kernels' lists are kept and found, if they follow from it, the lengths and the
            device alone. It has to name the pattern and whatever else the lists come from.
        tile: queries, and keys, of a tile; None chooses.
    """
    from hf_linear_attn.kernels.sparse.op import block_sparse_attention as attend

    q, k, v = _one_dtype(call.q, call.k, call.v)
    q_len, k_len, size = q.shape[2], k.shape[2], tile or block_tile(q.dtype, q.shape[-1])

    def build() -> tuple[BlockCSR, bool, torch.Tensor | None]:
        made = lists() if callable(lists) else lists
        return blocks_csr(made, grid, q_len, k_len, tile=size), made.is_causal, made.full_rows

    if kept_as is None:
        csr, is_causal, full_rows = build()
    else:
        key = "blocks", kept_as, grid.block_size, q_len, k_len, q.device, size
        csr, is_causal, full_rows = kept_lists(key, q.device, build)
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
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """`ops.sparse.strided.strided_attention`: the same arguments, but the tiles of the lists.

    The neighbours are a window; the columns, with tokens grouped by column, leave out the neighbouring blocks of the
    own column, whose distances the window has. Both are merged by their log-sum-exps.
    """
    q, k, v = _one_dtype(q, k, v)
    near, near_lse = _window(q, k, v, stride, 0 if is_causal else stride, scaling, key_allowed, None, tiles)
    if stride >= k.shape[2] - 1:
        return near
    far, far_lse = _columns(q, k, v, stride, scaling, is_causal, key_allowed, (-1, 1), tiles)
    return merge_by_lse(near, near_lse, far, far_lse)[0]


def column_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    stride: int,
    scaling: float,
    is_causal: bool,
    key_allowed: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """`ops.sparse.strided.column_attention`: the same arguments, but the tiles of the lists."""
    q, k, v = _one_dtype(q, k, v)
    return _columns(q, k, v, stride, scaling, is_causal, key_allowed, None, tiles)[0]


def _columns(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    stride: int,
    scaling: float,
    is_causal: bool,
    key_allowed: torch.Tensor | None,
    hole: tuple[int, int] | None,
    tiles: Tiles | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, q_len, k_len = q.shape[0], q.shape[2], k.shape[2]
    if key_allowed is None and k_len % stride:  # empty places in front
        key_allowed = torch.ones(1, k_len, dtype=torch.bool, device=q.device)
    if key_allowed is not None:
        key_allowed = _to_classes(key_allowed.expand(B, -1)[:, None, :, None], stride)[:, 0, :, 0]
    q, k, v = (_to_classes(x, stride) for x in (q, k, v))
    length = k.shape[2]
    out, lse = _window(q, k, v, length, 0 if is_causal else length, scaling, key_allowed, None, tiles, hole)
    return _from_classes(out, stride, q_len), _from_classes(lse[..., None], stride, q_len)[..., 0]
