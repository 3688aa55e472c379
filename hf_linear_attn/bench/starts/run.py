"""Every method on real layers: how far each start is from softmax, and what a forward costs.

One run, decided by a recipe (`recipes/methods/`), writes one line a row as soon as it is measured: a run that is cut
off goes on where it stopped. `hf_linear_attn.bench.starts.tables` makes tables of it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_linear_attn.analysis.recordings import (
    build_layers,
    choose_start,
    document_batches,
    load_model,
    record_layers,
)
from hf_linear_attn.bench.starts.recipe import (
    CostsRecipe,
    MethodsRecipe,
    ModelRecipe,
    Yardstick,
    chosen_methods,
    leading_methods,
)
from hf_linear_attn.calibration import Recording, output_errors, regress_layers
from hf_linear_attn.data import load_documents, load_tokenizer
from hf_linear_attn.measure.methods import Method, RefusedError, converted_copy, failures, not_measured
from hf_linear_attn.measure.profile import forward_time_against_length, peak_memory
from hf_linear_attn.measure.rows import RowFile, about_machine
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.variants.base import AttentionVariant

__all__ = ["RowFile", "measure_methods"]

_TIMED_TOGETHER = 6  # methods that take turns with SDPA; so many are in memory at once, and lost by an interruption


def measure_methods(
    recipe: MethodsRecipe,
    output: Path,
    *,
    only: list[str] | None = None,
    command: str = "",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure what `output/rows.jsonl` does not hold yet.

    Args:
        recipe: what to measure.
        output: folder of the rows.
        only: keys of the variants to measure; all registered ones by default.
        command: what to write down as the command that made it.
        say: called with a line about each row.

    Returns:
        `{"meta": {...}, "recipe": {...}, "methods": [...], "rows": [...]}`. A method that raised has a row with its
        `failure`; it is tried again by the next run.

    Raises:
        ValueError: for an unknown variant or option, or rows measured under another setting.
    """
    methods = chosen_methods(recipe, only)
    leading = leading_methods(methods)
    file = RowFile(output / "rows.jsonl", recipe.setting())
    for model in recipe.models:
        for length in model.lengths:
            fitted = methods if recipe.regression is not None and recipe.regression.all_options else leading
            _measure_starts(recipe, model, length, methods, fitted, file, say)
    for model in recipe.models if recipe.costs is not None else ():
        for length in recipe.costs.lengths:  # type: ignore[union-attr]
            _measure_costs(recipe.costs, model.name, length, leading, file, say)  # type: ignore[arg-type]
    names = {method.name for method in methods}
    return {
        "meta": about_machine(command),
        "recipe": asdict(recipe),
        "methods": [{"name": m.name, "key": m.key, "options": m.options, "leading": m in leading} for m in methods],
        "rows": [row for row in file.rows if row["method"] in names],
    }


# ---------------------------------------------------------------------------------------------------------------
# Starts
# ---------------------------------------------------------------------------------------------------------------


def _measure_starts(
    recipe: MethodsRecipe,
    where: ModelRecipe,
    length: int,
    methods: list[Method],
    fitted: list[Method],
    file: RowFile,
    say: Callable[[str], None],
) -> None:
    """All methods on one model at one length, for every seed, on the same recorded layers."""
    place: dict[str, Any] = {"kind": "start", "model": where.name, "length": length}
    model = None
    for seed in recipe.seeds:
        if all(file.has(**place, seed=seed, method=method.name) for method in methods):
            continue
        if model is None:
            model, tokenizer = load_model(where.name, max_length=length), load_tokenizer(where.name)
            causal = get_patcher(model.config.model_type).is_causal(model.config)
        task = load_documents(recipe.documents.source, task="text", seed=seed)
        recorded = []
        wanted = ((task.train, recipe.documents.calibration_tokens), (task.test, recipe.documents.test_tokens))
        for part, tokens in wanted:
            batches = document_batches(part["text"], tokenizer, length, max(1, tokens // length), seed)
            recorded.append(record_layers(model, batches, where.layers))
        steps = 0
        if recipe.regression and length in recipe.regression.lengths and seed in recipe.regression.seeds:
            steps = recipe.regression.steps
        for method in methods:
            identity = {**place, "seed": seed, "method": method.name}
            if file.has(**identity):
                continue
            begin = time.perf_counter()
            row = {**identity, "key": method.key, "options": method.options}
            if not method.serves(causal):
                row["refused"] = method.spec.refusal
            elif method.quadratic() and length > recipe.quadratic_up_to:
                row["left_out"] = "quadratic"
            else:
                with failures(row):
                    fit = steps if method in fitted and not method.quadratic() else 0
                    row |= _starts(model, method, seed, length, *recorded, steps=fit)
            row["seconds"] = round(time.perf_counter() - begin, 2)
            file.append(row)
            say(_line(row))


def _starts(
    model: Any,
    method: Method,
    seed: int,
    length: int,
    calibration: Mapping[int, Recording],
    test: Mapping[int, Recording],
    *,
    steps: int,
) -> dict[str, Any]:
    """Errors of one method: as published, calibrated, and after the regression."""
    if isinstance(method, Yardstick):
        return {"published": _errors(dict.fromkeys(test, _uniform), test), "calibrated": None, "regressed": None}
    try:
        built = build_layers(model, method.key, method.seeded(seed), test, max_length=length)
    except ValueError as error:  # the options themselves were checked when the recipe was read
        raise RefusedError(str(error)) from error
    row: dict[str, Any] = {"published": _errors(built, test), "calibrated": None, "regressed": None}
    if any(type(variant).calibrate is not AttentionVariant.calibrate for variant in built.values()):
        begin = time.perf_counter()
        for layer, variant in built.items():
            choose_start(variant, calibration[layer])
        row["calibration_seconds"] = round((time.perf_counter() - begin) / len(built), 3)
        row["calibrated"] = _errors(built, test)
    if steps and any(True for variant in built.values() for _ in variant.parameters()):
        begin = time.perf_counter()
        regress_layers(built, calibration, steps)
        row["regression_seconds"] = round((time.perf_counter() - begin) / len(built), 3)
        row["regressed"] = _errors(built, test)
    own = {id(parameter): parameter.numel() for variant in built.values() for parameter in variant.parameters()}
    row["parameters"] = sum(own.values())
    row["chosen"] = {str(layer): variant.chosen() for layer, variant in built.items() if variant.chosen()}
    return row


def _uniform(inputs: Any) -> tuple[torch.Tensor, None]:
    """Every key gets the same weight: what a method must beat."""
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(inputs.query * 0, inputs.key, inputs.value, is_causal=inputs.is_causal), None


def _errors(built: Mapping[int, Any], test: Mapping[int, Recording]) -> dict[str, Any]:
    layers = {layer: output_errors(variant, test[layer]) for layer, variant in built.items()}
    return {
        "error": sum(layer.error for layer in layers.values()) / len(layers),
        "cosine": sum(layer.cosine for layer in layers.values()) / len(layers),
        "layers": {str(index): [round(layer.error, 5), round(layer.cosine, 5)] for index, layer in layers.items()},
    }


# ---------------------------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------------------------


def _measure_costs(
    costs: CostsRecipe, name: str, length: int, methods: list[Method], file: RowFile, say: Callable[[str], None]
) -> None:
    """Time a forward of each method's model and of SDPA, taking turns, and measure its peak memory."""
    place: dict[str, Any] = {"kind": "cost", "model": name, "length": length}
    missing = [m for m in methods if not isinstance(m, Yardstick) and not file.has(**place, method=m.name)]
    if not missing:
        return
    sdpa: Any = load_model(name, max_length=length, num_layers=costs.layers)
    patcher = get_patcher(sdpa.config.model_type)
    causal = patcher.is_causal(sdpa.config)
    patcher.set_max_length(sdpa.config, length)
    for group in (missing[i : i + _TIMED_TOGETHER] for i in range(0, len(missing), _TIMED_TOGETHER)):
        models, rows = {"sdpa": sdpa}, {}
        for method in group:
            row = rows[method.name] = {**place, "method": method.name, "key": method.key, "options": method.options}
            if not method.serves(causal):
                row["refused"] = method.spec.refusal
            elif method.quadratic() and length > costs.quadratic_up_to:
                row["left_out"] = "quadratic"
            else:
                with failures(row):
                    models[method.name] = converted_copy(sdpa, method)
        peaks = {}
        ids = torch.randint(sdpa.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        for label, model in models.items():
            with failures(rows.get(label, {})), torch.inference_mode():
                model(input_ids=ids[:, :64])  # what is made on first use is not the forward's
                peaks[label] = peak_memory(partial(model, input_ids=ids)).megabytes
        able = {label: model for label, model in models.items() if label in peaks}
        timed = forward_time_against_length(able, [length], repeats=costs.repeats, warmup=0)
        seconds = {entry.name: entry.seconds for entry in timed}
        for label, row in rows.items():
            if label in seconds:
                row |= {
                    "seconds": seconds[label],
                    "sdpa_seconds": seconds["sdpa"],
                    "ratio": seconds["sdpa"] / seconds[label],
                    "peak_mb": round(peaks[label], 1),
                    "sdpa_peak_mb": round(peaks["sdpa"], 1),
                }
            file.append(row)
            say(_line(row))
        del models, able
        gc.collect()


def _line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    place = f"{row['model']} {row['length']:>5,} " + (f"seed {row['seed']} " if "seed" in row else "cost   ")
    if reason := not_measured(row):
        return f"{place} {row['method']}: {reason}"
    if row["kind"] == "cost":
        return f"{place} {row['method']}: {row['seconds']:.3f} s, {row['ratio']:.2f}x SDPA, {row['peak_mb']:.0f} MB"
    stages = [row[stage] for stage in ("published", "calibrated", "regressed") if row.get(stage)]
    errors = " -> ".join(f"{stage['error']:.3f}" for stage in stages)
    return f"{place} {row['method']}: error {errors} ({row['seconds']:.1f} s)"
