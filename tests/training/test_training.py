"""Runs of a recipe: equal trajectories across settings that should not matter, and what they leave behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_linear_attn  # noqa: F401 - registers the converted model types with Auto classes
from hf_linear_attn.training.batching import LengthGroupedSampler
from hf_linear_attn.training.run import train
from tests.small_runs import save_checkpoint, small_recipe

NO_DROPOUT = {"kwargs": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
LINEAR = {"variant": "linear", "calibration_documents": 2}


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if tolerance:
            torch.testing.assert_close(tensor, second[name], **tolerance, msg=name)
        else:
            assert torch.equal(tensor, second[name]), name


def test_training_learns_and_leaves_a_model_that_reloads(tmp_path: Path) -> None:
    recipe = small_recipe(
        tmp_path,
        conversion=LINEAR,
        training={"num_train_epochs": 12, "learning_rate": 5e-3, "eval_strategy": "epoch"},
        finetune={"max_length": 128},
    )
    result = train(recipe)
    assert result.metrics["accuracy"] >= 0.75
    losses = [loss for _, loss in result.last.losses]
    assert losses[-1] < losses[0]
    assert result.last.documents_seen == 12 * 16
    model = AutoModelForSequenceClassification.from_pretrained(recipe.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(recipe.output_dir)
    assert model.config.model_type == "linear_attn_bert"
    assert tokenizer.model_max_length == 128
    texts = [path.read_text() for path in sorted((tmp_path / "documents" / "test").rglob("*.txt"))]
    batch = tokenizer(texts, truncation=True, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert batch["input_ids"].shape[1] > 64  # reads past the checkpoint's own limit
    with torch.no_grad():
        assert model.eval()(**batch).logits.argmax(-1).tolist() == result.predictions
    assert result.references == [0] * 4 + [1] * 4
    written = json.loads((recipe.output_dir / "train_result.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict()))
    assert result.last.tokens_seen == 12 * sum(
        min(len(tokenizer(path.read_text())["input_ids"]), 128)
        for path in (tmp_path / "documents" / "train").rglob("*.txt")
    )


@pytest.mark.parametrize("save_at", [2, 4, 6])  # in the middle of an epoch, at its end, in the next one
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, save_at: int) -> None:
    # dropout stays on: the random generators must come back too
    saves = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": save_at}
    recipe = small_recipe(tmp_path, conversion=LINEAR, training=saves)
    whole = train(recipe)
    assert whole.last.steps == 8
    expected = weights(whole.output_dir)
    for path in recipe.output_dir.glob("checkpoint-*"):
        if path.name != f"checkpoint-{save_at}":
            shutil.rmtree(path)
    for name in ("model.safetensors", "config.json", "train_result.json"):
        (recipe.output_dir / name).unlink()
    resumed = train(recipe, resume=True)
    assert_same(expected, weights(resumed.output_dir))
    assert resumed.metrics["accuracy"] == whole.metrics["accuracy"]
    assert resumed.predictions == whole.predictions


def test_a_resume_under_other_settings_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, training={"save_strategy": "steps", "save_steps": 2})
    train(recipe)
    with pytest.raises(ValueError, match=r"num_train_epochs=1.0 there and 2.0 here"):
        train(recipe.replace(training={"num_train_epochs": 2}), resume=True)
    with pytest.raises(ValueError, match=r"max_length=64 there and 32 here"):
        train(recipe.replace(finetune={"max_length": 32}), resume=True)


def test_accumulated_gradients_equal_one_large_batch(tmp_path: Path) -> None:
    # documents of one length each: sorting by length then cuts the same batches whatever their size
    recipe = small_recipe(tmp_path, model=NO_DROPOUT, training={"max_steps": 1, "lr_scheduler_type": "constant"})
    large = train(recipe.replace(training={"per_device_train_batch_size": 16, "output_dir": str(tmp_path / "large")}))
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "output_dir": str(tmp_path / "parts")}
    small = train(recipe.replace(training=parts))
    assert (large.last.documents_seen, small.last.documents_seen) == (16, 16)
    # AdamW's first step is the sign of the gradient, so rounding shows only where a gradient is nearly zero
    one, other = weights(large.output_dir), weights(small.output_dir)
    moved = torch.cat([(one[name] - other[name]).flatten().abs() for name in one])
    assert (moved < 1e-6).float().mean() > 0.99
    assert moved.max() <= 2.1e-3  # no parameter moved further than two opposite steps


@pytest.mark.parametrize("variant", [None, "linear", "longformer"])
def test_cached_frozen_layers_change_nothing(tmp_path: Path, variant: str | None) -> None:
    conversion = None if variant is None else {"variant": variant, "calibration_documents": 0}
    recipe = small_recipe(
        tmp_path,
        conversion=conversion,
        training={"num_train_epochs": 3},
        finetune={"trainable": "last_layers:1", "max_length": 96},
    )
    # dropout is on in the layer that trains
    plain = train(recipe.replace(training={"output_dir": str(tmp_path / "plain")}))
    cached = train(
        recipe.replace(training={"output_dir": str(tmp_path / "cached")}, finetune={"cache_frozen_layers": True})
    )
    assert_same(weights(plain.output_dir), weights(cached.output_dir), rtol=1e-3, atol=1e-4)
    assert [x for _, x in plain.last.losses] == pytest.approx([x for _, x in cached.last.losses], rel=1e-3)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, conversion=LINEAR, training={"max_steps": 3})

    def losses(name: str, checkpointing: bool, **finetune: Any) -> list[float]:
        training = {"output_dir": str(tmp_path / name), "gradient_checkpointing": checkpointing}
        return [x for _, x in train(recipe.replace(training=training, finetune=finetune)).last.losses]

    assert losses("plain", False) == pytest.approx(losses("again", True), rel=1e-4)
    both = {"trainable": "last_layers:1", "cache_frozen_layers": True}
    assert losses("c", False, **both) == pytest.approx(losses("d", True, **both), rel=1e-4)


@pytest.mark.parametrize(
    ("trainable", "moved", "kept"),
    [
        ("head", ["classifier.weight", "bert.pooler.dense.weight"], ["bert.encoder.layer.1.output.dense.weight"]),
        (
            "last_layers:1",
            ["classifier.weight", "bert.encoder.layer.1.output.dense.weight"],
            ["bert.encoder.layer.0.output.dense.weight", "bert.embeddings.word_embeddings.weight"],
        ),
        ("all", ["bert.encoder.layer.0.output.dense.weight", "bert.embeddings.word_embeddings.weight"], []),
        (
            "lora",
            ["classifier.weight", "bert.encoder.layer.0.attention.self.query.weight"],  # merged into it
            ["bert.encoder.layer.0.output.dense.weight"],
        ),
        ("new", ["classifier.weight"], ["bert.encoder.layer.1.output.dense.weight"]),
    ],
)
def test_only_the_named_part_trains(tmp_path: Path, trainable: str, moved: list[str], kept: list[str]) -> None:
    conversion = {"variant": "linformer", "options": {"k": 4}, "calibration_documents": 0}
    recipe = small_recipe(tmp_path, conversion=conversion)
    still = {"output_dir": str(tmp_path / "still"), "learning_rate": 1e-30}
    before = weights(train(recipe.replace(training=still)).output_dir)
    result = train(recipe.replace(finetune={"trainable": trainable}))
    after = weights(result.output_dir)
    assert before.keys() == after.keys()  # adapters are merged: the checkpoint has no trace of them
    added = [name for name in before if ".linear_attn." in name]
    assert added
    assert any((before[name] - after[name]).abs().max() > 1e-20 for name in added) == (
        trainable in ("all", "new", "lora", "last_layers:1")
    )
    for name in moved:
        assert not torch.equal(before[name], after[name]), name
    for name in kept:
        assert (before[name] - after[name]).abs().max() < 1e-20, name
    assert 0 < result.last.parameters_trained <= result.parameters_total + 10_000  # adapters
    assert "head" in result.last.trained or trainable == "all"


def test_bf16_runs_and_tensorboard_files_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    recipe = small_recipe(tmp_path, training={"max_steps": 2, "bf16": True, "report_to": "tensorboard"})
    result = train(recipe)
    assert all(loss == loss for _, loss in result.last.losses)
    assert list(tmp_path.rglob("events.out.tfevents*"))
    assert train(recipe.replace(training={"bf16": False, "report_to": "none"})).last.steps == 2  # and back


def test_roberta_offset_and_softmax_extension(tmp_path: Path) -> None:
    from transformers import RobertaForSequenceClassification

    from tests.tiny import tiny_config

    recipe = small_recipe(tmp_path)
    config = tiny_config("roberta", max_position_embeddings=66, pad_token_id=1)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "checkpoint")
    assert train(recipe.replace(finetune={"max_length": None})).last.max_length == 64
    assert train(recipe.replace(finetune={"max_length": 100})).last.max_length == 100
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["max_position_embeddings"] == 102


def test_more_layers_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model has 2 layers"):
        train(small_recipe(tmp_path, finetune={"trainable": "last_layers:3"}))


def test_cache_of_other_weights_is_refused(tmp_path: Path) -> None:
    from hf_linear_attn.training.prefix import FrozenPrefix

    prefix = FrozenPrefix()
    recipe = small_recipe(tmp_path, finetune={"trainable": "last_layers:1", "cache_frozen_layers": True})
    train(recipe, prefix=prefix)
    assert len(prefix) == 24  # every document, once
    train(recipe, prefix=prefix)
    save_checkpoint(tmp_path / "checkpoint", initializer_range=0.5)
    with pytest.raises(ValueError, match="other weights"):
        train(recipe, prefix=prefix)


def test_batches_are_alike_in_length_complete_and_the_same_for_every_system() -> None:
    lengths = [100 * (index % 7) + index for index in range(43)]
    sampler = LengthGroupedSampler(lengths, 4, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(43))
    assert len(sampler) == 43
    assert order == list(LengthGroupedSampler(lengths, 4, seed=1))
    sampler.set_epoch(1)
    assert list(sampler) != order
    batches = [order[start : start + 4] for start in range(0, 43, 4)]

    def padding(groups: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in group) - lengths[j] for group in groups for j in group)

    unsorted = [list(range(start, min(start + 4, 43))) for start in range(0, 43, 4)]
    assert padding(batches) < 0.5 * padding(unsorted)


def run_two_processes(tmp_path: Path, recipe: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return subprocess.run(
        [*command, "-m", "hf_linear_attn", "train", str(path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    recipe = small_recipe(
        tmp_path,
        model=NO_DROPOUT,
        conversion=LINEAR,
        training={"max_steps": 1, "lr_scheduler_type": "constant", "per_device_train_batch_size": 8},
    )
    done = run_two_processes(tmp_path, recipe, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "train_result.json").read_text())
    assert result["num_processes"] == 2
    assert result["stages"][-1]["documents_seen"] == 16
    assert len(result["predictions"]) == 8
    single = {"per_device_train_batch_size": 16, "output_dir": str(tmp_path / "one")}
    one = train(recipe.replace(training=single))
    assert (one.num_processes, one.last.documents_seen) == (1, 16)
    assert one.predictions == result["predictions"]
    assert one.last.losses[0][1] == pytest.approx(result["stages"][-1]["losses"][0][1], abs=1e-4)
    ours, theirs = weights(one.output_dir), weights(tmp_path / "run")
    moved = torch.cat([(ours[name] - theirs[name]).flatten().abs() for name in ours])
    assert (moved < 1e-6).float().mean() > 0.99


@pytest.mark.slow
def test_processes_that_do_not_find_each_other_are_an_error(tmp_path: Path) -> None:
    done = run_two_processes(tmp_path, small_recipe(tmp_path), ACCELERATE_USE_CPU="false")
    assert done.returncode != 0
    assert "2 processes were launched, and Accelerate sees 1" in done.stderr
