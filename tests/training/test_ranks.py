"""Two ranks over gloo: under DDP a stage loses what one process does with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_linear_attn  # noqa: F401 - registers the converted model types with Auto classes
from hf_linear_attn.training.recipe import Recipe
from hf_linear_attn.training.run import train
from tests.small_runs import FILLER
from tests.tiny import without_dropout
from tests.training.test_run import staged_recipe

ROOT = Path(__file__).parents[2]
SHARDED = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": False,
}


def recipe_for(kind: str, folder: Path) -> Recipe:
    """One stage of four steps; texts of one length, so that the mean of two means is the mean of all."""
    family = "bert" if kind == "finetune" else "gpt2"
    recipe = staged_recipe(
        folder,
        family,
        model={"kwargs": without_dropout(family)},
        stages=[{"stage": kind, "max_length": 24}],
        training={"save_strategy": "no", "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"},
    )
    for number, path in enumerate(sorted((folder / "documents").rglob("*.txt"))):
        path.write_text(" ".join(FILLER[(number * 7 + place * (number + 1)) % len(FILLER)] for place in range(22)))
    return recipe


def on_two_ranks(
    folder: Path, recipe: Recipe, sharded: bool, command: str = "train", **changes: Any
) -> subprocess.CompletedProcess[str]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launch += ["--rdzv_endpoint", "localhost:0"]
    if sharded:
        config = {
            "distributed_type": "FSDP",
            "num_processes": 2,
            "use_cpu": True,
            "fsdp_config": {**SHARDED, **changes},
        }
        (folder / "accelerate.yaml").write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", **config}))
        launch = ["accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
        launch += ["--main_process_port", "0"]
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *launch, "-m", "hf_linear_attn", command, str(folder / "recipe.yaml")],
        cwd=ROOT,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=120,
    )


def errors(done: subprocess.CompletedProcess[str]) -> set[str]:
    assert done.returncode != 0
    return {line for line in done.stderr.splitlines() if line.startswith("Error: ")}


@pytest.mark.parametrize(
    "kind", ["finetune", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("transfer", "distill", "uptrain"))]
)
def test_two_ranks_lose_what_one_process_does_with_twice_the_batch(kind: str, tmp_path: Path) -> None:
    recipe = recipe_for(kind, tmp_path)
    done = on_two_ranks(tmp_path, recipe, sharded=False)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "run" / "train_result.json").read_text())
    assert two["num_processes"] == 2
    one = train(recipe.replace(training={"per_device_train_batch_size": 4, "output_dir": str(tmp_path / "one")}))
    assert len(one.last.losses) == 4
    assert [loss for _, loss in two["stages"][0]["losses"]] == pytest.approx(
        [loss for _, loss in one.last.losses], abs=1e-4
    )
    assert two["metrics"]["loss"] == pytest.approx(one.metrics["loss"], abs=1e-3)
    assert two["predictions"] == one.predictions
    assert two["parameters_total"] == one.parameters_total
    auto = AutoModelForSequenceClassification if kind == "finetune" else AutoModelForCausalLM
    auto.from_pretrained(tmp_path / "run")


@pytest.mark.slow
def test_two_ranks_compare_language_models_and_write_each_row_once(tmp_path: Path) -> None:
    evaluation = {"lengths": [8], "variants": ["linear"], "forward_lengths": []}
    recipe = recipe_for("uptrain", tmp_path)
    recipe = recipe.replace(conversion={"variant": "linear"}, training={"max_steps": 1}, evaluation=evaluation)
    done = on_two_ranks(tmp_path, recipe, sharded=False, command="compare")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "language.rows.jsonl").read_text().splitlines()[1:]
    rows = [(row["system"], row["stage"]) for row in map(json.loads, lines)]
    assert rows == [
        ("softmax", "checkpoint"),
        ("softmax, same tokens", "uptrain"),
        ("linear", "converted"),
        ("linear", "uptrain"),
    ]
    assert not any("failure" in line for line in lines)
    assert done.stdout.count("linear, uptrain, 8 tokens: perplexity") == 1


@pytest.mark.slow
def test_sharding_that_would_not_happen_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (said,) = errors(on_two_ranks(tmp_path, recipe_for("distill", tmp_path), sharded=True))
    assert "Accelerate does not shard on CPUs" in said


@pytest.mark.slow
def test_weights_in_one_process_alone_cannot_be_converted(tmp_path: Path) -> None:
    recipe = recipe_for("distill", tmp_path)
    (said,) = errors(on_two_ranks(tmp_path, recipe, sharded=True, fsdp_cpu_ram_efficient_loading=True))
    assert "set fsdp_cpu_ram_efficient_loading: false" in said
