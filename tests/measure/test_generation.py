"""What models write: greedy tokens beside a loop by hand, shares beside counts, likelihoods beside the model's loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_linear_attn import convert_model
from hf_linear_attn.measure.generation import (
    continuation_likelihoods,
    greedy_continuations,
    recalls_keys,
    repeated_share,
)
from tests.tiny import causal_lm, without_dropout

PROMPTS = torch.randint(5, 97, (3, 12), generator=torch.Generator().manual_seed(1)).tolist()


def by_hand(model: Any, prompt: list[int], count: int, banned: int | None = None) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        if banned is not None:
            logits[banned] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("variant", [None, "lolcats", "hedgehog"])
def test_continuations_are_the_likeliest_tokens(variant: str | None) -> None:
    model: Any = causal_lm("llama")
    if variant is not None:
        convert_model(model, variant)
    found = greedy_continuations(model.train(), PROMPTS, 9)
    assert model.training
    model.eval()
    assert found == [by_hand(model, prompt, 9) for prompt in PROMPTS]
    assert found == greedy_continuations(model, PROMPTS, 9)


def test_every_model_writes_as_much_and_none_is_helped() -> None:
    """An end of text, a penalty for repetition, sampling: what a checkpoint's own settings may ask for."""
    model: Any = causal_lm("gpt2")
    end = by_hand(model, PROMPTS[0], 1)[0]
    model.generation_config.update(
        eos_token_id=end, repetition_penalty=5.0, no_repeat_ngram_size=2, do_sample=True, temperature=2.0
    )
    (found,) = greedy_continuations(model, PROMPTS[:1], 20)
    assert len(found) == 20
    assert end not in found
    assert found == by_hand(model, PROMPTS[0], 20, banned=end)


def test_repeated_shares_are_counted() -> None:
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_share([7] * 8) == pytest.approx(4 / 5)
    assert repeated_share(range(8)) == 0
    assert repeated_share([1, 2, 1, 2, 3], size=2) == pytest.approx(1 / 4)
    with pytest.raises(ValueError, match="3 tokens has no 4-grams"):
        repeated_share([1, 2, 3])


def test_likelihoods_are_those_of_the_continuation_alone() -> None:
    model: Any = causal_lm("gpt2", **without_dropout("gpt2"))
    written = [[9, 8, 7, 6], [5, 9, 5], [30] * 5]
    found = continuation_likelihoods(model.train(), PROMPTS, written)
    assert model.training
    model.eval()
    for prompt, new, value in zip(PROMPTS, written, found, strict=True):
        ids = torch.tensor([prompt + new])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            assert value == pytest.approx(float(model(input_ids=ids, labels=labels).loss), rel=1e-5)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="continuation 0 is not finite"):
        continuation_likelihoods(model, PROMPTS, written)


class _Says:
    """A model that writes given answers, and the tokenizer to it: a character is a token."""

    device, training = "cpu", False

    def __init__(self, *answers: str) -> None:
        self.answers = iter(answers)

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        said = next(self.answers).ljust(max_new_tokens)[:max_new_tokens]
        return torch.cat([input_ids, torch.tensor([[*map(ord, said)]])], dim=1)

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_a_key_is_found_if_the_answer_begins_with_it() -> None:
    answers = {" 12345": True, "12345.": True, "12345 is": True, "123456": False, "1234": False, "It is 12345": False}
    model = _Says(*answers)
    found = recalls_keys(model, model, PROMPTS[:1] * len(answers), ["12345"] * len(answers), 7)
    assert dict(zip(answers, found, strict=True)) == answers


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: greedy_continuations(model, [[]], 4), r"new_tokens=4 and prompts of \[0\]"),
        (lambda model: greedy_continuations(model, PROMPTS, 0), "new_tokens=0"),
        (lambda model: continuation_likelihoods(model, PROMPTS, [[1]]), "got 3 and 1"),
        (lambda model: continuation_likelihoods(model, PROMPTS[:1], [[]]), "needs a prompt and a continuation"),
    ],
)
def test_what_says_nothing_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(causal_lm("gpt2"))
