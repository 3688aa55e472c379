"""Marks by which Transformers knows that a module has its weights: `init_weights` passes over what carries them."""

from __future__ import annotations

from itertools import chain

from torch import nn

__all__ = ["is_initialized", "mark_initialized"]

_MARK = "_is_hf_initialized"


def mark_initialized(module: nn.Module) -> None:
    """Keep `post_init` and `init_weights` of any model around `module` from drawing its weights again.

    Modules carry the mark because it survives casts and copies, tensors because a wrapper may hand single modules to
    Transformers' `_init_weights`. On the meta device nothing has a value yet: a load marks what it fills.
    """
    tensors = list(chain(module.parameters(), module.buffers()))
    if any(tensor.is_meta for tensor in tensors):
        return
    for marked in chain(module.modules(), tensors):
        setattr(marked, _MARK, True)


def is_initialized(module: nn.Module) -> bool:
    """Whether every tensor of `module` came from a checkpoint or was marked."""
    return all(getattr(tensor, _MARK, False) for tensor in chain(module.parameters(), module.buffers()))
