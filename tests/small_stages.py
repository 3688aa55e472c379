"""Texts, tiny models and arguments that the tests of the training stages run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertForMaskedLM, TrainingArguments

from tests.small_runs import FILLER
from tests.tiny import build, causal_lm, tiny_config, without_dropout


def texts(count: int = 12, words: int = 20, seed: int = 0) -> list[str]:
    draw = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(FILLER), (count, words), generator=draw)
    return [" ".join(FILLER[int(word)] for word in row) for row in picks]


def masked_lm(**overrides: Any) -> Any:
    return build(BertForMaskedLM, tiny_config("bert", **without_dropout("bert"), **overrides))


def peaked(model: Any) -> Any:
    """The model with queries so large that its attention is far from uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("c_attn.weight", "query.weight", "q_proj.weight")):
                parameter.mul_(12)
    return model


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **changes,
    }
    return TrainingArguments(**given)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def language_model(family: str, **overrides: Any) -> Any:
    """A masked language model of BERT, or a causal one of another family, without dropout."""
    if family == "bert":
        return masked_lm(**overrides)
    return causal_lm(family, **without_dropout(family), **overrides)
