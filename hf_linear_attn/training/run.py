"""Run a recipe: its stages one after the other, each from what the one before left, and the last one measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env, set_seed
from filelock import FileLock, Timeout
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_linear_attn.data.companions import checkpoint_folder, find_companions, find_pooling
from hf_linear_attn.data.models import resolve_model
from hf_linear_attn.measure.metrics import check_metrics, load_metrics
from hf_linear_attn.measure.profile import parameter_counts, track_peak_memory
from hf_linear_attn.measure.quiet import quiet_libraries
from hf_linear_attn.saving import write_json
from hf_linear_attn.seam.trainer import remove_checkpoints, writing
from hf_linear_attn.training.anneal import Anneal
from hf_linear_attn.training.arguments import training_arguments
from hf_linear_attn.training.contrast import ContrastTrainer, check_pooling
from hf_linear_attn.training.describe import LossBar, OnStep, Share, describe_conversion, describe_stage
from hf_linear_attn.training.distill import DistillTrainer
from hf_linear_attn.training.finetune import FinetuneTrainer
from hf_linear_attn.training.prefix import FrozenPrefix
from hf_linear_attn.training.results import RESULT, Progress, StageResult, TrainResult
from hf_linear_attn.training.setup import (
    auto_class,
    build_model,
    build_tokenizer,
    check_stages,
    load_head,
    load_task,
    process_state,
)
from hf_linear_attn.training.stage import StageTrainer, data_digest, deciding_arguments
from hf_linear_attn.training.teachers import holds_checkpoint
from hf_linear_attn.training.transfer import TransferTrainer
from hf_linear_attn.training.uptrain import UptrainTrainer

if TYPE_CHECKING:
    from hf_linear_attn.data.task import DocumentTask
    from hf_linear_attn.training.recipe import DataRecipe, Recipe, Stage

__all__ = ["StageResult", "TrainResult", "train"]

TRAINERS: dict[str, type[StageTrainer]] = {
    "transfer": TransferTrainer,
    "distill": DistillTrainer,
    "contrast": ContrastTrainer,
    "uptrain": UptrainTrainer,
    "finetune": FinetuneTrainer,
}


def train(
    recipe: Recipe,
    *,
    task: DocumentTask | None = None,
    prefix: FrozenPrefix | None = None,
    on_step: OnStep | None = None,
    on_message: Callable[[str], None] | None = None,
    from_stage: str | None = None,
    until_stage: str | None = None,
    resume: bool = False,
    save_model: bool = True,
    evaluate: bool = True,
) -> TrainResult:
    """Train as `recipe` says. Under `accelerate launch` or `torchrun` every process calls this.

    Everything that can be wrong is looked at before the first step: arguments, metrics, documents of every stage,
    lengths, the output folder. A stage's model lies in `<output_dir>/<number>-<kind>`, the last one's in `output_dir`,
    each with the result up to there in `train_result.json`, and with what still holds of the checkpoint's folder
    (`hf_linear_attn.data.companions`: a sentence encoder's modules, its limit the new one), unless the head is new.

    Args:
        recipe: the run.
        task: the documents of the last stage; loaded as the recipe says when None.
        prefix: outputs of frozen layers to use and to fill (`cache_frozen_layers`); a fresh one when None.
        on_step: told of the share done, instead of progress bars.
        on_message: told, on the main process, what is converted, what trains on which documents, and where it goes.
        from_stage: kind of the stage to begin with, from what the one before it has left in its folder.
        until_stage: kind of the stage to end with.
        resume: go on where a run of this recipe was cut off: finished stages are not run again, and the unfinished one
            goes on from its newest checkpoint (`training.save_strategy`), as if it had not stopped. Without it a stage
            that begins removes the checkpoints which an earlier run left in its folder.
        save_model: write the last stage's model and the tokenizer to `output_dir`.
        evaluate: measure each stage's model on the held-out documents; False for one that is measured elsewhere.

    Raises:
        FileNotFoundError: if the stage before `from_stage` has left no model.
        NotFiniteError: at a loss that is not finite; the last checkpoint stays.
        BlockingIOError: if another run writes to `output_dir`.
        OSError: for a folder that cannot be written to, or a full disk.
        RuntimeError: if processes were launched together and do not find each other.
        ValueError: for a recipe that does not fit the model or the documents, or a stage of this folder that was begun
            under other settings.
    """
    run = _Run(recipe, prefix, on_step, on_message, evaluate)
    first, last = run.span(from_stage, until_stage)
    with _alone(recipe.output_dir):
        run.load(task)
        return run.run(first, last, resume, save_model)


class _Run:
    """One run: what `train` prepares, trains and writes."""

    def __init__(
        self,
        recipe: Recipe,
        prefix: FrozenPrefix | None,
        on_step: OnStep | None,
        on_message: Callable[[str], None] | None,
        evaluate: bool = True,
    ) -> None:
        self.recipe, self.prefix, self.on_step, self.evaluate = recipe, prefix, on_step, evaluate
        self.state = process_state()
        _check_processes(self.state.num_processes)
        self.tell = on_message if on_message is not None and self.state.is_main_process else _say_nothing
        self.arguments = [self._arguments(index) for index in range(len(recipe.stages))]
        last, metrics = recipe.stages[-1], recipe.evaluation.metrics
        if metrics is not None:
            if last.kind != "finetune":
                raise ValueError(f"evaluation.metrics measure a finetune stage, and the last one here is {last.kind}")
            check_metrics(metrics, last.task)
            load_metrics(metrics)  # one of the Hub is there, or the run does not begin

    def span(self, from_stage: str | None, until_stage: str | None) -> tuple[int, int]:
        """Indices of the first and the last stage to run."""
        kinds = [stage.kind for stage in self.recipe.stages]
        for name, kind in (("from_stage", from_stage), ("until_stage", until_stage)):
            if kind is not None and kind not in kinds:
                raise ValueError(f"{name}={kind!r}; the stages of this recipe: {', '.join(kinds)}")
        first = 0 if from_stage is None else kinds.index(from_stage)
        last = len(kinds) - 1 if until_stage is None else len(kinds) - 1 - kinds[::-1].index(until_stage)
        if first > last:
            raise ValueError(f"from_stage={from_stage!r} comes after until_stage={until_stage!r}")
        return first, last

    def load(self, task: DocumentTask | None) -> None:
        """The tokenizer, the documents of every stage, and what goes along with the model."""
        with self.state.main_process_first():
            self.tokenizer = build_tokenizer(self.recipe)
            self.tasks = [self._documents(stage) for stage in self.recipe.stages[:-1]]
            self.tasks.append(task if task is not None else self._documents(self.recipe.stages[-1]))
            heads = [TRAINERS[stage.kind].new_head for stage in self.recipe.stages]
            self.companions = None if all(heads) else find_companions(resolve_model(self.recipe.model.name))
        if self.companions is not None and any(stage.kind == "contrast" for stage in self.recipe.stages):
            self.pooling = check_pooling(find_pooling(self.companions))
        self.autos = [auto_class(stage, self.recipe.model.name) for stage in self.recipe.stages]
        check_stages(self.recipe, self.autos, self.tokenizer, self.arguments)
        settings = [self._settings(index) for index in range(len(self.tasks))]
        self.progress = Progress(self.recipe.output_dir, settings)

    def _documents(self, stage: Stage) -> DocumentTask:
        kind = stage.task if stage.kind == "finetune" else "text"  # type: ignore[attr-defined]
        return load_task(self._data(stage), kind)

    def _data(self, stage: Stage) -> DataRecipe:
        return stage.data or self.recipe.data

    def _folder(self, index: int) -> Path:
        if index == len(self.recipe.stages) - 1:
            return self.recipe.output_dir
        return self.recipe.output_dir / f"{index + 1}-{self.recipe.stages[index].kind}"

    def _arguments(self, index: int) -> Any:
        stage, quiet = self.recipe.stages[index], {"disable_tqdm": True} if self.on_step is not None else {}
        own = {"output_dir": str(self._folder(index)), **quiet}
        if self.recipe.evaluation.batch_size is not None:
            own["per_device_eval_batch_size"] = self.recipe.evaluation.batch_size
        return training_arguments(self.recipe.training, stage.training, own)

    def _settings(self, index: int) -> dict[str, Any]:
        """What decides the weights that a stage ends with, apart from those it begins with."""
        stage, train = self.recipe.stages[index], self.tasks[index].train
        columns = [name for name in train.column_names or () if name != "group"]
        found = {"stage": stage.kind, **stage.options(), "teacher": getattr(stage, "teacher", None)}
        found["lora"] = asdict(stage.lora)
        found["shuffle_buffer"] = self._data(stage).shuffle_buffer
        if index == 0:
            conversion = self.recipe.conversion
            found |= {
                "model": asdict(self.recipe.model),
                "conversion": None if conversion is None else asdict(conversion),
            }
        return {**found, **deciding_arguments(self.arguments[index]), "documents": data_digest(train, columns)}

    def run(self, first: int, last: int, resume: bool, save_model: bool) -> TrainResult:
        """Train from one stage to another, measure, write."""
        if resume or first:
            self.progress.go_on(len(self.tasks) if resume else first)
        result = None
        for index in range(first):
            result = self._finished(index, saved=True)
            if result is None:
                raise FileNotFoundError(f"{self._folder(index)} holds no finished stage to begin from")
        self.state.wait_for_everyone()  # every process has read what is there before one of them writes
        names = " -> ".join(stage.kind for stage in self.recipe.stages[first : last + 1])
        self.tell(f"Stages: {names}; the model goes to {self._folder(last)}.")
        for index in range(first, last + 1):
            saved = save_model or index < len(self.tasks) - 1
            done = self._finished(index, saved) if resume else None
            if done is not None:
                self.tell(f"{self._title(index)}: finished before, {self._folder(index)}.")
            result = done or self._stage(index, result, resume and index < self.progress.begun, saved)
        assert result is not None
        return result

    def _title(self, index: int) -> str:
        return f"Stage {index + 1} of {len(self.tasks)}, {self.recipe.stages[index].kind}"

    def _finished(self, index: int, saved: bool) -> TrainResult | None:
        """What a stage left that was begun under these settings and ended."""
        folder = self._folder(index)
        if index >= self.progress.begun or (saved and not (folder / "config.json").is_file()):
            return None
        return TrainResult.read(folder)

    def _begin(self, index: int) -> None:
        """Nothing of an earlier run may be taken for this one's."""
        if self.state.is_main_process:
            folder = self._folder(index)
            folder.mkdir(exist_ok=True)
            (folder / RESULT).unlink(missing_ok=True)
            remove_checkpoints(folder)
            self.progress.begin(index)
        else:
            self.progress.begun = index + 1
        self.state.wait_for_everyone()

    def _stage(self, index: int, before: TrainResult | None, resume: bool, save: bool) -> TrainResult:
        stage, args, task = self.recipe.stages[index], self.arguments[index], self.tasks[index]
        set_seed(args.seed)
        model, conversion = self._model(index, before)
        self.tell(describe_conversion(conversion))
        extra: dict[str, Any] = {}
        if stage.kind == "distill" and (teacher := self._teacher(index, model)) is not None:
            extra["teacher"] = teacher
        if stage.kind == "contrast":
            extra["pooling"] = self.pooling
        if stage.kind == "finetune":
            extra |= {"metrics": self.recipe.evaluation.metrics, "prefix": self.prefix}
        count = len(self.recipe.stages)
        callbacks: list[TrainerCallback] = [Anneal(part=(index / count, (index + 1) / count))]
        if self.on_step is not None:
            callbacks.append(Share(self.on_step, index, count))
        with quiet_libraries():
            trainer = TRAINERS[stage.kind](
                model,
                args,
                train_dataset=task.train,
                eval_dataset=task.test,
                processing_class=self.tokenizer,
                callbacks=callbacks,
                **stage.options(),
                **extra,
            )
        if self.on_step is not None:  # in place of a bar, Trainer would print every loss
            trainer.remove_callback(PrinterCallback)
        elif not args.disable_tqdm:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(LossBar())
        if self.tell is not _say_nothing:
            buffer = self._data(stage).shuffle_buffer
            for sentence in describe_stage(trainer, task, self._title(index), self._folder(index), buffer):
                self.tell(sentence)
        if not resume:
            self._begin(index)
        with track_peak_memory(args.device) as peak:
            output = trainer.train(resume_from_checkpoint=resume or None)
        trainer.check_finite()
        evaluation = trainer.evaluate() if self.evaluate else {}
        history = trainer.state.log_history
        done = StageResult(
            stage=stage.kind,
            trained=trainer.trained,
            steps=trainer.state.global_step,
            documents=len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
            documents_seen=_documents_seen(trainer),
            tokens_seen=int(trainer.state.num_input_tokens_seen),
            max_length=trainer.max_length,
            seconds=float(output.metrics["train_runtime"]),
            peak_memory_mb=peak.megabytes,
            losses=[(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry],
            evaluation={name: float(value) for name, value in evaluation.items()},
            parameters_trained=parameter_counts(trainer.model).trainable,
        )
        result = self._result(trainer, done, index, before, conversion)
        self._write(trainer, result, index, save)
        trainer.accelerator.free_memory()
        return result

    def _model(self, index: int, before: TrainResult | None) -> tuple[Any, dict[str, Any] | None]:
        """The model that a stage begins with, and how it was converted."""
        task = self.tasks[index] if self.recipe.stages[index].kind == "finetune" else None
        if index > 0:
            model = load_head(self.autos[index], str(self._folder(index - 1)), self.recipe, task, self.tokenizer)
            return model, None if before is None else before.conversion
        texts = self.tasks[0].train
        if "text" not in (texts.column_names or next(iter(texts))):
            texts = load_task(self.recipe.data, "text").train
        model = build_model(self.recipe, self.autos[0], task, self.tokenizer, texts)
        report = getattr(model, "conversion_report", None)
        return model, None if report is None else report.to_dict()

    def _teacher(self, index: int, model: Any) -> Any:
        """The checkpoint; None where the model still holds it, which no later stage than the first but `transfer`
        leaves so."""
        stage = self.recipe.stages[index]
        named = stage.teacher  # type: ignore[attr-defined]
        untouched = all(earlier.kind == "transfer" for earlier in self.recipe.stages[:index])
        if named is None and (index == 0 or (untouched and holds_checkpoint(model))):
            return None
        return load_head(self.autos[index], named or self.recipe.model.name, self.recipe, None, self.tokenizer)

    def _result(
        self,
        trainer: StageTrainer,
        done: StageResult,
        index: int,
        before: TrainResult | None,
        conversion: dict[str, Any] | None,
    ) -> TrainResult:
        counts = parameter_counts(trainer.model)
        metrics = {
            name.removeprefix("eval_"): value
            for name, value in done.evaluation.items()
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_time"))
        }
        predictions = getattr(trainer, "predictions", [])
        return TrainResult(
            output_dir=str(self._folder(index)),
            metrics=metrics,
            predictions=predictions,
            references=getattr(trainer, "references", []),
            stages=[*(() if before is None else before.stages), done],
            parameters_total=counts.total,
            parameters_added=counts.new,
            num_processes=self.state.num_processes,
            conversion=conversion,
            groups=list(self.tasks[index].test["group"]) if predictions else [],
        )

    def _write(self, trainer: StageTrainer, result: TrainResult, index: int, save: bool) -> None:
        """The model and the tokenizer, then the result, which says that the stage is finished."""
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathered, where it is sharded
        if self.state.is_main_process:
            model: Any = trainer.accelerator.unwrap_model(trainer.model)
            folder = self._folder(index)
            if save:
                # Under a new head it is another model: how its checkpoint pools states says nothing about it.
                companions = None if trainer.new_head else self.companions
                with writing(folder), checkpoint_folder(folder, companions, trainer.max_length) as stage:
                    if hasattr(model, "merge_and_unload"):  # adapters become part of the weights
                        model, state = model.merge_and_unload(), None
                    with quiet_libraries():
                        model.save_pretrained(stage, state_dict=state)
                    self.tokenizer.model_max_length = trainer.max_length
                    self.tokenizer.save_pretrained(stage)
            write_json(folder / RESULT, result.to_dict())
        trainer.accelerator.wait_for_everyone()


def _say_nothing(_: str) -> None:
    """The library prints nothing of its own accord."""


def _documents_seen(trainer: StageTrainer) -> int:
    rows = trainer.train_dataset
    if hasattr(rows, "__len__"):
        return round(trainer.state.epoch * len(rows))
    args = trainer.args
    return trainer.state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One run writes to a folder at a time; a folder that nothing was written to goes again."""
    if not process_state().is_main_process:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")  # of the kernel: it ends with its process, whatever becomes of the file
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"Another run writes to {str(folder)!r}: wait for it, or name another output_dir"
        ) from None
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows removes no open file
            (folder / ".lock").unlink(missing_ok=True)
        lock.release()
        for path in made:
            if any(path.iterdir()):
                break
            path.rmdir()


def _check_processes(found: int) -> None:
    """A launcher's processes that do not find each other would each train alone, and write over each other."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != found:
        raise RuntimeError(
            f"{launched} processes were launched, and Accelerate sees {found}. "
            "Without a GPU, set ACCELERATE_USE_CPU=true."
        )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "FSDP would load the weights in one process alone, and each needs them to convert: "
            "set fsdp_cpu_ram_efficient_loading: false"
        )
    if process_state().device.type == "cpu":
        raise ValueError("Accelerate does not shard on CPUs, and would run DDP instead: launch it without FSDP")
