"""Buckets that grow with the length: 8, 16, 32, up to 512 of them, at 3/4 to 3/2 of a chunk of keys each.

A hash into fewer buckets goes by the first of the directions of a larger one. A bidirectional sequence is at the level
of its number of real tokens; a causal token is at that of its own place, which no later token changes, so that its
output is the same however a sequence is split into calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_linear_attn.ops.base.tracing import is_exported

__all__ = ["Level", "at_level", "growing_levels", "levels_up_to"]

FEWEST, MOST = 8, 512


class Level(NamedTuple):
    """So many buckets from the token of rank `start` on, or for sequences of that many tokens."""

    start: int
    buckets: int


def growing_levels(max_length: int, chunk_size: int) -> tuple[Level, ...]:
    """The levels of up to `max_length` tokens: b buckets from 3/4 b chunks of tokens on."""
    levels = [Level(0, FEWEST)]
    while (more := levels[-1].buckets * 2) <= MOST and (start := more * chunk_size * 3 // 4) <= max_length:
        levels.append(Level(start, more))
    return tuple(levels)


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
