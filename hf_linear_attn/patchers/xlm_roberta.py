"""XLM-RoBERTa: a RoBERTa of a hundred languages."""

from __future__ import annotations

from hf_linear_attn.patchers.roberta import RobertaPatcher
from hf_linear_attn.registry import register_patcher

__all__ = ["XLMRobertaPatcher"]


@register_patcher("xlm-roberta")
class XLMRobertaPatcher(RobertaPatcher):
    """XLM-RoBERTa; its positions are numbered as RoBERTa's."""

    modeling_module = "transformers.models.xlm_roberta.modeling_xlm_roberta"
    config_module = "transformers.models.xlm_roberta.configuration_xlm_roberta"
    config_name = "XLMRobertaConfig"
    attention_name = "XLMRobertaSelfAttention"
