"""Documents with passages taken out of them, and other documents to calibrate on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_linear_attn.bench.retrieval.recipe import DocumentsRecipe, PassagesRecipe
from hf_linear_attn.data import load_documents
from hf_linear_attn.data.passages import cut_passages
from hf_linear_attn.data.tokenization import encode_leading

__all__ = ["Corpus", "build_corpus", "near_duplicates", "take_passages"]

_GRAM = 8  # tokens
_SHARED = 0.2  # of a document's grams: more of them in an earlier document, and it counts as the same one

Tokens = list[int]


@dataclass(frozen=True)
class Corpus:
    """What is searched, and with what.

    Attributes:
        documents: token ids of what is left of each document, without special tokens.
        groups: group of each document (its author, say).
        queries: token ids of the passages.
        owners: index of the document that each passage was taken from `[Q]`.
        calibration: texts of documents of other groups.
        about: counts, where the documents come from, and a digest of all token ids.
    """

    documents: list[Tokens]
    groups: list[str]
    queries: list[Tokens]
    owners: np.ndarray
    calibration: list[str]
    about: dict[str, Any]

    @property
    def query_groups(self) -> list[str]:
        """Group of each query."""
        return [self.groups[owner] for owner in self.owners]


def build_corpus(documents: DocumentsRecipe, passages: PassagesRecipe, tokenizer: Any) -> Corpus:
    """Load, leave out what is short or there twice, and take the passages out.

    Raises:
        ValueError: for fewer than two documents that are long enough, or what `load_documents` raises.
    """
    task = load_documents(documents.source, seed=documents.seed, **documents.options)
    encoded = encode_leading(list(task.test["text"]), tokenizer, None, add_special_tokens=False)
    names = list(task.test["group"])
    long = [index for index, tokens in enumerate(encoded) if len(tokens) >= documents.min_tokens]
    same = near_duplicates([encoded[index] for index in long])
    kept = [index for place, index in enumerate(long) if place not in same]
    rng = np.random.default_rng(documents.seed)
    if documents.max_documents is not None:
        kept = sorted(rng.permutation(kept)[: documents.max_documents].tolist())
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} of {len(encoded)} documents of {documents.source!r} have {documents.min_tokens} tokens "
            "(documents.min_tokens); a retrieval needs at least 2."
        )
    rest, queries, owners = [], [], []
    for place, index in enumerate(kept):
        left, taken = take_passages(encoded[index], passages, rng)
        rest.append(left)
        queries += taken
        owners += [place] * len(taken)
    groups = [names[index] for index in kept]
    digest = hashlib.sha256(repr((rest, queries)).encode()).hexdigest()
    lengths = [len(encoded[index]) for index in kept]
    about = {
        "source": task.source,
        "note": task.note,
        "documents": len(kept),
        "groups": len(set(groups)),
        "queries": len(queries),
        "median_tokens": int(np.median(lengths)),
        "too_short": len(encoded) - len(long),
        "duplicates": len(same),
        "calibration_documents": len(task.train),
        "digest": digest[:16],
    }
    return Corpus(rest, groups, queries, np.asarray(owners), list(task.train["text"]), about)


def take_passages(
    document: Sequence[int], passages: PassagesRecipe, rng: np.random.Generator
) -> tuple[Tokens, list[Tokens]]:
    """What is left of a document, and its passages; their margins are in neither."""
    span = passages.tokens + 2 * passages.margin
    # Places between the spans, drawn as if each span were a point: any two sets of places are as likely.
    drawn_from = len(document) if passages.within is None else min(len(document), passages.within)
    free = np.sort(rng.integers(drawn_from - passages.count * span + 1, size=passages.count))
    starts = free + span * np.arange(passages.count)
    return cut_passages(document, starts.tolist(), passages.tokens, passages.margin)


def near_duplicates(documents: Sequence[Sequence[int]]) -> set[int]:
    """Indices of documents of whose 8-grams more than a fifth stands in one earlier document that is kept."""
    first: dict[int, int] = {}
    found = set()
    for index, document in enumerate(documents):
        grams = set(map(hash, zip(*(document[shift:] for shift in range(_GRAM)), strict=False)))
        shared = Counter(first[gram] for gram in grams if gram in first)
        if max(shared.values(), default=0) > _SHARED * len(grams):
            found.add(index)
            continue
        for gram in grams:
            first.setdefault(gram, index)
    return found
