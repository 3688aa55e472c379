"""How a kernel is launched: the constants of a shipped configuration, for the launcher and for inspection alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Launch"]


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
