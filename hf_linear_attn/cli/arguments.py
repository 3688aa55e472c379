"""What the commands share: reading `key=value` arguments, naming a missing extra, ending with one clear line."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

__all__ = ["MODEL_HELP", "Options", "need_extra", "need_train_extra", "numbers", "pairs", "plain_errors"]

# distribution-independent: what the commands import
_TRAIN_MODULES = ("accelerate", "datasets", "evaluate", "matplotlib", "peft", "sklearn", "tensorboard", "yaml")

MODEL_HELP = "A Hub id, a folder, or a bundled checkpoint (minilm, smollm2)."

Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="An option of the variant; may be repeated."),
]


def pairs(entries: list[str] | None, flag: str) -> dict[str, Any]:
    """`key=value` entries, the values read as YAML reads them: numbers, true, null, [1, 2], text."""
    import yaml

    found = {}
    for entry in entries or []:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise ValueError(f"{flag} takes KEY=VALUE, got {entry!r}")
        found[name] = yaml.safe_load(value)
    return found


def numbers(text: str | None, flag: str) -> list[int] | None:
    """`0,1,4` as integers; None stays None."""
    if text is None:
        return None
    try:
        return [int(entry) for entry in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} takes integers with commas between them, got {text!r}") from None


def need_train_extra(command: str) -> None:
    """Raise `ModuleNotFoundError` with the command that installs what is missing."""
    need_extra(command, "train", _TRAIN_MODULES)


def need_extra(command: str, extra: str, modules: Iterable[str]) -> None:
    """Raise `ModuleNotFoundError` naming the `modules` that are missing and the extra that installs them."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"`hf-linear-attn {command}` needs the extra [{extra}], and {', '.join(missing)} cannot be found. "
            f"Install it: pip install 'hf-linear-attn[{extra}]'"
        )


@contextmanager
def plain_errors() -> Iterator[None]:
    """Mistakes in arguments and files end the command with one line; anything else keeps its traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        yield
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        logging.getLogger(__name__).debug("the error's traceback", exc_info=True)
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(code=1) from error
