"""CamemBERT: a French RoBERTa."""

from __future__ import annotations

from hf_linear_attn.patchers.roberta import RobertaPatcher
from hf_linear_attn.registry import register_patcher

__all__ = ["CamembertPatcher"]


@register_patcher("camembert")
class CamembertPatcher(RobertaPatcher):
    """CamemBERT; its positions are numbered as RoBERTa's."""

    modeling_module = "transformers.models.camembert.modeling_camembert"
    config_module = "transformers.models.camembert.configuration_camembert"
    config_name = "CamembertConfig"
    attention_name = "CamembertSelfAttention"
