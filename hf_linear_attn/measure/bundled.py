"""`evaluate` metrics that need no download, for every task of `hf_linear_attn.data.kinds.KINDS`.

`evaluate` itself carries no metric: `evaluate.load` fetches a script from the Hub. These are
`evaluate.Metric` subclasses, so that they combine with each other and with a user's Hub metric.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import datasets
import evaluate
import numpy as np

__all__ = [
    "Accuracy",
    "EntityF1",
    "ExactMatchF1",
    "MacroF1",
    "MeanSquaredError",
    "MultiLabelF1",
    "Pearson",
    "Perplexity",
    "TaskMetric",
    "TokenAccuracy",
    "macro_f1",
]


class TaskMetric(evaluate.Metric):
    """A metric that says which tasks it measures.

    Attributes:
        tasks: keys of `hf_linear_attn.data.kinds.KINDS`.
    """

    tasks: ClassVar[tuple[str, ...]]


def _of_classes(name: str, description: str) -> evaluate.MetricInfo:
    """Of a metric, in [0, 1], that compares class indices."""
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions: list of class indices; references: list of class indices. "
        f"Returns {name}, in [0, 1].",
        features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
    )


class Accuracy(TaskMetric):
    """Share of predicted classes that equal the reference."""

    tasks = ("sequence_classification", "multiple_choice")

    def _info(self) -> evaluate.MetricInfo:
        return _of_classes("accuracy", "Share of predictions that equal the reference.")

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MacroF1(TaskMetric):
    """Mean over classes of the F1 score, each class counting the same."""

    tasks = ("sequence_classification",)

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


class Perplexity(TaskMetric):
    """Exponential of the mean negative log-likelihood per token, over all texts together."""

    tasks = ("text",)

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


class ExactMatchF1(TaskMetric):
    """Exact match and token F1 of answers, as SQuAD defines them."""

    tasks = ("question_answering",)

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


def _info(description: str, inputs: str, feature: object) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=inputs,
        features=datasets.Features({"predictions": feature, "references": feature}),
    )


class MultiLabelF1(TaskMetric):
    """F1 of labels that may be set together: over all decisions (micro), and the mean over labels (macro)."""

    tasks = ("multi_label_classification",)

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "2 TP / (2 TP + FP + FN) over all documents and labels, and its mean over labels, where a label that is "
            "neither predicted nor there counts 0.",
            "predictions, references: for each document a list with 0 or 1 for each label. Returns micro_f1 and "
            "macro_f1, in [0, 1].",
            datasets.List(datasets.Value("float64")),
        )

    def _compute(
        self, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        predicted, real = np.asarray(predictions), np.asarray(references)  # [N, L]
        if not (np.isin(predicted, (0, 1)).all() and np.isin(real, (0, 1)).all()):
            raise ValueError(
                "Predictions and references of multi-label metrics must be 0 or 1: apply a threshold first."
            )
        shared, all_marks = np.sum(predicted * real, axis=0), np.sum(predicted + real, axis=0)  # [L]
        return {
            "micro_f1": float(2 * shared.sum() / max(all_marks.sum(), 1)),
            "macro_f1": float(np.mean(2 * shared / np.maximum(all_marks, 1))),
        }


class MeanSquaredError(TaskMetric):
    """Mean squared difference."""

    tasks = ("regression",)

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Mean of the squared differences.",
            "predictions, references: lists of numbers. Returns mse.",
            datasets.Value("float64"),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        return {"mse": float(np.mean(np.square(np.subtract(predictions, references))))}


class Pearson(TaskMetric):
    """Pearson's correlation."""

    tasks = ("regression",)

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Covariance over the product of standard deviations.",
            "predictions, references: lists of numbers. Returns pearson, in [-1, 1], or nan where either is constant.",
            datasets.Value("float64"),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        deviations = [np.subtract(values, np.mean(values)) for values in (predictions, references)]
        spread = np.sqrt(np.prod([np.sum(np.square(values)) for values in deviations]))
        return {"pearson": float(np.dot(*deviations) / spread) if spread > 0 else float("nan")}


_LABEL_LISTS = "predictions, references: for each document a list of label names, one for each scored token. Returns "


class TokenAccuracy(TaskMetric):
    """Share of tokens whose label is right."""

    tasks = ("token_classification",)

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Share of labels, over all tokens together, that equal the reference.",
            _LABEL_LISTS + "token_accuracy, in [0, 1].",
            datasets.List(datasets.Value("string")),
        )

    def _compute(self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
        pairs = _token_pairs(predictions, references)
        return {"token_accuracy": float(np.mean([predicted == real for predicted, real in pairs]))}


class EntityF1(TaskMetric):
    """Precision, recall and F1 of whole entities, as CoNLL counts them."""

    tasks = ("token_classification",)

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Shares of predicted entities that are right and of entities that are found, and their harmonic mean. "
            "Labels are O, B-<type> or I-<type>; an entity is right if its type, start and end are. I-<type> after "
            "anything but its own type opens an entity; a label without a prefix is a type, and its run an entity.",
            _LABEL_LISTS + "entity_precision, entity_recall and entity_f1, in [0, 1]; 0 where there is none.",
            datasets.List(datasets.Value("string")),
        )

    def _compute(self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
        _token_pairs(predictions, references)
        predicted, real = (
            {(document, *entity) for document, labels in enumerate(side) for entity in _entities(labels)}
            for side in (predictions, references)
        )
        right = len(predicted & real)
        return {
            "entity_precision": right / max(len(predicted), 1),
            "entity_recall": right / max(len(real), 1),
            "entity_f1": 2.0 * right / max(len(predicted) + len(real), 1),
        }


def _token_pairs(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    for document, (predicted, real) in enumerate(zip(predictions, references, strict=True)):
        if len(predicted) != len(real):
            raise ValueError(f"Document {document} has {len(predicted)} predicted labels and {len(real)} references.")
    return [pair for labels in zip(predictions, references, strict=True) for pair in zip(*labels, strict=True)]


def _entities(labels: Sequence[str]) -> list[tuple[int, int, str]]:
    """(start, end, type) of each entity of a document."""
    found: list[tuple[int, int, str]] = []
    start, current = 0, ""
    for index, label in enumerate([*labels, "O"]):
        prefix, kind = ("I", label) if label[:2] not in ("B-", "I-") else (label[0], label[2:])
        kind = "" if label == "O" else kind
        if current and (kind != current or prefix == "B"):
            found.append((start, index, current))
        if kind and (kind != current or prefix == "B"):
            start = index
        current = kind
    return found
