"""What the rest of the package asks of a model family."""

from __future__ import annotations

import importlib
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["ModelPatcher", "Projection", "SelfAttention"]


class SelfAttention(NamedTuple):
    """A self-attention module: its place among the layers, its name inside the model, and the module."""

    layer_idx: int
    name: str
    module: nn.Module


class Projection(NamedTuple):
    """A linear projection: weight `[H * D, hidden_size]` and bias `[H * D]` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class ModelPatcher:
    """Translates one family's names. Subclasses state facts; behavior is here unless the family differs.

    Importing a patcher must stay light: modeling code is imported when a model is at hand, not before.
    """

    modeling_module: ClassVar[str]
    """Module that holds the model classes, e.g. `"transformers.models.bert.modeling_bert"`."""
    config_module: ClassVar[str]
    """Module that holds the config class."""
    config_name: ClassVar[str]
    """Name of the config class, e.g. `"BertConfig"`."""
    attention_name: ClassVar[str]
    """Name of the self-attention class, e.g. `"BertSelfAttention"`."""
    projection_names: ClassVar[tuple[str, str, str]] = ("query", "key", "value")
    """Names of the query, key and value projections inside a self-attention module; one name if they are fused."""
    layers_are_numbered: ClassVar[bool] = True
    """Whether a self-attention module knows its layer, `module.layer_idx`."""
    optional_parts: ClassVar[tuple[str, ...]] = ("pooler",)
    """Parts of the base model that a keyword of its class adds or leaves out (`add_pooling_layer`)."""
    rotary: ClassVar[bool] = False
    """Whether queries and keys carry rotary embeddings, in place of a position table."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """The upstream config class."""
        return getattr(importlib.import_module(self.config_module), self.config_name)

    @cached_property
    def modeling(self) -> Any:
        """The upstream modeling module."""
        return importlib.import_module(self.modeling_module)

    @cached_property  # asked in every forward, where torch.compile must not meet an import
    def attention_class(self) -> type[nn.Module]:
        """The upstream self-attention class."""
        return getattr(self.modeling, self.attention_name)

    def is_self_attention(self, module: nn.Module) -> bool:
        """Whether `module` is a self-attention layer (never cross-attention)."""
        return isinstance(module, self.attention_class)

    def layers(self, model: nn.Module) -> list[Any]:
        """The layers of `model`, as they stand; none without a self-attention module."""
        names = self._names(model)
        return self._list(model, names[0]) if names else []

    def stack(self, model: nn.Module) -> Any:
        """The module that runs the layers of `model`: hidden states to what holds `last_hidden_state`."""
        names = self._names(model)
        return None if names is None else model.get_submodule(names[0].rpartition(".")[0])

    def num_layers(self, model: nn.Module) -> int:
        """How many layers stand in `model`, whatever its config says."""
        return len(self.layers(model))

    def self_attentions(self, model: nn.Module) -> list[SelfAttention]:
        """All self-attention modules of `model`, in the order in which they run; a layer without one is left out."""
        names = self._names(model)
        if names is None:
            return []
        layers, inside = names
        entries = []
        module: Any
        for place, module in enumerate(self._list(model, layers)):
            for name in inside.split("."):
                module = getattr(module, name, None)
            if module is not None and self.is_self_attention(module):
                entries.append(SelfAttention(place, f"{layers}.{place}.{inside}", module))
        return entries

    def _list(self, model: nn.Module, name: str) -> list[Any]:
        return list(cast("nn.ModuleList", model.get_submodule(name)))

    def _names(self, model: nn.Module) -> tuple[str, str] | None:
        """Names of the list of layers in `model` and of the self-attention in a layer."""
        for name, module in model.named_modules():
            if self.is_self_attention(module):
                layers, _, inside = re.split(r"\.(\d+)\.", name, maxsplit=1)
                return layers, inside
        return None

    def is_causal(self, config: PreTrainedConfig) -> bool:
        """Whether a model with this config builds causal masks."""
        return bool(getattr(config, "is_decoder", False))

    def head_dim(self, config: PreTrainedConfig) -> int:
        """Width of one attention head."""
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def sliding_window(self, config: PreTrainedConfig, layer_idx: int) -> int | None:
        """So many last tokens are all that upstream's softmax sees in this layer; None when it sees every token."""
        return None

    def projections(self, module: nn.Module) -> tuple[Projection, Projection, Projection]:
        """The checkpoint's query, key and value projections of a self-attention module, for all of its heads."""
        layers: list[Any] = [getattr(module, name) for name in self.projection_names]
        return tuple(Projection(layer.weight, layer.bias) for layer in layers)  # type: ignore[return-value]

    def position_table(self, model: PreTrainedModel) -> tuple[nn.Module, str] | None:
        """The module that owns the position `nn.Embedding`, and the embedding's attribute name; None without one."""
        return model.base_model.embeddings, "position_embeddings"  # type: ignore[return-value]

    def position_offset(self, config: PreTrainedConfig) -> int:
        """Rows at the head of the position table that no token uses."""
        return 0

    def tokens_counted(self, config: PreTrainedConfig, input_ids: torch.Tensor, tokens: int) -> int:
        """How many of `tokens`, past ones included, the family gives a position of their own."""
        return tokens

    def max_length(self, config: PreTrainedConfig) -> int:
        """Longest sequence (tokens) that the config allows; also the tokenizer's limit."""
        return config.max_position_embeddings - self.position_offset(config)

    def set_max_length(self, config: PreTrainedConfig, max_length: int) -> None:
        """Write a new limit (tokens) into the config; `ValueError` if the family cannot have that limit."""
        config.max_position_embeddings = max_length + self.position_offset(config)

    def resize_position_buffers(self, model: PreTrainedModel, rows: int) -> None:
        """Rebuild the non-persistent buffers whose length is that of the position table (`rows`)."""
        import torch

        table = self.position_table(model)
        if table is None:
            return
        owner, name = table
        device = getattr(owner, name).weight.device
        if getattr(owner, "position_ids", None) is not None:
            owner.position_ids = torch.arange(rows, device=device).expand((1, -1))
        if getattr(owner, "token_type_ids", None) is not None:
            owner.token_type_ids = torch.zeros((1, rows), dtype=torch.long, device=device)
