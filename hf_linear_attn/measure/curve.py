"""What more training would bring, judged by the fall of a loss so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["PowerLaw", "fit_power_law"]

_FEWEST = 3  # points of a fit that can be wrong


@dataclass(frozen=True)
class PowerLaw:
    """`loss = factor * tokens ** -exponent` (arXiv:2001.08361 finds such laws over many orders of magnitude).

    Attributes:
        factor: the loss after one token.
        exponent: how fast it falls; the loss is divided by 10 ** exponent when the tokens are ten times as many.
        error: standard error of the exponent.
    """

    factor: float
    exponent: float
    error: float

    def at(self, tokens: float) -> float:
        """The loss after so many tokens."""
        return float(self.factor * tokens**-self.exponent)

    def tokens_for(self, loss: float) -> float:
        """After how many tokens the loss is this small; infinite for a loss that does not fall."""
        return float((self.factor / loss) ** (1 / self.exponent)) if self.exponent > 0 else float("inf")


def fit_power_law(tokens: Sequence[float], losses: Sequence[float]) -> PowerLaw | None:
    """The line through the logarithms, by least squares; None for fewer than three points or a loss of 0 and less.

    Args:
        tokens: trained on by then, positive.
        losses: as many.
    """
    if len(tokens) < _FEWEST or min(losses) <= 0:
        return None
    x, y = np.log(tokens), np.log(losses)
    distance = x - x.mean()
    slope = float((distance * y).sum() / (distance**2).sum())
    level = float(y.mean() - slope * x.mean())
    rest = y - level - slope * x
    error = float(np.sqrt((rest**2).sum() / (len(x) - 2) / (distance**2).sum()))
    return PowerLaw(float(np.exp(level)), -slope, error)
