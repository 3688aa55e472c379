"""Which code runs an op: the Triton kernels or their plain PyTorch twins.

`"auto"` runs the kernels where they can run and the twins elsewhere, and logs once which and why; `"torch"` always
runs the twins; `"triton"` raises where the kernels cannot run. The environment variable HF_LINEAR_ATTN_BACKEND says
what `"auto"` means. A backend is a property of a running model, not of a checkpoint: it is never saved.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

__all__ = ["BACKENDS", "ENVIRONMENT_VARIABLE", "check_backend", "machine_refusal", "use_triton"]

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch")
ENVIRONMENT_VARIABLE = "HF_LINEAR_ATTN_BACKEND"
# The kernels are tuned for, and compiled in the tests for, these and later (bf16 tensor cores).
_LEAST_CAPABILITY = (8, 0)


def check_backend(backend: object, source: str = "backend") -> str:
    """`backend`, if it is one.

    Raises:
        ValueError: otherwise, naming `source`.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r}; allowed: {', '.join(BACKENDS)}.")
    return backend


def use_triton(backend: str, x: torch.Tensor, refusal: str | None = None) -> bool:
    """Whether a call on tensors like `x` runs Triton kernels.

    Args:
        backend: what the caller asks for, one of `BACKENDS`.
        x: a tensor of the call, for its device.
        refusal: why the kernels cannot serve this call in particular; None if they can.

    Raises:
        RuntimeError: for `"triton"`, by argument or environment, where the kernels cannot run, saying why.
        ValueError: for an environment variable that names no backend.
    """
    if backend == "auto":
        backend = _environment()
    if backend == "torch":
        return False
    refusal = machine_refusal(x.device.type, x.device.index, interpreter=backend == "triton") or refusal
    if backend == "triton" and refusal is not None:
        raise RuntimeError(f"backend='triton' cannot run: {refusal}. Allowed here: 'auto', 'torch'.")
    if not torch.compiler.is_compiling():
        _log_once(refusal)
    return refusal is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _environment() -> str:
    return check_backend(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def machine_refusal(device_type: str, index: int | None = None, *, interpreter: bool = True) -> str | None:
    """Why Triton kernels cannot run on a device; None if they can.

    Args:
        device_type: `"cuda"` (AMD GPUs have this name too), `"cpu"`, ...
        index: number of the device, None for the present one.
        interpreter: whether Triton's interpreter (TRITON_INTERPRET=1), which is for tests, counts as running.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu" and interpreter and os.environ.get("TRITON_INTERPRET") == "1":
        return _load_kernels()
    if device_type != "cuda":
        return f"the tensors are on device {device_type!r}, the kernels need a GPU"
    return _gpu_refusal(index)


@functools.cache
def _gpu_refusal(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return _load_kernels()
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(index)} has compute capability {capability}, the kernels need (8, 0)"
    return _load_kernels()


@functools.cache
def _load_kernels() -> None:
    """Register the kernels' operators now: torch.compile would otherwise do so while it traces."""
    from hf_linear_attn.kernels.gated import op as gated  # noqa: F401
    from hf_linear_attn.kernels.linear import mapped_op, step  # noqa: F401
    from hf_linear_attn.kernels.linear import op as linear  # noqa: F401
    from hf_linear_attn.kernels.sparse import op as sparse  # noqa: F401


@functools.cache
def _log_once(refusal: str | None) -> None:
    if refusal is None:
        logger.info("Converted layers run Triton kernels (backend 'triton').")
    else:
        logger.info("Converted layers run plain PyTorch (backend 'torch'): %s.", refusal)
