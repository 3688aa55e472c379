"""Contrast: the loss beside sentence-transformers' own, what is cut out of which text, and texts that teach nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import BertModel

from hf_linear_attn import convert_model
from hf_linear_attn.data.companions import find_pooling
from hf_linear_attn.training import ContrastTrainer
from hf_linear_attn.training.batching import NeighborSampler
from hf_linear_attn.training.losses import contrast_loss
from hf_linear_attn.training.recipe import Recipe
from hf_linear_attn.training.run import train
from tests.small_runs import FILLER, save_checkpoint, small_tokenizer
from tests.small_stages import arguments, losses, masked_lm, moved, texts, weights
from tests.tiny import build, causal_lm, tiny_config, without_dropout

SMALL: dict[str, Any] = {"passage_tokens": 6, "margin": 1, "max_length": 32}  # 16 tokens at least: 2 + 2 + 12


def embedder(**overrides: Any) -> Any:
    return build(BertModel, tiny_config("bert", **without_dropout("bert"), **overrides))


def stage(folder: Path, model: Any = None, *, data: Any = None, **changes: Any) -> ContrastTrainer:
    given = {**SMALL, **{key: changes.pop(key) for key in list(changes) if key in OPTIONS}}
    model = convert_model(embedder(), "longformer", window_size=4) if model is None else model
    data = texts(words=28) if data is None else data
    return ContrastTrainer(
        model, arguments(folder, **changes), train_dataset=data, processing_class=small_tokenizer(), **given
    )


OPTIONS = {*SMALL, "temperature", "symmetric", "neighbors", "pooling", "eval_dataset"}


def ordered(count: int = 4, words: int = 20) -> list[str]:
    """Texts in which every word stands once."""
    return [" ".join(FILLER[(place + 3 * row) % 20] for place in range(words)) for row in range(count)]


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_and_its_gradients_are_those_of_sentence_transformers(symmetric: bool) -> None:
    pytest.importorskip("sentence_transformers", reason="the extra [conformance] is not installed")
    from sentence_transformers.sentence_transformer import losses as theirs

    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"} if symmetric else {}
    draw = torch.Generator().manual_seed(0)
    vectors = [torch.randn(7, 12, generator=draw, requires_grad=True) for _ in range(2)]
    other = theirs.MultipleNegativesRankingLoss(model=torch.nn.Identity(), scale=20.0, **both)
    expected = other.compute_loss_from_embeddings(vectors, labels=None)
    found = contrast_loss(*vectors, temperature=0.05, symmetric=symmetric)
    torch.testing.assert_close(found, expected)
    for one, two in zip(*(torch.autograd.grad(loss, vectors) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_batch_loses_what_its_passages_and_documents_do_one_at_a_time(pooling: str, tmp_path: Path) -> None:
    trainer = stage(tmp_path, data=texts(words=14) + texts(words=28), pooling=pooling)
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    assert not batch["attention_mask"].all(), "some are padded"
    torch.manual_seed(3)
    found, _ = trainer.loss(trainer.model, batch)
    torch.manual_seed(3)
    vectors = []
    for rows in trainer.cut(batch):
        pooled = []
        for ids, mask in zip(rows["input_ids"], rows["attention_mask"].bool(), strict=True):
            states = trainer.model(input_ids=ids[mask][None]).last_hidden_state[0]
            pooled.append(F.normalize(states.mean(0) if pooling == "mean" else states[0], dim=0))
        vectors.append(torch.stack(pooled))
    expected = F.cross_entropy(20 * vectors[0] @ vectors[1].T, torch.arange(len(vectors[0])))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# What is cut ---------------------------------------------------------------------------------------------------------


def test_a_passage_and_its_margins_are_in_no_document(tmp_path: Path) -> None:
    trainer = stage(tmp_path, data=ordered())
    batch = next(iter(trainer.get_train_dataloader()))
    starts = set()
    for _ in range(60):
        passages, documents = trainer.cut(batch)
        for whole, passage, left in zip(
            batch["input_ids"].tolist(), passages["input_ids"].tolist(), documents["input_ids"].tolist(), strict=True
        ):
            assert (passage[0], passage[-1], left[0], left[-1]) == (2, 3, 2, 3)
            body, taken, rest = whole[1:-1], passage[1:-1], left[1:-1]
            first = body.index(taken[0])
            assert taken == body[first : first + 6]
            assert rest == body[: first - 1] + body[first + 7 :]
            starts.add(first)
    assert starts == set(range(1, 14))  # anywhere


def test_draws_come_from_the_seed(tmp_path: Path) -> None:
    def run(seed: int) -> list[float]:
        trainer = stage(tmp_path, seed=seed, data_seed=0, logging_steps=1)
        trainer.train()
        return losses(trainer)

    assert run(1) == run(1)
    assert run(1) != run(2)
    trainer = stage(tmp_path)
    trainer.eval_dataset = trainer.train_dataset
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_long_documents_are_pieces_and_short_pieces_are_left_out(tmp_path: Path) -> None:
    trainer = stage(tmp_path, data=[*texts(3, words=40), *texts(3, words=13)])
    assert [len(ids) for ids in trainer.train_dataset["input_ids"]] == [32] * 3  # of 12 and 15 tokens are too short
    trainer = stage(tmp_path, data=texts(3, words=14))
    assert [len(ids) for ids in trainer.train_dataset["input_ids"]] == [16] * 3


def test_neighbors_share_batches_and_every_row_comes_once(tmp_path: Path) -> None:
    sampler = NeighborSampler(11, 4, seed=1)
    orders = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert order == list(sampler)
        assert sorted(order) == list(range(11))
        for batch in (order[:4], order[4:8], order[8:]):
            assert all((two - one) % 11 == 1 for one, two in itertools.pairwise(batch))
        orders.append(tuple(order))
    assert len(set(orders)) > 3
    assert orders != [tuple(NeighborSampler(11, 4, seed=2)) for _ in range(6)]

    data = [f"{word} {text}" for word, text in zip(FILLER, texts(20, words=20), strict=True)]
    batches = list(stage(tmp_path, data=data, neighbors=True).get_train_dataloader())
    assert len(batches) == 5
    for batch in batches:
        rows = batch["input_ids"][:, 1].tolist()  # ids of FILLER follow one another
        assert all((two - one) % 20 == 1 for one, two in itertools.pairwise(rows))


def test_a_stream_has_an_order_of_its_own(tmp_path: Path) -> None:
    stream = Dataset.from_dict({"text": texts(words=20)}).to_iterable_dataset()
    with pytest.raises(ValueError, match="a stream comes in its own order"):
        stage(tmp_path, data=stream, neighbors=True)


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["converted", "softmax", "head", "causal"])
def test_passages_find_their_documents_after_training(kind: str, tmp_path: Path) -> None:
    models = {
        "converted": lambda: convert_model(embedder(), "longformer", window_size=4),
        "softmax": embedder,
        "head": lambda: convert_model(masked_lm(), "hedgehog"),
        "causal": lambda: convert_model(causal_lm(**without_dropout("gpt2")), "hedgehog"),
    }
    # four words a text, of which every text has its own: nothing else tells what belongs together
    data = [" ".join(FILLER[(4 * (row % 5) + place * 3 % 4) % 20] for place in range(28)) for row in range(20)]
    model = models[kind]()
    before = weights(model)
    trainer = stage(tmp_path, model, data=data[:5], max_steps=25, per_device_train_batch_size=5, learning_rate=5e-3)
    start = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < 0.5 * start
    changed = moved(before, weights(model))
    assert changed
    assert not [name for name in changed if "pooler" in name or name.startswith(("cls.predictions.transform",))]


def test_a_step_under_ddp_is_a_step_without(tmp_path: Path) -> None:
    trainer = stage(tmp_path)
    model, batch = trainer.model, next(iter(trainer.get_train_dataloader()))

    def gradients(wrapped: torch.nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        trainer.loss(wrapped, batch)[0].backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    alone = gradients(model)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        given = trainer.args.ddp_broadcast_buffers
        settings = {} if given is None else {"broadcast_buffers": given}  # as Trainer passes them on
        wrapped = DistributedDataParallel(model, find_unused_parameters=True, **settings)
        together = gradients(wrapped)
    finally:
        distributed.destroy_process_group()
    assert len(alone) == len(together) > 0
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other, one)


# Said ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passage_tokens": 0}, "passage_tokens=0, margin=1; allowed"),
        ({"margin": -1}, "margin=-1; allowed"),
        ({"temperature": 0.0}, "temperature=0.0; allowed: a finite number above 0"),
        ({"pooling": "max"}, "pooling='max'; allowed: mean, cls"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size=1; contrast needs at least 2"),
        ({"per_device_eval_batch_size": 1}, "per_device_eval_batch_size=1; contrast needs at least 2"),
        ({"max_length": 15}, "max_length=15; two passages with their margins and special tokens take 16"),
        ({"data": texts(3, words=13)}, "0 of 3 pieces of text have 16 tokens.*the longest has 15"),
        ({"data": texts(1, words=14)}, "1 of 1 pieces of text have 16 tokens.*contrast needs two"),
        ({"eval_dataset": texts(3, words=13)}, "0 of 3 pieces of text have 16 tokens"),
    ],
)
def test_mistakes_are_said_before_the_first_step(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        stage(tmp_path, **changes)


def test_a_tokenizer_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs processing_class"):
        ContrastTrainer(embedder(), arguments(tmp_path), train_dataset=texts())


def test_a_stream_without_two_long_texts_is_an_error_at_the_end(tmp_path: Path) -> None:
    rows = [*texts(6, words=10), *texts(1, words=20)]
    stream = Dataset.from_dict({"text": rows}).to_iterable_dataset()
    with pytest.raises(ValueError, match="No batch held two texts of 16 tokens"):
        stage(tmp_path, data=stream, max_steps=1).train()


# Recipes -------------------------------------------------------------------------------------------------------------


def recipe_of(folder: Path, **contrast: Any) -> Recipe:
    save_checkpoint(folder / "checkpoint")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(16, words=40)))
    return Recipe.from_dict(
        {
            "model": {"name": str(folder / "checkpoint")},
            "data": {"source": str(folder / "texts.jsonl")},
            "conversion": {"variant": "longformer", "options": {"window_size": 4}, "max_length": 96},
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "output_dir": str(folder / "run")},
            "stages": [{"stage": "contrast", **SMALL, "max_length": 64, **contrast}],
        }
    )


def test_a_run_says_what_is_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    result = train(recipe_of(tmp_path), on_message=said.append)
    assert "in 11 pieces of at most 64; shorter ones than 16 are left out." in "\n".join(said)
    assert result.stages[0].stage == "contrast"
    assert result.metrics["loss"] > 0


@pytest.mark.parametrize(
    ("contrast", "message"),
    [
        ({"passage_tokens": 0}, "contrast.passage_tokens must be at least 1, got 0"),
        ({"margin": -1}, "contrast.margin must be at least 0, got -1"),
        ({"temperature": 0}, "contrast.temperature must be a finite number above 0, got 0"),
        ({"passage_tokens": 40}, "max_length=64; two passages with their margins and special tokens take 84"),
        ({"training": {"per_device_train_batch_size": 1}}, "contrast needs at least 2 documents in a batch"),
    ],
)
def test_a_recipes_mistakes_are_said_before_anything_is_written(
    contrast: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(recipe_of(tmp_path, **contrast))
    assert not (tmp_path / "run").exists()


def modules(folder: Path, *kinds: str, **pooling: Any) -> Path:
    """What sentence-transformers keeps beside a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, kind in enumerate(kinds, 1):
        path = f"{number}_{kind}"
        rows.append({"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"})
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(pooling))
    (folder / "modules.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
    ],
)
def test_the_pooling_is_the_checkpoints(settings: dict[str, Any], pooling: str, tmp_path: Path) -> None:
    assert find_pooling(modules(tmp_path / "st", "Pooling", "Normalize", **settings)) == pooling
    assert find_pooling(tmp_path) == "mean"  # a folder without modules


def test_a_pooling_that_contrast_does_not_train_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    modules(tmp_path / "checkpoint", "Pooling", pooling_mode="max")
    with pytest.raises(ValueError, match="pooling='max'; allowed: mean, cls"):
        train(recipe)
    with pytest.raises(ValueError, match="has Dense; known: Transformer, Pooling, Normalize"):
        find_pooling(modules(tmp_path / "st", "Dense"))
    with pytest.raises(ValueError, match="pools by mean, max; known: one way"):
        find_pooling(modules(tmp_path / "two", "Pooling", pooling_mode=["mean", "max"]))
