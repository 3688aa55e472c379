"""Lists that follow from lengths and settings alone, kept from call to call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["kept_lists"]

_KEPT_LISTS = 64
_kept: OrderedDict[tuple[object, ...], Any] = OrderedDict()
_lock = threading.Lock()
T = TypeVar("T")


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
