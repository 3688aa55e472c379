"""Lists of key tiles for the block-sparse kernels: sliding windows.

All of it is arithmetic on tensors whose shapes follow from the arguments: nothing waits for the device, and a compiled
graph contains it. Lists that depend on lengths alone are kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_linear_attn.kernels.sparse.lists import ANYWHERE, BlockCSR
from hf_linear_attn.ops.base.memo import kept_lists

__all__ = ["Tiles", "compress", "window_csr"]

# Tiles of rows' and of columns' lists.
Tiles = tuple[tuple[int, int], tuple[int, int]]


def window_csr(
    q_len: int,
    k_len: int,
    left: int,
    right: int,
    device: torch.device,
    *,
    tiles: Tiles,
    hole: tuple[int, int] | None = None,
) -> BlockCSR:
    """Query at position p = Tk - Tq + r sees keys from p - left to p + right, without those of a hole.

    Args:
        q_len: Tq.
        k_len: Tk, at least Tq.
        left, right: >= 0, in tokens.
        device: of the lists.
        tiles: queries and keys of a tile, in the lists of rows and in those of columns.
        hole: distances query - key, from least to greatest, that are not seen.
    """

    def kept(length: int) -> BlockCSR:
        reach = min(left, length), min(right, length)
        key = "window", q_len, length, *reach, device, tiles, hole
        return kept_lists(key, device, lambda: _window_csr(q_len, length, *reach, device, tiles, hole))

    if not (q_len == 1 < k_len <= left and hole is None):
        return kept(k_len)
    # A decode step that sees everything: the lists of as many tiles, the last one partly filled, at its own place.
    size = min(n for _, n in tiles)
    start = torch.full((1,), k_len - 1, dtype=torch.int32, device=device)
    return replace(kept(max(2, (k_len - 1) // size * size + 1)), q_start=start, q_first=start)


def _window_csr(
    q_len: int,
    k_len: int,
    left: int,
    right: int,
    device: torch.device,
    tiles: Tiles,
    hole: tuple[int, int] | None,
) -> BlockCSR:
    offset = k_len - q_len

    def entries(tile: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """Row tile, column tile, whether it is FULL and whether it is one: `[1, 1, E]` each."""
        (m, n), num_cols = tile, -(-k_len // tile[1])
        row = torch.arange(-(-q_len // m), device=device)[:, None]
        first = offset + row * m
        last = (first + m - 1).clamp(max=k_len - 1)
        slots = min(num_cols, (m + left + right - 2) // n + 2)
        col = (first - left).clamp(min=0) // n + torch.arange(slots, device=device)
        k_first, k_last = col * n, col * n + n - 1
        valid = k_first <= (last + right).clamp(max=k_len - 1)
        full = (k_first >= last - left) & (k_last <= first + right) & (k_last < k_len)
        if hole is not None:  # distances in a tile: first - k_last .. last - k_first
            full = full & ((first - k_last > hole[1]) | (last - k_first < hole[0]))
            valid = valid & ~((first - k_last >= hole[0]) & (last - k_first <= hole[1]))
        return tuple(x.reshape(1, 1, -1) for x in (row.expand_as(col), col, full, valid))

    sizes = [(-(-q_len // m), -(-k_len // n)) for m, n in tiles]
    row, col, full, valid = entries(tiles[0])
    rows, col_idx, _ = compress(row, col, full, valid, None, *sizes[0])
    row, col, full, valid = entries(tiles[1])
    cols, row_idx, _ = compress(col, row, full, valid, None, *sizes[1][::-1])
    band = (-right if right < k_len else -ANYWHERE, left if left < k_len else ANYWHERE)
    start = torch.full((1,), offset, dtype=torch.int32, device=device) if offset else None
    return BlockCSR(
        rows=rows,
        col_idx=col_idx,
        cols=cols,
        row_idx=row_idx,
        tile=tiles[0],
        tile_t=tiles[1],
        band=None if band == (-ANYWHERE, ANYWHERE) else band,
        hole=hole,
        q_start=start,
        q_first=start,
    )


def compress(
    major: torch.Tensor,
    minor: torch.Tensor,
    full: torch.Tensor,
    valid: torch.Tensor,
    bits: torch.Tensor | None,
    num_major: int,
    num_minor: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Begin, first FULL entry and end `[.., num_major, 3]` of each list, the minor tiles, and their bits."""
    unused = 2 * num_major * num_minor
    code = torch.where(valid, (major * 2 + full) * num_minor + minor, unused)
    code, order = code.sort(dim=-1)
    bounds = torch.arange(2 * num_major + 1, device=code.device) * num_minor
    at = torch.searchsorted(code, bounds.expand(*code.shape[:-1], -1).contiguous()).to(torch.int32)
    pointers = torch.stack([at[..., :-1:2], at[..., 1::2], at[..., 2::2]], dim=-1).contiguous()
    index = (code % num_minor).to(torch.int32).contiguous()
    return pointers, index, None if bits is None else bits.gather(-1, order).to(torch.int32).contiguous()
