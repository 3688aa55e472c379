"""What the measuring commands call: load, measure, draw, save. No terminal here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_linear_attn.saving import to_json, write_json

if TYPE_CHECKING:
    from hf_linear_attn.bench.starts.recipe import MethodsRecipe
    from hf_linear_attn.data import DocumentTask
    from hf_linear_attn.report import ConversionReport, OutputErrors
    from hf_linear_attn.training.recipe import DataRecipe
    from hf_linear_attn.training.saved import Evaluation

__all__ = ["Documents", "analyze_model", "analyze_passages", "report_model", "run_evaluation", "run_methods"]


@dataclass(frozen=True)
class Documents:
    """Real text to measure on: errors on the test part, starts chosen on the training part.

    Attributes:
        source: as `hf_linear_attn.data.load_documents` takes it.
        length: tokens of a document.
        test: documents to measure on.
        calibration: documents to choose starts on; 0 for published starts.
        seed: of the split and the choice.
    """

    source: str
    length: int
    test: int
    calibration: int
    seed: int = 0

    @cached_property
    def task(self) -> DocumentTask:
        """The documents themselves."""
        from hf_linear_attn.data import load_documents

        return load_documents(self.source, task="text", seed=self.seed)

    def batches(self, tokenizer: Any, length: int | None = None) -> tuple[list[Any], list[Any]]:
        """Batches for calibration and for measuring, one document each."""
        from hf_linear_attn.analysis.recordings import document_batches

        parts = ((self.task.train, self.calibration), (self.task.test, self.test))
        calibration, test = (
            document_batches(part["text"], tokenizer, length or self.length, count, self.seed) for part, count in parts
        )
        return calibration, test

    def __str__(self) -> str:
        return f"{_count(self.test)} of {self.length:,} tokens ({self.task.name})"


def _count(documents: int) -> str:
    return f"{documents} document" + ("" if documents == 1 else "s")


def report_model(
    name: str,
    variant: str | None,
    output: Path,
    *,
    options: dict[str, Any],
    documents: Documents,
    layers: list[int] | None,
) -> dict[str, ConversionReport]:
    """Measure a converted model, or a conversion in memory, head by head; writes report.json and report.png.

    Returns:
        stage ("as it is"; or "as published" and "calibrated") -> its report.

    Raises:
        ValueError: for a variant named for a converted model, or none for a checkpoint.
    """
    from hf_linear_attn.analysis.pictures import draw_heads
    from hf_linear_attn.analysis.recordings import (
        choose_start,
        installed_layers,
        load_model,
        record_layers,
    )
    from hf_linear_attn.auto import LinearAttnPreTrainedModel
    from hf_linear_attn.calibration import output_errors
    from hf_linear_attn.cli.actions import check_options
    from hf_linear_attn.convert import convert_model
    from hf_linear_attn.data import load_tokenizer
    from hf_linear_attn.report import describe

    if variant is not None:
        check_options(variant, options)
    model: Any = load_model(name, max_length=documents.length)
    converted = isinstance(model, LinearAttnPreTrainedModel)
    if converted and (variant is not None or options or layers is not None):
        raise ValueError(f"{name} is a converted model: leave --variant, --option and --layers away.")
    if not converted:
        if variant is None:
            raise ValueError(f"{name} is not converted: name what to convert it to, --variant KEY.")
        convert_model(model, variant, layers=layers, **options)
    calibration, test = documents.batches(load_tokenizer(name))
    recordings = record_layers(model, test)
    installed = installed_layers(model)

    def measure() -> dict[int, OutputErrors]:
        return {layer: output_errors(module, recordings[layer]) for layer, module in installed.items()}

    errors = {"as it is" if converted else "as published": measure()}
    if calibration and not converted:
        for layer, recording in record_layers(model, calibration).items():
            choose_start(installed[layer], recording)
        errors["calibrated"] = measure()
    reports = {stage: describe(model, found) for stage, found in errors.items()}
    output.mkdir(parents=True, exist_ok=True)
    what = ", ".join(
        dict.fromkeys(row.variant for row in next(iter(reports.values())).rows if row.variant != "softmax")
    )
    calibrated = f", calibrated on {_count(len(calibration))} of other groups" if len(reports) > 1 else ""
    draw_heads(
        errors,
        output / "report.png",
        title=f"{what} in {Path(name).name}: output error of every head against softmax",
        subtitle=f"measured on {documents}{calibrated}",
    )
    data = {
        "model": name,
        "variant": variant,
        "options": options,
        "documents": asdict(documents),
        "reports": {stage: report.to_dict() for stage, report in reports.items()},
    }
    write_json(output / "report.json", data)
    return reports


def analyze_model(
    name: str,
    output: Path,
    *,
    documents: Documents,
    methods: Sequence[str] | None,
    layers: list[int] | None,
    pattern_tokens: int,
) -> dict[str, Any]:
    """Spectrum, error against size and patterns; writes analysis.json, spectrum.png, sizes.png, patterns_layer_<i>.png.

    A converted model is analyzed as the checkpoint that it was. Sizes and patterns are measured on `layers`; by default
    on the first, the middle and the last.
    """
    from hf_linear_attn.analysis import pictures
    from hf_linear_attn.analysis import spectrum as analysis
    from hf_linear_attn.analysis.recordings import record_layers
    from hf_linear_attn.data import load_tokenizer
    from hf_linear_attn.registry import get_patcher, get_variant, list_variants

    pattern_tokens = min(pattern_tokens, documents.length)
    model = _softmax_model(name, documents.length)
    patcher: Any = get_patcher(model.config.model_type)
    causal = patcher.is_causal(model.config)
    able = list_variants(decoder=True) if causal else list_variants(encoder=True)
    for key in methods or ():
        if get_variant(key).key not in able:
            raise ValueError(
                f"{key!r} does not serve {'decoders' if causal else 'encoders'}: {get_variant(key).refusal}"
            )
    keys = able if methods is None else list(methods)
    last = model.config.num_hidden_layers - 1
    chosen = sorted({0, (last + 1) // 2, last}) if layers is None else layers
    if wrong := [layer for layer in chosen if not 0 <= layer <= last]:
        raise ValueError(f"--layers has {wrong}; {name} has layers 0 to {last}.")
    tokenizer = load_tokenizer(name)
    short_name = Path(name).name
    on_layers = "layers " + ", ".join(map(str, chosen))

    spectrum = {
        layer: analysis.attention_spectrum(recording).tolist()
        for layer, recording in record_layers(model, documents.batches(tokenizer)[1]).items()
    }
    output.mkdir(parents=True, exist_ok=True)
    pictures.draw_spectrum(
        spectrum,
        output / "spectrum.png",
        title=f"Spectrum of softmax attention in {short_name}",
        subtitle=f"cumulative singular values, mean over {documents}",
    )

    def recordings(length: int) -> tuple[Any, Any]:
        calibration, test = documents.batches(tokenizer, length)
        return (record_layers(model, calibration, chosen) if calibration else None), record_layers(model, test, chosen)

    lengths = [n for n in (documents.length // 4, documents.length // 2, documents.length) if n >= 16]
    at_length = {length: recordings(length) for length in lengths}
    bound = analysis.linformer_bound(patcher.head_dim(model.config))
    curves = []
    for key in keys:
        option = analysis.size_option(key)
        if option is not None:
            rows = analysis.error_against_size(
                model,
                key,
                option,
                analysis.SIZE_OPTIONS[option],
                {length: pair[1] for length, pair in at_length.items()},
                {length: pair[0] for length, pair in at_length.items()} if documents.calibration else None,
            )
            if rows:
                curves.append({"method": key, "option": option, "rows": [row.to_dict() for row in rows]})
    start = "calibrated" if documents.calibration else "published"
    if curves:
        pictures.draw_sizes(
            curves,
            output / "sizes.png",
            bound=bound,
            title=f"Error against size in {short_name}: where curves of all lengths meet, that quantity decides",
            subtitle=f"relative output error against softmax, {start} starts, mean over {on_layers}; "
            f"{_count(documents.test)} at each length ({documents.task.name})",
        )

    for path in output.glob("patterns_layer_*.png"):  # of an earlier run on other layers
        path.unlink()
    patterns = _patterns(model, keys, *recordings(pattern_tokens), tokens=pattern_tokens)
    for (layer, head), matrices in patterns.items():
        pictures.draw_patterns(
            matrices,
            output / f"patterns_layer_{layer}.png",
            title=f"Who looks at whom in {short_name}: layer {layer}, head {head} (its most selective one)",
            subtitle=f"first {pattern_tokens} tokens of a document ({documents.task.name}); {start} starts, "
            f"windows, slots and the like of at most {pattern_tokens // 3}",
        )
    result = {
        "model": name,
        "documents": asdict(documents),
        "spectrum": {layer: [[round(v, 5) for v in head] for head in heads] for layer, heads in spectrum.items()},
        "d_ln_d": bound,
        "sizes": {"layers": chosen, "start": start, "methods": curves},
    }
    write_json(output / "analysis.json", result)
    return result


def analyze_passages(
    name: str, output: Path, *, documents: Documents, passages: int, command: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """The spectrum alone, over so many passages of all documents; writes analysis.json and spectrum.png.

    Raises:
        ValueError: if the documents have fewer passages.
    """
    from hf_linear_attn.analysis.pictures import draw_spectrum
    from hf_linear_attn.analysis.recordings import passage_batches
    from hf_linear_attn.analysis.spectrum import linformer_bound, passage_spectrum
    from hf_linear_attn.data import load_tokenizer
    from hf_linear_attn.measure.rows import about_machine
    from hf_linear_attn.registry import get_patcher

    model, task, length = _softmax_model(name, documents.length), documents.task, documents.length
    patcher: Any = get_patcher(model.config.model_type)
    texts = [*task.train["text"], *task.test["text"]]
    batches = passage_batches(texts, load_tokenizer(name), length, passages, documents.seed)

    spectrum = {
        layer: curves.tolist()
        for layer, curves in passage_spectrum(model, batches, lambda n: say(f"{n:,} of {passages:,} passages")).items()
    }
    output.mkdir(parents=True, exist_ok=True)
    draw_spectrum(
        spectrum,
        output / "spectrum.png",
        title=f"Spectrum of softmax attention in {Path(name).name}",
        subtitle=f"cumulative singular values, mean over {passages:,} passages of {length:,} tokens ({task.name})",
    )
    result = {
        "meta": about_machine(command),
        "model": name,
        "documents": {"source": documents.source, "name": task.name, "length": length, "seed": documents.seed},
        "passages": passages,
        "spectrum": {layer: [[round(v, 5) for v in head] for head in heads] for layer, heads in spectrum.items()},
        "d_ln_d": linformer_bound(patcher.head_dim(model.config)),
    }
    write_json(output / "analysis.json", result)
    return result


def _softmax_model(name: str, length: int) -> Any:
    """A checkpoint that reads so many tokens; of a converted model, the checkpoint that it was."""
    from hf_linear_attn.analysis.recordings import load_model
    from hf_linear_attn.auto import LinearAttnPreTrainedModel
    from hf_linear_attn.convert import revert_model

    model: Any = load_model(name, max_length=length)
    converted = isinstance(model, LinearAttnPreTrainedModel)
    if converted:
        revert_model(model, keep_positions=True)
    return model


def _patterns(
    model: Any, keys: Iterable[str], calibration: Any, test: Any, *, tokens: int
) -> dict[tuple[int, int], dict[str, Any]]:
    """(layer, head) -> method -> matrix, for the head of each layer whose softmax rows have the least entropy."""
    from hf_linear_attn.analysis import spectrum as analysis
    from hf_linear_attn.analysis.recordings import build_layers, choose_start

    patterns: dict[tuple[int, int], dict[str, Any]] = {}
    for layer, recording in test.items():
        weights = analysis.softmax_weights(recording.inputs[0])[0]
        entropy = -(weights * weights.clamp(min=1e-12).log()).sum(-1).mean(-1)  # [H]
        head = int(entropy.argmin())
        patterns[layer, head] = {"softmax": weights[head].numpy()}
    for key in keys:
        built = build_layers(model, key, analysis.small_size(key, tokens // 3), test, max_length=tokens)
        for (layer, head), matrices in patterns.items():
            if calibration is not None:
                choose_start(built[layer], calibration[layer])
            matrices[key] = analysis.effective_attention(built[layer], test[layer].inputs[0])[0, head].numpy()
    return patterns


def run_methods(recipe: MethodsRecipe, output: Path, only: list[str] | None, command: str, say: Any) -> dict[str, Any]:
    """Measure what is missing and write methods.json, methods.md and methods.png beside the rows."""
    from hf_linear_attn.bench.starts.pictures import draw_starts
    from hf_linear_attn.bench.starts.run import measure_methods
    from hf_linear_attn.bench.starts.tables import render_methods

    results = measure_methods(recipe, output, only=only, command=command, say=say)
    write_json(output / "methods.json", results)
    (output / "methods.md").write_text(render_methods(results), encoding="utf-8")
    draw_starts(results, output / "methods.png")
    return results


def run_evaluation(
    name: str,
    data: DataRecipe,
    part: str,
    *,
    output: Path | None,
    predictions: Path | None,
    command: str,
    **options: Any,
) -> Evaluation | None:
    """Measure a saved model on documents, with the options of `evaluate_model`; writes JSON to `output`, and to
    `predictions` a line of JSON for each document.

    Returns:
        what was measured, on the main process; None on the others.

    Raises:
        ValueError: see `read_saved` and `evaluate_model`; or for `predictions` of a masked language model.
    """
    from hf_linear_attn.measure.rows import about_machine
    from hf_linear_attn.training.saved import evaluate_model, read_saved
    from hf_linear_attn.training.setup import process_state, reuse_freed_memory

    reuse_freed_memory()
    saved = read_saved(name)
    if predictions is not None and saved.auto == "AutoModelForMaskedLM":
        raise ValueError(
            f"{name!r} is a masked language model, which has no prediction for a document: no --predictions"
        )
    found = evaluate_model(saved, data, part=part, **options)
    state = process_state()
    main = state.is_main_process
    state.destroy_process_group()
    if not main:
        return None
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        about = {"meta": about_machine(command), "data": {**asdict(data), "part": part}}
        write_json(output, {**about, **found.to_dict()})
    if predictions is not None:
        predictions.parent.mkdir(parents=True, exist_ok=True)
        predictions.write_text("".join(to_json(row) + "\n" for row in found.rows()), encoding="utf-8")
    return found
