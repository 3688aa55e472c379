"""Transfer: what trains, and the loss beside the variants' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from hf_linear_attn import convert_model
from hf_linear_attn.calibration import record
from hf_linear_attn.training import TransferTrainer
from hf_linear_attn.training.parts import variants_of
from tests.small_runs import small_tokenizer
from tests.small_stages import arguments, language_model, losses, moved, texts, weights
from tests.tiny import causal_lm, token_batch, without_dropout


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("variant", ["hedgehog", "lolcats"])
def test_transfer_moves_the_new_parameters_alone_and_lowers_every_layers_error(
    family: str, variant: str, tmp_path: Path
) -> None:
    options = {"lolcats": {"window_size": 4, "tail": "hedgehog"}}.get(variant, {})
    upstream = language_model(family)
    model = convert_model(upstream, variant, **options)
    before = weights(model)
    batch = small_tokenizer()(texts(4), return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def errors() -> dict[int, float]:
        found = {}
        for layer, (recorded, module) in enumerate(
            zip(record(model, [inputs]).values(), variants_of(model), strict=True)
        ):
            found[layer] = module.regression_loss(recorded.inputs[0], recorded.outputs[0]).item()
        return found

    start = errors()
    args = arguments(tmp_path, max_steps=12, learning_rate=2e-2)
    trainer = TransferTrainer(model, args, train_dataset=texts(4), processing_class=small_tokenizer(), max_length=32)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(
        sum(start.values()) / len(start), rel=1e-4
    )
    trainer.train()
    changed = moved(before, weights(model))
    assert changed
    assert all(".linear_attn." in name for name in changed)
    assert {name.split(".linear_attn.")[0] for name in changed} == {
        name.split(".linear_attn.")[0] for name in before if ".linear_attn." in name
    }
    end = errors()
    assert all(end[layer] < start[layer] for layer in start)


def test_a_step_of_transfer_is_the_gradient_of_the_mean_over_layers(tmp_path: Path) -> None:
    model = convert_model(causal_lm(**without_dropout("gpt2")), "hedgehog")
    batch = small_tokenizer()(texts(4), return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    recordings = record(model, [inputs])
    total = torch.stack(
        [
            module.regression_loss(entry.inputs[0], entry.outputs[0])
            for module, entry in zip(variants_of(model), recordings.values(), strict=True)
        ]
    ).mean()
    parameters = [p for module in variants_of(model) for p in module.parameters()]
    expected = torch.autograd.grad(total, parameters)
    trainer = TransferTrainer(model, arguments(tmp_path), train_dataset=texts(4), processing_class=small_tokenizer())
    trainer.loss(model, inputs)[0].backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_transfer_says_what_it_cannot_do(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="not converted"):
        TransferTrainer(causal_lm(), args, train_dataset=texts(), processing_class=small_tokenizer())
    with pytest.raises(ValueError, match="bigbird has no parameters"):
        TransferTrainer(
            convert_model(causal_lm(), "bigbird"), args, train_dataset=texts(), processing_class=small_tokenizer()
        )
    with pytest.raises(ValueError, match="trainable='new', got 'all'"):
        TransferTrainer(
            convert_model(causal_lm(), "hedgehog"),
            args,
            train_dataset=texts(),
            processing_class=small_tokenizer(),
            trainable="all",
        )


def test_a_step_under_ddp_is_a_step_without(tmp_path: Path) -> None:
    model = convert_model(causal_lm("gpt2", **without_dropout("gpt2")), "hedgehog")
    trainer = TransferTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))

    def gradients(wrapped: torch.nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        trainer.loss(wrapped, token_batch())[0].backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    alone = gradients(model)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        # as Trainer wraps a model that is not checkpointed
        together = gradients(DistributedDataParallel(model, find_unused_parameters=True))
    finally:
        distributed.destroy_process_group()
    for one, other in zip(alone, together, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(other, one)


def test_texts_within_the_window_have_nothing_to_transfer(tmp_path: Path) -> None:
    model = convert_model(causal_lm(), "lolcats", window_size=64)
    trainer = TransferTrainer(model, arguments(tmp_path), train_dataset=texts(), processing_class=small_tokenizer())
    with pytest.raises(ValueError, match="the longest text has 22 tokens, and a window covers them"):
        trainer.train()


def test_a_stream_within_the_window_is_an_error_at_the_end(tmp_path: Path) -> None:
    stream = Dataset.from_dict({"text": texts()}).to_iterable_dataset()
    model = convert_model(causal_lm(), "lolcats", window_size=64)
    args = arguments(tmp_path, max_steps=2)
    trainer = TransferTrainer(model, args, train_dataset=stream, processing_class=small_tokenizer(), max_length=32)
    with pytest.raises(ValueError, match="pieces of at most 32 tokens were read, and a window covers them"):
        trainer.train()


def test_the_last_piece_of_a_text_may_lie_within_the_window(tmp_path: Path) -> None:
    model = convert_model(causal_lm(), "lolcats", window_size=16)
    before = weights(model)
    args = arguments(tmp_path, max_steps=8, per_device_train_batch_size=1, logging_steps=1)
    pieces = {"train_dataset": texts(4, words=36), "max_length": 32}  # of 32 tokens, and of 8 at most
    trainer = TransferTrainer(model, args, processing_class=small_tokenizer(), **pieces)
    assert sorted({len(ids) for ids in trainer.train_dataset["input_ids"]})[0] < 16
    trainer.train()
    assert min(losses(trainer)) < 1e-12  # rounding alone
    assert max(losses(trainer)) > 1e-6
    assert moved(before, weights(model))
