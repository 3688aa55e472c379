"""Which tokens of a call belong to the question: texts come in pairs, told apart by token types or by separators.

A sequence is a pair where one of its real tokens has a type above 0; else where it holds two separators at least, as
`<s> a </s></s> b </s>` and `[CLS] a [SEP] b [SEP]` do. By types the first text is what the tokenizer says it is, its
markers included. By separators it is everything before the first one, and the second text everything after that one
and a second one right behind it, as in Transformers' `LongformerForQuestionAnswering` and its multiple choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

__all__ = ["CallTokens", "GlobalChoice", "first_text", "second_text", "tokens_of_task", "tokens_with_ids"]


@dataclass(frozen=True)
class CallTokens:
    """The tokens of one call of a model, as far as the call names them.

    Attributes:
        real: bool `[B, T]`, True for a token, False for padding.
        begins: bool `[B, T]`, where the sequences of packed rows begin; None where a row is one sequence.
        input_ids: long `[B, T]`, or None for a call by embeddings.
        token_type_ids: long `[B or 1, T]`, or None.
        separator: id of the token behind a text, or None where nobody knows it.
    """

    real: torch.Tensor
    begins: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None
    separator: int | None = None


@dataclass(frozen=True)
class GlobalChoice:
    """How the global tokens of a call are chosen that names none.

    Attributes:
        words: which tokens they are.
        mark: gives them as bool `[B, T]`; None where the call does not say enough.
    """

    words: str
    mark: Callable[[CallTokens], torch.Tensor | None]


def first_text(call: CallTokens) -> torch.Tensor | None:
    """The real tokens of each pair's first text, bool `[B, T]`; the first token of a sequence that is no pair.

    None where there are neither token types nor separators to go by.
    """
    return _text(call, second=False)


def second_text(call: CallTokens) -> torch.Tensor | None:
    """The real tokens of each pair's second text, as `first_text`."""
    return _text(call, second=True)


def tokens_with_ids(ids: int | tuple[int, ...]) -> GlobalChoice:
    """The choice of the tokens that have one of these ids.

    `mark` raises `ValueError` for a call without `input_ids`.
    """
    wanted = ids if isinstance(ids, tuple) else (ids,)
    return GlobalChoice(f"ids {', '.join(map(str, wanted))}", partial(_with_ids, wanted))


def tokens_of_task(task: str | None) -> GlobalChoice | None:
    """The choice for a model whose head is for this task; None where the first token serves, or there is no head."""
    return _OF_TASK.get(task or "")


_OF_TASK = {
    "question-answering": GlobalChoice("the question", first_text),
    "multiple-choice": GlobalChoice("the second text", second_text),
}


def _with_ids(wanted: tuple[int, ...], call: CallTokens) -> torch.Tensor:
    if call.input_ids is None:
        raise ValueError(
            f"global_token_ids={list(wanted)} are looked for in input_ids, and this call has none. Pass "
            "global_attention_mask beside inputs_embeds."
        )
    return torch.isin(call.input_ids, torch.tensor(wanted, device=call.input_ids.device)) & call.real


def _text(call: CallTokens, *, second: bool) -> torch.Tensor | None:
    real = call.real
    rank, _ = _counts(real, call.begins)
    found, known = (rank == 1) & real, False
    if call.input_ids is not None and call.separator is not None:
        is_separator = (call.input_ids == call.separator) & real
        seen, in_all = _counts(is_separator, call.begins)
        _, before = _counts(real & (seen == 0), call.begins)  # length of the first text
        wanted = seen == 0
        if second:
            wanted = ~wanted & (rank > before + 1) & ~(is_separator & (rank == before + 2))
        found, known = torch.where(in_all > 1, wanted & real, found), True
    if call.token_type_ids is not None:
        is_second = (call.token_type_ids > 0) & real
        seen, in_all = _counts(is_second, call.begins)
        found, known = torch.where(in_all > 0, is_second if second else (seen == 0) & real, found), True
    return found if known else None


def _counts(x: torch.Tensor, begins: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of `x` (bool `[B, T]`) there are in a sequence up to each token, and in all of its sequence."""
    so_far = x.long().cumsum(-1)
    if begins is None:
        return so_far, x.sum(-1, keepdim=True)
    place = torch.arange(x.shape[1], device=x.device)
    first = torch.where(begins, place, 0).cummax(-1).values
    ends = torch.cat([begins[:, 1:], torch.ones_like(begins[:, :1])], -1)
    last = torch.where(ends, place, x.shape[1] - 1).flip(-1).cummin(-1).values.flip(-1)
    before = so_far.gather(-1, first) - x.long().gather(-1, first)
    return so_far - before, so_far.gather(-1, last) - before
