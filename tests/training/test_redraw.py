"""Random features drawn anew while a model trains, wherever it was cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_linear_attn import convert_model
from hf_linear_attn.calibration import variants_by_layer
from hf_linear_attn.training import FinetuneTrainer, Redraw, UptrainTrainer
from hf_linear_attn.training.recipe import Recipe, without_redraws
from hf_linear_attn.training.run import train
from tests.small_runs import small_recipe, small_tokenizer
from tests.small_stages import arguments, language_model, masked_lm, texts, weights
from tests.tiny import token_batch


def converted(variant: str = "performer", family: str = "bert", **options: Any) -> Any:
    return convert_model(language_model(family), variant, **{"num_features": 16, **options})


def directions(model: Any) -> torch.Tensor:
    return next(x for name, x in model.named_buffers() if name.endswith("omega")).clone()


class Watch(TrainerCallback):
    """The directions of each step, and where a run ends before its time."""

    def __init__(self, stop: int | None = None, save: int | None = None) -> None:
        self.seen: list[torch.Tensor] = []
        self.stop, self.save = stop, save

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(directions(model))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save |= state.global_step == self.save
        control.should_training_stop |= state.global_step == self.stop
        return control

    def draws(self) -> list[int]:
        """Which draw each step runs on, counted from 0."""
        unique: list[torch.Tensor] = []
        for x in self.seen:
            if not any(torch.equal(x, y) for y in unique):
                unique.append(x)
        return [next(i for i, y in enumerate(unique) if torch.equal(x, y)) for x in self.seen]


def plain_trainer(folder: Path, *callbacks: TrainerCallback, model: Any = None, **changes: Any) -> Trainer:
    rows = [{name: x[0] for name, x in token_batch(1).items()} for _ in range(24)]
    for row in rows:
        row["labels"] = row["input_ids"]
    model = converted() if model is None else model
    return Trainer(model, arguments(folder, **changes), train_dataset=rows, callbacks=[*callbacks])


def uptrainer(model: Any, folder: Path, *callbacks: TrainerCallback, **changes: Any) -> UptrainTrainer:
    own = {name: changes.pop(name) for name in ("trainable", "redraw_every") if name in changes}
    args = arguments(folder, **changes)
    data = {"train_dataset": texts(), "processing_class": small_tokenizer(), "max_length": 24}
    torch.manual_seed(0)  # of new adapters
    return UptrainTrainer(model, args, **data, callbacks=[*callbacks], **own)


def test_draws_after_every_so_many_steps_but_the_last(tmp_path: Path) -> None:
    watch, model = Watch(), converted()
    before = directions(model)
    plain_trainer(tmp_path, Redraw(every=2), watch, model=model, max_steps=6).train()
    assert watch.draws() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(watch.seen[0], before)
    assert torch.equal(directions(model), watch.seen[-1])


def test_the_seed_decides_the_draws(tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 0, 1):
        watch = Watch()
        plain_trainer(tmp_path, Redraw(every=1, seed=seed), watch, max_steps=4).train()
        drawn.append(watch.seen)
    assert all(torch.equal(x, y) for x, y in zip(drawn[0], drawn[1], strict=True))
    others = [x for run in (0, 2) for x in drawn[run][1:]]
    assert all(not torch.equal(x, y) for i, x in enumerate(others) for y in others[:i])  # two seeds share no draw


@pytest.mark.parametrize("trainable", ["all", "lora"])  # a checkpoint of adapters does not hold the directions
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_killed_run_ends_with_the_same_weights(family: str, trainable: str, tmp_path: Path) -> None:
    given = {"trainable": trainable, "redraw_every": 2, "max_steps": 7}
    whole = uptrainer(converted(family=family), tmp_path / "whole", **given)
    whole.train()
    folder = tmp_path / "cut"
    uptrainer(converted(family=family), folder, Watch(stop=5, save=3), **given).train()
    watch = Watch()
    again = uptrainer(converted(family=family), folder, watch, **given)
    again.train(resume_from_checkpoint=True)
    assert watch.draws() == [0, 1, 1, 2]  # steps 4 to 7
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(again.model)[name]), name


@pytest.mark.parametrize("restore", [False, True])
def test_any_trainer_resumes_with_the_saved_seed(restore: bool, tmp_path: Path) -> None:
    given = {"max_steps": 6, "restore_callback_states_from_checkpoint": restore}
    whole = plain_trainer(tmp_path / "whole", Redraw(every=2, seed=5), **given)
    whole.train()
    folder = tmp_path / "cut"
    plain_trainer(folder, Redraw(every=2, seed=5), Watch(stop=3, save=3), **given).train()
    checkpoint = folder / "checkpoint-3"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["Redraw"]["args"] == {"every": 2, "seed": 5}
    again = plain_trainer(folder, Redraw(every=2, seed=5), **given)
    again.train(resume_from_checkpoint=str(checkpoint))
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(again.model)[name]), name


@pytest.mark.parametrize(("here", "says"), [(Redraw(2, 6), "seed=6"), (Redraw(3, 5), "every=3")])
def test_a_resume_that_would_draw_otherwise_is_refused(here: Redraw, says: str, tmp_path: Path) -> None:
    plain_trainer(tmp_path, Redraw(every=2, seed=5), Watch(stop=3, save=3)).train()
    with pytest.raises(ValueError, match=rf"The checkpoint is of a run with .*'every': 2, 'seed': 5.*{says}"):
        plain_trainer(tmp_path, here).train(resume_from_checkpoint=True)


def test_a_resume_of_a_run_without_draws_is_refused(tmp_path: Path) -> None:
    plain_trainer(tmp_path / "plain", Watch(stop=2, save=2)).train()
    with pytest.raises(ValueError, match="of a run without it"):
        plain_trainer(tmp_path / "plain", Redraw()).train(resume_from_checkpoint=True)
    uptrainer(converted(), tmp_path / "stage", Watch(stop=2, save=2)).train()
    with pytest.raises(ValueError, match="redraw_every=None there and 2 here"):
        uptrainer(converted(), tmp_path / "stage", redraw_every=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("given", "says"),
    [({"every": 0}, "every=0; allowed: an integer from 1"), ({"every": 1.5}, "every=1.5"), ({"seed": -1}, "seed=-1")],
)
def test_bad_settings_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Redraw(**given)


def test_a_model_without_random_features_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for model, says in ((masked_lm(), "was not converted"), (convert_model(masked_lm(), "linear"), "linear")):
        with pytest.raises(ValueError, match=says):
            plain_trainer(tmp_path, Redraw(), model=model).train()
        with pytest.raises(ValueError, match=says):
            uptrainer(model, tmp_path, redraw_every=10)


def test_outputs_of_frozen_layers_are_not_kept_over_a_draw(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, conversion={"variant": "performer"})
    given = {"trainable": "head", "cache_frozen_layers": True}
    with pytest.raises(ValueError, match="cache_frozen_layers keeps outputs of layers"):
        recipe.replace(finetune={**given, "redraw_every": 5})
    rows = [{"input_ids": [2, 4, 3], "attention_mask": [1, 1, 1], "labels": 0}]
    data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": small_tokenizer()}
    with pytest.raises(ValueError, match="cache_frozen_layers keeps outputs of layers"):
        FinetuneTrainer(converted(), arguments(tmp_path), **data, **given, callbacks=[Redraw()])


def test_a_recipe_draws_and_says_where_it_cannot(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, conversion={"variant": "performer", "options": {"num_features": 16}})
    recipe = recipe.replace(finetune={"redraw_every": 2, "max_length": 32}, training={"max_steps": 3})
    result = train(recipe)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(result.output_dir)
    untouched = variants_by_layer(model)[0]
    start = directions(model)
    untouched.redraw(0)
    assert not torch.equal(directions(model), start)
    for conversion in (None, {"variant": "linear"}):
        with pytest.raises(ValueError, match="redraw_every needs a conversion to a method with random features"):
            recipe.replace(conversion=conversion)
        data = {**recipe.to_dict(), "conversion": None if conversion is None else {**conversion, "options": {}}}
        assert Recipe.from_dict(without_redraws(data)).stages[0].redraw_every is None
    with pytest.raises(ValueError, match="redraw_every must be a finite number above 0"):
        recipe.replace(finetune={"redraw_every": 0})
    with pytest.raises(ValueError, match="redraw_every must be int"):
        recipe.replace(finetune={"redraw_every": 0.5})
