"""Language models stage by stage: likelihoods beside the model's own loss, budgets, and runs that go on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_linear_attn.cli import app
from hf_linear_attn.compare import language as module
from hf_linear_attn.compare.language import BUDGETED, CHECKPOINT, compare_language, language_table
from hf_linear_attn.measure.perplexity import document_likelihoods
from hf_linear_attn.training.recipe import Recipe
from tests.small_runs import small_tokenizer
from tests.small_stages import texts
from tests.tiny import causal_lm, without_dropout


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    folder = tmp_path / "checkpoint"
    causal_lm("gpt2", **without_dropout("gpt2")).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    for split, count in (("train", 8), ("test", 4)):
        (tmp_path / "documents" / split).mkdir(parents=True)
        for index, text in enumerate(texts(count, words=40, seed=len(split))):
            (tmp_path / "documents" / split / f"{index}.txt").write_text(text)
    return Recipe.from_dict(
        {
            "model": {"name": str(folder)},
            "data": {"source": str(tmp_path / "documents")},
            "conversion": {"variant": "hedgehog", "calibration_documents": 2, "calibration_tokens": 32},
            "training": {
                "output_dir": str(tmp_path / "out"),
                "max_steps": 2,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-3,
            },
            "stages": [{"stage": "transfer", "max_length": 32}, {"stage": "distill", "max_length": 32}],
            "evaluation": {
                "lengths": [16, 32],
                "variants": ["hedgehog"],
                "controls": [{"longformer": {"window_size": 4}}],
            },
        }
    )


def test_likelihoods_are_the_models_own_loss() -> None:
    model = causal_lm("llama")
    draw = torch.Generator().manual_seed(0)
    documents = torch.randint(10, 60, (3, 24), generator=draw).tolist()
    found = document_likelihoods(model.train(), documents, 20)
    assert model.training
    model.eval()
    for ids, value in zip(documents, found, strict=True):
        tokens = torch.tensor([ids[:20]])
        with torch.no_grad():
            assert value == pytest.approx(float(model(input_ids=tokens, labels=tokens).loss), rel=1e-5)
    with pytest.raises(ValueError, match="length=25"):
        document_likelihoods(model, documents, 25)


def test_every_stage_has_a_row_and_the_ratio_is_to_the_same_tokens(recipe: Recipe) -> None:
    results = compare_language(recipe, say=lambda _: None)
    rows = results["rows"]
    assert [(row["system"], row["stage"]) for row in rows if row["length"] == 16] == [
        (CHECKPOINT, "checkpoint"),
        (BUDGETED, "uptrain"),
        ("longformer window_size=4", "converted"),
        ("hedgehog", "converted"),
        ("hedgehog", "transfer"),
        ("hedgehog", "distill"),
    ]
    for row in rows:
        assert len(row["nats"]) == 4
        assert row["perplexity"] == pytest.approx(math.exp(np.mean(row["nats"])))
        base = next(x for x in rows if (x["system"], x["length"]) == (BUDGETED, row["length"]))
        assert row["ratio"]["mean"] == pytest.approx(row["perplexity"] / base["perplexity"])
        assert row["ratio"]["low"] <= row["ratio"]["mean"] <= row["ratio"]["high"]
    budgeted, distilled = (
        next(row for row in rows if row["stage"] == stage and row["length"] == 16) for stage in ("uptrain", "distill")
    )
    assert budgeted["tokens_seen"] == distilled["tokens_seen"] > 0
    assert rows[4]["control"]
    written = json.loads((recipe.output_dir / "language.json").read_text())
    assert written["rows"][0]["perplexity"] == rows[0]["perplexity"]
    assert language_table(results).count("\n") == 1 + 6
    assert (recipe.output_dir / "language.md").read_text() == language_table(results) + "\n"


def test_the_checkpoints_row_is_the_unconverted_model(recipe: Recipe) -> None:
    rows = compare_language(recipe, [], say=lambda _: None)["rows"]
    model = causal_lm("gpt2", **without_dropout("gpt2"))
    paths = sorted(Path(recipe.data.source).glob("test/*.txt"))  # type: ignore[arg-type]
    documents = small_tokenizer()([path.read_text() for path in paths])["input_ids"]
    assert sorted(rows[0]["nats"]) == pytest.approx(sorted(document_likelihoods(model, documents, 16)), rel=1e-5)


def test_a_comparison_goes_on_where_it_was_cut_off(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def counted(run: Recipe, **options: Any) -> Any:
        if options["until_stage"] == "distill" and not runs.count("cut"):
            runs.append("cut")
            raise KeyboardInterrupt
        runs.append(f"{run.output_dir.name} {options['until_stage']}")
        return train(run, **options)

    train = module.train
    monkeypatch.setattr(module, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        compare_language(recipe, say=lambda _: None)
    first = [json.loads(line) for line in (recipe.output_dir / "language.rows.jsonl").read_text().splitlines()[1:]]
    results = compare_language(recipe, say=lambda _: None)
    assert runs == ["softmax uptrain", "hedgehog transfer", "cut", "hedgehog distill"]
    assert [row["nats"] for row in results["rows"][: len(first)]] == [row["nats"] for row in first]
    more = compare_language(recipe, ["hedgehog", "linear"], say=lambda _: None)
    assert {row["system"] for row in more["rows"]} >= {"hedgehog", "linear"}
    with pytest.raises(ValueError, match="another setting"):
        compare_language(recipe.replace(training={"seed": 3}), say=lambda _: None)


def test_a_method_without_parameters_is_distilled_at_once(recipe: Recipe) -> None:
    rows = compare_language(recipe, ["bigbird"], say=lambda _: None)["rows"]
    assert [row["stage"] for row in rows if row["system"] == "bigbird" and row["length"] == 16] == [
        "converted",
        "distill",
    ]


def test_a_system_that_fails_is_a_row_that_says_why(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(run: Recipe, **options: Any) -> Any:
        if "hedgehog" in str(run.output_dir):
            raise RuntimeError("out of something")
        return train(run, **options)

    train = module.train
    monkeypatch.setattr(module, "train", fragile)
    rows = compare_language(recipe, say=lambda _: None)["rows"]
    failed = [row for row in rows if "failure" in row]
    assert {row["stage"] for row in failed} == {"transfer", "distill"}
    assert failed[0]["failure"] == "RuntimeError: out of something"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"lengths": [16, 4096]}}, "No held-out document has 4096 tokens"),
        ({"stages": [{"stage": "finetune"}]}, "got finetune"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(
    recipe: Recipe, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare_language(recipe.replace(**changes))
    assert not recipe.output_dir.exists()


def test_the_command_prints_the_table(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.to_dict()))
    command = ["compare", str(tmp_path / "recipe.yaml"), "--variants", "linear"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "softmax, same tokens" in result.output
    assert CliRunner().invoke(app, command).exit_code == 0  # goes on: nothing is left to do


def test_softmax_gets_the_budget_of_every_stage_that_trains_its_weights(recipe: Recipe) -> None:
    shared = {"max_length": 32}
    stages = [
        {"stage": "transfer", **shared},
        {"stage": "distill", "trainable": "new", "training": {"max_steps": 3}, **shared},
        {"stage": "uptrain", "trainable": "last_layers:1", **shared},
    ]
    budgeted = module._Language(recipe.replace(stages=stages), [], "", print)._budgeted()
    assert budgeted.conversion is None
    found = [(stage.kind, stage.trainable, stage.training) for stage in budgeted.stages]
    assert found == [("uptrain", "all", {"max_steps": 3}), ("uptrain", "last_layers:1", {})]
