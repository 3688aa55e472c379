"""From a recipe to a model, a tokenizer and documents."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from transformers.utils import logging

from hf_linear_attn.convert import convert_model, extend_positions, unmark_unpacked
from hf_linear_attn.data import (
    LongDocumentCollator,
    load_config,
    load_documents,
    load_tokenizer,
    resolve_model,
    resolve_model_kwargs,
)
from hf_linear_attn.data.models import named_errors
from hf_linear_attn.data.tokenization import encode_leading, special_frame
from hf_linear_attn.measure.quiet import quiet_libraries
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.heads import task_of
from hf_linear_attn.training.contrast import check_batches, check_room, shortest_document
from hf_linear_attn.training.distill import choose_objective, settle_windows
from hf_linear_attn.training.parts import last_layers
from hf_linear_attn.training.stage import checkpoint_limit, longest_input
from hf_linear_attn.training.tasks import get_task

if TYPE_CHECKING:
    from hf_linear_attn.data.task import DocumentTask
    from hf_linear_attn.training.recipe import DataRecipe, Recipe, Stage

__all__ = [
    "auto_class",
    "build_model",
    "build_tokenizer",
    "check_stages",
    "load_head",
    "load_task",
    "process_state",
    "reuse_freed_memory",
]

logger = logging.get_logger(__name__)

# The first whose mapping has the class that a checkpoint's config names.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice",
    "AutoModel",
)


def process_state() -> PartialState:
    """This process among those that were launched together, on the CPU if `ACCELERATE_USE_CPU` says so."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def load_task(recipe: DataRecipe, kind: str, *, trains: bool = True) -> DocumentTask:
    """The documents that `recipe` names, for a task or as `text`; `trains` as `load_documents` takes it."""
    with quiet_libraries():
        return load_documents(
            recipe.source,
            task=kind,
            fields=recipe.fields,
            seed=recipe.seed,
            max_train_documents=recipe.max_train_documents,
            max_test_documents=recipe.max_test_documents,
            streaming=recipe.streaming,
            shuffle_buffer=recipe.shuffle_buffer,
            trains=trains,
            **recipe.options,
        )


def build_tokenizer(recipe: Recipe) -> Any:
    """The checkpoint's tokenizer, with a padding token: GPT-2's has none, and takes `model.pad_token` or its
    end-of-text token, which the attention mask tells from text."""
    tokenizer = load_tokenizer(recipe.model.name)
    if tokenizer.pad_token is None or recipe.model.pad_token is not None:
        token = recipe.model.pad_token or tokenizer.eos_token
        if token not in tokenizer.get_vocab():  # by name: GPT-2's one special token is also its unknown one
            raise ValueError(f"model.pad_token={token!r} is no token of {recipe.model.name!r}; name one that is")
        if recipe.model.pad_token is None:
            logger.warning_once(f"{recipe.model.name!r} has no padding token: {token!r} pads (model.pad_token)")
        tokenizer.pad_token = token
    return tokenizer


def auto_class(stage: Stage, name: str) -> str:
    """The Auto class of the model that a stage trains: the task's head, or the class that the checkpoint's config
    names."""
    if stage.kind == "finetune":
        return get_task(stage.task).auto_class  # type: ignore[attr-defined]
    from transformers.models.auto import modeling_auto

    config = load_config(name)
    own = (config.architectures or ["AutoModelForCausalLM" if resolve_model_kwargs(name) else "AutoModel"])[0]
    if own in _AUTO_CLASSES:
        return own
    for auto in _AUTO_CLASSES:
        entry = getattr(modeling_auto, auto)._model_mapping.get(type(config), None)
        classes = entry if isinstance(entry, (list, tuple)) else (entry,)
        if own in [getattr(cls, "__name__", None) for cls in classes]:
            return auto
    raise ValueError(f"The config of {name!r} names the class {own!r}, which no stage but finetune can train")


def load_head(auto: str, name: str, recipe: Recipe, task: DocumentTask | None, tokenizer: Any) -> Any:
    """A checkpoint under an Auto class; a task's head is new, and random."""
    import transformers

    import hf_linear_attn  # noqa: F401 - so that Auto classes know converted models

    labels: dict[str, Any] = {}
    if task is not None and task.label_names:
        labels = {
            "num_labels": task.num_labels,
            "id2label": dict(enumerate(task.label_names)),
            "label2id": {name: index for index, name in enumerate(task.label_names)},
            "problem_type": get_task(task.kind).problem_type,
        }
    own = recipe.model.kwargs
    try:
        with quiet_libraries(), named_errors(name):
            model = getattr(transformers, auto).from_pretrained(
                resolve_model(name), **labels, **resolve_model_kwargs(name), **own
            )
    except TypeError as error:
        if not own:
            raise
        raise ValueError(
            f"model.kwargs has {', '.join(map(repr, own))}, which {name!r} does not take: {error}"
        ) from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if task_of(type(model)) is not None and getattr(model.config, "sep_token_id", None) is None:
        model.config.sep_token_id = tokenizer.sep_token_id  # by which variants tell a question from its context
    unmark_unpacked(model)
    return model


def build_model(recipe: Recipe, auto: str, task: DocumentTask | None, tokenizer: Any, texts: Any) -> Any:
    """The checkpoint with a head of class `auto`, its attention converted as the recipe says.

    Seed the random generator first: a new head is random. Without a `conversion` section a softmax model whose
    position table is shorter than the longest `max_length` of the stages gets a longer table.

    Args:
        texts: dataset with a column `text` that the conversion may be calibrated on.
    """
    model = load_head(auto, recipe.model.name, recipe, task, tokenizer)
    own_limit = get_patcher(model.config.model_type).max_length(model.config)
    wanted = max((stage.max_length or 0 for stage in recipe.stages), default=0)
    conversion = recipe.conversion
    if conversion is None:
        if wanted > own_limit:
            extend_positions(model, wanted)
        return model
    limit = conversion.max_length or wanted
    return convert_model(
        model,
        conversion.variant,
        layers=conversion.layers,
        keep_softmax=conversion.keep_softmax,
        keep_softmax_by=conversion.keep_softmax_by,
        max_length=limit if limit > own_limit else None,
        extend=conversion.extend,
        calibration=_calibration_batches(recipe, texts, tokenizer, min(own_limit, conversion.calibration_tokens)),
        calibration_steps=conversion.calibration_steps,
        **conversion.options,
    )


def check_stages(recipe: Recipe, autos: list[str], tokenizer: Any, arguments: list[Any]) -> None:
    """Raise `ValueError` for a stage that would fail when its turn comes, after hours of the stages before it.

    Args:
        recipe: the run.
        autos: Auto class of each stage's model.
        tokenizer: the checkpoint's.
        arguments: `TrainingArguments` of each stage.
    """
    config = load_config(recipe.model.name)
    own_limit = longest_input(SimpleNamespace(config=config))
    conversion, layers = recipe.conversion, config.num_hidden_layers
    wanted = max((stage.max_length or 0 for stage in recipe.stages), default=0)
    limit = max(own_limit, wanted if conversion is None else conversion.max_length or wanted)
    for number, (stage, auto, args) in enumerate(zip(recipe.stages, autos, arguments, strict=True), 1):
        where = f"stage {number}, {stage.kind}"
        if (stage.max_length or 0) > limit:
            raise ValueError(f"{where}: max_length={stage.max_length}, but the converted model reads {limit} tokens")
        count = last_layers(stage.trainable or "all") or 0
        if count > layers:
            raise ValueError(f"{where}: trainable={stage.trainable!r}, but the model has {layers} layers")
        language = auto in ("AutoModelForCausalLM", "AutoModelForMaskedLM")
        if stage.kind == "uptrain" and not language:
            raise ValueError(f"{where}: {recipe.model.name!r} has no language-model head to uptrain")
        masks = auto == "AutoModelForMaskedLM" and stage.kind in ("uptrain", "distill")
        if masks and tokenizer.mask_token is None:
            raise ValueError(f"{where}: a masked language model needs a tokenizer with a mask token")
        if stage.kind == "contrast":
            check_batches(args)
            special = sum(map(len, special_frame(tokenizer)))
            shortest = shortest_document(stage.passage_tokens, stage.margin, special)
            check_room(shortest, stage.max_length or limit)
        if stage.kind == "distill":
            objective = choose_objective(stage.objective, auto != "AutoModel", auto)
            teacher = load_config(stage.teacher) if stage.teacher else config
            read = longest_input if stage.teacher else checkpoint_limit
            reads = read(SimpleNamespace(config=teacher))
            settle_windows(objective, reads, stage.max_length, stage.window, stage.stride)


def _calibration_batches(recipe: Recipe, texts: Any, tokenizer: Any, length: int) -> list[dict[str, Any]] | None:
    assert recipe.conversion is not None
    count = recipe.conversion.calibration_documents
    if count == 0:
        return None
    if isinstance(texts, Dataset):
        # evenly spread: documents are often sorted by label or by date
        step = max(len(texts) // count, 1)
        chosen = texts.select(range(0, min(step * count, len(texts)), step))["text"]
    else:
        chosen = [row["text"] for row in texts.take(count)]
    collate = LongDocumentCollator(tokenizer)
    return [collate([{"input_ids": ids}]) for ids in encode_leading(chosen, tokenizer, length)]


def reuse_freed_memory() -> None:
    """On Linux with glibc: keep freed memory in the process, for its whole life.

    glibc maps every block above a few megabytes afresh, and the kernel clears its pages each time. Activations of
    long documents are all that large: keeping them took a quarter off the time of training on a CPU.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return
    # the constants of <malloc.h>; -4: blocks that may be mapped, -1: free memory that is handed back
    library.mallopt(-4, 0)
    library.mallopt(-1, 2**31 - 1)
