"""The common tests on converted models: their classes and configs, and what does not apply to them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from hf_linear_attn import convert_model
from hf_linear_attn.auto import model_class_for

OPTIONS: dict[str, dict[str, Any]] = {"linear": {}, "longformer": {"window_size": 4}}


def convert(model: PreTrainedModel, method: str) -> PreTrainedModel:
    """The model with every layer converted to `method`."""
    return convert_model(model, method, **OPTIONS[method])


def converted_config(config: PreTrainedConfig, method: str) -> PreTrainedConfig:
    """The config of a model converted to `method`."""
    return convert(AutoModel.from_config(copy.deepcopy(config)), method).config


def converted_classes(classes: Iterable[type[PreTrainedModel]]) -> tuple[type[PreTrainedModel], ...]:
    """The converted forms of upstream classes."""
    return tuple(map(model_class_for, classes))


def know_names(common: ModuleType) -> None:
    """What the name of a class says to the tests, a head for multiple choice, say, its converted form says as well."""
    upstream = common.get_values

    def get_values(mapping: Any) -> list[str]:
        return [name for known in upstream(mapping) for name in (known, f"LinearAttn{known}")]

    common.get_values = get_values
