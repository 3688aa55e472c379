"""Block-sparse softmax attention over lists of key blocks, in plain PyTorch.

The blocks that a list names are gathered and go through `scaled_dot_product_attention` with a mask: the logits are
never held in memory, and what is gathered at once is bounded, so that memory stays near that of q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.backend import use_triton
from hf_linear_attn.ops.band_attention import serves
from hf_linear_attn.ops.block_patterns import CAUSAL, EMPTY, FULL, TAIL, BlockLists
from hf_linear_attn.ops.block_segments import Piece, attend_segments
from hf_linear_attn.ops.compaction import CompactedCall, take_tokens

__all__ = [
    "ANYONE",
    "NOBODY",
    "BlockGrid",
    "Extra",
    "block_grid",
    "block_sparse_attention",
    "global_columns",
    "naive_block_sparse_attention",
    "segment_rows",
]

# In `Extra.block`: a column that every query sees, and one that is not there.
ANYONE, NOBODY = -1, -2

# Bounds on the elements gathered at once. Blocks of memory above 32 MiB are returned to the system by the usual
# allocator and cost page faults at each use: smaller segments measured up to 100 times faster to gather.
SEGMENT_ELEMENTS = 1 << 22
SEGMENT_PER_INPUT = 4
# All keys are read behind a mask, not gathered, while they are at most so many times as many (measured on CPU).
DENSE_FACTOR = 1.2


@dataclass(frozen=True)
class Extra:
    """G columns that queries of other blocks see besides their lists: later blocks when causal, else all others.

    Attributes:
        key, value: `[B, H, G, D]`.
        block: long `[B or 1, G]`, the block that a column belongs to, whose own queries have it in their lists.
        shift: `[H]`, added to the logits of these columns, or None.
    """

    key: torch.Tensor
    value: torch.Tensor
    block: torch.Tensor
    shift: torch.Tensor | None = None

    def seen(self, row: torch.Tensor, is_causal: bool) -> torch.Tensor:
        """Which of the query blocks `row` `[B or 1, R]` sees which column: bool `[B or 1, R, G]`."""
        block = self.block[:, None]
        return ((block < row[..., None]) if is_causal else (block != row[..., None])) & (block != NOBODY)


@dataclass(frozen=True)
class BlockGrid:
    """Where the queries and keys of a compacted call stand in a grid of blocks, by their ranks.

    Attributes:
        block_size: b, tokens per block.
        row: long `[B or 1, R]`, the block of each tile of queries.
        place: long `[B or 1, t]`, where the t queries of a tile stand in their block.
        start: long `[B or 1]`, place of the token of rank 0 among the keys.
        count: long `[B or 1]`, real tokens among the keys.
        source: long `[B or 1, R * t]`, the query at each place of the tiles; None when it is that place.
        back: long `[B or 1, Tq]`, the place of each query; None likewise.
    """

    block_size: int
    row: torch.Tensor
    place: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    source: torch.Tensor | None
    back: torch.Tensor | None

    @property
    def blocks(self) -> torch.Tensor:
        """Number of blocks of each sequence, at least 1: long `[B or 1]`."""
        return (-(-self.count // self.block_size)).clamp(min=1)

    def tiles(self, q: torch.Tensor) -> torch.Tensor:
        """Queries `[B, H, Tq, D]` as `[B, R, H, t, D]`; places without a query hold anything finite."""
        R, t = self.row.shape[1], self.place.shape[1]
        if self.source is not None:
            q = take_tokens(q, self.source.expand(q.shape[0], -1))
        elif R * t != q.shape[2]:
            q = F.pad(q, (0, 0, 0, R * t - q.shape[2]))
        return q.unflatten(2, (R, t)).transpose(1, 2)

    def untile(self, out: torch.Tensor, q_len: int) -> torch.Tensor:
        """The inverse of `tiles`."""
        out = out.transpose(1, 2).flatten(2, 3)
        return out[:, :, :q_len] if self.back is None else take_tokens(out, self.back.expand(out.shape[0], -1))


def block_grid(call: CompactedCall, block_size: int, *, aligned: bool) -> BlockGrid:
    """The grid of blocks of `block_size` ranks.

    Args:
        call: the compacted call.
        block_size: b, in tokens.
        aligned: whether the call has neither padding nor earlier keys; its blocks are then slices.
    """
    q_len, k_len, device = call.q.shape[2], call.k.shape[2], call.q.device
    start, count = -call.rank[:, 0], call.rank[:, -1] + 1
    rank = call.rank[:, k_len - q_len :]
    if q_len == 1:  # decoding: one query is a tile, not a block of which one row counts
        rank = rank.clamp(min=0)
        return BlockGrid(block_size, rank // block_size, rank % block_size, start, count, None, None)
    # Queries after earlier keys may begin in the middle of a block.
    num_tiles = -(-q_len // block_size) if q_len == k_len else (q_len + block_size - 2) // block_size + 1
    first = rank[:, :1].clamp(min=0) // block_size
    row = first + torch.arange(num_tiles, device=device)
    place = torch.arange(block_size, device=device)[None]
    if aligned:
        return BlockGrid(block_size, row, place, start, count, None, None)
    shift = first * block_size - rank[:, :1]  # from a place in the tiles to a query
    source = (torch.arange(num_tiles * block_size, device=device) + shift).clamp(0, q_len - 1)
    back = (torch.arange(q_len, device=device) - shift).clamp(min=0)
    return BlockGrid(block_size, row, place, start, count, source, back)


def segment_rows(row_elements: int, input_elements: int) -> int:
    """How many rows of a grid to go through at once, at `row_elements` elements of working memory each."""
    return max(1, min(SEGMENT_ELEMENTS, SEGMENT_PER_INPUT * input_elements) // row_elements)


def block_sparse_attention(
    call: CompactedCall,
    grid: BlockGrid,
    lists: BlockLists | Callable[[], BlockLists],
    *,
    scaling: float,
    extra: Extra | None = None,
    kept_as: tuple[object, ...] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention of every query over the real keys of the blocks listed for its own block.

    Args:
        call: queries, keys and values with their padding in front.
        grid: of that call.
        lists: for the R query blocks of the grid, or what makes them.
        scaling: factor of the logits.
        extra: columns seen in addition to the listed blocks; not by `full_rows`.
        kept_as: a key under which the kernels' form of the lists is kept and found, if they follow from it, the lengths
            and the device; None keeps nothing.
        backend: what runs it, see `ops.backend`.

    Returns:
        `[B, H, Tq, D]` in the compacted order. Rows of padding are finite.

    Raises:
        RuntimeError: for `backend="triton"` where the kernels cannot run.
    """
    if use_triton(backend, call.q):
        from hf_linear_attn.ops import fused_block_sparse as fused  # which takes grids from here

        if use_triton(backend, call.q, fused.refusal(call.q)):
            return fused.block_sparse_attention(call, grid, lists, scaling=scaling, extra=extra, kept_as=kept_as)
    lists = lists() if callable(lists) else lists
    q, k, v = grid.tiles(call.q), call.k, call.v
    (B, R, H, _, D), L = q.shape, lists.columns.shape[-1]
    if extra is None and _dense_is_cheaper(lists, R, -(-k.shape[2] // grid.block_size)):
        return grid.untile(_attend_behind_mask(q, call, grid, lists, scaling), call.q.shape[2])
    width = L * grid.block_size + (0 if extra is None else extra.key.shape[2])
    shift = None
    if extra is not None and extra.shift is not None:
        shift = extra.shift.to(q.dtype)[:, None, None].expand(-1, 1, extra.key.shape[2])
        shift = F.pad(shift, (0, L * grid.block_size))
    # The op of its own has no gradient of the shift, and a compiled graph holds no such op.
    on_its_own = serves(q, v) and not (shift is not None and shift.requires_grad) and not torch.compiler.is_compiling()
    # It has keys, values and their gradients in hand: half as many at once measured up to 1.2 times faster.
    step = segment_rows((1 + on_its_own) * B * H * D * width, call.q.numel())
    segments = partial(_segments, lists, grid, extra, shift, k.shape[2], step)
    columns = None if extra is None else (extra.key, extra.value)
    if on_its_own:
        out = attend_segments(q, k, v, columns, segments, scaling)
    else:
        outputs = []
        for part, places, shift, seen in segments():
            keys, values = _gather_tokens(k, places), _gather_tokens(v, places)
            if columns is not None:
                shared = (x[:, None].expand(-1, keys.shape[1], -1, -1, -1) for x in columns)
                keys, values = (torch.cat(pair, dim=3) for pair in zip(shared, (keys, values), strict=True))
            outputs.append(_attend(q[:, part], keys, values, seen, scaling, shift))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    if lists.full_rows is not None:
        out = _place_full_rows(out, q, call, grid, lists.full_rows, scaling)
    return grid.untile(out, call.q.shape[2])


def global_columns(call: CompactedCall, tokens: torch.Tensor, shift: torch.Tensor, scaling: float) -> Extra:
    """G columns for all: additional tokens that read the whole sequence, with what each has read as its value.

    Args:
        call: the compacted call; not causal.
        tokens: `[H, 2, G, D]`, their queries and keys.
        shift: `[H]`, added to the logits of the columns.
        scaling: factor of the logits.
    """
    B = call.k.shape[0]
    query, key = tokens.to(call.k.dtype).expand(B, -1, -1, -1, -1).unbind(2)
    real = call.rank >= 0
    mask = (real | ~real.any(-1, keepdim=True)).expand(B, -1)[:, None, None, :]
    read = F.scaled_dot_product_attention(query, call.k, call.v, attn_mask=mask, scale=scaling)
    return Extra(key, read, torch.full((1, key.shape[2]), ANYONE, device=key.device), shift)


def _dense_is_cheaper(lists: BlockLists, rows: int, blocks: int) -> bool:
    """Whether `rows` tiles of queries over all of so many key blocks cost less than gathering what their lists name."""
    full = 0 if lists.full_rows is None else lists.full_rows.shape[1]
    listed = rows * lists.columns.shape[-1] + full * blocks
    return not lists.is_causal and rows * blocks <= DENSE_FACTOR * listed


def _attend_behind_mask(
    q: torch.Tensor, call: CompactedCall, grid: BlockGrid, lists: BlockLists, scaling: float
) -> torch.Tensor:
    """Tiles of queries `[B, R, H, t, D]` over all keys, those of blocks not listed hidden; returns their shape."""
    B, _, H, _, _ = q.shape
    T = call.k.shape[2]
    blocks = -(-T // grid.block_size)
    listed = (lists.kind != EMPTY)[:, None]  # [B or 1, 1, R, L]
    column, listed = torch.broadcast_tensors(lists.columns.masked_fill(~listed, blocks), listed)
    seen = torch.zeros(*column.shape[:3], blocks + 1, dtype=torch.bool, device=q.device).scatter_(-1, column, True)
    if lists.full_rows is not None:
        seen = seen | (grid.row[..., None] == lists.full_rows[:, None]).any(-1)[:, None, :, None]
    block = call.rank.div(grid.block_size, rounding_mode="floor").clamp(min=0)[:, None, None]
    batch = max(seen.shape[0], block.shape[0])
    seen = seen.expand(batch, -1, -1, -1).gather(-1, block.expand(batch, *seen.shape[1:3], -1))
    seen = seen & (call.rank >= 0)[:, None, None]  # [B or 1, H or 1, R, Tk]
    seen = (seen | ~seen.any(-1, keepdim=True)).expand(B, H, -1, -1)
    out = [
        F.scaled_dot_product_attention(tile, call.k, call.v, attn_mask=seen[:, :, r : r + 1], scale=scaling)
        for r, tile in enumerate(q.unbind(1))
    ]
    return torch.stack(out, 1)


def _segments(
    lists: BlockLists,
    grid: BlockGrid,
    extra: Extra | None,
    shift: torch.Tensor | None,
    k_len: int,
    step: int,
) -> Iterator[Piece]:
    """The tiles of a grid, `step` at a time, with the keys of their lists."""
    for begin in range(0, lists.columns.shape[2], step):
        part = slice(begin, begin + step)
        allowed = _allowed(lists.kind[:, part], grid, lists.is_causal)  # [B or 1, R, t or 1, L * b]
        if extra is not None:
            seen = extra.seen(grid.row[:, part], lists.is_causal)
            batch = max(seen.shape[0], allowed.shape[0])
            seen = seen[:, :, None].expand(batch, allowed.shape[1], allowed.shape[2], -1)
            allowed = torch.cat([seen, allowed.expand(batch, -1, -1, -1)], dim=-1)
        # A row without any key would be nan; nobody reads it.
        yield part, _places(lists.columns[:, :, part], grid, k_len), shift, allowed | ~allowed.any(-1, keepdim=True)


def _places(columns: torch.Tensor, grid: BlockGrid, k_len: int) -> torch.Tensor:
    """Tokens of the blocks `columns` `[B or 1, H or 1, R, L]`: long `[B or 1, H or 1, R, L * b]`."""
    inside = torch.arange(grid.block_size, device=columns.device)
    first = grid.start[:, None, None, None] + columns * grid.block_size
    return (first[..., None] + inside).flatten(3).clamp(0, k_len - 1)


def _gather_tokens(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Tokens `places` `[B or 1, H or 1, R, K]` of x `[B, H, T, D]`: `[B, R, H, K, D]`."""
    B, H, T, D = x.shape
    _, heads, R, K = places.shape
    index = places.expand(B, -1, -1, -1)
    if heads == 1:  # all heads of a token lie together
        taken = take_tokens(x, index.flatten(1)).unflatten(2, (R, -1))
        return taken.transpose(1, 2)
    rows = torch.arange(B * H, device=x.device).view(B, H, 1, 1) * T + index
    taken = x.reshape(B * H * T, D).index_select(0, rows.transpose(1, 2).flatten())
    return taken.view(B, R, H, K, D)


def _allowed(kind: torch.Tensor, grid: BlockGrid, is_causal: bool) -> torch.Tensor:
    """Which keys of the listed blocks are seen: bool `[B or 1, R, t or 1, L * b]`."""
    inside = torch.arange(grid.block_size, device=kind.device)
    tail = grid.count - (grid.blocks - 1) * grid.block_size
    real = inside < tail[:, None, None, None]
    kind = kind[..., None]
    allowed = ((kind == FULL) | ((kind == TAIL) & real)).flatten(2)[:, :, None]
    if not is_causal:
        return allowed
    past = inside <= grid.place[:, None, :, None, None]  # [B or 1, 1, t, 1, b]
    return allowed | ((kind == CAUSAL)[:, :, None] & past).flatten(3)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scaling: float,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """q `[B, R, H, t, D]`, k and v `[B, R, H, K, D]`, seen `[B or 1, R, t or 1, K]`; returns q's shape.

    Every query sees a key. `shift` `[H, 1, K]` is added to the logits.
    """
    mask = seen.expand(q.shape[0], -1, -1, -1).flatten(0, 1)[:, None]
    if shift is not None:
        mask = torch.where(mask, shift, float("-inf"))
    tiles = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling).unflatten(0, tiles)


def _place_full_rows(
    out: torch.Tensor, q: torch.Tensor, call: CompactedCall, grid: BlockGrid, full_rows: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`out` `[B, R, H, t, D]` with the rows that see every key computed over all of them."""
    (B, R), t = q.shape[:2], q.shape[3]
    tile = (full_rows - grid.row[:, :1]).expand(B, -1)  # [B, F]; outside 0 .. R - 1 when not in this call
    picked = q[torch.arange(B, device=q.device)[:, None], tile.clamp(0, R - 1)]  # [B, F, H, t, D]
    query = picked.transpose(1, 2).flatten(2, 3)[:, None]  # [B, 1, H, F * t, D]
    allowed = call.rank[:, None, None, :] >= 0
    allowed = allowed | ~allowed.any(-1, keepdim=True)
    rows = _attend(query, call.k[:, None], call.v[:, None], allowed, scaling)[:, 0].unflatten(2, (-1, t))
    for f in range(tile.shape[1]):
        hit = torch.arange(R, device=q.device) == tile[:, f : f + 1]
        out = torch.where(hit[:, :, None, None, None], rows[:, :, f][:, None], out)
    return out


def naive_block_sparse_attention(
    call: CompactedCall, grid: BlockGrid, lists: BlockLists, *, scaling: float, extra: Extra | None = None
) -> torch.Tensor:
    """Dense O(n^2) evaluation of `block_sparse_attention`, for tests and inspection; same arguments."""
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
