"""Fine-tuning: a model with a new head learns a task from labeled documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction

from hf_linear_attn.measure.metrics import check_metrics, load_metrics
from hf_linear_attn.training.batching import LengthGroupedSampler
from hf_linear_attn.training.parts import last_layers
from hf_linear_attn.training.prefix import FrozenPrefix
from hf_linear_attn.training.redraw import Redraw
from hf_linear_attn.training.stage import StageTrainer
from hf_linear_attn.training.tasks import get_task

__all__ = ["FinetuneTrainer", "kept_dtype"]


class FinetuneTrainer(StageTrainer):
    """Trains a model with a task's head; what the head computes its loss from is the model's own affair.

    Documents are cut at `max_length` tokens. They are shuffled into batches of like length, the same documents in the
    same order for every model that sees them (`LengthGroupedSampler`), unless `args.train_sampling_strategy` says
    otherwise.

    Args:
        model: with a head for `task`.
        args, train_dataset, ...: see `StageTrainer`; datasets as `hf_linear_attn.data.load_documents` gives them, or
            rows of what the model takes.
        task: `sequence_classification`, `multi_label_classification`, `regression`, `token_classification`,
            `question_answering` (over whole contexts) or `multiple_choice`.
        metrics: names for `load_metrics`; the task's own when None.
        cache_frozen_layers: with `trainable` `last_layers:<k>` or `head`, run the frozen layers once per document and
            keep their output in memory, equal to running them every time: they hold no dropout while frozen.
        prefix: outputs of frozen layers to use and to fill; a fresh one when None.

    Raises:
        ValueError: for an unknown task, a metric that does not measure it, or a cache where layers below the last
            ones train.
    """

    new_head = True

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        task: str = "sequence_classification",
        metrics: Sequence[str] | None = None,
        cache_frozen_layers: bool = False,
        prefix: FrozenPrefix | None = None,
        **kwargs: Any,
    ) -> None:
        self.task = get_task(task)
        self.last = last_layers(kwargs.get("trainable") or self.default_trainable)
        if cache_frozen_layers and self.last is None:
            raise ValueError(
                "cache_frozen_layers needs trainable='head' or 'last_layers:<k>', got "
                f"{kwargs.get('trainable') or self.default_trainable!r}"
            )
        self.metrics = list(self.task.metrics if metrics is None else metrics)
        check_metrics(self.metrics, task)
        self.prefix = None
        super().__init__(model, args, compute_metrics=self._measure, **kwargs)
        self.settings |= {"task": task}
        # Task heads take any keyword and ignore `num_items_in_batch`: their loss is a mean of its batch, which Trainer
        # must divide by the accumulated batches. Left to its guess, gradients would be too large by their number.
        self.model_accepts_loss_kwargs = False
        self.predictions: list[Any] = []
        self.references: list[Any] = []
        if cache_frozen_layers:
            if any(isinstance(callback, Redraw) for callback in self.callback_handler.callbacks):
                raise ValueError("cache_frozen_layers keeps outputs of layers whose features redraw_every draws anew")
            self.prefix = prefix if prefix is not None else FrozenPrefix(kept_dtype(args))
            self.prefix.check(self.accelerator.unwrap_model(self.model), self.last or 0)
            self.train_dataset, self.eval_dataset = _numbered(self.train_dataset, self.eval_dataset)

    def prepare(self, data: Any, tokenizer: Any) -> Any:
        return self.task.prepare(data, tokenizer, self.max_length)

    def collator(self, tokenizer: Any) -> Any:
        return self.task.collator(tokenizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        # Trainer hands over a dataset from which it has taken the columns that the model does not know.
        data = self.train_dataset
        if self.args.train_sampling_strategy != "random" or "length" not in getattr(data, "column_names", ()):
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(data["length"], self.args.train_batch_size, seed=self.args.seed)

    def _measure(self, found: EvalPrediction) -> dict[str, float]:
        named = getattr(self.model.config, "id2label", {})
        names = [named[index] for index in sorted(named)]  # in the order of the logits, whatever order a file has
        self.predictions, self.references = self.task.predict(
            found.predictions, found.label_ids, self._measured, [str(name) for name in names]
        )
        metrics = load_metrics(self.metrics, experiment_id=f"{self.accelerator.process_index}")
        metrics.add_batch(predictions=self.predictions, references=self.references)
        return {name: float(value) for name, value in metrics.compute().items()}

    # What is measured, with the columns that the model does not take: a dataloader has them no more.

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        named = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        self._measured = self.eval_dataset if named is None else named
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        self._measured = test_dataset
        return super().get_test_dataloader(test_dataset)

    # The cache of frozen layers -----------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.prefix is not None and "document" not in self._signature_columns:
            self._signature_columns.append("document")

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.prefix is None:
            return super().training_step(model, inputs, *args, **kwargs)
        # around the backward pass too: a checkpointed layer runs again in it
        with self._kept(model, inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.prefix is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        with self._kept(model, inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def _kept(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Within the block the model starts from what the frozen layers gave for these documents."""
        assert self.prefix is not None
        own = self.accelerator.unwrap_model(model)
        documents = inputs.pop("document").tolist()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            self.prefix.fill(own, inputs, documents, self.last or 0)
        return self.prefix.feed(own, inputs, documents, self.last or 0)


def kept_dtype(args: Any) -> torch.dtype:
    """What frozen layers' outputs are kept in: the precision of the run."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def _numbered(*parts: Any) -> list[Any]:
    """Datasets with a column `document`, counted through all of them, where they have none."""
    numbered, first = [], 0
    for data in parts:
        if data is not None and "document" not in data.column_names:
            data = data.add_column("document", np.arange(first, first + len(data)).tolist())
        first += 0 if data is None else len(data)
        numbered.append(data)
    return numbered
