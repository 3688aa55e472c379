"""The shipped configurations of the linear attention kernels, for `hf_linear_attn.kernels.inspection`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_linear_attn.kernels.launch import Launch
from hf_linear_attn.kernels.linear import bwd, fwd, mapped, step
from hf_linear_attn.kernels.linear import exp_features as exp
from hf_linear_attn.kernels.linear import tiles as config
from hf_linear_attn.kernels.linear.mapped_op import KINDS

__all__ = ["shipped_launches"]

# Shared memory of a program, by which tiles are chosen.
_TARGETS = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_INPUTS = ("q", "k", "v", "out", "b", "c", "d_out", "d_q", "d_k", "d_v", "x", "features")
_INTEGERS = ("heads", "q_length", "k_length", "segments", "segment_length", "batch_heads", "steps", "length")
_MASKS = ("mask", "q_mask", "k_mask")
_STEP_FLAGS = ("HAS_LOG_WEIGHTS", "HAS_MEAN", "HAS_CENTER", "HAS_DECAY", "GATED")

# (dtype, F, D, options): the everyday calls, then the largest tiles with everything on.
_CASES: Sequence[tuple[str, int, int, str]] = (
    ("bf16", 64, 64, "bidirectional elu"),
    ("bf16", 256, 64, "bidirectional scale"),
    ("bf16", 64, 64, "causal"),
    ("bf16", 64, 64, "causal scale decay elu"),
    ("bf16", 128, 64, "causal scale"),
    ("bf16", 128, 128, "causal scale decay"),
    ("bf16", 256, 64, "causal scale"),
    ("bf16", 256, 64, "causal scale decay"),
    ("fp16", 64, 64, "causal scale decay elu"),
    ("fp32", 64, 64, "causal scale decay elu"),
)
# (dtype, kind of map, F): with all weights of keys that a variant of this kind has.
_MAPPED_CASES: Sequence[tuple[str, str, int]] = (
    ("bf16", "elu", 64),
    ("bf16", "projected_relu", 128),
    ("bf16", "projected_softmax", 128),
    ("bf16", "projected_exp", 256),
    ("fp16", "projected_softmax", 128),
    ("fp32", "elu", 64),
)


def shipped_launches() -> list[Launch]:
    """The configurations that calls choose, by dtype, dimensions and options, for each target.

    float32 with more than 64 features or values is a choice for exactness, not for speed: three tf32 products of wide
    operands do not fit into registers. It is listed, and not as a default.
    """
    launches: list[Launch] = []
    for target in _TARGETS:
        for case in _CASES:
            launches += _launches(target, *case)
        for dtype, kind, features in _MAPPED_CASES:
            launches += _mapped_launches(target, dtype, kind, features)
        launches += [replace(launch, is_default=False) for launch in _launches(target, "fp32", 128, 64, "causal")]
        launches += _small_launches(target)
    return launches


def _launches(target: str, dtype: str, features: int, dim: int, options: str) -> Iterator[Launch]:
    named = options.split()
    causal, scale, decay = "causal" in named, "scale" in named, "decay" in named
    precision = config.precision_of(_DTYPES[dtype], is_amd=target.startswith("gfx"))
    common = {
        "GROUP": 1,
        "CAUSAL": causal,
        "HAS_DECAY": decay,
        "MAP": config.FEATURE_MAPS["elu" if "elu" in named else "identity"],
        **config.dot_constants(precision),
    }
    forward, backward = (
        config.tiles_for(features, dim, precision, _TARGETS[target], is_causal=causal, backward=which, has_decay=decay)
        for which in (False, True)
    )
    sums = config.sums_tiles_for(features, dim, precision, _TARGETS[target])

    def launch(kernel: Any, which: str, tiles: config.Tiles, constants: dict[str, Any], **settings: Any) -> Launch:
        constants = {**constants, **settings}
        return Launch(
            kernel,
            f"{which} {dtype} F{features} D{dim} {options} {target}",
            _signature(kernel, dtype, constants),
            constants,
            tiles.num_warps,
            tiles.num_stages,
            targets=(target,),
        )

    flags = {**common, "HAS_SCALE": scale, "HAS_KEEP": False, "HAS_STATE": True, "scale_token": 1}
    constants = config.forward_constants(features, dim, forward, NORMALIZED=True, **flags)
    yield launch(fwd.linear_attention_fwd_kernel, "forward", forward, constants)
    constants = config.backward_constants(features, dim, backward, **flags, HAS_D_STATE=True)
    yield launch(bwd.linear_attention_bwd_kernel, "backward", backward, constants, WANT_D_SCALE=scale or decay)
    constants = config.sums_constants(features, dim, sums, **common, REVERSE=True, HAS_FACTOR=True, GUARD=False)
    yield launch(fwd.linear_attention_sums_kernel, "sums", sums, constants, factor_token=1)


def _mapped_launches(target: str, dtype: str, kind: str, features: int) -> Iterator[Launch]:
    """The kernels that compute features, of 64 coordinates and values: causal, bidirectional, and sums of keys."""
    precision = config.precision_of(_DTYPES[dtype], is_amd=target.startswith("gfx"))
    is_projection = kind not in ("elu", "relu")
    common = {
        **{"GROUP": 1, "D": 64, "F": features, "C": 64, "BD": 64, "BF": config.block_of(features)},
        **{"K_KIND": KINDS[kind], "K_EXP_FORM": 2, "NORMALIZED": False},
        **{"HAS_CENTER": kind == "projected_exp", "HAS_BIAS": is_projection and kind != "projected_exp"},
        **{"HAS_MEAN": kind != "projected_softmax", "HAS_SQUARE": kind == "projected_exp"},
        **config.dot_constants(precision),
    }
    query = {"Q_KIND": KINDS[kind], "Q_EXP_FORM": 1, "HAS_Q_MASK": False, "HAS_K_MASK": False}
    query |= {"HAS_LOG_WEIGHTS": False, "HAS_DECAY": kind == "elu"}
    for kernel, which, constants in (
        (mapped.mapped_attention_kernel, "causal", {"CAUSAL": True, "HAS_STATE": False, **query}),
        (mapped.mapped_attention_kernel, "bidirectional", {"CAUSAL": False, "HAS_STATE": True, **query}),
        (mapped.mapped_sums_kernel, "sums", {"HAS_MASK": False}),
    ):
        given = 64, features, 64, precision, _TARGETS[target]
        tiles = config.mapped_tiles_for(*given, is_causal=which == "causal", length=4096)
        if tiles is None:
            continue
        constants = {**common, **constants, "BT": tiles.tokens, "BC": tiles.values}
        yield Launch(
            kernel,
            f"{which} {dtype} {kind} F{features} {target}",
            _signature(kernel, dtype, constants),
            constants,
            tiles.num_warps,
            tiles.num_stages,
            # Of 256 features 22 registers spill, and a tenth of the bytes move that features in memory would.
            is_default=features <= 128 or which != "causal",
            uses_dot=tiles.tokens >= 64,  # fewer fill no warp group
            targets=(target,),
        )


def _small_launches(target: str) -> Iterator[Launch]:
    """Kernels around the passes, and the exponential features."""

    def launch(kernel: Any, name: str, constants: dict[str, Any], **settings: Any) -> Launch:
        return Launch(
            kernel, f"{name} {target}", _signature(kernel, "bf16", constants), constants, targets=(target,), **settings
        )

    flags = {"NORMALIZED": True, "HAS_MORE": True, "HAS_KEEP": False}
    constants = {"D": 128, "BT": config.DELTA_ROWS, "BD": 128, **flags}
    yield launch(bwd.linear_attention_delta_kernel, "delta bf16 D128", constants, uses_dot=False)
    constants = {"SIZE_STATE": 4096, "SIZE_VECTOR": 64, "BLOCK": config.SCAN_BLOCK, "EXCLUSIVE": True}
    constants |= {"REVERSE": True, "HAS_BEFORE": True, "HAS_DECAY": True}
    yield launch(fwd.linear_attention_scan_kernel, "scan F64 D64", constants, uses_dot=False)
    for kind, features, rank, flags in (
        ("elu", 64, 0, {"HAS_MEAN": True}),
        ("elu", 64, 0, {"HAS_MEAN": True, "HAS_DECAY": True, "GATED": True}),
        ("turned_relu", 128, 0, {"HAS_MEAN": True, "HAS_CENTER": True}),
        ("projected_pairs", 153, 16, {"HAS_MEAN": True}),
        ("identity", 256, 0, {"HAS_LOG_WEIGHTS": True, "HAS_DECAY": True}),
    ):
        constants = config.step_constants(features, 64, features if kind == "identity" else 64, rank)
        constants |= {"GROUP": 1, "KIND": step.KINDS[kind], "NORMALIZED": True, "HAS_MASK": False}
        constants |= dict.fromkeys(_STEP_FLAGS, False) | flags
        kernel = step.linear_attention_step_kernel
        signature = _signature(kernel, "bf16", constants)
        if kind in ("turned_relu", "identity"):  # with ranks, or as features, in full precision
            signature |= {"q": "*fp32", "k": "*fp32"}
        name = f"step bf16 {'gated ' if flags.get('GATED') else ''}{kind} F{features} D64 {target}"
        warps = step.step_warps(step.KINDS[kind])
        yield Launch(kernel, name, signature, constants, warps, uses_dot=False, targets=(target,))
    for dtype in (torch.bfloat16, torch.float32):
        precision = config.precision_of(dtype, is_amd=target.startswith("gfx"))
        for features in (128, 256):
            constants = exp.exp_features_constants(64, features, True, precision)
            name = f"{'bf16' if dtype == torch.bfloat16 else 'fp32'} F{features} D64"
            signature = _signature(exp.exp_features_kernel, name[:4], constants)
            yield Launch(
                *(exp.exp_features_kernel, f"{name} {target}", signature, constants, 8, 3),
                targets=(target,),
            )


def _signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    """Types of the arguments by their names: strides are multiples of 16, sums float32."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in _INPUTS:
            types[name] = f"*{dtype}"
        elif name in _MASKS:
            types[name] = "*i1"
        elif name.endswith("_form"):
            types[name] = "*i64"
        elif name.endswith(("_batch", "_head", "_token", "_dim", "_feature")):
            types[name] = "i32:16"
        elif name in _INTEGERS:
            types[name] = "i32"
        else:
            types[name] = "fp32" if name.endswith(("multiplier", "scaling")) else "*fp32"
    return types
