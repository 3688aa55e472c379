"""Metrics by name: the bundled ones, and those of the Hub that a user asks for as `hub:<id>`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate

from hf_linear_attn.measure.bundled import (
    Accuracy,
    EntityF1,
    ExactMatchF1,
    MacroF1,
    MeanSquaredError,
    MultiLabelF1,
    Pearson,
    Perplexity,
    TaskMetric,
    TokenAccuracy,
    macro_f1,
)

__all__ = ["BUNDLED_METRICS", "HUB_PREFIX", "check_metrics", "load_metrics", "macro_f1"]

HUB_PREFIX = "hub:"

BUNDLED_METRICS: dict[str, type[TaskMetric]] = {
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
    "multi_label_f1": MultiLabelF1,
    "mse": MeanSquaredError,
    "pearson": Pearson,
    "token_accuracy": TokenAccuracy,
    "entity_f1": EntityF1,
    "perplexity": Perplexity,
    "exact_match_f1": ExactMatchF1,
}


def check_metrics(names: Sequence[str], task: str) -> None:
    """Raise before a run what would fail, or mean nothing, after it.

    Args:
        names: bundled metrics, or `hub:<id>` for one of the Hub, whose fit only its author knows.
        task: what is measured, a key of `hf_linear_attn.data.kinds.KINDS`.

    Raises:
        ValueError: for no name, one named twice, one that is not known, or one for another task; the metrics of the
            task are listed.
    """
    _check_names(names)
    fitting = [name for name, metric in BUNDLED_METRICS.items() if task in metric.tasks]
    if not fitting:
        tasks = dict.fromkeys(task for metric in BUNDLED_METRICS.values() for task in metric.tasks)
        raise ValueError(f"The task {task!r} is not known. Allowed: {', '.join(tasks)}.")
    for name in names:
        if name in BUNDLED_METRICS and name not in fitting:
            raise ValueError(
                f"The metric {name!r} measures {', '.join(BUNDLED_METRICS[name].tasks)}, not {task}. "
                f"For {task}: {', '.join(fitting)}."
            )


def _check_names(names: Sequence[str]) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"Metrics must be a list of names, given {names!r}.")
    if not names:
        raise ValueError(f"No metric was named. Bundled: {', '.join(BUNDLED_METRICS)}.")
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"The metric {twice[0]!r} is named twice.")
    for name in names:
        if name.startswith(HUB_PREFIX):
            _check_hub_id(name)
        elif name not in BUNDLED_METRICS:
            close = difflib.get_close_matches(name, BUNDLED_METRICS, n=1)
            raise ValueError(
                f"The metric {name!r} is not bundled."
                + (f" Did you mean {close[0]!r}?" if close else "")
                + f" Bundled: {', '.join(BUNDLED_METRICS)}. One of the Hub is named {HUB_PREFIX}<id>."
            )


def _check_hub_id(name: str) -> None:
    """Only ids reach `evaluate.load`, which runs a script of this folder where it finds one of the name."""
    metric = name.removeprefix(HUB_PREFIX)
    parts = metric.split("/")
    if len(parts) > 2 or not all(part.strip() and part.strip(".") for part in parts) or os.path.isabs(metric):
        raise ValueError(
            f"{name!r} names no metric of the Hub. Write {HUB_PREFIX}<name> or {HUB_PREFIX}<owner>/<name>."
        )
    if metric.endswith(".py") or Path(metric).exists():
        raise ValueError(f"{metric!r} is a path here, which evaluate would run in place of the Hub's metric {name!r}.")


def load_metrics(
    names: Sequence[str], *, num_process: int = 1, process_id: int = 0, experiment_id: str | None = None
) -> evaluate.CombinedEvaluations:
    """Several metrics as one: `add_batch(predictions=..., references=...)`, then `compute()` to one
    dictionary.

    Args:
        names: bundled metrics (`BUNDLED_METRICS`), or `hub:<id>`, which `evaluate.load` fetches from the Hub and
            runs.
        num_process: processes that add batches; with several, process 0 computes over all and the others get
            None.
        process_id: this process, from 0.
        experiment_id: name, the same in all processes, that keeps simultaneous evaluations apart; required
            with several processes.

    Raises:
        ValueError: for a missing `experiment_id`, a name that `check_metrics` refuses, or one that the Hub does not
            have.
    """
    _check_names(names)
    if num_process > 1 and experiment_id is None:
        raise ValueError("With several processes an experiment_id is needed to keep evaluations apart.")
    options: dict[str, Any] = {
        "num_process": num_process,
        "process_id": process_id,
        "experiment_id": experiment_id,
        # One process needs no file in the cache; several meet in one.
        "keep_in_memory": num_process == 1,
    }
    return _Combined([_load(name, options) for name in names])


def _load(name: str, options: dict[str, Any]) -> evaluate.EvaluationModule:
    if name in BUNDLED_METRICS:
        return BUNDLED_METRICS[name](**options)
    try:
        return evaluate.load(name.removeprefix(HUB_PREFIX), **options)
    except (OSError, ConnectionError, ValueError) as error:
        raise ValueError(
            f"The metric {name!r} could not be had from the Hub: {error}. Bundled: {', '.join(BUNDLED_METRICS)}."
        ) from error


class _Combined(evaluate.CombinedEvaluations):
    """`evaluate.combine` that also works in processes other than the first, whose parts compute None."""

    def _merge_results(self, results: list[dict[str, Any] | None]) -> dict[str, Any] | None:
        if any(result is None for result in results):
            return None
        return super()._merge_results(results)
