"""Random features drawn anew while a model trains, so that it learns no single draw."""

from __future__ import annotations

import random
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_linear_attn.checks import check_features
from hf_linear_attn.convert import redraw_features
from hf_linear_attn.variants.base import MAX_INTEGER

__all__ = ["Redraw"]


class Redraw(TrainerCallback, ExportableState):
    """Draws the random features of a model anew after every so many steps, see `hf_linear_attn.redraw_features`.

    Any `transformers.Trainer` takes it by `callbacks=[Redraw()]`, the stages by `redraw_every`. The last steps train
    what the run ends with: nothing is drawn after the last one. What is drawn depends on the seed and the step alone,
    and both settings are saved in the Trainer's state, so that a resumed run draws what the whole one would have.

    Args:
        every: steps between two draws; by default 1,000, performer-pytorch's `feature_redraw_interval`.
        seed: of the sequence of draws.

    Raises:
        ValueError: for another `every` than an integer of at least 1, or another `seed` than one of at least 0; at the
            beginning of training for a model without random features, and for a checkpoint of a run that drew
            otherwise.
    """

    def __init__(self, every: int = 1000, seed: int = 0) -> None:
        for name, value, least in (("every", every, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_INTEGER:
                raise ValueError(f"{name}={value!r}; allowed: an integer from {least} to {MAX_INTEGER}.")
        self.every, self.seed = every, seed

    def state(self) -> dict[str, Any]:
        """What Trainer saves with its own state."""
        return {"args": {"every": self.every, "seed": self.seed}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_features(model)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved != self.state():
            there = "without it" if saved is None else f"with {saved}"
            raise ValueError(
                f"The checkpoint is of a run {there}, which would go on with other features than Redraw("
                f"every={self.every}, seed={self.seed}) draws; resume it as it was begun."
            )
        self._draw(model, state)  # a checkpoint of adapters does not hold the directions

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._draw(model, state)

    def _draw(self, model: Any, state: Any) -> None:
        """The features of the next step; before the first draw those of the conversion stay."""
        number = min(state.global_step, state.max_steps - 1) // self.every
        if number:
            redraw_features(model, random.Random(f"{self.seed} {number}").randrange(MAX_INTEGER))
