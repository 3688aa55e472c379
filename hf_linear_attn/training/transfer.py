"""Transfer: every converted layer learns softmax's output from what the softmax model feeds that layer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from datasets import Dataset
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
        ValueError: for a model that is not converted, one whose variants have no parameters, or a sharded model; in
            `train`, where every text lies within a window, so that no new parameter has a part in any output.
    """

    default_trainable = "new"
    _learned: bool | None = None
    """Whether the loss of any batch so far depends on a new parameter; None before the first."""

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
        if torch.is_grad_enabled():
            self._learned = self._learned or loss.requires_grad
            # The last piece of a text may lie within a window: it teaches nothing. DDP waits for every gradient.
            loss = loss + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        return loss, outputs

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `StageTrainer.train`; the longest text is looked at before the first step."""
        if isinstance(rows := self.train_dataset, Dataset) and "input_ids" in rows.column_names:
            lengths = [len(ids) for ids in rows["input_ids"]]
            longest = rows.select([lengths.index(max(lengths))])
            with torch.random.fork_rng([]):  # a loader draws a seed
                for batch in self.get_test_dataloader(longest):  # unlike that of evaluation it is never kept
                    self.loss(self.model, self._prepare_inputs(batch))
            self._check_learned(f"the longest text has {max(lengths)} tokens")
        output = super().train(*args, **kwargs)
        self._check_learned(f"pieces of at most {self.max_length} tokens were read")
        return output

    def _check_learned(self, what: str) -> None:
        if self._learned is False:
            raise ValueError(
                f"No layer's output depends on its new parameters: {what}, and a window covers them. Take longer texts "
                "or a narrower window"
            )
