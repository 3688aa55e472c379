"""Keys and values that grow: new tokens are written behind the earlier ones, where there is room.

`torch.cat` copies the whole cache at each step. Here a sequence is a view of memory with room for a quarter more, so
that a token costs a constant number of copies. A window slides along it: its first tokens are left behind. Nobody sees
the room: a view never changes, and a second continuation of the same view, or a tensor that came any other way
(selected, repeated, cropped, loaded), is copied as before.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["append_tokens", "last_tokens", "may_grow"]

_LEAST_ROOM = 16  # tokens
_LEAST_WINDOW = 1 << 16  # elements of a window that slides; to copy fewer costs less than to keep account of them


@dataclass
class _Memory:
    """`[B, H, capacity, D]`, of which the first tokens are in use."""

    x: torch.Tensor
    used: int

    def claim(self, end: int, total: int) -> bool:
        """Take the room behind the first `end` tokens up to `total`, unless it is too small or taken already."""
        is_open = torch.is_inference_mode_enabled() or not self.x.is_inference()
        with _claiming:  # two threads may continue the same text
            if not is_open or self.used != end or total > self.x.shape[2]:
                return False
            self.used = total
            return True


_claiming = threading.Lock()
# Tensors that may grow -> their memory and where they end in it. A value that held its own key would never be freed.
_places = WeakIdKeyDictionary()
_NO_ROOM = _Memory(torch.empty(1, 1, 0, 1), 0)  # of those that have not grown yet


def may_grow(x: torch.Tensor) -> torch.Tensor:
    """The same tensor `[B, H, T, D]`, with the permission to give it room when tokens are appended."""
    if _keeps_account(x) and x not in _places:
        _places[x] = _NO_ROOM, 0
    return x


def append_tokens(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`torch.cat([past, new], dim=2)`; where `past` may grow, so may the result, which may be a view with room behind.

    Args:
        past: `[B, H, T, D]`.
        new: `[B, H, n, D]`, of the same dtype.
    """
    place = _places.get(past) if _keeps_account(past) else None
    T, n = past.shape[2], new.shape[2]
    if place is None or T == 0 or torch.is_grad_enabled():
        return torch.cat([past, new], dim=2)
    memory, end = place
    if not memory.claim(end, end + n):
        B, H, _, D = past.shape
        memory, end = _Memory(past.new_empty(B, H, T + n + _room(T + n), D), T + n), T
        memory.x[:, :, :T] = past
    memory.x.data[:, :, end : end + n] = new  # no change to anyone who keeps a view for a backward pass
    grown = memory.x[:, :, end - T : end + n]
    _places[grown] = memory, end + n
    return grown


def last_tokens(x: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` tokens of `x`; many of them may grow, and are a view where that keeps little more, else a copy.

    Args:
        x: `[B, H, T, D]`, for example what `append_tokens` gave.
        count: at most T.
    """
    window = x[:, :, x.shape[2] - count :]
    if window.numel() < _LEAST_WINDOW:
        return window.contiguous()
    memory, end = (_places.get(x) if _keeps_account(x) else None) or (_NO_ROOM, 0)
    if memory is _NO_ROOM or memory.x.shape[2] > count + 2 * _room(count):
        return may_grow(window.contiguous())
    _places[window] = memory, end
    return window


def _keeps_account(x: torch.Tensor) -> bool:
    """Not in a graph that is compiled or captured: what is known of memory once would not hold when it runs again."""
    if torch.compiler.is_compiling():
        return False
    return not (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _room(tokens: int) -> int:
    return max(tokens // 4, _LEAST_ROOM)
