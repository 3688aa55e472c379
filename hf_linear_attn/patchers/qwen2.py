"""Qwen2: Llama with biases on the projections, and a sliding window in some layers on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_linear_attn.patchers.llama import LlamaPatcher
from hf_linear_attn.registry import register_patcher

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Qwen2Patcher"]


@register_patcher("qwen2")
class Qwen2Patcher(LlamaPatcher):
    """Qwen2."""

    modeling_module = "transformers.models.qwen2.modeling_qwen2"
    config_module = "transformers.models.qwen2.configuration_qwen2"
    config_name = "Qwen2Config"
    attention_name = "Qwen2Attention"

    def sliding_window(self, config: PreTrainedConfig, layer_idx: int) -> int | None:
        return config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
