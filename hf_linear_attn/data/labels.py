"""Labels as sources write them (strings, numbers, `ClassLabel`), and as tables hold them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from datasets import ClassLabel, Features

__all__ = ["IGNORED_TOKEN", "Labels", "UnfitError", "collect_labels", "is_missing"]

IGNORED_TOKEN = -100  # label of a token that is neither learned nor scored


class UnfitError(ValueError):
    """A value that does not fit its column; the message goes on from "..., column 'label' "."""


@dataclass(frozen=True)
class Labels:
    """Names of the labels, and how a source writes each.

    Attributes:
        names: name of each label.
        index: the source's value -> label.
        one_hot: the source writes one entry for each label (multi-label only).
    """

    names: list[str]
    index: dict[Any, int] = field(default_factory=dict)
    one_hot: bool = False

    def encode(self, value: Any) -> int:
        """The label that a value stands for; raises `UnfitError` for one that it does not know."""
        label = self.index.get(_key(value))
        if label is None:
            raise UnfitError(f"is {value!r}, which is no label of the training part: {_some(self.names)}")
        return label

    def encode_token(self, value: Any) -> int:
        """Likewise, of a token, which may be `IGNORED_TOKEN`."""
        return IGNORED_TOKEN if value == IGNORED_TOKEN else self.encode(value)

    def encode_set(self, value: Any) -> list[float]:
        """0.0 or 1.0 for each label: from the labels that a document has, or from such a list."""
        if not isinstance(value, list | tuple):
            raise UnfitError(f"must be a list of labels, given {value!r}")
        if self.one_hot:
            if len(value) != len(self.names):
                raise UnfitError(f"has {len(value)} entries, one for each of {len(self.names)} labels was expected")
            if not all(entry in (0, 1) for entry in value):
                raise UnfitError(f"must hold 0.0 or 1.0 for each label, given {value!r}")
            return [float(entry) for entry in value]
        found = [self.encode(entry) for entry in value]
        if len(set(found)) < len(found):
            raise UnfitError(
                f"names a label twice: {value!r} (whole numbers are labels; for one entry a label write 0.0 or 1.0)"
            )
        return [float(label in found) for label in range(len(self.names))]


def is_missing(value: Any, kind: str) -> bool:
    """Whether a row has no label: nothing, NaN, an empty string, or -1 in place of a class."""
    if value is None or (isinstance(value, str) and not value):
        return True
    if isinstance(value, float) and math.isnan(value):
        return True
    classes = kind in ("sequence_classification", "multiple_choice")
    return classes and not isinstance(value, bool | str) and value == -1


def collect_labels(
    kind: str, features: Features | None, column: str, rows: Iterable[tuple[str, Any]], *, fewest: int = 2
) -> Labels:
    """The labels of a task from its rows.

    Args:
        kind: the task.
        features: of the source; a `ClassLabel` names its labels.
        column: the source's column.
        rows: file and row, and value, of the rows that have one.
        fewest: labels there must be.

    Raises:
        ValueError: for fewer labels, or values that are no labels.
    """
    feature = features.get(column) if features else None
    several = kind != "sequence_classification"
    inner = getattr(feature, "feature", None) if several else feature
    if isinstance(inner, ClassLabel):
        names = list(inner.names)
        by_name: dict[Any, int] = {name: index for index, name in enumerate(names)}  # as another file may write them
        return Labels(names, by_name | {index: index for index in range(len(names))})
    found: dict[Any, str] = {}
    entries = 0  # of a document's list with one entry for each label
    lengths = set()
    for where, value in rows:
        try:
            if kind == "multi_label_classification" and _is_one_hot(value):
                entries = entries or len(value)
            elif several:
                lengths.add(len(_entries(value)))
                found |= {_key(entry): where for entry in _entries(value) if entry != IGNORED_TOKEN}
            else:
                found[_key(value)] = where
        except UnfitError as error:
            raise ValueError(f"{where}, column {column!r} {error}.") from None
    if kind == "multi_label_classification" and set(found) == {0, 1} and lengths == {2}:
        raise ValueError(
            f"The column {column!r} holds two whole numbers, 0 or 1, in every row, which may be labels or one entry "
            "for each: write names for labels, or 0.0 and 1.0 for entries."
        )
    if entries and not found:
        return Labels([f"label {index}" for index in range(entries)], one_hot=True)
    if len({isinstance(value, str) for value in found}) > 1:
        raise ValueError(f"The column {column!r} mixes words and numbers as labels: {_some(sorted(map(str, found)))}.")
    if len(found) < fewest:
        raise ValueError(
            f"The column {column!r} has fewer than two labels in the training part: {_some(map(str, found))}."
        )
    ordered = sorted(found)
    return Labels([str(name) for name in ordered], {name: index for index, name in enumerate(ordered)})


def _is_one_hot(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, float | bool) for entry in value)


def _entries(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []  # what is no list is refused with its row


def _key(value: Any) -> str | int:
    """Whole numbers alike, however a reader types them."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str | int):
        raise UnfitError(f"must be a word or a whole number, given {value!r}")
    return value


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:20]) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "") or "none"
