"""How kernels are launched: on which device, how exact, and what a shipped configuration is, for inspection too."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

__all__ = ["NAMESPACE", "Launch", "check_launches", "exact_products", "group_of", "on_device", "readable"]

# Where PyTorch registers the kernels' operators: a copy of these files under another name has its own.
NAMESPACE = __name__.removesuffix(".kernels.launch").replace(".", "_")


def check_launches(device: torch.device) -> None:
    """Raise `ValueError` for a device on which no kernel can start."""
    if device.type != "cuda" and not (device.type == "cpu" and triton.knobs.runtime.interpret):
        raise ValueError(f"Triton kernels need a CUDA device (or TRITON_INTERPRET=1 on the CPU), got {device}.")


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels start on the device of their tensors, on its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def readable(x: torch.Tensor) -> torch.Tensor:
    """With the last dimension contiguous, as the kernels read it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def group_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> int:
    """How many heads of q share a head of k and v.

    Raises:
        ValueError: for heads that k and v do not divide into groups.
    """
    heads, shared = q.shape[1], k.shape[1]
    if v.shape[1] != shared or shared == 0 or heads % shared:
        raise ValueError(f"k and v must have H / group heads each, got {shared} and {v.shape[1]} for {heads} of q.")
    return heads // shared


def exact_products(device: torch.device) -> str:
    """How float32 products are made: in three TF32 ones, about as exact; AMD GPUs multiply float32 itself."""
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


@dataclass(frozen=True)
class Launch:
    """One shipped configuration of one kernel, complete enough to be compiled without a GPU.

    Attributes:
        kernel: the `triton.jit` function.
        name: what to call it in reports, e.g. `"state bf16 F64 D64"`.
        signature: types of the runtime arguments by name, e.g. `{"q": "*bf16", "length": "i32", "scale": "fp32"}`.
        constants: values of the `tl.constexpr` arguments by name.
        num_warps: warps of a program.
        num_stages: stages of software pipelining.
        is_default: whether a call chooses it by itself; those must not spill.
        uses_dot: whether tensor cores must show in the compiled code.
        targets: names of the targets that it is shipped for, as `kernels.inspection` has them; empty for all.
    """

    kernel: Any
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    is_default: bool = True
    uses_dot: bool = True
    targets: tuple[str, ...] = ()
