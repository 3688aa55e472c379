"""Model cards of converted models, written from the model and from committed result files.

Nothing in a card is typed by hand: the conversion is read off the model, the measurements off a
`results.json` of `hf-linear-attn compare`. What was not measured is said not to be.

    python -m hf_linear_attn.model_card results.json card.md --row longformer
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from hf_linear_attn.config import LayerConfig, LinearAttentionConfig
from hf_linear_attn.registry import VARIANTS, get_patcher, get_variant
from hf_linear_attn.report import ConversionReport

__all__ = ["GENERATED_MARKER", "find_base_model", "known_license", "model_card", "write_model_card"]

GENERATED_MARKER = "<!-- Written by hf-linear-attn and rewritten by push_to_hub; to keep edits, remove this line. -->"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

# Suffix of a model class -> (Auto class, task of the Hub). The first that fits; the base model fits last.
HEADS = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForMultipleChoice": ("AutoModelForMultipleChoice", "multiple-choice"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForNextSentencePrediction": ("AutoModelForNextSentencePrediction", None),
    "ForPreTraining": ("AutoModelForPreTraining", None),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "Model": ("AutoModel", "feature-extraction"),
}
COSTS = [
    ("seconds per training step", "seconds_per_step", ""),
    ("training tokens per second", "tokens_per_second", ""),
    ("peak memory", "peak_memory_mb", " MB"),
    ("parameters trained", "parameters_trained", ""),
]


def model_card(
    model: PreTrainedModel,
    results: Mapping[str, Any] | str | Path | None = None,
    base_model: str | None = None,
    *,
    row: str | None = None,
    license: str | None = None,
    repo_id: str | None = None,
    tags: Sequence[str] = (),
    training: Mapping[str, Any] | None = None,
) -> ModelCard:
    """The card of a converted model.

    Args:
        model: a model that `convert_model` has converted.
        results: contents or path of a `results.json` of `hf-linear-attn compare`. None: "Not measured."
        base_model: Hub id of the checkpoint that was converted; by default the id the model was loaded from.
            A folder is not named in the card: it means nothing to a reader.
        row: name of this model's row in `results`; found by variant and options when None.
        license: license id of the Hub, e.g. "apache-2.0"; by default that of a base model in a local folder.
        repo_id: repository the card is for, used in the loading example.
        tags: more tags for the metadata.
        training: contents of the `train_result.json` that `hf-linear-attn train` left with the model.

    Raises:
        ValueError: if the model is not converted, or `results` has no row or several rows for it.
    """
    spec = getattr(model.config, "linear_attn", None)
    if spec is None:
        raise ValueError(f"{type(model).__name__} is not converted: run convert_model(model, ...) first.")
    conversion = LinearAttentionConfig.from_dict(spec)
    loaded = None if results is None else _load_results(results)
    family = model.config.base_model_type
    report: ConversionReport = model.conversion_report  # type: ignore[assignment]
    return _render(
        architecture=type(model).__name__,
        family=family,
        variants=conversion.variants(),
        layers=_layer_rows(conversion.layers),
        parameters_total=model.num_parameters(),
        parameters_added=report.new_parameters,
        max_length=report.max_length,
        extension=_extension(conversion),
        start=_measured_start(_errors(report, training)),
        stages=[] if training is None else _stage_rows(training["stages"]),
        base_model=base_model or find_base_model(model),
        license=license or known_license(model.name_or_path),
        repo_id=repo_id,
        tags=tags,
        is_causal=get_patcher(family).is_causal(model.config),
        command=None,
        results=loaded,
        row=None if loaded is None else _find_row(loaded, conversion.layers, row),
    )


def write_model_card(
    results_json: str | Path,
    path: str | Path,
    *,
    row: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    command: str | None = None,
) -> Path:
    """Write the card of one row of a `results.json` to `path`, without the model itself.

    Args:
        results_json: path of a `results.json` of `hf-linear-attn compare`.
        path: file to write.
        row: name of the row; by default the converted model with the highest primary metric.
        base_model: Hub id of the checkpoint that was converted; by default the one in the results, if any.
        license: license id of the Hub.
        command: the command that makes the card again, kept in it as a comment.

    Raises:
        ValueError: if there is no such row, or the row is not of a converted model.
    """
    results = _load_results(results_json)
    converted = [entry for entry in results["rows"] if entry["variant"] in VARIANTS]
    if not converted:
        raise ValueError(f"{results_json} has no row of a converted model: {_row_names(results)}.")
    metric = results["primary_metric"]
    if row is None:
        chosen = max(converted, key=lambda entry: entry["quality"][metric]["mean"])
    else:
        chosen = _named_row(results, row)
        if chosen not in converted:
            raise ValueError(f"Row {row!r} is not a converted model but {chosen['variant']!r}.")
    variant = chosen["variant"]
    card = _render(
        architecture=None,
        family=None,
        variants=[variant],
        layers=[_layer_row("converted layers", variant, LayerConfig(variant, chosen["options"]).options)],
        parameters_total=chosen["parameters_total"],
        parameters_added=chosen["parameters_added"],
        max_length=chosen["max_length"],
        # A bare name in the results may be one of the models that this package finds by itself, not a Hub id.
        base_model=base_model or (_hub_id(results["meta"]["model"]) if "/" in results["meta"]["model"] else None),
        license=license,
        repo_id=None,
        tags=(),
        extension=None,
        start=None,
        stages=[],
        is_causal=None,
        command=command,
        results=results,
        row=chosen,
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    card.save(target)
    return target


def find_base_model(model: PreTrainedModel) -> str | None:
    """Hub id of the checkpoint `model` was loaded from; None for a folder or a model built from a config."""
    return _hub_id(model.name_or_path)


def known_license(source: str | None, token: bool | str | None = None, *, online: bool = False) -> str | None:
    """License id in the card of a checkpoint: of a folder always, of a Hub id only when `online`.

    None where there is no card, no license in it, or no access: a missing license is no reason to fail.
    """
    if not source:  # built from a config; an empty path would be the current folder
        return None
    card: str | Path = Path(source) / "README.md" if Path(source).is_dir() else source
    if not (card.is_file() if isinstance(card, Path) else online and _hub_id(card)):
        return None
    try:
        data: Any = ModelCard.load(card, token=token, ignore_metadata_errors=True).data  # type: ignore[arg-type]
    except (OSError, ValueError):  # no access, no such repository or file, or a card that does not parse
        return None
    return data.license


def _render(
    *,
    architecture: str | None,
    family: str | None,
    variants: list[str],
    layers: list[dict[str, str]],
    base_model: str | None,
    license: str | None,
    repo_id: str | None,
    tags: Sequence[str],
    results: Mapping[str, Any] | None,
    row: Mapping[str, Any] | None,
    **facts: Any,
) -> ModelCard:
    head = next((head for suffix, head in HEADS.items() if (architecture or "").endswith(suffix)), None)
    auto_class, task = head or ("AutoModelForSequenceClassification", "text-classification")
    name = (repo_id or base_model or family or "model").split("/")[-1]
    title = name if repo_id else f"{name} with {', '.join(variants)} attention"
    data = ModelCardData(
        library_name="transformers",
        base_model=base_model,
        base_model_relation=None if base_model is None else "finetune",
        license=license,
        pipeline_tag=task,
        tags=["hf-linear-attn", "linear-attention", *variants, *tags],
        model_name=title,
        eval_results=None if results is None or row is None else _eval_results(results, row, task),
    )
    if data.eval_results is None:
        del data.model_name  # a name without a model-index is no field of the Hub
    specs = [get_variant(variant) for variant in variants]
    context: dict[str, Any] = {
        "meta": {},
        "task": {},
        "budget": {},
        "notes": [],
        "others": [],
        "baseline": None,
    }
    if results is not None and row is not None:
        baseline = next((entry for entry in results["rows"] if entry["name"] == results["baseline"]), None)
        context = {
            "meta": results["meta"],
            "task": results["task"],
            "budget": results["budget"],
            "notes": results["notes"],
            "others": results["baselines"],
            "primary_metric": results["primary_metric"],
            "baseline": None if baseline is row else baseline,
            "table": _comparison(row, None if baseline is row else baseline),
            "difference": _verdict(row["difference_to_baseline"]),
        }
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        marker=GENERATED_MARKER,
        architecture=architecture,
        family=family,
        base_model=base_model,
        repo_id=repo_id,
        auto_class=auto_class,
        variant_titles=" and ".join(spec.title for spec in specs),
        uses_global_mask=any(spec.uses_global_mask for spec in specs),
        layers=layers,
        row=row,
        **facts,
        **context,
    )


def _eval_results(results: Mapping[str, Any], row: Mapping[str, Any], task: str | None) -> list[EvalResult]:
    """One entry of the Hub's model-index for each metric of the row."""
    measured = results["task"]
    return [
        EvalResult(
            task_type=task or "text-classification",
            dataset_type=measured["name"],
            dataset_name=measured["name"] + (" (generated)" if measured["generated"] else ""),
            dataset_split="test",
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=value["mean"],
            metric_args={"interval_low": value["low"], "interval_high": value["high"]},
        )
        for metric, value in row["quality"].items()
        if value is not None
    ]


def _comparison(row: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> list[str]:
    """Markdown lines of the table of this row beside the baseline."""
    entries = [row] if baseline is None else [row, baseline]
    names = [f"{row['name']} (this model)", *(f"{entry['name']} (baseline)" for entry in entries[1:])]
    lines = [["", *names], ["---"] * (len(entries) + 1)]
    lines.append(["longest input read", *(f"{entry['max_length']:,} tokens" for entry in entries)])
    lines += [[metric, *(_interval(entry["quality"].get(metric)) for entry in entries)] for metric in row["quality"]]
    lines += [[label, *(_number(entry[key], unit) for entry in entries)] for label, key, unit in COSTS]
    return [f"| {' | '.join(line)} |" for line in lines]


def _layer_rows(layers: Sequence[Any]) -> list[dict[str, str]]:
    """Layers grouped by what they run, in order of first appearance."""
    groups: dict[str, tuple[Any, list[int]]] = {}
    for index, layer in enumerate(layers):
        key = "softmax" if layer is None else json.dumps([layer.variant, layer.options], sort_keys=True)
        groups.setdefault(key, (layer, []))[1].append(index)
    rows = []
    for layer, indices in groups.values():
        where = _ranges(indices)
        if layer is None:
            rows.append(
                {
                    "where": where,
                    "variant": "softmax",
                    "options": "",
                    "cost": "n^2 d",
                    "paper": "as in the checkpoint",
                }
            )
        else:
            rows.append(_layer_row(where, layer.variant, layer.options))
    return rows


def _layer_row(where: str, variant: str, options: Mapping[str, Any]) -> dict[str, str]:
    spec = get_variant(variant)
    text = ", ".join(f"`{name}={value!r}`" for name, value in options.items())
    return {
        "where": where,
        "variant": f"`{variant}`",
        "options": text,
        "cost": spec.cost,
        "paper": spec.paper,
    }


def _ranges(indices: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as "0-2, 5"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _extension(conversion: LinearAttentionConfig) -> str | None:
    """How the limit on positions was extended, None where it was left alone."""
    if conversion.positions is None:
        return None
    how = {
        "tile": "by repeating its position table",
        "interpolate": "by stretching its position table",
        "rotary": "without a change to its rotary embeddings",
    }
    length, mode = conversion.positions.original_max_length, conversion.positions.mode
    return f"the base model read {length:,}; extended {how[mode]}"


def _errors(report: ConversionReport, training: Mapping[str, Any] | None) -> list[float]:
    """Each layer's error that calibration measured: on this model, or before the training it comes from."""
    rows = [row.output_error for row in report.rows]
    if training is not None and training["conversion"] is not None:
        rows = [row["output_error"] for row in training["conversion"]["rows"]]
    return [error for error in rows if error is not None]


def _measured_start(errors: Sequence[float]) -> str | None:
    """The error against softmax that calibration measured, None where it was not run."""
    if not errors:
        return None
    return (
        f"Right after conversion, the output of a converted layer differed from softmax attention by "
        f"{min(errors):.2f} to {max(errors):.2f} of its norm, measured per layer on the calibration batches."
    )


def _stage_rows(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown rows of what each training stage did, and the loss it ended with."""
    rows = []
    for stage in stages:
        loss = f"{stage['losses'][-1][1]:.4g}" if stage["losses"] else "not recorded"
        numbers = [f"{stage[name]:,}" for name in ("parameters_trained", "steps", "tokens_seen", "max_length")]
        cells = [stage["stage"], stage["trained"], *numbers, f"{stage['seconds']:,.0f}", loss]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _load_results(results: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    if isinstance(results, Mapping):
        return results
    return json.loads(Path(results).read_text(encoding="utf-8"))


def _row_names(results: Mapping[str, Any]) -> str:
    return ", ".join(repr(entry["name"]) for entry in results["rows"])


def _named_row(results: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    rows = [entry for entry in results["rows"] if entry["name"] == name]
    if len(rows) != 1:
        raise ValueError(f"The results have {len(rows)} rows named {name!r}. Rows: {_row_names(results)}.")
    return rows[0]


def _find_row(results: Mapping[str, Any], layers: Sequence[Any], name: str | None) -> Mapping[str, Any]:
    """The row that was measured with the variant and options of `layers`."""
    if name is not None:
        return _named_row(results, name)
    converted = [layer for layer in layers if layer is not None]
    fitting = [
        entry
        for entry in results["rows"]
        if all(layer.variant == entry["variant"] and _agrees(layer.options, entry["options"]) for layer in converted)
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"{len(fitting)} rows of the results fit this model's variant and options; name one with row=. "
            f"Rows: {_row_names(results)}."
        )
    return fitting[0]


def _agrees(options: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether every option named in a row (defaults left out there) is what the layer runs."""
    return all(json.dumps(options[key]) == json.dumps(value) for key, value in asked.items() if key in options)


def _hub_id(name: str | None) -> str | None:
    """`name` if it can be an id on the Hub and is no path on this machine."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _interval(value: Mapping[str, float] | None, signed: bool = False) -> str:
    if value is None:
        return "not measured"
    sign = "+" if signed else ""
    return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.3g}{unit}" if isinstance(value, float) and value < 100 else f"{value:,.0f}{unit}"


def _verdict(difference: Mapping[str, float] | None) -> str:
    if difference is None:
        return "not measured."
    outcome = "the interval includes zero, so neither is shown to be better"
    if difference["low"] > 0:
        outcome = "better than the baseline, outside the interval"
    elif difference["high"] < 0:
        outcome = "worse than the baseline, outside the interval"
    return f"{_interval(difference, signed=True)}, {outcome}."


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m hf_linear_attn.model_card`."""
    parser = argparse.ArgumentParser(prog="python -m hf_linear_attn.model_card", description=write_model_card.__doc__)
    parser.add_argument("results", help="results.json of hf-linear-attn compare")
    parser.add_argument("path", help="card to write")
    parser.add_argument("--row", help="name of the row (default: the best converted model)")
    parser.add_argument("--base-model", help="Hub id of the checkpoint that was converted")
    parser.add_argument("--license", help="license id of the Hub, e.g. apache-2.0")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    path = write_model_card(
        options.results,
        options.path,
        row=options.row,
        base_model=options.base_model,
        license=options.license,
        command=f"python -m hf_linear_attn.model_card {shlex.join(arguments)}",
    )
    print(path)


if __name__ == "__main__":
    main()
