"""Batches of documents of like length, the same documents in the same order for every system that is compared; and of
documents that follow one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ["LengthGroupedSampler", "NeighborSampler"]


class LengthGroupedSampler(Sampler[int]):
    """Shuffle, sort within pools of `pool_size` batches by length, shuffle the batches; yields documents one by one.

    A batch is padded to its longest document, so documents of like length belong together. The order is a function
    of `(lengths, seed, epoch)` only: give the *full* lengths of the documents, not the truncated ones, and two
    models that read different shares of them still see the same batches.

    Args:
        lengths: length of each document, in any unit.
        batch_size: documents per batch; the last batch may be smaller.
        seed: of the order.
        pool_size: batches per sorted pool.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int = 0, pool_size: int = 8) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.pool_size = pool_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        size = self.batch_size
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), size * self.pool_size):
            pool = sorted(order[start : start + size * self.pool_size], key=lambda index: -self.lengths[index])
            batches += [pool[begin : begin + size] for begin in range(0, len(pool), size)]
        # the short batch stays last: Accelerate deals full batches to the processes and completes the last one
        full = [batch for batch in batches if len(batch) == size]
        for index in torch.randperm(len(full), generator=generator).tolist():
            yield from full[index]
        for batch in batches:
            if len(batch) < size:
                yield from batch


class NeighborSampler(Sampler[int]):
    """Cut the rows into batches where they stand, and shuffle the batches; yields rows one by one.

    Where the first cut lies is drawn anew for every epoch, so that a row meets those on both its sides; the last batch,
    which may be smaller, holds rows from the end and from the beginning.

    Args:
        count: of the rows.
        batch_size: rows of a batch.
        seed: of the order, which is a function of `(count, batch_size, seed, epoch)` only.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int = 0) -> None:
        self.count, self.batch_size, self.seed, self.epoch = count, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        first = int(torch.randint(self.count, (1,), generator=generator))
        rows = [*range(first, self.count), *range(first)]
        full = self.count // self.batch_size
        for batch in torch.randperm(full, generator=generator).tolist():
            yield from rows[batch * self.batch_size : (batch + 1) * self.batch_size]
        yield from rows[full * self.batch_size :]
