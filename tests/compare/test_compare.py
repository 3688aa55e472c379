"""The comparison: equal budgets, intervals that are paired, failures that are shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hf_linear_attn.compare import run as module
from hf_linear_attn.compare.report import check_results
from hf_linear_attn.compare.run import BASELINE, compare
from hf_linear_attn.compare.schema import agreements
from hf_linear_attn.compare.systems import make_folds
from hf_linear_attn.measure.bootstrap import paired_bootstrap_difference
from hf_linear_attn.measure.methods import Method, parse_methods
from hf_linear_attn.training.finetune import FinetuneTrainer
from hf_linear_attn.training.recipe import Recipe
from hf_linear_attn.training.run import TrainResult
from tests.small_runs import small_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return small_recipe(
        tmp_path,
        finetune={"max_length": 96, "trainable": "last_layers:1", "cache_frozen_layers": True},
        evaluation={"forward_lengths": [32, 96], "forward_repeats": 1},
    )


def test_all_systems_share_one_budget_and_the_report_is_written(recipe: Recipe) -> None:
    done = compare(recipe, ["linear", ("longformer", {"window_size": 8})], show_progress=False)
    check_results(done.results)
    assert done.failed == {}
    rows = {row["name"]: row for row in done.results["rows"]}
    assert list(rows) == [BASELINE, "softmax-long", "linear", "longformer"]
    assert [row["max_length"] for row in rows.values()] == [64, 96, 96, 96]
    assert rows["longformer"]["options"]["window_size"] == 8
    folders = [recipe.output_dir / name for name in rows]
    runs = [json.loads((folder / "train_result.json").read_text()) for folder in folders]
    last = [run["stages"][-1] for run in runs]
    for same in ("steps", "documents_seen", "trained"):
        assert len({run[same] for run in last}) == 1, same
    assert last[0]["tokens_seen"] < last[1]["tokens_seen"] == last[2]["tokens_seen"]
    assert rows["longformer"]["parameters_added"] > 0 == rows["softmax-long"]["parameters_added"]
    assert all(row["seconds_per_step"] > 0 and row["tokens_per_second"] > 0 for row in rows.values())
    # the truncated checkpoint is not timed past its limit
    assert [[point["length"] for point in row["forward"]] for row in rows.values()] == [
        [32],
        [32, 96],
        [32, 96],
        [32, 96],
    ]
    assert done.paths is not None
    assert json.loads(done.paths.json.read_text()) == done.results
    assert done.paths.png.stat().st_size > 1000
    assert "longformer" in done.paths.html.read_text()


def test_quality_and_difference_are_those_of_the_predictions(recipe: Recipe, tmp_path: Path) -> None:
    results = compare(recipe, ["linear"], show_progress=False).results
    truth = [label for label in (0, 1) for _ in range(4)]  # the folder's labels in order
    rows = {row["name"]: row for row in results["rows"]}
    correct = {name: np.array(row["predictions"]) == truth for name, row in rows.items()}
    for name, row in rows.items():
        assert row["quality"]["accuracy"]["mean"] == pytest.approx(correct[name].mean())
    expected = paired_bootstrap_difference(correct["linear"], correct[BASELINE])
    assert rows["linear"]["difference_to_baseline"]["mean"] == pytest.approx(expected.mean)
    assert rows[BASELINE]["difference_to_baseline"] is None
    same = np.equal(rows["linear"]["predictions"], rows[BASELINE]["predictions"])
    assert agreements(results)["linear"] == pytest.approx(same.mean())


def test_a_system_that_fails_is_shown_with_its_error(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(run: Recipe, **kwargs: object) -> TrainResult:
        if run.conversion is not None and run.conversion.variant == "linear":
            raise RuntimeError("out of something")
        return train(run, **kwargs)  # type: ignore[arg-type]

    train = module.train
    monkeypatch.setattr(module, "train", fragile)
    done = compare(recipe, ["linear", "longformer"], show_progress=False)
    assert done.failed == {"linear": "RuntimeError: out of something"}
    assert "linear failed: RuntimeError: out of something" in done.results["notes"]
    assert [row["name"] for row in done.results["rows"]] == [BASELINE, "softmax-long", "longformer"]
    assert done.paths is not None
    assert "linear failed: RuntimeError: out of something" in done.paths.html.read_text()


def test_what_is_done_is_on_disk_before_the_next_system_starts(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: Recipe, **kwargs: object) -> TrainResult:
        if run.conversion is not None:
            raise KeyboardInterrupt
        return train(run, **kwargs)  # type: ignore[arg-type]

    train = module.train
    monkeypatch.setattr(module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, ["linear"], show_progress=False)
    written = json.loads((recipe.output_dir / "results.json").read_text())
    assert [row["name"] for row in written["rows"]] == [BASELINE, "softmax-long"]


def test_a_comparison_goes_on_where_it_was_cut_off(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded = recipe.replace(data={"folds": 2}, evaluation={"softmax_long": False, "forward_lengths": []})
    elsewhere = folded.replace(training={"output_dir": str(tmp_path / "whole")})
    whole = compare(elsewhere, ["linear"], show_progress=False)
    began: list[str] = []
    start = FinetuneTrainer.train

    def counted(self: FinetuneTrainer, **options: object) -> object:
        began.append("/".join(Path(str(self.args.output_dir)).parts[-2:]))
        return start(self, **options)  # type: ignore[arg-type]

    def cut(self: FinetuneTrainer, **options: object) -> object:
        done = counted(self, **options)
        if began[-1] == "linear/fold_1":  # trained, and nothing of it written
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(FinetuneTrainer, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        compare(folded, ["linear"], show_progress=False)
    monkeypatch.setattr(FinetuneTrainer, "train", counted)
    done = compare(folded, ["linear"], show_progress=False)
    folds = [f"{name}/fold_{number}" for name in (BASELINE, "linear") for number in (0, 1)]
    assert began == [*folds, "linear/fold_1"]
    for row, expected in zip(done.results["rows"], whole.results["rows"], strict=True):
        assert row["predictions"] == expected["predictions"], row["name"]
        assert row["quality"] == expected["quality"], row["name"]
    other = folded.replace(training={"seed": 3})
    with pytest.raises(ValueError, match="seed"):
        compare(other, ["linear"], show_progress=False)
    began.clear()
    compare(other, ["linear"], fresh=True, show_progress=False)
    assert began == folds


def test_folds_test_every_document_once_and_never_divide_a_group(recipe: Recipe) -> None:
    folded = recipe.replace(data={"folds": 3}, evaluation={"softmax_long": False, "forward_lengths": []})
    results = compare(folded, ["longformer"], show_progress=False).results
    assert [row["eval_documents"] for row in results["rows"]] == [24, 24]
    task = module.load_task(folded.data, "sequence_classification")
    folds = make_folds(task, 3, seed=0)
    numbers = sorted(number for fold in folds for number in fold.test["document"])
    assert numbers == list(range(24))
    for fold in folds:
        assert set(fold.train["document"]).isdisjoint(fold.test["document"])
        assert set(fold.train["group"]).isdisjoint(fold.test["group"])


def test_calibrated_variants_run_in_folds(recipe: Recipe) -> None:
    folded = recipe.replace(
        data={"folds": 2},
        conversion={"variant": "linear", "calibration_documents": 2},
        evaluation={"softmax_long": False, "forward_lengths": []},
    )
    assert compare(folded, ["linear"], show_progress=False).failed == {}


def test_variants_are_read_in_every_form_and_checked_before_anything_runs(recipe: Recipe) -> None:
    expected = [Method("linear"), Method("longformer", {"window_size": 8})]
    assert parse_methods(["linear", {"longformer": {"window_size": 8}}]) == expected
    assert parse_methods(["linear", ("longformer", {"window_size": 8})]) == expected
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        compare(recipe, ["liner"])
    with pytest.raises(ValueError, match="window"):
        compare(recipe, [("longformer", {"windw": 8})])
    with pytest.raises(ValueError, match="accuracy, macro_f1"):
        compare(recipe.replace(evaluation={"metrics": ["bleu"]}), ["linear"])
    with pytest.raises(ValueError, match="named twice: linear"):
        compare(recipe, ["linear", "linear"])
    assert not recipe.output_dir.exists()


def test_a_named_variant_takes_the_recipes_options(recipe: Recipe) -> None:
    own = recipe.replace(evaluation={"variants": [{"longformer": {"window_size": 4}}], "softmax_long": False})
    results = compare(own, ["longformer"], show_progress=False).results
    assert results["rows"][1]["options"]["window_size"] == 4
