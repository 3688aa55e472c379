"""What the commands share: reading `key=value` arguments, naming a missing extra, ending with one clear line."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

__all__ = [
    "MODEL_HELP",
    "Options",
    "Overwrite",
    "check_output",
    "check_output_file",
    "layers_or_auto",
    "names",
    "need_extra",
    "need_train_extra",
    "numbers",
    "pairs",
    "plain_errors",
    "read_device",
    "shipped_recipe",
]

# distribution-independent: what the commands import
_TRAIN_MODULES = ("accelerate", "datasets", "evaluate", "matplotlib", "peft", "sklearn", "tensorboard", "yaml")

MODEL_HELP = "A Hub id, a folder, or a bundled checkpoint (minilm, smollm2)."

Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="An option of the variant; may be repeated."),
]

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write to a folder that is not empty, over the files of an earlier run.")
]


def pairs(entries: list[str] | None, flag: str) -> dict[str, Any]:
    """`key=value` entries, the values read as YAML reads them: numbers, true, null, [1, 2], text."""
    import yaml

    found = {}
    for entry in entries or []:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise ValueError(f"{flag} takes KEY=VALUE, got {entry!r}")
        if name in found:
            raise ValueError(f"{flag} {name} is given twice")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or str(error)
            raise ValueError(f"{flag} {entry!r}: the value is not YAML: {reason}") from error
    return found


def numbers(text: str | None, flag: str) -> list[int] | None:
    """`0,1,4` as integers; None stays None."""
    if text is None:
        return None
    try:
        return [int(entry) for entry in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} takes integers with commas between them, got {text!r}") from None


def layers_or_auto(text: str | None) -> list[int] | Literal["auto"] | None:
    """`0,1,4` as integers, or `auto`; None stays None."""
    if text == "auto":
        return "auto"
    try:
        return numbers(text, "--layers")
    except ValueError:
        raise ValueError(f"--layers takes integers with commas between them, or auto; got {text!r}") from None


def names(text: str | None, flag: str) -> list[str] | None:
    """`linear,longformer` as a list; None stays None."""
    if text is None:
        return None
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise ValueError(f"{flag} takes names with commas between them, got {text!r}")
    return found


def read_device(name: str | None) -> str | None:
    """`cpu` or `cuda`, which is there; None stays None."""
    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"--device takes cpu or cuda, got {name!r}")
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no CUDA device here")
    return name


def check_output(folder: str | Path, overwrite: bool, resumes: str | None = None) -> None:
    """Raise `ValueError` unless a command may write to `folder`.

    Args:
        folder: where it writes; none, an empty one, or one to go on with.
        overwrite: whether any folder will do.
        resumes: pattern of the files that a run which was cut off leaves, and that the command goes on with.
    """
    folder = Path(folder)
    _check_parents(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"The output {str(folder)!r} is a file; a folder is needed")
    left = [path for path in folder.iterdir() if not path.name.startswith(".saving-")]  # of a killed process
    if left and not overwrite and not (resumes and any(folder.glob(resumes))):
        raise ValueError(f"The output folder {str(folder)!r} is not empty: name another one, or pass --overwrite")


def check_output_file(file: Path, overwrite: bool) -> None:
    """Raise `ValueError` unless a command may write to `file`."""
    _check_parents(file)
    if file.is_dir():
        raise ValueError(f"The output {str(file)!r} is a folder; a file is needed")
    if file.exists() and not overwrite:
        raise ValueError(f"The output {str(file)!r} exists: name another file, or pass --overwrite")


def _check_parents(path: Path) -> None:
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise ValueError(f"The output {str(path)!r} lies below {str(there)!r}, which is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"The output {str(path)!r} cannot be made: {str(there)!r} is not writable")


def shipped_recipe(name: str) -> Path:
    """A recipe of the repository; the recipes lie beside the package, not in it.

    Raises:
        FileNotFoundError: where only the package is installed.
    """
    path = Path(__file__).resolve().parents[2] / "recipes" / name
    if not path.is_file():
        raise FileNotFoundError(f"The recipes are part of the repository, not of the package: no {path}. Clone it.")
    return path


def need_train_extra(command: str) -> None:
    """Raise `ModuleNotFoundError` with the command that installs what is missing."""
    need_extra(command, "train", _TRAIN_MODULES)


def need_extra(command: str, extra: str, modules: Iterable[str], instead: str = "") -> None:
    """Raise `ModuleNotFoundError` naming the `modules` that are missing, the extra that installs them, and what does
    without them."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"`hf-linear-attn {command}` needs the extra [{extra}], and {', '.join(missing)} cannot be found. "
            f"Install it: pip install 'hf-linear-attn[{extra}]'" + (f"; {instead}" if instead else "")
        )


@contextmanager
def plain_errors() -> Iterator[None]:
    """Mistakes in arguments and files, and a machine that says no, end the command with one line; anything else keeps
    its traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        logging.getLogger(__name__).debug("the error's traceback", exc_info=True)
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(code=1) from error
