"""A row of a source becomes a row of a task's table, or a sentence that says what does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from hf_linear_attn.data.labels import Labels, UnfitError

__all__ = ["read_row"]


class EmptyError(UnfitError):
    """A text that is not there."""


def read_row(row: Mapping[str, Any], columns: Mapping[str, str], kind: str, labels: Labels, where: str) -> dict:
    """The columns of a task, checked.

    Args:
        row: of the source.
        columns: our column -> the source's.
        kind: the task, one of `KINDS`.
        labels: of the training part.
        where: file and row, for the message.

    Raises:
        ValueError: naming file, row, column and what was found.
    """
    read: dict[str, Any] = {}
    for ours, theirs in columns.items():
        try:
            read[ours] = _READERS[ours](row[theirs], kind, labels, read)
        except UnfitError as error:
            raise ValueError(f"{where}, column {theirs!r} {error}.") from None
    return read


def _document(value: Any, *_: Any) -> str:
    try:
        return _text(value)
    except EmptyError as error:
        raise UnfitError(f"{error} (drop_empty=true leaves such rows out)") from None


def _text(value: Any, *_: Any) -> str:
    if isinstance(value, list) and all(isinstance(paragraph, str) for paragraph in value):
        value = "\n\n".join(value)  # a document may come as its paragraphs
    return _string(value)


def _string(value: Any, *_: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise EmptyError("is empty")
    if not isinstance(value, str):
        raise UnfitError(f"must be text, given {_shown(value)}")
    if not value.strip():
        raise EmptyError("is empty")
    return value


def _strings(value: Any, *_: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise UnfitError(f"must be a list of texts, given {_shown(value)}")
    if not value:
        raise UnfitError("is an empty list")
    return value


def _choices(value: Any, *_: Any) -> list[str]:
    choices = _strings(value)
    if len(choices) < 2:
        raise UnfitError(f"must hold at least two choices, given {_shown(value)}")
    for choice in choices:
        if not choice.strip():
            raise UnfitError("holds an empty choice")
    return choices


def _label(value: Any, kind: str, labels: Labels, read: Mapping[str, Any]) -> Any:
    if kind == "sequence_classification":
        return labels.encode(value)
    if kind == "multi_label_classification":
        return labels.encode_set(value)
    if kind == "token_classification":
        if not isinstance(value, list):
            raise UnfitError(f"must be a list, one label for each token, given {_shown(value)}")
        if len(value) != len(read["tokens"]):
            raise UnfitError(f"has {len(value)} labels for {len(read['tokens'])} tokens")
        return [labels.encode_token(entry) for entry in value]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        if kind == "multiple_choice" and isinstance(value, str):
            return _choice_of(value, read["choices"])
        raise UnfitError(f"must be a finite number, given {_shown(value)}")
    if kind == "regression":
        return float(value)
    if not float(value).is_integer() or not 0 <= value < len(read["choices"]):
        raise UnfitError(f"is {value!r}, there are choices 0 to {len(read['choices']) - 1}")
    return int(value)


def _choice_of(value: str, choices: list[str]) -> int:
    if choices.count(value) != 1:
        raise UnfitError(f"is {value!r}, which is not one of the choices {_shown(choices)}")
    return choices.index(value)


def _answers(value: Any, kind: str, labels: Labels, read: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Answers as {"text": [...], "answer_start": [...]}, from that or from a list of {"text", "answer_start"}."""
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        value = {name: [entry.get(name) for entry in value] for name in ("text", "answer_start")}
    if not isinstance(value, Mapping) or not {"text", "answer_start"} <= set(value):
        raise UnfitError(f"must be {{text: [...], answer_start: [...]}}, given {_shown(value)}")
    texts, starts = list(value["text"] or []), list(value["answer_start"] or [])
    if len(texts) != len(starts):
        raise UnfitError(f"has {len(texts)} texts and {len(starts)} starts")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise UnfitError(f"holds an answer that is no text: {_shown(text)}")
        if isinstance(start, bool) or not isinstance(start, int):
            raise UnfitError(f"holds an answer_start that is no whole number: {_shown(start)}")
        there = read["context"][max(start, 0) : max(start, 0) + len(text)]
        if start < 0 or there != text:
            raise UnfitError(
                f"says that {_shown(text)} starts at character {start} of the context, which has {there!r} there"
            )
    return {"text": texts, "answer_start": starts}


def _group(value: Any, *_: Any) -> str:
    if value is None or value == "" or value != value:  # NaN
        raise UnfitError("is empty")
    return str(value)


def _shown(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 100 else text[:97] + "..."


_READERS: dict[str, Callable[..., Any]] = {
    "text": _document,
    "context": _text,
    "question": _string,
    "tokens": _strings,
    "choices": _choices,
    "label": _label,
    "answers": _answers,
    "group": _group,
}
