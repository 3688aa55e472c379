"""Stages that end early: resumed bit for bit, refused under other settings, stopped at a loss that is not finite."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_linear_attn import convert_model
from hf_linear_attn.seam.trainer import NotFiniteError, last_checkpoint
from hf_linear_attn.training import ContrastTrainer, DistillTrainer, TransferTrainer, UptrainTrainer
from tests.small_runs import small_tokenizer
from tests.small_stages import arguments, losses, moved, texts, weights
from tests.tiny import build, causal_lm, tiny_config, without_dropout


@pytest.mark.parametrize("kind", ["transfer", "distill", "contrast", "uptrain"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("left", [4, 7])  # of 7 steps: killed on the way, and after the last one
def test_a_resumed_stage_ends_with_the_same_bits(left: int, family: str, kind: str, tmp_path: Path) -> None:
    stages: dict[str, Any] = {"transfer": TransferTrainer, "distill": DistillTrainer, "uptrain": UptrainTrainer}
    stage = (stages | {"contrast": partial(ContrastTrainer, passage_tokens=6, margin=1, neighbors=True)})[kind]

    def run(folder: Path, **changes: Any) -> Any:
        # dropout is on: the random generators must come back too
        if family == "bert":
            from transformers import BertForMaskedLM

            upstream: Any = build(BertForMaskedLM, tiny_config("bert"))
        else:
            upstream = causal_lm(family)
        model = convert_model(upstream, "hedgehog")
        args = arguments(
            folder, max_steps=7, lr_scheduler_type="constant", save_strategy="steps", save_steps=2, **changes
        )
        return stage(model, args, train_dataset=texts(), processing_class=small_tokenizer(), max_length=32)

    whole = run(tmp_path)
    whole.train()
    expected = weights(whole.model)
    for step in (6, 7) if left == 4 else ():
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text('{"epoch": 1.')  # killed while it was saved
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{left}")
    again = run(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7
    assert moved(expected, weights(again.model)) == set()


@pytest.mark.parametrize("left", [1, 3, 4, 8, 9])  # in the first pass, at its end, in the second, the last but one, all
def test_a_resumed_stage_reads_a_stream_where_it_stopped(left: int, tmp_path: Path) -> None:
    def run() -> Any:
        stream = Dataset.from_dict({"text": texts(22)}).to_iterable_dataset().shuffle(seed=0, buffer_size=5)
        args = arguments(
            tmp_path, max_steps=9, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1, logging_steps=1
        )
        model = convert_model(causal_lm(), "hedgehog")  # with dropout
        return UptrainTrainer(model, args, train_dataset=stream, processing_class=small_tokenizer(), max_length=32)

    whole = run()
    whole.train()
    expected, read = weights(whole.model), losses(whole)
    assert len(set(read)) == len(read) == 9
    for step in range(left + 1, 10):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    again = run()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 9
    assert losses(again) == read
    assert moved(expected, weights(again.model)) == set()


def test_a_resume_under_other_settings_is_refused_with_the_difference(tmp_path: Path) -> None:
    def run(data: list[str], **changes: Any) -> Any:
        model = convert_model(causal_lm(), "hedgehog")
        args = arguments(tmp_path, save_strategy="steps", save_steps=2, **changes)
        return TransferTrainer(model, args, train_dataset=data, processing_class=small_tokenizer(), max_length=32)

    run(texts()).train()
    path = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"learning_rate=0.01 there and 0.02 here"):
        run(texts(), learning_rate=2e-2).train(resume_from_checkpoint=path)
    with pytest.raises(ValueError, match="seed=42 there and 1 here"):
        run(texts(), seed=1).train(resume_from_checkpoint=path)
    with pytest.raises(ValueError, match="training_data="):
        run(texts(seed=5)).train(resume_from_checkpoint=path)
    run(texts(), logging_steps=1).train(resume_from_checkpoint=path)  # what does not decide may differ


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    model = convert_model(causal_lm(**without_dropout("gpt2")), "hedgehog")
    args = arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=1)
    trainer = UptrainTrainer(model, args, train_dataset=texts(), processing_class=small_tokenizer(), max_length=32)
    compute = trainer.compute_loss

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        return loss * float("nan") if trainer.state.global_step == 4 else loss

    trainer.compute_loss = poisoned  # type: ignore[method-assign]
    with pytest.raises(NotFiniteError, match="not finite at step 5"):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    good = type(model).from_pretrained(tmp_path / "checkpoint-4")
    assert all(torch.isfinite(p).all() for p in good.parameters())
    with torch.no_grad():
        next(model.parameters()).fill_(float("inf"))
    trainer._finite = None
    with pytest.raises(NotFiniteError, match="nothing is saved"):
        trainer.save_model(str(tmp_path / "bad"))
    assert not (tmp_path / "bad").exists()


def test_a_tokenizer_without_padding_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    bare = small_tokenizer()
    bare.pad_token = None
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        UptrainTrainer(
            convert_model(causal_lm(), "linear"), arguments(tmp_path), train_dataset=texts(), processing_class=bare
        )
