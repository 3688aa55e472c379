"""What `advise` times: a few layers of a model's shape, softmax and each variant with the same random weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from hf_linear_attn.data import load_config
from hf_linear_attn.measure.methods import Method, RefusedError, converted_copy, out_of_memory, parse_methods
from hf_linear_attn.measure.profile import time_interleaved
from hf_linear_attn.registry import PATCHERS, get_patcher, list_patchers

__all__ = [
    "FORWARD",
    "SDPA",
    "STEP",
    "WORK",
    "Embeddings",
    "Times",
    "build_contenders",
    "choose_variants",
    "layer_config",
    "read_config",
    "take_turns",
]

SDPA = "sdpa"
"""Name of softmax attention among the contenders."""

FORWARD, STEP = "forward", "step"

Times = dict[str, dict[str, list[float]]]
"""Contender to kind of work to seconds, one for each round."""

_VOCABULARY = 1024  # the layers are given embeddings: no token is looked up


def read_config(model: Any) -> Any:
    """The config of a checkpoint by name or folder, or a config itself; raises as `advise` says."""
    if isinstance(model, PreTrainedConfig):
        config: Any = model
    elif isinstance(model, (str, os.PathLike)):
        config = load_config(os.fspath(model))
    else:
        raise TypeError(f"model must be a name, a folder or a config, got {type(model).__name__}.")
    if getattr(config, "linear_attn", None) is not None:
        raise ValueError(f"The model is converted already ({config.model_type}). Name the checkpoint it was made from.")
    if config.model_type not in PATCHERS:
        raise ValueError(
            f"Model family {config.model_type!r} is not supported. Supported: {', '.join(list_patchers())}."
        )
    return config


def choose_variants(config: Any, asked: Iterable[Any] | None) -> list[Method]:
    """Those asked for, or all without quadratic cost that serve this kind of model."""
    causal = get_patcher(config.model_type).is_causal(config)
    if asked is None:
        return [method for method in parse_methods([], rest=True) if method.serves(causal) and not method.quadratic()]
    chosen = parse_methods([asked] if isinstance(asked, str) else asked)
    for method in chosen:
        if not method.serves(causal):
            side = "a decoder" if causal else "an encoder"
            raise ValueError(f"{method.key!r} does not serve {side} such as {config.model_type}: {method.spec.refusal}")
    if not chosen:
        raise ValueError("variants is empty; name at least one, or leave it out for all that serve this model.")
    return chosen


def layer_config(config: Any, length: int, layers: int) -> Any:
    """A config of at most `layers` layers of the same shape that reads `length` tokens."""
    shape = copy.deepcopy(config)
    shape.num_hidden_layers = layers = min(layers, config.num_hidden_layers)
    if getattr(shape, "layer_types", None) is not None:
        shape.layer_types = ["full_attention"] * layers
    if getattr(shape, "sliding_window", None) is not None:
        shape.sliding_window = None  # what conversion asks for: a windowed layer is not converted
    shape.vocab_size = min(shape.vocab_size, _VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        number = getattr(shape, name, None)
        if number is not None and not (isinstance(number, int) and number < shape.vocab_size):
            setattr(shape, name, 0)
    shape.use_cache = False
    if getattr(shape, "quantization_config", None) is not None:
        del shape.quantization_config
    patcher = get_patcher(shape.model_type)
    if patcher.max_length(shape) < length:
        patcher.set_max_length(shape, length)
    return shape


def build_contenders(
    shape: Any, asked: Iterable[Method], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """SDPA first, then the variants; they share the weights of one model. And those that refuse, with the reason."""
    base: Any = AutoModel.from_config(copy.deepcopy(shape), attn_implementation=SDPA)
    base = base.to(device, dtype).eval()
    models: dict[str, nn.Module] = {SDPA: base}
    left_out = {}
    for method in asked:
        try:
            models[method.name] = converted_copy(base, method).to(device).eval()  # type: ignore[arg-type]
        except RefusedError as error:  # a shape that the variant does not serve
            left_out[method.name] = str(error)
    return models, left_out


class Embeddings:
    """Input embeddings `[B, T, width]` of one length, the same at every call."""

    def __init__(self, shape: Any, length: int, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        # ELECTRA's embeddings may be narrower than its layers.
        width = getattr(shape, "embedding_size", None) or shape.hidden_size
        drawn = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0))
        self.length, self.tensor = length, drawn.to(device, dtype)


def _forward(model: nn.Module, data: Embeddings) -> None:
    with torch.no_grad():
        model(inputs_embeds=data.tensor)


def _step(model: nn.Module, data: Embeddings) -> None:
    """Forward and backward; the input has a gradient too, as inside a model."""
    tensor = data.tensor.detach().requires_grad_()
    model(inputs_embeds=tensor).last_hidden_state.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


WORK: dict[str, Callable[[nn.Module, Embeddings], None]] = {FORWARD: _forward, STEP: _step}


def take_turns(
    models: Mapping[str, nn.Module],
    data: Embeddings,
    work: Sequence[str],
    *,
    budget: float,
    repeats: int,
    on_step: Callable[[str, int], None] | None = None,
) -> tuple[Times, list[str]]:
    """Times of each contender and kind of work over rounds, the first of which is not kept; and who ran out of memory.

    Rounds are made until `budget` seconds are spent, as `time_interleaved` does.
    """
    failed: list[str] = []
    calls: dict[str, tuple[str, str]] = {f"{kind} {name}": (kind, name) for kind in work for name in models}

    def run(kind: str, name: str) -> None:
        if name in failed:
            return
        try:
            WORK[kind](models[name], data)
        except RuntimeError as error:
            if name == SDPA or not out_of_memory(error):
                raise
            failed.append(name)
            models[name].zero_grad(set_to_none=True)

    def tell(call: str) -> None:
        if on_step is not None and (name := calls[call][1]) not in failed:
            on_step(name, data.length)

    found = time_interleaved(
        {call: partial(run, *place) for call, place in calls.items()},
        repeats=repeats,
        seconds=budget,
        device=data.tensor.device,
        on_step=tell,
    )
    times = {name: {kind: found[f"{kind} {name}"] for kind in work} for name in models if name not in failed}
    return times, failed
