"""Uptraining: packed and padded batches, masks, and no token left out."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from hf_linear_attn import convert_model
from hf_linear_attn.training import TransferTrainer, UptrainTrainer
from tests.small_runs import small_tokenizer
from tests.small_stages import arguments, language_model, losses, texts
from tests.tiny import causal_lm, without_dropout


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_packed_and_padded_batches_have_the_same_loss(family: str, tmp_path: Path) -> None:
    model = convert_model(causal_lm(family, **without_dropout(family)), "linear")
    documents = texts(4, words=9) + texts(4, words=14, seed=1)
    found = []
    for packing in (True, False):
        trainer = UptrainTrainer(
            model,
            arguments(tmp_path, per_device_train_batch_size=8),
            train_dataset=documents,
            processing_class=small_tokenizer(),
            packing=packing,
            max_length=32,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        assert (len(batch["input_ids"]) == 1) == packing
        with torch.no_grad():
            found.append(float(trainer.compute_loss(model.eval(), batch)))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_uptraining_learns_the_texts(family: str, tmp_path: Path) -> None:
    upstream = language_model(family)
    model = convert_model(upstream, "linear")
    args = arguments(tmp_path, max_steps=30, learning_rate=1e-2, logging_steps=5)
    trainer = UptrainTrainer(model, args, train_dataset=texts(4), processing_class=small_tokenizer(), max_length=32)
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_uptraining_is_evaluated_by_its_loss_the_same_every_time(family: str, tmp_path: Path) -> None:
    model = convert_model(language_model(family), "linear")
    trainer = UptrainTrainer(model, arguments(tmp_path), eval_dataset=texts(4), processing_class=small_tokenizer())
    found = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    assert found[0] == found[1] > 0


def test_no_token_of_a_text_is_left_out(tmp_path: Path) -> None:
    model = convert_model(causal_lm(), "linear")
    long = texts(2, words=75)
    trainer = UptrainTrainer(
        model, arguments(tmp_path), train_dataset=long, processing_class=small_tokenizer(), max_length=16
    )
    words = [[t for t in small_tokenizer()(text)["input_ids"] if t > 3] for text in long]
    pieces = [[t for t in row["input_ids"] if t > 3] for row in trainer.train_dataset]
    assert all(len(row["input_ids"]) <= 16 for row in trainer.train_dataset)
    assert [*itertools.chain(*pieces)] == [*itertools.chain(*words)]


def test_texts_that_stream_train_alike(tmp_path: Path) -> None:
    from datasets import Dataset

    table = Dataset.from_dict({"text": texts(8)})
    found = []
    for data in (table, table.to_iterable_dataset()):
        model = convert_model(causal_lm(**without_dropout("gpt2")), "hedgehog")
        args = arguments(tmp_path, max_steps=2, train_sampling_strategy="sequential", logging_steps=1)
        trainer = TransferTrainer(model, args, train_dataset=data, processing_class=small_tokenizer(), max_length=32)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
