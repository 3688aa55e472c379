"""`transformers.TrainingArguments` from a recipe: their own names, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any, get_type_hints

import torch
from accelerate.utils import parse_flag_from_env

from hf_linear_attn.measure.strict import check, convert

__all__ = ["check_arguments", "merge_arguments", "resolve_bf16", "training_arguments"]

# What a recipe's run does unless it says otherwise.
_DEFAULTS: dict[str, Any] = {
    "include_num_input_tokens_seen": "non_padding",
    "logging_steps": 10,
    "report_to": "none",
    "save_strategy": "no",
    "seed": 0,
}
# Named by a recipe's own keys, or by the command line.
_ELSEWHERE = {
    "do_eval": "the last stage is always evaluated",
    "do_predict": "the last stage is always evaluated",
    "do_train": "a stage always trains",
    "resume_from_checkpoint": "hf-linear-attn train --resume",
}


@cache
def _known() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(TrainingArguments) if entry.init}


def check_arguments(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments with their numbers as numbers.

    Raises:
        ValueError: for a name that `TrainingArguments` does not have (with the nearest it has), one that a recipe says
            elsewhere, or a value of another type.
    """
    typed = {}
    for name, value in given.items():
        check(name not in _ELSEWHERE, f"{where}.{name}: {_ELSEWHERE.get(name)}")
        near = difflib.get_close_matches(name, _known(), n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        check(name in _known(), f"Unknown key {name!r} in {where}: TrainingArguments has none of that name.{hint}")
        kind = _known()[name]
        automatic = name == "bf16" and value == "auto"
        typed[name] = (
            convert(kind, value, f"{where}.{name}") if kind in (int, float, bool, str) and not automatic else value
        )
    return typed


def merge_arguments(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Later ones win; of `num_train_epochs` and `max_steps` the one that is named last decides how long."""
    lengths = {"num_train_epochs": "max_steps", "max_steps": "num_train_epochs"}
    stale = {lengths[name] for name in new if name in lengths} - set(new)
    return {**{name: value for name, value in old.items() if name not in stale}, **new}


def training_arguments(*given: Mapping[str, Any]) -> Any:
    """One `TrainingArguments` of several mappings, of which later ones win; evaluation takes the batches of training.

    Raises:
        ValueError: for a rate, a number of steps or a batch size that is not finite and positive, or what
            `TrainingArguments` refuses.
    """
    from transformers import TrainingArguments

    merged: dict[str, Any] = dict(_DEFAULTS)
    for arguments in given:
        merged = merge_arguments(merged, check_arguments(arguments, "training"))
    if "per_device_train_batch_size" in merged:
        merged.setdefault("per_device_eval_batch_size", merged["per_device_train_batch_size"])
    for name in ("learning_rate", "per_device_train_batch_size", "num_train_epochs", "gradient_accumulation_steps"):
        value = merged.get(name, 1)
        check(0 < value < float("inf"), f"training.{name} must be a finite number above 0, got {value}")
    steps = merged.get("max_steps", 1)
    check(steps == -1 or steps > 0, f"training.max_steps must be positive, got {steps}")
    if merged.get("bf16") == "auto":
        merged["bf16"] = resolve_bf16()
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        merged.setdefault("use_cpu", True)
    return TrainingArguments(**merged)


def resolve_bf16() -> bool:
    """Whether this device has instructions for bf16; emulated, it is slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    # no public question exists for CPUs; a build of torch that cannot answer gets fp32
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(supported())
