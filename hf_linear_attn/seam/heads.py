"""What a model's head is for, and the global tokens that its variants choose by that."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from hf_linear_attn.ops.base.packing import SequencePlan, is_traced, sequence_begins
from hf_linear_attn.ops.base.text_pairs import CallTokens
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.limits import named_arguments

__all__ = ["choices_of", "task_of", "with_global_tokens"]

logger = logging.get_logger(__name__)

# In the Hub's words, the Auto mappings that list the classes of a task.
_MAPPINGS = {
    "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "multiple-choice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
}


def task_of(model_class: type) -> str | None:
    """What the head of a model class is for, converted or not; None for other heads and for base models."""
    names = {cls.__name__ for cls in model_class.__mro__}
    return next((task for task, classes in _MAPPINGS.items() if names & {*classes.values()}), None)


def choices_of(model: Any, task: str | None) -> dict[int, Any]:
    """Layer -> the `GlobalChoice` of its variant, one object for all layers of the same options.

    Layers that leave it to the variant's forward are not there.
    """
    asked: dict[Any, Any] = {}
    found = {}
    for entry in get_patcher(model.config.base_model_type).self_attentions(model):
        variant: Any = getattr(entry.module, "linear_attn", None)
        if variant is None or not variant.spec.uses_global_mask:
            continue
        key = variant.spec.key, variant.config
        if key not in asked:
            asked[key] = variant.global_choice(task)
        if asked[key] is not None:
            found[entry.layer_idx] = asked[key]
    return found


def with_global_tokens(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a converted base model's call, with the global tokens that its layers choose.

    `linear_attn_task`, which a head's model adds, is taken out. `linear_attn_global_tokens`, which is added, maps a
    layer to its bool mask `[B, T]`. A call with a `global_attention_mask` says itself which they are.
    """
    task = kwargs.get("linear_attn_task")
    kwargs = {name: value for name, value in kwargs.items() if name != "linear_attn_task"}
    if kwargs.get("global_attention_mask") is not None or "linear_attn_global_tokens" in kwargs:
        return kwargs
    choices = choices_of(model, task)
    call = _tokens(model, args, kwargs) if choices else None
    if call is None:
        return kwargs
    marks = {id(choice): choice.mark(call) for choice in choices.values()}
    for choice in choices.values():
        if marks[id(choice)] is None and not is_traced():
            logger.warning_once(
                f"{choice.words} would be global tokens under a head for {task}, but nothing tells where it ends: "
                "the call has no token_type_ids and the config no sep_token_id. The first token is global instead. Set "
                "model.config.sep_token_id = tokenizer.sep_token_id, pass global_attention_mask, or convert with "
                "num_global_tokens=1 to have it so."
            )
    found = {layer: marks[id(choice)] for layer, choice in choices.items() if marks[id(choice)] is not None}
    return {**kwargs, "linear_attn_global_tokens": found}


def _tokens(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallTokens | None:
    """The tokens of a call; None for one without any, which is refused later on."""
    given, config = named_arguments(model, args, kwargs), model.config
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    like = ids if ids is not None else given.get("inputs_embeds")
    if like is None:
        return None
    shape = like.shape[:2]
    if not isinstance(mask, torch.Tensor) or mask.shape != shape:  # another one is refused later on
        mask = torch.ones(shape, dtype=torch.bool, device=like.device)
    plan: SequencePlan | None = kwargs.get("linear_attn_plan")
    begins = None if plan is None else sequence_begins(plan, *shape)
    separators = (getattr(config, name, None) for name in ("sep_token_id", "eos_token_id"))
    return CallTokens(
        real=mask.bool(),
        begins=None if begins is None else begins.to(like.device),
        input_ids=ids,
        token_type_ids=given.get("token_type_ids"),
        separator=next((x for x in separators if isinstance(x, int)), None),
    )
