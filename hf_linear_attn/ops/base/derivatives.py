"""Backward passes that are written for first derivatives: a second one is refused, never wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["SECOND_DERIVATIVE_MESSAGE", "once_differentiable"]

SECOND_DERIVATIVE_MESSAGE = (
    "This attention computes its gradients in a backward pass of its own, which has no derivative: create_graph=True "
    "(a gradient penalty, a Hessian) is refused. Allowed: first derivatives; softmax attention (attn_implementation="
    "'eager') where second ones are needed."
)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward pass of a `torch.autograd.Function` that autograd is not to record, nor autocast to round.

    torch's decorator of this name refuses the second backward pass, and only where the incoming gradient has a history.
    Of a loss that is linear in the output it has none: gradients are constants then, and a penalty on them trains
    nothing and says nothing. Here `create_graph=True` is refused whatever comes in.

    Raises:
        RuntimeError: by the decorated function, under `create_graph=True`.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Any) -> Any:
        # A compiled graph refuses second derivatives itself, and is traced with gradients enabled.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(SECOND_DERIVATIVE_MESSAGE)
        device = next((x.device.type for x in gradients if x is not None), "cpu")
        with torch.no_grad(), torch.autocast(device, enabled=False):  # which is on where a loop calls backward in it
            return backward(ctx, *gradients)

    return wrapped
