"""Distillation: a converted model learns the outputs of the checkpoint that it was made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_linear_attn.training.losses import label_divergence, states_distance
from hf_linear_attn.training.masking import is_masked_lm, mask_tokens
from hf_linear_attn.training.parts import head_parameters
from hf_linear_attn.training.stage import LossStage, checkpoint_limit, longest_input
from hf_linear_attn.training.teachers import Teacher, frozen_copy, holds_checkpoint, windowed_states

__all__ = ["DistillTrainer", "choose_objective", "settle_windows"]

OBJECTIVES = ("logits", "states")


class DistillTrainer(LossStage):
    """Trains a converted model on what its checkpoint says of the same texts; no labels are needed.

    - `logits`: Kullback-Leibler divergence to the teacher's logits: at every token of a causal language model, at the
      masked tokens of a masked one, for every document of a classifier.
    - `states`, for embedders: the relative squared error of the last hidden states of all tokens, and the cosine of
      their means, every text counting alike. A text within `window` takes the teacher's own states, a longer one those
      that overlapping windows of it give, so that a model whose positions were extended learns to read documents that
      its checkpoint cannot. A method that is not exact on short texts learns them from short texts among the data.

    Args:
        model: a converted model (a softmax model learns from its own copy: the control with the same budget).
        args, train_dataset, ...: see `StageTrainer`.
        teacher: the checkpoint. None takes it from `model`: its own weights switched to softmax where they are frozen
            (`trainable` is `new` or `lora`), else a copy of them made now, before anything trains.
        objective: `logits` or `states`; None for `logits` where the model has a head.
        temperature: of the logits.
        window: tokens of the teacher's windows for `states`; None for the teacher's own limit.
        stride: tokens between two windows' starts; half a window when None.

    Raises:
        ValueError: for an unknown objective, `logits` without a head, or a window that is not positive, wider than the
            teacher reads, or narrower than its stride.
    """

    objective: str

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        teacher: nn.Module | None = None,
        objective: str | None = None,
        temperature: float = 1.0,
        window: int | None = None,
        stride: int | None = None,
        **kwargs: Any,
    ) -> None:
        objective = choose_objective(objective, model.base_model is not model, type(model).__name__)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}; allowed: above 0")
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        elif kwargs.get("trainable") not in ("new", "lora") or not holds_checkpoint(model):
            teacher = frozen_copy(model)
        limit = checkpoint_limit(model) if teacher is None else longest_input(teacher)
        kwargs["max_length"], window, stride = settle_windows(
            objective, limit, kwargs.get("max_length"), window, stride
        )
        self.objective, self.temperature, self.window, self.stride = objective, temperature, window, stride
        super().__init__(model, args, **kwargs)
        self.teacher = Teacher(teacher)
        self.settings |= {"objective": objective, "temperature": temperature, "window": window, "stride": stride}
        self.masks = objective == "logits" and is_masked_lm(model)
        if self.masks and getattr(self.processing_class, "mask_token", None) is None:
            raise ValueError("A masked language model needs processing_class, a tokenizer with a mask token")
        if objective == "states":  # the head and the pooler take no part
            for parameter in head_parameters(model).values():
                parameter.requires_grad_(False)

    def loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        student = self.accelerator.unwrap_model(model)
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        if self.objective == "states":
            wanted = self._states(student, inputs, real)
            outputs = model(**inputs, output_hidden_states=True)
            return states_distance(outputs.hidden_states[-1], wanted, real), outputs
        if self.masks:
            ids, real = mask_tokens(inputs["input_ids"], real, self.processing_class)
            inputs = {**inputs, "input_ids": ids}
        wanted = self.teacher(student, **inputs).logits
        outputs = model(**inputs)
        return label_divergence(outputs.logits, wanted, real if wanted.ndim == 3 else None, self.temperature), outputs

    def _states(self, student: nn.Module, inputs: dict[str, Any], real: torch.Tensor) -> torch.Tensor:
        def run(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
            return self.teacher(student, **inputs, output_hidden_states=True).hidden_states[-1]

        if real.shape[1] <= self.window:
            return run(inputs["input_ids"], real.long())
        return windowed_states(run, inputs["input_ids"], real, self.window, self.stride)


def choose_objective(objective: str | None, has_head: bool, name: str) -> str:
    """`logits` where a model has a head, unless it is said otherwise.

    Raises:
        ValueError: for another word, or `logits` without a head; `name` is the model's in the message.
    """
    objective = objective or ("logits" if has_head else "states")
    allowed = OBJECTIVES if has_head else ("states",)
    if objective not in allowed:
        raise ValueError(f"objective={objective!r}; allowed for {name}: {', '.join(allowed)}")
    return objective


def settle_windows(
    objective: str, limit: int, max_length: int | None, window: int | None, stride: int | None
) -> tuple[int | None, int, int]:
    """Length of a text, window and stride, where they are None from what the teacher reads.

    Args:
        objective: `logits` or `states`.
        limit: tokens that the teacher reads.
        max_length: of a piece of text; None stays None for `states`.
        window: of the teacher.
        stride: between two windows.

    Raises:
        ValueError: for what the teacher cannot read.
    """
    window = limit if window is None else window
    stride = window // 2 if stride is None else stride
    if not 2 < window <= limit or not 0 < stride <= window - 2:
        raise ValueError(
            f"window={window}, stride={stride}; allowed: a window of 3 to {limit} tokens, and a stride of 1 to "
            "window - 2"
        )
    if objective == "logits":
        max_length = limit if max_length is None else max_length
        if max_length > limit:
            raise ValueError(
                f"max_length={max_length}, but the teacher reads {limit} tokens; allowed: at most that, or "
                "objective='states', which reads longer texts in windows"
            )
    return max_length, window, stride
