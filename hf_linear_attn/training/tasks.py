"""The tasks that a model is fine-tuned for: from documents to what its head takes, and from logits to predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from hf_linear_attn.data.tokenization import encode_leading

__all__ = ["TASKS", "Task", "get_task"]

Rows = Mapping[str, list[Any]]
IGNORED = -100
"""Label of a token that no loss and no metric counts (PyTorch's default)."""


@dataclass(frozen=True)
class Task:
    """One kind of fine-tuning.

    Attributes:
        name: key.
        auto_class: the Auto class of its head.
        metrics: what is measured unless a recipe says otherwise; the first one is compared.
        encode: rows of documents to rows of model inputs, `(rows, tokenizer, max_length) -> columns`.
        collator: `(tokenizer) -> collator`.
        predict: `(logits, labels, encoded rows, label names) -> (predictions, references)` for the metrics.
        problem_type: of the model's config, where one head serves several.
    """

    name: str
    auto_class: str
    metrics: tuple[str, ...]
    encode: Callable[[Rows, Any, int], dict[str, list[Any]]]
    collator: Callable[[Any], Any]
    predict: Callable[[Any, Any, Dataset, Sequence[str]], tuple[list[Any], list[Any]]]
    problem_type: str | None = None

    def prepare(self, data: Any, tokenizer: Any, max_length: int) -> Any:
        """Documents as rows that the collator takes; rows with `input_ids` pass.

        Raises:
            ValueError: for documents without a tokenizer.
        """
        if not hasattr(data, "map") or "input_ids" in data.column_names:
            return data
        if tokenizer is None:
            raise ValueError(f"Documents for {self.name} need processing_class, a tokenizer")
        kept = {"document"} & set(data.column_names)
        drop = [name for name in data.column_names if name not in kept]
        return data.map(lambda rows: self.encode(rows, tokenizer, max_length), batched=True, remove_columns=drop)


def get_task(name: str) -> Task:
    """The task of that name; `ValueError` with the names there are for another."""
    if name not in TASKS:
        raise ValueError(f"task={name!r}; allowed: {', '.join(TASKS)}")
    return TASKS[name]


def _columns(ids: list[list[int]], documents: list[Any]) -> dict[str, list[Any]]:
    """Ids, masks, and the length of each whole document in its own unit: batches must not depend on what is cut."""
    lengths = [len(document) for document in documents]
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "length": lengths}


def _encode_texts(rows: Rows, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
    return {**_columns(encode_leading(rows["text"], tokenizer, max_length), rows["text"]), "labels": rows["label"]}


def _encode_tokens(rows: Rows, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
    """The label of a word stands at its first piece; words that were cut off are not counted."""
    encoded = tokenizer(rows["tokens"], is_split_into_words=True, truncation=True, max_length=max_length)
    labels = []
    for index, own in enumerate(rows["label"]):
        words = encoded.word_ids(index)
        first = [word is not None and (place == 0 or words[place - 1] != word) for place, word in enumerate(words)]
        labels.append([own[word] if is_first else IGNORED for word, is_first in zip(words, first, strict=True)])
    return {**_columns(encoded["input_ids"], rows["tokens"]), "labels": labels}


def _encode_questions(rows: Rows, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
    """Question and whole context in one input; an answer that was cut off, or that there is none of, is at token 0."""
    _check_room(rows["question"], "a question", tokenizer, max_length)
    encoded = tokenizer(
        rows["question"], rows["context"], truncation="only_second", max_length=max_length, return_offsets_mapping=True
    )
    starts: list[int] = []
    ends: list[int] = []
    offsets: list[list[list[int]]] = []
    for index, answers in enumerate(rows["answers"]):
        sides = encoded.sequence_ids(index)
        spans = [
            span if side == 1 else (-1, -1) for span, side in zip(encoded["offset_mapping"][index], sides, strict=True)
        ]
        start, end = _span(spans, answers)
        starts.append(start)
        ends.append(end)
        offsets.append([list(span) for span in spans])
    kept = {"start_positions": starts, "end_positions": ends, "offsets": offsets}
    references = {"context": rows["context"], "references": [answers["text"] for answers in rows["answers"]]}
    types = {"token_type_ids": encoded["token_type_ids"]} if "token_type_ids" in encoded else {}
    return {**_columns(encoded["input_ids"], rows["context"]), **types, **kept, **references}


def _check_room(texts: list[str], what: str, tokenizer: Any, max_length: int) -> None:
    """Raise `ValueError` where a text, which is never cut, leaves no room for its context."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    longest = max(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
    if longest + special >= max_length:
        raise ValueError(
            f"max_length={max_length} leaves no room for the context beside {what} of {longest} tokens and {special} "
            "special ones"
        )


def _span(spans: list[tuple[int, int]], answers: Mapping[str, list[Any]]) -> tuple[int, int]:
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    first = next((place for place, (left, right) in enumerate(spans) if left <= begin < right), None)
    last = next((place for place, (left, right) in enumerate(spans) if left < end <= right), None)
    return (0, 0) if first is None or last is None else (first, last)


def _encode_choices(rows: Rows, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
    ids: list[list[list[int]]] = []
    for context, question, choices in zip(rows["context"], rows["question"], rows["choices"], strict=True):
        second = [f"{question} {choice}".strip() for choice in choices]
        _check_room(second, "a question and its choice", tokenizer, max_length)
        encoded = tokenizer([context] * len(second), second, truncation="only_first", max_length=max_length)
        ids.append(encoded["input_ids"])
    return {
        "input_ids": ids,
        "attention_mask": [[[1] * len(row) for row in choices] for choices in ids],
        "length": [len(context) for context in rows["context"]],
        "labels": rows["label"],
    }


def _classes(logits: Any, labels: Any, *_: Any) -> tuple[list[Any], list[Any]]:
    return np.argmax(logits, axis=-1).tolist(), np.asarray(labels).tolist()


def _each_label(logits: Any, labels: Any, *_: Any) -> tuple[list[Any], list[Any]]:
    return (np.asarray(logits) > 0).astype(int).tolist(), np.asarray(labels).astype(int).tolist()


def _values(logits: Any, labels: Any, *_: Any) -> tuple[list[Any], list[Any]]:
    return np.asarray(logits).reshape(-1).tolist(), np.asarray(labels).reshape(-1).tolist()


def _token_classes(logits: Any, labels: Any, _: Dataset, names: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Label of every word, document by document."""
    counted = np.asarray(labels) != IGNORED
    predictions, references = (
        [[names[label] for label in row[keep]] for row, keep in zip(side, counted, strict=True)]
        for side in (np.argmax(logits, axis=-1), np.asarray(labels))
    )
    return predictions, references


_LONGEST_ANSWER = 30  # tokens, as SQuAD's own scripts have it


def _answers(logits: Any, labels: Any, rows: Dataset, names: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """The best span of each context as text, empty where token 0 is better."""
    starts, ends = logits
    found = []
    for index, row in enumerate(rows):
        offsets = np.asarray(row["offsets"])
        inside = offsets[:, 0] >= 0
        length = len(offsets)
        best = _best_span(starts[index][:length], ends[index][:length], inside)
        nothing = starts[index][0] + ends[index][0]
        if best is None or best[0] <= nothing:
            found.append("")
            continue
        _, first, last = best
        found.append(row["context"][offsets[first, 0] : offsets[last, 1]])
    return found, [row["references"] for row in rows]


def _best_span(starts: Any, ends: Any, inside: Any) -> tuple[float, int, int] | None:
    best: tuple[float, int, int] | None = None
    for first in np.flatnonzero(inside):
        window = slice(first, first + _LONGEST_ANSWER)
        allowed = np.where(inside[window], ends[window], -np.inf)
        last = int(np.argmax(allowed))
        score = float(starts[first] + allowed[last])
        if best is None or score > best[0]:
            best = (score, int(first), int(first + last))
    return best


class _QuestionCollator(DataCollatorWithPadding):
    """Pads what the model takes; offsets and texts stay behind."""

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        names = ("input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions")
        return super().__call__([{name: row[name] for name in names if name in row} for row in features])


TASKS = {
    task.name: task
    for task in (
        Task(
            "sequence_classification",
            "AutoModelForSequenceClassification",
            ("accuracy", "macro_f1"),
            _encode_texts,
            DataCollatorWithPadding,
            _classes,
            "single_label_classification",
        ),
        Task(
            "multi_label_classification",
            "AutoModelForSequenceClassification",
            ("multi_label_f1",),
            _encode_texts,
            DataCollatorWithPadding,
            _each_label,
            "multi_label_classification",
        ),
        Task(
            "regression",
            "AutoModelForSequenceClassification",
            ("pearson", "mse"),
            _encode_texts,
            DataCollatorWithPadding,
            _values,
            "regression",
        ),
        Task(
            "token_classification",
            "AutoModelForTokenClassification",
            ("token_accuracy", "entity_f1"),
            _encode_tokens,
            DataCollatorForTokenClassification,
            _token_classes,
        ),
        Task(
            "question_answering",
            "AutoModelForQuestionAnswering",
            ("exact_match_f1",),
            _encode_questions,
            _QuestionCollator,
            _answers,
        ),
        Task(
            "multiple_choice",
            "AutoModelForMultipleChoice",
            ("accuracy",),
            _encode_choices,
            DataCollatorForMultipleChoice,
            _classes,
        ),
    )
}
