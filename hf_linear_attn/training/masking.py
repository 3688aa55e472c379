"""Masked language modeling: which tokens are hidden, drawn when a step begins."""

from __future__ import annotations

from typing import Any

import torch

from hf_linear_attn.registry import get_patcher

__all__ = ["MASKED_SHARE", "is_masked_lm", "mask_tokens"]

MASKED_SHARE = 0.15


def is_masked_lm(model: Any) -> bool:
    """Whether a model has a language-model head over states that see both sides."""
    config = model.config
    patcher = get_patcher(getattr(config, "base_model_type", config.model_type))
    return model.get_output_embeddings() is not None and not patcher.is_causal(config)


def mask_tokens(
    input_ids: torch.Tensor, real: torch.Tensor, tokenizer: Any, share: float = MASKED_SHARE
) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's masking (arXiv:1810.04805): of the chosen tokens 80 % become the mask token, 10 % a random one.

    Drawn from the device's own generator, whose state a checkpoint keeps: a run that was cut off draws the same masks
    when it goes on, which masks made ahead by a data loader would not be.

    Args:
        input_ids: `[B, T]`.
        real: bool `[B, T]`, True for a token.
        tokenizer: has a mask token; its special tokens are never chosen.
        share: of the tokens that is chosen.

    Returns:
        the ids to read `[B, T]`, and which were chosen, bool `[B, T]`.
    """
    special = torch.tensor(tokenizer.all_special_ids, device=input_ids.device)
    draw, kind = torch.rand(2, *input_ids.shape, device=input_ids.device)
    chosen = (draw < share) & real & ~torch.isin(input_ids, special)
    random = torch.randint_like(input_ids, len(tokenizer))
    masked = torch.where(chosen & (kind < 0.8), tokenizer.mask_token_id, input_ids)
    return torch.where(chosen & (kind >= 0.9), random, masked), chosen
