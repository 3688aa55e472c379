"""What block-sparse attention sees: lists of key tiles for each tile of queries, and the masks inside of a tile."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["ANYWHERE", "BlockCSR"]

# A bound of `band` that no distance reaches.
ANYWHERE = 1 << 30


@dataclass(frozen=True)
class BlockCSR:
    """Which tiles of keys each tile of queries sees, as a sparse matrix by rows and, transposed, by columns.

    Tokens stand on a line of places: row tile r holds places r * tile[0] .. from `q_first` on, column tile c holds
    places c * tile[1] .. of the keys. The place of query 0 is `q_start`, of key 0 `k_start`; a place that belongs to no
    key is never seen, which is how a last, partly filled block (TAIL) is cut. In a tile that is listed as FULL no mask
    is evaluated. In the others a key is seen when all of the following hold that the list set has:

    - BAND: band[0] <= query place - key place <= band[1]; CAUSAL is a band from 0 on.
    - hole: not hole[0] <= query place - key place <= hole[1]. (0, 0) is "not itself".
    - sub-blocks: tiles are cut into `tile / sub` squared squares, and bit (i * tile[1] / sub + j) of the entry's
      `bits` says whether square (i, j) is seen.
    - INDEXED, by vectors that the call gives: equal buckets, and positions that stand for the places above.

    There are `sets_b * sets_h` list sets: one for each batch row, or one for all; one for each head, or one for all.

    Attributes:
        rows: int32 `[sets_b, sets_h, R, 3]`: where the entries of a row tile begin, where its FULL ones begin, and
            where they end, in `col_idx`.
        col_idx: int32 `[sets_b, sets_h, E]`, column tiles; none twice in a row tile, ascending in both parts.
        cols: int32 `[sets_b, sets_h, C, 3]`, as `rows`, of the column tiles.
        row_idx: int32 `[sets_b, sets_h, E]`, the row tiles of each column tile.
        tile: queries of a row tile and keys of an entry's column tile, in `rows` and `col_idx`.
        tile_t: queries of an entry's row tile and keys of a column tile, in `cols` and `row_idx`. It may differ from
            `tile` where there are no sub-blocks.
        bits: int32 `[sets_b, sets_h, E]` beside `col_idx`, or None: no sub-blocks.
        bits_t: the same beside `row_idx`.
        sub: edge of a sub-block, in places.
        band: least and greatest distance, or None.
        hole: least and greatest distance of what is not seen, or None.
        row_order: int32 `[sets_b, sets_h, R]`, row tiles, longest lists first; None when they are about equal.
        col_order: int32 `[sets_b, sets_h, C]`, likewise.
        q_start: int32 `[B or 1]`, place of query 0, or None: 0. It may be negative where queries are padding; those
            are in no row tile.
        q_first: int32 `[B or 1]`, first place of row tile 0, or None: 0.
        k_start: int32 `[B or 1]`, place of key 0, or None: 0.
        block: tokens of a block of `padded_block` places; the places behind them stay empty. It aligns blocks of
            any size with tiles.
        padded_block: see `block`.
    """

    rows: torch.Tensor
    col_idx: torch.Tensor
    cols: torch.Tensor
    row_idx: torch.Tensor
    tile: tuple[int, int]
    tile_t: tuple[int, int]
    bits: torch.Tensor | None = None
    bits_t: torch.Tensor | None = None
    sub: int = 0
    band: tuple[int, int] | None = None
    hole: tuple[int, int] | None = None
    row_order: torch.Tensor | None = None
    col_order: torch.Tensor | None = None
    q_start: torch.Tensor | None = None
    q_first: torch.Tensor | None = None
    k_start: torch.Tensor | None = None
    block: int = 1
    padded_block: int = 1

    def masked(self) -> BlockCSR:
        """The same tiles, none of them FULL: for buckets and positions that do not follow from the places."""

        def all_masked(pointers: torch.Tensor) -> torch.Tensor:
            return pointers[..., [0, 2, 2]].contiguous()

        return replace(self, rows=all_masked(self.rows), cols=all_masked(self.cols))

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """In the order in which the custom ops take them."""
        return (
            *(self.rows, self.col_idx, self.bits, self.row_order),
            *(self.cols, self.row_idx, self.bits_t, self.col_order),
            *(self.q_start, self.q_first, self.k_start),
        )

    def numbers(self) -> list[int]:
        """Likewise: both tiles, sub, block, padded_block, whether band and hole are there, and their bounds."""
        band, hole = self.band or (0, 0), self.hole or (0, 0)
        geometry = [*self.tile, *self.tile_t, self.sub, self.block, self.padded_block]
        return [*geometry, int(self.band is not None), int(self.hole is not None), *band, *hole]
