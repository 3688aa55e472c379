"""GPT-2: a decoder with one fused projection for query, key and value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_linear_attn.patchers.base import ModelPatcher, Projection
from hf_linear_attn.registry import register_patcher

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["GPT2Patcher"]


@register_patcher("gpt2")
class GPT2Patcher(ModelPatcher):
    """GPT-2 and every head Transformers has for it."""

    modeling_module = "transformers.models.gpt2.modeling_gpt2"
    config_module = "transformers.models.gpt2.configuration_gpt2"
    config_name = "GPT2Config"
    attention_name = "GPT2Attention"
    projection_names = ("c_attn", "c_attn", "c_attn")

    def is_self_attention(self, module: nn.Module) -> bool:
        return super().is_self_attention(module) and not module.is_cross_attention

    def is_causal(self, config: PreTrainedConfig) -> bool:
        return bool(getattr(config, "is_causal", True))

    def projections(self, module: nn.Module) -> tuple[Projection, Projection, Projection]:
        # Conv1D keeps its weight as [in, out], the three projections side by side.
        weights = module.c_attn.weight.t().chunk(3, dim=0)  # type: ignore[union-attr,operator]
        biases = module.c_attn.bias.chunk(3, dim=0)  # type: ignore[union-attr,operator]
        return tuple(Projection(w, b) for w, b in zip(weights, biases, strict=True))  # type: ignore[return-value]

    def position_table(self, model: PreTrainedModel) -> tuple[nn.Module, str] | None:
        return model.base_model, "wpe"

    def set_max_length(self, config: PreTrainedConfig, max_length: int) -> None:
        config.n_positions = max_length
