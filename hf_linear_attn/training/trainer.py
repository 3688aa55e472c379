"""Fine-tune one model as a recipe says, on one process or many, and measure it on the test documents."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import get_scheduler

from hf_linear_attn.data import LongDocumentCollator
from hf_linear_attn.measure.metrics import load_metrics
from hf_linear_attn.measure.profile import parameter_counts, track_peak_memory
from hf_linear_attn.saving import whole_folder, write_json
from hf_linear_attn.seam.checkpointing import enable_checkpointing
from hf_linear_attn.training.batching import LengthGroupedBatches
from hf_linear_attn.training.parts import apply_trainable, freeze_dropout, optimizer_groups
from hf_linear_attn.training.prefix import FrozenPrefix
from hf_linear_attn.training.setup import (
    build_model,
    build_tokenizer,
    load_task,
    prefix_dtype,
    prepare_documents,
    quiet_libraries,
    resolve_precision,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_linear_attn.data.task import DocumentTask
    from hf_linear_attn.training.recipe import Recipe

__all__ = ["TrainResult", "train"]

# (what is being done, work done since the last call); a document's work is its tokens x the layers it passes
OnProgress = Callable[[str, int], None]


@dataclass
class TrainResult:
    """What a run did and measured.

    Attributes:
        output_dir: where the model, the tokenizer and this result lie.
        metrics: name -> value on the test documents, after the last step.
        predictions: class of each test document, in the order of the task's test split.
        references: its label.
        trained: which parameters trained, in words.
        steps: optimizer steps of the whole run.
        steps_run: of those, the ones this process ran itself (fewer after a resume).
        documents_seen: training documents that went through the model, repeats counted.
        tokens_seen: their tokens, after cutting, without padding.
        max_length: tokens that were read of a document at most.
        train_seconds: wall time of the steps, frozen layers included, evaluation not.
        seconds_per_step: `train_seconds / steps_run`.
        tokens_per_second: training tokens of all processes per second of `train_seconds`.
        peak_memory_mb: 10^6 bytes that training needed beyond what was held at its start, on the main process.
        parameters_total: of the model.
        parameters_added: by the conversion.
        parameters_trained: that had a gradient.
        num_processes: processes that trained together.
        losses: mean loss of each epoch on the main process.
        evaluations: metrics after some epochs, with the epoch.
        conversion: the conversion report as a dictionary, or None.
    """

    output_dir: str
    metrics: dict[str, float]
    predictions: list[int]
    references: list[int]
    trained: str
    steps: int
    steps_run: int
    documents_seen: int
    tokens_seen: int
    max_length: int
    train_seconds: float
    seconds_per_step: float
    tokens_per_second: float
    peak_memory_mb: float
    parameters_total: int
    parameters_added: int
    parameters_trained: int
    num_processes: int
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    conversion: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def train(
    recipe: Recipe,
    *,
    task: DocumentTask | None = None,
    prefix: FrozenPrefix | None = None,
    on_progress: OnProgress | None = None,
    save_model: bool = True,
) -> TrainResult:
    """Train as `recipe` says. Under `accelerate launch` or `torchrun` every process calls this.

    Args:
        recipe: the run.
        task: the documents; loaded as the recipe says when None.
        prefix: outputs of frozen layers to use and to fill (`training.cache_frozen_layers`); a fresh one when None.
        on_progress: told of the work done, instead of a progress bar of its own.
        save_model: write the model and the tokenizer to `training.output_dir`.

    Raises:
        FileNotFoundError: if `training.resume_from` is no saved state.
        RuntimeError: if processes were launched together and do not find each other.
        ValueError: for a recipe that does not fit the model.
    """
    return _Run(recipe, task, prefix, on_progress).run(save_model)


class _Run:
    """One training run: what `train` prepares, loops over and writes."""

    def __init__(
        self, recipe: Recipe, task: DocumentTask | None, prefix: FrozenPrefix | None, on_progress: OnProgress | None
    ) -> None:
        options = recipe.training
        self.recipe, self.options, self.on_progress = recipe, options, on_progress
        self.output_dir = Path(options.output_dir)
        # Accelerate keeps one state per process, and refuses another run's mixed precision
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=resolve_precision(options.mixed_precision),
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with=options.tracker,
            project_config=ProjectConfiguration(
                project_dir=str(self.output_dir), logging_dir=str(self.output_dir / "logs")
            ),
            # a variant may leave a trained parameter out of a batch (a projection row past the longest document)
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
            step_scheduler_with_optimizer=False,
        )
        _check_processes(self.accelerator.num_processes)
        set_seed(options.seed)
        # the main process fetches and tokenizes first, the others read its cache
        with self.accelerator.main_process_first():
            self.task = load_task(recipe.data) if task is None else task
            self.tokenizer = build_tokenizer(recipe)
            model, self.max_length = build_model(recipe, self.task, self.tokenizer)
            self.tokenizer.model_max_length = self.max_length
            report = getattr(model, "conversion_report", None)
            self.conversion = None if report is None else report.to_dict()
            if report is not None:
                self.tokenizer.model_max_length = report.tokenizer_max_length
            self.train_set = prepare_documents(self.task.train, self.tokenizer, self.max_length)
            self.test_set = prepare_documents(
                self.task.test, self.tokenizer, self.max_length, first=len(self.task.train)
            )
        model, self.trained = apply_trainable(model, options)
        if options.gradient_checkpointing:
            enable_checkpointing(model)
        self.counts = parameter_counts(model)
        self.layers = int(model.config.num_hidden_layers)
        self.last_layers = options.last_layers
        self.prefix: FrozenPrefix | None = None
        if options.cache_frozen_layers:
            self.prefix = prefix if prefix is not None else FrozenPrefix(prefix_dtype(options.mixed_precision))
            self.prefix.check(model, self.last_layers or 0)

        # Cut documents by their full text, so that every model sees the same batches whatever it reads of them.
        self.batches = LengthGroupedBatches(
            [len(text) for text in self.task.train["text"]], options.batch_size, seed=options.seed
        )
        train_loader = self._loader(self.train_set, self.batches)
        test_loader = self._loader(
            self.test_set,
            LengthGroupedBatches(
                self.test_set["length"], recipe.evaluation.batch_size or options.batch_size, shuffle=False
            ),
        )
        optimizer = torch.optim.AdamW(optimizer_groups(model, options))
        self.model, self.optimizer, self.train_loader, self.test_loader = self.accelerator.prepare(
            model, optimizer, train_loader, test_loader
        )
        self.steps_per_epoch = math.ceil(len(self.train_loader) / options.gradient_accumulation_steps)
        if options.max_steps is not None:
            self.steps = options.max_steps
            self.epochs = math.ceil(self.steps / self.steps_per_epoch)
        else:
            assert options.epochs is not None  # the recipe checks it
            self.epochs = options.epochs
            self.steps = self.epochs * self.steps_per_epoch
        self.scheduler = self.accelerator.prepare(
            get_scheduler(
                options.scheduler,
                optimizer,
                num_warmup_steps=round(options.warmup_ratio * self.steps),
                num_training_steps=self.steps,
            )
        )
        # after the model is built alike on all processes: different dropout on each
        set_seed(options.seed, device_specific=True)

    def _loader(self, dataset: Dataset, batches: LengthGroupedBatches) -> DataLoader:
        collator = LongDocumentCollator(self.tokenizer)

        def collate(documents: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batch = collator(documents)
            batch["document"] = torch.tensor([document["document"] for document in documents])
            return batch

        # its own generator: iterating must not draw from the one that dropout uses, or a resume would differ
        return DataLoader(
            dataset, batch_sampler=batches, collate_fn=collate, generator=torch.Generator().manual_seed(0)
        )

    def run(self, save_model: bool) -> TrainResult:
        """Train, evaluate, write."""
        options, accelerator = self.options, self.accelerator
        if options.tracker:
            accelerator.init_trackers("logs", config=_flat(self.recipe.to_dict()))
        step, epoch, skip = self._resume()
        started_at, losses, evaluations = step, [], []
        tokens, documents, seconds = 0, 0, 0.0
        with self._progress(step) as report, track_peak_memory(accelerator.device) as peak:
            while step < self.steps:
                self._train_mode()
                self.batches.start_epoch(epoch)
                loader = accelerator.skip_first_batches(self.train_loader, skip) if skip else self.train_loader
                loss_sum, loss_count, begin = 0.0, 0, time.perf_counter()
                for batch in loader:
                    loss = self._step(batch, report)
                    loss_sum, loss_count = loss_sum + loss, loss_count + 1
                    count = torch.tensor([int(batch["attention_mask"].sum()), len(batch["input_ids"])])
                    count = accelerator.reduce(count.to(accelerator.device))
                    tokens, documents = tokens + int(count[0]), documents + int(count[1])
                    skip += 1
                    if not accelerator.sync_gradients:
                        continue
                    step += 1
                    accelerator.log({"loss": loss, "learning_rate": self.scheduler.get_last_lr()[0]}, step=step)
                    if options.save_every and step % options.save_every == 0:
                        self._save_state(step, epoch, skip)
                    if step >= self.steps:
                        break
                seconds += time.perf_counter() - begin
                losses.append(loss_sum / max(loss_count, 1))
                epoch, skip = epoch + 1, 0
                if options.eval_every and epoch % options.eval_every == 0 and step < self.steps:
                    values, _ = self._evaluate(report)
                    evaluations.append({"epoch": epoch, **values})
                    accelerator.log(values, step=step)
        with self._progress(step, evaluation_only=True) as report:
            metrics, predictions = self._evaluate(report)
        accelerator.log(metrics, step=step)
        result = TrainResult(
            output_dir=str(self.output_dir),
            metrics=metrics,
            predictions=predictions,
            references=list(self.test_set["label"]),
            trained=self.trained,
            steps=self.steps,
            steps_run=step - started_at,
            documents_seen=documents,
            tokens_seen=tokens,
            max_length=self.max_length,
            train_seconds=seconds,
            seconds_per_step=seconds / max(step - started_at, 1),
            tokens_per_second=tokens / max(seconds, 1e-9),
            peak_memory_mb=peak.megabytes,
            parameters_total=self.counts.total,
            parameters_added=self.counts.new,
            parameters_trained=self.counts.trainable,
            num_processes=accelerator.num_processes,
            losses=losses,
            evaluations=evaluations,
            conversion=self.conversion,
        )
        self._write(result, save_model)
        # Not `end_training`: it also ends the process group, and a comparison trains many models.
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.free_memory()
        return result

    # One step and one evaluation ---------------------------------------------------------------------------------

    def _train_mode(self) -> None:
        self.model.train()
        if self.last_layers is not None:
            freeze_dropout(self.model)

    def _step(self, batch: dict[str, torch.Tensor], report: OnProgress) -> float:
        """Forward, backward and, on accumulation boundaries, an optimizer step; returns the loss."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            with self._forward(batch, "training", report) as outputs:
                loss = outputs.loss
                # inside the block: a checkpointed layer runs again in the backward pass
                accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
            self.optimizer.step()
            if accelerator.sync_gradients:
                self.scheduler.step()
            self.optimizer.zero_grad()
        return float(loss.detach())

    @contextmanager
    def _forward(self, batch: dict[str, torch.Tensor], phase: str, report: OnProgress) -> Iterator[Any]:
        """The model's outputs for a batch, with frozen layers taken from the cache where the recipe says so."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "document"}
        tokens = int(inputs["attention_mask"].sum())
        cost = 3 if phase == "training" else 1  # a backward pass costs two forward passes
        if self.prefix is None:
            yield self.model(**inputs)
            report(phase, tokens * self.layers * cost)
            return
        model = self.accelerator.unwrap_model(self.model)
        ids = batch["document"].tolist()
        last = self.last_layers or 0
        kept = max(last, 1)
        with self.accelerator.autocast():
            computed = self.prefix.fill(model, inputs, ids, last)
        report(phase, computed * (self.layers - kept))
        with self.prefix.feed(model, inputs, ids, last):
            yield self.model(**inputs)
        report(phase, tokens * kept * cost)

    def _evaluate(self, report: OnProgress) -> tuple[dict[str, float], list[int]]:
        """Metrics and predictions on the test documents, in their order."""
        self.model.eval()
        found: dict[int, tuple[int, int]] = {}
        positions = {number: index for index, number in enumerate(self.test_set["document"])}
        with torch.no_grad():
            for batch in self.test_loader:
                with self._forward(batch, "evaluation", report) as outputs:
                    predicted = outputs.logits.argmax(dim=-1)
                gathered = self.accelerator.gather_for_metrics((batch["document"], predicted, batch["labels"]))
                for document, prediction, label in zip(*(part.tolist() for part in gathered), strict=True):
                    found[positions[document]] = (prediction, label)
        if len(found) != len(self.test_set):
            raise RuntimeError(f"Predicted {len(found)} of {len(self.test_set)} test documents")
        predictions = [found[index][0] for index in range(len(found))]
        metrics = load_metrics(self.recipe.evaluation.metrics, experiment_id=f"{self.accelerator.process_index}")
        metrics.add_batch(predictions=predictions, references=[found[index][1] for index in range(len(found))])
        values: Any = metrics.compute()
        return {name: float(value) for name, value in values.items()}, predictions

    # Checkpoints and results -------------------------------------------------------------------------------------

    def _save_state(self, step: int, epoch: int, skip: int) -> None:
        folder = self.output_dir / "checkpoints" / f"step_{step}"
        # Every process writes its part. place.json, without which nothing resumes, goes first and comes last.
        if self.accelerator.is_main_process:
            (folder / "place.json").unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        with quiet_libraries():
            self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            place = {"step": step, "epoch": epoch, "batches_done_in_epoch": skip, "steps": self.steps}
            write_json(folder / "place.json", place)

    def _resume(self) -> tuple[int, int, int]:
        """Load a saved state; returns (optimizer steps done, epoch, batches of it done)."""
        if self.options.resume_from is None:
            return 0, 0, 0
        # save_state has no barrier: another process may still be writing
        self.accelerator.wait_for_everyone()
        folder = Path(self.options.resume_from)
        if not (folder / "place.json").is_file():
            raise FileNotFoundError(f"training.resume_from={str(folder)!r} holds no place.json: no saved state")
        place = json.loads((folder / "place.json").read_text(encoding="utf-8"))
        if place["steps"] != self.steps:
            raise ValueError(
                f"The saved run has {place['steps']} steps and this recipe {self.steps}: the learning rates differ"
            )
        self.accelerator.load_state(str(folder))
        if place["batches_done_in_epoch"] == len(self.train_loader):
            return place["step"], place["epoch"] + 1, 0
        return place["step"], place["epoch"], place["batches_done_in_epoch"]

    def _write(self, result: TrainResult, save_model: bool) -> None:
        accelerator = self.accelerator
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with whole_folder(self.output_dir) as stage:
                if save_model:
                    model: Any = accelerator.unwrap_model(self.model)
                    if hasattr(model, "merge_and_unload"):  # adapters become part of the weights
                        model = model.merge_and_unload()
                    with quiet_libraries():
                        model.save_pretrained(stage)
                    self.tokenizer.save_pretrained(stage)
                write_json(stage / "train_result.json", result.to_dict())
        accelerator.wait_for_everyone()

    @contextmanager
    def _progress(self, step: int, evaluation_only: bool = False) -> Iterator[OnProgress]:
        """Where progress goes: the caller, or a bar on the main process."""
        if self.on_progress is not None:
            yield self.on_progress
            return
        from tqdm.auto import tqdm

        share = 0 if evaluation_only else 1 - step / self.steps
        total = work(
            self.train_set["length"] if share else [],
            self.test_set["length"] if evaluation_only else [],
            self.layers,
            self.epochs * share,
            self.last_layers if self.prefix is not None else None,
        )
        with tqdm(
            total=total,
            desc="evaluation" if evaluation_only else "training",
            unit="token-layers",
            unit_scale=True,
            disable=not self.accelerator.is_local_main_process,
        ) as bar:
            yield lambda phase, done: bar.update(done * self.accelerator.num_processes) and None


def _check_processes(found: int) -> None:
    """A launcher's processes that do not find each other would each train alone, and write over each other."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != found:
        raise RuntimeError(
            f"{launched} processes were launched, and Accelerate sees {found}. "
            "Without a GPU, set ACCELERATE_USE_CPU=true."
        )


def work(
    train_lengths: list[int], test_lengths: list[int], layers: int, epochs: float, cached_last_layers: int | None
) -> int:
    """Tokens x layers that a run passes, a training pass counting three times: the length of its progress bar."""
    train_tokens, test_tokens = sum(train_lengths), sum(test_lengths)
    if cached_last_layers is None:
        return int(train_tokens * layers * 3 * epochs + test_tokens * layers)
    kept = max(cached_last_layers, 1)
    return int((train_tokens + test_tokens) * (layers - kept) + train_tokens * kept * 3 * epochs + test_tokens * kept)


def _flat(data: dict[str, Any], start: str = "") -> dict[str, str | int | float | bool]:
    """Nested mappings as `section/key`, which is what trackers take."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{start}{name}/"))
        else:
            flat[start + name] = value if isinstance(value, (str, int, float, bool)) else json.dumps(value)
    return flat
