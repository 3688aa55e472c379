"""RoBERTa: BERT whose positions start after the padding index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_linear_attn.patchers.base import ModelPatcher
from hf_linear_attn.registry import register_patcher

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

__all__ = ["RobertaPatcher"]


@register_patcher("roberta")
class RobertaPatcher(ModelPatcher):
    """RoBERTa. Token i sits at row `pad_token_id + 1 + i` of the position table (2 + i in published models)."""

    modeling_module = "transformers.models.roberta.modeling_roberta"
    config_module = "transformers.models.roberta.configuration_roberta"
    config_name = "RobertaConfig"
    attention_name = "RobertaSelfAttention"

    def position_offset(self, config: PreTrainedConfig) -> int:
        return config.pad_token_id + 1

    def tokens_counted(self, config: PreTrainedConfig, input_ids: torch.Tensor, tokens: int) -> int:
        return tokens - int((input_ids == config.pad_token_id).sum(-1).min())
