"""Rounds of sorting, and how one of them is cut into blocks: equally many queries, and the keys of one chunk or two."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Plan", "Rounds", "plan_round", "sizes_may_depend_on_numbers"]

# Rows of a block of queries; more rows leave more of them empty (measured on CPU).
BLOCK_ROWS = 32
# Blocks of twice the rows are taken where they hold at most 9 rows for every 8 (measured on CPU).
SPARE, SPARE_OF = 8, 9
# Blocks without keys in the chunk before go apart where they are one of so many: few cost more than they save on CPU.
ALONE_OF = 8
# Empty chunks are left out where they are one of so many: what is gathered is shorter by them, and the rest moves up.
EMPTY_OF = 4


@dataclass
class Rounds:
    """What each query sees in each round, N = B * H: the keys of its own chunk and of the one before.

    Attributes:
        q_chunk: long `[rounds, N, Tq]`, number of each query's own chunk, 1 or more.
        k_chunk: long `[rounds, N, Tk]`, number of the chunk that holds each key, 1 or more.
        k_place: long `[rounds, N, Tk]`, place of each key among those of its chunk: no two real keys share one.
        real: bool `[N, Tk]`, False for keys that nobody sees.
        num_chunks: chunk numbers are below this.
        chunk_size: places of a chunk; not all of them need have a key.
        is_causal: whether keys after a query are left out besides.
        by_position: whether the first round goes by position, with all keys real and as many queries (causal only):
            nothing needs to be gathered then.
        same: whether queries are in the chunks of their own tokens' keys, which are all real and fill the first places
            of their chunk: the order of the keys serves for the queries then.
    """

    q_chunk: torch.Tensor
    k_chunk: torch.Tensor
    k_place: torch.Tensor
    real: torch.Tensor
    num_chunks: int
    chunk_size: int
    is_causal: bool
    by_position: bool = False
    same: bool = False


def sizes_may_depend_on_numbers(device: torch.device) -> bool:
    """Whether sizes may depend on numbers in tensors, and small parts are as good as large ones."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


class Plan:
    """Where the blocks of one round find their queries and keys, C = num_chunks.

    Attributes:
        slot: long `[N * Tq]`, the row of each query among the rows of all blocks.
        query: long `[blocks * rows]`, the query of each row, N * Tq for a row without one.
        pair: long `[blocks, 2]`, the rows of the chunk before each block's own, and of that one.
        key: long `[rows, chunk_size]`, the key at each place of each chunk, N * Tk for none: row n * C + c, or where
            many chunks are empty, one row for each other and the first for all of those.
        place: long `[N * Tk]`, the place of each key; one too high for keys that are not real.
        alone: as many blocks come first whose chunk has no keys before it: they attend to that chunk alone. 0 if few.
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...], alone: int) -> None:
        self.slot, self.query, self.pair, self.key, self.place = tensors
        self.alone = alone

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.slot, self.query, self.pair, self.key, self.place


def plan_round(
    q_chunk: torch.Tensor,
    k_chunk: torch.Tensor,
    k_place: torch.Tensor,
    real: torch.Tensor,
    num_chunks: int,
    chunk_size: int,
    same: bool,
) -> Plan:
    """The blocks of one round of `Rounds`, by their fields."""
    (N, q_len), k_len, device = q_chunk.shape, k_chunk.shape[1], q_chunk.device
    first_chunk = torch.arange(N, device=device)[:, None] * num_chunks
    # A place more takes the keys that are not real.
    places = N * num_chunks * chunk_size
    place = torch.where(real, (first_chunk + k_chunk) * chunk_size + k_place, places).flatten()
    key = torch.full((places + 1,), N * k_len, device=device)
    key = key.scatter_(0, place, torch.arange(N * k_len, device=device))[:-1].view(-1, chunk_size)

    on_cpu = sizes_may_depend_on_numbers(device)
    held = (key < N * k_len).sum(-1)  # keys of each chunk
    own = (first_chunk + q_chunk).flatten()
    if same:
        number = held  # of the queries of each chunk
        inside = k_place.flatten()
    else:
        ordered, order = own.sort(stable=True)
        first = torch.searchsorted(ordered, torch.arange(N * num_chunks + 1, device=device))  # query of each chunk
        number = first.diff()
        inside = torch.arange(N * q_len, device=device) - first.index_select(0, ordered)
        inside = torch.empty_like(inside).scatter_(0, order, inside)
    rows = min(BLOCK_ROWS, q_len)
    needed = -(-number // rows)
    # What is needed is read from the CPU, where that costs nothing: larger blocks if they leave few rows empty.
    if on_cpu and rows < chunk_size and q_len >= 2 * rows:
        halved = -(-number // (2 * rows))
        if halved.sum() * 2 * SPARE <= needed.sum() * SPARE_OF:
            rows, needed = 2 * rows, halved
    alone = held.roll(1) == 0
    turn = (~alone).long().sort(stable=True).indices
    needed = needed.index_select(0, turn)
    end = needed.cumsum(0)
    # At most one block per chunk is not full.
    blocks = int(end[-1]) if on_cpu else N * min(q_len, q_len // rows + num_chunks)
    start = torch.empty_like(end).scatter_(0, turn, (end - needed) * rows)
    slot = start.index_select(0, own) + inside
    query = torch.full((blocks * rows,), N * q_len, device=device)
    query = query.scatter_(0, slot, torch.arange(N * q_len, device=device))
    chunk = torch.searchsorted(end, torch.arange(blocks, device=device), right=True).clamp(max=N * num_chunks - 1)
    chunk = turn.index_select(0, chunk)
    apart = int(alone[chunk].sum()) if on_cpu else 0
    pair = torch.stack([chunk - 1, chunk], 1).clamp_(min=0)
    if on_cpu and (kept := held.nonzero()[:, 0]).shape[0] * EMPTY_OF < len(held) * (EMPTY_OF - 1):
        row = torch.zeros_like(held).scatter_(0, kept, torch.arange(1, len(kept) + 1))
        key = torch.cat([key.new_full((1, chunk_size), N * k_len), key.index_select(0, kept)])
        moved = row.index_select(0, place.clamp(max=places - 1) // chunk_size) * chunk_size + place % chunk_size
        place = torch.where(place < places, moved, key.numel())
        pair = row.index_select(0, pair.flatten()).view_as(pair)
    return Plan((slot, query, pair, key, place), apart if apart * ALONE_OF >= blocks else 0)
