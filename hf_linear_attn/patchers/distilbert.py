"""DistilBERT: half of BERT's layers, taught by BERT; an encoder."""

from __future__ import annotations

from hf_linear_attn.patchers.base import ModelPatcher
from hf_linear_attn.registry import register_patcher

__all__ = ["DistilBertPatcher"]


@register_patcher("distilbert")
class DistilBertPatcher(ModelPatcher):
    """DistilBERT. Sinusoidal positions (`sinusoidal_pos_embds`) are a table too, extended like a learned one."""

    modeling_module = "transformers.models.distilbert.modeling_distilbert"
    config_module = "transformers.models.distilbert.configuration_distilbert"
    config_name = "DistilBertConfig"
    attention_name = "DistilBertSelfAttention"
    projection_names = ("q_lin", "k_lin", "v_lin")
    layers_are_numbered = False
