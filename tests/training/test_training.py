"""The training loop: equal trajectories across settings that should not matter, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_linear_attn  # noqa: F401 - registers the converted model types with Auto classes
from hf_linear_attn.training.batching import LengthGroupedBatches
from hf_linear_attn.training.trainer import train
from tests.small_runs import save_checkpoint, small_recipe

NO_DROPOUT = {"kwargs": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
LINEAR = {"variant": "linear"}


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
        tmp_path, conversion=LINEAR, training={"epochs": 12, "learning_rate": 5e-3, "max_length": 128, "eval_every": 5}
    )
    result = train(recipe)
    assert result.metrics["accuracy"] >= 0.75
    assert result.losses[-1] < result.losses[0]
    assert [entry["epoch"] for entry in result.evaluations] == [5, 10]
    assert result.documents_seen == 12 * 16
    model = AutoModelForSequenceClassification.from_pretrained(recipe.training.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(recipe.training.output_dir)
    assert model.config.model_type == "linear_attn_bert"
    assert tokenizer.model_max_length == 128
    texts = [path.read_text() for path in sorted((tmp_path / "documents" / "test").rglob("*.txt"))]
    batch = tokenizer(texts, truncation=True, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert batch["input_ids"].shape[1] > 64  # reads past the checkpoint's own limit
    with torch.no_grad():
        assert model.eval()(**batch).logits.argmax(-1).tolist() == result.predictions
    written = json.loads((Path(recipe.training.output_dir) / "train_result.json").read_text())
    assert written == result.to_dict()


@pytest.mark.parametrize("save_at", [2, 4, 6])  # in the middle of an epoch, at its end, in the next one
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, save_at: int) -> None:
    # dropout stays on: the random generators must come back too
    recipe = small_recipe(tmp_path, conversion=LINEAR, training={"epochs": 2, "batch_size": 4})
    whole = train(recipe.replace(training={"save_every": save_at}))
    assert whole.steps == 8
    state = Path(whole.output_dir) / "checkpoints" / f"step_{save_at}"
    resumed = train(recipe.replace(training={"resume_from": str(state), "output_dir": str(tmp_path / "resumed")}))
    assert resumed.steps_run == whole.steps - save_at
    assert_same(weights(whole.output_dir), weights(resumed.output_dir))
    assert resumed.metrics == whole.metrics


def test_resume_with_accumulation_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, training={"epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 2})
    whole = train(recipe.replace(training={"save_every": 3}))
    state = Path(whole.output_dir) / "checkpoints" / "step_3"
    resumed = train(recipe.replace(training={"resume_from": str(state), "output_dir": str(tmp_path / "resumed")}))
    assert_same(weights(whole.output_dir), weights(resumed.output_dir))


def test_resume_refuses_another_length_of_run_and_a_folder_without_a_state(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, training={"save_every": 2})
    train(recipe)
    state = str(tmp_path / "run" / "checkpoints" / "step_2")
    with pytest.raises(ValueError, match="4 steps and this recipe 8"):
        train(recipe.replace(training={"resume_from": state, "epochs": 2}))
    with pytest.raises(FileNotFoundError, match=r"place\.json"):
        train(recipe.replace(training={"resume_from": str(tmp_path)}))


def test_accumulated_gradients_equal_one_large_batch(tmp_path: Path) -> None:
    # documents of one length each: sorting by length then cuts the same batches whatever their size
    recipe = small_recipe(tmp_path, model=NO_DROPOUT, training={"max_steps": 1, "scheduler": "constant"})
    large = train(recipe.replace(training={"batch_size": 16, "output_dir": str(tmp_path / "large")}))
    parts = {"batch_size": 4, "gradient_accumulation_steps": 4, "output_dir": str(tmp_path / "parts")}
    small = train(recipe.replace(training=parts))
    assert (large.documents_seen, small.documents_seen) == (16, 16)
    # AdamW's first step is the sign of the gradient, so rounding shows only where a gradient is nearly zero
    one, other = weights(large.output_dir), weights(small.output_dir)
    moved = torch.cat([(one[name] - other[name]).flatten().abs() for name in one])
    assert (moved < 1e-6).float().mean() > 0.99
    assert moved.max() <= 2.1e-3  # no parameter moved further than two opposite steps


@pytest.mark.parametrize("variant", [None, "linear", "longformer"])
def test_cached_frozen_layers_change_nothing(tmp_path: Path, variant: str | None) -> None:
    conversion = None if variant is None else {"variant": variant}
    recipe = small_recipe(
        tmp_path, conversion=conversion, training={"epochs": 3, "trainable": "last_layers:1", "max_length": 96}
    )
    # dropout is on in the layer that trains
    plain = train(recipe.replace(training={"output_dir": str(tmp_path / "plain")}))
    cached = train(recipe.replace(training={"output_dir": str(tmp_path / "cached"), "cache_frozen_layers": True}))
    assert_same(weights(plain.output_dir), weights(cached.output_dir), rtol=1e-3, atol=1e-4)
    assert plain.losses == pytest.approx(cached.losses, rel=1e-3)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, conversion=LINEAR, training={"max_steps": 3})
    plain = train(recipe.replace(training={"output_dir": str(tmp_path / "plain")}))
    recomputed = train(recipe.replace(training={"output_dir": str(tmp_path / "again"), "gradient_checkpointing": True}))
    assert plain.losses == pytest.approx(recomputed.losses, rel=1e-4)
    both = {"trainable": "last_layers:1", "cache_frozen_layers": True, "max_steps": 3}
    cached = train(recipe.replace(training={**both, "output_dir": str(tmp_path / "c")}))
    cached_again = train(
        recipe.replace(training={**both, "output_dir": str(tmp_path / "d"), "gradient_checkpointing": True})
    )
    assert cached.losses == pytest.approx(cached_again.losses, rel=1e-4)


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
    recipe = small_recipe(tmp_path, conversion={"variant": "linformer", "options": {"k": 4}})
    before = weights(
        train(recipe.replace(training={"output_dir": str(tmp_path / "still"), "learning_rate": 0.0})).output_dir
    )
    result = train(recipe.replace(training={"trainable": trainable, "weight_decay": 0.0}))
    after = weights(result.output_dir)
    assert before.keys() == after.keys()  # adapters are merged: the checkpoint has no trace of them
    added = [name for name in before if ".linear_attn." in name]
    assert added
    assert any(not torch.equal(before[name], after[name]) for name in added) == (
        trainable in ("all", "new", "lora", "last_layers:1")
    )
    for name in moved:
        assert not torch.equal(before[name], after[name]), name
    for name in kept:
        assert torch.equal(before[name], after[name]), name
    assert 0 < result.parameters_trained <= result.parameters_total
    assert "head" in result.trained or trainable == "all"


def test_bf16_runs_and_tensorboard_files_appear(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, training={"max_steps": 2, "mixed_precision": "bf16", "tracker": "tensorboard"})
    result = train(recipe)
    assert all(value == value for value in result.losses)
    assert list((Path(result.output_dir) / "logs").rglob("events.out.tfevents*"))
    assert train(recipe.replace(training={"mixed_precision": "no", "tracker": None})).steps == 2  # and back


def test_roberta_offset_and_softmax_extension(tmp_path: Path) -> None:
    from transformers import RobertaForSequenceClassification

    from tests.tiny import tiny_config

    recipe = small_recipe(tmp_path)
    config = tiny_config("roberta", max_position_embeddings=66, pad_token_id=1)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "checkpoint")
    assert train(recipe.replace(training={"max_length": None})).max_length == 64
    assert train(recipe.replace(training={"max_length": 100})).max_length == 100
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["max_position_embeddings"] == 102


def test_more_layers_than_there_are_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model has 2 layers"):
        train(small_recipe(tmp_path, training={"trainable": "last_layers:3"}))


def test_cache_of_other_weights_is_refused(tmp_path: Path) -> None:
    from hf_linear_attn.training.prefix import FrozenPrefix

    prefix = FrozenPrefix()
    cached = {"trainable": "last_layers:1", "cache_frozen_layers": True}
    recipe = small_recipe(tmp_path, training=cached)
    train(recipe, prefix=prefix)
    assert len(prefix) == 24  # every document, once
    train(recipe, prefix=prefix)
    save_checkpoint(tmp_path / "checkpoint", initializer_range=0.5)
    with pytest.raises(ValueError, match="other weights"):
        train(recipe, prefix=prefix)


def test_batches_are_alike_in_length_complete_and_the_same_for_every_system() -> None:
    lengths = [100 * (index % 7) + index for index in range(43)]
    sampler = LengthGroupedBatches(lengths, 4, seed=1)
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(43))
    assert len(batches) == len(sampler) == 11
    assert [len(batch) for batch in batches] == [4] * 10 + [3]
    assert batches == list(LengthGroupedBatches(lengths, 4, seed=1))
    sampler.start_epoch(1)
    assert list(sampler) != batches

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
        training={"max_steps": 1, "scheduler": "constant", "batch_size": 8},
    )
    done = run_two_processes(tmp_path, recipe, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "train_result.json").read_text())
    assert result["num_processes"] == 2
    assert result["documents_seen"] == 16
    assert len(result["predictions"]) == 8
    one = train(recipe.replace(training={"batch_size": 16, "output_dir": str(tmp_path / "one")}))
    assert (one.num_processes, one.documents_seen) == (1, 16)
    assert one.predictions == result["predictions"]
    ours, theirs = weights(one.output_dir), weights(tmp_path / "run")
    moved = torch.cat([(ours[name] - theirs[name]).flatten().abs() for name in ours])
    assert (moved < 1e-6).float().mean() > 0.99


@pytest.mark.slow
def test_processes_that_do_not_find_each_other_are_an_error(tmp_path: Path) -> None:
    done = run_two_processes(tmp_path, small_recipe(tmp_path), ACCELERATE_USE_CPU="false")
    assert done.returncode != 0
    assert "2 processes were launched, and Accelerate sees 1" in done.stderr
