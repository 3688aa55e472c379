"""`evaluate` metrics that need no download: accuracy, macro-F1, perplexity, exact match and F1 of answers.

`evaluate` itself carries no metric: `evaluate.load` fetches a script from the Hub. These are
`evaluate.Metric` subclasses, so that they combine with each other and with a user's Hub metric.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

__all__ = ["BUNDLED_METRICS", "Accuracy", "ExactMatchF1", "MacroF1", "Perplexity", "load_metrics", "macro_f1"]

logger = logging.getLogger(__name__)


def _of_classes(name: str, description: str) -> evaluate.MetricInfo:
    """Of a metric, in [0, 1], that compares class indices."""
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions: list of class indices; references: list of class indices. "
        f"Returns {name}, in [0, 1].",
        features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
    )


class Accuracy(evaluate.Metric):
    """Share of predicted classes that equal the reference."""

    def _info(self) -> evaluate.MetricInfo:
        return _of_classes("accuracy", "Share of predictions that equal the reference.")

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MacroF1(evaluate.Metric):
    """Mean over classes of the F1 score, each class counting the same."""

    def _info(self) -> evaluate.MetricInfo:
        return _of_classes("macro_f1", "Mean of 2 TP / (2 TP + FP + FN) over the classes in predictions or references.")

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"macro_f1": macro_f1(np.asarray(predictions), np.asarray(references))}


def macro_f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """Macro-averaged F1 over the classes that occur in `predictions` or `references` (int arrays `[N]`)."""
    scores = []
    for label in np.union1d(predictions, references):
        predicted, real = predictions == label, references == label
        # The denominator is not 0: the label occurs in one of the two.
        scores.append(2.0 * np.sum(predicted & real) / (np.sum(predicted) + np.sum(real)))
    return float(np.mean(scores))


class Perplexity(evaluate.Metric):
    """Exponential of the mean negative log-likelihood per token, over all texts together."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp(sum of negative log-likelihoods / number of predicted tokens) over all texts.",
            citation="",
            inputs_description="predictions: summed negative log-likelihood of each text, in nats; "
            "references: number of predicted tokens of each text. Returns perplexity.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float]:
        tokens = int(np.sum(references))
        if tokens < 1:
            raise ValueError(f"Perplexity needs at least one predicted token, given {tokens}.")
        return {"perplexity": float(np.exp(np.sum(predictions, dtype=np.float64) / tokens))}


class ExactMatchF1(evaluate.Metric):
    """Exact match and token F1 of answers, as SQuAD defines them."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of answers that equal a reference answer, and the mean over answers of the "
            "best token-overlap F1, after lower-casing and dropping punctuation and articles.",
            citation="Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, arXiv:1606.05250",
            inputs_description="predictions: list of answer strings; references: for each a list of "
            "acceptable answers (empty: the right answer is the empty string). Returns exact_match and "
            "f1, in [0, 1].",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        exact, overlap = [], []
        for prediction, answers in zip(predictions, references, strict=True):
            given = _normalize(prediction)
            accepted = [_normalize(answer) for answer in answers] or [[]]
            exact.append(any(given == answer for answer in accepted))
            overlap.append(max(_token_f1(given, answer) for answer in accepted))
        return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def _normalize(answer: str) -> list[str]:
    text = "".join(character for character in answer.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _token_f1(given: list[str], answer: list[str]) -> float:
    if not given or not answer:
        return float(given == answer)
    shared = sum((Counter(given) & Counter(answer)).values())
    return 2.0 * shared / (len(given) + len(answer))


BUNDLED_METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
    "perplexity": Perplexity,
    "exact_match_f1": ExactMatchF1,
}


def load_metrics(
    names: Sequence[str], *, num_process: int = 1, process_id: int = 0, experiment_id: str | None = None
) -> evaluate.CombinedEvaluations:
    """Several metrics as one: `add_batch(predictions=..., references=...)`, then `compute()` to one
    dictionary.

    Args:
        names: bundled metrics (`BUNDLED_METRICS`); any other name goes to `evaluate.load`, which asks the
            Hub.
        num_process: processes that add batches; with several, process 0 computes over all and the others get
            None.
        process_id: this process, from 0.
        experiment_id: name, the same in all processes, that keeps simultaneous evaluations apart; required
            with several processes.

    Raises:
        ValueError: for no name, a missing `experiment_id`, or a name that is not bundled and that
            `evaluate.load` cannot find; the bundled ones are listed.
    """
    if not names:
        raise ValueError(f"No metric was named. Bundled: {', '.join(BUNDLED_METRICS)}.")
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
        return evaluate.load(name, **options)
    except (OSError, ConnectionError, ValueError) as error:
        raise ValueError(
            f"The metric {name!r} is not bundled and evaluate.load could not get it from the Hub: {error}. "
            f"Bundled: {', '.join(BUNDLED_METRICS)}."
        ) from error


class _Combined(evaluate.CombinedEvaluations):
    """`evaluate.combine` that also works in processes other than the first, whose parts compute None."""

    def _merge_results(self, results: list[dict[str, Any] | None]) -> dict[str, Any] | None:
        if any(result is None for result in results):
            return None
        return super()._merge_results(results)
