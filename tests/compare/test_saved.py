"""Saved models beside systems that a comparison trains: same documents, paired, marked, refused before a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_linear_attn import convert_model
from hf_linear_attn.compare import language as language_module
from hf_linear_attn.compare import run as module
from hf_linear_attn.compare.language import BUDGETED, compare_language, language_table
from hf_linear_attn.compare.report import check_results
from hf_linear_attn.compare.run import BASELINE, compare
from hf_linear_attn.compare.systems import make_folds
from hf_linear_attn.measure.perplexity import document_likelihoods
from hf_linear_attn.training.recipe import Recipe
from hf_linear_attn.training.run import TrainResult, train
from tests.small_runs import save_checkpoint, small_recipe, small_tokenizer
from tests.small_stages import masked_lm, texts
from tests.tiny import base_model, causal_lm, without_dropout


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return small_recipe(tmp_path, evaluation={"forward_lengths": [32], "forward_repeats": 1, "softmax_long": False})


def trained_elsewhere(recipe: Recipe, name: str = "elsewhere", **sections: Any) -> tuple[str, TrainResult]:
    folder = str(recipe.output_dir.parent / name)
    return folder, train(recipe.replace(**{"training": {}, **sections}).replace(training={"output_dir": folder}))


def with_models(recipe: Recipe, *models: Any) -> Recipe:
    return recipe.replace(evaluation={"models": list(models)})


def nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a step was taken")

    monkeypatch.setattr(module, "train", refuse)
    monkeypatch.setattr(language_module, "train", refuse)


# Classifiers ---------------------------------------------------------------------------------------------------------


def test_a_saved_model_has_a_row_that_says_so(recipe: Recipe) -> None:
    conversion = {"variant": "longformer", "options": {"window_size": 8}, "calibration_documents": 0}
    one, first = trained_elsewhere(recipe)
    other, second = trained_elsewhere(recipe, "converted", conversion=conversion, training={"max_steps": 3})
    done = compare(with_models(recipe, one, {"path": other, "name": "mine"}), ["linear"], show_progress=False)
    check_results(done.results)
    assert done.failed == {}
    rows = {row["name"]: row for row in done.results["rows"]}
    assert list(rows) == [BASELINE, "linear", "elsewhere (trained elsewhere)", "mine (trained elsewhere)"]
    plain, mine = list(rows.values())[2:]
    assert (plain["variant"], plain["options"]) == ("softmax", {})
    assert (mine["variant"], mine["options"]["window_size"]) == ("longformer", 8)
    truth = np.array([label for label in (0, 1) for _ in range(4)])
    for row, result in ((plain, first), (mine, second)):
        assert row["predictions"] == result.predictions
        assert row["quality"]["accuracy"]["mean"] == pytest.approx(result.metrics["accuracy"])
        assert (row["parameters_total"], row["parameters_added"]) == (result.parameters_total, result.parameters_added)
        assert [row[name] for name in ("parameters_trained", "seconds_per_step", "train_seconds")] == [None] * 3
        assert [point["length"] for point in row["forward"]] == [32]
        own, base = (np.mean(np.array(x["predictions"]) == truth) for x in (row, rows[BASELINE]))
        assert row["difference_to_baseline"]["mean"] == pytest.approx(own - base)
    assert rows["linear"]["seconds_per_step"] > 0
    notes = " ".join(done.results["notes"])
    assert f"mine (trained elsewhere) is {other}, measured as it was saved: it had no part in the budget" in notes
    assert done.paths is not None
    assert "mine (trained elsewhere)" in done.paths.html.read_text()
    assert json.loads(done.paths.json.read_text()) == done.results


def test_the_other_rows_are_what_they_are_without_saved_models(recipe: Recipe) -> None:
    folder, _ = trained_elsewhere(recipe)
    quiet = recipe.replace(evaluation={"forward_lengths": []})
    alone = compare(quiet, ["linear"], show_progress=False).results
    again = quiet.replace(training={"output_dir": str(recipe.output_dir.parent / "again")})
    beside = compare(with_models(again, folder), ["linear"], show_progress=False).results
    for one, other in zip(alone["rows"], beside["rows"][:2], strict=True):
        assert [one[name] for name in ("name", "predictions", "quality", "difference_to_baseline")] == [
            other[name] for name in ("name", "predictions", "quality", "difference_to_baseline")
        ]


def test_labels_of_a_saved_model_go_by_name(recipe: Recipe, tmp_path: Path) -> None:
    folder, result = trained_elsewhere(recipe)
    config = json.loads((Path(folder) / "config.json").read_text())
    turned = {"id2label": {0: "metal", 1: "fruit"}, "label2id": {"metal": 0, "fruit": 1}}
    (Path(folder) / "config.json").write_text(json.dumps({**config, **turned}))
    weights = load_file(Path(folder) / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    rows = compare(with_models(recipe, folder), [], show_progress=False).results["rows"]
    assert rows[-1]["predictions"] == result.predictions


def test_a_saved_model_is_measured_on_every_document_of_the_folds(recipe: Recipe) -> None:
    folder, _ = trained_elsewhere(recipe)
    folded = recipe.replace(data={"folds": 3}, evaluation={"models": [folder], "forward_lengths": []})
    rows = compare(folded, [], show_progress=False).results["rows"]
    assert [row["eval_documents"] for row in rows] == [24, 24]
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = module.load_task(folded.data, "sequence_classification")
    tested = [text for fold in make_folds(task, 3, seed=0) for text in fold.test["text"]]
    for text, prediction in zip(tested, rows[-1]["predictions"], strict=True):
        inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        assert int(model(**inputs).logits.argmax()) == prediction


def save_with(folder: Path, **changes: Any) -> str:
    save_checkpoint(folder, **{"id2label": {0: "fruit", 1: "metal"}, "label2id": {"fruit": 0, "metal": 1}, **changes})
    return str(folder)


def test_what_does_not_fit_is_refused_before_the_first_step(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_trains(monkeypatch)
    regression = save_with(tmp_path / "a", problem_type="regression", num_labels=1, id2label={0: "x"}, label2id=None)
    labels = save_with(tmp_path / "b", id2label={0: "fruit", 1: "wood"}, label2id=None)
    base_model("bert").save_pretrained(tmp_path / "c")
    small_tokenizer().save_pretrained(tmp_path / "c")
    lacking = Path(save_with(tmp_path / "d"))
    weights = load_file(lacking / "model.safetensors")
    weights.pop("classifier.weight")
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    for model, message in (
        (regression, "is for regression, the comparison is of sequence_classification"),
        (labels, r"does not know the label\(s\) metal of 'documents'; it knows fruit, wood"),
        (str(tmp_path / "c"), "is BertModel, which has no head that is measured here"),
        (str(lacking), r"lack 1 parameters of BertForSequenceClassification.*classifier\.weight"),
        (str(tmp_path / "nowhere"), "nowhere"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            compare(with_models(recipe, model), ["linear"], show_progress=False)
        assert not recipe.output_dir.exists()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["outputs/a", "other/a"], "rows need names of their own"),
        ([{"path": "a", "name": "b"}, "b"], "rows need names of their own"),
        ([{"path": "a", "name": " "}], "rows need names of their own"),
        ([{"folder": "a"}], r"Unknown key\(s\) \['folder'\] in recipe.evaluation.models\[0\]. Allowed: path, name"),
        ([{"name": "a"}], r"Missing key\(s\) \['path'\]"),
        ([7], r"recipe.evaluation.models\[0\] must be a mapping"),
        ("a", "recipe.evaluation.models must be a list"),
    ],
)
def test_models_of_a_recipe_are_read_strictly(recipe: Recipe, models: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.replace(evaluation={"models": models})


def test_a_saved_model_of_several_variants_names_them_all(recipe: Recipe, tmp_path: Path) -> None:
    folder = save_with(tmp_path / "several")
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    convert_model(model, {0: "linear", 1: "longformer"}).save_pretrained(folder)
    rows = compare(with_models(recipe, folder), [], show_progress=False).results["rows"]
    assert (rows[-1]["variant"], rows[-1]["options"]) == ("linear, longformer", {})


# Language models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def language_recipe(tmp_path: Path) -> Recipe:
    causal_lm("gpt2", **without_dropout("gpt2")).save_pretrained(tmp_path / "checkpoint")
    small_tokenizer().save_pretrained(tmp_path / "checkpoint")
    for split, count in (("train", 4), ("test", 4)):
        (tmp_path / "documents" / split).mkdir(parents=True)
        for index, text in enumerate(texts(count, words=40, seed=len(split))):
            (tmp_path / "documents" / split / f"{index}.txt").write_text(text)
    return Recipe.from_dict(
        {
            "model": {"name": str(tmp_path / "checkpoint")},
            "data": {"source": str(tmp_path / "documents")},
            "training": {"output_dir": str(tmp_path / "out"), "max_steps": 1, "per_device_train_batch_size": 2},
            "stages": [{"stage": "uptrain", "max_length": 32}],
            "evaluation": {"lengths": [16, 32]},
        }
    )


@pytest.fixture
def saved_gpt2(tmp_path: Path) -> str:
    model: Any = causal_lm("gpt2", **without_dropout("gpt2"))
    convert_model(model, "linear").save_pretrained(tmp_path / "saved")
    small_tokenizer().save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_a_saved_language_model_has_rows_and_ratios(language_recipe: Recipe, saved_gpt2: str) -> None:
    results = compare_language(
        with_models(language_recipe, {"path": saved_gpt2, "name": "mine"}), [], say=lambda _: None
    )
    rows = [row for row in results["rows"] if row["system"] == "mine (trained elsewhere)"]
    assert [(row["stage"], row["length"], row["model"]) for row in rows] == [
        ("saved", 16, saved_gpt2),
        ("saved", 32, saved_gpt2),
    ]
    model = convert_model(causal_lm("gpt2", **without_dropout("gpt2")), "linear")
    paths = sorted(Path(language_recipe.data.source).glob("test/*.txt"))  # type: ignore[arg-type]
    documents = small_tokenizer()([path.read_text() for path in paths], truncation=True, max_length=32)["input_ids"]
    for row in rows:
        expected = document_likelihoods(model, documents, row["length"])
        assert sorted(row["nats"]) == pytest.approx(sorted(expected), rel=1e-4)
        base = next(x for x in results["rows"] if (x["system"], x["length"]) == (BUDGETED, row["length"]))
        assert row["ratio"]["mean"] == pytest.approx(math.exp(np.mean(row["nats"]) - np.mean(base["nats"])))
    assert "| mine (trained elsewhere) | saved |" in language_table(results)


def test_saved_language_models_may_join_a_comparison_and_are_not_mistaken(
    language_recipe: Recipe,
    saved_gpt2: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = compare_language(language_recipe, [], say=lambda _: None)
    nothing_trains(monkeypatch)
    joined = compare_language(with_models(language_recipe, saved_gpt2), [], say=lambda _: None)
    assert len(joined["rows"]) == len(first["rows"]) + 2
    rows = [row for row in joined["rows"] if row["stage"] == "saved"]
    causal_lm("gpt2", initializer_range=0.5).save_pretrained(saved_gpt2)
    said: list[str] = []
    again = compare_language(with_models(language_recipe, saved_gpt2), [], say=said.append)
    assert "saved (trained elsewhere): " in said[0]
    assert said[0].endswith("was saved anew, and is measured again.")
    anew = [row for row in again["rows"] if row["stage"] == "saved"]
    assert len(anew) == len(rows)
    assert all(old["nats"] != new["nats"] for old, new in zip(rows, anew, strict=True))
    assert len(again["rows"]) == len(joined["rows"])
    other = Path(saved_gpt2).rename(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"'saved' was '.*saved' in the run that this one goes on with, and is '.*other'"
    ):
        compare_language(with_models(language_recipe, {"path": str(other), "name": "saved"}), [], say=lambda _: None)


def test_language_models_that_do_not_compare_are_refused_before_the_first_step(
    language_recipe: Recipe,
    saved_gpt2: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing_trains(monkeypatch)
    masked, short, classifier = (tmp_path / name for name in ("masked", "short", "classifier"))
    masked_lm().save_pretrained(masked)
    causal_lm("gpt2", max_position_embeddings=24).save_pretrained(short)
    for folder in (masked, short):
        small_tokenizer().save_pretrained(folder)
    save_checkpoint(classifier)
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["w0 w1", "apple pear", *(f"w{one} w{other}" for one in range(20) for other in range(20))])
    for model, message in (
        (masked, "is read by AutoModelForMaskedLM, not by AutoModelForCausalLM"),
        (classifier, "is read by AutoModelForSequenceClassification, not by AutoModelForCausalLM"),
        (short, "max_length=32, but .* reads 24 tokens at most"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_language(with_models(language_recipe, str(model)), [], say=lambda _: None)
    tokenizer.save_pretrained(saved_gpt2)
    with pytest.raises(ValueError, match="reads the held-out documents as other tokens than"):
        compare_language(with_models(language_recipe, saved_gpt2), [], say=lambda _: None)
    assert not language_recipe.output_dir.exists()
