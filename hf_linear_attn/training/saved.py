"""Saved models as they are: what each is for, and how well it does that on documents it is given."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from hf_linear_attn.data import load_config, resolve_model, resolve_model_kwargs
from hf_linear_attn.data.models import named_errors
from hf_linear_attn.data.tokenization import encode_leading
from hf_linear_attn.measure.metrics import check_metrics, load_metrics
from hf_linear_attn.measure.perplexity import document_likelihoods
from hf_linear_attn.measure.profile import parameter_counts
from hf_linear_attn.measure.quiet import quiet_libraries
from hf_linear_attn.training.arguments import training_arguments
from hf_linear_attn.training.finetune import FinetuneTrainer
from hf_linear_attn.training.recipe import DataRecipe, ModelRecipe, Recipe, UptrainStage
from hf_linear_attn.training.setup import auto_class, build_tokenizer, load_task, process_state
from hf_linear_attn.training.stage import StageTrainer, longest_input
from hf_linear_attn.training.tasks import IGNORED, TASKS
from hf_linear_attn.training.uptrain import UptrainTrainer

if TYPE_CHECKING:
    from hf_linear_attn.data.task import DocumentTask

__all__ = ["PARTS", "Evaluation", "SavedModel", "evaluate_model", "evaluate_saved", "fit_labels", "read_saved"]

PARTS = ("test", "train", "all")

# Auto class of a language model -> what measures it.
_LANGUAGE = {"AutoModelForCausalLM": "perplexity", "AutoModelForMaskedLM": "masked_perplexity"}
_LABELED = ("sequence_classification", "multi_label_classification", "token_classification")

# Metrics, predictions, references.
Found = tuple[dict[str, float], list[Any], list[Any]]


@dataclass(frozen=True)
class SavedModel:
    """What a saved model says of itself, before its weights are read.

    Attributes:
        name: Hub id, folder or bundled name.
        config: its config.
        tokenizer: its tokenizer, with a padding token.
        auto: Auto class of its head.
        task: what it is measured at, a key of `hf_linear_attn.data.kinds.KINDS`; "text" for a language model.
        label_names: name of each label, in the order of the logits; empty for a head without labels. A label that was
            never named goes by its number.
        limit: tokens that it can read.
    """

    name: str
    config: Any
    tokenizer: Any
    auto: str
    task: str
    label_names: list[str]
    limit: int

    def reads(self, max_length: int | None = None) -> int:
        """Tokens that are read of a document: as many as asked for, or as its tokenizer was saved with.

        Raises:
            ValueError: for more than the model can read.
        """
        if max_length is not None and max_length > self.limit:
            raise ValueError(f"max_length={max_length}, but {self.name!r} reads {self.limit} tokens at most")
        return min(self.tokenizer.model_max_length if max_length is None else max_length, self.limit)

    def load(self) -> Any:
        """The model under its Auto class.

        Raises:
            ValueError: for weights that cannot be read, or that lack a part of the model: it would be random.
        """
        with quiet_libraries(), named_errors(self.name):
            model, found = getattr(transformers, self.auto).from_pretrained(
                resolve_model(self.name), output_loading_info=True, **resolve_model_kwargs(self.name)
            )
        if lacking := sorted(map(str, found["missing_keys"])):
            raise ValueError(
                f"The weights of {self.name!r} lack {len(lacking)} parameters of {type(model).__name__}; they would be "
                f"random: {', '.join(lacking[:3])}" + (", ..." if len(lacking) > 3 else "")
            )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        if self.label_names:  # in the order of the logits, whatever order its file has them in
            model.config.id2label = dict(enumerate(self.label_names))
        return model


def read_saved(name: str) -> SavedModel:
    """Read the config and the tokenizer of a saved model, converted or not.

    Raises:
        ValueError: for what cannot be read, a family that is not supported, a model without a head that can be measured
            (says which can), a damaged `problem_type` or `id2label`, or a folder without a tokenizer.
    """
    config = load_config(name)
    recipe = Recipe(ModelRecipe(name), DataRecipe(), [UptrainStage()])
    try:
        auto = auto_class(recipe.stages[0], name)
    except ValueError:  # a class of another Auto class
        auto = "AutoModel"
    if auto == "AutoModel":
        own = (config.architectures or ["of no class"])[0]
        raise ValueError(
            f"{name!r} is {own}, which has no head that is measured here; allowed: a head for {', '.join(TASKS)}, or a "
            "causal or masked language model (`hf-linear-attn retrieval` measures embedders)"
        )
    task = _task_of(name, auto, config)
    ids = list(config.id2label or {})
    if task in _LABELED and sorted(ids) != list(range(len(ids))):
        raise ValueError(f"The config of {name!r} numbers its labels {ids} (id2label); allowed: from 0, each once")
    if task == "regression" and len(ids) != 1:
        raise ValueError(f"{name!r} predicts {len(ids)} numbers; allowed: one, as the documents have one")
    labels = [config.id2label[index] for index in sorted(ids)] if task in _LABELED else []
    names = [str(index) if label == f"LABEL_{index}" else str(label) for index, label in enumerate(labels)]
    limit = longest_input(SimpleNamespace(config=config))
    tokenizer = build_tokenizer(recipe)
    return SavedModel(name, config, tokenizer, auto, task, names, limit)


def _task_of(name: str, auto: str, config: Any) -> str:
    if auto in _LANGUAGE:
        return "text"
    heads = {task.problem_type: task.name for task in TASKS.values() if task.auto_class == auto}
    if len(heads) == 1:
        return next(iter(heads.values()))
    # As Transformers settles it, where the config does not say.
    problem = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if problem not in heads:
        allowed = ", ".join(map(str, heads))
        raise ValueError(f"The config of {name!r} has problem_type={problem!r}; allowed: {allowed}")
    return heads[problem]


def fit_labels(saved: SavedModel, task: DocumentTask) -> list[int]:
    """The model's label for each label of the documents, by name.

    Raises:
        ValueError: for labels that the model does not know; names them, and those it knows.
    """
    if not saved.label_names:
        return []
    if unknown := [name for name in task.label_names if name not in saved.label_names]:
        raise ValueError(
            f"{saved.name!r} does not know the label(s) {_some(unknown)} of {task.name!r}; it knows "
            f"{_some(saved.label_names)} (id2label of its config)"
        )
    return [saved.label_names.index(name) for name in task.label_names]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


@dataclass(frozen=True)
class Evaluation:
    """How well a saved model does on documents.

    Attributes:
        model: Hub id, folder or bundled name.
        architecture: its class.
        task: a key of `hf_linear_attn.data.kinds.KINDS`.
        label_names: of the model.
        parameters_total: of the model.
        parameters_added: by a conversion.
        max_length: tokens that were read of a document, or of a piece of one, at most.
        source: where the documents come from.
        note: what a reader must know of them.
        documents: how many were measured.
        metrics: name -> value.
        predictions: of each document, in the model's labels; of a causal language model the negative log-likelihood, in
            nats; empty for a masked one, which reads pieces of documents.
        references: what they should be; of a causal language model the predicted tokens.
        groups: the group (file, row or author) of each document that has a prediction.
    """

    model: str
    architecture: str
    task: str
    label_names: list[str]
    parameters_total: int
    parameters_added: int
    max_length: int
    source: str
    note: str
    documents: int
    metrics: dict[str, float]
    predictions: list[Any]
    references: list[Any]
    groups: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without what `rows` tells."""
        names = [entry.name for entry in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in ("predictions", "references", "groups")}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One mapping for each document that has a prediction: its `group`, and `prediction` and `reference` with
        labels by name, or `nats` and `tokens` of a causal language model."""
        names = ("nats", "tokens") if self.task == "text" else ("prediction", "reference")
        for group, *values in zip(self.groups, self.predictions, self.references, strict=True):
            yield {"group": group, **dict(zip(names, map(self._spelled, values), strict=True))}

    def _spelled(self, value: Any) -> Any:
        if self.task == "sequence_classification":
            return self.label_names[value]
        if self.task == "multi_label_classification":
            return [name for name, is_set in zip(self.label_names, value, strict=True) if is_set]
        return value


def evaluate_model(
    saved: SavedModel,
    data: DataRecipe,
    *,
    part: str = "test",
    metrics: Sequence[str] | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    bf16: bool = False,
    show_progress: bool = False,
) -> Evaluation:
    """Measure a saved model on documents.

    Args:
        saved: the model, from `read_saved`.
        data: the documents.
        part: `test`, which `train` would hold out of the source; `train`, the others; or `all`.
        metrics: names for `load_metrics`; the task's own when None.
        max_length: tokens of a document; as the tokenizer was saved with when None.
        batch_size: documents of a forward on a device; 8 when None.
        bf16: compute under bfloat16 autocast, as training with `bf16` does; likelihoods are summed in float32.
        show_progress: a progress bar on the main process.

    Raises:
        ValueError: for metrics or a length that do not fit the model, documents that `load_documents` refuses, labels
            that the model does not know, or `batch_size` of a causal language model: it reads one document a forward.
    """
    if part not in PARTS:
        raise ValueError(f"part={part!r}; allowed: {', '.join(PARTS)}")
    if data.folds:
        raise ValueError(
            f"data.folds={data.folds}: folds are of `compare`, which trains a model for each; leave them away"
        )
    if data.streaming and part != "test":
        raise ValueError(f"part={part!r}; of documents that stream only part='test' is measured")
    if saved.auto == "AutoModelForCausalLM" and batch_size is not None:
        raise ValueError(
            f"batch_size={batch_size}: {saved.name!r} is a causal language model, and reads one document a forward"
        )
    _check_measures(saved, metrics)
    saved.reads(max_length)
    task = load_task(data, saved.task, trains=False)
    if part == "train":
        task = dataclasses.replace(task, test=task.train)
    elif part == "all":
        task = dataclasses.replace(task, test=concatenate_datasets([task.train, task.test]))
    arguments: dict[str, Any] = {"bf16": bf16}
    if batch_size is not None:
        arguments["per_device_eval_batch_size"] = batch_size
    options: dict[str, Any] = {"metrics": metrics, "max_length": max_length, "show_progress": show_progress}
    return evaluate_saved(saved, task, arguments=arguments, **options)


def evaluate_saved(
    saved: SavedModel,
    task: DocumentTask,
    *,
    metrics: Sequence[str] | None = None,
    max_length: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    show_progress: bool = False,
) -> Evaluation:
    """Measure a saved model on the test part of `task`, whose labels may be numbered otherwise than the model's.

    Heads of tasks are measured as `FinetuneTrainer` does, masked language models by the masked tokens of all pieces, as
    `UptrainTrainer` does, and causal ones by the first `max_length` tokens of each document.

    Args:
        saved: the model.
        task: documents of `saved.task`.
        metrics: names for `load_metrics`; the task's own when None.
        max_length: tokens of a document; as the tokenizer was saved with when None.
        arguments: `TrainingArguments` of the evaluation, such as `per_device_eval_batch_size` and `bf16`.
        show_progress: a progress bar on the main process.

    Raises:
        ValueError: for weights, metrics, a length or labels that do not fit, a document of fewer than two tokens for a
            causal language model, or a loss of a masked one that is not finite.
    """
    places, length = fit_labels(saved, task), saved.reads(max_length)
    _check_measures(saved, metrics)
    model = saved.load()
    if saved.auto == "AutoModelForCausalLM":
        bf16 = bool((arguments or {}).get("bf16"))
        found = _likelihoods(model, saved, task.test, length, bf16, show_progress)
    else:
        with tempfile.TemporaryDirectory() as folder:
            own = {"output_dir": folder, "disable_tqdm": not show_progress}
            given: dict[str, Any] = {
                "args": training_arguments(arguments or {}, own),
                "processing_class": saved.tokenizer,
                "max_length": length,
            }
            if saved.task == "text":
                found = _masked_loss(saved, model, task.test, given)
            else:
                test = _renumbered(task.test, saved, places)
                found = _head(saved, model, test, {**given, "metrics": metrics})
    measured, predictions, references = found
    counts = parameter_counts(model)
    return Evaluation(
        model=saved.name,
        architecture=type(model).__name__,
        task=saved.task,
        label_names=saved.label_names,
        parameters_total=counts.total,
        parameters_added=counts.new,
        max_length=length,
        source=task.source,
        note=task.note,
        documents=len(task.test),
        metrics={name: float(value) for name, value in measured.items()},
        predictions=predictions,
        references=references,
        groups=list(task.test["group"]) if predictions else [],
    )


def _check_measures(saved: SavedModel, metrics: Sequence[str] | None) -> None:
    if metrics is None:
        return
    if saved.task != "text":
        check_metrics(metrics, saved.task)
        load_metrics(metrics)  # one of the Hub is there, or nothing begins
    elif list(metrics) != [_LANGUAGE[saved.auto]]:
        raise ValueError(
            f"{saved.name!r} is a language model, whose measure is {_LANGUAGE[saved.auto]}; got {', '.join(metrics)}"
        )


def _renumbered(data: Dataset, saved: SavedModel, places: Sequence[int]) -> Dataset:
    """The documents with the model's numbers of their labels."""
    count = len(saved.label_names)
    if list(places) == list(range(count)):
        return data

    def renumber(label: Any) -> Any:
        if saved.task == "multi_label_classification":
            marks = dict(zip(places, label, strict=True))
            return [marks.get(place, 0.0) for place in range(count)]
        if saved.task == "token_classification":
            return [entry if entry == IGNORED else places[entry] for entry in label]
        return places[label]

    return data.remove_columns("label").add_column("label", [renumber(label) for label in data["label"]])


def _head(saved: SavedModel, model: Any, test: Dataset, given: Mapping[str, Any]) -> Found:
    with quiet_libraries():
        trainer = FinetuneTrainer(model, eval_dataset=test, task=saved.task, **given)
    return _measured(trainer), trainer.predictions, trainer.references


def _masked_loss(saved: SavedModel, model: Any, test: Dataset, given: Mapping[str, Any]) -> Found:
    with quiet_libraries():
        trainer = UptrainTrainer(model, eval_dataset=test, **given)
    measured = _measured(trainer)
    if not np.isfinite(measured["loss"]):
        raise ValueError(f"The loss of {saved.name!r} is not finite; a batch without a masked token has none")
    return {**measured, _LANGUAGE[saved.auto]: float(np.exp(measured["loss"]))}, [], []


def _measured(trainer: StageTrainer) -> dict[str, float]:
    """What Trainer measures, without its times."""
    trainer.remove_callback(transformers.PrinterCallback)  # it prints what is returned
    found = trainer.evaluate()
    trainer.accelerator.free_memory()
    times = ("_runtime", "_per_second", "_time")
    kept = [name for name in found if name.startswith("eval_") and not name.endswith(times)]
    return {name.removeprefix("eval_"): found[name] for name in kept}


def _likelihoods(model: Any, saved: SavedModel, test: Dataset, length: int, bf16: bool, show_progress: bool) -> Found:
    if length < 2:
        raise ValueError(f"max_length={length}; a likelihood needs 2 tokens")
    groups, encoded = list(test["group"]), encode_leading(list(test["text"]), saved.tokenizer, length)
    for group, ids in zip(groups, encoded, strict=True):
        if len(ids) < 2:
            raise ValueError(f"{group} has {len(ids)} token(s); a likelihood needs 2")
    state = process_state()
    model.to(state.device)
    tokens = [len(ids) - 1 for ids in encoded]  # the first is not predicted
    half = torch.autocast(state.device.type, torch.bfloat16, enabled=bf16)
    with half, tqdm(encoded, disable=not (show_progress and state.is_main_process)) as bar:
        nats = [document_likelihoods(model, [ids], len(ids))[0] * (len(ids) - 1) for ids in bar]
    measure = load_metrics([_LANGUAGE[saved.auto]])
    measure.add_batch(predictions=nats, references=tokens)
    return measure.compute(), nats, tokens
