"""The shape of a comparison's results: what `compare` measures and what a report shows.

JSON types only; a value that was not measured is None.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from typing import Any

__all__ = ["ROW_KEYS", "TOP_KEYS", "agreements", "check_results", "summarize"]

TOP_KEYS = ("meta", "task", "budget", "primary_metric", "baseline", "rows", "baselines", "notes")
ROW_KEYS = (
    "name",  # what the row is called everywhere
    "variant",  # registry key of the attention variant, or "softmax"; of a saved model several, with commas
    "options",  # the variant's options
    "max_length",  # tokens the model reads of a document
    "quality",  # metric name -> {mean, low, high} on the test documents
    "difference_to_baseline",  # {mean, low, high}: primary metric against the baseline row, paired; or None
    "parameters_total",
    "parameters_added",
    "parameters_trained",  # this and what follows of training is None for a saved model, trained elsewhere
    "seconds_per_step",  # optimizer steps
    "tokens_per_second",  # in training
    "peak_memory_mb",  # 10^6 bytes, in training, beyond the start of it
    "train_seconds",
    "forward",  # [{length, seconds, ratio}]
    "eval_documents",
    "predictions",  # class of each test document
)
_META_KEYS = ("title", "created", "model", "device")
_TASK_KEYS = ("name", "description", "source", "generated", "note", "label_names")
_INTERVAL_KEYS = ("mean", "low", "high")


def check_results(results: Mapping[str, Any]) -> None:
    """Check a `results` dictionary.

    Raises:
        ValueError: naming the missing or unknown key, the row that is no baseline, or the value that is not
            JSON.
    """
    _exact_keys("results", results, TOP_KEYS)
    _has_keys("results['meta']", results["meta"], _META_KEYS)
    _has_keys("results['task']", results["task"], _TASK_KEYS)
    _has_keys("results['budget']", results["budget"], ("description",))
    if not results["rows"]:
        raise ValueError("results['rows'] is empty: nothing was compared.")
    for index, row in enumerate(results["rows"]):
        where = f"results['rows'][{index}]"
        _exact_keys(where, row, ROW_KEYS)
        if results["primary_metric"] not in row["quality"]:
            raise ValueError(
                f"{where}['quality'] has no {results['primary_metric']!r}, the primary metric. "
                f"It has: {', '.join(row['quality'])}."
            )
        for name, interval in row["quality"].items():
            _exact_keys(f"{where}['quality'][{name!r}]", interval, _INTERVAL_KEYS)
        if row["difference_to_baseline"] is not None:
            _exact_keys(f"{where}['difference_to_baseline']", row["difference_to_baseline"], _INTERVAL_KEYS)
        for point in row["forward"]:
            _exact_keys(f"{where}['forward']", point, ("length", "seconds", "ratio"))
    names = [row["name"] for row in results["rows"]]
    if len(set(names)) != len(names):
        raise ValueError(f"Row names must differ, given {names}.")
    if results["baseline"] not in names:
        raise ValueError(f"The baseline {results['baseline']!r} is no row. Rows: {', '.join(names)}.")
    for index, other in enumerate(results["baselines"]):
        _exact_keys(f"results['baselines'][{index}]", other, ("name", "metric", "value", "detail"))
    try:
        json.dumps(results, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"results must hold finite numbers and JSON types only: {error}") from error


def _has_keys(where: str, data: Mapping[str, Any], required: tuple[str, ...]) -> None:
    missing = [key for key in required if key not in data]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}.")


def _exact_keys(where: str, data: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    _has_keys(where, data, allowed)
    unknown = sorted(set(data) - set(allowed))
    if unknown:
        raise ValueError(f"{where} has unknown key(s) {', '.join(map(repr, unknown))}. Allowed: {', '.join(allowed)}.")


def agreements(results: Mapping[str, Any]) -> dict[str, float]:
    """Row name -> the share of the test documents to which it gives the baseline's class, of every other row.

    On a few hundred documents it tells models apart that have the same accuracy.
    """
    classes = {row["name"]: row["predictions"] for row in results["rows"]}
    base = classes.pop(results["baseline"])
    return {name: sum(map(operator.eq, own, base)) / len(base) for name, own in classes.items()}


def summarize(results: Mapping[str, Any]) -> str:
    """What the comparison shows of the primary metric, in two sentences that the intervals carry."""
    metric = results["primary_metric"].replace("_", " ")
    baseline = next(row for row in results["rows"] if row["name"] == results["baseline"])
    others = [row for row in results["rows"] if row["difference_to_baseline"] is not None and row is not baseline]
    start = (
        f"{baseline['name']} (first {baseline['max_length']:,} tokens) has {metric} "
        f"{baseline['quality'][results['primary_metric']]['mean']:.3f} on "
        f"{baseline['eval_documents']:,} documents. "
    )
    if not others:
        return start + "Nothing was compared with it."
    above = [row for row in others if row["difference_to_baseline"]["low"] > 0]
    below = [row for row in others if row["difference_to_baseline"]["high"] < 0]
    parts = []
    if above:
        parts.append("Above it, with an interval that excludes zero: " + ", ".join(map(_difference, above)) + ".")
    if below:
        parts.append("Below it, likewise: " + ", ".join(map(_difference, below)) + ".")
    rest = len(others) - len(above) - len(below)
    if rest and (above or below):
        parts.append(
            f"The intervals of the other {rest} include zero." if rest > 1 else "The other one's includes zero."
        )
    elif rest:
        parts.append(
            "Every difference to it has an interval that includes zero: these documents do not tell them apart."
        )
    return start + " ".join(parts)


def _difference(row: Mapping[str, Any]) -> str:
    return f"{row['name']} ({row['difference_to_baseline']['mean']:+.3f})"
