"""The commands. Everything heavy is imported inside the command that needs it, so that `--help` answers at once."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hf_linear_attn.training.recipe import Recipe

__all__ = ["app"]

app = typer.Typer(
    name="hf-linear-attn",
    help="Rewrite the attention of pretrained Transformers models, train the quality back, measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# distribution-independent: what the commands import
_TRAIN_MODULES = ("accelerate", "datasets", "evaluate", "matplotlib", "peft", "sklearn", "tensorboard", "yaml")

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe; may be repeated."),
]


@app.command("list")
def list_command() -> None:
    """List the attention variants and the model families.

    Example:

        hf-linear-attn list
    """
    from rich.console import Console
    from rich.table import Table

    from hf_linear_attn.registry import get_variant, list_patchers, list_variants

    table = Table("variant", "method", "serves", "cost of attention", "generation keeps")
    for key in list_variants():
        spec = get_variant(key)
        serves = [side for side, able in (("encoders", spec.encoder), ("decoders", spec.decoder)) if able]
        keeps = "-" if spec.state == "none" else spec.state
        table.add_row(key, spec.title, ", ".join(serves), spec.cost, keeps)
    console = Console()
    console.print(table)
    console.print(f"Model families: {', '.join(list_patchers())}")


@app.command("convert")
def convert_command(
    model: Annotated[str, typer.Argument(help="A Hub id, a folder, or a bundled checkpoint (minilm).")],
    variant: Annotated[str, typer.Argument(help="An attention variant, see `hf-linear-attn list`.")],
    output: Annotated[Path, typer.Option("--output", help="Folder for the converted model and its tokenizer.")],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="An option of the variant; may be repeated."),
    ] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="New limit in tokens.")] = None,
    extend: Annotated[str, typer.Option("--extend", help="How positions grow: tile or interpolate.")] = "tile",
    layers: Annotated[str | None, typer.Option("--layers", help="Layers to convert, as 0,1,4 (default: all).")] = None,
) -> None:
    """Convert a checkpoint and save it.

    Example:

        hf-linear-attn convert minilm linear --max-length 4096 --output outputs/minilm-linear
    """
    with _plain_errors():
        from hf_linear_attn.cli.actions import convert_checkpoint

        indices = None if layers is None else [int(index) for index in layers.split(",")]
        report = convert_checkpoint(
            model,
            variant,
            output,
            options=_pairs(option, "--option"),
            max_length=max_length,
            extend=extend,
            layers=indices,
        )
    typer.echo(str(report))
    typer.echo(f"Saved to {output}")


@app.command("train")
def train_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, see recipes/README.md.")],
    changes: Set = None,
) -> None:
    """Fine-tune one model as a recipe says; `accelerate launch -m hf_linear_attn train ...` for many processes.

    Example:

        hf-linear-attn train recipes/minilm/matching.yaml --set training.epochs=1
    """
    with _plain_errors():
        _need_train_extra("train")
        loaded = _load_recipe(recipe, changes)
        from hf_linear_attn.cli.actions import run_training

        result = run_training(loaded)
    if result is None:  # not the main process
        return
    for name, value in result.metrics.items():
        typer.echo(f"{name}: {value:.4f}")
    typer.echo(f"Trained {result.trained} for {result.steps} steps on {result.num_processes} process(es)")
    typer.echo(f"Saved to {result.output_dir}")


@app.command("compare")
def compare_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, see recipes/README.md.")],
    variants: Annotated[
        str | None, typer.Option("--variants", help="Variants, as linear,longformer (default: the recipe's).")
    ] = None,
    changes: Set = None,
) -> None:
    """Train softmax and converted models under one budget, and write a report.

    Example:

        hf-linear-attn compare recipes/minilm/sotu_demo.yaml --variants linear,longformer
    """
    with _plain_errors():
        _need_train_extra("compare")
        loaded = _load_recipe(recipe, changes)
        names = None if variants is None else [name.strip() for name in variants.split(",")]
        _run_comparison(loaded, names, "Converted models beside the checkpoint")


@app.command("demo")
def demo_command(
    recipe: Annotated[Path | None, typer.Option("--recipe", help="Another recipe than the demo's own.")] = None,
    changes: Set = None,
) -> None:
    """Convert a real checkpoint four ways, fine-tune each on long documents, show what was gained and lost.

    Example:

        hf-linear-attn demo
    """
    with _plain_errors():
        _need_train_extra("demo")
        path = _demo_recipe() if recipe is None else recipe
        loaded = _load_recipe(path, changes)
        _run_comparison(loaded, None, "Four attention variants on documents longer than the checkpoint reads")


def _run_comparison(recipe: Recipe, variants: list[str] | None, title: str) -> None:
    from rich.console import Console

    from hf_linear_attn.cli.actions import run_comparison

    comparison = run_comparison(recipe, variants, title, command=" ".join(["hf-linear-attn", *sys.argv[1:]]))
    if comparison is None:  # not the main process
        return
    from hf_linear_attn.evaluation.report import render_table

    Console().print(render_table(comparison.results))
    for note in (comparison.results["task"]["note"], *comparison.results["notes"]):
        if note:
            typer.echo(note)
    if comparison.paths is not None:
        typer.echo(f"Page: {comparison.paths.html}")
        typer.echo(f"Picture: {comparison.paths.png}")
    if comparison.failed:
        raise typer.Exit(code=1)


def _demo_recipe() -> Path:
    """The demo's recipe lies in the repository beside the package."""
    path = Path(__file__).resolve().parents[2] / "recipes" / "minilm" / "sotu_demo.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"The demo's recipe is part of the repository, not of the package: no {path}. Clone it."
        )
    return path


def _load_recipe(path: Path, changes: list[str] | None) -> Recipe:
    from hf_linear_attn.training.recipe import Recipe

    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {str(path)!r}")
    recipe = Recipe.from_yaml(path)
    for name, value in _pairs(changes, "--set").items():
        section, dot, key = name.partition(".")
        if not dot:
            if value is not None:
                raise ValueError(f"--set takes SECTION.KEY=VALUE (or SECTION=null), got {name}={value}")
            recipe = recipe.replace(**{section: value})
            continue
        recipe = recipe.replace(**{section: {key: value}})
    return recipe


def _pairs(entries: list[str] | None, flag: str) -> dict[str, Any]:
    """`key=value` entries, the values read as YAML reads them: numbers, true, null, [1, 2], text."""
    import yaml

    pairs = {}
    for entry in entries or []:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise ValueError(f"{flag} takes KEY=VALUE, got {entry!r}")
        pairs[name] = yaml.safe_load(value)
    return pairs


def _need_train_extra(command: str) -> None:
    missing = [name for name in _TRAIN_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"`hf-linear-attn {command}` needs the extra [train], and {', '.join(missing)} cannot be found. "
            "Install it: pip install 'hf-linear-attn[train]'"
        )


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Mistakes in arguments and files end the command with one line; anything else keeps its traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        yield
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        logging.getLogger(__name__).debug("the error's traceback", exc_info=True)
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(code=1) from error
