"""Which key blocks each block of queries sees: BigBird (arXiv:2007.14062), Sparse Transformer (arXiv:1904.10509).

Blocks are counted by rank among the real tokens. Lists are tensors, so that every row of a batch may have a
last block of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "CAUSAL",
    "EMPTY",
    "FULL",
    "TAIL",
    "BlockLists",
    "bigbird_lists",
    "hashed",
    "own_block_lists",
    "random_blocks",
    "sample_distinct",
]

# What of a listed block is seen: nothing (an unused slot), all of it, keys up to the query's own place in it, or
# its real tokens only (a sequence's last block).
EMPTY, FULL, CAUSAL, TAIL = range(4)


@dataclass(frozen=True)
class BlockLists:
    """The key blocks of R query blocks, in L slots each.

    The two tensors are a CSR matrix with rows padded to L: its `col_idx` and `kind` are the slots that are not
    EMPTY, and `row_ptr` counts them.

    Attributes:
        columns: long `[B or 1, H or 1, R, L]`, key blocks, none twice in a row; anything in an EMPTY slot.
        kind: long `[B or 1, R, L]`, the same for all heads.
        is_causal: whether any slot is CAUSAL.
        full_rows: long `[B or 1, F]`, query blocks that see every key, whatever their slots say: in a bucket of
            their own they do not make all rows as long as theirs. None when there are none.
    """

    columns: torch.Tensor
    kind: torch.Tensor
    is_causal: bool
    full_rows: torch.Tensor | None = None


def own_block_lists(row: torch.Tensor, blocks: torch.Tensor, is_causal: bool) -> BlockLists:
    """Every query sees its own block.

    Args:
        row: long `[B or 1, R]`, the query blocks.
        blocks: long `[B or 1]`, number of blocks of each sequence.
        is_causal: whether it sees keys up to itself only.
    """
    kind = torch.full_like(row, CAUSAL) if is_causal else torch.where(row == blocks[:, None] - 1, TAIL, FULL)
    return BlockLists(row[:, None, :, None], kind[..., None], is_causal)


def bigbird_lists(
    row: torch.Tensor,
    blocks: torch.Tensor,
    random: tuple[torch.Tensor, torch.Tensor],
    num_window_blocks: int,
    is_causal: bool,
) -> BlockLists:
    """BigBird's internal construction: the window, the first and last block, random blocks.

    Bidirectional: w // 2 blocks on each side; the first and the last block also see everything. Causal: the own
    block and w // 2 before it, the first block, random ones from the past.

    Args:
        row: long `[B or 1, R]`, the query blocks.
        blocks: long `[B or 1]`, number of blocks of each sequence.
        random: blocks `[B or 1, H or 1, R, r]` outside of all those, and which of them there are `[B or 1, R, r]`.
        num_window_blocks: w.
        is_causal: see above.
    """
    half = num_window_blocks // 2
    row, last = torch.broadcast_tensors(row, blocks[:, None] - 1)
    steps = torch.arange(0 if is_causal else half, -half - 1, -1, device=row.device)
    window = row[..., None] + steps  # [B or 1, R, W]
    inside = window >= 0
    if is_causal:
        kinds = [torch.where(inside, torch.where(steps == 0, CAUSAL, FULL), EMPTY)]
    else:
        inside = inside & (window <= last[..., None])
        kinds = [torch.where(inside, torch.where(window == last[..., None], TAIL, FULL), EMPTY)]
    ends = [(torch.zeros_like(row), row > half, FULL)]
    if not is_causal:
        ends.append((last, row + half < last, TAIL))
    columns = [window, *(block[..., None] for block, _, _ in ends)]
    kinds += [torch.where(seen, kind, EMPTY)[..., None] for _, seen, kind in ends]
    kinds.append(torch.where(random[1], FULL, EMPTY))
    batch, heads = max(random[0].shape[0], row.shape[0]), random[0].shape[1]
    shared = torch.cat(columns, dim=-1)[:, None].expand(batch, heads, -1, -1)
    kind = torch.cat([x.expand(batch, -1, -1) for x in kinds], dim=-1)
    full_rows = None if is_causal else torch.stack([torch.zeros_like(blocks), blocks - 1], dim=1)
    return BlockLists(torch.cat([shared, random[0].expand(batch, -1, -1, -1)], dim=-1), kind, is_causal, full_rows)


def random_blocks(
    row: torch.Tensor,
    blocks: torch.Tensor,
    *,
    codes: torch.Tensor,
    number: int,
    num_window_blocks: int,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks for `bigbird_lists`: functions of a head's code, of the block, and of how many blocks there are.

    Causal: of how many there are before the query's, which is its block again, so that a token keeps its keys
    when later ones arrive. Neither padding nor the other rows of a batch matter.

    Args:
        row: long `[B or 1, R]`, the query blocks.
        blocks: long `[B or 1]`, number of blocks of each sequence.
        codes: long `[H]`, numbers from `hashed`: heads of equal codes draw the same blocks.
        number: r, blocks to draw; fewer where fewer are left.
        num_window_blocks: w.
        is_causal: draw from the past only.

    Returns:
        blocks `[B or 1, H, R, r]`, and which of the r there are, bool `[B or 1, R, r]`.
    """
    half = num_window_blocks // 2
    after_window = row + half + 1
    left = (row - half - 1).clamp(min=0)  # blocks between the first one and the window
    right = torch.zeros_like(row) if is_causal else (blocks[:, None] - 1 - after_window).clamp(min=0)
    free = left + right
    code = hashed(codes[:, None] + row[:, None, :])  # [B or 1, H, R]
    index = sample_distinct(code, free[:, None], number)
    jump = (after_window - 1 - left)[:, None, :, None]
    column = 1 + index + torch.where(index < left[:, None, :, None], 0, jump)
    return column, torch.arange(number, device=row.device) < free[..., None]


def sample_distinct(code: torch.Tensor, size: torch.Tensor, number: int) -> torch.Tensor:
    """Sample without replacement, each sample a function of its code and size alone.

    Args:
        code: long, the codes from `hashed`.
        size: long, broadcastable to it: numbers are drawn from 0 .. size - 1.
        number: r, how many.

    Returns:
        long `[.., r]`, ascending; where size < r the last r - size entries mean nothing.
    """
    code, size = torch.broadcast_tensors(code, size)
    drawn = code.new_zeros(*code.shape, 0)
    for i in range(number):
        # One of the size - i numbers that are left: counted up past those already drawn.
        x = hashed(code + i) % (size - i).clamp(min=1)
        for taken in drawn.unbind(-1):
            x = x + (x >= taken)
        x = torch.where(i < size, x, size + i)
        drawn = torch.cat([drawn, x[..., None]], dim=-1).sort(-1).values
    return drawn


def hashed(x: torch.Tensor) -> torch.Tensor:
    """Scramble integers (long, >= 0) into 32 bits by multiplying and xor-shifting: the same on every device."""
    x = x & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF  # 27 bits times 32 bits: no overflow in int64
    return x ^ (x >> 16)
