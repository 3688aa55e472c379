"""A set of long documents, and how documents are split and thinned without leaking."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

__all__ = ["DocumentTask", "default_cache_dir", "documents_to_dataset", "group_split", "stratified_subset"]

logger = logging.getLogger(__name__)

# Candidate splits that are drawn before the most even one is taken: fewer where there are many groups, of which any
# draw is even.
_SPLIT_CANDIDATES = 200
_SPLIT_STEPS = 200_000


@dataclass(frozen=True)
class DocumentTask:
    """Documents for a task.

    Attributes:
        name: short name of the documents.
        train: the columns of `hf_linear_attn.data.kinds.KINDS[kind]`, and `group` (str): what must not be in both
            parts, a file's name or `<file>:<row>` where nothing better is known. An `IterableDataset` when streamed.
        test: the same columns.
        label_names: name of each label; the name of the one column of a regression; empty without labels.
        description: what is to be predicted from what, in a sentence or two.
        generated: whether the documents were made by a program for the purpose of testing.
        source: where the documents come from.
        note: what a reader must know, e.g. that a fallback was taken or rows were left out; empty if nothing.
        kind: the task, a key of `KINDS`.
    """

    name: str
    train: Dataset
    test: Dataset
    label_names: list[str]
    description: str
    generated: bool
    source: str
    note: str = ""
    kind: str = "sequence_classification"

    @property
    def num_labels(self) -> int:
        """Number of classes, of labels that may be set, or of numbers to predict."""
        return len(self.label_names)


def default_cache_dir() -> Path:
    """Where fetched documents are kept: under `HF_HOME` if it is set, else `~/.cache/hf_linear_attn`."""
    home = os.environ.get("HF_HOME")
    return Path(home).expanduser() / "hf_linear_attn" if home else Path.home() / ".cache" / "hf_linear_attn"


def documents_to_dataset(texts: Sequence[str], labels: Sequence[int], groups: Sequence[str]) -> Dataset:
    """A table for sequence classification."""
    return Dataset.from_dict({"text": list(texts), "label": [int(y) for y in labels], "group": list(groups)})


def group_split(
    labels: Sequence[int], groups: Sequence[str], test_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split documents so that no group is on both sides and every label is.

    Of some random candidates the one whose share of test documents is nearest to
    `test_fraction`, overall and for each label, is taken; the result depends on `seed` only.

    Args:
        labels: label of each document.
        groups: group of each document (author, folder, ...).
        test_fraction: wanted share of test documents, between 0 and 1.
        seed: seed of the candidates.

    Returns:
        indices of the training documents and of the test documents, ascending.

    Raises:
        ValueError: for a fraction outside (0, 1), or if no candidate has every label on both sides.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, given {test_fraction}.")
    label_array = np.asarray(labels)
    names, group_array = np.unique(np.asarray(groups), return_inverse=True)
    # counts[g, y]: documents of group g with label y
    counts = np.zeros((len(names), int(label_array.max()) + 1), dtype=np.int64)
    np.add.at(counts, (group_array, label_array), 1)
    totals = counts.sum(0)
    present = totals > 0

    rng = np.random.default_rng(seed)
    best: tuple[float, np.ndarray] | None = None
    for _ in range(max(1, min(_SPLIT_CANDIDATES, _SPLIT_STEPS // len(names)))):
        order = rng.permutation(len(names))
        # Take a group while it brings the labels, on the whole, nearer to the wanted share.
        chosen = np.zeros(len(names), dtype=bool)
        taken = np.zeros_like(totals)
        for group in order:
            gain = _imbalance(taken, totals, test_fraction) - _imbalance(taken + counts[group], totals, test_fraction)
            if gain > 0:
                chosen[group] = True
                taken = taken + counts[group]
        if not (np.all(taken[present] > 0) and np.all(taken[present] < totals[present])):
            continue
        cost = _imbalance(taken, totals, test_fraction)
        if best is None or cost < best[0]:
            best = (cost, chosen)
    if best is None:
        single = [int(y) for y in np.flatnonzero(present) if (counts[:, y] > 0).sum() < 2]
        raise ValueError(
            f"Cannot split {len(label_array)} documents in {len(names)} groups with every label in both parts"
            + (f": label(s) {single} occur in one group only." if single else "; a test_fraction nearer to 0.5 may do.")
        )
    in_test = best[1][group_array]
    return np.flatnonzero(~in_test).tolist(), np.flatnonzero(in_test).tolist()


def _imbalance(taken: np.ndarray, totals: np.ndarray, fraction: float) -> float:
    """Distance of the taken share from `fraction`, of each label (squared: none is starved) and overall."""
    present = totals > 0
    per_label = np.square(taken[present] / totals[present] - fraction).mean()
    return float(per_label + np.square(taken.sum() / totals.sum() - fraction))


def stratified_subset(dataset: Dataset, max_documents: int | None, seed: int) -> Dataset:
    """At most `max_documents` documents, with the shares of classes kept as well as whole documents allow.

    Raises:
        ValueError: if `max_documents` is below the number of classes in `dataset`.
    """
    if max_documents is None or max_documents >= len(dataset):
        return dataset
    # What has no classes is one: lists, numbers of a regression, and indices into choices that differ by document.
    feature = dataset.features.get("label")
    classes = "text" in dataset.features and feature is not None and getattr(feature, "dtype", "") == "int64"
    labels = np.asarray(dataset["label"]) if classes else np.zeros(len(dataset), dtype=np.int64)
    counts = Counter(labels.tolist())
    if max_documents < len(counts):
        raise ValueError(f"max_documents={max_documents} is below the number of labels, {len(counts)}.")
    rng = np.random.default_rng(seed)
    # Deal the documents of each label into evenly spaced ranks; the lowest ranks are an even subset. The
    # first of each label comes before everything else, so that no label is lost.
    rank = np.empty(len(labels))
    for label in counts:
        where = rng.permutation(np.flatnonzero(labels == label))
        rank[where] = (np.arange(len(where)) + 0.5) / len(where)
        rank[where[0]] = -1.0
    return dataset.select(sorted(np.argsort(rank, kind="stable")[:max_documents].tolist()))
