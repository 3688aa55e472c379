"""A dataset of the Hugging Face Hub, by its id."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, packaged_modules
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_linear_attn import __version__
from hf_linear_attn.data.tables import Part, Place, Sides

__all__ = ["Flatten", "builder_names", "hub_sides"]

# Rows of a source to rows with plain columns: one for each question of a paper, say.
Flatten = Callable[[Iterable[Mapping[str, Any]]], Iterator[dict[str, Any]]]


def builder_names() -> set[str]:
    """Names under which `datasets.load_dataset` builds from files: without any, it takes the current folder's."""
    return {module.name for module in pkgutil.iter_modules(packaged_modules.__path__)}


def hub_sides(
    name: str,
    bundled: Sequence[str],
    catalog: Sequence[str] = (),
    *,
    config_name: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    test_split: str | None = "test",
    data_files: Mapping[str, str] | None = None,
    flatten: Flatten | None = None,
    streaming: bool = False,
) -> Sides:
    """The two splits of a dataset, as they are on the Hub; no code of the dataset is run.

    Args:
        name: id on the Hub.
        bundled: names of bundled sources, for messages.
        catalog: names of the catalog, likewise.
        config_name: configuration of the dataset.
        revision: branch, tag or commit.
        train_split: split to train on.
        test_split: split to test on; None leaves the training split to be split.
        data_files: split -> file of the repository, where its own splits are not what is wanted.
        flatten: makes plain columns of the rows.
        streaming: read row by row instead of downloading first.

    Raises:
        FileNotFoundError: where the Hub has no such dataset or cannot be reached.
        ValueError: for a name that cannot be an id, a dataset that needs a script, an unknown configuration or split.
    """
    close = difflib.get_close_matches(name, [*bundled, *catalog], n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    no_other = f"{name!r} is none of {', '.join(bundled)}, no name of the catalog, no local file or folder{hint}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{no_other}, and cannot be the id of a dataset: {error}") from None
    asked: dict[str, Any] = {"streaming": streaming, "revision": revision}
    try:
        if data_files is None:
            loaded = load_dataset(name, config_name, **asked)
        else:
            urls = {split: f"hf://datasets/{name}/{path}" for split, path in data_files.items()}
            loaded = load_dataset("json", data_files=urls, streaming=streaming)
    except OSError as error:  # DatasetNotFoundError and ConnectionError among them
        raise FileNotFoundError(f"{no_other}, and could not be loaded from the Hub: {_first_line(error)}") from error
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise ValueError(
            f"The dataset {name!r} is made by a script of its own, which is not run. Give the files themselves, or "
            "revision=refs/convert/parquet where the Hub has converted it."
        ) from error
    except (DatasetsError, ValueError) as error:
        raise ValueError(f"The dataset {name!r} cannot be loaded: {_first_line(error.__cause__ or error)}") from error
    missing = [split for split in (train_split, test_split) if split is not None and split not in loaded]
    if missing:
        raise ValueError(
            f"The dataset {name!r} has no split {missing}. Available: {', '.join(loaded)}. "
            "Name them with train_split and test_split; test_split=null splits the training part."
        )

    def part(split: str) -> list[Part]:
        rows = loaded[split]
        return [Part(Place(split), _flattened(rows, flatten, streaming) if flatten else rows)]

    return Sides(part(train_split), part(test_split) if test_split is not None else None)


def _flattened(rows: Any, flatten: Flatten, streaming: bool) -> Dataset | IterableDataset:
    maker = IterableDataset if streaming else Dataset
    return maker.from_generator(_generate, gen_kwargs={"flatten": flatten, "rows": rows, "version": __version__})


def _generate(flatten: Flatten, rows: Any, version: str) -> Iterator[dict[str, Any]]:
    """The plain rows; `version` is part of the key under which `datasets` keeps them."""
    yield from flatten(rows)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[:2])[:400].rstrip(".") + "."
