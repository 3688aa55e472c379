"""From a recipe to a model, a tokenizer and tokenized documents."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hf_linear_attn.convert import convert_model, extend_positions, unmark_unpacked
from hf_linear_attn.data import (
    LongDocumentCollator,
    load_documents,
    load_tokenizer,
    resolve_model,
    resolve_model_kwargs,
    tokenize_documents,
)
from hf_linear_attn.data.models import named_errors
from hf_linear_attn.registry import get_patcher

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_linear_attn.data.task import DocumentTask
    from hf_linear_attn.training.recipe import DataRecipe, Recipe

__all__ = [
    "build_model",
    "build_tokenizer",
    "load_task",
    "prefix_dtype",
    "prepare_documents",
    "quiet_libraries",
    "resolve_precision",
    "reuse_freed_memory",
]


def load_task(recipe: DataRecipe) -> DocumentTask:
    """The documents that `recipe` names."""
    with quiet_libraries():
        return load_documents(
            recipe.source,
            seed=recipe.seed,
            max_train_documents=recipe.max_train_documents,
            max_test_documents=recipe.max_test_documents,
            **recipe.options,
        )


def resolve_precision(name: str) -> str:
    """`auto` becomes `bf16` on a device that has instructions for it, and `no` elsewhere: emulated, it is slower."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    # no public question exists for CPUs; a build of torch that cannot answer gets fp32
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if supported() else "no"


def prefix_dtype(precision: str) -> torch.dtype:
    """What the outputs of frozen layers are kept in: the precision of the run."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[resolve_precision(precision)]


def build_tokenizer(recipe: Recipe) -> Any:
    """The checkpoint's tokenizer."""
    return load_tokenizer(recipe.model.name)


def build_model(recipe: Recipe, task: DocumentTask, tokenizer: Any) -> tuple[Any, int]:
    """The checkpoint with a new classification head, its attention converted as the recipe says.

    Seed the random generator first: the new head is random.

    Returns:
        the model, and the longest sequence (tokens) that this run gives it. Without a `conversion` section a
        softmax model whose position table is shorter than `training.max_length` gets a longer table.
    """
    from transformers import AutoModelForSequenceClassification

    with quiet_libraries(), named_errors(recipe.model.name):
        model = AutoModelForSequenceClassification.from_pretrained(
            resolve_model(recipe.model.name),
            num_labels=task.num_labels,
            id2label=dict(enumerate(task.label_names)),
            label2id={name: index for index, name in enumerate(task.label_names)},
            **resolve_model_kwargs(recipe.model.name),
            **recipe.model.kwargs,
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    unmark_unpacked(model)
    own_limit = get_patcher(model.config.model_type).max_length(model.config)
    conversion = recipe.conversion
    wanted = recipe.training.max_length
    if conversion is None:
        if wanted is not None and wanted > own_limit:
            extend_positions(model, wanted)
        return model, wanted or own_limit
    limit = conversion.max_length or wanted or own_limit
    convert_model(
        model,
        conversion.variant,
        layers=conversion.layers,
        max_length=limit if limit > own_limit else None,
        extend=conversion.extend,  # type: ignore[arg-type]
        calibration=_calibration_batches(conversion.calibration_documents, task, tokenizer, limit),
        **conversion.options,
    )
    return model, min(wanted or limit, limit)


def prepare_documents(dataset: Dataset, tokenizer: Any, max_length: int, first: int = 0) -> Dataset:
    """Tokenize and number the documents: adds `document`, counted from `first` unless the dataset has the column."""
    numbered = "document" in dataset.column_names
    numbers = list(dataset["document"]) if numbered else list(range(first, first + len(dataset)))
    with quiet_libraries():
        return tokenize_documents(dataset, tokenizer, max_length).add_column("document", numbers)


def _calibration_batches(
    count: int, task: DocumentTask, tokenizer: Any, max_length: int
) -> list[dict[str, Any]] | None:
    if count == 0:
        return None
    # evenly spread: documents are often sorted by label or by date
    step = max(len(task.train) // count, 1)
    documents = tokenize_documents(task.train.select(range(0, step * count, step)), tokenizer, max_length)
    collate = LongDocumentCollator(tokenizer)
    batches = [collate([document]) for document in documents]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the libraries' own small progress bars, and Transformers' report that the classification head is new:
    here it always is."""
    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled(), datasets_logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars[0]:
            logging.enable_progress_bar()
        if bars[1]:
            datasets_logging.enable_progress_bar()


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
