"""The limit of a position table, before Transformers' embedding meets a row that it does not have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.cache import find_cache

__all__ = ["check_length", "named_arguments"]


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def named_arguments(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `model` by the names of its forward, further keywords among them."""
    given = _signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
    return {**given, **given.pop("kwargs", {})}


def check_length(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse more tokens than a converted base model's position table has rows for; rotary families have no table.

    Raises:
        ValueError: naming the limit and how to raise it.
    """
    patcher = get_patcher(model.config.base_model_type)
    table = patcher.position_table(model)
    given = named_arguments(model, args, kwargs)
    ids, positions = given.get("input_ids"), given.get("position_ids")
    of_tokens = given.get("inputs_embeds") if ids is None else ids[..., None]  # [B, T, any]
    if table is None or of_tokens is None:
        return
    offset, rows = patcher.position_offset(model.config), getattr(*table).num_embeddings
    past = find_cache(given.items())
    tokens = of_tokens.shape[-2] + (0 if past is None else past.get_seq_length())
    if tokens + offset <= rows and (positions is None or positions.device.type != "cpu"):
        return  # positions on a GPU are not read for nothing
    if positions is not None:
        tokens = int(positions.max()) + 1 - offset if positions.numel() else 0
    elif ids is not None:
        tokens = patcher.tokens_counted(model.config, ids, tokens)
    if tokens + offset > rows:
        limit = rows - offset
        raise ValueError(
            f"The input reaches token {tokens}, and this model reads at most {limit}: its position table ends there. "
            f"Truncate the input (tokenizer(..., truncation=True, max_length={limit}); generate: fewer new tokens), or "
            f"convert the checkpoint with convert_model(..., max_length={tokens}) or more."
        )
