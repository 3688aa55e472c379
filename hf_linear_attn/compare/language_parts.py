"""What a comparison of language models measures of each: likelihood, cost, what it writes, keys that it finds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_linear_attn.data import load_documents
from hf_linear_attn.measure.generation import (
    continuation_likelihoods,
    greedy_continuations,
    recalls_keys,
    repeated_share,
)
from hf_linear_attn.measure.methods import RefusedError
from hf_linear_attn.measure.perplexity import document_likelihoods
from hf_linear_attn.measure.profile import forward_time_against_length
from hf_linear_attn.training.evaluation import EvaluationRecipe, GenerationRecipe
from hf_linear_attn.training.recipe import Recipe

__all__ = ["Part", "last_parts", "likelihood_part", "prompt_places"]

_ANSWER_TOKENS = 7  # five digits, at worst a token each, the space before them and what follows


@dataclass(frozen=True)
class Part:
    """A row of a system after a stage.

    Attributes:
        identity: what tells the row from the others of that system and stage.
        label: the same for readers.
        measure: `(model, checkpoint) -> {...}`, the rest of the row; `checkpoint()` is the softmax model.
        spell: the row in a few words.
    """

    identity: dict[str, Any]
    label: str
    measure: Callable[[Any, Callable[[], Any]], dict[str, Any]]
    spell: Callable[[Mapping[str, Any]], str]


def likelihood_part(documents: Sequence[Sequence[int]], length: int) -> Part:
    """Perplexity of the first `length` tokens of each document; every stage has it."""

    def measure(model: Any, _: Callable[[], Any]) -> dict[str, Any]:
        nats = document_likelihoods(model, documents, length)
        return {"nats": nats, "perplexity": math.exp(statistics.fmean(nats))}

    spell = "perplexity {perplexity:.3f}".format_map
    return Part({"length": length}, f"{length:,} tokens", measure, spell)


def last_parts(recipe: Recipe, tokenizer: Any, documents: Sequence[Sequence[int]], limit: int) -> list[Part]:
    """What is measured of a system once it has gone through all of its stages, as `recipe.evaluation` asks for it.

    Args:
        recipe: of the comparison.
        tokenizer: of its checkpoint.
        documents: token ids of the held-out documents, cut behind the longest prompt or later.
        limit: tokens that the checkpoint reads.

    Raises:
        ValueError: for a prompt that too few documents are long enough for, texts that are longer than the
            checkpoint reads, or a length that holds no pass key.
    """
    evaluation = recipe.evaluation
    parts = [_cost_part(n, evaluation.forward_repeats) for n in evaluation.forward_lengths if n <= limit]
    if evaluation.generation is not None:
        parts.append(_writing_part(evaluation.generation, tokenizer, documents, limit))
    lengths = dict.fromkeys(evaluation.passkey_lengths)
    return [*parts, *(_passkey_part(n, evaluation, recipe.data.seed, tokenizer, limit) for n in lengths)]


def _cost_part(length: int, repeats: int) -> Part:
    """Time of a forward, the softmax model taking turns: the machine of an hour later may be another one."""

    def measure(model: Any, checkpoint: Callable[[], Any]) -> dict[str, Any]:
        softmax = checkpoint()
        models = {"softmax": softmax} if model is softmax else {"softmax": softmax, "own": model}
        times = forward_time_against_length(models, [length], repeats=repeats)
        if len(times) < len(models):
            raise RefusedError(f"it does not read {length:,} tokens")
        own = times[-1]
        return {"forward_seconds": own.seconds, "softmax_seconds": times[0].seconds, "forward_ratio": own.ratio}

    spell = "{forward_seconds:.3f} s, {forward_ratio:.2f} of softmax's".format_map
    return Part({"forward_length": length}, f"forward of {length:,} tokens", measure, spell)


def prompt_places(documents: Sequence[Sequence[int]], generation: GenerationRecipe) -> list[int]:
    """Which documents give a prompt: the first ones that are long enough.

    Raises:
        ValueError: for fewer of them than prompts.
    """
    places = [place for place, ids in enumerate(documents) if len(ids) >= generation.prompt_tokens]
    if len(places) < generation.prompts:
        raise ValueError(
            f"evaluation.generation.prompts={generation.prompts}, but {len(places)} held-out documents have "
            f"prompt_tokens={generation.prompt_tokens}"
        )
    return places[: generation.prompts]


def _writing_part(generation: GenerationRecipe, tokenizer: Any, documents: Sequence[Sequence[int]], limit: int) -> Part:
    """Greedy continuations of the same prompts: how much repeats, and how likely the checkpoint finds them."""
    total = generation.prompt_tokens + generation.new_tokens
    if total > limit:
        raise ValueError(
            f"evaluation.generation: prompt_tokens={generation.prompt_tokens} and new_tokens={generation.new_tokens} "
            f"are {total}, but the checkpoint reads {limit} tokens"
        )
    places = prompt_places(documents, generation)
    prompts = [list(documents[place][: generation.prompt_tokens]) for place in places]

    def measure(model: Any, checkpoint: Callable[[], Any]) -> dict[str, Any]:
        written = greedy_continuations(model, prompts, generation.new_tokens)
        repeated = [repeated_share(ids) for ids in written]
        nats = continuation_likelihoods(checkpoint(), prompts, written)
        return {
            "repeated": repeated,
            "repeated_share": statistics.fmean(repeated),
            "written_nats": nats,
            "written_perplexity": math.exp(statistics.fmean(nats)),
            "written": [tokenizer.decode(ids) for ids in written],
        }

    spell = "{repeated_share:.1%} repeated, perplexity {written_perplexity:.3f} by the checkpoint".format_map
    label = f"{generation.new_tokens:,} tokens written after {generation.prompt_tokens:,}"
    return Part({"generation": asdict(generation)}, label, measure, spell)


def _passkey_part(length: int, evaluation: EvaluationRecipe, seed: int, tokenizer: Any, limit: int) -> Part:
    """Share of pass keys that are given back at the end of documents of at most `length` tokens."""
    if (total := length + _ANSWER_TOKENS) > limit:
        raise ValueError(
            f"evaluation.passkey_lengths: {length} tokens and the key are {total}, but the checkpoint reads {limit}"
        )
    prompts, keys, filler = _passkeys(length, evaluation, seed, tokenizer)

    def measure(model: Any, _: Callable[[], Any]) -> dict[str, Any]:
        found = recalls_keys(model, tokenizer, prompts, keys, _ANSWER_TOKENS)
        return {"found": [int(hit) for hit in found], "found_share": statistics.fmean(found)}

    identity = {"passkey_length": length, "passkey_documents": len(keys), "passkey_filler": filler}
    spell = "{found_share:.0%} found".format_map
    return Part(identity, f"pass key in {length:,} tokens", measure, spell)


def _passkeys(
    length: int, evaluation: EvaluationRecipe, seed: int, tokenizer: Any
) -> tuple[list[list[int]], list[str], str]:
    """Documents that end where the key is asked for, as long as `length` allows; their keys; what surrounds these."""
    words = length  # a word is a token at least
    while words:
        task = load_documents(
            "passkey",
            task="text",
            seed=seed,
            filler=evaluation.passkey_filler,
            num_words=words,
            num_train=2,
            num_test=evaluation.passkey_documents,
            num_keys=2,
        )
        asked, _, keys = zip(*(text.rpartition(" ") for text in task.test["text"]), strict=True)
        prompts = tokenizer(list(asked), verbose=False)["input_ids"]
        longest = max(map(len, prompts))
        if longest <= length:
            return prompts, [key.removesuffix(".") for key in keys], task.source
        words = min(words - 1, words * length // longest)
    raise ValueError(f"evaluation.passkey_lengths: {length} tokens do not hold a sentence with a key and its question")
