"""The commands about speed, and about what it is worth: `bench`, `advise` and `retrieval`."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_linear_attn.cli.arguments import (
    MODEL_HELP,
    Overwrite,
    check_output,
    check_output_file,
    names,
    need_extra,
    need_train_extra,
    numbers,
    plain_errors,
    read_device,
)
from hf_linear_attn.cli.commands import app, run_embedders
from hf_linear_attn.saving import write_json

__all__: list[str] = []

Variants = Annotated[str | None, typer.Option("--variants", help="Only these variants, as linear,longformer.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda.")]


@app.command("bench")
def bench_command(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe file, see recipes/bench (default: the one for the device).")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder for numbers, table and picture.")] = Path(
        "outputs/bench"
    ),
    device: Device = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads (default: the recipe's).")] = None,
    variants: Variants = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what was measured into this folder.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Count what layers make a GPU do, without one, instead of timing.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Speed and memory of everything, beside what else a user would run. Goes on where it was cut off.

    Models, single layers, other people's layers of the same methods, and generation, all taking turns. With --kernels
    launches, operators and bytes of each method that kernels serve, and what the kernels compile to (minutes).

    Examples:

        hf-linear-attn bench recipes/bench/smoke.yaml

        hf-linear-attn bench --kernels --variants linear
    """
    if kernels:
        with plain_errors():
            given = {"a recipe": recipe, "--device": device, "--threads": threads, "--fresh": fresh or None}
            if extra := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"--kernels measures nothing, so it takes no {extra[0].removeprefix('a ')}")
            _count_kernels(output, names(variants, "--variants"), overwrite)
        return
    with plain_errors():
        need_extra("bench", "bench", ("matplotlib", "yaml"))  # what it is compared with may be missing
        from hf_linear_attn.cli.bench_actions import load_bench_recipe, run_bench

        check_output(output, overwrite, resumes="*.rows.jsonl")
        only = names(variants, "--variants")
        command = " ".join(["hf-linear-attn", *sys.argv[1:]])
        loaded = load_bench_recipe(recipe, read_device(device), threads)
        results, table, pictures = run_bench(loaded, output, only, fresh, command, typer.echo)
    failed = [row for row in results["rows"] if "failure" in row]
    for row in failed:
        typer.echo(
            f"Failed: {row['contender']} ({row['part']}, {row['mode']}, n = {row['length']:,}): {row['failure']}"
        )
    typer.echo(f"Tables: {table}")
    for picture in pictures:
        typer.echo(f"Picture: {picture}")
    typer.echo(f"Numbers: {table.with_suffix('.json')}")
    # Too little memory is a result, and so is what other people's code cannot do.
    if any(row["kind"] != "peer" and "key" in row and row["failure"] != "out of memory" for row in failed):
        raise typer.Exit(code=1)


def _count_kernels(output: Path, only: list[str] | None, overwrite: bool) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError("--kernels compiles with Triton, the extra [triton], and it cannot be found")
    from hf_linear_attn.cli.bench_actions import count_kernels

    check_output(output, overwrite)
    table = count_kernels(output, only, " ".join(["hf-linear-attn", *sys.argv[1:]]), typer.echo)
    typer.echo(f"Tables: {table}")
    typer.echo(f"Numbers: {table.with_suffix('.json')}")


@app.command("retrieval")
def retrieval_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, as recipes/minilm/embedder.yaml.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for numbers, table and picture.")] = Path(
        "outputs/retrieval"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what was measured into this folder.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Long-document embedders: a passage finds the rest of its document. Goes on where it was cut off.

    The checkpoint truncated and in chunks beside converted and saved models that read thousands of tokens, with costs.

    Example:

        hf-linear-attn retrieval recipes/minilm/embedder.yaml
    """
    with plain_errors():
        need_train_extra("retrieval")
        check_output(output, overwrite, resumes="rows.jsonl")
        from hf_linear_attn.bench.retrieval.recipe import RetrievalRecipe

        run_embedders(RetrievalRecipe.from_yaml(recipe), output, fresh)


@app.command("advise")
def advise_command(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    length: Annotated[int, typer.Option("--length", help="Tokens of the documents that you have.")],
    variants: Variants = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences of a batch.")] = 1,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Further lengths to measure, as 512,1024 (default: halves).")
    ] = None,
    training: Annotated[bool, typer.Option(help="Time training steps as well.")] = True,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE|auto|none",
            help="Text to measure errors on: files (repeat it), one folder of .txt, auto (bundled documents) or none.",
        ),
    ] = None,
    data_documents: Annotated[
        int | None, typer.Option("--data-documents", min=2, help="How many of a folder's or the bundled (default: 4).")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="About how long the timing may take.")] = 90.0,
    device: Device = None,
    output: Annotated[Path | None, typer.Option("--output", help="A file for the numbers, as JSON.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file.")] = False,
) -> None:
    """Which variant pays on this machine at a length, how close it starts to the checkpoint, and what to run next.

    Layers of the model's shape are timed, softmax and variants taking turns; then each variant's calibrated start is
    measured on your documents, half of them to choose it on.

    Examples:

        hf-linear-attn advise minilm --length 2048

        hf-linear-attn advise minilm --length 4096 --data my_texts --no-training
    """
    with plain_errors():
        from hf_linear_attn.advise.run import advise, format_advice
        from hf_linear_attn.cli.calibration_texts import AUTO, NONE, CalibrationTexts

        if output is not None:
            check_output_file(output, overwrite)
        words = data or [AUTO if importlib.util.find_spec("datasets") else NONE]  # of the extra [train]
        texts = CalibrationTexts(words, data_documents, command="advise", flag="--data")
        advice = advise(
            model,
            length,
            variants=names(variants, "--variants"),
            batch_size=batch_size,
            lengths=numbers(lengths, "--lengths"),
            training=training,
            device=read_device(device),
            budget_seconds=seconds,
            documents=texts.batches if texts.wanted else None,
        )
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_json(output, advice.to_dict())
    typer.echo(format_advice(advice, " ".join(f"--calibration {shlex.quote(word)}" for word in words)))
    if texts.wanted:
        typer.echo(f"Errors on {texts}")
    if output is not None:
        typer.echo(f"Numbers: {output}")
