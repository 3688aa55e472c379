"""Scores of a retrieval: ranks of the right documents, and what means and intervals are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_linear_attn.measure.bootstrap import bootstrap_interval, paired_bootstrap_difference

__all__ = ["rank_documents", "summarize"]


def rank_documents(queries: np.ndarray, documents: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each query's own document comes among all documents, by cosine.

    Args:
        queries: vectors of norm 1 `[Q, W]`.
        documents: vectors of norm 1 `[N, W]`, N at least 2.
        owners: index of the document that each query was taken from `[Q]`.

    Returns:
        ranks `[Q]`, from 1: a document that scores the same as the right one comes before it, so that equal vectors
        find nothing; and gaps `[Q]`: the right document's cosine less the best other one's.
    """
    cosines = queries.astype(np.float64) @ documents.astype(np.float64).T  # [Q, N]
    rows = np.arange(len(owners))
    own = cosines[rows, owners]
    others = cosines.copy()
    others[rows, owners] = -np.inf
    return 1 + (others >= own[:, None]).sum(1), own - others.max(1)


def summarize(
    row: Mapping[str, Any], groups: Sequence[str], against: Mapping[str, Mapping[str, Any]], num_resamples: int
) -> dict[str, Any]:
    """Means over queries with 95% intervals over groups, and differences to other systems on the same queries.

    Args:
        row: with `ranks` and `gaps`, one for each query.
        groups: of each query's document.
        against: name to row of a system that top-1 is compared with; the row itself is left out.
        num_resamples: of the bootstrap.

    Returns:
        `{"top1", "mrr", "gap", "top1_less": {name: ...}}`, intervals as `{"mean", "low", "high"}`.
    """
    ranks = np.asarray(row["ranks"])
    scores = {"top1": ranks == 1, "mrr": 1 / ranks, "gap": np.asarray(row["gaps"])}
    found: dict[str, Any] = {
        name: bootstrap_interval(values, groups, num_resamples).to_dict() for name, values in scores.items()
    }
    found["top1_less"] = {
        name: paired_bootstrap_difference(
            scores["top1"], np.asarray(other["ranks"]) == 1, groups, num_resamples
        ).to_dict()
        for name, other in against.items()
        if other is not row
    }
    return found
