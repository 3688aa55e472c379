"""Shipped configurations of the block-sparse kernels, for `kernels.inspection`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hf_linear_attn.kernels.launch import Launch
from hf_linear_attn.kernels.sparse.bwd import (
    block_sparse_dkv_kernel,
    block_sparse_dq_kernel,
    block_sparse_dx_kernel,
)
from hf_linear_attn.kernels.sparse.fwd import block_sparse_fwd_kernel
from hf_linear_attn.kernels.sparse.launch import block_tile, column_tile, launch_options, tiles_for

__all__ = ["shipped_launches"]

_KERNELS = {
    "fwd": block_sparse_fwd_kernel,
    "dq": block_sparse_dq_kernel,
    "dkv": block_sparse_dkv_kernel,
    "dx": block_sparse_dx_kernel,
}
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_INPUTS = ("q", "k", "v", "o", "d_out", "dq", "dk", "dv", "xk", "xv")
_FP32 = ("lse", "d_lse", "delta", "dxk", "dxv", "x_shift")
_NONE: dict[str, Any] = {
    **{"SUB": 0, "BLOCK": 1, "PADDED": 1, "BAND": False, "HOLE": False, "ORDER": False, "SET_B": 0, "SET_H": 0},
    **{"Q_START": False, "K_START": False, "START_B": 0, "Q_POS": False, "K_POS": False, "BUCKET": False},
    **{
        "EXTRA": False,
        "X_ALLOWED": False,
        "X_SHIFT": False,
        "D_LSE": False,
        "DROPOUT": False,
        "PRECISION": "ieee",
    },
}
_WINDOW = {"BAND": True}
# Whether lists are of neighboring tiles, and what calls of a pattern ask of the kernels.
_PATTERNS: dict[str, tuple[bool, dict[str, Any]]] = {
    "window": (True, _WINDOW),
    "padded window with columns": (True, {**_WINDOW, "K_POS": True, "EXTRA": True, "X_ALLOWED": True}),
    "strided": (True, {**_WINDOW, "K_POS": True, "HOLE": True, "D_LSE": True}),
    "blocks of 64": (False, {"BLOCK": 64, "PADDED": 64, "BAND": True, "ORDER": True, "SET_H": 1}),
    "indexed": (True, {**_WINDOW, "Q_POS": True, "K_POS": True, "BUCKET": True}),
    "padded blocks of 16": (
        False,
        {
            **{"SUB": 16, "BLOCK": 16, "PADDED": 16, "BAND": True, "ORDER": True, "SET_B": 12, "SET_H": 1},
            **{"Q_START": True, "K_START": True, "START_B": 1},
        },
    ),
}


def shipped_launches() -> list[Launch]:
    """The kernels of each pattern, for 16 and 32 bits and head dims of 64 and 128, on each target."""
    launches: list[Launch] = []
    dtypes = ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64), (torch.float32, 128))
    for target in ("sm_80", "sm_90", "gfx942"):
        for pattern, (neighbors, flags) in _PATTERNS.items():
            for dtype, dim in dtypes:
                for name in _KERNELS:
                    if name != "dx" or flags.get("EXTRA"):
                        launches.append(_launch(target, pattern, neighbors, flags, dtype, dim, name))
        for dim in (16, 60, 65):  # narrow and masked tiles; long_short adds a channel to keys
            pattern = "padded window with columns"
            neighbors, flags = _PATTERNS[pattern]
            launches += [_launch(target, pattern, neighbors, flags, torch.bfloat16, dim, name) for name in _KERNELS]
        # With dropout a kernel computes a random number for each weight: it may spill.
        for name in _KERNELS:
            flags = {**_WINDOW, "EXTRA": True, "X_ALLOWED": True, "DROPOUT": True}
            launch = _launch(target, "window with dropout", True, flags, torch.bfloat16, 64, name)
            launches.append(replace(launch, is_default=False))
    return launches


def _launch(
    target: str, pattern: str, neighbors: bool, flags: dict[str, Any], dtype: torch.dtype, dim: int, name: str
) -> Launch:
    kernel, options = _KERNELS[name], launch_options(target, name, dim, dtype)
    tile = tiles_for(dtype, dim)[int(name == "dkv")] if neighbors else (block_tile(dtype, dim),) * 2
    precision = "tf32x3" if dtype == torch.float32 and target != "gfx942" else "ieee"
    sizes: dict[str, Any] = {"D": dim, "D_PAD": 1 << (dim - 1).bit_length(), "TILE_M": tile[0], "TILE_N": tile[1]}
    sizes |= {"TILE_X": column_tile(dtype, dim), "PRECISION": precision}
    constants = {**_NONE, **flags, **sizes, **options}
    if "STEP" in constants:
        constants["STEP"] = min(constants["STEP"], tile[0])
    return Launch(
        kernel=kernel,
        name=f"{pattern} {_TYPES[dtype]} D{dim}",
        signature={x: _type(x, dtype) for x in kernel.arg_names if x not in constants},
        constants={x: value for x, value in constants.items() if x in kernel.arg_names},
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        targets=(target,),
    )


def _type(argument: str, dtype: torch.dtype) -> str:
    if argument in _INPUTS:
        return f"*{_TYPES[dtype]}"
    if argument in _FP32:
        return "*fp32"
    if argument.endswith(("_sb", "_sh", "_st")):
        return "i32:16"
    if argument in ("scaling", "dropout"):
        return "fp32"
    if argument in ("x_allowed", "seed"):
        return "*u8" if argument == "x_allowed" else "*i64"
    if argument.endswith(("_len", "lo", "hi")) or argument.startswith("num_") or argument == "chunk":
        return "i32"
    return "*i32"
