"""A passage finds the rest of its document: converted and saved models beside the checkpoint, long and short; costs.

One run, decided by a recipe, writes one line a row as soon as it is measured: a run that is cut off goes on where it
stopped. Queries are read by the system that reads the documents. Nothing is trained; calibrated starts are chosen on
documents that are not searched. `hf_linear_attn.bench.retrieval.tables` makes tables of it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_linear_attn.analysis.recordings import document_batches
from hf_linear_attn.bench.retrieval.corpus import Corpus, build_corpus
from hf_linear_attn.bench.retrieval.recipe import CHECKPOINT, CHUNKS, RetrievalRecipe, SystemRecipe
from hf_linear_attn.bench.retrieval.scores import rank_documents, summarize
from hf_linear_attn.bench.retrieval.systems import Checkpoint, Embedder, build_embedder, embed, load_encoder
from hf_linear_attn.data import load_config
from hf_linear_attn.measure.methods import failures, not_measured
from hf_linear_attn.measure.profile import peak_memory, time_interleaved
from hf_linear_attn.measure.rows import RowFile, about_machine
from hf_linear_attn.saving import saved_at

__all__ = ["measure_retrieval"]

_FIXED = ("truncated", "head_tail")  # read the same whatever may be read beyond it: one row serves every length


def measure_retrieval(
    recipe: RetrievalRecipe,
    output: Path,
    *,
    fresh: bool = False,
    command: str = "",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure what `output/rows.jsonl` does not hold yet.

    Args:
        recipe: what to measure.
        output: folder of the rows.
        fresh: forget earlier rows.
        command: what to write down as the command that made it.
        say: called with a line about each row.

    Returns:
        `{"meta": {...}, "recipe": {...}, "corpus": {...}, "systems": [...], "rows": [...]}`, rows with intervals in
        place of ranks. A system that raised has a row with its `failure`; it is tried again by the next run.
        `meta["unfinished"]`: whether the recipe's minutes were over before everything was measured.

    Raises:
        ValueError: for passages or a short length that the checkpoint cannot read, too few documents, a model that is
            missing, or rows measured under another setting or on other documents.
    """
    checkpoint = load_encoder(recipe.model)
    _check_lengths(recipe, checkpoint)
    for system in recipe.systems:
        if system.model is not None:
            load_config(system.model)  # that it is there
    corpus = build_corpus(recipe.documents, recipe.passages, checkpoint.tokenizer)
    calibration = []
    if any(system.start_on_data for system in recipe.systems):
        texts, wanted = corpus.calibration, recipe.calibration
        calibration = document_batches(texts, checkpoint.tokenizer, wanted.tokens, wanted.documents)
    path = output / "rows.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    file = RowFile(path, recipe.setting() | {"corpus": corpus.about["digest"]}, retry=("failure", "left_out"))
    run = _Run(recipe, checkpoint, corpus, calibration, file, say)
    begin = time.perf_counter()
    last = math.inf if recipe.minutes is None else begin + 60 * recipe.minutes
    unfinished = any(time.perf_counter() > last for _ in _measure(run))
    say(f"Measured for {(time.perf_counter() - begin) / 60:.1f} minutes")
    if unfinished:
        say(f"The recipe's {recipe.minutes:g} minutes are over, and not all is measured: run it again to go on")
    return {
        "meta": {**about_machine(command), "unfinished": unfinished},
        "recipe": asdict(recipe),
        "corpus": {**corpus.about, "limit": checkpoint.limit},
        "systems": [_about(system) | {"reference": system.label in recipe.references} for system in recipe.systems],
        "rows": _results(run),
    }


@dataclass(frozen=True)
class _Run:
    """A run, and what its rows share: systems that are ready, and their vectors of the queries."""

    recipe: RetrievalRecipe
    checkpoint: Checkpoint
    corpus: Corpus
    calibration: list[dict[str, Any]]
    file: RowFile
    say: Callable[[str], None]
    embedders: dict[Any, Embedder] = field(default_factory=dict)
    queries: dict[Any, torch.Tensor] = field(default_factory=dict)


def _check_lengths(recipe: RetrievalRecipe, checkpoint: Checkpoint) -> None:
    """Raise `ValueError` for what the checkpoint must read whole and cannot."""
    if long := [length for length in recipe.short_lengths if length > checkpoint.limit]:
        raise ValueError(f"recipe.short_lengths has {long}; {recipe.model!r} reads {checkpoint.limit} tokens at most.")
    if recipe.passages.tokens > (room := checkpoint.limit - checkpoint.special):
        raise ValueError(
            f"passages.tokens has {recipe.passages.tokens}; {recipe.model!r} reads {room} beside its special tokens."
        )


def _about(system: SystemRecipe) -> dict[str, Any]:
    start = system.start if system.calibrates else None
    family = system.method.key if system.method is not None else system.label
    saved = system.model is not None
    return {"name": system.label, "family": family, "reads": system.reads, "start": start, "saved": saved}


# ---------------------------------------------------------------------------------------------------------------
# What is measured, in which order
# ---------------------------------------------------------------------------------------------------------------


def _measure(run: _Run) -> Iterator[None]:
    """Measure what is missing; yields before each row. The first length, with all about it, comes before the others."""
    for turn, length in enumerate(run.recipe.lengths):
        yield from _costs(run, length)
        for identity, system in _planned(run, "long", length):
            yield from _retrieve(run, identity, system)
        for short in run.recipe.short_lengths if turn == 0 else ():
            for identity, system in _planned(run, "short", short):
                yield from _retrieve(run, identity, system)


def _planned(run: _Run, kind: str, length: int) -> list[tuple[dict[str, Any], SystemRecipe]]:
    """Systems of one part (`long`, `short` or `cost`) at one length, each with what tells its row from others."""
    systems = run.recipe.systems
    if kind == "short":
        systems = [CHECKPOINT, *(system for system in systems if system.reads == "whole")]
    if kind == "cost" and not run.recipe.cost_repeats:
        systems = []
    planned = []
    for system in systems:
        # Short inputs go through the model of the first length: the one that would be kept.
        room = run.recipe.room(system, run.recipe.lengths[0] if kind == "short" else length)
        identity = {
            "kind": kind,
            "system": system.label,
            "length": min(run.checkpoint.limit, length) if kind == "long" and system.reads in _FIXED else length,
            "room": room if system.reads == "whole" else None,
            "what": {name: value for name, value in asdict(system).items() if name != "name"},
        }
        if system.model is not None:  # one that was saved anew is another
            identity["saved_at"] = saved_at(system.model)
        if kind == "cost":
            identity |= {"repeats": run.recipe.cost_repeats, "threads": torch.get_num_threads()}
        planned.append((identity, system))
    return planned


def _results(run: _Run) -> list[dict[str, Any]]:
    """The rows of this recipe, with intervals in place of ranks; `tokens_read` is what is read of a longer document."""
    found = []
    parts = (("long", run.recipe.lengths), ("short", run.recipe.short_lengths), ("cost", run.recipe.lengths))
    for kind, length in ((kind, length) for kind, lengths in parts for length in lengths):
        rows = {identity["system"]: run.file.find(**identity) for identity, _ in _planned(run, kind, length)}
        measured = {name: row for name, row in rows.items() if row is not None}
        against = {
            n: measured[n]
            for n in (*run.recipe.references, CHECKPOINT.label)
            if n in measured and "ranks" in measured[n]
        }
        for row in measured.values():
            kept = {name: value for name, value in row.items() if name not in ("ranks", "gaps", "cosines")}
            kept |= {"length": length, "tokens_read": row["length"]}
            if "cosines" in row:
                kept["cosine"] = statistics.fmean(row["cosines"])
            if "ranks" in row:
                kept |= summarize(row, run.corpus.query_groups, against, run.recipe.num_resamples)
            found.append(kept)
    return found


# ---------------------------------------------------------------------------------------------------------------
# Retrieval
# ---------------------------------------------------------------------------------------------------------------


def _retrieve(run: _Run, identity: dict[str, Any], system: SystemRecipe) -> Iterator[None]:
    """Ranks of every passage's document; in the short part also cosines of the documents to the checkpoint's."""
    if run.file.has(**identity):
        return
    yield
    begin = time.perf_counter()
    row = dict(identity)
    length = identity["length"]
    if not _left_out(run, row, system):
        with failures(row):
            embedder = _embedder(run, system, identity["room"])
            queries = _query_vectors(run, embedder)
            documents = embed(embedder, run.corpus.documents, length)
            ranks, gaps = rank_documents(queries.numpy(), documents.numpy(), run.corpus.owners)
            row |= {"ranks": ranks.tolist(), "gaps": [round(gap, 5) for gap in gaps.tolist()]}
            if identity["kind"] == "short":
                own = embed(_embedder(run, CHECKPOINT, None), run.corpus.documents, length)
                row["cosines"] = [round(cosine, 5) for cosine in (documents * own).sum(-1).tolist()]
    row["seconds"] = round(time.perf_counter() - begin, 2)
    run.file.append(row)
    run.say(_line(row))


def _left_out(run: _Run, row: dict[str, Any], system: SystemRecipe) -> bool:
    """Whether a system is too costly at the row's length, which the row then says."""
    if system.quadratic and row["length"] > run.recipe.quadratic_up_to:
        row["left_out"] = f"quadratic, and longer than {run.recipe.quadratic_up_to:,} tokens"
    return "left_out" in row


def _embedder(run: _Run, system: SystemRecipe, room: int | None) -> Embedder:
    key = (id(system), room)
    if key not in run.embedders:
        seed = run.recipe.documents.seed
        run.embedders[key] = build_embedder(system, run.checkpoint, room, run.calibration, seed)
    return run.embedders[key]


def _query_vectors(run: _Run, embedder: Embedder) -> torch.Tensor:
    key = id(embedder)
    if key not in run.queries:
        length = run.recipe.passages.tokens + run.checkpoint.special
        run.queries[key] = embed(embedder, run.corpus.queries, length)
    return run.queries[key]


# ---------------------------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------------------------


def _costs(run: _Run, length: int) -> Iterator[None]:
    """Seconds and memory of one document of `length` tokens, chunk-and-average and the systems taking turns."""
    missing = [(identity, system) for identity, system in _planned(run, "cost", length) if not run.file.has(**identity)]
    if not missing:
        return
    yield
    text = [token for document in run.corpus.documents for token in document]
    document = (text * (length // len(text) + 1))[:length]
    calls: dict[str, Callable[[], Any]] = {"": partial(embed, _embedder(run, CHUNKS, None), [document], length)}
    rows = {system.label: dict(identity) for identity, system in missing}
    for identity, system in missing:
        row = rows[system.label]
        if _left_out(run, row, system):
            continue
        with failures(row):
            embedder = _embedder(run, system, identity["room"])
            embed(embedder, [document[:64]], length)  # what is made on first use is not the document's
            call = partial(embed, embedder, [document], length)
            row["peak_mb"] = round(peak_memory(call).megabytes, 1)
            calls[system.label] = call
    times = time_interleaved(calls, repeats=run.recipe.cost_repeats, warmup=0)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, row in rows.items():
        if name in medians:
            row |= {"seconds": medians[name], "chunks_seconds": medians[""]}
        run.file.append(row)
        run.say(_line(row))


def _line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    place = f"{row['kind']:5s} {row['length']:>6,} {row['system']}"
    if reason := not_measured(row):
        return f"{place}: {reason}"
    if row["kind"] == "cost":
        return f"{place}: {row['seconds']:.3f} s, {row['peak_mb']:.0f} MB"
    top1 = sum(rank == 1 for rank in row["ranks"]) / len(row["ranks"])
    cosine = f", cosine to the checkpoint {statistics.fmean(row['cosines']):.3f}" if "cosines" in row else ""
    return f"{place}: top-1 {top1:.3f}{cosine} ({row['seconds']:.1f} s)"
