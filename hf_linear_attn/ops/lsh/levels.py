"""Buckets that grow with the length: 8, 16, 32, up to 512 of them, at 3/4 to 3/2 of a chunk of keys each.

As many tokens as a query looks at in all its rounds are read whole, by softmax itself, which costs no more.

A hash into fewer buckets goes by the first of the directions of a larger one. A bidirectional sequence is at the level
of its number of real tokens; a causal token is at that of its own place, which no later token changes, so that its
output is the same however a sequence is split into calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_linear_attn.ops.base.tracing import is_exported

__all__ = ["Level", "at_level", "growing_levels", "hashed_levels", "levels_up_to", "read_whole", "whole_length"]

FEWEST, MOST = 8, 512


class Level(NamedTuple):
    """So many buckets from the token of rank `start` on, or for sequences of that many tokens.

    `whole`: no buckets; a query sees all keys, or all up to its own.
    """

    start: int
    buckets: int
    whole: bool = False


def growing_levels(max_length: int, chunk_size: int, rounds: int) -> tuple[Level, ...]:
    """The levels of up to `max_length` tokens: whole up to two chunks a round, b buckets from 3/4 b chunks on.

    One level with buckets at least, also where `max_length` does not reach it.
    """
    first, buckets = 2 * chunk_size * rounds + 1, FEWEST
    levels = [Level(first, buckets)]
    while (buckets := buckets * 2) <= MOST and (start := buckets * chunk_size * 3 // 4) <= max_length:
        if start <= first:
            levels.clear()
        levels.append(Level(max(start, first), buckets))
    return Level(0, 1, whole=True), *levels


def hashed_levels(levels: Sequence[Level]) -> tuple[Level, ...]:
    """The levels with buckets, the first of them from the first token on."""
    first, *more = (level for level in levels if not level.whole)
    return Level(0, first.buckets), *more


def read_whole(count: torch.Tensor, levels: Sequence[Level]) -> torch.Tensor | None:
    """Which sequences of `count` tokens, or tokens of that rank, are at a whole level; None where nothing is."""
    if not levels[0].whole:
        return None
    return count < levels[1].start if len(levels) > 1 else torch.ones_like(count, dtype=torch.bool)


def whole_length(length: int, levels: Sequence[Level]) -> int:
    """How many of `length` tokens may be at the whole level that comes first."""
    return min(length, levels[1].start) if len(levels) > 1 else length


def levels_up_to(levels: Sequence[Level], length: int, *, all_as_long: bool = False) -> tuple[Level, ...]:
    """Those that sequences of at most `length` tokens are at, the last one alone if all are `all_as_long`.

    All in an exported program, whose length is open.
    """
    if len(levels) == 1 or is_exported():
        return tuple(levels)
    reached = tuple(level for level in levels if level.start <= length)
    return reached[-1:] if all_as_long else reached


def at_level(bucket: torch.Tensor, count: torch.Tensor, levels: Sequence[Level]) -> torch.Tensor:
    """Buckets at the level of each sequence.

    Args:
        bucket: `[B, H, T, levels * rounds]`, the rounds of each level side by side.
        count: long `[B]` or `[1]`, tokens of the sequence, or rank of a token.
        levels: ascending.

    Returns:
        `[B, H, T, rounds]`.
    """
    found, *larger = bucket.chunk(len(levels), -1)
    for level, x in zip(levels[1:], larger, strict=True):
        found = torch.where((count >= level.start)[:, None, None, None], x, found)
    return found
