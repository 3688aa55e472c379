"""A patcher's answers about its family, held against a model of that family."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.cache import CACHE_KEYWORDS
from hf_linear_attn.seam.facts import require, run_with
from hf_linear_attn.seam.tiny import has_causal_lm, tiny_model, token_batch

__all__ = ["family_facts"]


def family_facts(model_type: str) -> None:
    """Hold a patcher's answers about its family against a model.

    Raises:
        AssertionError: naming the answer that does not fit.
    """
    patcher = get_patcher(model_type)
    model: Any = tiny_model(model_type, decoder=False, num_hidden_layers=3)
    config = model.config
    found = patcher.self_attentions(model)
    require(len(found) == config.num_hidden_layers == 3, f"{len(found)} self-attention modules in 3 layers")
    numbers = [getattr(attention.module, "layer_idx", None) for attention in found]
    require(numbers == ([0, 1, 2] if patcher.layers_are_numbered else [None] * 3), f"modules are numbered {numbers}")
    for attention in found:
        require(bool(attention.module.is_causal) == patcher.is_causal(config), "is_causal of module and config differ")  # type: ignore[arg-type]
    table = patcher.position_table(model)
    require((table is None) == patcher.rotary, "a position table and rotary embeddings, or neither")
    if table is not None:
        limit = patcher.max_length(config)
        with torch.no_grad():
            model(**token_batch(1, limit))
            try:
                model(**token_batch(1, limit + 1))
            except (IndexError, RuntimeError, ValueError):
                limit = None
        require(limit is None, f"the model reads more than the {limit} tokens that its position table has rows for")
    _check_projections(model_type)
    stack = patcher.stack(model)
    require(any(module is patcher.layers(model)[0] for module in stack.modules()), "the stack holds no layer")
    if not patcher.is_causal(config):
        states = torch.zeros(1, 5, config.hidden_size)
        found_states = stack(states).last_hidden_state
        require(found_states.shape == states.shape, f"the stack of layers makes {tuple(found_states.shape)} of states")
    keywords = inspect.signature(patcher.attention_class.forward).parameters
    require("kwargs" in keywords, f"{patcher.attention_name} takes no further keywords")
    if has_causal_lm(model_type):
        require(any(name in keywords for name in CACHE_KEYWORDS), f"{patcher.attention_name} takes no cache")


@torch.no_grad()
def _check_projections(model_type: str) -> None:
    """The patcher's projections make the query, key and value that attention is given (rotated ones aside)."""
    met: dict[str, Any] = {}
    patcher = get_patcher(model_type)
    run_with(model_type, met, {})
    for name, projection in zip(("query", "key", "value"), patcher.projections(met["module"]), strict=True):
        if patcher.rotary and name != "value":
            continue
        made = nn.functional.linear(met["hidden"], projection.weight, projection.bias)
        given = met[name].repeat_interleave(met["query"].shape[1] // met[name].shape[1], dim=1)
        made = made.unflatten(-1, (given.shape[1], -1)).transpose(1, 2)
        same = made.shape == given.shape and torch.allclose(made, given, atol=1e-3, rtol=1e-3)
        require(same, f"the {name} that attention gets is not made by the projection the patcher names")
