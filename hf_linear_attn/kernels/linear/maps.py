"""Feature maps spelled out as tensors, so that kernels can compute them as they read tokens. Needs no Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["KINDS", "KeyWeights", "TokenMap"]

# Kinds of maps, and the code that the kernels know each by.
KINDS = {"elu": 1, "relu": 2, "projected_relu": 3, "projected_exp": 4, "projected_softmax": 5}


class TokenMap(NamedTuple):
    """phi of a token x: of m x, or of u = m ((x - c) W + b), or of u = m (x - c) W / |x - c|.

    Attributes:
        kind: `"elu"`, elu(m x) + 1; `"relu"`, max(m x, 0); `"projected_relu"`, max(u, 0); `"projected_exp"`, exp(u);
            `"projected_softmax"`, that of `ops.features.softmax_map`. Names that are not in `KINDS`, no kernel knows.
        multiplier: m.
        weight: W `[H or 1, D, F]`, any strides.
        center, bias: c `[H, D]` and b `[H, F]`, or None.
        normalized: whether x - c is divided by its norm; without a bias.
        form, exp_form: of `"projected_softmax"`: `[H]`, and the form whose features are exponentials.
    """

    kind: str
    multiplier: float = 1.0
    weight: torch.Tensor | None = None
    center: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    normalized: bool = False
    form: torch.Tensor | None = None
    exp_form: int = -1


class KeyWeights(NamedTuple):
    """Log weights of keys x beside the log scale of their features: s (a . x - |(x - c) A|^2 / 2), c that of their map.

    Attributes:
        scaling: s.
        mean: a `[H, D]`, or None.
        square: A `[H or 1, D, D]`, or None.
    """

    scaling: float = 1.0
    mean: torch.Tensor | None = None
    square: torch.Tensor | None = None
