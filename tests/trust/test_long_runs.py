"""Nothing grows and nothing slows down: tokens one after the other, cycles of conversion, threads side by side.

TRUST_TOKENS, TRUST_CYCLES and TRUST_MINUTES say for how long; `make test-trust` has 100,000, 1,000 and 10.
"""

from __future__ import annotations

import copy
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from hf_linear_attn import convert_model, revert_model
from hf_linear_attn.bench.speed.decode import cache_bytes
from hf_linear_attn.registry import get_variant, list_variants
from hf_linear_attn.seam.cache import cache_keyword
from tests.tiny import FAMILIES, VOCAB, base_model, causal_lm, is_causal, token_batch, variants_of_side

TOKENS = int(os.environ.get("TRUST_TOKENS", "100000"))
CYCLES = int(os.environ.get("TRUST_CYCLES", "1000"))
MINUTES = float(os.environ.get("TRUST_MINUTES", "10"))
THREADS = 8
STEPS = 1000

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(0)]
Record = Callable[[str, object], None]


def resident() -> float:
    """10^6 bytes of memory that the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def pairs() -> Iterator[tuple[str, str]]:
    """Every family with every method that it takes, without end."""
    while True:
        for family in FAMILIES:
            for key in variants_of_side(is_causal(family)):
                yield family, key


@pytest.mark.parametrize("key", [key for key in list_variants() if get_variant(key).state in ("constant", "window")])
@torch.inference_mode()
def test_the_last_token_costs_what_the_first_did(key: str, record_property: Record) -> None:
    """And is what a forward of the whole text says."""
    model = causal_lm("llama", num_hidden_layers=1, max_position_embeddings=TOKENS + STEPS)
    convert_model(model, key)
    ids = torch.randint(5, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    name, cache = cache_keyword(model.forward), DynamicCache()
    held: tuple[int, float] = (0, 0.0)
    for place in range(TOKENS):
        last = model(ids[:, place : place + 1], use_cache=True, **{name: cache}).logits[:, -1]
        if place == TOKENS // 10:
            held = cache_bytes(cache), resident()
    growth = resident() - held[1]
    ratio = _seconds_beside_a_short_text(model, ids, name, copy.deepcopy(cache))
    whole = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    error = ((last - whole).abs().amax() / whole.abs().amax()).item()
    for what, value in (("tokens", TOKENS), ("seconds", f"{ratio:.2f}"), ("error", f"{error:.1e}")):
        record_property(what, value)
    assert cache_bytes(cache) == held[0]
    assert growth < 4
    assert ratio < 1.1
    assert error < 1e-3


def _seconds_beside_a_short_text(model: Any, ids: torch.Tensor, name: str, long: DynamicCache) -> float:
    """What a token after a long text takes over what one after a short text does, in turns: the machine has others."""
    short = DynamicCache()
    model(ids[:, :STEPS], use_cache=True, **{name: short})
    seconds = np.empty((2, STEPS))
    for step in range(STEPS):
        for row, cache in enumerate((short, long)):
            begin = time.perf_counter()
            model(ids[:, step : step + 1], use_cache=True, **{name: cache})
            seconds[row, step] = time.perf_counter() - begin
    first, final = np.percentile(seconds, 25, axis=1)  # of the quick ones: what else the machine did is not ours
    return float(final / first)


def test_cycles_leave_nothing_behind(tmp_path: Path, record_property: Record) -> None:
    """Convert, train, save, load, revert: as many objects, files and bytes after the second half as after the first."""
    held: list[dict[str, float]] = []
    for number, (family, key) in enumerate(islice(pairs(), CYCLES), 1):
        decoder = is_causal(family)
        model = causal_lm(family) if decoder else base_model(family)
        batch = token_batch(2, 24, seed=number)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        revert_model(convert_model(model, key))
        for name, x in model.state_dict().items():
            assert torch.equal(x, before[name]), f"{family}, {key}: {name}"
        convert_model(model, key)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        model.train()(**batch)[0].square().mean().backward()
        optimizer.step()
        folder = tmp_path / "model"  # written over each time
        model.eval().save_pretrained(folder)
        loaded = (AutoModelForCausalLM if decoder else AutoModel).from_pretrained(folder)
        with torch.no_grad():
            assert torch.equal(model(**batch)[0], loaded(**batch)[0]), f"{family}, {key}"
        revert_model(loaded)
        del model, loaded, optimizer, before
        if number in (CYCLES // 2, CYCLES):
            gc.collect()
            objects, files = len(gc.get_objects()), len(os.listdir("/proc/self/fd"))
            held.append({"objects": objects, "files": files, "threads": threading.active_count(), "MB": resident()})
    middle, end = held
    record_property("cycles", CYCLES)
    record_property("megabytes more", round(end["MB"] - middle["MB"], 1))
    assert end["files"] == middle["files"]
    assert end["threads"] == middle["threads"]
    assert end["objects"] < 1.01 * middle["objects"]
    assert end["MB"] < middle["MB"] + 16


@dataclass
class Job:
    """A model, and what it says when nobody else is at work."""

    family: str
    key: str
    model: Any
    batch: dict[str, torch.Tensor]
    states: torch.Tensor
    after: torch.Tensor

    @staticmethod
    def draw(number: int, family: str, key: str) -> Job:
        plain = causal_lm(family) if is_causal(family) else base_model(family)
        model, batch = convert_model(plain, key), token_batch(2, 24, seed=number)
        return Job(family, key, model, batch, *trained(copy.deepcopy(model), batch))


def trained(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model says before and after a step."""
    with torch.no_grad():
        states = model(**batch)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(**batch)[0].square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        return states, model(**batch)[0]


def test_threads_side_by_side(tmp_path: Path, record_property: Record) -> None:
    """Each with models of its own, converted, trained, saved and reverted while the others are at it."""
    jobs = [Job.draw(number, *pair) for number, pair in enumerate(islice(pairs(), 0, 400, 7))]
    until = time.monotonic() + 60 * MINUTES

    def work(thread: int) -> int:
        for done in count():
            if time.monotonic() > until:
                return done
            job = jobs[(thread + done * THREADS) % len(jobs)]
            model = copy.deepcopy(job.model)
            states, after = trained(model, job.batch)
            assert torch.equal(states, job.states), f"{job.family}, {job.key}: a forward"
            assert torch.equal(after, job.after), f"{job.family}, {job.key}: a step"
            model.save_pretrained(tmp_path / str(thread))
            revert_model(model)
            with torch.no_grad():
                assert convert_model(model, job.key)(**job.batch)[0].isfinite().all()
        raise AssertionError

    with ThreadPoolExecutor(THREADS) as pool:
        done = list(pool.map(work, range(THREADS)))
    record_property("rounds in 8 threads", sum(done))
    assert min(done) > 0
