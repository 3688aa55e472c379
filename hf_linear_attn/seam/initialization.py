"""Marks by which Transformers knows that a module has its weights: `init_weights` passes over what carries them."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

__all__ = ["is_initialized", "mark_initialized", "refuse_lost"]

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
    """Whether every tensor of `module` came from a checkpoint, offloaded ones among them, or was marked."""
    return all(_is_marked(tensor) for tensor in chain(module.parameters(), module.buffers()))


def refuse_lost(model: nn.Module, variant: nn.Module) -> None:
    """Raise `ValueError` if a checkpoint filled the layers of `model` and left out tensors of `variant` in it.

    The load of a model around it, an `EncoderDecoderModel` say, would report them and draw new ones.
    """
    own = {id(tensor) for tensor in chain(variant.parameters(), variant.buffers())}
    named = list(chain(model.named_parameters(), model.named_buffers()))
    if any(_is_marked(tensor) for _, tensor in named if id(tensor) not in own):
        lost = ", ".join(name for name, tensor in named if id(tensor) in own and not _is_marked(tensor))
        raise ValueError(f"The weights of the checkpoint do not fit {type(model).__name__}: missing keys: {lost}.")


def _is_marked(tensor: torch.Tensor) -> bool:
    # A load leaves on the meta device what it offloads to disk; what the checkpoint lacks has left it by now.
    return tensor.is_meta or getattr(tensor, _MARK, False)
