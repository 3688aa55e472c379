"""How close each variant starts to a checkpoint, on documents: what `advise` sets beside the speed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from hf_linear_attn.analysis.recordings import Batch, build_layers, choose_start, load_model, record_layers
from hf_linear_attn.calibration import output_errors
from hf_linear_attn.data import load_tokenizer
from hf_linear_attn.measure.methods import Method
from hf_linear_attn.registry import get_patcher

__all__ = ["Documents", "start_errors"]

Documents = Callable[[Any, int], Iterable[Batch]]
"""Tokenizer and most tokens of a document to one batch for each."""


def start_errors(name: str, methods: Iterable[Method], documents: Documents, length: int) -> dict[str, float]:
    """Relative error of the calibrated start of each method against softmax attention.

    It is the mean over the first, the middle and the last layer, which see the checkpoint's own inputs. Every other
    document calibrates, those between are measured.

    Args:
        name: the checkpoint.
        methods: those to measure, none that its side or shape refuses.
        documents: at least two.
        length: tokens that the converted model is to read, which some methods are built for.

    Raises:
        ValueError: for fewer than two documents, and as `documents` does.
    """
    model = load_model(name)
    patcher = get_patcher(model.config.model_type)
    limit = patcher.max_length(model.config)
    batches = list(documents(load_tokenizer(name), min(length, limit)))
    if len(batches) < 2:
        raise ValueError("Errors need two documents at least: one to choose the starts on, and one to measure them on.")
    last = patcher.num_layers(model) - 1
    layers = sorted({0, last // 2, last})
    seen, unseen = (record_layers(model, part, layers) for part in (batches[::2], batches[1::2]))
    errors = {}
    for method in methods:
        built = build_layers(model, method.key, method.options, layers, max_length=max(length, limit))
        for layer, variant in built.items():
            choose_start(variant, seen[layer])
        errors[method.name] = statistics.fmean(output_errors(built[layer], unseen[layer]).error for layer in layers)
    return errors
