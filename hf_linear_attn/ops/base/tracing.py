"""Exported programs: one form for every length.

An eager call chooses its form by the length, and goes through long sequences in blocks. A program that `torch.export`
or `torch.onnx.export` makes is run at lengths that nobody knows yet: it may not branch on one, loop over one, or
allocate by one in Python. There an op takes the form that is written as one expression, of operators that ONNX has.
"""

from __future__ import annotations

import torch

__all__ = ["blocks_of", "is_exported", "segments"]


def is_exported() -> bool:
    """Whether this call is being exported, not compiled.

    The flag, not `torch.compiler.is_exporting()`, which is True under `torch.compile` in PyTorch 2.11.
    """
    return torch.compiler._is_exporting_flag


def blocks_of(length: int, size: int) -> int:
    """Blocks of `size` tokens for so many; where exported one more, so that no length is special: 1 is to a tracer."""
    return -(-length // size) + int(is_exported())


def segments(count: int, most: int, each: int) -> list[slice]:
    """Rows 0 .. count - 1 in pieces, at `each` elements a row and at most `most` a piece; one where exported."""
    if is_exported():
        return [slice(0, count)]
    step = max(1, most // each)
    return [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]
