"""`load_documents`: one call for every source of documents."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_linear_attn.data.installed import installed_sources_task
from hf_linear_attn.data.kinds import check_fields, check_kind
from hf_linear_attn.data.mails import mails_task
from hf_linear_attn.data.matching import matching_task
from hf_linear_attn.data.novel import novel_task
from hf_linear_attn.data.npm import PackageUnavailableError
from hf_linear_attn.data.passkey import passkey_task
from hf_linear_attn.data.recall import recall_task
from hf_linear_attn.data.sotu import sotu_task
from hf_linear_attn.data.sources import check_options, find_source
from hf_linear_attn.data.tables import stream_tables, to_tables
from hf_linear_attn.data.task import DocumentTask, stratified_subset

__all__ = ["BUNDLED_SOURCES", "load_documents"]

logger = logging.getLogger(__name__)

# Source -> what makes it.
_BUNDLED: dict[str, Callable[..., DocumentTask]] = {
    "sotu": sotu_task,
    "mails": mails_task,
    "novel": novel_task,
    "matching": matching_task,
    "passkey": passkey_task,
    "recall": recall_task,
    "installed-sources": installed_sources_task,
}
BUNDLED_SOURCES = ("auto", *_BUNDLED)

_HELD_OUT = 100  # test documents of a stream


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
    shuffle_buffer: int | None = None,
    trains: bool = True,
    **options: Any,
) -> DocumentTask:
    """Documents for a task, from wherever they are; every row is checked before it is returned.

    Args:
        source: one of

            - `"sotu"` (State of the Union addresses by era), `"mails"` (spam or not) and `"novel"` (chapters, for
              `"text"`), which npm fetches; `"matching"`, `"passkey"` and `"recall"` (generated);
              `"installed-sources"` (source files of the installed packages); `"auto"` (`"sotu"`, or
              `"installed-sources"` with a warning and a note where it cannot be had);
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
        shuffle_buffer: of a stream: how many documents are held at once, of which the next ones are drawn at random, by
            `seed` and otherwise in each pass; they come in the source's order when None.
        trains: whether a model learns from the training part, whose labels, two at least, are those of the task then;
            False takes those of all rows, one or more, for a model that has learned its own.
        **options: options of the source. Files, folders, the Hub: `test_fraction` (.3, where the source has no test
            part) and `drop_empty` (leave out rows without text, with a note). Files: `sample_by`, what of a .txt file
            is a document: `"document"` (all of it), `"paragraph"` or `"line"`. The Hub: `config_name`, `revision`,
            `train_split`, `test_split` (null: split the training part). Else see `sotu_task`, `mails_task`,
            `novel_task`, `matching_task`, `passkey_task`, `recall_task` and `installed_sources_task`.

    Raises:
        ValueError: for a task, field or option that is not known, a source that is refused or damaged, or a row that
            does not fit its column; names file, row and column.
        FileNotFoundError: for a source that is not there.
        PackageUnavailableError: for `"sotu"`, `"mails"` or `"novel"` that is neither cached nor can be fetched.
    """
    check_kind(task)
    fields = check_fields(fields, task)
    for name, value in (("max_train_documents", max_train_documents), ("max_test_documents", max_test_documents)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive whole number or null, given {value!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number, 0 or more, given {seed!r}.")
    if streaming and task != "text":
        raise ValueError(f"streaming=True serves task='text' only, given {task!r}.")
    if shuffle_buffer is not None:
        if isinstance(shuffle_buffer, bool) or not isinstance(shuffle_buffer, int) or shuffle_buffer < 2:
            raise ValueError(f"shuffle_buffer must be a whole number, 2 or more, or null, given {shuffle_buffer!r}.")
        if not streaming:
            raise ValueError(f"shuffle_buffer={shuffle_buffer} shuffles a stream; give it with streaming=True.")
    if isinstance(source, str) and source in BUNDLED_SOURCES:
        if streaming or fields:
            raise ValueError(f"The documents {source!r} take no {'streaming' if streaming else 'fields'}.")
        made = _bundled(source, task, seed, cache_dir, options)
    else:
        found = find_source(source, task, fields, options, BUNDLED_SOURCES, streaming=streaming)
        about: dict[str, Any] = {"kind": task, "generated": False, "name": found.name, "source": found.source}
        about["description"] = f"{task.replace('_', ' ').capitalize()} over {found.name}."
        if streaming:
            train, test, note = stream_tables(
                found.sides,
                found.fields,
                held_out=max_test_documents or _HELD_OUT,
                max_train=max_train_documents,
                seed=seed,
                shuffle_buffer=shuffle_buffer,
                drop_empty=found.drop_empty,
            )
            about["note"] = " ".join(filter(None, (found.note, note)))
            return DocumentTask(train=train, test=test, label_names=[], **about)  # type: ignore[arg-type]
        whole, held, names, note = to_tables(
            found.sides,
            task,
            found.fields,
            seed=seed,
            test_fraction=found.test_fraction,
            drop_empty=found.drop_empty,
            trains=trains,
        )
        about["note"] = " ".join(filter(None, (found.note, note)))
        made = DocumentTask(train=whole, test=held, label_names=names, **about)
    return dataclasses.replace(
        made,
        train=stratified_subset(made.train, max_train_documents, seed),
        test=stratified_subset(made.test, max_test_documents, seed),
    )


def _bundled(source: str, kind: str, seed: int, cache_dir: str | Path | None, options: dict[str, Any]) -> DocumentTask:
    if source == "auto":
        try:
            return _bundled("sotu", kind, seed, cache_dir, options)
        except PackageUnavailableError as error:
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
    check_options(options, [name for name in parameters if name not in fixed], source)
    made = make(**options, **{name: value for name, value in fixed.items() if name in parameters})
    if made.kind == kind:
        return made
    if kind != "text":
        own = made.kind if made.kind == "text" else f"{made.kind} or text"
        raise ValueError(f"The documents {source!r} are for {own}, given task={kind!r}.")
    train, test = (part.remove_columns("label") for part in (made.train, made.test))
    return dataclasses.replace(made, train=train, test=test, label_names=[], kind="text")
