"""Perplexity of a causal language model on held-out documents, each document's own likelihood kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["document_likelihoods"]


@torch.no_grad()
def document_likelihoods(model: Any, documents: Sequence[Sequence[int]], length: int) -> list[float]:
    """Negative log-likelihood of the first `length` tokens of each document, in nats per predicted token.

    Args:
        model: a causal language model; in eval mode meanwhile.
        documents: token ids of each document, at least `length` of them; one document a forward.
        length: tokens that are read, of which all but the first are predicted.

    Returns:
        one number a document: the exponential of their mean is the perplexity.

    Raises:
        ValueError: for a document that is shorter, a length below 2, or a likelihood that is not finite.
    """
    if length < 2 or any(len(ids) < length for ids in documents):
        raise ValueError(f"length={length}: a likelihood needs 2 tokens, and documents that are not shorter")
    found: list[float] = []
    training = model.training
    model.eval()
    try:
        for ids in documents:
            tokens = torch.tensor([list(ids[:length])], device=model.device)
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
            value = float(F.cross_entropy(logits, tokens[0, 1:]))
            if value != value or value == float("inf"):
                raise ValueError(f"The likelihood of document {len(found)} is not finite")
            found.append(value)
    finally:
        model.train(training)
    return found
