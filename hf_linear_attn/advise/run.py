"""Which variant pays on this machine at a length, and below which length none does: measured, not looked up.

Layers of the model's shape are timed with random weights, softmax (SDPA) and every variant taking turns, at lengths
up to the one that is asked about. How close each starts to the checkpoint is measured beside it where documents are
given; what training brings back is not.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_linear_attn.advise import layers as timing
from hf_linear_attn.advise.layers import FORWARD, SDPA, STEP
from hf_linear_attn.advise.quality import Documents, start_errors
from hf_linear_attn.measure.crossover import crossover as find_crossover
from hf_linear_attn.measure.profile import median_ratio, peak_memory
from hf_linear_attn.registry import get_patcher

__all__ = ["SDPA", "Advice", "AdviceRow", "Crossover", "advise", "crossover_length", "default_lengths", "format_advice"]

_NAMES = {FORWARD: "forward", STEP: "training step"}
_SHORTEST = 256
_BUSY = 0.15  # scatter of SDPA's own times above which the text warns


@dataclass(frozen=True)
class AdviceRow:
    """One contender at one length.

    Attributes:
        name: the variant with its options, or `SDPA`.
        length: tokens of each sequence.
        seconds: median time of each kind of work (`"forward"`, `"step"`).
        ratio: SDPA's time over this one's, median over rounds: above 1 is faster than SDPA.
    """

    name: str
    length: int
    seconds: dict[str, float]
    ratio: dict[str, float]


@dataclass(frozen=True)
class Crossover:
    """From where on a variant is faster than SDPA.

    Attributes:
        length: tokens, interpolated between measured lengths; None where it is not faster at the longest one.
        at_most: whether it is faster at the shortest measured length already, so that the true one may be less.
    """

    length: int | None
    at_most: bool = False

    def __str__(self) -> str:
        if self.length is None:
            return "-"
        return f"<= {self.length}" if self.at_most else str(self.length)


@dataclass(frozen=True)
class Advice:
    """What was measured.

    Attributes:
        model: as it was named.
        family: its model type.
        length: the length that was asked about, in tokens.
        lengths: all that were measured, ascending; the last is `length`.
        batch_size: sequences.
        layers: layers of the model's shape that were timed.
        work: kinds of work that were timed.
        rows: one for each contender and length that could be run.
        peak_bytes: of each contender and kind of work at `length`, beyond its weights.
        options: of each variant, by its name.
        left_out: contenders that could not be run (`"name"`, or `"name at 4096"`), each with the reason.
        scatter: of SDPA's own times at `length`: the range of their middle half over their median.
        machine: what it ran on, and the layers' sizes.
        errors: of each variant, the relative error of its calibrated start (`advise.quality.start_errors`); empty where
            no documents were given.
        limit: tokens that the checkpoint reads as it is.
    """

    model: str
    family: str
    length: int
    lengths: tuple[int, ...]
    batch_size: int
    layers: int
    work: tuple[str, ...]
    rows: list[AdviceRow]
    peak_bytes: dict[str, dict[str, int]]
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    scatter: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    limit: int = 0

    def row(self, name: str, length: int) -> AdviceRow | None:
        """The contender's row at a length; None if it could not be run there."""
        return next((row for row in self.rows if (row.name, row.length) == (name, length)), None)

    def ranking(self, work: str = FORWARD) -> list[AdviceRow]:
        """All contenders that ran at `length`, SDPA among them, the fastest first."""
        self._check(work)
        return sorted((row for row in self.rows if row.length == self.length), key=lambda row: -row.ratio[work])

    def crossovers(self, work: str = FORWARD) -> dict[str, Crossover]:
        """From where on each variant is faster than SDPA, the earliest first; those that never are come last."""
        self._check(work)
        found = {}
        for name in self.options:
            rows = [row for length in self.lengths if (row := self.row(name, length)) is not None]
            if rows and rows[-1].length == self.length:
                found[name] = crossover_length([row.length for row in rows], [row.ratio[work] for row in rows])
        # Those that are faster already at the shortest length measured: by how much, there.
        at_shortest = {row.name: row.ratio[work] for row in self.rows if row.length == self.lengths[0]}

        def place(item: tuple[str, Crossover]) -> tuple[float, float]:
            name, crossover = item
            return math.inf if crossover.length is None else crossover.length, -at_shortest.get(name, 0.0)

        return dict(sorted(found.items(), key=place))

    def smallest_crossover(self, work: str = FORWARD) -> tuple[str, Crossover] | None:
        """The variant that pays earliest; below its length none does. None if none pays at `length`."""
        first = next(iter(self.crossovers(work).items()), None)
        return None if first is None or first[1].length is None else first

    def front(self) -> list[str]:
        """Those that no other beats both in the speed of a forward at `length` and in error, the fastest first.

        SDPA, whose error is 0, ends it. Empty where errors were not measured.
        """
        found: list[str] = []
        least = math.inf
        for row in self.ranking() if self.errors else ():
            error = 0.0 if row.name == SDPA else self.errors[row.name]
            if error < least:
                least = error
                found.append(row.name)
        return found

    def recommendation(self) -> str | None:
        """The variant that starts closest of those that are faster than SDPA at `length`; None if there is none."""
        faster = [name for name in self.front() if name != SDPA and self.row(name, self.length).ratio[FORWARD] > 1]  # type: ignore[union-attr]
        return faster[-1] if faster else None

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the rankings, crossovers, the front and the recommendation."""
        data = asdict(self)
        data["front"], data["recommendation"] = self.front(), self.recommendation()
        data["ranking"] = {work: [row.name for row in self.ranking(work)] for work in self.work}
        data["crossover"] = {
            work: {name: asdict(crossover) for name, crossover in self.crossovers(work).items()} for work in self.work
        }
        return data

    def _check(self, work: str) -> None:
        if work not in self.work:
            raise ValueError(f"work={work!r}; measured here: {', '.join(self.work)}.")


def crossover_length(lengths: Sequence[int], ratios: Sequence[float]) -> Crossover:
    """Where a ratio reaches 1 to stay there or above, interpolated on logarithmic scales.

    Args:
        lengths: ascending, in tokens.
        ratios: at those lengths; above 1 is faster than what it is compared with.

    Raises:
        ValueError: for no lengths, lengths that do not rise, or another number of ratios.
    """
    if not lengths or len(lengths) != len(ratios) or any(a >= b for a, b in itertools.pairwise(lengths)):
        raise ValueError(f"Needs rising lengths and as many ratios, got {list(lengths)} and {list(ratios)}.")
    found = find_crossover(lengths, ratios)
    if found["how"] == "none up to":
        return Crossover(None)
    return Crossover(found["tokens"], at_most=found["how"] == "at or below")


def default_lengths(length: int) -> tuple[int, ...]:
    """`length` and its halves down to 256 tokens (at least one half), ascending."""
    lengths = [length]
    while lengths[-1] // 2 >= min(_SHORTEST, max(1, length // 2)):
        lengths.append(lengths[-1] // 2)
    return tuple(reversed(lengths))


def advise(
    model: str | os.PathLike[str] | PreTrainedConfig,
    length: int,
    *,
    variants: Iterable[Any] | None = None,
    batch_size: int = 1,
    lengths: Sequence[int] | None = None,
    training: bool = True,
    layers: int = 1,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    budget_seconds: float = 90.0,
    repeats: int = 7,
    documents: Documents | None = None,
    on_step: Callable[[str, int], None] | None = None,
) -> Advice:
    """Time softmax and the variants on layers of a model's shape, on this machine.

    The contenders take turns, so that a change of the machine's speed falls on all alike, and each round is compared
    with SDPA's of the same round. Of the checkpoint only the config is read, unless there are documents: the timed
    weights are random (time does not depend on them), shared
    by all contenders, dropout is off, and a training step includes the gradient of the layers' input. A checkpoint
    with a sliding window is compared without it, as it has to be converted.

    Args:
        model: bundled name, folder or Hub id of a checkpoint of a supported family, or its config.
        length: tokens of a sequence; a position table that is shorter is made as long.
        variants: keys, `(key, options)` pairs or `{key: options}`; by default all whose cost is not quadratic and
            that serve this kind of model.
        batch_size: sequences.
        lengths: those to measure besides `length`, none above it; by default its halves down to 256 tokens.
        training: whether training steps are timed as well as forwards.
        layers: layers to time, at most the model's.
        device: a GPU if there is one, else the CPU, by default.
        dtype: by default bfloat16 on a GPU and float32 on the CPU.
        budget_seconds: about how long the rounds may take. Each length gets 3, and one that is not kept, whatever
            they take; only 1 once the budget is overspent (a busy machine).
        repeats: most rounds at a length.
        documents: called with the tokenizer and the most tokens of a document; gives a batch for each of two or more.
            Each variant's calibrated start is measured on them, against the checkpoint's softmax.
        on_step: called with (contender, length) after each piece of work, for a progress display.

    Raises:
        ValueError: for an unsupported family, a converted model, an unknown variant or option or one that does not
            serve this kind of model, or an argument outside its range.
        TypeError: if `model` is neither a name nor a config.
    """
    _check_numbers(length=length, batch_size=batch_size, layers=layers, repeats=repeats)
    if isinstance(budget_seconds, bool) or not budget_seconds > 0:
        raise ValueError(f"budget_seconds={budget_seconds!r}; allowed: a number above 0.")
    config = timing.read_config(model)
    measured = _all_lengths(length, lengths)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    asked = timing.choose_variants(config, variants)
    if documents is not None and isinstance(model, PreTrainedConfig):
        raise TypeError("Errors are those of a checkpoint's weights, and a config has none: name the checkpoint.")
    shape = timing.layer_config(config, length, layers)
    models, left_out = timing.build_contenders(shape, asked, place, kind)
    work = (FORWARD, STEP) if training else (FORWARD,)
    rows: list[AdviceRow] = []
    times: timing.Times = {}
    spent = 0.0
    for index, n in enumerate(measured):
        data = timing.Embeddings(shape, n, batch_size, place, kind)
        start, share = time.perf_counter(), (budget_seconds - spent) * n / sum(measured[index:])
        rounds = repeats if spent <= budget_seconds else 1
        times, failed = timing.take_turns(models, data, work, budget=share, repeats=rounds, on_step=on_step)
        left_out.update({f"{name} at {n}": "out of memory" for name in failed})
        spent += time.perf_counter() - start
        rows += _rows(times, n)
    peaks = {
        name: {kind: peak_memory(partial(timing.WORK[kind], models[name], data), place).bytes for kind in work}
        for name in times
    }
    ran = [method for method in asked if method.name in times]
    errors = {} if documents is None else start_errors(os.fspath(model), ran, documents, length)  # type: ignore[arg-type]
    return Advice(
        model=os.fspath(model) if not isinstance(model, PreTrainedConfig) else config.name_or_path or config.model_type,
        family=config.model_type,
        length=length,
        lengths=measured,
        batch_size=batch_size,
        layers=shape.num_hidden_layers,
        work=work,
        rows=rows,
        peak_bytes=peaks,
        options={method.name: method.options for method in asked if method.name in models},
        left_out=left_out,
        scatter=max(_scatter(times[SDPA][kind]) for kind in work),
        machine=_machine(shape, place, kind),
        errors=errors,
        limit=get_patcher(config.model_type).max_length(config),
    )


def _check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}; allowed: an integer of at least 1.")


def _all_lengths(length: int, others: Sequence[int] | None) -> tuple[int, ...]:
    if others is None:
        return default_lengths(length)
    for other in others:
        if isinstance(other, bool) or not isinstance(other, int) or not 1 <= other <= length:
            raise ValueError(f"lengths={list(others)!r}; allowed: integers from 1 to length={length}.")
    return tuple(sorted({*others, length}))


def _rows(times: Mapping[str, Mapping[str, list[float]]], length: int) -> list[AdviceRow]:
    rows = []
    for name, taken in times.items():
        ratio = {kind: median_ratio(times[SDPA][kind], seconds) for kind, seconds in taken.items()}
        rows.append(AdviceRow(name, length, {kind: statistics.median(x) for kind, x in taken.items()}, ratio))
    return rows


def _scatter(seconds: Sequence[float]) -> float:
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle


def _machine(shape: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "hidden_size": shape.hidden_size,
        "num_heads": shape.num_attention_heads,
    }


def format_advice(advice: Advice, calibration: str = "--calibration auto") -> str:
    """The advice as text: a table ranked by the time of a forward at the length asked about, and what follows.

    Args:
        advice: what was measured.
        calibration: how `hf-linear-attn convert` is told of the documents, for the command to go on with.
    """
    machine, n = advice.machine, advice.length
    layers = "one layer" if advice.layers == 1 else f"{advice.layers} layers"
    threads = f", {machine['threads']} thread(s)" if machine["threads"] else ""
    lines = [
        f"{advice.model} ({advice.family}, {machine['hidden_size']} wide, {machine['num_heads']} heads), {layers}, "
        f"batch {advice.batch_size}, {machine['dtype']}, {machine['device']}{threads}",
        "",
        *_table(advice),
        "",
    ]
    for work in advice.work:
        best, earliest = advice.ranking(work)[0], advice.smallest_crossover(work)
        name = _NAMES[work].capitalize()
        if best.name == SDPA or earliest is None:
            lines.append(f"{name}: no variant is faster than SDPA at {n} tokens.")
            continue
        sentence = f"{name}: {best.name} is fastest at {n} tokens, {best.ratio[work]:.2f} times SDPA's speed; "
        variant, crossover = earliest
        if crossover.at_most:
            sentence += f"{variant} pays from {crossover.length} tokens or fewer, the shortest length measured."
        else:
            sentence += f"below about {crossover.length} tokens ({variant}) none pays."
        lines.append(sentence)
    if advice.scatter > _BUSY:
        lines.append(
            f"SDPA's own times scatter by {advice.scatter:.0%}: this machine is busy, small differences mean little."
        )
    lines += [f"Left out: {name}: {reason}" for name, reason in advice.left_out.items()]
    lines += _recommend(advice, calibration)
    return "\n".join(lines)


def _recommend(advice: Advice, calibration: str) -> list[str]:
    if not advice.errors:
        return ["How close a variant starts to the checkpoint was not measured: that takes documents (--data FILE)."]
    lines = [
        "error: of the calibrated start against the checkpoint's softmax, on documents no longer than it reads, before "
        "any training (0: softmax, 1: nothing of it). *: none is both faster and closer."
    ]
    name = advice.recommendation()
    if name is None:
        return [*lines, f"Keep softmax at {advice.length} tokens: no variant is faster here."]
    row = advice.row(name, advice.length)
    assert row is not None
    key = name.partition(" ")[0]
    words = [f"hf-linear-attn convert {advice.model} {key}"]
    words += [f"--option {option}={value}" for option, value in advice.options[name].items()]
    words += [f"--max-length {advice.length}"] if advice.length > advice.limit else []
    speed = f"{row.ratio[FORWARD]:.2f} times SDPA's speed"
    return [
        *lines,
        f"Closest of the faster ones: {name}, error {advice.errors[name]:.2f}, {speed}:",
        f"  {' '.join([*words, calibration, f'--output outputs/{key}'])}",
    ]


def _table(advice: Advice) -> list[str]:
    lines = [[f"at {advice.length} tokens"]]
    for work in advice.work:
        lines[0] += [f"{_NAMES[work]} ms", "x SDPA", "pays from", "peak MB"]
    lines[0] += ["error"] if advice.errors else []
    front = advice.front()
    crossovers = {work: advice.crossovers(work) for work in advice.work}
    for row in advice.ranking(FORWARD):
        cells = [row.name]
        for work in advice.work:
            pays = "" if row.name == SDPA else str(crossovers[work][row.name])
            peak = advice.peak_bytes[row.name][work] / 1e6
            cells += [f"{row.seconds[work] * 1e3:.1f}", f"{row.ratio[work]:.2f}", pays, f"{peak:.0f}"]
        if advice.errors:
            mark = "*" if row.name in front else " "
            cells.append(f"{advice.errors.get(row.name, 0.0):.3f}{mark}")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
