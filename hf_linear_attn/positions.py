"""A model's position table: its rows, more of them, and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hf_linear_attn.patchers.base import ModelPatcher
from hf_linear_attn.seam.initialization import mark_initialized

__all__ = ["extend_table", "position_table", "position_weight", "set_table"]


def position_table(patcher: ModelPatcher, model: PreTrainedModel) -> nn.Parameter | None:
    """The parameter of the position table `[rows, width]`, or None in a family without one."""
    table = patcher.position_table(model)
    return None if table is None else getattr(*table).weight


def position_weight(patcher: ModelPatcher, model: PreTrainedModel) -> torch.Tensor | None:
    """The numbers of the position table `[rows, width]`, or None in a family without one."""
    table = position_table(patcher, model)
    return None if table is None else table.detach()


def extend_table(patcher: ModelPatcher, model: PreTrainedModel, max_length: int, mode: str) -> None:
    """Give the table, where there is one, rows for `max_length` tokens: repeated (`"tile"`) or stretched linearly."""
    table = position_weight(patcher, model)
    if table is None:
        return
    offset = patcher.position_offset(model.config)
    head, usable = table[:offset], table[offset:]
    if mode == "tile":
        repeats = -(-max_length // usable.shape[0])
        extended = usable.repeat(repeats, 1)[:max_length]
    else:
        extended = F.interpolate(usable.t()[None].float(), size=max_length, mode="linear", align_corners=True)[0].t()
    set_table(patcher, model, torch.cat([head, extended.to(table.dtype)]))


def set_table(patcher: ModelPatcher, model: PreTrainedModel, weight: torch.Tensor | None) -> None:
    """Let the table hold `weight`, itself or, of no parameter, a copy; None, or its present shape, changes nothing."""
    if weight is None:
        return
    embedding: Any = getattr(*patcher.position_table(model))  # type: ignore[misc]
    if embedding.weight.shape != weight.shape:
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight.clone(), requires_grad=embedding.weight.requires_grad)
        embedding.weight = weight
        embedding.num_embeddings = weight.shape[0]
        mark_initialized(embedding)
        patcher.resize_position_buffers(model, weight.shape[0])
