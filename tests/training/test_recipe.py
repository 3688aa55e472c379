"""Recipes reject what they do not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hf_linear_attn.training.arguments import training_arguments
from hf_linear_attn.training.parts import Lora
from hf_linear_attn.training.recipe import ConversionRecipe, DataRecipe, Recipe

MINIMAL = {"model": {"name": "minilm"}, "data": {}, "stages": [{"stage": "finetune"}]}


def changed(section: str, **values: object) -> dict:
    return {**MINIMAL, section: {**MINIMAL.get(section, {}), **values}}


def staged(kind: str, **values: object) -> dict:
    conversion = {"conversion": {"variant": "hedgehog"}}
    return {**MINIMAL, **conversion, "stages": [{"stage": kind, **values}]}


def test_unknown_key_raises_with_the_nearest_ones(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed("training", learningrate=1e-3)))
    with pytest.raises(ValueError, match=r"'learningrate' in recipe\.training.*Did you mean learning_rate"):
        Recipe.from_yaml(path)
    with pytest.raises(ValueError, match=r"'batch_size' in stages: distill\.training"):
        Recipe.from_dict(staged("distill", training={"batch_size": 4}))


def test_unknown_section_and_nested_key_raise() -> None:
    with pytest.raises(ValueError, match=r"trainer.*Allowed: model, data, stages"):
        Recipe.from_dict({**MINIMAL, "trainer": {}})
    with pytest.raises(ValueError, match=r"rank.*recipe\.stages\[0\]\.lora.*Allowed: r, alpha"):
        Recipe.from_dict(staged("finetune", lora={"rank": 4}))
    with pytest.raises(ValueError, match=r"Unknown key\(s\) \['window'\] in recipe\.stages\[0\]"):
        Recipe.from_dict(staged("transfer", window=4))
    with pytest.raises(
        ValueError, match="stage is one of transfer, distill, contrast, uptrain, finetune, got 'pretrain'"
    ):
        Recipe.from_dict(staged("pretrain"))


def test_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"Missing.*name.*recipe\.model"):
        Recipe.from_dict({**MINIMAL, "model": {}})
    with pytest.raises(ValueError, match=r"Missing.*stages"):
        Recipe.from_dict({"model": {"name": "minilm"}, "data": {}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (staged("finetune", trainable="last_layer"), "last_layers:<k>"),
        (staged("finetune", trainable="last_layers:0"), "last_layers:<k>"),
        (staged("finetune", task="translation"), "finetune.task is one of sequence_classification"),
        (staged("finetune", cache_frozen_layers=True), "cache_frozen_layers needs"),
        (staged("finetune", max_length=0), "finetune.max_length must be a finite number above 0"),
        (staged("finetune", max_length="many"), "max_length must be int"),
        (staged("finetune", head_learning_rate=float("inf")), "head_learning_rate must be a finite number"),
        (staged("finetune", new_learning_rate=-1), "new_learning_rate must be a finite number"),
        (staged("distill", objective="hidden"), "objective is one of logits, states"),
        (staged("distill", temperature="hot"), "temperature must be a number"),
        (staged("uptrain", packing="yes please"), "packing must be bool"),
        (changed("training", per_device_train_batch_size="four"), "must be int"),
        (changed("training", gradient_accumulation_steps=True), "must be int"),
        (changed("training", learning_rate="fast"), "must be a number"),
        (changed("training", resume_from_checkpoint="x"), "hf-linear-attn train --resume"),
        (changed("training", do_eval=True), "always evaluated"),
        (changed("data", folds=1), "folds"),
        (changed("data", shuffle_buffer=9), "data.shuffle_buffer shuffles a stream, and needs data.streaming: true"),
        (changed("data", streaming=True, shuffle_buffer=1), "data.shuffle_buffer must be at least 2 documents, got 1"),
        (staged("uptrain", data={"source": "x.csv", "shuffle_buffer": 9}), "needs data.streaming: true"),
        (staged("uptrain", data={"max_train_documents": 9}), r"stages\[0\].data names no source"),
        (staged("distill", lora={"r": 0}), "lora.r must be at least 1, got 0"),
        (staged("distill", lora={"dropout": 1.0}), "lora.dropout must be at least 0 and below 1, got 1.0"),
        (changed("conversion", variant="linear", keep_softmax_by="error"), "keep_softmax_by is one of output, states"),
        (changed("conversion", variant="linear", extend="repeat"), "interpolate"),
        (changed("conversion", variant="linear", layers="some"), "layers is one of auto"),
        (changed("conversion", variant="linear", calibration_documents=0, calibration_steps=3), "needs calibration"),
        ({**MINIMAL, "stages": []}, "at least one stage"),
        ({**MINIMAL, "stages": [{"stage": "finetune"}, {"stage": "uptrain"}]}, "finetune comes last"),
        ({**MINIMAL, "stages": [{"stage": "transfer"}]}, "needs a section conversion"),
        ({**MINIMAL, "evaluation": {"metrics": []}}, "at least one"),
    ],
)
def test_bad_values_say_what_is_allowed(data: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(data)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    stages = "stages: [{stage: finetune, head_learning_rate: 1e-3, training: {weight_decay: 1e-2}}]"
    path.write_text(f"model: {{name: minilm}}\ndata: {{}}\ntraining: {{learning_rate: 3e-5}}\n{stages}\n")
    recipe = Recipe.from_yaml(path)
    assert recipe.stages[0].head_learning_rate == 1e-3
    arguments = training_arguments(recipe.training, recipe.stages[0].training, {"output_dir": str(tmp_path)})
    assert (arguments.learning_rate, arguments.weight_decay) == (3e-5, 1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "got nan"),
        ({"learning_rate": float("inf")}, "got inf"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be"),
        ({"num_train_epochs": -1}, "num_train_epochs must be"),
        ({"max_steps": 0}, "max_steps must be positive"),
        ({"lr_scheduler_type": "step"}, "step"),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        training_arguments(arguments, {"output_dir": str(tmp_path)})


def test_a_stages_own_arguments_win_and_the_length_named_last_decides(tmp_path: Path) -> None:
    where = {"output_dir": str(tmp_path)}
    shared = {"learning_rate": 1e-3, "max_steps": 7, "per_device_train_batch_size": 3}
    found = training_arguments(shared, {"num_train_epochs": 2, "seed": 5}, where)
    assert (found.learning_rate, found.max_steps, found.num_train_epochs, found.seed) == (1e-3, -1, 2, 5)
    assert found.per_device_eval_batch_size == 3
    assert training_arguments(shared, where).max_steps == 7


def test_recipe_survives_its_own_dictionary_and_replace_changes_one_key() -> None:
    recipe = Recipe.from_dict(changed("conversion", variant="longformer", options={"window_size": 8}))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    other = recipe.replace(training={"seed": 3})
    assert (other.seed, other.conversion) == (3, recipe.conversion)
    assert recipe.replace(conversion=None).conversion is None
    staged_one = recipe.replace(finetune={"max_length": 32, "training": {"max_steps": 2}})
    assert (staged_one.max_length, staged_one.stages[0].training) == (32, {"max_steps": 2})
    with pytest.raises(ValueError, match="no stage distill; it has finetune"):
        recipe.replace(distill={"max_length": 3})


def test_one_key_changes_however_deep_it_lies_and_those_beside_it_stay() -> None:
    adapters = {"r": 16, "alpha": 64, "target_modules": ["query"]}
    recipe = Recipe.from_dict(staged("distill", lora=adapters, training={"max_steps": 7, "weight_decay": 0.1}))
    recipe = recipe.replace(stages=[*recipe.to_dict()["stages"], {"stage": "distill", "lora": {"alpha": 32}}])
    both = recipe.replace_at({"distill.lora.r": 4}).stages
    assert both[0].lora == Lora(r=4, alpha=64, target_modules=["query"])
    assert both[1].lora == Lora(r=4, alpha=32)
    assert recipe.replace_at({"distill.lora": {"r": 4}}).stages[0].lora == Lora(r=4)  # a mapping is the whole of it
    assert recipe.replace_at({"distill.lora": None}).stages[0].lora == Lora()
    assert recipe.replace_at({"distill.data.source": "novel"}).stages[1].data == DataRecipe(source="novel")
    longer = recipe.replace_at({"distill.training.num_train_epochs": 2}).stages[0].training
    assert longer == {"num_train_epochs": 2, "weight_decay": 0.1}
    assert recipe.stages[0].lora.r == 16, "the recipe itself stays"


def test_one_key_of_a_section_changes_and_null_takes_a_mapping_away() -> None:
    recipe = Recipe.from_dict(
        {
            **changed("conversion", variant="longformer", options={"window_size": 8, "dilation": 2}),
            "data": {"source": {"train": "a.jsonl", "test": "b.jsonl"}, "fields": {"text": "body"}},
        }
    )
    conversion = recipe.replace_at({"conversion.options.window_size": 16}).conversion
    assert conversion is not None
    assert conversion.options == {"window_size": 16, "dilation": 2}
    assert recipe.replace_at({"data.source.test": "c.jsonl"}).data.source == {"train": "a.jsonl", "test": "c.jsonl"}
    assert recipe.replace_at({"data.fields.label": "stars"}).data.fields == {"text": "body", "label": "stars"}
    assert recipe.replace_at({"data.options.test_split": None}).data.options == {"test_split": None}  # a value there
    assert recipe.replace_at({"data.fields": None}).data.fields is None
    assert recipe.replace_at({"conversion": None}).conversion is None
    other = {"conversion": None, "conversion.variant": "linear"}
    assert recipe.replace_at(other).conversion == ConversionRecipe("linear")
    streamed = {"data.shuffle_buffer": 9, "data.streaming": True}  # together, whichever comes first
    assert recipe.replace_at(streamed).data.shuffle_buffer == 9
    given = {"data.options": {"test_split": "dev"}, "data.options.revision": "v2"}
    assert recipe.replace_at(given).data.options == {"test_split": "dev", "revision": "v2"}
    assert given["data.options"] == {"test_split": "dev"}, "what was given stays"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("distill.lora.rank", 4, r"\['rank'\] in recipe\.stages\[0\]\.lora\. Allowed: r, alpha, dropout, target_mod"),
        ("distill.lroa.r", 4, r"\['lroa'\] in recipe\.stages\[0\]\. Allowed: training, data, max_length"),
        ("distill.lora.r", "four", r"recipe\.stages\[0\]\.lora\.r must be int, got 'four'"),
        ("distill.lora.r.x", 4, r"distill\.lora\.r\.x: r is no mapping but 8"),
        ("distill.training.max_stepz", 4, "Did you mean max_steps"),
        ("conversion.options.windows", 4, "windows"),
        ("data.source.train", "a.jsonl", "source is no mapping but 'auto'"),
        ("stages.0.max_length", 4, "stages is no mapping but"),
        ("finetune.lora.r", 4, "no stage finetune; it has distill"),
        ("distill", None, "distill: name a key of the stage, as in distill.max_length"),
        ("model", None, r"Missing key\(s\) \['model'\]"),
        ("trainer.x", 1, "Allowed: model, data, stages"),
        ("distill..r", 1, r"\[''\] in recipe\.stages\[0\]"),
    ],
)
def test_a_key_that_is_not_there_is_named_with_those_that_are(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(staged("distill")).replace_at({path: value})
