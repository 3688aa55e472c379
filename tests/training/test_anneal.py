"""Schedules of variants: what training makes sparse, wherever it was cut off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_linear_attn import convert_model
from hf_linear_attn.calibration import output_errors, record, variants_by_layer
from hf_linear_attn.training import Anneal, UptrainTrainer
from hf_linear_attn.training.run import train
from hf_linear_attn.variants.entmax import EntmaxAttention
from tests.small_runs import small_tokenizer
from tests.small_stages import arguments, masked_lm, peaked, texts, weights
from tests.tiny import token_batch
from tests.training.test_run import staged_recipe


def converted(**options: Any) -> Any:
    return convert_model(peaked(masked_lm()), "entmax", **options)


def uptrainer(model: Any, folder: Path, callbacks: Any = (), **changes: Any) -> UptrainTrainer:
    args = arguments(folder, **changes)
    return UptrainTrainer(
        model, args, train_dataset=texts(), processing_class=small_tokenizer(), max_length=24, callbacks=[*callbacks]
    )


def lambdas(model: Any) -> list[torch.Tensor]:
    return [variant.mixing.detach().clone() for variant in variants_by_layer(model).values()]


@torch.no_grad()
def zero_shares(model: Any) -> list[float]:
    """Share of weights that are 0 in each layer: with the identity as values, outputs are the weights."""
    shares = []
    for layer, recording in record(model, [token_batch()]).items():
        (inputs,) = recording.inputs
        length = inputs.key.shape[2]
        inputs = replace(inputs, value=torch.eye(length).expand(*inputs.key.shape[:2], -1, -1))
        shares.append((variants_by_layer(model)[layer](inputs)[0] == 0).float().mean().item())
    return shares


@pytest.mark.parametrize("alpha", ["entmax15", "learned"])
def test_training_makes_weights_zero(alpha: str, tmp_path: Path) -> None:
    model = converted(alpha=alpha)
    before = zero_shares(model)
    uptrainer(model, tmp_path).train()
    after = zero_shares(model)
    recordings = record(model, [token_batch()])
    told = [output_errors(variant, recordings[layer]).zeros for layer, variant in variants_by_layer(model).items()]
    assert told == pytest.approx(after)
    assert all(share == 0 for share in before)
    assert all(share > 0.3 for share in after)
    assert all((x == 1).all() for x in lambdas(model))


def test_without_a_schedule_the_loss_alone_decides(tmp_path: Path) -> None:
    model = converted(trained_lambda=None)
    uptrainer(model, tmp_path).train()
    assert any(x.any() for x in lambdas(model))
    assert all((x < 1).all() for x in lambdas(model))


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.least: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.least.append(min(x.min().item() for x in lambdas(model)))


def test_the_floor_rises_with_the_steps_in_any_trainer(tmp_path: Path) -> None:
    rows = [{name: x[0] for name, x in token_batch(1).items()} for _ in range(24)]
    model, watch = converted(trained_lambda=0.8), Watch()
    for row in rows:
        row["labels"] = row["input_ids"]
    args = arguments(tmp_path, max_steps=5, learning_rate=1e-9)
    Trainer(model, args, train_dataset=rows, callbacks=[Anneal(until=0.8), watch]).train()
    assert watch.least == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=1e-6)


def test_a_resumed_run_goes_on_with_the_schedule(tmp_path: Path) -> None:
    whole = uptrainer(converted(), tmp_path / "whole", max_steps=8)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_save = control.should_training_stop = state.global_step == 2
            return control

    folder = tmp_path / "cut"
    uptrainer(converted(), folder, [Stop()], max_steps=8).train()
    watch = Watch()
    again = uptrainer(converted(), folder, [watch], max_steps=8)
    again.train(resume_from_checkpoint=True)
    assert watch.least[0] >= 0.5  # two of the four steps after which lambda is 1
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(again.model)[name]), name


def test_what_is_frozen_stays() -> None:
    model = converted()
    for variant in variants_by_layer(model).values():
        variant.requires_grad_(False).anneal(1.0)
    assert not any(x.any() for x in lambdas(model))


@pytest.mark.parametrize("until", [0, 1.5, True, "half"])
def test_a_share_out_of_range_is_named(until: Any) -> None:
    with pytest.raises(ValueError, match=r"until=.*; allowed: a number above 0 and at most 1"):
        Anneal(until=until)


def watch_shares(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """What the first layer is told after each step, and its least lambda then."""
    told: list[tuple[float, float]] = []
    anneal = EntmaxAttention.anneal

    def watched(self: EntmaxAttention, share: float) -> None:
        anneal(self, share)
        if self.context.layer_idx == 0:
            told.append((share, self.mixing.min().item()))

    monkeypatch.setattr(EntmaxAttention, "anneal", watched)
    return told


def test_the_stages_of_a_recipe_share_one_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage has made sparse is not made dense again by the next."""
    told = watch_shares(monkeypatch)
    conversion = {"variant": "entmax", "calibration_documents": 1}
    recipe = staged_recipe(tmp_path, conversion=conversion, training={"learning_rate": 2e-2})
    result = train(recipe)
    assert [stage.stage for stage in result.stages] == ["transfer", "distill", "finetune"]
    shares = [share for share, _ in told]
    assert shares == pytest.approx([min(1, step / 6) for step in range(1, 13)])  # half of three stages of four steps
    model = AutoModelForSequenceClassification.from_pretrained(result.output_dir)
    assert all((x == 1).all() for x in lambdas(model))
    assert all(least >= share - 1e-6 for share, least in told)


def test_a_stage_that_begins_later_takes_its_part_of_the_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = {"variant": "entmax", "calibration_documents": 1}
    recipe = staged_recipe(tmp_path, conversion=conversion)
    train(recipe, until_stage="transfer")
    told = watch_shares(monkeypatch)
    train(recipe, from_stage="distill", until_stage="distill")
    assert [share for share, _ in told] == pytest.approx([5 / 6, 1, 1, 1])


@pytest.mark.parametrize("part", [(0.5, 0.5), (-0.1, 1), (0, 1.5), (0.6, 0.4), (True, 1), ("0", 1)])
def test_a_part_out_of_range_is_named(part: Any) -> None:
    with pytest.raises(ValueError, match=r"part=.*; allowed: two numbers from 0 to 1, the first below the second"):
        Anneal(part=part)
