"""What documents are for, and the columns that the tables of each task have."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from datasets import Features, List, Value

__all__ = ["KINDS", "LABEL_OF", "check_fields", "check_kind", "find_columns", "name_and_allowed"]

_TEXT = Value("string")

# Task -> columns of its tables. Every table has `group` beside them.
KINDS: dict[str, Features] = {
    "text": Features({"text": _TEXT}),
    "sequence_classification": Features({"text": _TEXT, "label": Value("int64")}),
    "multi_label_classification": Features({"text": _TEXT, "label": List(Value("float32"))}),
    "regression": Features({"text": _TEXT, "label": Value("float64")}),
    "token_classification": Features({"tokens": List(_TEXT), "label": List(Value("int64"))}),
    "question_answering": Features(
        {"question": _TEXT, "context": _TEXT, "answers": {"text": List(_TEXT), "answer_start": List(Value("int64"))}}
    ),
    "multiple_choice": Features({"context": _TEXT, "question": _TEXT, "choices": List(_TEXT), "label": Value("int64")}),
}

# The column that a model learns to predict; rows of a test part may lack it.
LABEL_OF: dict[str, str | None] = {
    "text": None,
    "question_answering": "answers",
} | {kind: "label" for kind in KINDS if kind not in ("text", "question_answering")}


def name_and_allowed(what: str, given: object, allowed: Iterable[str]) -> str:
    """The sentence for a name that is not known: what was given, a close match, what is allowed."""
    names = list(allowed)
    close = difflib.get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{what} {given!r} is not known.{hint} Allowed: {', '.join(names)}."


def check_kind(kind: str) -> None:
    """Raise a `ValueError` for a task that is none of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(name_and_allowed("The task", kind, KINDS))


def check_fields(fields: Mapping[str, str] | None, kind: str) -> dict[str, str]:
    """`fields` as a dictionary, after its names were held against the columns of the task.

    Raises:
        ValueError: for something that is no mapping of names, or a field that the task does not have.
    """
    if fields is None:
        return {}
    if not isinstance(fields, Mapping) or not all(isinstance(name, str) for pair in fields.items() for name in pair):
        raise ValueError(f"fields must map our columns to the source's, as {{text: body}}; given {fields!r}.")
    allowed = [*KINDS[kind], "group"]
    if kind == "text":
        allowed.append("label")  # of a labeled source, whose labels are dropped
    for name in fields:
        if name not in allowed:
            raise ValueError(name_and_allowed(f"The field of {kind}", name, allowed))
    return dict(fields)


def find_columns(available: Sequence[str], fields: Mapping[str, str], kind: str, where: str) -> dict[str, str]:
    """Column of the source for each column of the task, and for `group` where the source has one.

    Args:
        available: columns of the source.
        fields: our column -> the source's, where they differ.
        kind: the task.
        where: file or split, for the message.

    Raises:
        ValueError: for a column that is not there; names those that are, and a close one.
    """
    columns = {name: fields.get(name, name) for name in KINDS[kind]}
    if "group" in fields or "group" in available:
        columns["group"] = fields.get("group", "group")
    for ours, theirs in columns.items():
        if theirs not in available:
            close = difflib.get_close_matches(theirs, available, n=1) or difflib.get_close_matches(ours, available, n=1)
            hint = f" Did you mean fields={{{ours}: {close[0]}}}?" if close else ""
            raise ValueError(
                f"{where} has no column {theirs!r}, wanted as {ours!r} of {kind}.{hint} "
                f"Available: {', '.join(available) or 'none'}."
            )
    return columns
