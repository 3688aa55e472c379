"""Recipes of several stages: what each leaves, where a run begins, ends and goes on, and what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM

from hf_linear_attn.training.recipe import Recipe
from hf_linear_attn.training.run import TrainResult, _Run, train
from tests.small_runs import save_checkpoint, save_documents, small_tokenizer
from tests.test_cli_folders import files, sentence_encoder
from tests.tiny import base_model, build, causal_lm, tiny_config

STAGES: dict[str, list[dict[str, Any]]] = {
    "bert": [
        {"stage": "transfer", "max_length": 32, "training": {"learning_rate": 1e-2}},
        {"stage": "distill", "max_length": 32, "new_learning_rate": 2e-3},
        {"stage": "finetune", "max_length": 48},
    ],
    "gpt2": [
        {"stage": "transfer", "max_length": 32, "training": {"learning_rate": 1e-2}},
        {"stage": "distill", "max_length": 32},
        {"stage": "uptrain", "max_length": 48},
    ],
}
STAGES["llama"] = STAGES["gpt2"]


def save_family(family: str, folder: Path) -> None:
    """A tiny checkpoint with a language model's head; GPT-2's tokenizer has no padding token."""
    tokenizer = small_tokenizer()
    if family == "gpt2":
        tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    bert = tiny_config("bert", max_position_embeddings=64)
    model = build(BertForMaskedLM, bert) if family == "bert" else causal_lm(family)
    model.save_pretrained(folder)


def staged_recipe(folder: Path, family: str = "bert", **sections: Any) -> Recipe:
    if not (folder / "checkpoint").exists():
        save_family(family, folder / "checkpoint")
        save_documents(folder / "documents", train=4, test=2)
    recipe = Recipe.from_dict(
        {
            "model": {"name": str(folder / "checkpoint")},
            "data": {"source": str(folder / "documents")},
            "conversion": {"variant": "hedgehog", "calibration_documents": 2},
            "training": {
                "max_steps": 4,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "save_strategy": "steps",
                "save_steps": 2,
                "output_dir": str(folder / "run"),
            },
            "stages": STAGES[family],
            "evaluation": {"forward_lengths": [], "num_resamples": 50},
        }
    )
    return recipe.replace(**sections)


def kinds(recipe: Recipe) -> list[str]:
    return [stage.kind for stage in recipe.stages]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_each_stage_leaves_a_model_that_the_next_one_begins_with(family: str, tmp_path: Path) -> None:
    recipe = staged_recipe(tmp_path, family)
    result = train(recipe)
    run, auto = tmp_path / "run", AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
    assert [stage.stage for stage in result.stages] == kinds(recipe)
    assert all(stage.steps == 4 for stage in result.stages)
    first, second = weights(run / "1-transfer"), weights(run / "2-distill")
    start = auto.from_pretrained(tmp_path / "checkpoint").state_dict()
    for name, tensor in start.items():  # transfer trains what the conversion added, and nothing else
        if name in first:
            assert torch.equal(tensor, first[name]), name
    assert any(not torch.equal(first[name], second[name]) for name in start if name in first)
    for folder in (run / "1-transfer", run / "2-distill"):
        assert auto.from_pretrained(folder).config.model_type == f"linear_attn_{family}"
        assert AutoTokenizer.from_pretrained(folder).model_max_length == 32
    assert AutoTokenizer.from_pretrained(run).model_max_length == 48
    assert result.conversion is not None
    assert [row["variant"] for row in result.conversion["rows"]] == ["hedgehog"] * 2
    again = TrainResult.read(run)
    assert again is not None
    assert again.to_dict() == json.loads(json.dumps(result.to_dict())) | {"stages": again.to_dict()["stages"]}
    middle = TrainResult.read(run / "2-distill")
    assert middle is not None
    assert (middle.conversion, len(middle.stages)) == (result.conversion, 2)
    assert result.metrics.keys() >= ({"accuracy", "loss"} if family == "bert" else {"loss"})


def test_layers_stay_softmax_by_what_the_recipe_says(tmp_path: Path) -> None:
    auto = {"layers": "auto", "keep_softmax": 1, "keep_softmax_by": "states"}
    conversion = train(staged_recipe(tmp_path, "gpt2", conversion=auto), until_stage="transfer").conversion
    assert conversion is not None
    assert (conversion["kept_softmax_by"], len(conversion["kept_softmax"])) == ("states", 1)


def test_stages_apart_end_like_stages_together(tmp_path: Path) -> None:
    recipe = staged_recipe(tmp_path)
    whole = weights(train(recipe).output_dir)
    apart = recipe.replace(training={"output_dir": str(tmp_path / "apart")})
    report = train(apart, until_stage="transfer").conversion
    assert sorted(path.name for path in (tmp_path / "apart").iterdir()) == ["1-transfer", "stages.json"]
    train(apart, from_stage="distill", until_stage="distill")
    last = train(apart, from_stage="finetune")
    assert_same(whole, weights(last.output_dir))
    assert last.conversion == report
    assert [stage.stage for stage in last.stages] == kinds(recipe)


def test_a_stage_may_be_run_again_otherwise_but_not_what_it_begins_with(tmp_path: Path) -> None:
    recipe = staged_recipe(tmp_path)
    train(recipe)
    before = weights(tmp_path / "run")
    faster = recipe.replace(finetune={"head_learning_rate": 1e-2})
    assert train(faster, from_stage="finetune").last.steps == 4
    after = weights(tmp_path / "run")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    held = snapshot(tmp_path / "run")
    other = recipe.replace(distill={"new_learning_rate": 5e-3})
    with pytest.raises(ValueError, match=r"Stage 2 in .*: new_learning_rate=0.002 there and 0.005 here"):
        train(other, from_stage="finetune")
    assert snapshot(tmp_path / "run") == held


def test_a_run_that_stopped_between_stages_and_within_one_ends_with_the_same_bits(tmp_path: Path) -> None:
    recipe = staged_recipe(tmp_path)
    whole = train(recipe)
    expected = weights(whole.output_dir)
    run = tmp_path / "run"
    # killed in the second stage after two of its four steps
    (run / "2-distill" / "train_result.json").unlink()
    shutil.rmtree(run / "2-distill" / "checkpoint-4")
    progress = json.loads((run / "stages.json").read_text())
    (run / "stages.json").write_text(json.dumps(progress[:2]))
    said: list[str] = []
    again = train(recipe, resume=True, on_message=said.append)
    assert_same(expected, weights(again.output_dir))
    assert any("Stage 1 of 3, transfer: finished before" in line for line in said)
    assert again.conversion == whole.conversion
    assert (again.metrics["accuracy"], again.predictions) == (whole.metrics["accuracy"], whole.predictions)
    assert [[loss for _, loss in stage.losses] for stage in again.stages] == [
        [loss for _, loss in stage.losses] for stage in whole.stages
    ]


def test_a_finished_run_that_is_resumed_changes_nothing_and_says_the_same(tmp_path: Path) -> None:
    recipe = staged_recipe(tmp_path)
    whole = train(recipe)
    held = snapshot(tmp_path / "run")
    assert train(recipe, resume=True).to_dict() == whole.to_dict()
    assert train(recipe, resume=True, until_stage="distill").last.stage == "distill"
    assert snapshot(tmp_path / "run") == held


def test_a_run_that_begins_anew_takes_nothing_from_an_earlier_one(tmp_path: Path) -> None:
    recipe = staged_recipe(tmp_path)
    train(recipe.replace(training={"seed": 3, "save_total_limit": 9}))
    other = train(recipe, until_stage="transfer")  # later stages of the old run lie there still
    expected = weights(train(recipe.replace(training={"output_dir": str(tmp_path / "new")})).output_dir)
    assert other.last.steps == 4
    assert_same(expected, weights(train(recipe, resume=True).output_dir))


def test_a_run_of_a_version_that_had_a_setting_less_goes_on(tmp_path: Path) -> None:
    recipe = staged_recipe(tmp_path)
    train(recipe, until_stage="transfer")
    path = tmp_path / "run" / "stages.json"
    stages = json.loads(path.read_text())
    assert stages[0]["conversion"].pop("keep_softmax_by", "missing") is None
    path.write_text(json.dumps(stages))
    assert train(recipe, until_stage="transfer", resume=True).last.steps == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"learning_rate": 2e-3}}, r"learning_rate=0.001 there and 0.002 here"),
        pytest.param({"training": {"seed": 1}}, r"seed=0 there and 1 here", marks=pytest.mark.slow),
        pytest.param(
            {"training": {"per_device_train_batch_size": 4}},
            r"per_device_train_batch_size=2 there and 4 here",
            marks=pytest.mark.slow,
        ),
        ({"data": {"max_train_documents": 4}}, r"documents='\w+' there and '\w+' here"),
        ({"conversion": {"variant": "linear"}}, r"conversion\.variant='hedgehog' there and 'linear' here"),
        ({"model": {"name": "other"}}, r"model\.name=.*checkpoint.* there and .*other.* here"),
        pytest.param(
            {"distill": {"temperature": 2.0}},
            r"Stage 2 in .*temperature=1.0 there and 2.0 here",
            marks=pytest.mark.slow,
        ),
        ({"stages": [STAGES["bert"][1], STAGES["bert"][0]]}, r"stage='transfer' there and 'distill' here$"),
    ],
    ids=["rate", "seed", "batch", "data", "conversion", "model", "temperature", "order"],
)
def test_a_resume_under_other_settings_is_refused_with_the_difference(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = staged_recipe(tmp_path)
    if "model" in change:
        save_family("bert", tmp_path / "other")
        change = {"model": {"name": str(tmp_path / "other")}}
    train(recipe, until_stage="distill")
    held = snapshot(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        train(recipe.replace(**change), resume=True)
    assert snapshot(tmp_path / "run") == held
    later = recipe.replace(finetune={"max_length": 40})  # a stage that was not begun may change
    assert train(later, resume=True).last.max_length == 40


def test_a_run_over_a_shuffled_stream_goes_on_and_is_refused_under_another_buffer(tmp_path: Path) -> None:
    stream = {"streaming": True, "shuffle_buffer": 3, "seed": 1}
    recipe = staged_recipe(tmp_path, "gpt2", data=stream, stages=STAGES["gpt2"][:2])
    said: list[str] = []
    expected = weights(train(recipe, on_message=said.append).output_dir)
    assert any("as a stream, shuffled in a buffer of 3, in pieces of" in sentence for sentence in said)
    ordered = recipe.replace(data={"shuffle_buffer": None}, training={"output_dir": str(tmp_path / "ordered")})
    other = weights(train(ordered).output_dir)
    assert any(not torch.equal(expected[name], other[name]) for name in expected)
    run = tmp_path / "run"
    (run / "train_result.json").unlink()
    shutil.rmtree(run / "checkpoint-4")
    with pytest.raises(ValueError, match="shuffle_buffer=3 there and 4 here"):
        train(recipe.replace(data={"shuffle_buffer": 4}), resume=True)
    with pytest.raises(ValueError, match=r"documents='\w+' there and '\w+' here"):
        train(recipe.replace(data={"seed": 2}), resume=True)
    assert_same(expected, weights(train(recipe, resume=True).output_dir))


@pytest.mark.parametrize(("family", "own"), [("bert", [True, None, None]), ("gpt2", [True, True, False])])
def test_the_teacher_is_the_checkpoint_whatever_was_trained(family: str, own: list[Any], tmp_path: Path) -> None:
    stages = [STAGES[family][0], STAGES[family][1], STAGES["gpt2"][2], {"stage": "distill", "max_length": 32}]
    recipe = staged_recipe(tmp_path, family, stages=stages)
    run = _Run(recipe, None, None, None)
    run.load(None)
    checkpoint = (AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM).from_pretrained(
        tmp_path / "checkpoint"
    )
    train(recipe, until_stage="uptrain")
    model, _ = run._model(3, None)
    teacher = run._teacher(3, model)
    assert_same(checkpoint.state_dict(), teacher.state_dict())
    model, _ = run._model(1, None)
    assert run._teacher(1, model) is None  # transfer moved no weight of the checkpoint: the model still holds it
    assert train(recipe, from_stage="distill").last.stage == "distill"


def test_states_of_a_base_model(tmp_path: Path) -> None:
    recipe = staged_recipe(tmp_path)
    base_model("bert", max_position_embeddings=64).save_pretrained(tmp_path / "checkpoint")
    recipe = recipe.replace(
        conversion={"variant": "hedgehog", "max_length": 96},
        stages=[STAGES["bert"][0], {"stage": "distill", "max_length": 96, "window": 32}],
        training={"num_train_epochs": 8},
    )
    result = train(recipe)
    assert (tmp_path / "run" / "1-transfer" / "model.safetensors").is_file()
    losses = [loss for _, loss in result.last.losses]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["architectures"] == ["LinearAttnBertModel"]


def embedder(folder: Path) -> Path:
    """A checkpoint as sentence-transformers saves an embedder, and documents."""
    sentence_encoder(folder / "checkpoint")
    base_model("bert", max_position_embeddings=64).save_pretrained(folder / "checkpoint")
    save_documents(folder / "documents", train=4, test=2)
    return folder / "checkpoint"


def test_an_embedder_keeps_the_modules_of_its_checkpoint_and_a_classifier_takes_none(tmp_path: Path) -> None:
    source, run = embedder(tmp_path), tmp_path / "run"
    longer = {"variant": "hedgehog", "max_length": 96}
    stages = [STAGES["bert"][0], {"stage": "distill", "max_length": 96, "window": 32}]
    train(staged_recipe(tmp_path, conversion=longer, stages=stages))
    for folder, limit in ((run / "1-transfer", 32), (run, 96)):
        for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
        prompts = json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"]
        assert prompts == {"query": "query: "}
        settings = json.loads((folder / "sentence_bert_config.json").read_text())
        assert settings == {"max_seq_length": limit, "do_lower_case": False}
        assert AutoTokenizer.from_pretrained(folder).model_max_length == limit
        assert not {"README.md", "eval_results.json", "pytorch_model.bin", "onnx/model.onnx"} & files(folder)
        assert type(AutoModel.from_pretrained(folder)).__name__ == "LinearAttnBertModel"
    kept = (run / "model.safetensors").read_bytes()
    train(staged_recipe(tmp_path, conversion=longer, stages=STAGES["bert"][2:]))
    assert (run / "model.safetensors").read_bytes() != kept
    assert not {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} & files(run)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("modules.json", "[{", r"modules\.json is not JSON"),
        ("modules.json", '[{"idx": 0}]', r"modules\.json must hold a list of modules, each with the path"),
        ("modules.json", '{"path": ""}', r"modules\.json must hold a list of modules, each with the path"),
        ("sentence_bert_config.json", "[48]", r"sentence_bert_config\.json must hold a mapping, given \[48\]"),
    ],
)
def test_an_embedder_whose_settings_cannot_be_read_is_not_trained(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (embedder(tmp_path) / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        train(staged_recipe(tmp_path, stages=STAGES["bert"][:1]))
    assert not (tmp_path / "run").exists()


# What is said -------------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_is_about_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = staged_recipe(tmp_path)
    said: list[str] = []
    result = train(recipe, on_message=said.append)
    text = "\n".join(said)
    tokenizer, train_texts = small_tokenizer(), sorted((tmp_path / "documents" / "train").rglob("*.txt"))
    lengths = [len(tokenizer(path.read_text())["input_ids"]) for path in train_texts]
    cut = sum(length > 48 for length in lengths)
    assert 0 < cut < 8
    assert said[0] == f"Stages: transfer -> distill -> finetune; the model goes to {tmp_path / 'run'}."
    assert f"Converted: hedgehog in 2 of 2 layers; {result.parameters_added:,} new parameters." in text
    new, total = result.stages[0].parameters_trained, result.parameters_added
    assert new == total
    assert f"Stage 1 of 3, transfer: trains the conversion's new parameters, {new:,} of " in text
    assert f"8 documents of documents, {sum(min(length, 48) for length in lengths):,} tokens; {cut} of them" in text
    assert f"({cut / 8:.0%}) are cut at 48 tokens. 4 test documents." in text
    assert f"Stage 2 of 3, distill: the model goes to {tmp_path / 'run' / '2-distill'}." in text
    bar = capsys.readouterr()
    assert "loss=" in bar.err
    assert bar.out == ""


def test_the_library_says_nothing_of_its_own_accord(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(staged_recipe(tmp_path), on_step=lambda share: None)
    assert capsys.readouterr().out == ""


def test_predictions_carry_the_files_they_are_of(tmp_path: Path) -> None:
    result = train(staged_recipe(tmp_path))
    written = json.loads((tmp_path / "run" / "train_result.json").read_text())
    assert written["groups"] == result.groups
    assert len(result.groups) == len(result.predictions) == 4
    assert len(set(result.groups)) == 4
    for group, reference in zip(result.groups, result.references, strict=True):
        assert ("fruit" in group, "metal" in group) == (reference == 0, reference == 1)


# What is wrong before the first step --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evaluation": {"metrics": ["acuracy"]}}, "Did you mean 'accuracy'"),
        ({"evaluation": {"metrics": ["perplexity"]}}, "not sequence_classification"),
        ({"finetune": {"task": "regression"}, "evaluation": {"metrics": ["accuracy"]}}, "not regression"),
        ({"stages": STAGES["bert"][:2], "evaluation": {"metrics": ["accuracy"]}}, "the last one here is distill"),
        ({"training": {"learning_rate": float("inf")}}, "learning_rate must be a finite number above 0"),
        ({"training": {"learning_rate": 0.0}}, "learning_rate must be a finite number above 0"),
        ({"training": {"max_steps": 0}}, "max_steps must be positive"),
        ({"distill": {"max_length": 65}}, "max_length=65, but the teacher reads 64 tokens"),
        ({"distill": {"window": 65}}, "window=65"),
        ({"conversion": {"variant": "hedgehog", "max_length": 70}, "finetune": {"max_length": 90}}, "reads 70 tokens"),
        ({"finetune": {"trainable": "last_layers:3"}}, "stage 3, finetune: .*model has 2 layers"),
        ({"finetune": {"data": {"source": "nowhere/at/all.jsonl"}}}, "nowhere/at/all.jsonl"),
    ],
)  # fmt: skip
def test_a_mistake_in_any_stage_ends_the_run_before_the_first_step(
    sections: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_linear_attn.training.run.build_model", lambda *_: pytest.fail("a model was built"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(staged_recipe(tmp_path, **sections))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"from_stage": "uptrain"}, "the stages of this recipe: transfer, distill, finetune"),
        ({"from_stage": "finetune", "until_stage": "transfer"}, "comes after"),
        ({"from_stage": "distill"}, "1-transfer holds no finished stage"),
    ],
)
def test_stages_that_cannot_be_begun(arguments: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(staged_recipe(tmp_path), **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_base_model_has_nothing_to_uptrain(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other")
    base_model("bert", max_position_embeddings=64).save_pretrained(tmp_path / "other")
    recipe = staged_recipe(tmp_path, model={"name": str(tmp_path / "other")}, stages=[{"stage": "uptrain"}])
    with pytest.raises(ValueError, match="no language-model head to uptrain"):
        train(recipe)
