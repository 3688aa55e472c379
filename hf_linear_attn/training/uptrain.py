"""Uptraining: a converted model goes on learning its checkpoint's own task, the next token or the masked ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, DataCollatorWithPadding

from hf_linear_attn.training.masking import MASKED_SHARE, is_masked_lm, mask_tokens
from hf_linear_attn.training.stage import StageTrainer

__all__ = ["UptrainTrainer"]


class UptrainTrainer(StageTrainer):
    """Trains a language model on texts: the next token of a causal one, the masked tokens of a masked one.

    Args:
        model: with a language-model head.
        args, train_dataset, ...: see `StageTrainer`.
        packing: whether a batch of a causal model is one row without padding, its texts kept apart; a masked model's
            batches are padded.
        masked_share: of the tokens that a masked model has to find.

    Raises:
        ValueError: for a model without such a head, a share outside (0, 1), or a tokenizer without a mask token.
    """

    def __init__(
        self, model: nn.Module, args: Any, *, packing: bool = True, masked_share: float = MASKED_SHARE, **kwargs: Any
    ) -> None:
        if model.get_output_embeddings() is None:  # type: ignore[operator]
            raise ValueError(f"{type(model).__name__} has no language-model head to uptrain")
        if not 0 < masked_share < 1:
            raise ValueError(f"masked_share={masked_share}; allowed: between 0 and 1")
        self.masks, self.packing, self.masked_share = is_masked_lm(model), packing, masked_share
        tokenizer = kwargs.get("processing_class")
        if self.masks and getattr(tokenizer, "mask_token", None) is None:
            raise ValueError("A masked language model needs processing_class, a tokenizer with a mask token")
        super().__init__(model, args, **kwargs)
        self.settings |= {"masked_share": masked_share} if self.masks else {"packing": packing}

    def prepare(self, data: Any, tokenizer: Any) -> Any:
        pieces = super().prepare(data, tokenizer)
        if self.masks or not hasattr(pieces, "map") or "labels" in (pieces.column_names or next(iter(pieces))):
            return pieces
        return pieces.map(lambda rows: {"labels": rows["input_ids"]}, batched=True)

    def collator(self, tokenizer: Any) -> Any:
        if self.masks:
            return DataCollatorWithPadding(tokenizer)
        return DataCollatorWithFlattening() if self.packing else DataCollatorForSeq2Seq(tokenizer)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.masks:
            ids = inputs["input_ids"]
            real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
            seen, chosen = mask_tokens(ids, real, self.processing_class, self.masked_share)
            inputs = {**inputs, "input_ids": seen, "labels": ids.masked_fill(~chosen, -100)}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.masks:
            return super().prediction_step(model, inputs, *args, **kwargs)
        # Trainer takes a batch for one without labels, and would leave out its loss: `compute_loss` draws them.
        return self.evaluated_loss(model, inputs), None, None
