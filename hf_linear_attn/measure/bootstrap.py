"""Bootstrap intervals over test documents (Efron, 1979), optionally over groups of documents.

Documents of one author are not independent: with `groups`, whole groups are drawn, which gives wider and more
honest intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Interval", "bootstrap_interval", "bootstrap_statistic", "paired_bootstrap_difference"]


@dataclass(frozen=True)
class Interval:
    """A value measured on the test documents and the percentile interval of its resamples.

    Attributes:
        mean: value on the documents themselves.
        low: lower end of the interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """JSON form: `mean`, `low`, `high`."""
        return asdict(self)

    def excludes(self, value: float = 0.0) -> bool:
        """Whether `value` lies outside the interval."""
        return not self.low <= value <= self.high


def bootstrap_interval(
    correct: ArrayLike,
    groups: Sequence[object] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of a mean over documents.

    Args:
        correct: one number per document `[N]`: whether it was classified correctly, or any score.
        groups: group of each document; whole groups are drawn instead of documents.
        num_resamples: resamples.
        seed: seed of the draws.
        confidence: share of resamples inside the interval.

    Raises:
        ValueError: for no document, arrays of different lengths, or a confidence outside (0, 1).
    """
    values = np.asarray(correct, dtype=np.float64)
    draws = _draws(len(values), groups, num_resamples, seed, confidence)
    means = np.array([values[draw].mean() for draw in draws])
    return _interval(float(values.mean()), means, confidence)


def paired_bootstrap_difference(
    a: ArrayLike,
    b: ArrayLike,
    groups: Sequence[object] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Interval of mean(a) - mean(b), where `a[i]` and `b[i]` score the same document.

    Arguments and errors as in `bootstrap_interval`.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a and b must score the same documents, given shapes {first.shape} and {second.shape}.")
    return bootstrap_interval(first - second, groups, num_resamples, seed, confidence)


def bootstrap_statistic(
    statistic: Callable[..., float],
    *arrays: ArrayLike,
    groups: Sequence[object] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of `statistic(*arrays)`, the arrays resampled together along their first dimension.

    For what is not a mean over documents, such as macro-F1: `bootstrap_statistic(macro_f1, predictions,
    labels)`. Arguments and errors as in `bootstrap_interval`.
    """
    columns = [np.asarray(array) for array in arrays]
    lengths = {len(column) for column in columns}
    if len(lengths) != 1:
        raise ValueError(f"The arrays must have one length, given {sorted(lengths)}.")
    draws = _draws(lengths.pop(), groups, num_resamples, seed, confidence)
    values = np.array([statistic(*(column[draw] for column in columns)) for draw in draws])
    return _interval(float(statistic(*columns)), values, confidence)


def _draws(
    count: int, groups: Sequence[object] | None, num_resamples: int, seed: int, confidence: float
) -> list[np.ndarray]:
    """Indices of the documents of each resample."""
    if count < 1:
        raise ValueError("A bootstrap needs at least one document.")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, given {num_resamples}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, given {confidence}.")
    rng = np.random.default_rng(seed)
    if groups is None:
        return list(rng.integers(count, size=(num_resamples, count)))
    if len(groups) != count:
        raise ValueError(f"groups has {len(groups)} entries for {count} documents.")
    _, group = np.unique(np.asarray([str(name) for name in groups]), return_inverse=True)
    members = [np.flatnonzero(group == index) for index in range(group.max() + 1)]
    return [
        np.concatenate([members[index] for index in drawn])
        for drawn in rng.integers(len(members), size=(num_resamples, len(members)))
    ]


def _interval(value: float, resampled: np.ndarray, confidence: float) -> Interval:
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(mean=value, low=float(low), high=float(high))
