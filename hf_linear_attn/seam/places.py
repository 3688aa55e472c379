"""A layer is the place it stands in.

Transformers numbers attention modules when it builds them, and their caches rely on that number. Layers that were
dropped, reordered or stacked since then carry old ones.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_linear_attn.config import LayerConfig
from hf_linear_attn.patchers.base import ModelPatcher

__all__ = [
    "check_layers",
    "fit_config",
    "have_moved",
    "layer_numbers",
    "layers_as_they_stand",
    "number_layers",
    "share_config",
]


def check_layers(patcher: ModelPatcher, model: PreTrainedModel) -> int:
    """The number of layers of `model`.

    Raises:
        ValueError: if one module stands in two places, or the config says that fewer layers run.
    """
    config: Any = model.config
    count, running = patcher.num_layers(model), config.num_hidden_layers
    first: dict[int, int] = {}
    for place, _, module in patcher.self_attentions(model):
        if first.setdefault(id(module), place) != place:
            raise ValueError(
                f"Layers {first[id(module)]} and {place} are one and the same module, which cannot be told apart when "
                "it is converted or saved. Give each place a layer of its own: copy.deepcopy(layer)."
            )
    if count > running:
        raise ValueError(
            f"The model holds {count} layers, but its config says num_hidden_layers={running}. Set "
            f"model.config.num_hidden_layers = {count}, or remove the other layers."
        )
    types = getattr(config, "layer_types", None)
    if types is not None and len(types) < count:
        raise ValueError(
            f"The model holds {count} layers, but its config has {len(types)} layer_types. Name one for each layer."
        )
    return count


def fit_config(config: Any, count: int) -> None:
    """Let the config of a model that runs its first `count` layers say so."""
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:count]


def share_config(model: nn.Module, config: PreTrainedConfig) -> None:
    """Give `config` to every module that has one: copies of layers took a copy of it with them."""
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = config  # type: ignore[assignment]


def layer_numbers(patcher: ModelPatcher, model: nn.Module) -> list[tuple[Any, int]]:
    """Modules of the layers that know their number, cross-attention among them, with that number."""
    modules: list[Any] = [module for layer in patcher.layers(model) for module in layer.modules()]
    return [(module, module.layer_idx) for module in modules if isinstance(getattr(module, "layer_idx", None), int)]


def number_layers(patcher: ModelPatcher, model: nn.Module) -> None:
    """Give every module that has a layer's number that of its place."""
    for place, layer in enumerate(patcher.layers(model)):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]
    if not patcher.layers_are_numbered:
        for place, _, module in patcher.self_attentions(model):
            module.layer_idx = place  # type: ignore[assignment]


def have_moved(patcher: ModelPatcher, model: PreTrainedModel) -> bool:
    """Whether layers of a converted model were dropped, reordered, stacked or replaced since they were numbered."""
    config: Any = model.config
    named = config.linear_attn["layers"]
    if len({patcher.num_layers(model), config.num_hidden_layers, len(named)}) > 1:
        return True

    def fits(place: int, module: Any) -> bool:
        same_config = getattr(module, "config", config) is config
        is_converted = hasattr(module, "linear_attn")
        return (
            getattr(module, "layer_idx", None) == place and same_config and is_converted == (named[place] is not None)
        )

    return not all(fits(place, module) for place, _, module in patcher.self_attentions(model))


def layers_as_they_stand(patcher: ModelPatcher, model: nn.Module) -> tuple[LayerConfig | None, ...]:
    """What each place runs; a variant that was built for another place says for which."""
    count = patcher.num_layers(model)
    layers: list[LayerConfig | None] = [None] * count
    for place, _, module in patcher.self_attentions(model):
        variant: Any = getattr(module, "linear_attn", None)
        if variant is not None:
            built_for = variant.context.layer_idx, variant.context.num_layers
            here = built_for == (place, count)
            layers[place] = LayerConfig(variant.spec.key, variant.config.to_dict(), None if here else built_for)
    return tuple(layers)
