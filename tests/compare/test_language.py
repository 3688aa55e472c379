"""Language models stage by stage: likelihoods beside the model's own loss, budgets, and runs that go on."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_linear_attn.cli import app
from hf_linear_attn.compare import language as module
from hf_linear_attn.compare import language_parts as parts
from hf_linear_attn.compare.language import (
    BUDGETED,
    CHECKPOINT,
    LINEAR_BRANCH_OFF,
    compare_language,
)
from hf_linear_attn.compare.language_tables import language_table
from hf_linear_attn.measure.curve import fit_power_law
from hf_linear_attn.measure.generation import continuation_likelihoods, greedy_continuations, repeated_share
from hf_linear_attn.measure.methods import RefusedError, parse_methods
from hf_linear_attn.measure.perplexity import document_likelihoods
from hf_linear_attn.training.parts import variants_of
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
                "forward_lengths": [],
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


def test_a_curve_says_what_more_tokens_would_bring(recipe: Recipe) -> None:
    assert compare_language(recipe, say=lambda _: None)["curves"] == []  # two steps are no curve
    stages = [{**stage, "training": {"max_steps": 4, "logging_steps": 1}} for stage in recipe.to_dict()["stages"]]
    recipe = recipe.replace(stages=stages, training={"output_dir": str(recipe.output_dir / "longer")})
    results = compare_language(recipe, say=lambda _: None)
    (curve,) = results["curves"]
    losses, tokens = [loss for _, loss in curve["losses"]], curve["tokens_seen"] / 4
    assert curve["system"] == "hedgehog"
    law = fit_power_law([1.5 * tokens, 2.5 * tokens, 3.5 * tokens], losses[1:])
    assert law is not None
    assert curve["exponent"] == law.exponent
    table = language_table(results).split("\n\n")[-1]
    assert f"{math.exp(law.at(40 * tokens)):.3f}" in table
    hot = recipe.replace(
        stages=[stages[0], {**stages[1], "temperature": 2.0}], training={"output_dir": str(recipe.output_dir / "hot")}
    )
    assert compare_language(hot, say=lambda _: None)["curves"] == []  # its loss is of other distributions


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
    other = recipe.replace(training={"seed": 3})
    with pytest.raises(ValueError, match="another setting"):
        compare_language(other, say=lambda _: None)
    runs.clear()
    runs.append("cut")
    anew = compare_language(other, fresh=True, say=lambda _: None)
    assert runs == ["cut", "softmax uptrain", "hedgehog transfer", "hedgehog distill"]
    assert {row["system"] for row in anew["rows"]} == {row["system"] for row in results["rows"]}


def test_a_hybrid_keeps_softmax_in_as_many_layers_through_every_stage(recipe: Recipe) -> None:
    results = compare_language(recipe, [{"hedgehog": {}, "keep_softmax": 1}, "hedgehog"], say=lambda _: None)
    kept = {row["system"]: row for row in results["rows"] if row["stage"] == "distill" and row["length"] == 32}
    hybrid, whole = kept["hedgehog keep_softmax=1"], kept["hedgehog"]
    assert "failure" not in {**hybrid, **whole}
    assert hybrid["nats"] != whole["nats"]
    model = AutoModelForCausalLM.from_pretrained(recipe.output_dir / "hedgehog_keep_softmax_1")
    assert len(variants_of(model)) == model.config.num_hidden_layers - 1


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
        ({"stages": [{"stage": "finetune"}], "evaluation": {"controls": [], "lengths": None}}, "got finetune"),
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
    budgeted = module._Language(recipe.replace(stages=stages), [], "", False, print)._budgeted()
    assert budgeted.conversion is None
    found = [(stage.kind, stage.trainable, stage.training) for stage in budgeted.stages]
    assert found == [("uptrain", "all", {"max_steps": 3}), ("uptrain", "last_layers:1", {})]


def test_distillation_learns_from_the_budgeted_checkpoint_where_it_is_told_to(recipe: Recipe) -> None:
    ends: dict[str, list[float]] = {}
    for teacher in ("checkpoint", "budgeted"):
        training = {"output_dir": str(recipe.output_dir / teacher), "learning_rate": 0.02, "max_steps": 8}
        results = quiet(recipe.replace(training=training), teacher=teacher, controls=[], lengths=[32])
        rows = {(row["system"], row["stage"]): row["nats"] for row in results["rows"] if "length" in row}
        ends[teacher] = rows["hedgehog", "distill"]
        base = rows[BUDGETED, "uptrain"]
        assert rows[CHECKPOINT, "checkpoint"] != pytest.approx(base, rel=0.01)
        if teacher == "budgeted":
            assert (
                np.abs(np.subtract(ends["budgeted"], base)).mean()
                < np.abs(np.subtract(ends["checkpoint"], base)).mean()
            )
    shutil.rmtree(recipe.output_dir / "budgeted" / "softmax")  # rows are there, the teacher is gone
    again = quiet(
        recipe.replace(training={**training, "output_dir": str(recipe.output_dir / "budgeted")}),
        "hedgehog",
        "linear",
        teacher="budgeted",
        controls=[],
        lengths=[32],
    )
    assert not any("failure" in row for row in again["rows"])
    assert (recipe.output_dir / "budgeted" / "softmax" / "config.json").is_file()
    own = recipe.replace(evaluation={"teacher": "budgeted"})
    method = parse_methods(["hedgehog"])[0]
    of_method = module._Language(own, [], "", False, print)._recipe_of(method)
    (distill,) = [stage for stage in of_method.stages if stage.kind == "distill"]
    assert distill.teacher == str(recipe.output_dir / "softmax")
    named = [{"stage": "distill", "max_length": 32, "teacher": own.model.name}]
    (distill,) = module._Language(own.replace(stages=named), [], "", False, print)._recipe_of(method).stages
    assert distill.teacher == own.model.name


WINDOWED = {"lolcats": {"window_size": 4}}
WRITES = {"prompts": 3, "prompt_tokens": 16, "new_tokens": 8}


def quiet(recipe: Recipe, *variants: Any, **evaluation: Any) -> dict[str, Any]:
    return compare_language(recipe.replace(evaluation=evaluation), variants or None, say=lambda _: None)


def held_out(recipe: Recipe, length: int) -> list[list[int]]:
    paths = sorted(Path(recipe.data.source).glob("test/*.txt"))  # type: ignore[arg-type]
    return small_tokenizer()([path.read_text() for path in paths], truncation=True, max_length=length)["input_ids"]


def test_a_trained_model_is_measured_without_its_linear_branch(recipe: Recipe) -> None:
    results = quiet(recipe, controls=[LINEAR_BRANCH_OFF], variants=[WINDOWED, "hedgehog"], lengths=[32])
    off = [row for row in results["rows"] if "branch off" in row["system"]]
    assert [(row["system"], row["stage"], row["control"]) for row in off] == [
        ("lolcats window_size=4, linear branch off", "distill", True)
    ]
    trained = next(row for row in results["rows"] if row["system"].startswith("lolcats") and row["stage"] == "distill")
    assert off[0]["tokens_seen"] == trained["tokens_seen"]
    folder = recipe.output_dir / "lolcats_window_size_4"
    model = AutoModelForCausalLM.from_pretrained(folder)
    documents = held_out(recipe, 32)
    assert sorted(trained["nats"]) == pytest.approx(sorted(document_likelihoods(model, documents, 32)), rel=1e-5)
    assert [variant.drop_linear_branch() for variant in variants_of(model)] == [True, True]
    assert sorted(off[0]["nats"]) == pytest.approx(sorted(document_likelihoods(model, documents, 32)), rel=1e-5)
    assert off[0]["perplexity"] != pytest.approx(trained["perplexity"], rel=1e-3)
    assert "| lolcats window_size=4, linear branch off (control) | distill |" in language_table(results)


def test_only_the_last_stage_writes_and_all_write_after_the_same_prompts(recipe: Recipe) -> None:
    keys = {"passkey_lengths": [48, 96], "passkey_documents": 2, "passkey_filler": "words"}
    results = quiet(recipe, generation=WRITES, forward_lengths=[16, 4096], forward_repeats=1, lengths=[16], **keys)
    last = {(CHECKPOINT, "checkpoint"), (BUDGETED, "uptrain"), ("longformer window_size=4", "converted")}
    last |= {("hedgehog", "distill")}
    for kind, values in (("generation", [WRITES]), ("passkey_length", [48, 96]), ("forward_length", [16])):
        found = [row for row in results["rows"] if kind in row]
        assert {(row["system"], row["stage"]) for row in found} == last
        assert [row[kind] for row in found] == values * len(last)
    rows = {row["system"]: row for row in results["rows"] if "generation" in row}
    own, base = rows["hedgehog"], rows[BUDGETED]
    model = AutoModelForCausalLM.from_pretrained(recipe.output_dir / "hedgehog")
    checkpoint = causal_lm("gpt2", **without_dropout("gpt2"))
    prompts = held_out(recipe, 16)[:3]
    written = greedy_continuations(model, prompts, 8)
    assert own["written"] == [small_tokenizer().decode(ids) for ids in written]
    assert own["written_nats"] == pytest.approx(continuation_likelihoods(checkpoint, prompts, written), rel=1e-5)
    assert own["repeated_share"] == pytest.approx(np.mean([repeated_share(ids) for ids in written]))
    difference = own["repeated_difference"]
    assert difference["mean"] == pytest.approx(own["repeated_share"] - base["repeated_share"])
    assert own["written_ratio"]["mean"] == pytest.approx(own["written_perplexity"] / base["written_perplexity"])
    for row in results["rows"]:
        if "passkey_length" in row:
            assert row["found"] == [0, 0]  # no vocabulary here has a digit
            assert row["passkey_filler"] == "generated; filler: generated words"
        if "forward_length" in row:
            assert row["forward_seconds"] > 0
            assert (row["forward_ratio"] == 1) == (row["system"] == CHECKPOINT)
    tables = language_table(results).split("\n\n")
    assert [table.splitlines()[0].count("|") for table in tables] == [4, 7, 4]
    assert [table.count("\n") for table in tables] == [1 + 6, 1 + 4, 1 + 4]
    assert "| hedgehog | distill | " in tables[1]
    assert "0% [0%, 0%]" in tables[1]
    assert (recipe.output_dir / "language.png").is_file()


def test_what_is_written_joins_later_and_other_prompts_are_measured_anew(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = quiet(recipe)
    assert not (recipe.output_dir / "language.png").exists()
    stages: list[str] = []

    def counted(run: Recipe, **options: Any) -> Any:
        result = train(run, **options)
        stages.append(f"{run.output_dir.name} {options['until_stage']}")
        return result

    train = module.train
    monkeypatch.setattr(module, "train", counted)
    seconds = {path: path.stat().st_mtime for path in recipe.output_dir.rglob("model.safetensors")}
    joined = quiet(recipe, generation=WRITES)
    assert [row for row in joined["rows"] if "length" in row] == plain["rows"]
    assert stages == ["softmax uptrain", "hedgehog distill"]
    assert seconds == {path: path.stat().st_mtime for path in recipe.output_dir.rglob("model.safetensors")}
    other = quiet(recipe, generation={**WRITES, "prompts": 2})
    found = [row for row in other["rows"] if "generation" in row]
    assert [len(row["repeated"]) for row in found] == [2] * 4
    assert len(stages) == 4
    again = quiet(recipe, generation=WRITES)
    assert len(stages) == 4
    assert again["rows"] == joined["rows"]


def test_what_cannot_be_written_is_a_row_that_says_why(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no words")

    monkeypatch.setattr(parts, "greedy_continuations", broken)
    results = quiet(recipe, "bigbird", generation=WRITES)
    failed = [row for row in results["rows"] if "failure" in row]
    assert {row["failure"] for row in failed} == {"RuntimeError: no words"}
    assert all("generation" in row for row in failed)
    assert "failed: RuntimeError: no words" in language_table(results)
    monkeypatch.undo()
    assert not [row for row in quiet(recipe, "bigbird", generation=WRITES)["rows"] if "failure" in row]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"controls": [LINEAR_BRANCH_OFF]}, "beside a window: hedgehog. Those that have: lolcats, long_short."),
        ({"controls": [LINEAR_BRANCH_OFF], "variants": []}, "beside a window: there is none"),
        (
            {"controls": [LINEAR_BRANCH_OFF], "variants": [{"long_short": {"num_landmarks": 0}}]},
            "beside a window: long_short num_landmarks=0",
        ),
        ({"controls": [LINEAR_BRANCH_OFF] * 2, "variants": ["lolcats"]}, "names linear_branch_off twice"),
        ({"controls": ["linear_branch"]}, "'linear_branch' is not known. Allowed: linear_branch_off, or a variant"),
        ({"generation": {**WRITES, "prompts": 5}}, "prompts=5, but 4 held-out documents have prompt_tokens=16"),
        ({"generation": {**WRITES, "prompt_tokens": 43}}, "prompts=3, but 0 held-out documents"),
        ({"generation": {**WRITES, "new_tokens": 145}}, "are 161, but the checkpoint reads 160 tokens"),
        ({"passkey_lengths": [154]}, "154 tokens and the key are 161, but the checkpoint reads 160"),
        ({"passkey_lengths": [20], "passkey_filler": "words"}, "20 tokens do not hold"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_runs(
    recipe: Recipe, evaluation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        quiet(recipe, **evaluation)
    assert not recipe.output_dir.exists()


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"generation": {"prompts": 0}}, "evaluation.generation.prompts must be at least 1, got 0"),
        ({"generation": {"prompt_tokens": -1}}, "evaluation.generation.prompt_tokens must be at least 1, got -1"),
        ({"generation": {"new_tokens": 4}}, "evaluation.generation.new_tokens must be at least 5, got 4"),
        ({"generation": {"prompts": 1.5}}, "evaluation.generation.prompts must be int, got 1.5"),
        ({"generation": {"tokens": 4}}, "Unknown key(s) ['tokens'] in recipe.evaluation.generation"),
        ({"generation": 4}, "recipe.evaluation.generation must be a mapping, got 4"),
        ({"passkey_lengths": [0]}, "evaluation.passkey_lengths must be at least 1, got 0"),
        ({"passkey_lengths": 256}, "recipe.evaluation.passkey_lengths must be a list, got 256"),
        ({"passkey_documents": 1}, "evaluation.passkey_documents must be at least 2, got 1"),
        ({"passkey_filler": "lorem"}, "recipe.evaluation.passkey_filler is one of auto, sotu, words, got 'lorem'"),
    ],
)
def test_a_recipe_that_asks_for_nothing_sensible_is_refused(
    recipe: Recipe, evaluation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe.replace(evaluation=evaluation)


@pytest.mark.parametrize(
    "evaluation",
    [{"lengths": [512, 2048]}, {"generation": WRITES}, {"passkey_lengths": [64]}, {"controls": ["linear"]}],
)
def test_a_classifier_is_asked_to_write_nothing(recipe: Recipe, evaluation: dict[str, Any]) -> None:
    (name,) = evaluation
    with pytest.raises(ValueError, match=rf"evaluation\.{name} is of language models, and the last stage is finetune"):
        recipe.replace(stages=[{"stage": "finetune"}], evaluation={"lengths": None, "controls": [], **evaluation})


@pytest.mark.parametrize("evaluation", [{"bag_of_words": True}, {"softmax_long": False}])
def test_a_language_model_is_asked_for_nothing_that_classifiers_do(recipe: Recipe, evaluation: dict[str, Any]) -> None:
    (name,) = evaluation
    with pytest.raises(ValueError, match=rf"evaluation\.{name} is of classifiers, and the last stage is distill"):
        recipe.replace(evaluation=evaluation)


def test_a_model_that_reads_less_than_the_checkpoint_is_not_timed_as_the_checkpoint(recipe: Recipe) -> None:
    (part,) = parts.last_parts(recipe.replace(evaluation={"forward_lengths": [100]}), small_tokenizer(), [], 160)
    checkpoint = causal_lm("gpt2")
    assert part.measure(causal_lm("gpt2"), lambda: checkpoint)["forward_ratio"] > 0
    with pytest.raises(RefusedError, match="it does not read 100 tokens"):
        part.measure(causal_lm("gpt2", max_position_embeddings=64), lambda: checkpoint)


@pytest.mark.parametrize("length", [40, 48, 96, 150])
def test_pass_keys_lie_in_texts_as_long_as_asked_for(recipe: Recipe, length: int) -> None:
    evaluation = recipe.replace(evaluation={"passkey_documents": 5, "passkey_filler": "words"}).evaluation
    tokenizer = small_tokenizer()
    prompts, keys, _ = parts._passkeys(length, evaluation, 0, tokenizer)
    assert length - 2 <= max(map(len, prompts)) <= length
    assert len(set(keys)) == 5
    assert all(len(key) == 5 and key.isdigit() for key in keys)
    assert parts._passkeys(length, evaluation, 0, tokenizer)[:2] == (prompts, keys)
    assert parts._passkeys(length, evaluation, 1, tokenizer)[1] != keys
