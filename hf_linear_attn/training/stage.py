"""What every stage of training shares: which parameters learn, at which rates, on which pieces of which texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import DataCollatorWithPadding, TrainingArguments

from hf_linear_attn.checks import check_features
from hf_linear_attn.measure.rows import differences
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.saving import write_json
from hf_linear_attn.seam.trainer import CheckedTrainer, last_checkpoint
from hf_linear_attn.training.anneal import Anneal
from hf_linear_attn.training.parts import Lora, choose_trainable, freeze_dropout, optimizer_groups
from hf_linear_attn.training.redraw import Redraw

__all__ = [
    "LossStage",
    "StageTrainer",
    "checkpoint_limit",
    "data_digest",
    "deciding_arguments",
    "longest_input",
    "refuse_other_settings",
    "text_pieces",
]

_SETTINGS = "stage.json"
# Arguments that change the weights a run ends with. Where it runs, what it logs and how often it saves do not.
_DECIDING = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "data_seed",
    "fp16",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "optim",
    "per_device_train_batch_size",
    "seed",
    "train_sampling_strategy",
    "warmup_steps",
    "weight_decay",
)


class StageTrainer(CheckedTrainer):
    """`transformers.Trainer` with the parts of a model that a stage trains, and their learning rates.

    Everything that `Trainer` takes is passed on. Datasets may have a column `text` (or be lists of texts): it is
    tokenized with `processing_class` into pieces of at most `max_length` tokens, and no token is left out.

    Args:
        model: a Transformers model, converted or not.
        args: `TrainingArguments`.
        train_dataset: rows of `text`, or of what the model takes.
        eval_dataset: likewise.
        processing_class: the tokenizer.
        trainable: `all`, `new` (what the conversion added), `head`, `lora` (adapters and what the conversion added) or
            `last_layers:<k>`.
        lora: options of `lora`.
        new_learning_rate: of what the conversion added; `args.learning_rate` when None.
        head_learning_rate: of the head (classifier and pooler); `args.learning_rate` when None.
        max_length: tokens of a piece of text; the model's own limit when None.
        redraw_every: steps after which random features are drawn anew, by `args.seed` (`Redraw`); never when None.
        **kwargs: the other arguments of `Trainer`.

    Raises:
        ValueError: for another `trainable`, a rate or length that is not positive, a tokenizer without a padding
            token, texts without a tokenizer, or `redraw_every` with a model that has no random features.
    """

    default_trainable: ClassVar[str] = "all"
    new_head: ClassVar[bool] = False
    """Whether the model's head is new, and trains whatever else does."""
    shortest: int = 1
    """Tokens of the shortest piece of text that is read."""
    _data: str | None = None

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        trainable: str | None = None,
        lora: Lora | None = None,
        new_learning_rate: float | None = None,
        head_learning_rate: float | None = None,
        max_length: int | None = None,
        redraw_every: int | None = None,
        **kwargs: Any,
    ) -> None:
        redraw = [] if redraw_every is None else [Redraw(redraw_every, args.seed)]
        if redraw:
            check_features(model)
        rates = {"new_learning_rate": new_learning_rate, "head_learning_rate": head_learning_rate}
        for name, rate in {"learning_rate": args.learning_rate, **rates}.items():
            if rate is not None and not 0 < rate < float("inf"):
                raise ValueError(f"{name}={rate}; allowed: a finite number above 0")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length}; allowed: at least 1 token")
        self.max_length = longest_input(model) if max_length is None else max_length
        self.rates = rates
        trainable = trainable or self.default_trainable
        model, self.trained = choose_trainable(model, trainable, lora, with_head=self.new_head)
        self.settings = {"stage": type(self).__name__, "trainable": trainable, "max_length": self.max_length, **rates}
        self.settings |= {"redraw_every": redraw_every}
        if processing_class is not None and processing_class.pad_token is None:
            raise ValueError(
                f"{type(processing_class).__name__} has no padding token; set one, e.g. "
                "tokenizer.pad_token = tokenizer.eos_token"
            )
        train_dataset, eval_dataset = (self.prepare(data, processing_class) for data in (train_dataset, eval_dataset))
        if kwargs.get("data_collator") is None and processing_class is not None:
            kwargs["data_collator"] = self.collator(processing_class)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if not any(isinstance(callback, Anneal) for callback in self.callback_handler.callbacks):
            self.add_callback(Anneal())
        for callback in redraw:
            self.add_callback(callback)

    # What a stage overrides ---------------------------------------------------------------------------------------

    def prepare(self, data: Any, tokenizer: Any) -> Any:
        """Rows that the collator takes, from rows of `text`; other rows pass."""
        return text_pieces(data, tokenizer, self.max_length)

    def collator(self, tokenizer: Any) -> Any:
        """What makes a batch of rows: a callable."""
        return DataCollatorWithPadding(tokenizer)

    # What they share ----------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = optimizer_groups(
                model, learning_rate=self.args.learning_rate, weight_decay=self.args.weight_decay, **self.rates
            )
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The stage's loss, the frozen parts without dropout; see `Trainer.compute_loss`."""
        if model.training:  # all of it: Trainer says so at the beginning of every step
            freeze_dropout(model)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluated_loss(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        """The loss of a batch without gradients, whatever it draws drawn as every time before."""
        inputs, device = self._prepare_inputs(inputs), self.args.device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.args.seed)
            with self.compute_loss_context_manager():
                return self.compute_loss(model, inputs).detach()

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the newest whole checkpoint, or starts anew.

        Raises:
            ValueError: if the checkpoint belongs to a run with other settings or other data; says which.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self._check_settings(Path(resume_from_checkpoint) / _SETTINGS)
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        write_json(Path(output_dir or self.args.output_dir) / _SETTINGS, self._deciding())

    def _deciding(self) -> dict[str, Any]:
        if self._data is None:
            self._data = data_digest(self.train_dataset, ("input_ids",))
        data = {"training_data": self._data, "processes": self.args.world_size}
        return {**self.settings, **data, **deciding_arguments(self.args)}

    def _check_settings(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path.parent} is no checkpoint of a stage: it has no {path.name}")
        saved, own = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(self._deciding()))
        refuse_other_settings(str(path.parent), saved, own)


class LossStage(StageTrainer):
    """A stage whose loss is its own, a mean over each batch; evaluation gives that loss, always on the same draws."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # Trainer divides by the accumulated batches

    def loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """The loss of a batch, a scalar, and the model's outputs; `model` may be wrapped (DDP)."""
        raise TypeError(f"{type(self).__name__} does not implement loss")

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training:
            freeze_dropout(model)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        loss, outputs = self.loss(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        return self.evaluated_loss(model, inputs), None, None


def deciding_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that decide which weights a stage ends with."""
    arguments = args.to_dict()
    return {name: arguments[name] for name in _DECIDING if name in arguments}


def refuse_other_settings(what: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise `ValueError` with the difference, if there is one."""
    if changed := differences(there, here):
        raise ValueError(
            f"{what} belongs to a run with other settings, and would not end where this one does: {', '.join(changed)}"
        )


def data_digest(data: Any, columns: Sequence[str] | None = None) -> str | None:
    """What tells training data apart: a digest of all rows, or of the first few of data that streams.

    Args:
        data: a dataset; None for anything else.
        columns: those that count; all when None.
    """
    if not isinstance(data, (Dataset, IterableDataset)):
        return None
    names = list(columns or data.column_names or [])
    if isinstance(data, Dataset):
        batches = data.select_columns(names).iter(256)
        rows = ([batch[name] for name in names] for batch in batches)
    else:
        rows = ([row[name] for name in names or row] for row in data.take(8))
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:16]


def longest_input(model: Any) -> int:
    """Tokens that a model of a supported family reads at most, by its config."""
    config = model.config
    return get_patcher(getattr(config, "base_model_type", config.model_type)).max_length(config)


def checkpoint_limit(model: Any) -> int:
    """Tokens that the checkpoint reads which a converted model was made from; a softmax model's own limit."""
    converted = getattr(model.config, "linear_attn", None) or {}
    positions = converted.get("positions")
    return positions["original_max_length"] if positions else longest_input(model)


def text_pieces(data: Any, tokenizer: Any, max_length: int) -> Any:
    """Cut texts into pieces of at most `max_length` tokens, special tokens included; no token is left out.

    Args:
        data: a list of texts, or a dataset with a column `text`; a dataset that has `input_ids` is returned as it is,
            and so is None.
        tokenizer: a fast one.
        max_length: tokens of a piece.

    Returns:
        a dataset (one that streams, for one that streams) of `input_ids` and `attention_mask`.

    Raises:
        ValueError: for texts without a tokenizer that can cut them, or without a single token.
    """
    if isinstance(data, (list, tuple)) and all(isinstance(text, str) for text in data):
        data = Dataset.from_dict({"text": list(data)})
    if not hasattr(data, "map"):
        return data
    columns = data.column_names or list(next(iter(data)))
    if "text" not in columns or "input_ids" in columns:
        return data
    if tokenizer is None or not tokenizer.is_fast:
        raise ValueError("A column `text` needs processing_class, a fast tokenizer (backed by `tokenizers`)")

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        cut = tokenizer(rows["text"], truncation=True, max_length=max_length, return_overflowing_tokens=True)
        kept = [index for index, ids in enumerate(cut["input_ids"]) if ids]
        return {name: [cut[name][index] for index in kept] for name in ("input_ids", "attention_mask")}

    pieces = data.map(encode, batched=True, remove_columns=columns)
    if isinstance(pieces, Dataset) and not len(pieces):
        raise ValueError(f"The {len(data)} texts hold no token")
    return pieces
