"""Passages that are taken out of a document, and what is left of it."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["cut_passages"]


def cut_passages(
    document: Sequence[int], starts: Sequence[int], tokens: int, margin: int
) -> tuple[list[int], list[list[int]]]:
    """What is left of a document, and its passages; their margins are in neither.

    Args:
        document: token ids without special tokens.
        starts: where the spans begin, ascending and at least a span apart: a margin, the passage, a margin.
        tokens: of a passage.
        margin: further tokens on both sides of it.
    """
    left: list[int] = []
    taken, end = [], 0
    for start in starts:
        left += document[end:start]
        first = start + margin
        taken.append(list(document[first : first + tokens]))
        end = first + tokens + margin
    return [*left, *document[end:]], taken
