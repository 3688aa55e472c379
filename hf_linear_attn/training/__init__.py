"""Stages that win a converted model's quality back, over `transformers.Trainer`; and recipes that run them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_linear_attn.training.anneal import Anneal
    from hf_linear_attn.training.contrast import ContrastTrainer
    from hf_linear_attn.training.distill import DistillTrainer
    from hf_linear_attn.training.finetune import FinetuneTrainer
    from hf_linear_attn.training.parts import Lora
    from hf_linear_attn.training.redraw import Redraw
    from hf_linear_attn.training.transfer import TransferTrainer
    from hf_linear_attn.training.uptrain import UptrainTrainer

__all__ = [
    "Anneal",
    "ContrastTrainer",
    "DistillTrainer",
    "FinetuneTrainer",
    "Lora",
    "Redraw",
    "TransferTrainer",
    "UptrainTrainer",
]

_MODULES = {
    "Anneal": "anneal",
    "ContrastTrainer": "contrast",
    "DistillTrainer": "distill",
    "FinetuneTrainer": "finetune",
    "Lora": "parts",
    "Redraw": "redraw",
    "TransferTrainer": "transfer",
    "UptrainTrainer": "uptrain",
}


def __getattr__(name: str) -> Any:
    # Trainer takes seconds to import, and a recipe that is only read must not wait for it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
