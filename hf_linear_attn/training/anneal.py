"""Schedules of the variants: what a layer is moved to as training goes on, by `AttentionVariant.anneal`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hf_linear_attn.variants.base import AttentionVariant

__all__ = ["Anneal"]


class Anneal(TrainerCallback):
    """Tells every variant of a model, after each step, how much of its schedule is done.

    `StageTrainer` has it; any other `transformers.Trainer` takes it by `callbacks=[Anneal()]`. What it tells depends on
    the step alone, so that a resumed run goes on where it was.

    Args:
        until: share of the steps at which the schedules end; the rest trains what they end with.

    Raises:
        ValueError: for a share that is not above 0 and at most 1.
    """

    def __init__(self, until: float = 0.5) -> None:
        if isinstance(until, bool) or not isinstance(until, int | float) or not 0 < until <= 1:
            raise ValueError(f"until={until!r}; allowed: a number above 0 and at most 1.")
        self.until = until

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        share = min(1.0, state.global_step / (self.until * state.max_steps))
        for module in model.modules():
            if isinstance(module, AttentionVariant):
                module.anneal(share)
