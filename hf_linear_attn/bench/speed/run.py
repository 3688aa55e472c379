"""Speed and memory of models, layers, peers and generation, as a recipe (`recipes/bench/`) decides: the run itself.

Contenders take turns, so that ratios hold on a machine whose speed changes. One line a row is written as soon as it
is measured: a run that is cut off goes on where it stopped. Who fails, is refused, or is not installed has a row that
says so. `hf_linear_attn.measure.crossover` draws conclusions from the rows.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_linear_attn.bench.speed.contenders import (
    OURS,
    Contender,
    Trial,
    layer_groups,
    model_groups,
    peer_groups,
)
from hf_linear_attn.bench.speed.decode import measure_decode
from hf_linear_attn.bench.speed.long import measure_long
from hf_linear_attn.bench.speed.recipe import SDPA, BenchRecipe, LayerBench, ModelBench, PeerBench
from hf_linear_attn.measure.crossover import summarize
from hf_linear_attn.measure.methods import failures, not_measured
from hf_linear_attn.measure.profile import median_ratio, peak_memory, time_interleaved
from hf_linear_attn.measure.rows import RowFile, about_machine

__all__ = ["copy_bandwidth", "device_slug", "measure_bench"]

Say = Callable[[str], None]
_PACKAGES = (
    "triton", "flash-linear-attention", "performer-pytorch", "linformer", "nystrom-attention",
    "linear-attention-transformer", "long-short-transformer", "reformer-pytorch",
)  # fmt: skip
_COPIED_BYTES = 1 << 30


def measure_bench(
    recipe: BenchRecipe,
    output: Path,
    *,
    only: list[str] | None = None,
    fresh: bool = False,
    command: str = "",
    say: Say = print,
) -> dict[str, Any]:
    """Measure what `output/<device>.rows.jsonl` does not hold yet.

    Args:
        recipe: what to measure.
        output: folder of the rows.
        only: keys of the variants to measure, and of the peers of these methods; all by default.
        fresh: forget earlier rows of this device.
        command: what to write down as the command that made it.
        say: called with a line about each row.

    Returns:
        `{"meta": {...}, "recipe": {...}, "summary": {...}, "rows": [...]}`. A contender that raised has a row with
        its `failure`; it is tried again by the next run. `meta["unfinished"]`: whether the recipe's minutes were over
        before everything was measured.

    Raises:
        ValueError: for a device that this machine lacks, an unknown variant, or rows measured under another setting.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("The recipe asks for device 'cuda', and PyTorch finds no CUDA device here. Allowed: cpu.")
    slug, threads = device_slug(recipe.device), torch.get_num_threads()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        meta = _meta(recipe, slug, command)
        path = output / f"{slug}.rows.jsonl"
        if fresh:
            path.unlink(missing_ok=True)
        kept = ("device", "threads", "torch")
        # Limits may have been raised, and packages installed, since a row was left out.
        retry = ("failure", "left_out", "missing")
        file = RowFile(path, recipe.setting() | {name: meta[name] for name in kept}, retry)
        begin = time.perf_counter()
        last = math.inf if recipe.minutes is None else begin + 60 * recipe.minutes
        with _small_heap():
            meta["unfinished"] = any(time.perf_counter() > last for _ in _groups(recipe, only, file, say))
        say(f"Measured for {(time.perf_counter() - begin) / 60:.1f} minutes")
        if meta["unfinished"]:
            say(f"The recipe's {recipe.minutes:g} minutes are over, and not all is measured: run it again to go on")
    finally:
        torch.set_num_threads(threads)
    parts = {part.name for part in recipe.parts()}
    rows = [row for row in file.rows if row["part"] in parts]
    results = {"meta": meta, "recipe": asdict(recipe), "rows": rows}
    return {"meta": meta, "recipe": results["recipe"], "summary": summarize(results), "rows": rows}


def device_slug(device: str) -> str:
    """What files of results are called: `cpu`, `nvidia-h100`."""
    if torch.device(device).type != "cuda":
        return torch.device(device).type
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return "-".join(word for word in words if not re.fullmatch(r"\d+gb|hbm\w*|pcie|sxm\d*", word))


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy inside the device's memory reads and writes; the best of several."""
    source = torch.empty(_COPIED_BYTES // 4, dtype=torch.float32, device=device).fill_(1.0)
    target = torch.empty_like(source)
    times = time_interleaved({"copy": lambda: target.copy_(source)}, repeats=10, warmup=3, device=device)
    return 2 * _COPIED_BYTES / min(times["copy"])


def _meta(recipe: BenchRecipe, slug: str, command: str) -> dict[str, Any]:
    cuda = recipe.device == "cuda"
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        **about_machine(command),
        "title": recipe.title,
        "device": slug,
        "device_name": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "dtype": recipe.dtype,
        "packages": versions,
        # What the byte floor of an attention is divided by.
        "bandwidth": copy_bandwidth(recipe.device) if cuda else None,
    }


@contextmanager
def _small_heap() -> Iterator[None]:
    """Keep what is there out of garbage collections: one precedes every measurement of memory, and any may fall into
    a timed call."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# ---------------------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------------------


def _groups(recipe: BenchRecipe, only: list[str] | None, file: RowFile, say: Say) -> Iterator[None]:
    """Measure group after group, yielding before each, so that the caller may stop; what takes longest comes last."""
    for layer in recipe.layers:
        yield from _measure_part(recipe, "layer", layer, layer_groups, only, file, say)
    for peers in recipe.peers:
        yield from _measure_peers(recipe, peers, only, file, say)
    for decode in recipe.decode:
        yield from measure_decode(recipe, decode, only, file, say)
    for model in recipe.models:
        yield from _measure_part(recipe, "model", model, model_groups, only, file, say)
    for long in recipe.long:
        yield from measure_long(recipe, long, only, file, say)


def _measure_part(
    recipe: BenchRecipe,
    kind: str,
    part: ModelBench | LayerBench,
    make_groups: Callable[..., tuple[list[list[Contender]], Callable[[nn.Module], Trial]]],
    only: list[str] | None,
    file: RowFile,
    say: Say,
) -> Iterator[None]:
    """Models or layers at every length, in every mode."""
    for length in part.lengths:
        groups, make_trial = make_groups(recipe, part, length, only)
        for mode in part.modes:
            place = {"kind": kind, "part": part.name, "mode": mode, "length": length}
            for sdpa, *rest in groups:
                rest = [other for other in rest if not file.has(**place, contender=other.name)]
                new = not file.has(**place, contender=SDPA)
                if not rest and not new:
                    continue
                yield
                rows = _take_turns(recipe, [sdpa, *rest], make_trial, mode)
                reference = rows[SDPA]
                for contender in [sdpa, *rest] if new else rest:
                    row = {**place, "contender": contender.name, **contender.facts, **rows[contender.name]}
                    _compare(row, reference)
                    _floor(row, recipe, part)
                    file.append(_count_rounds(row))
                    say(_line(row))
        torch.compiler.reset()


def _measure_peers(
    recipe: BenchRecipe, part: PeerBench, only: list[str] | None, file: RowFile, say: Say
) -> Iterator[None]:
    """Each peer beside ours; one row for both."""
    for length in part.lengths:
        for mode in part.modes:
            place = {"kind": "peer", "part": part.name, "mode": mode, "length": length}
            measured = partial(_has_peer, file, place)
            for contenders, make_trial in peer_groups(recipe, part, length, mode, only, measured):
                yield
                rows = _take_turns(recipe, contenders, make_trial, mode)
                for theirs in contenders[1::2]:
                    row = {**place, "contender": theirs.name, **theirs.facts, **rows[theirs.name]}
                    _compare(row, rows[SDPA])
                    _add_ours(row, rows[OURS + theirs.name])
                    _floor(row, recipe, part)
                    file.append(_count_rounds(row))
                    say(_line(row))
            torch.compiler.reset()


def _has_peer(file: RowFile, place: dict[str, Any], name: str) -> bool:
    return file.has(**place, contender=name)


def _add_ours(row: dict[str, Any], mine: dict[str, Any]) -> None:
    """Beside a peer's numbers, those of our layer in the same turns, or why there are none."""
    for kind in ("failure", "refused"):
        if kind in mine:
            row.setdefault(kind, f"ours: {mine[kind]}")
    if "seconds" in mine:
        row |= {"ours_seconds": mine["seconds"], "ours_peak_mb": mine["peak_mb"]}
    if "seconds" in mine and "seconds" in row:
        row["ours_ratio"] = median_ratio(row["rounds"], mine["rounds"])


def _take_turns(
    recipe: BenchRecipe, contenders: Sequence[Contender], make_trial: Callable[[nn.Module], Trial], mode: str
) -> dict[str, dict[str, Any]]:
    """Build the contenders, measure the memory of each, and time all of them side by side.

    Returns:
        name to `{"seconds", "rounds", "peak_mb"}`, or to what kept it from being measured; `rounds` are the seconds
        of each.
    """
    rows: dict[str, dict[str, Any]] = {contender.name: dict(contender.reason) for contender in contenders}
    trials: dict[str, Trial] = {}
    for contender in contenders:
        if contender.build is None:
            continue
        with failures(rows[contender.name]):
            trial = make_trial(contender.build())
            call = getattr(trial, mode)
            call()  # what is compiled, tuned or made on first use is not the call's
            trial.clear()
            peak = peak_memory(call, recipe.device)
            trial.clear()
            rows[contender.name]["peak_mb"] = round(peak.megabytes, 2)
            trials[contender.name] = trial
        _free(recipe.device, collect=contender.name not in trials)
    if trials:
        row: dict[str, Any] = {}
        with failures(row):
            times = time_interleaved(
                {name: getattr(trial, mode) for name, trial in trials.items()},
                repeats=recipe.repeats,
                warmup=0,
                seconds=recipe.seconds,
                device=recipe.device,
                before=lambda name: trials[name].clear(),
            )
            for name, values in times.items():
                rows[name] |= {"seconds": statistics.median(values), "rounds": values}
        for name in trials if row else ():
            rows[name] |= row
    trials.clear()
    _free(recipe.device)
    return rows


def _free(device: str, collect: bool = True) -> None:
    """Give memory back: after a group, and what a contender that failed half-way has left."""
    if collect:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _compare(row: dict[str, Any], reference: dict[str, Any]) -> None:
    """SDPA's time in the same turns, and its ratio: above 1 the row is faster."""
    if "seconds" in row and "seconds" in reference:
        row |= {
            "sdpa_seconds": reference["seconds"],
            "ratio": median_ratio(reference["rounds"], row["rounds"]),
            "sdpa_peak_mb": reference["peak_mb"],
        }


def _count_rounds(row: dict[str, Any]) -> dict[str, Any]:
    """A row for the file: the number of its rounds, in place of their seconds."""
    return {name: len(value) if name == "rounds" else value for name, value in row.items()}


def _floor(row: dict[str, Any], recipe: BenchRecipe, part: Any) -> None:
    """Bytes that an attention alone cannot but move: its inputs and outputs once, without anything between.

    Forward: q, k and v are read, o is written. Backward: those and the gradient of o are read, three gradients are
    written (o itself need not be read by a method that keeps its denominators).
    """
    if getattr(part, "projections", True) or "seconds" not in row:
        return
    tensors = 4 if row["mode"] == "forward" else 11
    size = torch.empty((), dtype=getattr(torch, recipe.dtype)).element_size()
    row["floor_bytes"] = tensors * part.batch_size * row["length"] * part.hidden_size * size


def _line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    place = f"{row['part']} {row['mode']} {row['length']:>6,} {row['contender']}"
    if reason := not_measured(row):
        return f"{place}: {reason}"
    if "seconds" not in row:
        return f"{place}: not measured"
    parts = [f"{1000 * row['seconds']:.3g} ms", f"{row['peak_mb']:,.0f} MB"]
    if "ratio" in row:
        parts.insert(1, f"{row['ratio']:.2f}x SDPA")
    if "ours_ratio" in row:
        parts.append(f"ours {row['ours_ratio']:.2f}x as fast")
    return f"{place}: {', '.join(parts)}"
