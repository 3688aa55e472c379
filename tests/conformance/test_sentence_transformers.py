"""SentenceTransformer with a converted model inside: saved, reloaded, and made from a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_linear_attn import convert_model
from hf_linear_attn.auto import LinearAttnPreTrainedModel
from hf_linear_attn.training.recipe import Recipe
from hf_linear_attn.training.run import train
from tests.tiny import VOCAB, base_model, representative_variants, small_options

pytestmark = pytest.mark.conformance

TEXTS = ["5 6 7 8", " ".join(map(str, range(10, 90)))]
CARD = "---\nlicense: mit\n---\n\n# A card that someone wrote\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A SentenceTransformer of a tiny BERT: mean pooling, vectors of norm 1, a card."""
    base_model("bert").save_pretrained(tmp_path / "bert")
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", unk_token="3").save_pretrained(tmp_path / "bert")
    transformer = Transformer(str(tmp_path / "bert"))
    width = transformer.auto_model.config.hidden_size
    SentenceTransformer(modules=[transformer, Pooling(width), Normalize()], device="cpu").save(str(tmp_path / "st"))
    (tmp_path / "st" / "README.md").write_text(CARD)
    return tmp_path / "st"


def load(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def vectors(model: SentenceTransformer) -> torch.Tensor:
    return model.encode(TEXTS, convert_to_tensor=True)


@pytest.mark.parametrize("variant", representative_variants("bert"))
def test_a_converted_model_saves_with_its_card_and_reloads(variant: str, folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    softmax = vectors(model)
    convert_model(model[0].auto_model, variant, **small_options(variant, "bert"))
    converted = vectors(model)
    assert (converted - softmax).abs().max() > 1e-3
    torch.testing.assert_close(converted.norm(dim=-1), torch.ones(2))
    model.save(str(tmp_path / "saved"))
    assert "# A card that someone wrote" in (tmp_path / "saved" / "README.md").read_text()
    again = load(tmp_path / "saved")
    assert isinstance(again[0].auto_model, LinearAttnPreTrainedModel)
    assert torch.equal(vectors(again), converted)


def test_a_folder_whose_transformer_is_converted_keeps_pooling_and_norm(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    convert_model(model[0].auto_model, "linear")
    shutil.copytree(folder, tmp_path / "copy")
    model[0].auto_model.save_pretrained(tmp_path / "copy")
    again = load(tmp_path / "copy")
    assert isinstance(again[0].auto_model, LinearAttnPreTrainedModel)
    assert torch.equal(vectors(again), vectors(model))


def test_an_embedder_trained_by_a_recipe_keeps_pooling_norm_and_the_new_limit(folder: Path, tmp_path: Path) -> None:
    limit = load(folder)[0].auto_model.config.max_position_embeddings
    texts = [" ".join(str(10 + (7 * row + word) % 80) for word in range(limit)) for row in range(8)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = {
        "model": {"name": str(folder)},
        "data": {"source": str(tmp_path / "texts.jsonl")},
        "conversion": {"variant": "hedgehog", "max_length": 2 * limit},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "run")},
        "stages": [{"stage": "distill", "max_length": 2 * limit}],
    }
    train(Recipe.from_dict(recipe))
    again = load(tmp_path / "run")
    assert [type(module) for module in again] == [Transformer, Pooling, Normalize]
    assert isinstance(again[0].auto_model, LinearAttnPreTrainedModel)
    assert again.max_seq_length == 2 * limit
    for text, found in zip(TEXTS, vectors(again), strict=True):
        inputs = again.tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            mean = again[0].auto_model(**inputs).last_hidden_state.mean(1)[0]
        torch.testing.assert_close(found, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_the_wrapper_itself_is_refused_with_the_way_in(folder: Path) -> None:
    model = load(folder)
    with pytest.raises(TypeError, match=r"got SentenceTransformer.*st\[0\]\.auto_model"):
        convert_model(model, "linear")
