"""Transfer: every converted layer learns softmax's output from what the softmax model feeds that layer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from hf_linear_attn.training.losses import LayerLosses
from hf_linear_attn.training.parts import variants_of
from hf_linear_attn.training.stage import LossStage

__all__ = ["TransferTrainer"]


class TransferTrainer(LossStage):
    """Trains what a conversion added, all layers at once, against softmax attention on the same inputs.

    One forward of the checkpoint's own weights with softmax in every layer gives each layer's inputs and targets: no
    second copy of the weights, and no layer sees another's error (attention transfer of LoLCATs, arXiv:2410.10254).
    The loss is the mean over layers of `AttentionVariant.regression_loss`. Unlike `calibration_steps`, which keeps its
    batches in memory, it takes any number of tokens. Everything else stays as it is; `convert_model(calibration=...)`
    first gives it a better start.

    It runs on one device or under DDP. The weights that a sharding strategy would split are frozen here.

    Args:
        model: a converted model.
        args, train_dataset, ...: see `StageTrainer`; `trainable` is `new`.

    Raises:
        ValueError: for a model that is not converted, one whose variants have no parameters, or a sharded model.
    """

    default_trainable = "new"

    def __init__(self, model: nn.Module, args: Any, **kwargs: Any) -> None:
        variants = variants_of(model)
        if not variants:
            raise ValueError(f"{type(model).__name__} is not converted: call convert_model first")
        if not any(list(variant.parameters()) for variant in variants):
            keys = ", ".join(dict.fromkeys(variant.spec.key for variant in variants))
            raise ValueError(f"{keys} has no parameters of its own with these options: there is nothing to transfer")
        if kwargs.get("trainable") not in (None, "new"):
            raise ValueError(f"transfer trains what the conversion added: trainable='new', got {kwargs['trainable']!r}")
        # The loss does not come from the outputs, from which DDP would take every trained parameter to be unused.
        args.ddp_find_unused_parameters = False
        super().__init__(model, args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("transfer runs on one device or under DDP; FSDP and DeepSpeed are for the stages after it")
        forward = inspect.signature(model.forward).parameters
        # A language model's head costs as much as many layers, and nothing here asks for it.
        self.extra = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}
        if "use_cache" in forward:
            self.extra["use_cache"] = False

    def loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        losses = LayerLosses()
        model.eval()  # the targets are those of the checkpoint
        # Among the outputs: DDP takes what these do not lead to for unused, and fails when it gets a gradient.
        with self.accelerator.unwrap_model(model).register_forward_hook(lambda *given: (losses.mean(), given[-1])):
            loss, outputs = model(**inputs, **self.extra, linear_attn_recorder=losses)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                f"No layer's output depends on its new parameters for texts of {inputs['input_ids'].shape[1]} tokens, "
                "which a window covers: take longer texts or a narrower window"
            )
        return loss, outputs
