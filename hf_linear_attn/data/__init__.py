"""Documents to train and compare on, and the checkpoints that Python packages carry."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_linear_attn.data.bag_of_words import bag_of_words_baseline, bag_of_words_correct
    from hf_linear_attn.data.catalog import CATALOG
    from hf_linear_attn.data.documents import BUNDLED_SOURCES, load_documents
    from hf_linear_attn.data.kinds import KINDS
    from hf_linear_attn.data.models import (
        BUNDLED_MODELS,
        load_config,
        load_tokenizer,
        resolve_model,
        resolve_model_kwargs,
    )
    from hf_linear_attn.data.task import DocumentTask
    from hf_linear_attn.data.tokenization import LongDocumentCollator, tokenize_documents

__all__ = [
    "BUNDLED_MODELS",
    "BUNDLED_SOURCES",
    "CATALOG",
    "KINDS",
    "DocumentTask",
    "LongDocumentCollator",
    "bag_of_words_baseline",
    "bag_of_words_correct",
    "load_config",
    "load_documents",
    "load_tokenizer",
    "resolve_model",
    "resolve_model_kwargs",
    "tokenize_documents",
]

_MODULES = {
    "BUNDLED_MODELS": "models",
    "BUNDLED_SOURCES": "documents",
    "CATALOG": "catalog",
    "DocumentTask": "task",
    "KINDS": "kinds",
    "LongDocumentCollator": "tokenization",
    "bag_of_words_baseline": "bag_of_words",
    "bag_of_words_correct": "bag_of_words",
    "load_config": "models",
    "load_documents": "documents",
    "load_tokenizer": "models",
    "resolve_model": "models",
    "resolve_model_kwargs": "models",
    "tokenize_documents": "tokenization",
}


def __getattr__(name: str) -> Any:
    # `datasets` and scikit-learn take a second to import; resolving a model's name must not.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
