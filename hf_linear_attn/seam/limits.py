"""The limit of a position table, before Transformers' embedding meets a row that it does not have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from hf_linear_attn.ops.base.tracing import is_exported
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

    A compiled graph reads no positions nor padding before the length alone is too much. Nothing is checked in an
    exported program.

    Raises:
        ValueError: naming the limit and how to raise it, or positions below 0.
    """
    if is_exported() or torch.jit.is_tracing():
        return
    patcher = get_patcher(model.config.base_model_type)
    table = patcher.position_table(model)
    if table is None:
        return
    compiled = torch.compiler.is_compiling()
    # A signature does not go into a graph; in every family the tokens come first.
    first = {"input_ids": args[0] if args else None}
    given = {**first, **kwargs} if compiled else named_arguments(model, args, kwargs)
    ids, positions = given.get("input_ids"), given.get("position_ids")
    of_tokens = given.get("inputs_embeds") if ids is None else ids[..., None]  # [B, T, any]
    if of_tokens is None:
        return
    offset, rows = patcher.position_offset(model.config), getattr(*table).num_embeddings
    past = find_cache([*(("", value) for value in args), *kwargs.items()])
    tokens = of_tokens.shape[-2] + (0 if past is None else past.get_seq_length())
    if tokens + offset <= rows and (positions is None or compiled or positions.device.type != "cpu"):
        return  # positions on a GPU are not read for nothing
    if positions is not None:
        tokens = _last_position(positions) + 1 - offset
    elif ids is not None:
        tokens = patcher.tokens_counted(model.config, ids, tokens)
    if tokens + offset > rows:
        limit = rows - offset
        raise ValueError(
            f"The input reaches token {tokens}, and this model reads at most {limit}: its position table ends there. "
            f"Truncate the input (tokenizer(..., truncation=True, max_length={limit}); generate: fewer new tokens), or "
            f"convert the checkpoint with convert_model(..., max_length={tokens}) or more."
        )


def _last_position(positions: torch.Tensor) -> int:
    """The largest of `positions`; -1 for none."""
    if not positions.numel():
        return -1
    least, most = map(int, positions.aminmax())
    if least < 0:
        raise ValueError(f"position_ids has {least}; allowed: 0 and above.")
    return most
