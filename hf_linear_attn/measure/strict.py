"""Reading a recipe's YAML into dataclasses, strictly: what is not known, missing or of another type is an error."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

__all__ = ["build_strictly", "check", "convert", "read_yaml"]


def check(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition`."""
    if not condition:
        raise ValueError(message)


def read_yaml(path: str | Path) -> Any:
    """What a recipe file holds; `{}` for an empty one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is not YAML in UTF-8; names it.
    """
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no recipe {str(path)!r}")
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {str(path)!r} is not YAML in UTF-8: {error}") from error
    return {} if data is None else data


def build_strictly(kind: type, data: Any, where: str) -> Any:
    """Instantiate the dataclass `kind` from the mapping `data`; `where` names the place in error messages.

    Raises:
        ValueError: for an unknown or a missing key, or a value of another type than the field's.
    """
    check(isinstance(data, dict), f"{where} must be a mapping, got {data!r}")
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(known))
    check(not unknown, f"Unknown key(s) {unknown} in {where}. Allowed: {', '.join(known)}.")
    missing = [
        name
        for name, entry in known.items()
        if name not in data and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    check(not missing, f"Missing key(s) {missing} in {where}.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: convert(hints[name], value, f"{where}.{name}") for name, value in data.items()})


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as its type hint says (classes, dataclasses, unions, literals, `list[int]`, `dict[str, Any]`).

    Raises:
        ValueError: for a value of another type; `where` names the place.
    """
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        arms = [arg for arg in args if arg is not type(None)]
        for arm in arms[:-1]:
            with contextlib.suppress(ValueError):
                return convert(arm, value, where)
        return convert(arms[-1], value, where)
    if origin is typing.Literal:
        check(value in args, f"{where} is one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        return build_strictly(typing.cast(type, hint), value, where)
    if origin is list:
        check(isinstance(value, list), f"{where} must be a list, got {value!r}")
        return [convert(args[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        check(isinstance(value, dict), f"{where} must be a mapping, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        # YAML 1.1 reads `3e-5` as a string
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{where} must be a number, got {value!r}") from None
    check(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{where} must be {hint.__name__}, got {value!r}",
    )
    return value
