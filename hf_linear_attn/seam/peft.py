"""PEFT's default target modules for converted models: those of the family they came from."""

from __future__ import annotations

import sys

__all__ = ["register_peft_targets"]


def register_peft_targets(model_type: str, base_model_type: str) -> None:
    """Enter `model_type` in every table of PEFT that knows `base_model_type`, if PEFT is imported; never imports it."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and base_model_type in table:
            table.setdefault(model_type, table[base_model_type])
