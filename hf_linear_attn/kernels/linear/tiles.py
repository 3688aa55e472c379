"""Configurations of the linear attention kernels: tiles by dimensions and device, segments by occupancy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

__all__ = [
    "DELTA_ROWS",
    "FEATURE_MAPS",
    "SCAN_BLOCK",
    "Tiles",
    "backward_constants",
    "block_of",
    "device_limits",
    "dot_constants",
    "forward_constants",
    "forward_segments_for",
    "mapped_tiles_for",
    "precision_of",
    "segments_for",
    "step_constants",
    "sums_constants",
    "sums_tiles_for",
    "tiles_for",
]

# Name to the code that the kernels know it by.
FEATURE_MAPS = {"identity": 0, "elu": 1, "relu": 2}

SCAN_BLOCK = 1024
DELTA_ROWS = 32

# A segment of at least this many tokens: fewer cost more for their states than they bring in parallel programs. With
# decay the log-decay's gradient is a running sum over a segment, which a bound keeps accurate.
_LEAST_SEGMENT = 256
_LONGEST_DECAY_SEGMENT = 512
_PROGRAMS_PER_PROCESSOR = 3  # below that many, sequences are cut
# The causal forward pass of so many programs, or of so few tokens, is not cut: sums of segments read keys and values a
# second time, and two more launches take longer than a short sequence. By a model of time, on no GPU yet.
_ENOUGH_PROGRAMS = 96
_SHORT = 2048

_LARGEST_PROJECTION = 64 * 256  # elements

_HOPPER = 200_000  # bytes of shared memory: that much and tensor cores read their operands from it
_AMPERE = 150_000


@dataclass(frozen=True)
class Tiles:
    """Constants of a configuration.

    Attributes:
        tokens: tokens of a chunk.
        values: columns of values that a program of the forward pass or of the values' gradient owns.
        features: columns of features that a program of the queries' or keys' gradient owns.
        num_warps, num_stages: as Triton has them. Eight warps even for small tiles: four have read outside their
            memory on Hopper in kernels of this kind.
    """

    tokens: int
    values: int
    features: int
    num_warps: int
    num_stages: int


def block_of(size: int) -> int:
    """Size of the tile that holds `size` columns."""
    return max(16, triton.next_power_of_2(size))


def tiles_for(
    num_features: int,
    head_dim: int,
    precision: str,
    shared_bytes: int,
    *,
    is_causal: bool,
    backward: bool,
    has_decay: bool,
) -> Tiles:
    """The configuration of a pass: as large as registers and shared memory allow, without spills.

    Args:
        num_features: F.
        head_dim: D.
        precision: of dot products with sums: `"bf16"`, or of float32: `"tf32"`, `"tf32x3"`, `"ieee"`.
        shared_bytes: shared memory that one program can have.
        is_causal: a bidirectional pass only multiplies by one state.
        backward: of the backward pass, which holds tiles of values and of features.
        has_decay: log-decays take registers of their own.
    """
    features, values = block_of(num_features), block_of(head_dim)
    widest, hopper = max(features, values), shared_bytes >= _HOPPER
    stages = 2 if shared_bytes >= _AMPERE else 1  # 3 on Hopper: with two, nothing is loaded while a chunk is computed
    if precision != "bf16":
        tokens, wide, stages = 32, 32, 1
        if hopper:
            tokens, wide = (32, 64) if precision == "tf32" else (16, 32)
        elif precision == "tf32x3" and not backward:
            wide = 16
        if widest > 64:
            tokens, wide = 16, 16
    elif not is_causal:
        wide = 64 if stages == 2 else 32
        return Tiles(64, min(values, wide), min(features, wide), 8, 3 if hopper else stages)
    elif not hopper:
        tokens, wide = 32, 32 if backward else 64
        if widest > 64:
            tokens, wide = 32 if widest <= 128 else 16, 32 if widest <= 128 and stages == 2 and not backward else 16
    elif widest <= 64:
        tokens, wide = 64, 64
    elif widest <= 128:
        tokens, wide = 64, 32 if backward or has_decay else 64
    else:
        tokens, wide = 32 if has_decay and not backward else 64, 16
    if hopper and precision == "bf16" and (widest <= 128 or num_features == features):  # masks take registers
        stages = 3
    return Tiles(tokens, min(values, wide), min(features, 2 * wide if widest > 128 else wide), 8, stages)


def sums_tiles_for(num_features: int, head_dim: int, precision: str, shared_bytes: int) -> Tiles:
    """The configuration of the sums, which hold nothing but one state."""
    tokens, stages = (64, 3 if shared_bytes >= _HOPPER else 2) if precision == "bf16" else (32, 1)
    return Tiles(tokens, min(block_of(head_dim), 64), min(block_of(num_features), 64), 8, stages)


def mapped_tiles_for(
    head_dim: int,
    num_features: int,
    width: int,
    precision: str,
    shared_bytes: int,
    *,
    is_causal: bool,
    length: int,
) -> Tiles | None:
    """The configuration of the kernels that compute features from tokens; None where they do not fit without spills.

    Args:
        head_dim: of queries and keys.
        num_features: F.
        width: of values.
        precision, shared_bytes, is_causal: as for `tiles_for`.
        length: of the queries.
    """
    dim, features, values = block_of(head_dim), block_of(num_features), block_of(width)
    widest, hopper = max(dim, features, values), shared_bytes >= _HOPPER
    # Two projections stay in shared memory, in two parts each or in float32; elsewhere they would be in registers.
    if shared_bytes < _AMPERE or dim * features > _LARGEST_PROJECTION or (widest > 64 and not hopper):
        return None
    stages, wide = 1, 64
    if precision == "bf16":
        tokens = 16 if widest > 128 and is_causal else 64 if widest <= 64 else 32
        tokens, stages = (tokens, 3) if hopper else (16, 2)
    elif precision == "tf32" and widest <= 128:
        tokens = 32 if hopper else 16
    elif widest <= 64:
        tokens, wide = 16, 32
    else:
        return None
    return Tiles(16 if length <= 16 else tokens, min(values, wide), features, 8, stages)


def segments_for(length: int, programs: int, tiles: Tiles, processors: int, *, has_decay: bool) -> tuple[int, int]:
    """Number of segments and their length in tokens (whole chunks) for `programs` per segment."""
    wanted = max(1, -(-processors * _PROGRAMS_PER_PROCESSOR // max(programs, 1)))
    wanted = min(wanted, max(1, length // _LEAST_SEGMENT))
    if has_decay:
        wanted = max(wanted, -(-length // _LONGEST_DECAY_SEGMENT))
    chunks = -(-length // tiles.tokens)
    size = -(-chunks // min(wanted, chunks))
    return -(-chunks // size), size * tiles.tokens


def forward_segments_for(length: int, programs: int, tiles: Tiles, processors: int) -> tuple[int, int]:
    """Likewise for the causal forward pass, decay or not: one, and so one launch, where that is enough or short."""
    if programs >= _ENOUGH_PROGRAMS or length <= _SHORT:
        return 1, -(-length // tiles.tokens) * tiles.tokens
    return segments_for(length, programs, tiles, processors, has_decay=False)


def device_limits(device: torch.device) -> tuple[int, int]:
    """Shared memory of a program in bytes, and number of processors."""
    if device.type != "cuda":  # the interpreter
        return 232_448, 1
    properties: Any = torch.cuda.get_device_properties(device)
    shared = 65_536 if torch.version.hip else properties.shared_memory_per_block_optin
    return shared, properties.multi_processor_count


def precision_of(*dtypes: torch.dtype, is_amd: bool | None = None) -> str:
    """Precision of dot products with sums, for inputs of these dtypes.

    Sums are held in bfloat16 only where every input is. float16 would overflow in sums over long sequences, so they
    are float32 there, in tf32 products, which are exact for float16 factors. float32 inputs take three such products;
    AMD has no such split and takes exact ones.
    """
    if all(dtype == torch.bfloat16 for dtype in dtypes):
        return "bf16"
    if torch.version.hip is not None if is_amd is None else is_amd:
        return "ieee"
    return "tf32x3" if all(dtype == torch.float32 for dtype in dtypes) else "tf32"


def dot_constants(precision: str) -> dict[str, Any]:
    """The kernels' constants for a precision."""
    half = precision == "bf16"
    return {"BF16_DOTS": half, "PRECISION": "tf32" if half else precision}


def sums_constants(num_features: int, head_dim: int, tiles: Tiles, **flags: Any) -> dict[str, Any]:
    """Constants of `linear_attention_sums_kernel`; `flags` are those of the call."""
    tile = {"BT": tiles.tokens, "BN": tiles.features, "BC": tiles.values}
    return {"N": num_features, "C": head_dim, **tile, **flags}


def forward_constants(num_features: int, head_dim: int, tiles: Tiles, **flags: Any) -> dict[str, Any]:
    """Constants of `linear_attention_fwd_kernel`."""
    tile = {"BT": tiles.tokens, "BF": block_of(num_features), "BD": tiles.values}
    return {"F": num_features, "D": head_dim, **tile, **flags}


def backward_constants(num_features: int, head_dim: int, tiles: Tiles, **flags: Any) -> dict[str, Any]:
    """Constants of `linear_attention_bwd_kernel`."""
    tile = {"BT": tiles.tokens, "BF": block_of(num_features), "BD": block_of(head_dim)}
    return {"F": num_features, "D": head_dim, **tile, "TILE_F": tiles.features, "TILE_D": tiles.values, **flags}


def step_constants(num_features: int, head_dim: int, dim: int, rank: int, **flags: Any) -> dict[str, Any]:
    """Constants of `linear_attention_step_kernel`, whose state stays in registers."""
    features = block_of(num_features)
    blocks = {"BF": features, "BC": min(block_of(head_dim), max(16, 4096 // features))}
    blocks |= {"BD": block_of(dim), "BR": block_of(rank)}
    return {"F": num_features, "C": head_dim, "D": dim, "R": rank, **blocks, **flags}
