"""Rows of files or of a Hub dataset become the train and test tables of a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets
from datasets.exceptions import DatasetsError
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

from hf_linear_attn.data.kinds import KINDS, LABEL_OF, find_columns
from hf_linear_attn.data.labels import Labels, collect_labels, is_missing
from hf_linear_attn.data.rows import read_row
from hf_linear_attn.data.task import group_split

__all__ = ["Part", "Place", "Sides", "quiet_datasets", "stream_tables", "to_tables"]

# Rows of a stream that are read and checked before anything else happens.
FIRST_ROWS = 32


@dataclass(frozen=True)
class Place:
    """Where rows lie.

    Attributes:
        name: of the file, or of the split on the Hub.
        names: name of each row, where a row is a file of its own.
    """

    name: str
    names: Sequence[str] | None = None

    def where(self, index: int) -> str:
        """File and row, for messages."""
        return self.names[index] if self.names is not None else f"{self.name}, row {index + 1}"

    def group(self, index: int) -> str:
        """Group of a row that names none."""
        return self.names[index] if self.names is not None else f"{self.name}:{index + 1}"


@dataclass(frozen=True)
class Part:
    """Rows of one file, of one split on the Hub, or of a folder of texts, as they are read."""

    place: Place
    rows: Dataset | IterableDataset


@dataclass(frozen=True)
class Sides:
    """What a source holds: a training and a test part, or, without `test`, rows that are still to be split."""

    train: list[Part]
    test: list[Part] | None = None


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets`, for what is local takes seconds, and no lines in its log beside our errors."""
    shown, verbosity = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            enable_progress_bars()


def to_tables(
    sides: Sides,
    kind: str,
    fields: Mapping[str, str],
    *,
    seed: int,
    test_fraction: float,
    drop_empty: bool = False,
    trains: bool = True,
) -> tuple[Dataset, Dataset, list[str], str]:
    """Check every row and build the tables of a task.

    Args:
        sides: rows of the source.
        kind: the task, one of `KINDS`.
        fields: our column -> the source's, where they differ.
        seed: of the split, where the source has none.
        test_fraction: wanted share of test documents of that split.
        drop_empty: leave out rows without text, with a note, instead of refusing them.
        trains: whether the labels are those of the training part, two at least, or else of all rows.

    Returns:
        training table, test table, names of the labels, and notes on what was left out.

    Raises:
        ValueError: for a column that is not there, a row that does not fit, or too few rows or labels.
    """
    parts = [*sides.train, *(sides.test or [])]
    columns = {id(part): find_columns(part.rows.column_names, fields, kind, part.place.name) for part in parts}
    labels, unlabeled = _labels(sides, kind, columns, trains)

    def table(parts: list[Part], is_test: bool) -> Dataset:
        tables = [
            _map(part.rows, _Convert(part.place, columns[id(part)], kind, labels, is_test, drop_empty))
            for part in parts
        ]
        return concatenate_datasets(tables)

    with quiet_datasets():
        train, test = table(sides.train, False), table(sides.test, True) if sides.test else None
    notes = [f"{unlabeled} test rows without a label were left out."] if unlabeled else []
    empty = sum(len(part.rows) for part in parts) - len(train) - len(test or []) - unlabeled
    if empty:
        notes.append(f"{empty} rows without text were left out.")
    if test is None:
        grouped = "group" in columns[id(parts[0])]
        split: dict[str, Any] = {"grouped": grouped, "seed": seed, "share": test_fraction, "trains": trains}
        train, test = _split(train, kind, labels.names, **split)
    for side, named in ((train, sides.train), (test, sides.test or sides.train)):
        if len(side) == 0:
            raise ValueError(f"Nothing is left of {', '.join(part.place.name for part in named)}. {' '.join(notes)}")
    return train, test, labels.names, " ".join(notes)


def stream_tables(
    sides: Sides,
    fields: Mapping[str, str],
    *,
    held_out: int,
    max_train: int | None,
    seed: int,
    shuffle_buffer: int | None = None,
    drop_empty: bool = False,
) -> tuple[IterableDataset, Dataset, str]:
    """A stream of texts to train on and a table of the first ones, which the stream leaves out.

    Args:
        sides: streams of the source; a test part of its own gives the held-out documents.
        fields: our column -> the source's, where they differ.
        held_out: test documents.
        max_train: end of the stream; None for all.
        seed: of the shuffling.
        shuffle_buffer: documents that are held at once, of which the next ones are drawn; None for the source's order.
        drop_empty: leave out rows without text instead of refusing them.

    Raises:
        ValueError: for a column that is not there, a first row that does not fit, or too few rows. Later rows raise
            when they are read.
    """

    def stream(parts: list[Part]) -> IterableDataset:
        converted = []
        for part in parts:
            available = part.rows.column_names or list(next(iter(_first(part.rows, 1, part.place.name)), {}))
            columns = find_columns(available, fields, "text", part.place.name)
            converted.append(_map(part.rows, _Convert(part.place, columns, "text", Labels([]), False, drop_empty)))
        return concatenate_datasets(converted)

    name = sides.train[0].place.name
    train = stream(sides.train)
    first = _first(stream(sides.test) if sides.test else train, held_out, name)
    # None of them, too: it keeps the files in their order in every pass, by which rows get their names.
    train = train.skip(0 if sides.test else held_out)
    if max_train is not None:
        train = train.take(max_train)
    if not first or not _first(train, FIRST_ROWS, name):
        raise ValueError(
            f"{name} holds too few documents: {len(first)} were held out for the test part, none is left to train on."
        )
    if shuffle_buffer is not None:
        train = train.shuffle(seed=seed, buffer_size=shuffle_buffer)
    note = "" if sides.test else f"The first {len(first)} documents are the test part."
    return train, Dataset.from_list(first, features=_features("text")), note


def _first(stream: Any, count: int, name: str) -> list[Any]:
    """The first rows of a stream, which is read here for the first time."""
    try:
        return list(islice(stream, count))
    except (DatasetsError, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read: {str(error.__cause__ or error).partition(chr(10))[0]}.") from error


def _features(kind: str) -> Features:
    return Features({**KINDS[kind], "group": Value("string")})


def _map(rows: Any, convert: _Convert) -> Any:
    # Few rows at a time: documents are long, and of a stream no more is read than is asked for.
    options: dict[str, Any] = {"batched": True, "batch_size": 32, "with_indices": True}
    options["features"] = _features(convert.kind)
    options["remove_columns"] = sorted(set(convert.columns.values()))
    if isinstance(rows, Dataset):
        options["load_from_cache_file"] = False  # its key does not see a change of this package
    return rows.select_columns(options["remove_columns"]).map(convert, **options)


@dataclass(frozen=True)
class _Convert:
    """A batch of a source's rows to a batch of a table's."""

    place: Place
    columns: Mapping[str, str]
    kind: str
    labels: Labels
    is_test: bool
    drop_empty: bool

    def __call__(self, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        table: dict[str, list[Any]] = {name: [] for name in _features(self.kind)}
        for number, index in enumerate(indices):
            row = {name: values[number] for name, values in batch.items()}
            if self._is_left_out(row):
                continue
            read = read_row(row, self.columns, self.kind, self.labels, self.place.where(index))
            read.setdefault("group", self.place.group(index))
            for name, values in table.items():
                values.append(read[name])
        return table

    def _is_left_out(self, row: Mapping[str, Any]) -> bool:
        label = LABEL_OF[self.kind]
        if self.is_test and label and is_missing(row[self.columns[label]], self.kind):
            return True
        text = row[self.columns["text"]] if self.drop_empty and "text" in self.columns else "there"
        return text is None or (isinstance(text, str | list) and not "".join(text).strip())


def _labels(sides: Sides, kind: str, columns: Mapping[int, Mapping[str, str]], trains: bool) -> tuple[Labels, int]:
    """The labels, and how many test rows have none; a training row without one is an error."""
    label = LABEL_OF[kind]
    if label is None:
        return Labels([]), 0
    unlabeled = 0
    for part in sides.test or []:
        unlabeled += sum(is_missing(value, kind) for value in part.rows[columns[id(part)][label]])

    for part in sides.train:
        column = columns[id(part)][label]
        for index, value in enumerate(part.rows[column]):
            if is_missing(value, kind):
                raise ValueError(
                    f"{part.place.where(index)}, column {column!r} has no label ({value!r}); a test row may lack one."
                )
    column = columns[id(sides.train[0])][label]
    if kind in ("question_answering", "multiple_choice"):
        return Labels([]), unlabeled
    if kind == "regression":
        return Labels([column]), unlabeled
    parts = sides.train if trains else [*sides.train, *(sides.test or [])]
    values = (
        (part.place.where(index), value)
        for part in parts
        for index, value in enumerate(part.rows[columns[id(part)][label]])
        if not is_missing(value, kind)
    )
    return collect_labels(kind, sides.train[0].rows.features, column, values, fewest=2 if trains else 1), unlabeled


def _split(
    table: Dataset, kind: str, names: Sequence[str], *, grouped: bool, seed: int, share: float, trains: bool
) -> tuple[Dataset, Dataset]:
    """Split so that no group is on both sides, nor a context that several questions are asked about, and so that every
    label is on both; where nothing trains, labels with too few groups for that fall where they fall."""
    labels = list(table["label"]) if kind == "sequence_classification" else [0] * len(table)
    groups = list(table["group"])
    if "context" in table.column_names and not grouped:
        seen: dict[int, int] = {}
        groups = [str(seen.setdefault(hash(context), len(seen))) for context in table["context"]]
    by_label: dict[int, set[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        by_label.setdefault(label, set()).add(group)
    if not trains and min(map(len, by_label.values())) < 2:
        labels, by_label = [0] * len(table), {0: set(groups)}
    for label, found in by_label.items():
        if len(found) < 2:
            what = f"The label {names[label]!r} occurs in" if kind == "sequence_classification" else "There is"
            raise ValueError(
                f"{what} one document (or group) only, {table['group'][labels.index(label)]}, which cannot be split "
                "into two parts. Name them, source: {train: ..., test: ...}, or cut texts with sample_by=paragraph."
            )
    train, test = group_split(labels, groups, share, seed)
    return table.select(train), table.select(test)
