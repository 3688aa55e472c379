"""What a comparison consists of: its systems, its folds, and the bar over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import concatenate_datasets
from sklearn.model_selection import StratifiedGroupKFold

from hf_linear_attn.data.task import DocumentTask
from hf_linear_attn.measure.methods import Method
from hf_linear_attn.training.recipe import Recipe

__all__ = ["PlannedBar", "System", "make_folds", "with_recipe_options"]


@dataclass(frozen=True)
class System:
    """One row of the comparison: its name and the recipe that trains it."""

    name: str
    recipe: Recipe
    variant: str
    options: dict[str, Any]

    def full_options(self) -> dict[str, Any]:
        """The variant's options with the defaults written out; none for softmax attention."""
        return {} if self.recipe.conversion is None else Method(self.variant, self.options).config().to_dict()


def with_recipe_options(asked: Sequence[Method], own: Sequence[Method]) -> list[Method]:
    """Give variants that were asked for without options those of `own`."""
    defaults = {method.key: method for method in reversed(own)}
    return [method if method.options else defaults.get(method.key, method) for method in asked]


def make_folds(task: DocumentTask, folds: int, seed: int) -> list[DocumentTask]:
    """The task itself, or one task per fold; documents are numbered through both parts."""
    count = len(task.train)
    numbers = list(range(count + len(task.test)))
    train_set = task.train.add_column("document", numbers[:count])
    test_set = task.test.add_column("document", numbers[count:])
    if not folds:
        return [replace(task, train=train_set, test=test_set)]
    both = concatenate_datasets([train_set, test_set])
    # Stratified: without it a fold may hold most of a label's groups, and what is left to learn it from is too little.
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    splits = splitter.split(numbers, both["label"], groups=list(both["group"]))
    return [replace(task, train=both.select(train), test=both.select(test)) for train, test in splits]


class PlannedBar:
    """One progress bar over systems whose shares are planned; each system ends where its plan does."""

    def __init__(self, bar: Any, plan: dict[str, int]) -> None:
        self._bar, self._plan, self._done, self._name = bar, plan, 0, ""

    def start(self, name: str) -> None:
        """Name the system that runs now."""
        self._name = name
        self._bar.set_description_str(f"{name:20s}")

    def reach(self, share: float) -> None:
        """This share of the system that runs now is done, from 0 to 1."""
        self._move(self._done + int(share * self._plan[self._name]))

    def finish(self, name: str) -> None:
        """Jump to the end of the system's share."""
        self._done += self._plan[name]
        self._move(self._done)

    def _move(self, place: int) -> None:
        self._bar.update(min(place, self._bar.total or place) - self._bar.n)
