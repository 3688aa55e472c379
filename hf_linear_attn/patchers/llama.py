"""Llama: a decoder with rotary embeddings, whose keys and values may be shared by groups of heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_linear_attn.patchers.base import ModelPatcher, Projection
from hf_linear_attn.registry import register_patcher

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["LlamaPatcher"]


@register_patcher("llama")
class LlamaPatcher(ModelPatcher):
    """Llama, and the base of families built like it.

    A key that serves a group of heads reaches the variant once per head: a decode state that keeps keys
    (`"window"`, `"kv"`) holds `num_attention_heads / num_key_value_heads` times the numbers of upstream's cache.
    There is no position table: a new limit only changes the config, and longer inputs rely on how the rotary
    embeddings extrapolate.
    """

    modeling_module = "transformers.models.llama.modeling_llama"
    config_module = "transformers.models.llama.configuration_llama"
    config_name = "LlamaConfig"
    attention_name = "LlamaAttention"
    projection_names = ("q_proj", "k_proj", "v_proj")
    rotary = True

    def is_causal(self, config: PreTrainedConfig) -> bool:
        return bool(getattr(config, "is_causal", True))

    def projections(self, module: nn.Module) -> tuple[Projection, Projection, Projection]:
        query, key, value = super().projections(module)
        groups, width = int(module.num_key_value_groups), int(module.head_dim)  # type: ignore[arg-type]

        def per_head(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(0, (-1, width)).repeat_interleave(groups, dim=0).flatten(0, 1)

        repeated = (Projection(per_head(w), None if b is None else per_head(b)) for w, b in (key, value))
        return query, *repeated  # type: ignore[return-value]

    def position_table(self, model: PreTrainedModel) -> tuple[nn.Module, str] | None:
        return None

    def set_max_length(self, config: PreTrainedConfig, max_length: int) -> None:
        rope = config.rope_parameters
        kind = rope["rope_type"]
        if kind == "dynamic" or (kind in ("yarn", "longrope") and rope.get("factor") is None):
            raise ValueError(
                f"rope_type={kind!r} derives its frequencies from max_position_embeddings: another limit would change "
                "them for every length. Leave max_length unset, or give rope_parameters an explicit factor "
                "(yarn, longrope)."
            )
        super().set_max_length(config, max_length)
