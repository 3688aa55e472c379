"""What a source names: files, a folder, an entry of the catalog, or a dataset of the Hub; and what is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_linear_attn.data.catalog import CATALOG
from hf_linear_attn.data.external import builder_names, hub_sides
from hf_linear_attn.data.files import FORMATS, UNITS, file_sides, folder_sides
from hf_linear_attn.data.kinds import KINDS, name_and_allowed
from hf_linear_attn.data.tables import Sides

__all__ = ["Source", "check_options", "find_source"]

# Options of the kinds of sources, beside those of all that `datasets` reads.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "file": ("sample_by",),
    "folder": ("sample_by",),
    "catalog": (),
    "hub": ("config_name", "revision", "train_split", "test_split"),
}


@dataclass(frozen=True)
class Source:
    """A source that `datasets` has read.

    Attributes:
        sides: its rows.
        fields: our column -> the source's, where they differ.
        name: short name.
        source: where it is, for readers.
        note: what was left out; empty if nothing.
        test_fraction: wanted share of test documents, where it has no test part.
        drop_empty: whether rows without text are left out.
    """

    sides: Sides
    fields: Mapping[str, str]
    name: str
    source: str
    note: str = ""
    test_fraction: float = 0.3
    drop_empty: bool = False


def check_options(options: Mapping[str, Any], allowed: Sequence[str], source: object) -> None:
    """Raise a `ValueError` that lists the allowed options for one that a source does not have."""
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(
            f"Unknown option(s) {', '.join(map(repr, unknown))} for the documents {source!r}. "
            f"Allowed: {', '.join(allowed)}."
        )


def find_source(
    source: Any,
    kind: str,
    fields: Mapping[str, str],
    options: Mapping[str, Any],
    bundled: Sequence[str],
    *,
    streaming: bool,
) -> Source:
    """Read what a source names.

    Args:
        source: as `load_documents` takes it, none of `bundled`.
        kind: the task.
        fields: our column -> the source's, where they differ.
        options: of the source.
        bundled: names of bundled sources, for messages.
        streaming: read row by row.

    Raises:
        ValueError: for what is refused, damaged, or has no such option.
        FileNotFoundError: for what is not there.
    """
    where = _where(source)
    check_options(options, ["test_fraction", "drop_empty", *_OPTIONS[where]], source)
    own = {name: value for name, value in options.items() if name in _OPTIONS[where]}
    shared = {name: value for name, value in options.items() if name not in own}
    fraction, drop_empty = shared.get("test_fraction", 0.3), shared.get("drop_empty", False)
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, given {fraction!r}.")
    if not isinstance(drop_empty, bool):
        raise ValueError(f"drop_empty must be true or false, given {drop_empty!r}.")
    if drop_empty and "text" not in KINDS[kind]:
        raise ValueError(f"drop_empty serves tasks with a column text, given task={kind!r}.")
    if where == "hub":
        sides = hub_sides(source, bundled, tuple(CATALOG), streaming=streaming, **own)
        return Source(sides, fields, source, f"Hugging Face Hub: {source}", **shared)
    if where == "catalog":
        return _of_catalog(source, kind, fields, shared, bundled, streaming)
    unit = own.get("sample_by", "document")
    if unit not in UNITS:
        raise ValueError(name_and_allowed("sample_by", unit, UNITS))
    if where == "folder":
        folder = Path(source).expanduser()
        name = folder.resolve().name
        sides, note = folder_sides(folder, kind, sample_by=unit, streaming=streaming)
        return Source(sides, fields, name, f"local folder {name}", note, **shared)
    sides = file_sides(source, sample_by=unit, streaming=streaming)
    name = Path(source).stem if isinstance(source, str | Path) else sides.train[0].place.name
    return Source(sides, fields, name, f"local file(s) {name}", **shared)


def _of_catalog(
    name: str, kind: str, fields: Mapping[str, str], options: Mapping[str, Any], bundled: Sequence[str], streaming: bool
) -> Source:
    entry = CATALOG[name]
    if fields:
        raise ValueError(f"The catalog says the fields of {name!r}; give its id, {entry.hub_id!r}, to map others.")
    if kind not in (entry.task, "text"):
        raise ValueError(f"{name!r} is a set for {entry.task} (or text), given task={kind!r}.")
    sides = hub_sides(entry.hub_id, bundled, streaming=streaming, **entry.where(kind))
    about = f"Hugging Face Hub: {entry.hub_id} ({entry.license or 'license unknown'})"
    return Source(sides, entry.fields_for(kind), name, about, **{"drop_empty": entry.drop_empty, **options})


def _where(source: Any) -> Literal["file", "folder", "catalog", "hub"]:
    """What kind of place a source names; refuses what is none."""
    if isinstance(source, Mapping | list | tuple):
        return "file"
    if not isinstance(source, str | Path):
        raise ValueError(f"The source must be a name, a path, a list of files or {{train, test}}, given {source!r}.")
    name = str(source)
    if not name.strip():
        raise ValueError("The source is empty. Name a file, a folder, a Hub id or one of the bundled sources.")
    if "://" in name:
        raise ValueError(f"{name!r} is a URL; name a local file, a folder or the id of a dataset on the Hub.")
    try:
        path = Path(source).expanduser()
        is_there = path.exists()
    except (OSError, RuntimeError) as error:  # too long, or below the home of nobody
        raise ValueError(f"{name!r} can be no path: {error}") from error
    in_catalog = isinstance(source, str) and name in CATALOG
    if is_there and in_catalog:
        raise ValueError(f"{name!r} is a name of the catalog and a path here: write './{name}' for the path.")
    if path.is_dir():
        if path.resolve() == Path(path.resolve().anchor):
            raise ValueError(f"{name!r} is the root of the file system; name the folder of the documents.")
        return "folder"
    if is_there:
        return "file"
    if in_catalog:
        return "catalog"
    if name in builder_names():
        raise ValueError(
            f"{name!r} names a builder of datasets, which would read every such file below the current folder. "
            "Name the files instead, source: {train: ..., test: ...}."
        )
    looks_local = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name
    if isinstance(source, Path) or looks_local or path.suffix.lower() in FORMATS:
        raise FileNotFoundError(f"There is no file or folder {name!r}.")
    return "hub"
