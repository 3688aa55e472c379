"""Which parameters train, at which rates, and what a checkpoint keeps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_linear_attn import convert_model
from hf_linear_attn.training import DistillTrainer, Lora
from hf_linear_attn.training.parts import attention_projections, variants_of
from tests.small_runs import small_tokenizer
from tests.small_stages import arguments, moved, texts, weights
from tests.tiny import base_model, causal_lm, without_dropout


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt2", ["attn.c_attn", "attn.c_proj"]),
        ("llama", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]),
        (
            "bert",
            ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"],
        ),
        ("distilbert", ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"]),
    ],
)
def test_adapters_sit_on_the_attention_projections_of_every_family(family: str, expected: list[str]) -> None:
    assert attention_projections(base_model(family)) == expected
    assert attention_projections(convert_model(base_model(family), "linear")) == expected


def test_adapters_and_new_parameters_survive_a_checkpoint(tmp_path: Path) -> None:
    def run(resume: bool) -> Any:
        model = convert_model(causal_lm(**without_dropout("gpt2")), "hedgehog")
        args = arguments(tmp_path, save_strategy="steps", save_steps=3, learning_rate=5e-3)
        trainer = DistillTrainer(
            model,
            args,
            train_dataset=texts(),
            processing_class=small_tokenizer(),
            trainable="lora",
            lora=Lora(r=2),
            max_length=32,
        )
        if resume:
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        else:
            trainer.train()
        return trainer

    whole, again = run(False), run(True)
    assert moved(weights(whole.model), weights(again.model)) == set()
    names = {name for name, p in whole.model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in names)
    assert any("linear_attn" in name for name in names)


def test_the_rates_of_new_parameters_and_the_rest(tmp_path: Path) -> None:
    model = convert_model(causal_lm(), "hedgehog")
    trainer = DistillTrainer(
        model, arguments(tmp_path, learning_rate=1e-4), train_dataset=texts(), processing_class=small_tokenizer(),
        new_learning_rate=1e-2, max_length=32,
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    new = {id(p) for module in variants_of(model) for p in module.parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == (1e-2 if id(parameter) in new else 1e-4)
            seen.add(id(parameter))
    assert seen == {id(p) for p in model.parameters()}
