"""Retrieval told wrongly: every mistake is one sentence, before anything is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hf_linear_attn.bench.retrieval.recipe import (
    CalibrationRecipe,
    PassagesRecipe,
    RetrievalRecipe,
    SystemRecipe,
)
from hf_linear_attn.bench.retrieval.run import measure_retrieval
from hf_linear_attn.training.recipe import Recipe
from tests.bench.test_retrieval import recipe as recipe
from tests.bench.test_retrieval import silent

ROOT = Path(__file__).parents[2]

WRONG = {
    "": r"Missing key\(s\) \['model', 'systems'\]",
    "model: m\nsystems: []": "recipe.systems must name at least one",
    "model: m\nsystems: [{}]\nlength: [4]": r"Unknown key\(s\) \['length'\] in recipe. Allowed: model",
    "model: m\nsystems: [{variants: linear}]": r"Unknown key\(s\) \['variants'\] in recipe.systems\[0\]",
    "model: m\nsystems: [{variant: lineer}]": "Did you mean 'linear'",
    "model: m\nsystems: [{variant: {linear: {features: 3}}}]": "Unknown option",
    "model: m\nsystems: [{variant: linear, model: x}]": "a variant or a model, not both",
    "model: m\nsystems: [{reads: all}]": "systems.reads has 'all'; allowed: whole, truncated, head_tail, chunks",
    "model: m\nsystems: [{reads: chunks, variant: linear}]": "leave variant away",
    "model: m\nsystems: [{reads: chunks, model: x}, {reads: chunks, model: a/x}]": "given twice: x, chunk and average",
    "model: m\nsystems: [{reads: chunks, model: x, extend: interpolate}]": "head_tail and chunks extend nothing",
    "model: m\nsystems: [{overlap: 8}]": "overlap is of reads: chunks",
    "model: m\nsystems: [{reads: chunks, overlap: -1}]": "systems.overlap must be at least 0, got -1",
    "model: m\nsystems: [{variant: linear, extend: stretch}]": "systems.extend has 'stretch'; allowed: tile, interp",
    "model: m\nsystems: [{reads: truncated, extend: interpolate}]": "extend: interpolate is of a variant",
    "model: m\nsystems: [{variant: longformer, start: published}]": "'longformer, as published' has nothing to calib",
    "model: m\nsystems: [{start: trained}]": "systems.start has 'trained'; allowed: calibrated, published",
    "model: m\nsystems: [{name: ' '}]": "systems.name must not be blank",
    "model: m\nsystems: [{name: 3}]": r"systems\[0\].name must be str, got 3",
    "model: m\nsystems: [{}, {}]": "given twice: softmax, longer table",
    "model: m\nsystems: [{name: checkpoint}]": "given twice: checkpoint",
    "model: m\nsystems: [{}]\nlengths: [512, 512]": "recipe.lengths names a length twice",
    "model: m\nsystems: [{}]\nlengths: [0]": "recipe.lengths must be at least 16 each",
    "model: m\nsystems: [{}]\nlengths: []": "recipe.lengths must name at least one",
    "model: m\nsystems: [{}]\nlengths: 4096": "recipe.lengths must be a list",
    "model: m\nsystems: [{}]\nminutes: 0": "recipe.minutes must be positive",
    "model: m\nsystems: [{}]\nnum_resamples: 0": "recipe.num_resamples must be at least 1",
    "model: m\nsystems: [{}]\npassages: {tokens: 0}": "passages.tokens must be at least 1",
    "model: m\nsystems: [{}]\npassages: {count: 20}": "The passages take 3200 tokens of a document, at most half",
    "model: m\nsystems: [{}]\npassages: {within: 1000}": "The passages take 640 tokens of a document, .* go: 1000",
    "model: m\nsystems: [{}]\npassages: {within: 0}": "passages.within must be at least 1",
    "model: m\nsystems: [{}]\ndocuments: {max_documents: 1}": "documents.max_documents must be at least 2",
    "model: m\nsystems: [{}]\nlengths: [512]": "calibration.tokens has 1024, more than the shortest of recipe.lengths",
    "model: m\nsystems: [{}]\ncalibration: {documents: 0}": "calibration.documents must be at least 1",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_recipe_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=WRONG[text]):
        RetrievalRecipe.from_yaml(tmp_path / "r.yaml")


def test_what_only_the_checkpoint_and_the_documents_tell_is_said_before_anything_is_measured(
    recipe: RetrievalRecipe, tmp_path: Path
) -> None:
    for change, message in (
        ({"short_lengths": [32, 65]}, r"short_lengths has \[65\]; .* reads 64 tokens at most"),
        ({"passages": PassagesRecipe(tokens=63, count=1)}, "passages.tokens has 63; .* reads 62 beside its special"),
        ({"documents": replace(recipe.documents, min_tokens=5000)}, "0 of 7 documents .* have 5000 tokens"),
        ({"documents": replace(recipe.documents, options={"fraction": 1})}, "Unknown option.* 'fraction'"),
        ({"model": "nowhere/at/all"}, "There is no folder"),
        ({"systems": [SystemRecipe(model=str(tmp_path / "gone"))]}, "There is no folder"),
        ({"calibration": CalibrationRecipe(documents=9, tokens=48)}, "4 of 4 documents have 48 tokens; 9 are needed"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            measure_retrieval(replace(recipe, **change), tmp_path / "out", say=silent)
        assert not (tmp_path / "out").exists()
    measure_retrieval(replace(recipe, systems=recipe.systems[:1], cost_repeats=0), tmp_path / "out", say=silent)
    with pytest.raises(ValueError, match="another setting"):
        measure_retrieval(
            replace(recipe, passages=PassagesRecipe(tokens=17, count=3, margin=2)), tmp_path / "out", say=silent
        )


@pytest.mark.parametrize(
    "name", ["embedder.yaml", "embedder_demo.yaml", "trained_embedder.yaml", "distilled_retrieval.yaml"]
)
def test_the_shipped_recipes_are_right(name: str) -> None:
    recipe = RetrievalRecipe.from_yaml(ROOT / "recipes" / "minilm" / name)
    assert {system.reads for system in recipe.systems} >= {"truncated", "chunks", "whole"}


def test_what_the_shipped_embedders_learn_from_is_not_searched() -> None:
    """The same split of the same source: its training part for the two of a budget, its test part for the search."""
    folder = ROOT / "recipes" / "minilm"
    trained = [Recipe.from_yaml(folder / f"{name}_embedder.yaml") for name in ("long", "chunk", "distilled")]
    for name in ("embedder.yaml", "trained_embedder.yaml", "distilled_retrieval.yaml"):
        searched = RetrievalRecipe.from_yaml(folder / name).documents
        for embedder in trained:
            data = embedder.data
            assert (data.source, data.options, data.seed) == (searched.source, searched.options, searched.seed)
            assert all(stage.data is None for stage in embedder.stages)
    searching = RetrievalRecipe.from_yaml(folder / "trained_embedder.yaml")
    models = [Path(system.model) for system in searching.systems if system.model is not None]
    for folder in models:
        assert trained[0].output_dir in (folder, folder.parent)
    assert len(searching.references) == 4
