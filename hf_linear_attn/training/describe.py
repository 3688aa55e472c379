"""What a run tells its user: sentences before each stage, and the loss beside the bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import ProgressCallback, TrainerCallback

from hf_linear_attn.measure.profile import parameter_counts
from hf_linear_attn.training.finetune import FinetuneTrainer

if TYPE_CHECKING:
    from hf_linear_attn.data.task import DocumentTask
    from hf_linear_attn.training.stage import StageTrainer

__all__ = ["LossBar", "Share", "describe_conversion", "describe_stage"]

OnStep = Callable[[float], None]
"""Told which share of a run is done, from 0 to 1."""


def describe_conversion(report: dict[str, Any] | None) -> str:
    """One sentence about a conversion report as a dictionary: what was converted."""
    if report is None:
        return "Nothing is converted: softmax attention in every layer."
    variants = [row["variant"] for row in report["rows"]]
    counts = {variant: variants.count(variant) for variant in variants}
    layers = ", ".join(f"{variant} in {count}" for variant, count in counts.items())
    return f"Converted: {layers} of {len(variants)} layers; {report['new_parameters']:,} new parameters."


def describe_stage(
    trainer: StageTrainer, task: DocumentTask, title: str, folder: Path, shuffle_buffer: int | None
) -> list[str]:
    """Sentences for a stage that is about to train: what trains, on what, for how long, and where it goes."""
    counts, args = parameter_counts(trainer.model), trainer.args
    length = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return [
        f"{title}: trains {trainer.trained}, {counts.trainable:,} of {counts.total:,} parameters, for {length} of "
        f"{args.train_batch_size * args.gradient_accumulation_steps * args.world_size} at a time.",
        f"{title}: {_describe_data(trainer, task, shuffle_buffer)}",
        f"{title}: the model goes to {folder}.",
    ]


def _describe_data(trainer: StageTrainer, task: DocumentTask, buffer: int | None) -> str:
    rows, limit, least = trainer.train_dataset, trainer.max_length, trainer.shortest
    left_out = "nothing is cut off" if least == 1 else f"shorter ones than {least:,} are left out"
    if not isinstance(rows, Dataset):
        shuffled = "" if buffer is None else f", shuffled in a buffer of {buffer:,}"
        return f"reads {task.name} as a stream{shuffled}, in pieces of at most {limit:,} tokens; {left_out}."
    tokens = f"{sum(_tokens(ids) for ids in rows['input_ids']):,} tokens"
    if not isinstance(trainer, FinetuneTrainer):
        return (
            f"{len(task.train):,} documents of {task.name}, {tokens} in {len(rows):,} pieces of at most {limit:,}; "
            f"{left_out}."
        )
    cut = _count_cut(trainer, task)
    return (
        f"{len(rows):,} documents of {task.name}, {tokens}; {cut:,} of them ({cut / len(rows):.0%}) are cut at "
        f"{limit:,} tokens. {len(task.test):,} test documents."
    )


def _tokens(ids: Any) -> int:
    return sum(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)


def _longest(ids: Any) -> int:
    return max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids)


def _count_cut(trainer: FinetuneTrainer, task: DocumentTask) -> int:
    """Documents that hold more tokens than are read: those that reach the limit are read again, one token further."""
    limit = trainer.max_length
    full = [index for index, ids in enumerate(trainer.train_dataset["input_ids"]) if _longest(ids) >= limit]
    if not full:
        return 0
    again = trainer.task.encode(task.train[full], trainer.processing_class, limit + 1)
    return sum(_longest(ids) > limit for ids in again["input_ids"])


class LossBar(ProgressCallback):
    """Trainer's progress bar with the last loss beside it, in place of a line for each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4g}")


class Share(TrainerCallback):
    """Tells which share of the run is done, its stages counting alike."""

    def __init__(self, on_step: OnStep, index: int, stages: int) -> None:
        self.on_step, self.index, self.stages = on_step, index, stages

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_step((self.index + state.global_step / max(state.max_steps, 1)) / self.stages)
