"""The bench's part for very long inputs: one forward each, what a decoder keeps, and when softmax is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from hf_linear_attn import convert_model
from hf_linear_attn.bench.speed import long
from hf_linear_attn.bench.speed.pictures import draw_bench
from hf_linear_attn.bench.speed.recipe import SDPA, BenchRecipe, LongBench, bench_methods
from hf_linear_attn.bench.speed.run import measure_bench
from hf_linear_attn.bench.speed.tables import render_bench, render_performance

RECIPES = Path(__file__).parents[2] / "recipes" / "bench"
SHAPE = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
ENCODER = LongBench("books", [32, 64], config={"model_type": "bert", **SHAPE}, layers=1, variants=["linear", "entmax"])
DECODER = LongBench(
    "state", [32, 64], config={"model_type": "gpt2", "vocab_size": 50, "n_embd": 16, "n_head": 2}, layers=3,
    variants=["linear", "linformer"],
)  # fmt: skip


def silent(line: str) -> None:
    assert line


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    recipe = BenchRecipe("t", quadratic_up_to=32, long=[ENCODER, DECODER])
    return measure_bench(recipe, tmp_path_factory.mktemp("long"), command="test", say=silent)


def by_place(results: dict[str, Any]) -> dict[tuple[str, int, str], dict[str, Any]]:
    return {(row["part"], row["length"], row["contender"]): row for row in results["rows"]}


def test_every_contender_reads_every_length_once(results: dict[str, Any]) -> None:
    rows = by_place(results)
    assert len(rows) == len(results["rows"]) == 12
    assert not [row for row in rows.values() if "failure" in row]
    for name in (SDPA, "linear"):
        row = rows["books", 64, name]
        assert row["seconds"] > 0
        assert row["core_seconds"] > 0
        assert row["peak_mb"] >= 0
        assert "cache_bytes" not in row
    assert rows["books", 64, "entmax"]["left_out"] == "not of linear cost, run up to 32 tokens"
    assert rows["state", 32, "linformer"]["refused"].startswith("serves encoders only.")
    assert json.loads(json.dumps(results)) == results


def test_a_decoder_says_what_it_keeps(results: dict[str, Any]) -> None:
    rows = by_place(results)
    for length in (32, 64):
        assert rows["state", length, SDPA]["cache_bytes"] == 3 * 2 * length * 16 * 4  # keys and values, 3 layers
    assert rows["state", 32, "linear"]["cache_bytes"] == rows["state", 64, "linear"]["cache_bytes"] > 0


def test_softmax_is_left_out_where_it_would_take_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the square of the length, from the longest that was measured; a raised limit measures it."""
    monkeypatch.setattr(long, "one_forward", lambda *_: {"seconds": 10.0, "peak_mb": 1.0})
    part = replace(ENCODER, lengths=[32, 64, 128], variants=["linear"], softmax_seconds=100)
    rows = by_place(measure_bench(BenchRecipe("t", long=[part]), tmp_path, say=silent))
    assert "seconds" in rows["books", 64, SDPA]  # 40 s by the time at 32
    assert "seconds" in rows["books", 128, SDPA]  # 40 s by the time at 64
    far = replace(part, lengths=[32, 64, 512])
    rows = by_place(measure_bench(BenchRecipe("t", long=[far]), tmp_path, say=silent))
    assert rows["books", 512, SDPA]["left_out"] == "by its time at 128 tokens it would take 160 s, run up to 100 s"
    assert "seconds" in rows["books", 512, "linear"]
    raised = replace(far, softmax_seconds=160)
    rows = by_place(measure_bench(BenchRecipe("t", long=[raised]), tmp_path, say=silent))
    assert "seconds" in rows["books", 512, SDPA]


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, results: dict[str, Any]) -> None:
    recipe = BenchRecipe("t", long=[replace(ENCODER, lengths=[64], variants=["linear"])], minutes=1e-9)
    assert measure_bench(recipe, tmp_path, say=silent)["meta"]["unfinished"]
    recipe = replace(recipe, minutes=None)
    assert len(measure_bench(recipe, tmp_path, say=silent)["rows"]) == 2
    said: list[str] = []
    measure_bench(recipe, tmp_path, say=said.append)
    assert len(said) == 1


def test_a_failure_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise torch.OutOfMemoryError("far too much")

    monkeypatch.setattr(long, "one_forward", broken)
    recipe = BenchRecipe("t", long=[replace(ENCODER, lengths=[64], variants=["linear"])])
    rows = measure_bench(recipe, tmp_path, say=silent)["rows"]
    assert [row["failure"] for row in rows] == ["out of memory"] * 2


def test_tables_and_pictures(results: dict[str, Any], tmp_path: Path) -> None:
    row = by_place(results)["books", 64, "linear"]
    for text in (render_bench(results), render_performance(results)):
        assert f"{row['seconds']:,.1f} s ({row['core_seconds']:,.1f})" in text
        assert "take turns" not in text
        assert "`entmax`, left out: not of linear cost, run up to 32 tokens (books forward 64)" in text
    drawn = draw_bench(results, tmp_path / "cpu.png")
    assert [path.name for path in drawn] == ["cpu_long.png", "cpu_long_state.png"]
    assert all(path.stat().st_size > 20000 for path in drawn)


def test_results_from_before_this_part_still_read() -> None:
    old = json.loads((RECIPES / "results" / "cpu.json").read_text(encoding="utf-8"))
    old["recipe"].pop("long", None)
    assert "One forward each" not in render_bench(old) + render_performance(old)


def test_the_shipped_recipe_reads_a_hundred_thousand_tokens() -> None:
    recipe = BenchRecipe.from_yaml(RECIPES / "long.yaml")
    decoder, encoder = recipe.long
    assert {32_768, 100_000} <= set(encoder.lengths)
    assert 100_000 in decoder.lengths
    assert {method.key for method in bench_methods(recipe, encoder)} >= {
        "linear", "linformer", "longformer", "bigbird", "reformer",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": []}, "long 'books': lengths is empty"),
        ({"lengths": [64, 32]}, r"long 'books': lengths=\[64, 32\]; allowed: ascending"),
        ({"softmax_seconds": 0}, "long 'books': softmax_seconds has 0; allowed: positive integers"),
        ({"layers": 0}, "long 'books': layers has 0"),
        ({"config": {}}, "long 'books' needs `checkpoint`, or a `config`"),
    ],
)
def test_a_bad_part_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ENCODER, **changes)


def test_a_checkpoint_of_512_tokens_reads_a_hundred_thousand() -> None:
    """What the part measures a shape of, as a user does it: the positions go on, and no n x n tensor is made."""
    small = {**SHAPE, "hidden_size": 8, "intermediate_size": 8}
    model = BertModel(BertConfig(num_hidden_layers=1, max_position_embeddings=512, **small)).eval()
    convert_model(model, "linear", max_length=100_000)
    with torch.inference_mode():
        states = model(torch.randint(50, (1, 100_000), generator=torch.Generator().manual_seed(0))).last_hidden_state
    assert states.shape == (1, 100_000, 8)
    assert states.isfinite().all()
    with pytest.raises(ValueError, match="reaches token 100001, and this model reads at most 100000"):
        model(torch.zeros(1, 100_001, dtype=torch.long))
