"""Documents of the user's own: a local folder of text files, or a dataset of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, load_dataset

from hf_linear_attn.data.task import DocumentTask, documents_to_dataset, group_split

__all__ = ["folder_task", "hub_task"]


def folder_task(path: Path, *, seed: int = 0, test_fraction: float = 0.3) -> DocumentTask:
    """Text files, label = the folder they lie in.

    Args:
        path: `path/<label>/**/*.txt`, split by file at random; or `path/train/<label>/...` and
            `path/test/<label>/...`, taken as they are.
        seed: seed of the split.
        test_fraction: wanted share of test documents where the folder is not split.

    Raises:
        ValueError: if there are fewer than two labels, or the two parts have different labels.
    """
    ready = (path / "train").is_dir() and (path / "test").is_dir()
    parts = [_read_folder(path / "train"), _read_folder(path / "test")] if ready else [_read_folder(path)]
    names = sorted({label for part in parts for label, _, _ in part})
    if len(names) < 2:
        raise ValueError(
            f"{path} must hold at least two subfolders with *.txt files, one for each label; found {names or 'none'}."
        )
    tables = [
        documents_to_dataset(
            [text for _, _, text in part],
            [names.index(y) for y, _, _ in part],
            [group for _, group, _ in part],
        )
        for part in parts
    ]
    if ready:
        train, test = tables
        differing = sorted({y for y, _, _ in parts[0]} ^ {y for y, _, _ in parts[1]})
        if differing:
            raise ValueError(f"Label(s) {differing} are in only one of {path / 'train'} and {path / 'test'}.")
    else:
        sides = group_split(tables[0]["label"], tables[0]["group"], test_fraction, seed)
        train, test = (tables[0].select(side) for side in sides)
    return DocumentTask(
        name=path.name,
        train=train,
        test=test,
        label_names=names,
        description=f"The label of a text file: one of {len(names)} folders.",
        generated=False,
        source=f"local folder {path.name}",
    )


def _read_folder(root: Path) -> list[tuple[str, str, str]]:
    """(label, file, text) of every text file below a folder of label folders."""
    return [
        (folder.name, f"{folder.name}/{file.relative_to(folder)}", _read_text(file))
        for folder in sorted(p for p in root.iterdir() if p.is_dir())
        for file in sorted(folder.rglob("*.txt"))
    ]


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}.") from error


def hub_task(
    name: str,
    *,
    seed: int = 0,
    text_column: str = "text",
    label_column: str = "label",
    group_column: str | None = None,
    config_name: str | None = None,
    train_split: str = "train",
    test_split: str | None = "test",
    test_fraction: float = 0.3,
) -> DocumentTask:
    """A text-classification dataset that `datasets.load_dataset` can load.

    Args:
        name: id on the Hub.
        seed: seed of the split where there is no test split.
        text_column: column of the documents.
        label_column: column of the labels: integers or strings.
        group_column: column whose values must not be in both parts where this function splits (author, ...).
        config_name: configuration of the dataset.
        train_split: split to train on.
        test_split: split to test on; None splits `train_split`.
        test_fraction: wanted share of test documents with `test_split=None`.

    Raises:
        ValueError: if a named column or split does not exist.
    """
    loaded = load_dataset(name, config_name)
    missing = [split for split in (train_split, test_split) if split is not None and split not in loaded]
    if missing:
        raise ValueError(f"The dataset {name!r} has no split {missing}. Available: {', '.join(loaded)}.")
    raw = [loaded[split] for split in (train_split, test_split) if split is not None]
    for column in (text_column, label_column, *([group_column] if group_column else [])):
        if column not in raw[0].column_names:
            raise ValueError(f"{name!r} has no column {column!r}. Available: {', '.join(raw[0].column_names)}.")
    names, lookup = _label_names(raw, label_column)
    tables = [_to_documents(part, text_column, label_column, group_column, lookup) for part in raw]
    if test_split is None:
        sides = group_split(tables[0]["label"], tables[0]["group"], test_fraction, seed)
        tables = [tables[0].select(side) for side in sides]
    return DocumentTask(
        name=name,
        train=tables[0],
        test=tables[1],
        label_names=names,
        description=f"The column {label_column!r} of {name}, one of {len(names)} labels.",
        generated=False,
        source=f"Hugging Face Hub: {name}",
    )


def _label_names(parts: list[Dataset], column: str) -> tuple[list[str], dict[Any, int]]:
    feature = parts[0].features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names), {index: index for index in range(feature.num_classes)}
    values = sorted({value for part in parts for value in part[column]})
    return [str(value) for value in values], {value: index for index, value in enumerate(values)}


def _to_documents(
    part: Dataset, text_column: str, label_column: str, group_column: str | None, lookup: dict[Any, int]
) -> Dataset:
    kept = [i for i, value in enumerate(part[label_column]) if lookup.get(value) is not None]
    if len(kept) < len(part):
        part = part.select(np.asarray(kept))  # test splits of the Hub mark unlabeled rows with -1
    groups = [str(value) for value in part[group_column]] if group_column else [f"document {i}" for i in kept]
    return documents_to_dataset(part[text_column], [lookup[value] for value in part[label_column]], groups)
