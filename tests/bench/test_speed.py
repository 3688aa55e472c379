"""The bench: what it measures, that it goes on where it stopped, and what it concludes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_linear_attn import get_variant
from hf_linear_attn.bench.speed import contenders as bench_contenders
from hf_linear_attn.bench.speed import run as bench
from hf_linear_attn.bench.speed.contenders import shaped_model
from hf_linear_attn.bench.speed.decode import cache_bytes
from hf_linear_attn.bench.speed.pictures import draw_bench
from hf_linear_attn.bench.speed.recipe import SDPA, BenchRecipe, LayerBench, ModelBench, PeerBench, bench_methods
from hf_linear_attn.bench.speed.run import measure_bench
from hf_linear_attn.bench.speed.tables import render_bench, render_performance
from hf_linear_attn.measure import profile
from hf_linear_attn.measure.crossover import crossover, exponent, fitted_lengths, over_floor, spell_crossover
from hf_linear_attn.measure.profile import median_ratio, time_interleaved

RECIPES = Path(__file__).parents[2] / "recipes" / "bench"
TINY_BERT = {
    "model_type": "bert", "vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
LAYER = LayerBench("layer", [16, 32], hidden_size=16, num_heads=2, softmax=[SDPA], variants=["linear", "cosformer"])


def silent(line: str) -> None:
    assert line


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    recipe = BenchRecipe.from_yaml(RECIPES / "smoke.yaml")
    return measure_bench(recipe, tmp_path_factory.mktemp("bench"), command="test", say=silent)


# ---------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that only calls move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def takes(self, seconds: float) -> Any:
        def call() -> None:
            self.now += seconds

        return call


def test_calls_take_turns_and_a_budget_ends_after_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(monkeypatch), []
    calls = {"a": clock.takes(1.0), "b": clock.takes(3.0)}
    times = time_interleaved(calls, repeats=9, warmup=1, seconds=5.0, before=order.append)
    assert times == {"a": [1.0] * 3, "b": [3.0] * 3}
    rounds = [tuple(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert len(rounds) == 4
    assert set(rounds) == {("a", "b"), ("b", "a")}  # each in turn follows the other
    assert {name: len(found) for name, found in time_interleaved(calls, repeats=2, seconds=0.1).items()} == {
        "a": 2, "b": 2,
    }  # fmt: skip
    for bad in ({"repeats": 0}, {"warmup": -1}):
        with pytest.raises(ValueError, match="at least one"):
            time_interleaved(calls, **bad)
    with pytest.raises(ValueError, match="0 calls"):
        time_interleaved({})


def test_time_before_a_call_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    slow = clock.takes(100.0)
    assert time_interleaved({"a": clock.takes(1.0)}, repeats=1, before=lambda name: slow()) == {"a": [1.0]}


def test_a_ratio_is_within_rounds() -> None:
    assert median_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 2.0]) == 2.0


def test_every_contender_has_a_row_at_every_place(results: dict[str, Any]) -> None:
    recipe = BenchRecipe.from_yaml(RECIPES / "smoke.yaml")
    rows = {(row["part"], row["mode"], row["length"], row["contender"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"])
    expected = set()
    for part in [*recipe.models, *recipe.layers]:
        names = [*part.softmax, *(method.name for method in bench_methods(recipe, part))]
        expected |= {(part.name, mode, n, name) for mode in part.modes for n in part.lengths for name in names}
    for part in recipe.peers:
        expected |= {(part.name, mode, n, name) for mode in part.modes for n in part.lengths for name in part.only}
    for part in recipe.decode:
        names = [SDPA, *(method.name for method in bench_methods(recipe, part))]
        expected |= {(part.name, "decode", n, name) for n in part.contexts for name in names}
    for part in recipe.long:
        names = [SDPA, *(method.name for method in bench_methods(recipe, part))]
        expected |= {(part.name, "forward", n, name) for n in part.lengths for name in names}
    assert set(rows) == expected
    assert not [row for row in results["rows"] if "failure" in row]
    assert rows["causal layer", "forward", 64, "linformer"]["refused"].startswith("serves encoders only.")
    assert rows["encoder", "training", 256, "entmax"]["left_out"] == "not of linear cost, run up to 128 tokens"
    assert "eager" in {name for _, _, _, name in rows}
    assert rows["peers", "forward", 64, "fla linear"]["missing"]
    measured = rows["encoder", "training", 128, "linear"]
    assert measured["seconds"] > 0
    assert measured["ratio"] > 0
    assert measured["rounds"] == 3
    assert "floor_bytes" not in measured
    # q, k, v and o of 64 tokens, 32 wide, 4 bytes
    assert rows["attention", "forward", 64, "performer"]["floor_bytes"] == 4 * 64 * 32 * 4
    assert json.loads(json.dumps(results)) == results
    assert results["meta"]["device"] == "cpu"
    assert results["meta"]["threads"] == torch.get_num_threads()


def test_a_peer_stands_beside_ours(results: dict[str, Any]) -> None:
    if bench_contenders.unavailable_peers("cpu").get("linformer"):
        row = next(row for row in results["rows"] if row["contender"] == "linformer" and row["kind"] == "peer")
        assert "not installed" in row["missing"]
        return
    row = next(row for row in results["rows"] if row["contender"] == "linformer" and row["kind"] == "peer")
    assert row["key"] == "linformer"
    assert row["ours_ratio"] > 0
    assert row["ours_seconds"] > 0


def fake_times(monkeypatch: pytest.MonkeyPatch, known: dict[str, float]) -> None:
    """Every call takes a known time."""

    def time_calls(calls: dict[str, Any], before: Any, **settings: Any) -> dict[str, list[float]]:
        for name, call in calls.items():
            before(name)
            call()
        return {name: [known[name]] * 3 for name in calls}

    monkeypatch.setattr(bench, "time_interleaved", time_calls)


def test_ratios_are_sdpas_time_over_the_contenders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch, {SDPA: 3.0, "linear": 1.0, "cosformer": 6.0})
    results = measure_bench(BenchRecipe("t", layers=[LAYER]), tmp_path, say=silent)
    assert {(row["contender"], row["ratio"]) for row in results["rows"]} == {
        (SDPA, 1.0), ("linear", 3.0), ("cosformer", 0.5),
    }  # fmt: skip
    curves = {(c["contender"], c["mode"]): c for c in results["summary"]["curves"]}
    assert curves["linear", "forward"]["crossover"] == {"tokens": 16, "how": "at or below"}
    assert curves["cosformer", "training"]["crossover"] == {"tokens": 32, "how": "none up to"}
    assert curves["linear", "forward"]["time_exponent"] == pytest.approx(0.0)


def test_peers_and_ours_swap_the_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = PeerBench("peers", [32], hidden_size=16, num_heads=2, only=["eager"], modes=["forward"])
    fake_times(monkeypatch, {SDPA: 3.0, "eager": 4.0, "ours for eager": 2.0})
    (row,) = measure_bench(BenchRecipe("t", peers=[peers]), tmp_path, say=silent)["rows"]
    assert (row["ratio"], row["ours_ratio"], row["ours_seconds"]) == (0.75, 2.0, 2.0)


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = BenchRecipe("t", layers=[LAYER], repeats=1)
    whole = measure_bench(recipe, tmp_path, say=silent)
    path = tmp_path / "cpu.rows.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * 3
    path.write_text("\n".join(lines[:6]) + "\n" + lines[6][:30])  # half a line
    said: list[str] = []
    again = measure_bench(recipe, tmp_path, say=said.append)
    assert [line.split(":")[0] for line in said[:2]] == ["layer training     16 cosformer", "layer forward     32 sdpa"]
    assert len(again["rows"]) == len(whole["rows"])
    said.clear()
    measure_bench(recipe, tmp_path, say=said.append)
    assert len(said) == 1
    measure_bench(recipe, tmp_path, only=["linear"], fresh=True, say=said.append)
    assert not [line for line in said if "cosformer" in line]
    with pytest.raises(ValueError, match="another setting"):
        measure_bench(replace(recipe, repeats=2), tmp_path, say=silent)


def test_a_raised_limit_measures_what_was_left_out(tmp_path: Path) -> None:
    part = replace(LAYER, lengths=[32], variants=["entmax"], modes=["forward"])
    recipe = BenchRecipe("t", layers=[part], repeats=1, quadratic_up_to=16)
    before = measure_bench(recipe, tmp_path, say=silent)
    assert [row["contender"] for row in before["rows"] if "left_out" in row] == ["entmax"]
    after = measure_bench(replace(recipe, quadratic_up_to=32), tmp_path, say=silent)
    assert [row["contender"] for row in after["rows"] if "seconds" in row] == [SDPA, "entmax"]
    assert not [row for row in after["rows"] if "left_out" in row]
    assert after["rows"][1]["ratio"] > 0


def test_a_contender_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of order\nsecond line")

    def hungry(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("far too much")

    recipe = BenchRecipe("t", layers=[replace(LAYER, lengths=[16], modes=["forward"])], repeats=1)
    with monkeypatch.context() as patch:
        patch.setattr(get_variant("linear").module_class, "forward", broken)
        patch.setattr(get_variant("cosformer").module_class, "forward", hungry)
        rows = measure_bench(recipe, tmp_path, say=silent)["rows"]
    assert {row["contender"]: row.get("failure") for row in rows} == {
        SDPA: None, "linear": "RuntimeError: out of order", "cosformer": "out of memory",
    }  # fmt: skip
    again = measure_bench(recipe, tmp_path, say=silent)
    assert not [row for row in again["rows"] if "failure" in row]
    assert len(again["rows"]) == 3


def test_the_caller_keeps_its_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    recipe = BenchRecipe("t", threads=before + 1, layers=[replace(LAYER, lengths=[8])], repeats=1)
    assert measure_bench(recipe, tmp_path, say=silent)["meta"]["threads"] == before + 1
    assert torch.get_num_threads() == before


# ---------------------------------------------------------------------------------------------------------------
# Contenders
# ---------------------------------------------------------------------------------------------------------------


def test_models_have_no_dropout_and_read_the_length() -> None:
    model = shaped_model(ModelBench("m", [40], config={**TINY_BERT, "attention_probs_dropout_prob": 0.3}, layers=1), 40)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert model.config.max_position_embeddings == 40
    assert len(model.encoder.layer) == 1
    with pytest.raises(ValueError, match="BertConfig has no 'n_embd'"):
        shaped_model(ModelBench("m", [40], config={**TINY_BERT, "n_embd": 8}), 40)


def test_contenders_share_the_weights(tmp_path: Path) -> None:
    part = ModelBench("m", [16], config=TINY_BERT, variants=["linear"], softmax=[SDPA, "eager"])
    groups, _ = bench_contenders.model_groups(BenchRecipe("t", models=[part]), part, 16, None)
    models = [contender.build() for contender in groups[0]]
    weights = {model.get_submodule("encoder.layer.0.output.dense").weight.data_ptr() for model in models}
    assert len(weights) == 1
    assert [model.config._attn_implementation for model in models] == [SDPA, "eager", "linear_attn"]


def test_an_attention_that_cannot_be_taken_out_is_refused(tmp_path: Path) -> None:
    part = PeerBench(
        "p",
        [64],
        hidden_size=16,
        num_heads=2,
        only=["transformers nystromformer"],
        projections=False,
        modes=["forward"],
    )
    (row,) = measure_bench(BenchRecipe("t", peers=[part], repeats=1), tmp_path, say=silent)["rows"]
    assert row["refused"] == "its attention cannot be taken out of its layer"


def test_cache_bytes_are_those_of_storages() -> None:
    cache, keys = DynamicCache(), torch.zeros(1, 2, 100, 8)
    cache.update(keys[:, :, :10], torch.zeros(1, 2, 10, 8), 0)
    shared = torch.zeros(50)
    cache.layers[0].keys = keys[:, :, :10]  # a view keeps all of it
    cache.layers[0].state = {"a": shared, "b": shared[10:]}
    assert cache_bytes(cache) == 4 * (1600 + 160 + 50)


def test_generation_keeps_what_the_registry_says(results: dict[str, Any]) -> None:
    decode = {(row["contender"], row["length"]): row for row in results["rows"] if row["kind"] == "decode"}
    for context in (32, 64):
        assert decode[SDPA, context]["cache_bytes"] == 2 * context * 32 * 4  # keys and values of one layer, 32 wide
        assert decode["linear", context]["state"] == "constant"
        assert decode["linear", context]["tokens_per_second"] > 0
    assert decode["linear", 32]["cache_bytes"] == decode["linear", 64]["cache_bytes"] > 0
    flat = {entry["contender"]: entry for entry in results["summary"]["decode"]}
    assert flat["linear"]["growth"] == 1.0
    assert flat[SDPA]["growth"] == 2.0


# ---------------------------------------------------------------------------------------------------------------
# Conclusions
# ---------------------------------------------------------------------------------------------------------------


def test_exponents_are_slopes_over_the_longest_octaves() -> None:
    lengths = [4096, 8192, 16384, 32768]
    assert exponent(lengths, [3e-6 * n**1.7 for n in lengths]) == pytest.approx(1.7)
    assert exponent([4096], [1.0]) is None
    assert exponent([4096, 8192], [0.0, 1.0]) is None
    assert fitted_lengths([512, 2048, *lengths]) == lengths
    assert fitted_lengths([16, 1024]) == []


@pytest.mark.parametrize(
    ("ratios", "expected", "text"),
    [
        ([0.5, 2.0, 4.0], {"tokens": round(math.sqrt(512 * 1024)), "how": "interpolated"}, "724"),
        ([1.0, 2.0, 4.0], {"tokens": 512, "how": "at or below"}, "≤ 512"),
        ([0.5, 0.6, 0.9], {"tokens": 2048, "how": "none up to"}, "none up to 2,048"),
        ([1.5, 0.5, 2.0], {"tokens": round(math.sqrt(1024 * 2048)), "how": "interpolated"}, "1,448"),
    ],
)
def test_crossovers(ratios: list[float], expected: dict[str, Any], text: str) -> None:
    found = crossover([512, 1024, 2048], ratios)
    assert found == expected
    assert spell_crossover(found) == text


def test_time_over_the_byte_floor() -> None:
    row = {"seconds": 3e-3, "floor_bytes": 2e9}
    assert over_floor(row, 1e12) == pytest.approx(1.5)
    assert over_floor(row, None) is None
    assert over_floor({"seconds": 1.0}, 1e12) is None


def test_tables_name_everything_and_say_why_it_is_missing(results: dict[str, Any]) -> None:
    text = render_bench(results)
    linear = next(
        row for row in results["rows"] if (row["contender"], row["mode"], row["length"]) == ("linear", "forward", 128)
    )
    assert f"({linear['ratio']:.2f}x)" in text
    for part in ("encoder, forward and backward", "causal layer", "peers, forward", "Generation: decoder"):
        assert part in text
    assert "`eager`, left out: run up to 128 tokens (encoder forward 256, encoder training 256)" in text
    assert "`linformer`, refused: serves encoders only." in text
    assert "`fla linear`, missing: " in text
    short = render_performance(results)
    assert "as fast as SDPA" in short
    assert all(line.count("|") == header.count("|") for header, line in _table_lines(short))
    assert "- *peers*, forward: ours is as fast or faster at " in short
    assert "- *decoder* after 32 to 64 tokens, lowest over highest tokens a second (1: no" in short
    assert "x: the peer's time over ours" in text
    assert all(line.count("|") == header.count("|") for header, line in _table_lines(text))


def _table_lines(text: str) -> list[tuple[str, str]]:
    pairs, header = [], None
    for line in text.splitlines():
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = line
        else:
            pairs.append((header, line))
    assert pairs
    return pairs


def test_a_run_ends_with_its_minutes_and_the_next_goes_on(tmp_path: Path) -> None:
    recipe = BenchRecipe.from_yaml(RECIPES / "smoke.yaml")
    recipe = replace(recipe, peers=[], softmax_up_to=256, quadratic_up_to=256, minutes=1e-9)  # nothing is left out
    lines: list[str] = []
    first = measure_bench(recipe, tmp_path, say=lines.append)
    assert first["rows"] == []
    assert first["meta"]["unfinished"]
    assert "1e-09 minutes are over" in lines[-1]
    assert "minutes were over before all was measured" in render_bench(first)
    rest = measure_bench(replace(recipe, minutes=9.0), tmp_path, say=silent)
    assert {row["part"] for row in rest["rows"]} == {part.name for part in recipe.parts()}
    assert not rest["meta"]["unfinished"]
    assert "minutes" not in render_bench(rest)
    # Nothing is left: no minutes are needed to say so.
    assert not measure_bench(recipe, tmp_path, say=silent)["meta"]["unfinished"]


def test_a_gpu_run_shows_floors_and_out_of_memory() -> None:
    part = {"kind": "layer", "part": "attention", "mode": "forward"}
    rows = [
        {**part, "contender": SDPA, "length": 1024, "seconds": 2e-3, "ratio": 1.0, "peak_mb": 5.0, "floor_bytes": 1e9},
        {**part, "contender": "linear", "length": 1024, "seconds": 1e-3, "ratio": 2.0, "peak_mb": 4.0,
         "floor_bytes": 1e9},
        {**part, "contender": "bigbird", "length": 1024, "failure": "out of memory"},
    ]  # fmt: skip
    recipe = {"title": "t", "device": "cuda", "repeats": 5, "models": [], "peers": [], "decode": []}
    recipe["layers"] = [
        {"name": "attention", "hidden_size": 768, "num_heads": 12, "is_causal": True, "batch_size": 8,
         "projections": False}
    ]  # fmt: skip
    meta = {
        "command": "c", "title": "t", "device": "nvidia-h100", "device_name": "NVIDIA H100", "machine": "m",
        "threads": 1, "dtype": "bfloat16", "torch": "2", "transformers": "5", "bandwidth": 2e12,
    }  # fmt: skip
    run = {"meta": meta, "recipe": recipe, "rows": rows, "summary": bench.summarize({"rows": rows})}
    text = render_bench(run)
    assert "NVIDIA H100 (m), 1 thread(s), bfloat16" in text
    assert "2,000 GB/s" in text
    assert "| `linear` | 1 ms (2.00x) | 4 | - | - | ≤ 1,024 | 2.00x |" in text
    assert "| `bigbird` | out of memory | out of memory |" in text
    assert "Attention alone, without projections: 768 wide, 12 heads, causal, batch of 8." in text
    assert "NVIDIA H100 (m), 1 thread(s), bfloat16" in render_performance(run)


def test_the_readme_names_who_grows_faster_than_the_length() -> None:
    recipe = BenchRecipe.from_yaml(RECIPES / "smoke.yaml")
    part = {"kind": "layer", "part": "causal layer", "mode": "training", "peak_mb": 1.0}
    rows = [
        {**part, "contender": name, "length": length, "seconds": (length / 1024) ** power}
        for name, power in (("linear", 1.0), ("bigbird", 1.25))
        for length in (1024, 4096)
    ]
    meta = {
        "title": "t", "device": "cpu", "machine": "m", "threads": 1, "dtype": "float32", "torch": "2",
        "transformers": "5", "command": "c", "bandwidth": None,
    }  # fmt: skip
    run = {"meta": meta, "recipe": asdict(recipe), "rows": rows, "summary": bench.summarize({"rows": rows})}
    run["recipe"]["decode"] = []
    line = "*causal layer*, forward and backward, to 4,096 tokens: time grows as n^1.00 to n^1.25"
    assert f"- {line}, above n^1.10: `bigbird` 1.25." in render_performance(run)


def test_the_picture_is_drawn(results: dict[str, Any], tmp_path: Path) -> None:
    drawn = draw_bench(results, tmp_path / "bench.png")
    peers = ["bench_peers.png"] if any("ours_ratio" in row for row in results["rows"]) else []
    assert [path.name for path in drawn] == ["bench.png", *peers, "bench_generation.png", "bench_long.png"]
    assert all(path.stat().st_size > 20000 for path in drawn)
    with pytest.raises(ValueError, match="Nothing was measured"):
        draw_bench({**results, "rows": []}, tmp_path / "none.png")
