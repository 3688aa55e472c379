"""Activation checkpointing under the names of all releases: 5.23 renamed "gradient checkpointing"."""

from __future__ import annotations

from typing import Any

__all__ = ["enable_checkpointing", "is_checkpointing"]


def enable_checkpointing(model: Any, *, use_reentrant: bool = False) -> None:
    """Let `model` recompute its activations in the backward pass."""
    new = "activation_checkpointing_enable"
    enable = getattr(model, new if hasattr(type(model), new) else "gradient_checkpointing_enable")
    enable({"use_reentrant": use_reentrant})


def is_checkpointing(model: Any) -> bool:
    """Whether `model` recomputes its activations."""
    new = "is_activation_checkpointing"
    return getattr(model, new if hasattr(type(model), new) else "is_gradient_checkpointing")
