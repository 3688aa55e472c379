"""What ops with a backward pass of their own share: feature maps that are computed again, and quotients of sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_linear_attn.ops.base.numerics import TINY
from hf_linear_attn.ops.features.maps import FeatureMap, Features, ParametricMap

__all__ = ["MapGradients", "divide_into", "leaf", "map_parts", "quotient_backward", "trains_unnamed"]

_Tensors = tuple[torch.Tensor, ...]


def map_parts(feature_map: FeatureMap) -> tuple[Callable[..., Features], _Tensors]:
    """A map as a function of tokens and parameters, and these."""
    if isinstance(feature_map, ParametricMap):
        return feature_map.function, feature_map.parameters
    return feature_map, ()


def trains_unnamed(*maps: tuple[FeatureMap, torch.Tensor]) -> bool:
    """Whether a map's features of a constant token depend on a tensor that trains and is not a named parameter.

    Args:
        maps: each with tokens `[B, H, T, X]` that it takes.
    """
    if not torch.is_grad_enabled():
        return False
    for feature_map, x in maps:
        function, parameters = map_parts(feature_map)
        features = function(torch.zeros_like(x[:1, :, :1]), *(p.detach() for p in parameters))
        if any(y is not None and y.requires_grad for y in features):
            return True
    return False


def leaf(x: torch.Tensor, trains: bool = True) -> torch.Tensor:
    """The tensor without its history."""
    return x.detach().requires_grad_(trains)


class MapGradients:
    """The gradients of the parameters of maps, added up block by block.

    Attributes:
        parameters: one for each parameter, None for one that got none.
    """

    def __init__(self, parameters: _Tensors) -> None:
        self.parameters: list[torch.Tensor | None] = [None] * len(parameters)

    def through(
        self,
        outputs: tuple[torch.Tensor | None, ...],
        given: tuple[Any, ...],
        inputs: list[torch.Tensor],
        leaves: _Tensors,
    ) -> list[torch.Tensor]:
        """From gradients of the maps' outputs to those of their inputs; those of the parameters are added up.

        Inputs that do not train, and those that no output follows, get zeros.
        """
        pairs = [(x, g) for x, g in zip(outputs, given, strict=True) if x is not None and x.requires_grad]
        wanted = [x for x in (*inputs, *leaves) if x.requires_grad]
        if not pairs:
            return [torch.zeros_like(x) for x in inputs]
        found = iter(torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        changes = [next(found) if x.requires_grad else None for x in inputs]
        for i, x in enumerate(leaves):
            change = next(found) if x.requires_grad else None
            if change is not None:
                total = self.parameters[i]
                self.parameters[i] = change if total is None else total.add_(change)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, changes, strict=True)]


def divide_into(output: torch.Tensor, numerator: torch.Tensor, denominator: torch.Tensor) -> None:
    """Write the quotients `[B, H, T, D]`, denominators `[B, H, T]` kept away from 0 with their signs."""
    tiny = torch.full_like(denominator, TINY).copysign_(denominator)
    safe = torch.where(denominator.abs() < TINY, tiny, denominator)[..., None]
    if output.dtype == numerator.dtype:
        torch.div(numerator, safe, out=output)
    else:
        output.copy_(numerator / safe)


def quotient_backward(
    d_output: torch.Tensor | None, output: torch.Tensor, den: torch.Tensor, d_log: torch.Tensor | None, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of numerator and denominator; a denominator that was kept away from 0 is a constant."""
    inverse = torch.where(den.abs() < TINY, 0.0, den.reciprocal())
    d_num = den.new_empty(*den.shape, output.shape[-1])
    if d_output is None:
        d_num.zero_()
        d_den = torch.zeros_like(den)
    else:
        torch.mul(d_output[:, :, rows].to(den.dtype), inverse[..., None], out=d_num)
        d_den = (d_num * output[:, :, rows].to(den.dtype)).sum(-1).neg_()
    if d_log is not None:
        d_den += torch.where(den < TINY, 0.0, d_log * inverse)
    return d_num, d_den
