"""Softmax and converted models side by side: same documents, same steps, same seed, same trained parts."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from hf_linear_attn.compare.report import ReportPaths, write_report
from hf_linear_attn.compare.systems import PlannedBar, System, make_folds, with_recipe_options
from hf_linear_attn.data import bag_of_words_correct
from hf_linear_attn.measure.bootstrap import bootstrap_statistic
from hf_linear_attn.measure.methods import Method, parse_methods, spell_options
from hf_linear_attn.measure.metrics import macro_f1
from hf_linear_attn.measure.profile import forward_time_against_length
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.training.prefix import FrozenPrefix
from hf_linear_attn.training.recipe import Recipe
from hf_linear_attn.training.setup import (
    build_model,
    build_tokenizer,
    load_task,
    prefix_dtype,
    quiet_libraries,
    resolve_precision,
)
from hf_linear_attn.training.trainer import TrainResult, train, work

__all__ = ["BASELINE", "Comparison", "compare"]

logger = logging.getLogger(__name__)

BASELINE = "softmax-truncated"
_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda predictions, references: float(np.mean(predictions == references)),
    "macro_f1": macro_f1,
}


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    Attributes:
        results: see `hf_linear_attn.compare.schema`.
        paths: the report's files, None on processes other than the main one.
        failed: name -> error of the systems that could not be run; they are in `results["notes"]` as well.
    """

    results: dict[str, Any]
    paths: ReportPaths | None
    failed: dict[str, str] = field(default_factory=dict)


def compare(
    recipe: Recipe,
    variants: Sequence[Any] | None = None,
    *,
    title: str = "Converted models beside the checkpoint",
    command: str = "",
    show_progress: bool = True,
) -> Comparison:
    """Train and measure the truncated checkpoint, softmax on extended positions, and each variant.

    Every system sees the same documents in the same batches for the same number of steps, with the same seed and
    the same trained parts; what differs is the attention and how much of a document is read. The report is written
    again after each system, so a run that is cut off leaves what it had.

    Args:
        recipe: `conversion` gives layers, extension and calibration (and options, for its own variant).
        variants: see `hf_linear_attn.measure.methods.parse_methods`; the recipe's `evaluation.variants` when
            None. A variant named without options takes those that the recipe gives it.
        title: of the report.
        command: what to write down as the command that made it.
        show_progress: one bar over everything, on the main process.

    Returns:
        the results, which lie in `training.output_dir` too. A system that fails is named with its error in
        `failed` and in the notes; the truncated checkpoint's own failure is raised.

    Raises:
        ValueError: for an unknown variant, metric or option, before anything runs.
    """
    for metric in recipe.evaluation.metrics:
        if metric not in _SCORES:
            raise ValueError(f"compare takes the metrics {', '.join(_SCORES)}; got {metric!r}")
    own = parse_methods(recipe.evaluation.variants)
    parsed = own if variants is None else with_recipe_options(parse_methods(variants), own)
    return _Comparison(recipe, parsed, title, command, show_progress).run()


class _Comparison:
    def __init__(
        self,
        recipe: Recipe,
        variants: list[Method],
        title: str,
        command: str,
        show_progress: bool,
    ) -> None:
        self.recipe, self.title, self.command, self.show_progress = recipe, title, command, show_progress
        self.main = PartialState().is_main_process
        self.output_dir = Path(recipe.training.output_dir)
        with PartialState().main_process_first():
            self.task = load_task(recipe.data)
            self.tokenizer = build_tokenizer(recipe)
        set_seed(recipe.training.seed)
        plain = replace(recipe, conversion=None, training=replace(recipe.training, max_length=None))
        probe, own_limit = build_model(plain, self.task, self.tokenizer)
        self.layers = int(probe.config.num_hidden_layers)
        self.device_name = _device_name()
        # fails before anything is trained where the family is not known
        table = get_patcher(probe.config.model_type).position_table(probe)
        self.max_length = recipe.training.max_length or own_limit
        width = 0 if table is None else getattr(*table).embedding_dim
        self.position_parameters = max(self.max_length - own_limit, 0) * width
        self.systems = self._systems(variants, min(own_limit, self.max_length))
        with quiet_libraries():
            self.folds = make_folds(self.task, recipe.data.folds, recipe.data.seed)
        self.document_tokens = self._document_tokens()
        self.failed: dict[str, str] = {}

    def _systems(self, variants: list[Method], truncated: int) -> list[System]:
        base = self.recipe.conversion
        keep = {} if base is None else {"layers": base.layers, "extend": base.extend}
        plans: list[tuple[str, str, dict[str, Any], int, dict[str, Any] | None]] = [
            (BASELINE, "softmax", {}, truncated, None)
        ]
        if self.recipe.evaluation.softmax_long and self.max_length > truncated:
            plans.append(("softmax-long", "softmax", {}, self.max_length, None))
        names: set[str] = set()
        for method in variants:
            key, options = method.key, method.options
            if not options and base is not None and base.variant == key:
                options = base.options
            name = key if key not in names or not options else f"{key} {spell_options(options)}"
            if name in names:
                raise ValueError(f"The variant {name} is asked for twice")
            names.add(name)
            calibration = 0 if base is None else base.calibration_documents
            own: dict[str, Any] = {"variant": key, "options": options, "calibration_documents": calibration, **keep}
            plans.append((name, key, options, self.max_length, own))
        systems = []
        for name, variant, options, length, conversion in plans:
            data = self.recipe.to_dict()
            data["conversion"] = conversion
            folder = name.replace(" ", "_")
            data["training"].update(max_length=length, output_dir=str(self.output_dir / folder), resume_from=None)
            systems.append(System(name, Recipe.from_dict(data), variant, options))
        return systems

    def _document_tokens(self) -> list[int]:
        """Tokens of each document, uncut, training documents first."""
        texts = [*self.task.train["text"], *self.task.test["text"]]
        encoded = self.tokenizer(texts, truncation=False, return_attention_mask=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def run(self) -> Comparison:
        """Train and measure every system, then time their forward passes."""
        rows: list[dict[str, Any]] = []
        correct: dict[str, np.ndarray] = {}
        baselines: list[dict[str, Any]] = []
        paths: ReportPaths | None = None
        results: dict[str, Any] = {}
        with self._bar() as bar:
            if self.recipe.evaluation.bag_of_words and self.main:
                baselines = self._bag_of_words()
            for system in self.systems:
                bar.start(system.name)
                try:
                    outcomes = self._run_folds(system, bar.advance)
                    row, correct[system.name] = self._row(system, outcomes, correct.get(BASELINE))
                except Exception as error:
                    if system.name == BASELINE:
                        raise
                    # reported, not dropped: the others are worth having
                    logger.exception("%s failed", system.name)
                    self.failed[system.name] = f"{type(error).__name__}: {error}"
                else:
                    rows.append(row)
                bar.finish(system.name)
                results = self._results(rows, baselines)
                if self.main:
                    paths = write_report(results, self.output_dir)
            bar.start("forward time")
            self._time_forward(rows, bar.advance)
            bar.finish("forward time")
            if self.main:
                paths = write_report(results, self.output_dir)
        return Comparison(results, paths, dict(self.failed))

    # One system --------------------------------------------------------------------------------------------------

    def _run_folds(self, system: System, advance: Callable[[str, int], None]) -> list[TrainResult]:
        conversion = system.recipe.conversion
        calibrated = conversion is not None and conversion.calibration_documents > 0
        shared = self._new_prefix(system) if not calibrated else None
        outcomes = []
        for number, fold in enumerate(self.folds):
            recipe = system.recipe
            if len(self.folds) > 1:
                folder = f"{recipe.training.output_dir}/fold_{number}"
                recipe = replace(recipe, training=replace(recipe.training, output_dir=folder))
            # a calibrated conversion depends on the fold's training documents, and so do its frozen layers
            prefix = shared if shared is not None else self._new_prefix(system)
            save = number == len(self.folds) - 1
            outcomes.append(train(recipe, task=fold, prefix=prefix, on_progress=advance, save_model=save))
        return outcomes

    @staticmethod
    def _new_prefix(system: System) -> FrozenPrefix | None:
        options = system.recipe.training
        if not options.cache_frozen_layers:
            return None
        return FrozenPrefix(prefix_dtype(options.mixed_precision))

    def _row(
        self, system: System, outcomes: list[TrainResult], baseline: np.ndarray | None
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The row, and the predictions `[N]` that a later row is paired with."""
        evaluation = self.recipe.evaluation
        predictions = np.concatenate([outcome.predictions for outcome in outcomes])
        references = np.concatenate([outcome.references for outcome in outcomes])
        groups = [group for fold in self.folds for group in fold.test["group"]]
        settings: Any = {
            "groups": groups,
            "num_resamples": evaluation.num_resamples,
            "confidence": evaluation.confidence,
        }
        quality = {
            metric: bootstrap_statistic(_SCORES[metric], predictions, references, **settings).to_dict()
            for metric in evaluation.metrics
        }
        difference = None
        if baseline is not None:
            score = _SCORES[evaluation.metrics[0]]

            def gain(own: np.ndarray, other: np.ndarray, truth: np.ndarray) -> float:
                return score(own, truth) - score(other, truth)

            difference = bootstrap_statistic(gain, predictions, baseline, references, **settings).to_dict()
        seconds = sum(outcome.train_seconds for outcome in outcomes)
        first = outcomes[0]
        row = {
            "name": system.name,
            "variant": system.variant,
            "options": system.full_options(),
            "max_length": first.max_length,
            "quality": quality,
            "difference_to_baseline": difference,
            "parameters_total": first.parameters_total,
            "parameters_added": first.parameters_added,
            "parameters_trained": first.parameters_trained,
            "seconds_per_step": seconds / sum(outcome.steps_run for outcome in outcomes),
            "tokens_per_second": sum(outcome.tokens_seen for outcome in outcomes) / max(seconds, 1e-9),
            "peak_memory_mb": max(outcome.peak_memory_mb for outcome in outcomes),
            "train_seconds": seconds,
            "forward": [],
            "eval_documents": len(predictions),
            "predictions": [int(prediction) for prediction in predictions],
        }
        self.trained, self.steps = first.trained, sum(outcome.steps_run for outcome in outcomes)
        self.documents_seen = sum(outcome.documents_seen for outcome in outcomes)
        return row, predictions

    def _time_forward(self, rows: list[dict[str, Any]], advance: Callable[[str, int], None]) -> None:
        """Fill in `forward`: fresh models, one after the other at each length, so that they share the machine's
        good and bad moments. The reference of the ratios is softmax attention on as long a table as the variants'."""
        evaluation = self.recipe.evaluation
        lengths = [length for length in evaluation.forward_lengths if length <= self.max_length]
        if not lengths or not self.main:
            return
        by_name = {row["name"]: row for row in rows}
        ordered = [name for name in ("softmax-long", *by_name) if name in by_name]
        systems = {system.name: system for system in self.systems}
        models = {}
        for name in dict.fromkeys(ordered):
            set_seed(self.recipe.training.seed)
            models[name], _ = build_model(systems[name].recipe, self.task, self.tokenizer)
        rows_timed = forward_time_against_length(
            models,
            lengths,
            repeats=evaluation.forward_repeats,
            device=PartialState().device,
            max_lengths={name: by_name[name]["max_length"] for name in models},
            on_step=lambda name, length: advance("forward", length * self.layers),
        )
        for timed in rows_timed:
            point = {"length": timed.length, "seconds": timed.seconds, "ratio": timed.ratio}
            by_name[timed.name]["forward"].append(point)

    # The whole ---------------------------------------------------------------------------------------------------

    def _results(self, rows: list[dict[str, Any]], baselines: list[dict[str, Any]]) -> dict[str, Any]:
        recipe, task = self.recipe, self.task
        folds = len(self.folds)
        cached = recipe.training.cache_frozen_layers
        budget = (
            f"Each system trains {self.trained} for {self.steps} optimizer steps over {self.documents_seen} documents "
            f"(repeats counted), in the same order, from the same seed; learning rate {recipe.training.learning_rate:g}"
            + (f", {recipe.training.head_learning_rate:g} for the head" if recipe.training.head_learning_rate else "")
            + f"; mixed precision: {resolve_precision(recipe.training.mixed_precision)}."
            + (" The frozen layers run once per document; their time is in the step time." if cached else "")
            + (f" {folds} folds: every document is tested once." if folds > 1 else "")
        )
        notes = [f"{name} failed: {error}" for name, error in self.failed.items()]
        notes.append(
            "Intervals are bootstrap intervals over groups of documents that belong together "
            f"({len({group for fold in self.folds for group in fold.test['group']})} groups)."
        )
        if self.position_parameters:
            notes.append(
                "Parameters added are those of the conversion; the longer position table adds another "
                f"{self.position_parameters:,} to every system that reads {self.max_length:,} tokens."
            )
        if recipe.evaluation.forward_lengths:
            notes.append("Forward times are of one document in fp32, the models taking turns.")
        versions = {"torch": torch.__version__, "transformers": __import__("transformers").__version__}
        return {
            "meta": {
                "title": self.title,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "command": self.command,
                "model": recipe.model.name,
                "device": self.device_name,
                "threads": torch.get_num_threads(),
                "seed": recipe.training.seed,
                "versions": versions,
            },
            "task": {
                "name": task.name,
                "description": task.description,
                "source": task.source,
                "generated": task.generated,
                "note": task.note,
                "label_names": list(task.label_names),
                "train_documents": len(self.folds[0].train),
                "test_documents": sum(len(fold.test) for fold in self.folds),
                "median_tokens": int(statistics.median(self.document_tokens)),
            },
            "budget": {
                "description": budget,
                "steps": self.steps,
                "documents_seen": self.documents_seen,
                "trained": self.trained,
            },
            "primary_metric": recipe.evaluation.metrics[0],
            "baseline": BASELINE,
            "rows": rows,
            "baselines": baselines,
            "notes": notes,
        }

    def _bag_of_words(self) -> list[dict[str, Any]]:
        lengths: list[int | None] = [self.systems[0].recipe.training.max_length, self.max_length, None]
        found = []
        for length in dict.fromkeys(lengths):
            reads = "whole documents" if length is None else f"first {length} tokens"
            # the same folds as the systems
            correct = np.concatenate([bag_of_words_correct(fold, self.tokenizer, length) for fold in self.folds])
            found.append(
                {
                    "name": f"bag of words, {reads}",
                    "metric": "accuracy",
                    "value": float(correct.mean()),
                    "detail": "TF-IDF and logistic regression on the same training documents",
                }
            )
        return found

    @contextmanager
    def _bar(self) -> Iterator[PlannedBar]:
        from tqdm.auto import tqdm

        plan = {system.name: self._planned(system) for system in self.systems}
        evaluation = self.recipe.evaluation
        readers = {system.name: system.recipe.training.max_length or 0 for system in self.systems}
        plan["forward time"] = sum(
            length * self.layers * (evaluation.forward_repeats + 1)
            for length in evaluation.forward_lengths
            for limit in readers.values()
            if length <= limit
        )
        disable = not (self.main and self.show_progress)
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left"
        with tqdm(total=sum(plan.values()), bar_format=form, disable=disable) as bar:
            yield PlannedBar(bar, plan)

    def _planned(self, system: System) -> int:
        """Work of a system in tokens x layers, see `work`."""
        options = system.recipe.training
        tokens = {
            document: min(count, options.max_length or count) for document, count in enumerate(self.document_tokens)
        }
        total = 0
        for number, fold in enumerate(self.folds):
            train_set, test_set = (
                [tokens[document] for document in part["document"]] for part in (fold.train, fold.test)
            )
            batches = -(-len(train_set) // options.batch_size)
            steps = -(-batches // options.gradient_accumulation_steps)
            epochs = options.epochs or (options.max_steps or 0) / steps
            last = options.last_layers if options.cache_frozen_layers else None
            total += work(train_set, test_set, self.layers, epochs, last)
            if last is not None and number:  # frozen layers ran in the first fold
                total -= sum((*train_set, *test_set)) * (self.layers - max(last, 1))
        return total


def _device_name() -> str:
    device = PartialState().device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
