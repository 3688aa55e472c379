"""Keys and values that grow: new tokens are written behind the earlier ones, where there is room.

`torch.cat` copies the whole cache at each step. Here a sequence is a view of memory with room for a quarter more, so
that a token costs a constant number of copies. Nobody sees the room: a view never changes, and a second continuation
of the same view, or a tensor that came any other way (selected, repeated, cropped, loaded), is copied as before.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["append_tokens", "may_grow"]

_LEAST_ROOM = 16  # tokens


@dataclass
class _Memory:
    """`[B, H, capacity, D]`, of which the first tokens are in use."""

    x: torch.Tensor
    used: int

    def claim(self, past: int, total: int) -> bool:
        """Take the room behind the first `past` tokens up to `total`, unless it is too small or taken already."""
        is_open = torch.is_inference_mode_enabled() or not self.x.is_inference()
        with _claiming:  # two threads may continue the same text
            if not is_open or self.used != past or total > self.x.shape[2]:
                return False
            self.used = total
            return True


_claiming = threading.Lock()
_memories = WeakIdKeyDictionary()  # of the tensors that may grow; a value that held its own key would never be freed
_NO_ROOM = _Memory(torch.empty(1, 1, 0, 1), 0)  # of those that have not grown yet


def may_grow(x: torch.Tensor) -> torch.Tensor:
    """The same tensor `[B, H, T, D]`, with the permission to give it room when tokens are appended."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and x not in _memories:
        _memories[x] = _NO_ROOM
    return x


def append_tokens(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`torch.cat([past, new], dim=2)`; where `past` may grow, so may the result, which may be a view with room behind.

    Args:
        past: `[B, H, T, D]`.
        new: `[B, H, n, D]`, of the same dtype.
    """
    memory = None if torch.compiler.is_compiling() else _memories.get(past)
    T = past.shape[2]
    if memory is None or T == 0 or torch.is_grad_enabled():
        return torch.cat([past, new], dim=2)
    total = T + new.shape[2]
    if not memory.claim(T, total):
        B, H, _, D = past.shape
        memory = _Memory(past.new_empty(B, H, total + max(total // 4, _LEAST_ROOM), D), total)
        memory.x[:, :, :T] = past
    memory.x.data[:, :, T:total] = new  # no change to anyone who keeps a view for a backward pass
    grown = memory.x[:, :, :total]
    _memories[grown] = memory
    return grown
