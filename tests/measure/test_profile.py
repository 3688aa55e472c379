"""Parameter counts, forward times and peak memory against what can be known beforehand."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from hf_linear_attn.measure import profile
from hf_linear_attn.measure.profile import (
    forward_time_against_length,
    longest_input,
    parameter_counts,
    peak_memory,
    track_peak_memory,
)


class Clock:
    """A clock that only the models move: exact on a busy machine too."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


time = Clock()


class Sleeper(nn.Module):
    """A model whose forward takes a known time for each token."""

    def __init__(self, seconds_per_token: float, limit: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=100, max_position_embeddings=limit)
        self.seconds_per_token = seconds_per_token
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, input_ids, attention_mask):
        assert input_ids.shape == attention_mask.shape
        assert 0 <= int(input_ids.min()) <= int(input_ids.max()) < 100
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        time.advance(self.seconds_per_token * input_ids.shape[1])


def test_new_parameters_are_those_of_the_linear_attn_submodules():
    model = nn.ModuleDict({"dense": nn.Linear(3, 4), "layer": nn.ModuleDict({"linear_attn": nn.Linear(2, 2)})})
    model["not_linear_attn_at_all"] = nn.Linear(1, 1)
    model["tied"] = model["dense"]
    model["dense"].requires_grad_(False)
    counts = parameter_counts(model)
    assert (counts.total, counts.new, counts.trainable) == (16 + 6 + 2, 6, 8)


def test_times_and_ratios_are_those_of_the_models(monkeypatch):
    monkeypatch.setattr(profile, "time", time)
    models = {"slow": Sleeper(2e-3), "fast": Sleeper(0.5e-3)}
    models["fast"].train()
    models["slow"].eval()
    seen = []
    rows = forward_time_against_length(models, [4, 16], repeats=3, on_step=lambda *step: seen.append(step))
    times = {(row.name, row.length): row for row in rows}
    assert len(rows) == 4
    assert times["slow", 4].seconds == pytest.approx(0.008)
    assert times["slow", 16].seconds == pytest.approx(0.032)
    assert times["slow", 16].ratio == 1.0
    assert times["fast", 16].ratio == pytest.approx(0.25)
    # Turns are taken, one warm-up round first.
    assert [set(seen[i : i + 2]) for i in range(0, 8, 2)] == [{("slow", 4), ("fast", 4)}] * 4
    assert set(models["fast"].modes) == {(False, True)}
    assert models["fast"].training
    assert not models["slow"].training
    assert rows[0].to_dict().keys() == {"name", "length", "seconds", "ratio"}


def test_lengths_past_a_models_limit_are_left_out():
    models = {"short": Sleeper(0, limit=8), "long": Sleeper(0), "told": Sleeper(0)}
    rows = forward_time_against_length(models, [8, 9], repeats=1, warmup=0, max_lengths={"told": 4})
    assert [(row.name, row.length) for row in rows] == [("short", 8), ("long", 8), ("long", 9)]
    assert rows[1].ratio is not None
    assert rows[2].ratio is None


def test_longest_input_is_the_longest_that_runs():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = BertModel(BertConfig(vocab_size=20, max_position_embeddings=12, **sizes))
    roberta = RobertaModel(RobertaConfig(vocab_size=20, max_position_embeddings=14, pad_token_id=1, **sizes))
    for model in (bert, roberta):
        assert longest_input(model) == 12
        model(torch.full((1, 12), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, 13), 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats"),
        ({"warmup": -1}, "warmup"),
        ({"lengths": [0]}, "Lengths must be at least 1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        forward_time_against_length({"a": Sleeper(0)}, **({"lengths": [4]} | options))
    with pytest.raises(ValueError, match="at least one model"):
        forward_time_against_length({}, [4])


HOLD = """
import sys, time, torch
from hf_linear_attn.measure import profile

def hold():
    for _ in range(3):  # three times 80 MB, one after the other
        held = torch.ones(20_000_000)
        time.sleep(0.02)
        del held

if sys.argv[1] == "sampled":
    profile._reset_high_water_mark = lambda: False
peak = profile.peak_memory(hold)
print(peak.megabytes, peak.method)
"""


@pytest.mark.parametrize("how", ["kernel", "sampled"])
def test_peak_is_what_was_held_at_once(how):
    # In a process of its own: what malloc keeps of a block that was freed depends on all that ran before.
    run = subprocess.run([sys.executable, "-c", HOLD, how], capture_output=True, text=True, check=True, timeout=120)
    megabytes, method = run.stdout.split(maxsplit=1)
    assert 75 < float(megabytes) < 130
    assert how != "sampled" or "sampled" in method


def test_memory_that_was_freed_before_does_not_hide_the_peak():
    pieces = [torch.ones(10_000) for _ in range(3000)]  # 120 MB in pieces that malloc keeps when they are freed
    del pieces
    peak = peak_memory(lambda: [torch.ones(10_000) for _ in range(2000)])
    assert peak.megabytes > 60


def test_an_exception_in_the_block_comes_through_and_the_peak_is_kept():
    peaks = []

    def fail() -> None:
        with track_peak_memory() as peak:
            peaks.append(peak)
            held = torch.ones(10_000_000)
            raise RuntimeError(f"inside {len(held)}")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert peaks[0].megabytes > 35


@pytest.mark.gpu
def test_peak_on_cuda_is_the_allocators():
    before = torch.ones(1_000_000, device="cuda")
    peak = peak_memory(lambda: torch.ones(25_000_000, device="cuda"), device="cuda")
    assert peak.megabytes == pytest.approx(100, abs=3)
    assert before.sum() == 1_000_000
