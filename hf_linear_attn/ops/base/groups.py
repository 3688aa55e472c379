"""Grouped-query attention, arXiv:2305.13245: keys and values that serve a group of heads side by side."""

from __future__ import annotations

import torch

__all__ = ["of_each_head"]


def of_each_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values `[B, H / group, T, D]` repeated for each of their heads, `[B, H, T, D]`; `x` if they are.

    Raises:
        ValueError: for heads that cannot be divided into so many groups.
    """
    if x.shape[1] == heads:
        return x
    if x.shape[1] == 0 or heads % x.shape[1]:
        raise ValueError(f"{heads} heads of queries are no groups of as many for {x.shape[1]} heads of keys.")
    return x.repeat_interleave(heads // x.shape[1], dim=1)
