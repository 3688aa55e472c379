"""Very long inputs: each model reads them once, and what is kept of them for generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from hf_linear_attn.bench.speed.contenders import shaped_model, variant_reason
from hf_linear_attn.bench.speed.decode import cache_bytes
from hf_linear_attn.bench.speed.recipe import SDPA, BenchRecipe, LongBench, bench_methods
from hf_linear_attn.measure.methods import converted_copy, failures, not_measured
from hf_linear_attn.measure.profile import peak_memory
from hf_linear_attn.measure.rows import RowFile
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.cache import cache_keyword

__all__ = ["measure_long", "one_forward"]


def measure_long(
    recipe: BenchRecipe,
    part: LongBench,
    only: list[str] | None,
    file: RowFile,
    say: Callable[[str], None],
) -> Iterator[None]:
    """SDPA and the variants one after the other, length by length.

    Yields before each, so that the caller may stop.
    """
    device, dtype = torch.device(recipe.device), getattr(torch, recipe.dtype)
    methods = {method.name: method for method in bench_methods(recipe, part, only)}
    for length in part.lengths:
        place = {"kind": "long", "part": part.name, "mode": "forward", "length": length}
        names = [name for name in (SDPA, *methods) if not file.has(**place, contender=name)]
        if not names:
            continue
        model: Any = shaped_model(part, length)
        model.to(device, dtype)
        is_causal = get_patcher(model.config.model_type).is_causal(model.config)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(device)
        for name in names:
            yield
            row: dict[str, Any] = {**place, "contender": name}
            if name == SDPA:
                reason = _softmax_reason(part, length, file)
            else:
                method = methods[name]
                row |= {"key": method.key, "options": method.options, "state": method.spec.state}
                reason = variant_reason(recipe, method, length, is_causal)
            row |= reason
            if not reason:
                with failures(row):
                    reader: Any = model if name == SDPA else converted_copy(model, methods[name])
                    row |= one_forward(reader.to(device, dtype), ids, is_causal, device)
            file.append(row)
            say(_line(row))


def one_forward(model: nn.Module, ids: torch.Tensor, is_causal: bool, device: torch.device) -> dict[str, Any]:
    """Seconds, on a CPU also of all cores together, peak memory, and of a decoder the bytes that its cache holds."""
    cache = DynamicCache() if is_causal else None
    kwargs = {cache_keyword(model.forward): cache, "use_cache": True} if is_causal else {}

    def call() -> None:
        with torch.inference_mode():
            model(input_ids=ids, **kwargs)

    begin, begin_cores = time.perf_counter(), time.process_time()
    peak = peak_memory(call, device)  # waits for the device
    found = {"seconds": time.perf_counter() - begin, "peak_mb": round(peak.megabytes, 2)}
    if device.type == "cpu":  # what a machine that does other work too cannot change
        found["core_seconds"] = time.process_time() - begin_cores
    return found if cache is None else {**found, "cache_bytes": cache_bytes(cache)}


def _softmax_reason(part: LongBench, length: int, file: RowFile) -> dict[str, str]:
    """Why SDPA does not read this length; empty if it does."""
    same = [row for row in file.rows if (row["kind"], row["part"], row["contender"]) == ("long", part.name, SDPA)]
    shorter = [row for row in same if "seconds" in row and row["length"] < length]
    if not shorter:
        return {}
    last = max(shorter, key=lambda row: row["length"])
    seconds = last["seconds"] * (length / last["length"]) ** 2
    if seconds <= part.softmax_seconds:
        return {}
    guess = f"by its time at {last['length']:,} tokens it would take {seconds:,.0f} s"
    return {"left_out": f"{guess}, run up to {part.softmax_seconds:,} s"}


def _line(row: dict[str, Any]) -> str:
    place = f"{row['part']} {row['length']:>7,} {row['contender']}"
    if reason := not_measured(row):
        return f"{place}: {reason}"
    state = f", keeps {row['cache_bytes'] / 1e6:,.2f} MB" if "cache_bytes" in row else ""
    return f"{place}: {row['seconds']:,.1f} s, {row['peak_mb']:,.0f} MB{state}"
