"""Tiles and launch options of the block-sparse kernels: a table by GPU and head dim, no tuning at run time."""

from __future__ import annotations

import torch

__all__ = ["block_tile", "column_tile", "launch_options", "target_of", "tiles_for"]


def target_of(device: torch.device) -> str:
    """The row of the table: `"sm_90"` (and later), `"sm_80"` (to 8.9), or `"gfx942"` for AMD GPUs."""
    if torch.version.hip is not None:
        return "gfx942"
    if device.type != "cuda":  # interpreted
        return "sm_80"
    return "sm_90" if torch.cuda.get_device_capability(device) >= (9, 0) else "sm_80"


def _has_wide_masks(head_dim: int) -> bool:
    """Whether a tile of 128 channels is masked, which costs registers: `long_short` adds a channel to 64, say."""
    return 64 < head_dim < 128


def tiles_for(dtype: torch.dtype, head_dim: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Tiles of lists of neighboring keys: queries and keys of a row's entry, and of a column's.

    128 rows of the output for 8 warps, and 64 of what the loop runs over; fewer in float32, for its registers.
    """
    if dtype == torch.float32:
        return ((32, 32), (32, 32)) if head_dim <= 64 else ((16, 16), (32, 16))
    if _has_wide_masks(head_dim):
        return (64, 64), (64, 64)
    return (128, 64), (64, 128)


def block_tile(dtype: torch.dtype, head_dim: int) -> int:
    """Queries, and keys, of a tile of a grid of blocks: they are cut at block ends."""
    if dtype == torch.float32:
        return 32 if head_dim <= 64 else 16
    return 64


def column_tile(dtype: torch.dtype, head_dim: int) -> int:
    """Extra columns that a row tile takes at once: usually they are few."""
    return 16 if dtype == torch.float32 and head_dim > 64 else 32


def launch_options(target: str, kernel: str, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """`num_warps`, `num_stages`, for `"dkv"` STEP and for `"dx"` the tile, such that no kernel spills registers.

    Args:
        target: see `target_of`.
        kernel: `"fwd"`, `"dq"`, `"dkv"` or `"dx"`.
        head_dim: D.
        dtype: of the inputs.
    """
    if target == "gfx942":  # shared memory of 64 KiB; four warps of 64 threads
        options = {"num_warps": 4, "num_stages": 1}
    elif dtype == torch.float32:
        options = {"num_warps": 8, "num_stages": 1}
    else:
        deep = head_dim <= 64 and (kernel == "fwd" or (target == "sm_90" and kernel in ("dq", "dkv")))
        options = {"num_warps": 8, "num_stages": 3 if deep else 2}
    step = 64 if target == "sm_90" and not _has_wide_masks(head_dim) else 32
    if dtype == torch.float32:
        step = 32 if head_dim <= 64 else 16
    if kernel == "dkv":
        options["STEP"] = step
    if kernel == "dx":
        options |= {"TILE_M": step, "TILE_N": block_tile(dtype, head_dim)}
        if _has_wide_masks(head_dim):
            options["num_stages"] = 1
    return options
