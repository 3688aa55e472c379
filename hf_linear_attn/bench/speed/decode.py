"""Generation token by token after contexts of several lengths: tokens a second, and bytes of the cache."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from hf_linear_attn.bench.speed.contenders import TOGETHER, shaped_model, variant_reason
from hf_linear_attn.bench.speed.recipe import SDPA, BenchRecipe, DecodeBench, bench_methods
from hf_linear_attn.measure.methods import Method, converted_copy, failures, not_measured
from hf_linear_attn.measure.profile import median_ratio, time_interleaved
from hf_linear_attn.measure.rows import RowFile
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.cache import cache_keyword

__all__ = ["cache_bytes", "measure_decode"]

_WARMUP = 3


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes that a cache holds on to: the storages of all its tensors, each once."""
    storages = {}
    for layer in cache.layers:
        for tensor in _tensors(vars(layer)):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)


class _Session:
    """One model in the middle of a text."""

    def __init__(self, model: nn.Module, context: torch.Tensor) -> None:
        self._model: Any = model
        self.cache = DynamicCache()
        self._kwargs = {cache_keyword(self._model.forward): self.cache, "use_cache": True}
        with torch.inference_mode():
            self._model(input_ids=context, **self._kwargs)
        self.bytes = cache_bytes(self.cache)
        self._token = context[:, -1:]

    def step(self) -> None:
        """One more token."""
        with torch.inference_mode():
            self._model(input_ids=self._token, **self._kwargs)


def measure_decode(
    recipe: BenchRecipe,
    part: DecodeBench,
    only: list[str] | None,
    file: RowFile,
    say: Callable[[str], None],
) -> Iterator[None]:
    """Softmax attention (SDPA with a growing cache) and the variants, every context of each taking turns.

    Yields before each group of variants, so that the caller may stop.

    Raises:
        ValueError: for a model that is no decoder.
    """
    place: dict[str, Any] = {"kind": "decode", "part": part.name, "mode": "decode"}
    methods = [
        method
        for method in bench_methods(recipe, part, only)
        if not all(file.has(**place, contender=method.name, length=context) for context in part.contexts)
    ]
    new = not all(file.has(**place, contender=SDPA, length=context) for context in part.contexts)
    if not methods and not new:
        return
    device, dtype = torch.device(recipe.device), getattr(torch, recipe.dtype)
    # Tokens that SDPA generates in every group are added to its contexts: little beside them.
    room = max(part.contexts) + 2 * (part.tokens + _WARMUP) * (len(methods) // TOGETHER + 2)
    model: Any = shaped_model(part, room)
    model.to(device, dtype)
    if not get_patcher(model.config.model_type).is_causal(model.config):
        raise ValueError(f"decode {part.name!r} needs a decoder; {type(model).__name__} is an encoder.")
    generator = torch.Generator().manual_seed(0)
    size = (part.batch_size, max(part.contexts))
    ids = torch.randint(model.config.vocab_size, size, generator=generator).to(device)
    softmax = {context: _Session(model, ids[:, :context]) for context in part.contexts}
    for start in range(0, max(len(methods), 1), TOGETHER):
        yield
        group = methods[start : start + TOGETHER]
        rows, sessions = _open(recipe, part, model, group, ids)
        sessions |= {(SDPA, context): session for context, session in softmax.items()}
        steps = {f"{name} {context}": session.step for (name, context), session in sessions.items()}
        times = time_interleaved(
            steps,
            repeats=part.tokens,
            warmup=_WARMUP,
            device=device,
            # A token that is not timed: the one before it was another contender's, which left its own cache behind.
            before=lambda name, steps=steps: steps[name](),  # type: ignore[misc]
        )
        if new and start == 0:
            rows = {(SDPA, context): {} for context in part.contexts} | rows
        for (name, context), row in rows.items():
            if (name, context) in sessions:
                own, reference = times[f"{name} {context}"], times[f"{SDPA} {context}"]
                seconds = statistics.median(own)
                row |= {
                    "seconds": seconds,
                    "tokens_per_second": part.batch_size / seconds,
                    "cache_bytes": sessions[name, context].bytes,
                    "sdpa_seconds": statistics.median(reference),
                    "ratio": median_ratio(reference, own),
                }
            if file.has(**place, contender=name, length=context):
                continue
            entry = {**place, "length": context, "contender": name, **row}
            file.append(entry)
            say(_line(entry))
        sessions.clear()
        gc.collect()


def _open(
    recipe: BenchRecipe,
    part: DecodeBench,
    model: Any,
    group: list[Method],
    ids: torch.Tensor,
) -> tuple[dict[tuple[str, int], dict[str, Any]], dict[tuple[str, int], _Session]]:
    """A session of every method at every context; (method, context) to its row, and to its session if there is one."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    sessions = {}
    for method in group:
        for context in part.contexts:
            facts = {"key": method.key, "options": method.options, "state": method.spec.state}
            row = rows[method.name, context] = {**facts, **variant_reason(recipe, method, context, is_causal=True)}
            if row.keys() == facts.keys():
                with failures(row):
                    sessions[method.name, context] = _Session(converted_copy(model, method), ids[:, :context])
    return rows, sessions


def _line(row: dict[str, Any]) -> str:
    place = f"{row['part']} decode {row['length']:>6,} {row['contender']}"
    if reason := not_measured(row):
        return f"{place}: {reason}"
    speed, size = row["tokens_per_second"], row["cache_bytes"]
    return f"{place}: {speed:.1f} tokens/s, {row['ratio']:.2f}x SDPA, cache {size / 1e6:,.2f} MB"
