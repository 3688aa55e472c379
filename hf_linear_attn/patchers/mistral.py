"""Mistral: Llama whose layers may all attend to a sliding window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_linear_attn.patchers.llama import LlamaPatcher
from hf_linear_attn.registry import register_patcher

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["MistralPatcher"]


@register_patcher("mistral")
class MistralPatcher(LlamaPatcher):
    """Mistral."""

    modeling_module = "transformers.models.mistral.modeling_mistral"
    config_module = "transformers.models.mistral.configuration_mistral"
    config_name = "MistralConfig"
    attention_name = "MistralAttention"

    def sliding_window(self, config: PreTrainedConfig, layer_idx: int) -> int | None:
        return config.sliding_window
