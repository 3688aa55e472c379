"""The bench's recipes: what the shipped ones cover, and which are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_linear_attn import list_variants
from hf_linear_attn.bench.speed import contenders as bench_contenders
from hf_linear_attn.bench.speed.recipe import (
    SDPA,
    BenchRecipe,
    DecodeBench,
    LayerBench,
    ModelBench,
    PeerBench,
    bench_methods,
)
from hf_linear_attn.bench.speed.run import device_slug, measure_bench
from hf_linear_attn.measure.crossover import fitted_lengths

RECIPES = Path(__file__).parents[2] / "recipes" / "bench"
LAYER = LayerBench("layer", [16, 32], hidden_size=16, num_heads=2, softmax=[SDPA], variants=["linear", "cosformer"])


def test_the_shipped_recipes_cover_what_they_are_for() -> None:
    cpu = BenchRecipe.from_yaml(RECIPES / "cpu.yaml")
    assert {method.key for method in bench_methods(cpu, cpu.models[0])} == set(list_variants())
    for part in cpu.layers[:2]:
        assert fitted_lengths(part.lengths) == [4096, 8192, 32768]
    assert cpu.decode[0].contexts == [1024, 8192, 32768]
    gpu = BenchRecipe.from_yaml(RECIPES / "gpu.yaml")
    assert (gpu.device, gpu.dtype) == ("cuda", "bfloat16")
    assert gpu.minutes is not None
    assert gpu.minutes <= 9
    for part in (gpu.layers[0], gpu.peers[0]):
        assert (part.batch_size, part.num_heads, part.hidden_size, part.projections) == (8, 12, 768, False)
        assert set(part.lengths) >= {1024, 2048, 4096, 8192, 16384}
    for recipe in (cpu, gpu):
        for part in recipe.peers:
            for name in part.only:
                assert bench_contenders.get_peer(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device has 'tpu'; allowed: cpu, cuda"),
        ({"dtype": "int8"}, "dtype has 'int8'; allowed: float32, bfloat16, float16"),
        ({"threads": 0}, "threads has 0; allowed: positive integers"),
        ({"minutes": 0}, "minutes must be positive or null, got 0"),
        ({"layers": []}, "nothing to measure"),
        ({"layers": [LAYER, LAYER]}, "parts with the same name: layer"),
        ({"variants": ["lineer"], "layers": [replace(LAYER, variants=None)]}, "Did you mean 'linear'"),
        ({"variants": [{"longformer": {"window": 3}}], "layers": [replace(LAYER, variants=None)]}, "Allowed:"),
        ({"variants": ["linear", "linear"], "layers": [replace(LAYER, variants=None)]}, "named twice: linear"),
        ({"variants": [["linear"]], "layers": [replace(LAYER, variants=None)]}, "'key', {key: options} or"),
    ],
)
def test_a_bad_recipe_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchRecipe(**{"title": "t", "layers": [LAYER], **changes})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: replace(LAYER, lengths=[]), "lengths is empty"),
        (lambda: replace(LAYER, lengths=[0]), "lengths has 0; allowed: positive integers"),
        (lambda: replace(LAYER, num_heads=True), "num_heads has True; allowed: positive integers"),
        (lambda: PeerBench("p", [8], 16, 2, batch_size=0), "peers 'p': batch_size has 0; allowed: positive integers"),
        (lambda: DecodeBench("d", [], config={"model_type": "gpt2"}), "decode 'd': contexts is empty"),
        (lambda: DecodeBench("d", [8], config={"model_type": "gpt2"}, tokens=0), "tokens has 0; allowed: positive"),
        (lambda: replace(LAYER, modes=["decode"]), "modes has 'decode'; allowed: forward, training"),
        (lambda: replace(LAYER, softmax=["eager"]), r"softmax=\['eager'\] lacks 'sdpa'"),
        (lambda: ModelBench("m", [8]), "needs `checkpoint`, or a `config` with a model_type"),
    ],
)
def test_a_bad_part_is_refused(part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        part()


def test_an_unknown_peer_and_a_missing_device_are_refused(tmp_path: Path) -> None:
    part = PeerBench("p", [64], hidden_size=16, num_heads=2, only=["nobody"])
    with pytest.raises(ValueError, match="Unknown peer 'nobody'"):
        measure_bench(BenchRecipe("t", peers=[part]), tmp_path, say=str)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device here"):
            measure_bench(BenchRecipe("t", device="cuda", layers=[LAYER]), tmp_path, say=str)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("AMD Instinct MI300X", "amd-instinct-mi300x"),
    ],
)
def test_results_are_called_after_the_device(name: str, slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_slug("cuda") == slug
    assert device_slug("cpu") == "cpu"


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path: Path) -> None:
    part = replace(LAYER, hidden_size=128, projections=False, is_causal=True)
    results = measure_bench(BenchRecipe("t", device="cuda", dtype="bfloat16", layers=[part]), tmp_path, say=str)
    assert not [row for row in results["rows"] if "failure" in row]
    assert results["meta"]["bandwidth"] > 1e10
    assert all(row["seconds"] > 0 and row["floor_bytes"] > 0 for row in results["rows"])
