"""Conversions are worth having: memory grows with the length, and whole models are faster than SDPA on long inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from hf_linear_attn import convert_model, get_variant, list_variants
from hf_linear_attn.measure.profile import forward_time_against_length

# (options, the length from which on a MiniLM-size model must be faster; asked at twice that, where a busy machine
# does not turn the answer round)
CROSSOVERS: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({}, 1024),
    "performer": ({}, 1024),
    "longformer": ({"window_size": 128}, 2048),
}
LINEAR = [name for name in list_variants(encoder=True) if get_variant(name).claims_linear_cost({})]


# Each method in a process of its own that gives back what is freed: by default glibc keeps some of it, how much depends
# on all that was freed before, and a peak of 255 MB may read as 353.
EXACT = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}
PEAKS = """
import json, multiprocessing, sys, torch
from transformers import BertConfig, BertModel
from hf_linear_attn import convert_model
from hf_linear_attn.measure.profile import peak_memory

def measure(variant, pipe):
    torch.manual_seed(0)
    model = convert_model(BertModel(BertConfig(num_hidden_layers=1, vocab_size=1000)).eval(), variant, max_length=8192)
    peaks = []
    with torch.no_grad():
        for length in (4096, 8192):
            ids = torch.randint(5, 1000, (1, length))
            model(input_ids=ids[:, :64])
            peaks.append(peak_memory(lambda: model(input_ids=ids)).megabytes)
    pipe.send(peaks)

context, found = multiprocessing.get_context("fork"), {}
for variant in sys.argv[1:]:  # not a pool, which has threads, and this process must have none when it forks
    pipe, childs_end = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(variant, childs_end))
    process.start()
    childs_end.close()
    found[variant] = pipe.recv()
    process.join()
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "variants",
    [
        pytest.param([name for name in LINEAR if name in CROSSOVERS], id="some"),
        pytest.param([name for name in LINEAR if name not in CROSSOVERS], id="others", marks=pytest.mark.slow),
    ],
)
def test_memory_of_a_base_size_encoder_grows_with_the_length(variants: list[str]) -> None:
    """One layer stands for twelve: without gradients a layer's memory is free before the next one starts."""
    script = [sys.executable, "-c", PEAKS, *variants]
    done = subprocess.run(script, check=True, capture_output=True, text=True, env=os.environ | EXACT)
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert list(peaks) == variants
    too_much = {name: both for name, both in peaks.items() if not (0 < both[1] < 750 and both[1] / both[0] < 2.2)}
    assert not too_much, f"megabytes at 4,096 and 8,192 tokens: {too_much}"


@pytest.mark.slow
def test_converted_models_are_faster_than_sdpa_on_long_inputs() -> None:
    config = BertConfig(
        hidden_size=384,
        num_attention_heads=12,
        intermediate_size=1536,
        num_hidden_layers=2,
        max_position_embeddings=4096,
    )
    models = {"sdpa": BertModel(config)}
    for variant, (options, _) in CROSSOVERS.items():
        models[variant] = convert_model(BertModel(config), variant, **options)
    lengths = sorted({2 * length for _, length in CROSSOVERS.values()})
    rows = forward_time_against_length(models, lengths, repeats=5)
    ratios = {(row.name, row.length): row.ratio for row in rows}
    slow = {name: ratios[name, 2 * n] for name, (_, n) in CROSSOVERS.items() if not ratios[name, 2 * n] < 1.0}
    assert slow == {}
