"""BERT: an encoder, or a decoder when `config.is_decoder`."""

from __future__ import annotations

from hf_linear_attn.patchers.base import ModelPatcher
from hf_linear_attn.registry import register_patcher

__all__ = ["BertPatcher"]


@register_patcher("bert")
class BertPatcher(ModelPatcher):
    """BERT and every head Transformers has for it."""

    modeling_module = "transformers.models.bert.modeling_bert"
    config_module = "transformers.models.bert.configuration_bert"
    config_name = "BertConfig"
    attention_name = "BertSelfAttention"
