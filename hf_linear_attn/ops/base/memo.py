"""What is kept from call to call: lists that follow from lengths and settings alone, and what is known of tensors."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["kept_lists", "known_number", "known_zero", "lazy", "note_number"]

_KEPT_LISTS = 256
_kept: OrderedDict[tuple[object, ...], Any] = OrderedDict()
_lock = threading.Lock()
T = TypeVar("T")
S = TypeVar("S")

_looked: Any = WeakTensorKeyDictionary()
_numbers: Any = WeakTensorKeyDictionary()
_MOST_LOOKS = 2  # at a buffer on a GPU, which the CPU waits for: who changes it in every step gets no third


class lazy(Generic[S, T]):  # noqa: N801
    """A property that is computed when it is first read.

    `functools.cached_property` holds a lock before Python 3.12, at which torch.compile stops.
    """

    def __init__(self, function: Callable[[S], T]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, instance: S, owner: type[S]) -> T:
        found = instance.__dict__
        name = self.function.__name__
        if name not in found:
            found[name] = self.function(instance)
        return found[name]  # type: ignore[no-any-return]


def kept_lists(key: tuple[object, ...], device: torch.device, build: Callable[[], T]) -> T:
    """What `build()` returns, made once per key; the key names pattern, lengths, tiles and device.

    Nothing is kept of a compiled graph, a captured one or under a fake tensor mode. On a GPU another stream waits for
    what makes the lists, and the CPU does not.
    """
    passing = torch.compiler.is_compiling() or type(torch.empty(0)) is not torch.Tensor
    if passing or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return build()
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            made, ready = _kept[key]
            if ready is not None and ready[0] != (stream := torch.cuda.current_stream(device)):
                stream.wait_event(ready[1])
            return made
    with torch.inference_mode(False), torch.no_grad():
        made, ready = build(), None
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        ready = stream, stream.record_event()
    with _lock:
        _kept[key] = made, ready
        while len(_kept) > _KEPT_LISTS:
            _kept.popitem(last=False)
    return made


def known_zero(buffer: torch.Tensor) -> bool:
    """Whether all of a buffer is 0: on a CPU by a look in every call, elsewhere when it is new or was changed in place
    (PyTorch does not tell of a write through `.data`).

    False where nobody may look: in a graph that is compiled, traced, captured or transformed, under a fake tensor mode,
    and after a few changes on a GPU. So what is skipped where this is True must be the same computation for zeros.
    """
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(torch.empty(0)) is not torch.Tensor
    if tracing or buffer.is_meta or buffer.is_inference() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if buffer.device.type == "cpu":  # a look costs less than it takes to remember one
        return not bool(buffer.detach().any())
    present = buffer._version, buffer.untyped_storage().data_ptr()
    seen, zero, looks = _looked.get(buffer, (None, False, 0))
    if seen != present:
        on_gpu = buffer.device.type == "cuda"
        if on_gpu and (looks == _MOST_LOOKS or torch.cuda.is_current_stream_capturing()):
            return False
        zero, looks = not bool(buffer.detach().any()), looks + 1
        _looked[buffer] = present, zero, looks
    return zero


def note_number(x: torch.Tensor, number: int) -> torch.Tensor:
    """`x`, with the note that all of it is `number`, which `known_number` reads without waiting for a device."""
    if _may_note(x):
        _numbers[x] = x._version, number
    return x


def known_number(x: torch.Tensor) -> int | None:
    """What `note_number` noted of this very tensor, unless it was changed in place since; else None.

    PyTorch does not tell of a write through `.data`, nor of what other ranks write: on a CPU it is looked at as well.
    None too where what is read once must hold for other inputs: in a graph that is compiled, traced or captured.
    """
    version, number = _numbers.get(x, (None, None)) if _may_note(x) else (None, None)
    if number is None or version != x._version:
        return None
    return number if x.device.type != "cpu" or bool((x == number).all()) else None


def _may_note(x: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_inference():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
