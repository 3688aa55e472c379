"""Real queries, keys and values of chosen layers, and the variants that a conversion would put there.

Methods are compared on what one run of the softmax model recorded, layer by layer: no whole model is run for each.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, PreTrainedModel

from hf_linear_attn.auto import LinearAttnPreTrainedModel
from hf_linear_attn.calibration import Recording, record
from hf_linear_attn.convert import convert_model, extend_positions, revert_model
from hf_linear_attn.data import load_config, resolve_model, resolve_model_kwargs
from hf_linear_attn.data.models import named_errors
from hf_linear_attn.measure.quiet import quiet_libraries
from hf_linear_attn.registry import get_patcher, list_variants
from hf_linear_attn.variants.base import AttentionVariant

__all__ = [
    "build_layers",
    "choose_start",
    "document_batches",
    "installed_layers",
    "load_model",
    "passage_batches",
    "record_layers",
]

Batch = dict[str, Any]


def load_model(name: str, *, max_length: int | None = None, num_layers: int | None = None) -> PreTrainedModel:
    """A checkpoint without its head, in eval mode, that does not keep a cache.

    Args:
        name: Hub id, folder or bundled name; a converted folder comes back converted.
        max_length: longest sequence (tokens) it has to read; a shorter position table is tiled.
        num_layers: keep only the first so many layers.
    """
    path, kwargs = resolve_model(name), resolve_model_kwargs(name)
    with quiet_libraries():  # of weights that a shorter model has no place for
        config = load_config(name)
        if num_layers is not None:
            config.num_hidden_layers = min(num_layers, config.num_hidden_layers)
        with named_errors(name):
            model = AutoModel.from_pretrained(path, config=config, **kwargs).eval()
    model.config.use_cache = False
    converted = isinstance(model, LinearAttnPreTrainedModel)  # its limit was chosen when it was converted
    if max_length is not None and not converted:
        limit = get_patcher(model.config.model_type).max_length(model.config)
        extend_positions(model, max(max_length, limit))
    return model


def document_batches(texts: Sequence[str], tokenizer: Any, length: int, count: int, seed: int = 0) -> list[Batch]:
    """`count` batches of one document each, cut to exactly `length` tokens; drawn by `seed`.

    Raises:
        ValueError: if fewer documents are that long.
    """
    batches: list[Batch] = []
    if count == 0:
        return batches
    for index in np.random.default_rng(seed).permutation(len(texts)):
        encoded = tokenizer(texts[int(index)], truncation=True, max_length=length, return_tensors="pt")
        if encoded["input_ids"].shape[1] == length:
            batches.append({name: encoded[name] for name in ("input_ids", "attention_mask")})
        if len(batches) == count:
            return batches
    raise ValueError(f"Only {len(batches)} of {len(texts)} documents have {length} tokens; {count} are needed.")


def passage_batches(
    texts: Iterable[str], tokenizer: Any, length: int, count: int, seed: int = 0, size: int = 32
) -> Iterator[Batch]:
    """`count` passages of exactly `length` tokens, special ones among them, in batches of at most `size`.

    Each text is cut into passages from its beginning; those to take are drawn by `seed`, without repetition.

    Raises:
        ValueError: if the texts have fewer such passages.
    """
    pieces: list[list[int]] = []
    for text in texts:
        cut = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
        pieces += [piece for piece in cut if len(piece) == length]
    if len(pieces) < count:
        raise ValueError(f"The documents have {len(pieces)} passages of {length} tokens; {count} are needed.")
    chosen = np.random.default_rng(seed).permutation(len(pieces))[:count]
    for start in range(0, count, size):
        ids = torch.tensor([pieces[index] for index in chosen[start : start + size]])
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def record_layers(
    model: PreTrainedModel, batches: Iterable[Batch], layers: Iterable[int] | None = None
) -> dict[int, Recording]:
    """What the attention of `layers` receives, and what softmax makes of it, on every batch.

    The model runs softmax attention everywhere, so that each layer's inputs are the checkpoint's own.

    Args:
        model: a checkpoint, which is as it was afterwards, or a converted model.
        batches: keyword arguments of the model.
        layers: indices; all layers of a checkpoint, the converted ones of a converted model, by default.
    """
    if isinstance(model, LinearAttnPreTrainedModel):
        recordings = record(model, list(batches))
        return {layer: recordings[layer] for layer in (recordings if layers is None else layers)}
    causal = get_patcher(model.config.model_type).is_causal(model.config)
    # The recorder sits in converted layers and answers before their variant runs: any variant will do.
    stand_in = list_variants(decoder=True)[0] if causal else list_variants(encoder=True)[0]
    convert_model(model, stand_in, layers=None if layers is None else list(layers))
    try:
        return record(model, list(batches))
    finally:
        revert_model(model)


def build_layers(
    model: PreTrainedModel,
    key: str,
    options: dict[str, Any],
    layers: Iterable[int] | None = None,
    max_length: int | None = None,
) -> dict[int, AttentionVariant]:
    """The variants that converting `layers` of a checkpoint would install, as published; the model stays as it is.

    `max_length` builds them as for a model that reads so many tokens: some have parameters for every position.
    """
    patcher = get_patcher(model.config.model_type)
    limit = patcher.max_length(model.config)
    patcher.set_max_length(model.config, limit if max_length is None else max_length)
    try:
        convert_model(model, key, layers=None if layers is None else list(layers), **options)
        built = installed_layers(model)
        revert_model(model)
    finally:
        patcher.set_max_length(model.config, limit)
    return built


def installed_layers(model: PreTrainedModel) -> dict[int, AttentionVariant]:
    """The variants inside a converted model, by layer."""
    config: Any = model.config
    attentions = get_patcher(config.base_model_type).self_attentions(model)
    return {a.layer_idx: a.module.linear_attn for a in attentions if hasattr(a.module, "linear_attn")}  # type: ignore[misc]


def choose_start(variant: AttentionVariant, recording: Recording) -> None:
    """Let a variant choose its start on a recording; what it says of its quality is left to the measurement."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variant.calibrate(recording.inputs)
