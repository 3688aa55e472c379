"""Qwen3: Qwen2 with normalized queries and keys in place of biases."""

from __future__ import annotations

from hf_linear_attn.patchers.qwen2 import Qwen2Patcher
from hf_linear_attn.registry import register_patcher

__all__ = ["Qwen3Patcher"]


@register_patcher("qwen3")
class Qwen3Patcher(Qwen2Patcher):
    """Qwen3; the norms are upstream's and run before the rotary embeddings."""

    modeling_module = "transformers.models.qwen3.modeling_qwen3"
    config_module = "transformers.models.qwen3.configuration_qwen3"
    config_name = "Qwen3Config"
    attention_name = "Qwen3Attention"
