"""Softmax and converted models side by side: same documents, same steps, same seed, same trained parts."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import set_seed
from datasets import concatenate_datasets

from hf_linear_attn.compare.report import ReportPaths, write_report
from hf_linear_attn.compare.saved import SavedSystem, measure_classifier, saved_classifiers, saved_row
from hf_linear_attn.compare.systems import PlannedBar, System, make_folds, with_recipe_options
from hf_linear_attn.data import DocumentTask, bag_of_words_correct
from hf_linear_attn.measure.bootstrap import bootstrap_statistic
from hf_linear_attn.measure.methods import Method, parse_methods, spell_options
from hf_linear_attn.measure.metrics import macro_f1
from hf_linear_attn.measure.profile import forward_time_against_length
from hf_linear_attn.measure.quiet import quiet_libraries
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.training.arguments import training_arguments
from hf_linear_attn.training.finetune import kept_dtype
from hf_linear_attn.training.parts import last_layers
from hf_linear_attn.training.prefix import FrozenPrefix
from hf_linear_attn.training.recipe import Recipe, without_redraws
from hf_linear_attn.training.results import TrainResult, forget_stages
from hf_linear_attn.training.run import train
from hf_linear_attn.training.saved import Evaluation
from hf_linear_attn.training.setup import auto_class, build_model, build_tokenizer, load_task, process_state

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
    fresh: bool = False,
    show_progress: bool = True,
) -> Comparison:
    """Train and measure the truncated checkpoint, softmax on extended positions, and each variant.

    Every system sees the same documents in the same batches for the same number of steps, with the same seed and
    the same trained parts; what differs is the attention and how much of a document is read. The report is written
    again after each system, so a run that is cut off leaves what it had, and goes on there: what is trained is not
    trained again. Saved models are measured on the same test documents before anything trains, and their rows say that
    they were trained elsewhere.

    Args:
        recipe: `conversion` gives layers, extension and calibration (and options, for its own variant),
            `evaluation.models` the saved models.
        variants: see `hf_linear_attn.measure.methods.parse_methods`; the recipe's `evaluation.variants` when
            None. A variant named without options takes those that the recipe gives it.
        title: of the report.
        command: what to write down as the command that made it.
        fresh: forget what an earlier run trained.
        show_progress: one bar over everything, on the main process.

    Returns:
        the results, which lie in `training.output_dir` too. A system that fails is named with its error in
        `failed` and in the notes; the truncated checkpoint's own failure is raised.

    Raises:
        ValueError: for an unknown variant, metric or option, or a saved model that does not fit the task, before
            anything runs; for a truncated checkpoint that an earlier run began under other settings.
    """
    if recipe.stages[-1].kind != "finetune" or recipe.stages[-1].task != "sequence_classification":
        raise ValueError("compare takes a recipe whose last stage is finetune for sequence_classification")
    for metric in recipe.evaluation.metrics or ():
        if metric not in _SCORES:
            raise ValueError(f"compare takes the metrics {', '.join(_SCORES)}; got {metric!r}")
    own = parse_methods(recipe.evaluation.variants)
    parsed = own if variants is None else with_recipe_options(parse_methods(variants), own)
    comparison = _Comparison(recipe, parsed, title, command, show_progress)
    if fresh and comparison.main:
        forget_stages(recipe.output_dir)
    process_state().wait_for_everyone()
    return comparison.run()


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
        self.main = process_state().is_main_process
        self.output_dir = recipe.output_dir
        self.metrics = recipe.evaluation.metrics or list(_SCORES)
        self.finetune = recipe.stages[-1]
        self.arguments = training_arguments(recipe.training, self.finetune.training)
        with process_state().main_process_first():
            self.task = load_task(self.finetune.data or recipe.data, "sequence_classification")
            self.tokenizer = build_tokenizer(recipe)
            self.saved = saved_classifiers(recipe, self.task)
        set_seed(self.arguments.seed)
        plain = recipe.replace(conversion=None, stages=[{"stage": "finetune"}])
        probe = self._build(plain, self.task)
        self.layers = int(probe.config.num_hidden_layers)
        self.device_name = _device_name()
        # fails before anything is trained where the family is not known
        patcher = get_patcher(probe.config.model_type)
        table, own_limit = patcher.position_table(probe), patcher.max_length(probe.config)
        self.max_length = recipe.max_length or own_limit
        width = 0 if table is None else getattr(*table).embedding_dim
        self.position_parameters = max(self.max_length - own_limit, 0) * width
        self.systems = self._systems(variants, min(own_limit, self.max_length))
        with quiet_libraries():
            self.folds = make_folds(self.task, recipe.data.folds, recipe.data.seed)
        self.document_tokens = self._document_tokens()
        # what all folds test, in the order in which they do
        self.tested = concatenate_datasets([fold.test for fold in self.folds])
        self.failed: dict[str, str] = {}

    def _build(self, recipe: Recipe, task: DocumentTask) -> Any:
        auto = auto_class(recipe.stages[-1], recipe.model.name)
        return build_model(recipe, auto, task, self.tokenizer, task.train)

    def _systems(self, variants: list[Method], truncated: int) -> list[System]:
        base = self.recipe.conversion
        same = ("layers", "keep_softmax", "keep_softmax_by", "extend", "calibration_documents", "calibration_tokens",
                "calibration_steps")  # fmt: skip
        keep = {} if base is None else {name: getattr(base, name) for name in same}
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
            own: dict[str, Any] = {"variant": key, "options": options, **keep}
            plans.append((name, key, options, self.max_length, own))
        systems = []
        for name, variant, options, length, conversion in plans:
            data = self.recipe.to_dict()
            data["conversion"] = conversion
            if conversion is None:  # it has nothing to win back
                data["stages"] = [stage for stage in data["stages"] if stage["stage"] not in ("transfer", "distill")]
            data["stages"][-1]["max_length"] = length
            data["training"]["output_dir"] = str(self.output_dir / name.replace(" ", "_"))
            systems.append(System(name, Recipe.from_dict(without_redraws(data)), variant, options))
        return systems

    def _document_tokens(self) -> list[int]:
        """Tokens of each document, uncut, training documents first."""
        texts = [*self.task.train["text"], *self.task.test["text"]]
        encoded = self.tokenizer(texts, truncation=False, return_attention_mask=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def run(self) -> Comparison:
        """Measure the saved models, train and measure every system, then time all of their forward passes."""
        rows: list[dict[str, Any]] = []
        elsewhere: list[dict[str, Any]] = []
        correct: dict[str, np.ndarray] = {}
        baselines: list[dict[str, Any]] = []
        paths: ReportPaths | None = None
        results: dict[str, Any] = {}
        with self._bar() as bar:
            if self.recipe.evaluation.bag_of_words and self.main:
                baselines = self._bag_of_words()
            # before anything trains: what cannot be read must not cost a run
            measured = [self._measure_saved(system, bar) for system in self.saved]
            for system in self.systems:
                bar.start(system.name)
                try:
                    outcomes = self._run_folds(system, bar.reach)
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
                if system.name == BASELINE:
                    elsewhere = [saved_row(*own, *self._intervals(own[-1], correct[BASELINE])) for own in measured]
                results = self._results([*rows, *elsewhere], baselines)
                if self.main:
                    paths = write_report(results, self.output_dir)
            bar.start("forward time")
            self._time_forward(results["rows"], bar.reach)
            bar.finish("forward time")
            if self.main:
                paths = write_report(results, self.output_dir)
        return Comparison(results, paths, dict(self.failed))

    # One system --------------------------------------------------------------------------------------------------

    def _run_folds(self, system: System, reach: Callable[[float], None]) -> list[TrainResult]:
        conversion = system.recipe.conversion
        calibrated = conversion is not None and conversion.calibration_documents > 0
        shared = self._new_prefix(system) if not calibrated else None
        outcomes = []
        for number, fold in enumerate(self.folds):
            recipe = system.recipe
            if len(self.folds) > 1:
                recipe = recipe.replace(training={"output_dir": str(recipe.output_dir / f"fold_{number}")})
            # a calibrated conversion depends on the fold's training documents, and so do its frozen layers
            prefix = shared if shared is not None else self._new_prefix(system)
            save = number == len(self.folds) - 1

            def share(done: float, number: int = number) -> None:
                reach((number + done) / len(self.folds))

            outcomes.append(train(recipe, task=fold, prefix=prefix, on_step=share, resume=True, save_model=save))
        return outcomes

    def _new_prefix(self, system: System) -> FrozenPrefix | None:
        return FrozenPrefix(kept_dtype(self.arguments)) if system.recipe.stages[-1].cache_frozen_layers else None

    def _row(
        self, system: System, outcomes: list[TrainResult], baseline: np.ndarray | None
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The row, and the predictions `[N]` that a later row is paired with."""
        predictions = np.concatenate([outcome.predictions for outcome in outcomes])
        quality, difference = self._intervals(predictions, baseline)
        stages = [stage for outcome in outcomes for stage in outcome.stages]
        seconds, steps = sum(stage.seconds for stage in stages), sum(stage.steps for stage in stages)
        first = outcomes[0]
        row = {
            "name": system.name,
            "variant": system.variant,
            "options": system.full_options(),
            "max_length": first.last.max_length,
            "quality": quality,
            "difference_to_baseline": difference,
            "parameters_total": first.parameters_total,
            "parameters_added": first.parameters_added,
            "parameters_trained": first.last.parameters_trained,
            "seconds_per_step": seconds / steps,
            "tokens_per_second": sum(stage.tokens_seen for stage in stages) / max(seconds, 1e-9),
            "peak_memory_mb": max(stage.peak_memory_mb for stage in stages),
            "train_seconds": seconds,
            "forward": [],
            "eval_documents": len(predictions),
            "predictions": [int(prediction) for prediction in predictions],
        }
        self.trained, self.steps = first.last.trained, sum(outcome.last.steps for outcome in outcomes)
        self.documents_seen = sum(outcome.last.documents_seen for outcome in outcomes)
        return row, predictions

    def _intervals(
        self, predictions: np.ndarray, baseline: np.ndarray | None
    ) -> tuple[dict[str, Any], dict[str, float] | None]:
        """Quality by metric, and the gain over the baseline's predictions on the same documents."""
        evaluation, references = self.recipe.evaluation, np.array(self.tested["label"])
        settings: Any = {
            "groups": list(self.tested["group"]),
            "num_resamples": evaluation.num_resamples,
            "confidence": evaluation.confidence,
        }
        quality = {
            metric: bootstrap_statistic(_SCORES[metric], predictions, references, **settings).to_dict()
            for metric in self.metrics
        }
        if baseline is None:
            return quality, None
        score = _SCORES[self.metrics[0]]

        def gain(own: np.ndarray, other: np.ndarray, truth: np.ndarray) -> float:
            return score(own, truth) - score(other, truth)

        return quality, bootstrap_statistic(gain, predictions, baseline, references, **settings).to_dict()

    def _measure_saved(self, system: SavedSystem, bar: PlannedBar) -> tuple[SavedSystem, Evaluation, np.ndarray]:
        bar.start(system.name)
        args, size = self.arguments, self.recipe.evaluation.batch_size
        own = {name: getattr(args, name) for name in ("bf16", "fp16", "use_cpu", "per_device_eval_batch_size")}
        own |= {} if size is None else {"per_device_eval_batch_size": size}
        found, predictions = measure_classifier(system, replace(self.task, test=self.tested), own)
        bar.finish(system.name)
        return system, found, predictions

    def _time_forward(self, rows: list[dict[str, Any]], reach: Callable[[float], None]) -> None:
        """Fill in `forward`: fresh models, one after the other at each length, so that they share the machine's
        good and bad moments. The reference of the ratios is softmax attention on as long a table as the variants'."""
        evaluation = self.recipe.evaluation
        lengths = [length for length in evaluation.forward_lengths if length <= self.max_length]
        if not lengths or not self.main:
            return
        by_name = {row["name"]: row for row in rows}
        ordered = [name for name in ("softmax-long", *by_name) if name in by_name]
        builds: dict[str, Callable[[], Any]] = {
            **{system.name: partial(self._build, system.recipe, self.task) for system in self.systems},
            **{system.name: system.saved.load for system in self.saved},
        }
        models = {}
        for name in dict.fromkeys(ordered):
            set_seed(self.arguments.seed)
            models[name] = builds[name]()
        readers = {name: by_name[name]["max_length"] for name in models}
        passes = evaluation.forward_repeats + 1
        total = passes * sum(length for length in lengths for limit in readers.values() if length <= limit)
        done = 0

        def step(_: str, length: int) -> None:
            nonlocal done
            done += length
            reach(done / total)

        rows_timed = forward_time_against_length(
            models,
            lengths,
            repeats=evaluation.forward_repeats,
            device=process_state().device,
            max_lengths=readers,
            on_step=step,
        )
        for timed in rows_timed:
            point = {"length": timed.length, "seconds": timed.seconds, "ratio": timed.ratio}
            by_name[timed.name]["forward"].append(point)

    # The whole ---------------------------------------------------------------------------------------------------

    def _results(self, rows: list[dict[str, Any]], baselines: list[dict[str, Any]]) -> dict[str, Any]:
        recipe, task = self.recipe, self.task
        folds = len(self.folds)
        args, head_rate = self.arguments, self.finetune.head_learning_rate
        stages = ", ".join(stage.kind for stage in recipe.stages[:-1])
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        budget = (
            f"Each system trains {self.trained} for {self.steps} optimizer steps over {self.documents_seen} documents "
            f"(repeats counted), in the same order, from the same seed; learning rate {args.learning_rate:g}"
            + (f", {head_rate:g} for the head" if head_rate else "")
            + f"; mixed precision: {precision}."
            + (f" Converted models first went through: {stages}." if stages else "")
            + (
                " The frozen layers run once per document; their time is in the step time."
                if self.finetune.cache_frozen_layers
                else ""
            )
            + (f" {folds} folds: every document is tested once." if folds > 1 else "")
        )
        notes = [f"{name} failed: {error}" for name, error in self.failed.items()]
        notes += [system.note for system in self.saved]
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
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {
            "meta": {
                "title": self.title,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "command": self.command,
                "model": recipe.model.name,
                "device": self.device_name,
                "threads": torch.get_num_threads(),
                "seed": args.seed,
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
            "primary_metric": self.metrics[0],
            "baseline": BASELINE,
            "rows": rows,
            "baselines": baselines,
            "notes": notes,
        }

    def _bag_of_words(self) -> list[dict[str, Any]]:
        lengths: list[int | None] = [self.systems[0].recipe.max_length, self.max_length, None]
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
        tokens = [self.document_tokens[document] for document in self.tested["document"]]
        for own in self.saved:
            plan[own.name] = sum(min(count, own.saved.reads()) for count in tokens) * self.layers
        readers = {system.name: system.recipe.max_length or 0 for system in self.systems}
        readers |= {system.name: system.saved.reads() for system in self.saved}
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
        """Work of a system's last stage in tokens x layers, a training pass counting three times."""
        limit, stage, args = system.recipe.max_length, system.recipe.stages[-1], self.arguments
        tokens = [min(count, limit or count) for count in self.document_tokens]
        kept = last_layers(stage.trainable or "all") if stage.cache_frozen_layers else None
        trained = self.layers if kept is None else max(kept, 1)
        total = 0
        for number, fold in enumerate(self.folds):
            train_tokens, test_tokens = (
                sum(tokens[document] for document in part["document"]) for part in (fold.train, fold.test)
            )
            batches = -(-len(fold.train) // args.train_batch_size)
            steps = -(-batches // args.gradient_accumulation_steps)
            epochs = args.max_steps / steps if args.max_steps > 0 else args.num_train_epochs
            total += int(train_tokens * trained * 3 * epochs + test_tokens * trained)
            if kept is not None and not number:  # frozen layers run in the first fold
                total += (train_tokens + test_tokens) * (self.layers - trained)
        return total


def _device_name() -> str:
    device = process_state().device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
