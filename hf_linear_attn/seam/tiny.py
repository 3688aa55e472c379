"""Tiny models of every registered family, with random weights: what the probes and the tests run on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_linear_attn.registry import get_patcher

__all__ = ["PAD", "VOCAB", "build", "has_causal_lm", "tiny_config", "tiny_model", "token_batch"]

VOCAB = 97
PAD = 0
# Fields that only some families have.
_FAMILY_FIELDS = {
    "intermediate_size": 48,
    "hidden_dim": 48,  # the same in DistilBERT
    "embedding_size": 16,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "sliding_window": None,
}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A config of two small layers; the generic field names reach each family through its attribute map."""
    config_class = get_patcher(model_type).config_class
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 160,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": 2,
        **{name: value for name, value in _FAMILY_FIELDS.items() if name in known},
    }
    return config_class(**{**fields, **overrides})


def build(cls: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0, scale: float = 6.0) -> PreTrainedModel:
    """A model in eval mode whose attention is far from uniform: random weights are scaled up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "LayerNorm" not in name:
                parameter.mul_(scale)
    return model


def has_causal_lm(model_type: str) -> bool:
    """Whether the family has a causal language model."""
    return get_patcher(model_type).config_class in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING


def tiny_model(model_type: str, *, decoder: bool, **overrides: Any) -> PreTrainedModel:
    """The family's causal language model, or its base model where `decoder` is False."""
    config = tiny_config(model_type, **overrides)
    if decoder and hasattr(config, "is_decoder"):
        config.is_decoder = True
    mapping: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING if decoder else modeling_auto.MODEL_MAPPING
    return build(mapping[type(config)], config)


def token_batch(batch: int = 2, length: int = 37, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens without padding: `input_ids` and `attention_mask`, `[batch, length]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
