"""What a model costs: parameters, forward time against length, peak memory."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

__all__ = [
    "ForwardTime",
    "ParameterCounts",
    "PeakMemory",
    "forward_time_against_length",
    "longest_input",
    "median_ratio",
    "parameter_counts",
    "peak_memory",
    "time_interleaved",
    "track_peak_memory",
]

_SAMPLE_SECONDS = 0.002
_LEAST_ROUNDS = 3  # below, a median is no protection from one disturbed round
_FLUSHED_BYTES = 256 << 20  # more than the last cache of any GPU


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model, each shared one counted once.

    Attributes:
        total: all of them.
        new: those that a conversion added.
        trainable: those that require a gradient.
    """

    total: int
    new: int
    trainable: int


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Count a model's parameters; new are those of the submodules called `linear_attn`."""
    named = list(model.named_parameters())  # a shared parameter comes once
    return ParameterCounts(
        total=sum(p.numel() for _, p in named),
        new=sum(p.numel() for name, p in named if "linear_attn" in name.split(".")),
        trainable=sum(p.numel() for _, p in named if p.requires_grad),
    )


@dataclass(frozen=True)
class ForwardTime:
    """One point of the forward-time curve.

    Attributes:
        name: the model.
        length: tokens of each sequence.
        seconds: median wall time of a forward.
        ratio: `seconds` over the first model's at this length (below 1 is faster), None if that one cannot
            read it.
    """

    name: str
    length: int
    seconds: float
    ratio: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def longest_input(model: nn.Module) -> int | None:
    """Most tokens the model's absolute position table can number, None where the config states no limit."""
    config: Any = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    # RoBERTa numbers its positions from padding_idx + 1: that many rows are not usable.
    embeddings = [m for name, m in model.named_modules() if name.split(".")[-1] == "position_embeddings"]
    offsets = [m.padding_idx + 1 for m in embeddings if getattr(m, "padding_idx", None) is not None]
    return int(positions) - max(offsets, default=0)


def forward_time_against_length(
    models: Mapping[str, nn.Module],
    lengths: Sequence[int],
    *,
    batch_size: int = 1,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
    device: str | torch.device | None = None,
    max_lengths: Mapping[str, int] | None = None,
    on_step: Callable[[str, int], None] | None = None,
) -> list[ForwardTime]:
    """Time the forward pass of several models side by side.

    At each length the models take turns, one forward each a round, so that a change of the machine's speed
    falls on all alike; the median over rounds is reported. Inputs are random token ids without padding, in
    inference mode.

    Args:
        models: name to model; the first is the reference of the ratios.
        lengths: tokens of a sequence.
        batch_size: sequences of a forward.
        repeats: timed rounds.
        warmup: rounds that are not timed.
        seed: seed of the token ids.
        device: where to run; the models are moved there. Where they are, by default.
        max_lengths: longest input of a model, where `longest_input` does not know it; longer ones are left
            out.
        on_step: called with (name, length) after each forward, for a progress bar.

    Returns:
        one row per length and model that can read it, lengths in the given order.

    Raises:
        ValueError: for no model, or `repeats`, `warmup` or a length outside its range.
    """
    if not models:
        raise ValueError("forward_time_against_length needs at least one model.")
    if repeats < 1 or warmup < 0 or batch_size < 1:
        raise ValueError(
            f"repeats and batch_size must be at least 1 and warmup at least 0, given {repeats}, {batch_size} "
            f"and {warmup}."
        )
    if any(length < 1 for length in lengths):
        raise ValueError(f"Lengths must be at least 1, given {list(lengths)}.")
    if device is not None:
        for model in models.values():
            model.to(device)
    limits = {name: (max_lengths or {}).get(name, longest_input(model)) for name, model in models.items()}
    reference = next(iter(models))
    was_training = {name: model.training for name, model in models.items()}
    rows: list[ForwardTime] = []
    try:
        for model in models.values():
            model.eval()
        for length in lengths:
            usable = {
                name: model
                for name, model in models.items()
                if limits[name] is None or length <= limits[name]  # type: ignore[operator]
            }
            if usable:
                medians = _median_times(usable, length, batch_size, repeats, warmup, seed, on_step)
                base = medians.get(reference)
                rows += [
                    ForwardTime(name, length, seconds, None if base is None else seconds / base)
                    for name, seconds in medians.items()
                ]
    finally:
        for name, model in models.items():
            model.train(was_training[name])
    return rows


def _median_times(
    models: Mapping[str, nn.Module],
    length: int,
    batch_size: int,
    repeats: int,
    warmup: int,
    seed: int,
    on_step: Callable[[str, int], None] | None,
) -> dict[str, float]:
    inputs = {}
    for name, model in models.items():
        config: Any = model.config
        # Low ids are special tokens in most vocabularies, and RoBERTa derives positions from the padding id.
        first = min(1000, config.vocab_size // 2)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(first, config.vocab_size, (batch_size, length), generator=generator)
        ids = ids.to(next(model.parameters()).device)
        inputs[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calls = {name: partial(model, **inputs[name]) for name, model in models.items()}
    device = next(iter(inputs.values()))["input_ids"].device
    step = None if on_step is None else lambda name: on_step(name, length)
    with torch.inference_mode():
        times = time_interleaved(calls, repeats=repeats, warmup=warmup, device=device, on_step=step)
    return {name: statistics.median(values) for name, values in times.items()}


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    seconds: float | None = None,
    device: str | torch.device | None = None,
    before: Callable[[str], None] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """Time several calls side by side: they take turns, one call each a round.

    A change of the machine's speed falls on all alike, so that ratios of medians can be trusted where the seconds
    themselves cannot. Each round has an order of its own (the same in every run): a call pays for what the one before
    it has done to the caches and the allocator. On CUDA the time is the device's own, between two events, the last
    cache having been overwritten before.

    Args:
        calls: name to what is timed.
        repeats: timed rounds.
        warmup: rounds that are not timed.
        seconds: start no further round after so many seconds, but time 3 rounds (or `repeats`) at least.
        device: where the calls run; a CPU by default.
        before: called with the name ahead of each call, outside of the time.
        on_step: called with the name after each call.

    Returns:
        name to seconds of each round.

    Raises:
        ValueError: for no call, `repeats` below 1 or `warmup` below 0.
    """
    if not calls or repeats < 1 or warmup < 0:
        raise ValueError(
            f"time_interleaved takes at least one call and one repeat, given {len(calls)} calls, repeats={repeats} and "
            f"warmup={warmup}."
        )
    clock = _CudaClock(torch.device(device)) if device is not None and torch.device(device).type == "cuda" else _clock
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(0)
    begin = time.perf_counter()
    for turn in range(warmup + repeats):
        done = turn - warmup
        if seconds is not None and done >= _LEAST_ROUNDS and time.perf_counter() - begin >= seconds:
            break
        draw.shuffle(order)
        for name in order:
            if before is not None:
                before(name)
            taken = clock(calls[name])
            if turn >= warmup:
                times[name].append(taken)
            if on_step is not None:
                on_step(name)
    return times


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over rounds of the ratio within the round: a machine that slows down for a while changes neither."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _CudaClock:
    """Seconds of a call on a CUDA device, launches included where they keep the device waiting."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        with torch.cuda.device(self._device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1000


@dataclass
class PeakMemory:
    """Most memory in use during a block, beyond what was in use when it began.

    Attributes:
        bytes: the peak; 0 until the block has ended.
        method: how it was measured.
    """

    bytes: int = 0
    method: str = ""

    @property
    def megabytes(self) -> float:
        """The peak in units of 10^6 bytes."""
        return self.bytes / 1e6


def peak_memory(fn: Callable[[], Any], device: str | torch.device | None = None) -> PeakMemory:
    """Peak memory of one call of `fn` beyond what is in use before it; see `track_peak_memory`."""
    with track_peak_memory(device) as peak:
        fn()
    return peak


@contextmanager
def track_peak_memory(device: str | torch.device | None = None) -> Iterator[PeakMemory]:
    """Measure the peak memory of the block; the result is filled in when the block ends.

    On CUDA it is the allocator's own peak. On a CPU it is resident memory of this process: the kernel's
    high-water mark where it can be reset (Linux), which is exact, else the highest of samples taken by a
    thread. Memory that the process has freed is handed back to the system first, where the C library can:
    otherwise the block could reuse it and seem to need none. Blocks must not overlap.
    """
    result = PeakMemory()
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            yield result
        finally:
            torch.cuda.synchronize(device)
            result.bytes = max(0, torch.cuda.max_memory_allocated(device) - before)
            result.method = "CUDA allocator"
        return
    _return_free_memory()
    if _reset_high_water_mark():
        before = _status_bytes("VmRSS")
        try:
            yield result
        finally:
            result.bytes = max(0, _status_bytes("VmHWM") - before)
            result.method = "resident memory, kernel high-water mark"
        return
    sampler = _Sampler()
    try:
        yield result
    finally:
        result.bytes = sampler.stop()
        result.method = f"resident memory, sampled every {_SAMPLE_SECONDS * 1000:.0f} ms"


def _return_free_memory() -> None:
    gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc; musl has none and keeps little
            libc.malloc_trim(0)


def _reset_high_water_mark() -> bool:
    """Set VmHWM to the current VmRSS; whether this kernel allows it and keeps the mark."""
    if sys.platform != "linux":
        return False
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return _status_bytes("VmHWM") > 0
    except (OSError, KeyError):
        return False


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        values = dict(line.split(":", 1) for line in file if ":" in line)
    return int(values[field].split()[0]) * 1024


class _Sampler:
    """A thread that keeps the highest resident size it sees."""

    def __init__(self) -> None:
        import psutil  # an extra: not needed where the kernel keeps the mark

        self._process = psutil.Process()
        self._before = self._highest = self._process.memory_info().rss
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self._highest = max(self._highest, self._process.memory_info().rss)

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return max(0, max(self._highest, self._process.memory_info().rss) - self._before)
