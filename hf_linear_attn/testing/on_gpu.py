"""A GPU that is none: tensors that say they lie on one, and what makes a CPU wait for them.

`OnGpu` is a tensor on the CPU that calls itself one of `cuda:0`, in Python, and so are all tensors that are computed
from it or made on its device: code goes the ways that it goes on a GPU. `Watched` notes where a value is read: by
`.item()` and all that calls it, by a copy to the CPU, or by an operator whose result has a size that depends on values
(`nonzero`, an index that is a mask, `unique`). Kernels are launched and do nothing. A subclass of `Watched` hears of
all that a GPU would run: launches, and PyTorch's operators, also those between the launches of one of ours.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

__all__ = ["OnGpu", "Watched", "gpu", "move"]

M = TypeVar("M", bound=nn.Module)

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
_HERE = str(Path(__file__))
_PACKAGE = str(Path(__file__).parents[1])

# Operators that read a value, or whose result has as many elements as values say. A check of a factorization reads too.
_READS = {
    "_linalg_check_errors",
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_TO_HOST = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}


class OnGpu(torch.Tensor):
    """A tensor of the CPU, `values`, that says it lies on `cuda:0`."""

    values: torch.Tensor  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnGpu:
        given: dict[str, Any] = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=CPU, **given)

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    device: Any = property(lambda self: GPU)
    is_cuda: Any = property(lambda self: True)
    is_cpu: Any = property(lambda self: False)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "hf_linear_attn":  # what Python does around the launches is watched as well
            with copy.copy(Watched.now) if Watched.now else Watched():  # a mode is off in what it calls
                return OPDEFS[func.name().partition(".")[0]]._init_fn(*args, **kwargs)
        name = func.overloadpacket.__name__
        masks = [x for x in (args[1] if name in ("index", "index_put", "index_put_") else ()) if x is not None]
        sized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in _READS or sized or any(x.dtype in (torch.bool, torch.uint8) for x in masks):
            Watched.note(f"aten.{name}")
        result = func(*_values(args), **_values(kwargs))
        if Watched.now is not None:
            Watched.now.computed(func, args, kwargs, result)
        return tree_map_only(torch.Tensor, _on_gpu, result)


def _on_gpu(x: torch.Tensor) -> torch.Tensor:
    return x if isinstance(x, OnGpu) else OnGpu(x)


def _values(tree: Any) -> Any:
    return tree_map_only(OnGpu, lambda x: x.values, tree)


class Watched(TorchFunctionMode):
    """Whatever is computed inside may lie on the GPU that is none; where the CPU waits for it is noted.

    Attributes:
        reads: `"module:function"` of this package, or of who called, where a value was read, and how.
    """

    now: Watched | None = None

    def __init__(self, reads: set[tuple[str, str]] | None = None) -> None:
        super().__init__()
        self.reads = set() if reads is None else reads

    def __enter__(self) -> Watched:
        self.outer, Watched.now = Watched.now, self
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        Watched.now = self.outer
        super().__exit__(*args)

    def computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """An operator of PyTorch ran on such tensors."""

    def made(self, name: str, result: torch.Tensor) -> None:
        """The function of this name made a tensor there, of nothing or of one of the CPU."""

    def launched(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A `triton.jit` function was launched."""

    def making(self, name: str) -> AbstractContextManager[Any]:
        """Where the function of this name makes a tensor."""
        return nullcontext()

    @classmethod
    def note(cls, how: str) -> None:
        if cls.now is not None:
            cls.now.reads.add((_place(sys._getframe(1)), how))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        here = isinstance(args[0], OnGpu) if args else False
        if here and name in _TO_HOST:
            self.note(f".{name}()")
            return func(args[0].values, *args[1:], **kwargs)
        target = _target(args if name == "to" else (), kwargs)
        if target is None:
            return func(*args, **kwargs)
        if name == "to" and here and target.type == "cpu":
            self.note(".to('cpu')")
            return func(args[0].values, *args[1:], **kwargs)
        if target.type == "cuda" and (name in ("tensor", "as_tensor") or (name == "to" and not here)):
            self.note("a copy from the CPU")
        args = tuple(CPU if _is_device(x) else x for x in args)
        kwargs = {key: CPU if _is_device(x) else x for key, x in kwargs.items()}
        with self.making(name) if target.type == "cuda" else nullcontext():
            result = func(*args, **kwargs)
        if target.type != "cuda" or not isinstance(result, torch.Tensor):
            return result
        if isinstance(result, OnGpu):
            return result
        self.made(name, result)
        trains = result.is_leaf and result.requires_grad
        return OnGpu(result.detach()).requires_grad_() if trains else OnGpu(result)


def _is_device(x: Any) -> bool:
    return isinstance(x, torch.device) or (isinstance(x, str) and x.partition(":")[0] in ("cuda", "cpu"))


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that a call names."""
    named = [torch.device(x) for x in (*args, *kwargs.values()) if _is_device(x)]
    return named[0] if named else next((GPU for x in args[1:] if isinstance(x, OnGpu)), None)


def _place(frame: FrameType | None) -> str:
    """The innermost function of the package on the stack, or else the innermost one of Transformers."""
    other = "?"
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(_PACKAGE) and file != _HERE:
            return f"{file[len(_PACKAGE) + 1 : -3]}:{name}"
        if other == "?" and "/transformers/" in file:
            other = f"transformers {Path(file).stem}:{name}"
        frame = frame.f_back
    return other


def move(model: M) -> M:
    """Parameters and buffers of a model to the GPU, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OnGpu(parameter.detach()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnGpu(buffer)
    return model


@contextmanager
def gpu() -> Iterator[None]:
    """A machine with such a GPU: kernels are launched and write nothing."""
    from triton.runtime.jit import JITFunction

    from hf_linear_attn.ops.base import backend, memo

    backend._load_kernels()

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        if Watched.now is not None:
            Watched.now.launched(self, args, kwargs)

    with ExitStack() as stack:
        for owner, name, value in (
            (memo, "_kept", type(memo._kept)()),  # by device: a real one must not meet lists of this one
            (JITFunction, "run", run),
            (backend, "_gpu_refusal", lambda index: None),
            (torch.cuda, "device", lambda device: nullcontext()),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "get_device_properties", lambda device: _Properties),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "current_stream", lambda device=None: _Stream),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


class _Properties:
    shared_memory_per_block_optin = 232_448
    multi_processor_count = 132


class _Stream:
    """The only one."""

    @staticmethod
    def synchronize() -> None:
        Watched.note("synchronize")

    @staticmethod
    def record_event() -> None:
        return None
