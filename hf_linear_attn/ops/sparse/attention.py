"""Block-sparse softmax attention over lists of key blocks, in plain PyTorch.

The blocks that a list names are gathered and go through `scaled_dot_product_attention` with a mask: the logits are
never held in memory, and what is gathered at once is bounded, so that memory stays near that of q, k and v.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.backend import use_triton
from hf_linear_attn.ops.base.compaction import CompactedCall, heads_apart, take_tokens
from hf_linear_attn.ops.base.memo import kept_lists
from hf_linear_attn.ops.base.pieces import serves
from hf_linear_attn.ops.base.tracing import blocks_of, is_exported
from hf_linear_attn.ops.sparse.blocks import Tiled, Tiles, attend_tiles
from hf_linear_attn.ops.sparse.layout import NOBODY, BlockGrid, Extra
from hf_linear_attn.ops.sparse.patterns import CAUSAL, EMPTY, FULL, TAIL, BlockLists
from hf_linear_attn.ops.window.attention import attend_blocks, in_front

__all__ = [
    "NOBODY",
    "BlockGrid",
    "Extra",
    "block_sparse_attention",
    "gather_tokens",
    "segment_rows",
]

# Bounds on the elements gathered at once. Blocks of memory above 32 MiB are returned to the system by the usual
# allocator and cost page faults at each use: smaller segments measured up to 100 times faster to gather.
SEGMENT_ELEMENTS = 1 << 22
SEGMENT_PER_INPUT = 4
# The same for keys, and for values, that are gathered into memory which is used again: it should stay in cache.
CACHED_ELEMENTS = 1 << 19
# All keys are read behind a mask, not gathered, while they are at most so many times as many (measured on CPU).
DENSE_FACTOR = 1.3


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
        backend: what runs it, see `ops.base.backend`.

    Returns:
        `[B, H, Tq, D]` in the compacted order. Rows of padding are finite.

    Raises:
        RuntimeError: for `backend="triton"` where the kernels cannot run.
    """
    if use_triton(backend, call.q):
        from hf_linear_attn.ops.sparse import fused
        from hf_linear_attn.ops.window.fused import refusal

        if use_triton(backend, call.q, refusal(call.q)):
            return fused.block_sparse_attention(call, grid, lists, scaling=scaling, extra=extra, kept_as=kept_as)
    if callable(lists):
        key = "lists", kept_as, grid.block_size, call.q.shape[2], call.k.shape[2], call.q.device
        keeps = kept_as is not None and grid.aligned  # those of a decode step serve no other
        lists = kept_lists(key, call.q.device, lists) if keeps else lists()
    if is_exported() and not lists.is_causal:
        return _attend_dense(call, grid, lists, scaling, extra)
    q, shift = grid.tiles(call.q), None
    B, R, H, _, D = q.shape
    width, G = lists.columns.shape[-1] * grid.block_size, 0 if extra is None else extra.key.shape[2]
    if extra is not None and extra.shift is not None:
        shift = F.pad(extra.shift.to(q.dtype)[:, None, None].expand(-1, 1, G), (0, width))
    listed, row_elements = _Listed(lists, grid, extra, shift, call.k.shape[2]), B * H * D * (G + width)
    full = None
    # The op of its own has no gradient of the shift, a compiled graph holds no such op, and it copies each key.
    on_its_own = serves(q, call.v) and not (shift is not None and shift.requires_grad) and R * width >= call.k.shape[2]
    if on_its_own and not torch.compiler.is_compiling():
        full, step = listed.full_tiles(), segment_rows(2 * row_elements, call.q.numel())
        step = min(step, max(1, CACHED_ELEMENTS // row_elements))
        tiles = partial(_tiles, listed, full or set(), step)
        columns = None if extra is None else (extra.key, extra.value)
        keys, values = grid.in_blocks(call.k), grid.in_blocks(call.v)
        out = attend_tiles(q, keys, values, columns, tiles, scaling, grid.block_size)
    else:
        out = _attend_gathered(q, call, listed, segment_rows(row_elements, call.q.numel()), scaling)
    if lists.full_rows is not None and full is None:
        out = _place_full_rows(out, q, call, grid, lists.full_rows, scaling)
    return grid.untile(out, call.q.shape[2])


def _dense_is_cheaper(lists: BlockLists, rows: int, blocks: int) -> bool:
    """Whether `rows` tiles of queries over all of so many key blocks cost less than gathering what their lists name."""
    full = 0 if lists.full_rows is None else lists.full_rows.shape[1]
    listed = (rows - full) * lists.columns.shape[-1] + full * blocks
    return not lists.is_causal and rows * blocks <= DENSE_FACTOR * listed


@dataclass(frozen=True)
class _Listed:
    """What tiles of a grid see of the columns and of k_len keys; `shift` `[H, 1, G + L * b]` is added to the logits."""

    lists: BlockLists
    grid: BlockGrid
    extra: Extra | None
    shift: torch.Tensor | None
    k_len: int

    @property
    def blocks(self) -> int:
        return -(-self.k_len // self.grid.block_size)

    def full_tiles(self) -> set[int] | None:
        """The tiles that see every key, if they are the same in all rows of the batch; None if they may differ."""
        full_rows, row = self.lists.full_rows, self.grid.row
        if full_rows is None:
            return set()
        return set((full_rows - row[:, :1])[0].tolist()) if len(full_rows) == len(row) == 1 else None

    def pieces(self, begin: int, end: int, step: int) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Tiles begin .. end, `step` at a time, the blocks of their lists and which columns and keys are seen."""
        # The same for all queries of a tile and without columns, of which there may be many, what is seen is small.
        of_all = None if self.lists.is_causal or self.extra is not None else self.seen(slice(begin, end))
        for first in range(begin, end, step):
            part = slice(first, min(first + step, end))
            seen = self.seen(part) if of_all is None else of_all[:, part.start - begin : part.stop - begin]
            yield part, self.lists.columns[:, :, part].clamp(0, self.blocks - 1), seen

    def seen(self, part: slice) -> torch.Tensor:
        """Which columns and listed keys are seen by some tiles: bool `[B or 1, r, t or 1, G + L * b]`."""
        lists, grid = self.lists, self.grid
        allowed = _allowed(lists.kind[:, part], grid, lists.is_causal)
        if self.extra is not None:
            seen = self.extra.seen(grid.row[:, part], lists.is_causal)
            batch = max(seen.shape[0], allowed.shape[0])
            seen = seen[:, :, None].expand(batch, allowed.shape[1], allowed.shape[2], -1)
            allowed = torch.cat([seen, allowed.expand(batch, -1, -1, -1)], dim=-1)
        return allowed | ~allowed.any(-1, keepdim=True)  # a row without any key would be nan; nobody reads it

    def blocks_seen(self) -> torch.Tensor:
        """Which block is listed for which tile: bool `[B or 1, H or 1, R, blocks]`."""
        there = (self.lists.kind != EMPTY)[:, None]
        column, there = torch.broadcast_tensors(self.lists.columns.masked_fill(~there, self.blocks), there)
        seen = torch.zeros(*column.shape[:3], self.blocks + 1, dtype=torch.bool, device=column.device)
        return seen.scatter_(-1, column, True)[..., :-1]


def _tiles(listed: _Listed, full: set[int], step: int, of: Tiled) -> Iterator[Tiles]:
    """All tiles: neighbors that see every key as one, the others with their lists or, if that is cheaper, a mask."""
    size, count, tiles = listed.grid.block_size, listed.grid.count, range(listed.lists.columns.shape[2])
    real = torch.arange(listed.blocks * size, device=count.device) < count.clamp(min=1)[:, None]
    real = real[:, None, None]  # [B or 1, 1, 1, keys]
    all_real = None if bool(real.all()) else real
    seen = None
    if listed.extra is None and _dense_is_cheaper(listed.lists, len(tiles), listed.blocks):
        seen = listed.blocks_seen()
        full = full.union(seen.all(-1).flatten(0, 1).all(0).nonzero().flatten().tolist())
    for is_full, neighbors in itertools.groupby(tiles, key=full.__contains__):
        some = list(neighbors)
        if is_full:
            yield Tiles(of, slice(some[0], some[-1] + 1), None, all_real)
        elif seen is None:
            for given in listed.pieces(some[0], some[-1] + 1, step):
                yield Tiles(of, *given, listed.shift)
        else:
            for r in some:
                of_tile = seen[:, :, r : r + 1].repeat_interleave(size, -1) & real
                yield Tiles(of, slice(r, r + 1), None, of_tile | ~of_tile.any(-1, keepdim=True))


def _attend_gathered(q: torch.Tensor, call: CompactedCall, listed: _Listed, step: int, scaling: float) -> torch.Tensor:
    """What tiles of queries `[B, R, H, t, D]` read, by autograd; returns their shape."""
    outputs = []
    for part, columns, seen in listed.pieces(0, q.shape[1], step):
        places = _places(columns, listed.grid, listed.k_len)
        keys, values = gather_tokens(call.k, places), gather_tokens(call.v, places)
        if listed.extra is not None:
            keys, values = in_front(listed.extra.key, keys), in_front(listed.extra.value, values)
        outputs.append(attend_blocks(q[:, part], keys, values, seen, scaling, listed.shift))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend_dense(
    call: CompactedCall, grid: BlockGrid, lists: BlockLists, scaling: float, extra: Extra | None
) -> torch.Tensor:
    """All queries over all keys behind a mask, for exported programs: `[B, H, Tq, D]`, 0 in rows without a key."""
    (B, _, q_len, _), k_len, b = call.q.shape, call.k.shape[2], grid.block_size
    listed = _Listed(lists, grid, None, None, blocks_of(k_len, b) * b)
    blocks = listed.blocks_seen()
    rank = call.rank.expand(B, -1)
    rows = rank[:, k_len - q_len :].clamp(min=0) // b
    if lists.full_rows is not None:
        tiles_full, rows_full = ((x[:, :, None] == lists.full_rows[:, None]).any(-1) for x in (grid.row, rows))
        blocks = blocks | tiles_full[:, None, :, None]
    tile = (rows - grid.row[:, :1]).clamp(min=0)[:, None, :, None]
    of_row = blocks.expand(B, -1, -1, -1).gather(2, tile.expand(-1, blocks.shape[1], -1, blocks.shape[3]))
    column = (rank.clamp(min=0) // b)[:, None, None].expand(-1, blocks.shape[1], q_len, -1)
    seen = of_row.gather(3, column) & (rank >= 0)[:, None, None]
    parts = [(call.q @ call.k.mT * scaling, seen, call.v)]
    if extra is not None:
        logits = call.q @ extra.key.mT * scaling
        logits = logits if extra.shift is None else logits + extra.shift.to(logits.dtype)[:, None, None]
        shown = extra.seen(rows, lists.is_causal)
        shown = shown if lists.full_rows is None else shown & ~rows_full[..., None]
        parts.append((logits, shown[:, None], extra.value))
    # One softmax over both parts, not joined: a tracer would ask what their lengths add up to.
    least = torch.finfo(call.q.dtype).min
    peaks = [logits.masked_fill(~seen, least).amax(-1, keepdim=True) for logits, seen, _ in parts]
    peak = peaks[0] if len(peaks) == 1 else torch.maximum(*peaks)
    weights = [(logits - peak).masked_fill(~seen, least).exp() * seen for logits, seen, _ in parts]
    output = torch.stack([w @ part[2] for w, part in zip(weights, parts, strict=True)]).sum(0)
    total = torch.stack([w.sum(-1, keepdim=True) for w in weights]).sum(0)
    return output / torch.where(total == 0, 1.0, total)


def _places(columns: torch.Tensor, grid: BlockGrid, k_len: int) -> torch.Tensor:
    """Tokens of the blocks `columns` `[B or 1, H or 1, R, L]`: long `[B or 1, H or 1, R, L * b]`."""
    inside = torch.arange(grid.block_size, device=columns.device)
    first = grid.start[:, None, None, None] + columns * grid.block_size
    return (first[..., None] + inside).flatten(3).clamp(0, k_len - 1)


def gather_tokens(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Tokens `places` `[B or 1, H or 1, R, K]` of x `[B, H, T, D]`: `[B, R, H, K, D]`."""
    B, H, T, D = x.shape
    _, heads, R, K = places.shape
    index = places.expand(B, -1, -1, -1)
    if heads == 1:  # all heads of a token lie together
        taken = take_tokens(x, index.flatten(1)).unflatten(2, (R, -1))
        return taken.transpose(1, 2)
    in_place = heads_apart(x)
    rows = torch.arange(B * H, device=x.device).view(B, H, 1) * T
    matrix, first = (x.reshape(B * H * T, D), rows) if in_place is None else in_place
    taken = matrix.index_select(0, (first[..., None] + index).transpose(1, 2).flatten())
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
    rows = attend_blocks(query, call.k[:, None], call.v[:, None], allowed, scaling)[:, 0].unflatten(2, (-1, t))
    for f in range(tile.shape[1]):
        hit = torch.arange(R, device=q.device) == tile[:, f : f + 1]
        out = torch.where(hit[:, :, None, None, None], rows[:, :, f][:, None], out)
    return out
