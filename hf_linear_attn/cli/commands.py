"""The commands. Everything heavy is imported inside the command that needs it, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_linear_attn.cli.arguments import (
    MODEL_HELP,
    Options,
    Overwrite,
    check_output,
    layers_or_auto,
    names,
    need_train_extra,
    pairs,
    plain_errors,
    shipped_recipe,
)

if TYPE_CHECKING:
    from hf_linear_attn.bench.retrieval.recipe import RetrievalRecipe
    from hf_linear_attn.training.recipe import Recipe

__all__ = ["app", "run_embedders"]

app = typer.Typer(
    name="hf-linear-attn",
    help="Rewrite the attention of pretrained Transformers models, train the quality back, measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Change a key of the recipe or of a stage, however deep: distill.lora.r=4. Repeatable.",
    ),
]


@app.command("list")
def list_command(
    variant: Annotated[str | None, typer.Argument(help="A variant to say everything about.")] = None,
) -> None:
    """List the attention variants and the model families, or everything about one variant.

    Examples:

        hf-linear-attn list

        hf-linear-attn list longformer
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from hf_linear_attn.cli.listing import all_facts, by_kind, short_facts
    from hf_linear_attn.registry import KINDS, get_variant, list_patchers, list_variants

    console = Console()
    if variant is not None:
        with plain_errors():
            spec = get_variant(variant)
        facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in all_facts(spec).items():
            facts.add_row(f"[bold]{name}", escape(value))
        console.print(facts)
        return
    width = max(map(len, list_variants()))
    for kind, specs in by_kind(get_variant(key) for key in list_variants()).items():
        console.print(f"[bold]{kind}[/bold]: a token reads {KINDS[kind]}" if kind in KINDS else f"[bold]{kind}")
        table = Table(show_header=False, box=None, padding=(0, 0, 1, 2))
        table.add_column(no_wrap=True, min_width=width)
        for spec in specs:
            table.add_row(*map(escape, [spec.key, short_facts(spec)]))
        console.print(table)
    console.print(f"Model families: {', '.join(list_patchers())}")


@app.command("convert")
def convert_command(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    variant: Annotated[str, typer.Argument(help="An attention variant, see `hf-linear-attn list`.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the converted model and its tokenizer.")],
    option: Options = None,
    max_length: Annotated[int | None, typer.Option("--max-length", min=1, help="New limit in tokens.")] = None,
    extend: Annotated[str, typer.Option("--extend", help="How positions grow: tile or interpolate.")] = "tile",
    layers: Annotated[
        str | None, typer.Option("--layers", help="Layers to convert, as 0,1,4, or auto (default: all).")
    ] = None,
    keep_softmax: Annotated[
        int | None,
        typer.Option("--keep-softmax", min=1, help="Layers that --layers auto leaves: where converting hurts most."),
    ] = None,
    keep_softmax_by: Annotated[
        str | None,
        typer.Option(
            "--keep-softmax-by",
            metavar="output|states",
            help="By what that is told: the head's output, or the final states, for a head that is new (default: the "
            "output, where the head gives distributions).",
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="FILE|auto|none",
            help="Text to choose starts on: files (repeat it), one folder of .txt, auto (bundled documents) or none.",
        ),
    ] = None,
    calibration_documents: Annotated[
        int | None,
        typer.Option("--calibration-documents", min=1, help="How many of a folder's or the bundled ones (default: 4)."),
    ] = None,
    calibration_length: Annotated[
        int | None, typer.Option("--calibration-length", min=8, help="Most tokens of a document (default: 512).")
    ] = None,
    calibration_steps: Annotated[
        int, typer.Option("--calibration-steps", min=0, help="Steps that train each layer alone on these documents.")
    ] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint, calibrated, and save it, with its tokenizer and what else of its folder still holds.

    Examples:

        hf-linear-attn convert minilm linear --max-length 4096 --output outputs/minilm-linear

        hf-linear-attn convert minilm hedgehog --layers auto --keep-softmax 1 --output outputs/minilm-hybrid
    """
    with plain_errors():
        check_output(output, overwrite)
        from hf_linear_attn.cli.actions import convert_checkpoint
        from hf_linear_attn.cli.calibration_texts import CalibrationTexts
        from hf_linear_attn.cli.listing import describe_calibration

        texts = CalibrationTexts(calibration or ["auto"], calibration_documents, calibration_length)
        report = convert_checkpoint(
            model,
            variant,
            output,
            options=pairs(option, "--option"),
            max_length=max_length,
            extend=extend,
            layers=layers_or_auto(layers),
            keep_softmax=keep_softmax,
            keep_softmax_by=keep_softmax_by,
            calibration=texts,
            calibration_steps=calibration_steps,
            progress=sys.stderr.isatty(),
        )
    typer.echo(str(report))
    typer.echo(describe_calibration(report, texts))
    typer.echo(f"Saved to {output}")


@app.command("train")
def train_command(
    recipe: Annotated[
        Path,
        typer.Argument(help="A recipe file, see recipes/README.md, or a table of labeled documents, .jsonl or .csv."),
    ],
    changes: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where this recipe's run was cut off.")] = False,
    from_stage: Annotated[
        str | None, typer.Option("--from-stage", help="Begin with this stage, from what the one before it left.")
    ] = None,
    until_stage: Annotated[str | None, typer.Option("--until-stage", help="End with this stage.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train one model as a recipe says; `accelerate launch -m hf_linear_attn train ...` for many processes.

    A table in the place of a recipe makes a classifier of up to 4,096 tokens, MiniLM with a window, in outputs/<name>.

    Examples:

        hf-linear-attn train letters.jsonl

        hf-linear-attn train recipes/minilm/matching.yaml --set training.num_train_epochs=1

        hf-linear-attn train recipes/minilm/matching.yaml --resume
    """
    with plain_errors():
        need_train_extra("train")
        loaded = _load_recipe(recipe, changes)
        # A run that goes on writes to the folder it was cut off in.
        check_output(loaded.output_dir, overwrite or resume or from_stage is not None)
        from hf_linear_attn.cli.actions import run_training

        places = {"from_stage": from_stage, "until_stage": until_stage, "resume": resume}
        result = run_training(loaded, **places, on_message=typer.echo)
    if result is None:  # not the main process
        return
    for name, value in result.metrics.items():
        typer.echo(f"{name}: {value:.4f}")
    for stage in result.stages:
        typer.echo(f"{stage.stage}: trained {stage.trained} for {stage.steps} steps")
    typer.echo(f"Saved to {result.output_dir}, by {result.num_processes} process(es)")


@app.command("compare")
def compare_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, see recipes/README.md.")],
    variants: Annotated[
        str | None, typer.Option("--variants", help="Variants, as linear,longformer (default: the recipe's).")
    ] = None,
    changes: Set = None,
    overwrite: Overwrite = False,
) -> None:
    """Train softmax and converted models under one budget, and write a report.

    A recipe that ends with finetune compares classifiers; another one language models, stage by stage. Goes on where
    it was cut off; --overwrite begins anew.

    Example:

        hf-linear-attn compare recipes/minilm/sotu_demo.yaml --variants linear,longformer
    """
    with plain_errors():
        need_train_extra("compare")
        loaded = _load_recipe(recipe, changes)
        asked = names(variants, "--variants")
        if loaded.stages[-1].kind == "finetune":
            check_output(loaded.output_dir, overwrite, resumes="**/stages.json")
            _run_comparison(loaded, asked, "Converted models beside the checkpoint", overwrite)
        else:
            check_output(loaded.output_dir, overwrite, resumes="language.rows.jsonl")
            _run_language_comparison(loaded, asked, overwrite)


@app.command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(help="Where a converted model was saved, its tokenizer beside it.")],
    repo: Annotated[str, typer.Argument(help="Its repository on the Hub, as you/your-model; made if it is not there.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Who sees a new repository.")] = None,
    card_from: Annotated[
        Path | None, typer.Option("--card-from", help="results.json of `compare`, for the card's measurements.")
    ] = None,
    row: Annotated[
        str | None, typer.Option("--row", help="This model's row there, where its options do not say.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Hub id of the checkpoint that was converted, for the card.")
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="License id for the card (default: the base model's).")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to upload to, made if needed.")] = None,
    message: Annotated[str | None, typer.Option("--message", help="What the commit says.")] = None,
    card_only: Annotated[bool, typer.Option("--card-only", help="Renew the card of a pushed model, no more.")] = False,
) -> None:
    """Upload a converted model to the Hub: weights, config, tokenizer, loader and a card, in one commit.

    A card that was written by hand is kept. The token is that of `hf auth login`, or HF_TOKEN.

    Examples:

        hf-linear-attn push outputs/minilm-linear you/minilm-linear --base-model sentence-transformers/all-MiniLM-L6-v2

        hf-linear-attn push outputs/demo/longformer you/reader --card-from outputs/demo/results.json --card-only
    """
    with plain_errors():
        if card_from is not None and not card_from.is_file():
            raise ValueError(f"--card-from {str(card_from)!r} is no file")
        from hf_linear_attn.hub import load_converted, push_to_hub

        commit = push_to_hub(
            load_converted(folder),
            repo,
            folder=folder,
            results=card_from,
            row=row,
            base_model=base_model,
            license=license_id,
            private=private,
            revision=revision,
            commit_message=message,
            card_only=card_only,
        )
    typer.echo(f"Pushed to {commit.commit_url}")


@app.command("export-kernels")
def export_kernels_command(
    folder: Annotated[Path, typer.Argument(help="Folder for the builds and their card.")],
    version: Annotated[
        int | None,
        typer.Option("--version", min=0, help="Of the kernel, as its branch on the Hub: v0 (default: the package's)."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write linear attention, decay and sliding windows as a kernel of the Hub, for the `kernels` library.

    Only files that an earlier export wrote are replaced, and a card that was written by hand is kept.

    Example:

        hf-linear-attn export-kernels outputs/kernel
    """
    with plain_errors():
        check_output(folder, overwrite)
        from hf_linear_attn.hub_kernel.export import export_kernels

        builds = export_kernels(folder, version)
    typer.echo(f"Wrote {', '.join(map(str, builds))}")


@app.command("demo")
def demo_command(
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Another comparison than the demo's own.")] = None,
    embedders: Annotated[
        Path | None, typer.Option("--embedders", help="Another recipe of the embedders than the demo's own.")
    ] = None,
    changes: Set = None,
    overwrite: Overwrite = False,
) -> None:
    """Long documents with a real checkpoint: as vectors, nothing trained; then a classifier, converted and trained.

    Passages look for their documents first, truncated, in chunks and converted; then the checkpoint and a converted
    one are fine-tuned on long documents.

    Example:

        hf-linear-attn demo
    """
    with plain_errors():
        need_train_extra("demo")
        from hf_linear_attn.bench.retrieval.recipe import RetrievalRecipe

        loaded = _load_recipe(recipe or shipped_recipe("minilm/sotu_demo.yaml"), changes)
        first = RetrievalRecipe.from_yaml(embedders or shipped_recipe("minilm/embedder_demo.yaml"))
        check_output(loaded.output_dir, overwrite, resumes="**/stages.json")
        run_embedders(first, loaded.output_dir / "embedders", fresh=True)
        title = "A converted classifier on documents longer than the checkpoint reads"
        _run_comparison(loaded, None, title, overwrite)


def run_embedders(recipe: RetrievalRecipe, output: Path, fresh: bool) -> None:
    """Run a retrieval and show it; exit status 1 if a system failed."""
    from rich.console import Console
    from rich.markdown import Markdown

    from hf_linear_attn.cli.bench_actions import run_retrieval, show_retrieval

    results = run_retrieval(recipe, output, fresh, " ".join(["hf-linear-attn", *sys.argv[1:]]), typer.echo)
    Console().print(Markdown(show_retrieval(results)))
    typer.echo(f"Tables: {output / 'retrieval.md'}")
    if (output / "retrieval.png").is_file():
        typer.echo(f"Picture: {output / 'retrieval.png'}")
    if any("failure" in row for row in results["rows"]):
        raise typer.Exit(code=1)


def _run_comparison(recipe: Recipe, variants: list[str] | None, title: str, fresh: bool) -> None:
    from rich.console import Console

    from hf_linear_attn.cli.actions import run_comparison

    command = " ".join(["hf-linear-attn", *sys.argv[1:]])
    comparison = run_comparison(recipe, variants, title, command, fresh)
    if comparison is None:  # not the main process
        return
    from hf_linear_attn.compare.report import render_table

    Console().print(render_table(comparison.results))
    for note in (comparison.results["task"]["note"], *comparison.results["notes"]):
        if note:
            typer.echo(note)
    if comparison.paths is not None:
        typer.echo(f"Page: {comparison.paths.html}")
        typer.echo(f"Picture: {comparison.paths.png}")
    if comparison.failed:
        raise typer.Exit(code=1)


def _run_language_comparison(recipe: Recipe, variants: list[str] | None, fresh: bool) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from hf_linear_attn.cli.actions import run_language_comparison

    command = " ".join(["hf-linear-attn", *sys.argv[1:]])
    results = run_language_comparison(recipe, variants, command, fresh)
    if results is None:  # not the main process
        return
    from hf_linear_attn.compare.language_tables import language_table

    Console().print(Markdown(language_table(results)))
    typer.echo(f"Table: {recipe.output_dir / 'language.md'}")
    if any("failure" in row for row in results["rows"]):
        raise typer.Exit(code=1)


def _load_recipe(path: Path, changes: list[str] | None) -> Recipe:
    from hf_linear_attn.data.files import FORMATS
    from hf_linear_attn.training.recipe import Recipe

    wanted = pairs(changes, "--set")
    for key, value in wanted.items():
        if "." not in key and value is not None:
            raise ValueError(f"--set takes SECTION.KEY=VALUE (or SECTION=null), got {key}={value}")
    read = Recipe.for_documents if path.suffix in FORMATS else Recipe.from_yaml
    return read(path).replace_at(wanted)
