"""Recipes reject what they do not know, and every recipe in the repository is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hf_linear_attn.registry import get_variant
from hf_linear_attn.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "minilm").glob("*.yaml"))
MINIMAL = {"model": {"name": "minilm"}, "data": {}, "training": {"epochs": 1}}


def changed(section: str, **values: object) -> dict:
    return {**MINIMAL, section: {**MINIMAL.get(section, {}), **values}}


def test_unknown_key_raises_with_the_allowed_ones(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed("training", learningrate=1e-3)))
    with pytest.raises(ValueError, match=r"learningrate.*recipe\.training.*Allowed:.*learning_rate"):
        Recipe.from_yaml(path)


def test_unknown_section_and_nested_key_raise() -> None:
    with pytest.raises(ValueError, match=r"trainer.*Allowed: model, data, training"):
        Recipe.from_dict({**MINIMAL, "trainer": {}})
    with pytest.raises(ValueError, match=r"rank.*recipe\.training\.lora.*Allowed: r, alpha"):
        Recipe.from_dict(changed("training", lora={"rank": 4}))


def test_missing_key_is_named() -> None:
    with pytest.raises(ValueError, match=r"Missing.*name.*recipe\.model"):
        Recipe.from_dict({**MINIMAL, "model": {}})


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("training", {"max_steps": 3}, "epochs or training.max_steps"),
        ("training", {"trainable": "last_layer"}, "last_layers:<k>"),
        ("training", {"trainable": "last_layers:0"}, "last_layers:<k>"),
        ("training", {"mixed_precision": "fp8"}, "'bf16', 'fp16', 'auto'"),
        ("training", {"scheduler": "step"}, "cosine"),
        ("training", {"task": "translation"}, "sequence_classification"),
        ("training", {"batch_size": 0}, "batch_size must be positive"),
        ("training", {"batch_size": "four"}, "must be int"),
        ("training", {"gradient_checkpointing": "yes please"}, "must be bool"),
        ("training", {"learning_rate": "fast"}, "must be a number"),
        ("training", {"cache_frozen_layers": True}, "cache_frozen_layers needs"),
        ("training", {"tracker": "wandb"}, "tensorboard"),
        ("data", {"folds": 1}, "folds"),
        ("conversion", {"variant": "linear", "extend": "repeat"}, "interpolate"),
    ],
)
def test_bad_values_say_what_is_allowed(section: str, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(changed(section, **values))


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: minilm}\ndata: {}\ntraining: {epochs: 1, learning_rate: 3e-5}\n")
    assert Recipe.from_yaml(path).training.learning_rate == 3e-5


def test_recipe_survives_its_own_dictionary_and_replace_changes_one_key() -> None:
    recipe = Recipe.from_dict(changed("conversion", variant="longformer", options={"window_size": 8}))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    other = recipe.replace(training={"seed": 3})
    assert (other.training.seed, other.conversion) == (3, recipe.conversion)
    assert recipe.replace(conversion=None).conversion is None


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_repository_recipes_load_and_open_with_their_command(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    first = path.read_text().splitlines()[0]
    assert first.startswith("# hf-linear-attn ")
    assert f"recipes/minilm/{path.name}" in first or first == "# hf-linear-attn demo"
    for entry in recipe.evaluation.variants:
        key, options = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        get_variant(key).config_class.from_dict(options)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.name)
def test_accelerate_configs_are_read_by_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert path.read_text().splitlines()[0].count(f"recipes/accelerate_configs/{path.name}") == 1
