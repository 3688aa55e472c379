"""Local files and folders of the user's own, read by `datasets`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from hf_linear_attn.data.kinds import name_and_allowed
from hf_linear_attn.data.tables import Part, Place, Sides, quiet_datasets

__all__ = ["FORMATS", "UNITS", "file_sides", "folder_sides"]

# Ending -> the builder of `datasets` that reads it, and its options.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
UNITS = ("document", "paragraph", "line")  # what of a .txt file is a document

# Words of a file's name, or of its folder's, that say which part it belongs to.
_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def file_sides(source: Path | Sequence[Any] | Mapping[str, Any], *, sample_by: str, streaming: bool) -> Sides:
    """One file, several, or `{"train": files, "test": files}`.

    Raises:
        ValueError: for parts other than train and test, an ending that is not read, or a file that is damaged.
        FileNotFoundError: for a file that is not there.
    """
    if isinstance(source, Mapping):
        for name in source:
            if name not in ("train", "test"):
                raise ValueError(name_and_allowed("The part of the source", name, ("train", "test")))
        if "train" not in source:
            raise ValueError(f"The source names no training files: {dict(source)!r}. Write {{train: ..., test: ...}}.")
        parts = {name: _listed(files, name) for name, files in source.items()}
        both = sorted(
            {str(file.resolve()) for file in parts["train"]} & {str(f.resolve()) for f in parts.get("test", [])}
        )
        if both:
            raise ValueError(f"{both[0]} is named as training and as test file; a test on it would tell nothing.")
        root = _shared_folder([file for files in parts.values() for file in files])
        read = {name: _read(files, root, sample_by, streaming) for name, files in parts.items()}
        return Sides(read["train"], read.get("test"))
    files = _listed(source, "train")
    return Sides(_read(files, _shared_folder(files), sample_by, streaming))


def _shared_folder(files: Sequence[Path]) -> Path:
    """Where names of files start: no two of them are alike from there."""
    return Path(os.path.commonpath([file.absolute().parent for file in files]))


def _listed(files: Any, part: str) -> list[Path]:
    listed = [files] if isinstance(files, str | Path) else files
    if not isinstance(listed, Sequence) or not listed or not all(isinstance(f, str | Path) and str(f) for f in listed):
        raise ValueError(f"The {part} part must name a file or a list of files, given {files!r}.")
    paths = [Path(file).expanduser() for file in listed]
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name its files, or give the folder alone as the source.")
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {str(path)!r}.")
    return paths


def folder_sides(folder: Path, kind: str, *, sample_by: str, streaming: bool) -> tuple[Sides, str]:
    """A folder of tables, of texts, or, for classification, of label folders with texts.

    Which part a table or, for `"text"`, a text belongs to is said by its name or by the subfolder it lies in.

    Returns:
        the sides, and a note on validation files.

    Raises:
        ValueError: for a folder without such files, with both, or whose parts do not go together.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in FORMATS
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
        and path.is_file()
    )
    texts = [path for path in found if path.suffix.lower() == ".txt"]
    tables = [path for path in found if path.suffix.lower() != ".txt"]
    if texts and tables:
        raise ValueError(
            f"{folder} holds tables ({tables[0].relative_to(folder)}) and texts ({texts[0].relative_to(folder)}); name "
            "the files that are meant, source: {train: ..., test: ...}."
        )
    if not tables and kind == "sequence_classification":
        if sample_by != "document":
            raise ValueError(f"sample_by={sample_by} serves texts without labels; a text of {folder} is one document.")
        return _label_folders(folder), ""
    if not found:
        raise ValueError(f"{folder} holds no file that can be read: {', '.join(FORMATS)}.")
    if texts and kind != "text":
        raise ValueError(f"{folder} holds texts only, which carry no columns for {kind}: give it tables.")
    sides, note = _by_name(found, folder)
    read = {name: _read(files, folder, sample_by, streaming) for name, files in sides.items()}
    return Sides(read["train"], read.get("test")), note


def _by_name(files: list[Path], folder: Path) -> tuple[dict[str, list[Path]], str]:
    """Train and test files by their names; all of them as training files where none is named as a test file."""
    said: dict[str, list[Path]] = {"train": [], "validation": [], "test": [], "": []}
    for file in files:
        said[_part_of(file.relative_to(folder))].append(file)
    note = ""
    if said["validation"] and said["test"]:
        note = f"{len(said['validation'])} validation file(s) were left out: there are test files."
    elif said["validation"] and said["train"]:
        note = "The validation files are the test part."
        said["test"] = said["validation"]
    held_out = said["test"] or said["validation"]
    if held_out and said[""]:
        named, unnamed = (files[0].relative_to(folder) for files in (held_out, said[""]))
        raise ValueError(
            f"{folder} holds {named} and {unnamed}, whose name says no part: name the files that are meant, "
            "source: {train: ..., test: ...}."
        )
    if said["train"] and said["test"]:
        return {"train": said["train"], "test": said["test"]}, note
    return {"train": files}, ""


def _part_of(file: Path) -> str:
    """The part that a name says, the outermost folder's first; a text's title may hold any word and says none."""
    for place in (*file.parts[:-1], file.stem):
        words = {place.lower()} if file.suffix.lower() == ".txt" else set(re.findall(r"[a-z]+", place.lower()))
        for part, known in _WORDS.items():
            if words & known:
                return part
    return ""


def _label_folders(folder: Path) -> Sides:
    """`folder/<label>/**/*.txt`, or the same below `folder/train` and `folder/test`."""
    ready = (folder / "train").is_dir() and (folder / "test").is_dir()
    roots = [folder / "train", folder / "test"] if ready else [folder]
    labels, parts = [], []
    for root in roots:
        files = [
            (label, file)
            for label in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
            for file in sorted(label.rglob("*.txt"))
        ]
        labels.append({label.name for label, _ in files})
        rows = {"text": [_read_text(file) for _, file in files], "label": [label.name for label, _ in files]}
        names = [file.relative_to(root).as_posix() for _, file in files]
        parts.append([Part(Place(root.name, names), Dataset.from_dict(rows))])
    if len(labels[0] | labels[-1]) < 2:
        raise ValueError(
            f"{folder} must hold at least two subfolders with *.txt files, one for each label; "
            f"found {sorted(labels[0] | labels[-1]) or 'none'}."
        )
    if differing := sorted(labels[0] ^ labels[-1]):
        raise ValueError(f"Label(s) {differing} are in only one of {roots[0]} and {roots[-1]}.")
    return Sides(parts[0], parts[1] if ready else None)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}.") from error


def _read(files: Sequence[Path], root: Path, sample_by: str, streaming: bool) -> list[Part]:
    """One part for each table, one for all texts that are a document each."""
    for file in files:
        if file.suffix.lower() not in FORMATS:
            raise ValueError(f"{file} cannot be read: its name ends in none of {', '.join(FORMATS)}.")
        if file.stat().st_size == 0 and not (file.suffix.lower() == ".txt" and sample_by == "document"):
            raise ValueError(f"{file} is empty.")
        if file.suffix.lower() != ".txt" and sample_by != "document":
            raise ValueError(f"sample_by={sample_by} cuts .txt files; {file} is a table, whose rows are documents.")
    names = {file: file.absolute().relative_to(root.absolute()).as_posix() for file in files}
    whole = [file for file in files if file.suffix.lower() == ".txt" and sample_by == "document"]
    parts = [Part(Place(names[file]), _load([file], sample_by, streaming)) for file in files if file not in set(whole)]
    if whole:
        place = Place(names[whole[0]], [names[file] for file in whole])
        parts.append(Part(place, _load(whole, sample_by, streaming)))
    return parts


def _load(files: Sequence[Path], sample_by: str, streaming: bool) -> Any:
    """Rows of files of one format, by `datasets`."""
    builder, options = FORMATS[files[0].suffix.lower()]
    if builder == "text":
        options = {"sample_by": sample_by}
    try:
        with quiet_datasets():
            return load_dataset(
                # Names are patterns to it.
                builder,
                data_files=[glob.escape(str(file)) for file in files],
                split="train",
                streaming=streaming,
                **options,
            )
    except (DatasetsError, pa.ArrowException, OSError, ValueError) as error:
        if builder == "text":
            for file in files:
                _read_text(file)
        cause = error.__cause__ or error
        reason = "it holds no rows" if "corresponds to no data" in str(cause) else str(cause).partition("\n")[0]
        raise ValueError(f"{files[0]} cannot be read as {builder}: {reason.rstrip('.')}.") from error
