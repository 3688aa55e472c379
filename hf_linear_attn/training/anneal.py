"""Schedules of the variants: what a layer is moved to as training goes on, by `AttentionVariant.anneal`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hf_linear_attn.variants.base import AttentionVariant

__all__ = ["Anneal"]


class Anneal(TrainerCallback):
    """Tells every variant of a model, after each step, how much of its schedule is done.

    `StageTrainer` has it; any other `transformers.Trainer` takes it by `callbacks=[Anneal()]`. What it tells depends on
    the step alone, so that a resumed run goes on where it was. The stages of a recipe are equal parts of one schedule,
    however many steps each has: what one stage has reached, the next does not take back.

    Args:
        until: share of the training at which the schedules end; the rest trains what they end with.
        part: where these steps begin and end in a training of several stages, as shares of it.

    Raises:
        ValueError: for a share that is not above 0 and at most 1, or a part that is none.
    """

    def __init__(self, until: float = 0.5, part: tuple[float, float] = (0.0, 1.0)) -> None:
        if not _is_number(until) or not 0 < until <= 1:
            raise ValueError(f"until={until!r}; allowed: a number above 0 and at most 1.")
        if len(part) != 2 or not all(map(_is_number, part)) or not 0 <= part[0] < part[1] <= 1:
            raise ValueError(f"part={part!r}; allowed: two numbers from 0 to 1, the first below the second.")
        self.until, self.part = until, part

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        begin, end = self.part
        share = min(1.0, (begin + (end - begin) * state.global_step / state.max_steps) / self.until)
        for module in model.modules():
            if isinstance(module, AttentionVariant):
                module.anneal(share)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
