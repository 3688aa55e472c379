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

    Nothing is kept of a compiled graph, a captured one or under a fake tensor mode.
    """
    passing = torch.compiler.is_compiling() or type(torch.empty(0)) is not torch.Tensor
    if passing or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return build()
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    with torch.inference_mode(False), torch.no_grad():
        made = build()
    if device.type == "cuda":  # other streams will read them
        torch.cuda.current_stream(device).synchronize()
    with _lock:
        _kept[key] = made
        while len(_kept) > _KEPT_LISTS:
            _kept.popitem(last=False)
    return made
