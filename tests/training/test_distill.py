"""Distillation: the teacher is the checkpoint, the losses are their formulas, long documents come in windows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertModel

from hf_linear_attn import convert_model
from hf_linear_attn.training import DistillTrainer
from hf_linear_attn.training.losses import label_divergence, states_distance
from hf_linear_attn.training.teachers import windowed_states
from tests.small_runs import small_tokenizer
from tests.small_stages import arguments, language_model, peaked, texts
from tests.tiny import base_model, build, causal_lm, tiny_config, without_dropout

EXACT = {"gpt2": {"window_size": 64}, "bert": {"window_size": 128}}


def test_divergence_is_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 7, generator=draw, dtype=torch.float64)
    real = torch.rand(3, 5, generator=draw) < 0.6
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1)[real].mean()
    torch.testing.assert_close(label_divergence(student, teacher, real, 2.0).double(), expected, rtol=1e-5, atol=0)
    assert label_divergence(teacher, teacher).abs() < 1e-6


@pytest.mark.parametrize("trainable", ["all", "new", "lora", "last_layers:1"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_teacher_is_the_checkpoint_whatever_trains(family: str, trainable: str, tmp_path: Path) -> None:
    upstream = language_model(family)
    checkpoint = copy.deepcopy(upstream).eval()
    model = convert_model(upstream, "hedgehog")
    trainer = DistillTrainer(
        model,
        arguments(tmp_path, max_steps=5),
        train_dataset=texts(),
        processing_class=small_tokenizer(),
        trainable=trainable,
        max_length=32,
    )
    trainer.train()
    batch = small_tokenizer()(texts(3, seed=1), return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = checkpoint(**inputs).logits
    torch.testing.assert_close(trainer.teacher(trainer.model, **inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert trainer.model.training or trainable  # the teacher leaves the student as it was
    assert all(not p.requires_grad for p in getattr(trainer.teacher.model, "parameters", list)())


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_an_exact_conversion_has_nothing_to_learn(family: str, tmp_path: Path) -> None:
    upstream = language_model(family)
    model = convert_model(upstream, "longformer", **EXACT[family])
    trainer = DistillTrainer(
        model, arguments(tmp_path), train_dataset=texts(), processing_class=small_tokenizer(), max_length=32
    )
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < 1e-5
    base = convert_model(base_model(family, **without_dropout(family)), "longformer", **EXACT[family])
    trainer = DistillTrainer(
        base, arguments(tmp_path), train_dataset=texts(), processing_class=small_tokenizer(), max_length=32
    )
    assert trainer.objective == "states"
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < 1e-5


@pytest.mark.parametrize("objective", ["logits", "states"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_distillation_brings_the_model_nearer(family: str, objective: str, tmp_path: Path) -> None:
    upstream = language_model(family)
    model = convert_model(peaked(upstream), "linear")
    args = arguments(tmp_path, max_steps=60, learning_rate=2e-3)
    trainer = DistillTrainer(
        model, args, train_dataset=texts(16), processing_class=small_tokenizer(), objective=objective, max_length=32
    )
    start = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert start == trainer.evaluate(trainer.train_dataset)["eval_loss"]  # masks included
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < 0.7 * start


def test_states_of_long_documents_come_from_the_window_in_whose_middle_a_token_lies() -> None:
    model = build(BertModel, tiny_config("bert", **without_dropout("bert"))).eval()
    window, stride = 12, 4

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask)[0]

    draw = torch.Generator().manual_seed(0)
    lengths = [5, 12, 13, 31, 40]
    ids = torch.randint(10, 60, (len(lengths), max(lengths)), generator=draw)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    found = windowed_states(run, ids, real, window, stride)
    assert not found[~real].any()
    for row, length in enumerate(lengths):
        own = ids[row, :length]
        if length <= window:
            expected = run(own[None], torch.ones(1, length).long())[0]
            torch.testing.assert_close(found[row, :length], expected, rtol=1e-4, atol=1e-5)
            continue
        inner, body = window - 2, length - 2
        starts = [*range(0, body - inner, stride), body - inner]
        for place in range(length):
            # every window that holds the token, the one first whose middle is nearest
            token = min(max(place - 1, 0), body - 1)
            holding = [s for s in starts if s <= token < s + inner]
            middles = {abs(token + 0.5 - (s + inner / 2)) for s in holding}
            near = [s for s in holding if abs(token + 0.5 - (s + inner / 2)) == min(middles)]
            if place == 0:
                near = [0]
            if place == length - 1:
                near = [body - inner]
            options = []
            for s in near:
                piece = torch.cat([own[:1], own[1 + s : 1 + s + inner], own[-1:]])
                options.append(run(piece[None], torch.ones(1, window).long())[0][place - s])
            errors = [float((found[row, place] - option).abs().max()) for option in options]
            assert min(errors) < 1e-5, (length, place)


def test_distance_of_states_counts_real_tokens_only() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 6, 4, generator=draw)
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    expected = torch.zeros(())
    for s, t in ((student[0, :4], teacher[0, :4]), (student[1], teacher[1])):
        expected += (1 - F.cosine_similarity(s.mean(0), t.mean(0), dim=0)) / 2
    squared = [((s - t) ** 2).sum() for s, t in ((student[0, :4], teacher[0, :4]), (student[1], teacher[1]))]
    norms = [(t**2).sum() for t in (teacher[0, :4], teacher[1])]
    expected = expected + sum(squared) / sum(norms)
    torch.testing.assert_close(states_distance(student, teacher, real), expected)


def test_a_long_embedder_learns_its_windows(tmp_path: Path) -> None:
    model = build(BertModel, tiny_config("bert", **without_dropout("bert"), max_position_embeddings=24))
    checkpoint = copy.deepcopy(model).eval()
    model = convert_model(model, "linear", max_length=96)
    long = texts(4, words=80)
    args = arguments(tmp_path, max_steps=25, learning_rate=5e-3)
    trainer = DistillTrainer(model, args, train_dataset=long, processing_class=small_tokenizer(), window=16)
    assert (len(trainer.train_dataset), trainer.window, trainer.stride) == (4, 16, 8)
    batch = small_tokenizer()(long, return_tensors="pt")
    real = batch["attention_mask"].bool()

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return checkpoint(input_ids=ids, attention_mask=mask)[0]

    wanted = windowed_states(run, batch["input_ids"], real, 16, 8)

    def distance() -> float:
        with torch.no_grad():
            return float(states_distance(model.eval()(batch["input_ids"], batch["attention_mask"])[0], wanted, real))

    start = distance()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(start, rel=1e-3)
    trainer.train()
    assert distance() < 0.7 * start


def test_texts_within_the_window_are_held_to_the_checkpoints_own_vectors_beside_long_ones(tmp_path: Path) -> None:
    model = peaked(build(BertModel, tiny_config("bert", **without_dropout("bert"), max_position_embeddings=24)))
    checkpoint = copy.deepcopy(model).eval()
    model = convert_model(model, "linear", max_length=96)  # nowhere exact
    short, long = texts(6, words=10), texts(6, words=80, seed=1)
    args = arguments(tmp_path, max_steps=60, learning_rate=5e-3)
    trainer = DistillTrainer(model, args, train_dataset=short + long, processing_class=small_tokenizer(), window=16)
    batch = small_tokenizer()(short, return_tensors="pt")
    with torch.no_grad():
        own = checkpoint(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    beside = small_tokenizer()([short[0], long[0]], padding=True, return_tensors="pt")
    wanted = trainer._states(trainer.model, dict(beside), beside["attention_mask"].bool())
    torch.testing.assert_close(wanted[0, : own.shape[1]], own[0], rtol=1e-4, atol=1e-5)

    def distance() -> float:
        with torch.no_grad():
            states = trainer.model.eval()(batch["input_ids"], batch["attention_mask"])[0]
        return float(1 - F.cosine_similarity(states.mean(1), own.mean(1)).mean())

    start = distance()
    trainer.train()
    assert distance() < 0.5 * start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "hidden"}, "objective='hidden'; allowed for .*: logits, states"),
        ({"temperature": 0.0}, "temperature=0.0; allowed: above 0"),
        ({"objective": "states", "window": 2}, "window=2"),
        ({"objective": "states", "window": 10_000}, "allowed: a window of 3 to"),
        ({"objective": "states", "stride": 0}, "stride=0"),
        ({"max_length": 10_000}, "the teacher reads"),
        ({"trainable": "half"}, "trainable is one of"),
        ({"trainable": "last_layers:9"}, "the model has 2 layers"),
        ({"new_learning_rate": float("nan")}, "new_learning_rate=nan"),
        ({"head_learning_rate": -1.0}, "head_learning_rate=-1.0"),
        ({"max_length": 0}, "max_length=0"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = convert_model(causal_lm(), "hedgehog")
    with pytest.raises(ValueError, match=message):
        DistillTrainer(model, arguments(tmp_path), train_dataset=texts(), processing_class=small_tokenizer(), **options)
