"""What a causal language model writes: greedy continuations, how much of them repeats, keys that they give back.

A student that is close to its checkpoint by the likelihood of given texts may be far behind it when it writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["continuation_likelihoods", "greedy_continuations", "recalls_keys", "repeated_share"]


def greedy_continuations(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The most likely token after a prompt, and so on, by the model's own `generate`.

    A prompt is read alone, without padding. End-of-text tokens are held back, so that every model writes as much; the
    penalties for repetition that a checkpoint may ask for are left out, since they would hide what is measured.

    Args:
        model: a causal language model; in eval mode meanwhile.
        prompts: token ids of each, at least one.
        new_tokens: how many are written, at least one.

    Returns:
        `new_tokens` ids for each prompt.

    Raises:
        ValueError: for an empty prompt, or fewer new tokens than one.
    """
    if new_tokens < 1 or not all(len(ids) for ids in prompts):
        lengths = [len(ids) for ids in prompts]
        raise ValueError(f"A continuation needs a prompt and a new token, got {new_tokens=} and prompts of {lengths}")
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    found: list[list[int]] = []
    training = model.training
    model.eval()
    try:
        for ids in prompts:
            tokens = torch.tensor([list(ids)], device=model.device)
            written = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=0,  # none is needed
                **greedy,
            )
            found.append(written[0, len(ids) :].tolist())
    finally:
        model.train(training)
    return found


def repeated_share(ids: Sequence[int], size: int = 4) -> float:
    """Share of a text's n-grams that stood in it before: 0 if no two are equal (`seq-rep-n` of arXiv:1908.04319).

    Args:
        ids: of the text.
        size: n.

    Raises:
        ValueError: for fewer tokens than n.
    """
    if size < 1 or len(ids) < size:
        raise ValueError(f"A text of {len(ids)} tokens has no {size}-grams")
    grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams)


@torch.no_grad()
def continuation_likelihoods(
    model: Any, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> list[float]:
    """Negative log-likelihood of each continuation after its prompt, in nats per token of the continuation.

    Args:
        model: the causal language model that judges; in eval mode meanwhile.
        prompts: token ids of each, at least one.
        continuations: likewise.

    Returns:
        one number a continuation: the exponential of their mean is the perplexity.

    Raises:
        ValueError: for an empty prompt or continuation, unequal numbers of them, or a likelihood that is not finite.
    """
    if len(prompts) != len(continuations) or not all(map(len, [*prompts, *continuations])):
        raise ValueError(f"A likelihood needs a prompt and a continuation, got {len(prompts)} and {len(continuations)}")
    found: list[float] = []
    training = model.training
    model.eval()
    try:
        for prompt, written in zip(prompts, continuations, strict=True):
            tokens = torch.tensor([[*prompt, *written]], device=model.device)
            logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            value = float(F.cross_entropy(logits, tokens[0, len(prompt) :]))
            if not math.isfinite(value):
                raise ValueError(f"The likelihood of continuation {len(found)} is not finite")
            found.append(value)
    finally:
        model.train(training)
    return found


def recalls_keys(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], keys: Sequence[str], new_tokens: int
) -> list[bool]:
    """Whether what a model writes after each prompt begins with its key, a number that goes no further.

    Args:
        model: see `greedy_continuations`.
        tokenizer: of the model.
        prompts: token ids of each.
        keys: digits that are to be written after each.
        new_tokens: that are written after each: a key and what follows it, by which a longer number is told from it.

    Raises:
        ValueError: for an empty prompt.
    """
    found = []
    continuations = greedy_continuations(model, prompts, new_tokens)
    for written, key in zip(continuations, keys, strict=True):
        text = tokenizer.decode(written).strip()
        found.append(text.startswith(key) and not text[len(key) :][:1].isdigit())
    return found
