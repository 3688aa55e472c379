"""ELECTRA: BERT trained to tell replaced tokens; its embeddings may be narrower than its layers."""

from __future__ import annotations

from hf_linear_attn.patchers.base import ModelPatcher
from hf_linear_attn.registry import register_patcher

__all__ = ["ElectraPatcher"]


@register_patcher("electra")
class ElectraPatcher(ModelPatcher):
    """ELECTRA, discriminators and generators. The position table is `embedding_size` wide."""

    modeling_module = "transformers.models.electra.modeling_electra"
    config_module = "transformers.models.electra.configuration_electra"
    config_name = "ElectraConfig"
    attention_name = "ElectraSelfAttention"
