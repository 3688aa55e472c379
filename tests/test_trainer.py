"""Transformers' own Trainer on a converted model: training, resuming, and its collators."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, Trainer, TrainingArguments

from hf_linear_attn import convert_model
from tests.tiny import VOCAB, build, tiny_config


class Documents(Dataset):
    """Sixteen short documents; the label is whether token 7 opens the document."""

    def __init__(self, with_globals: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, VOCAB, (16, 24), generator=generator)
        labels = torch.arange(16) % 2
        ids[:, 0] = torch.where(labels.bool(), 7, 8)
        self.rows = [
            {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y}
            for i, y in zip(ids, labels, strict=True)
        ]
        if with_globals:
            for row in self.rows:
                row["global_attention_mask"] = torch.zeros(24, dtype=torch.long)
                row["global_attention_mask"][:2] = 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def converted(variant: str = "performer", **options: int) -> BertForSequenceClassification:
    config = tiny_config("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return convert_model(build(BertForSequenceClassification, config, scale=1.0), variant, **options)


def trainer(model: BertForSequenceClassification, folder: Path, steps: int, **kwargs: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **kwargs,
    )
    return Trainer(model=model, args=arguments, train_dataset=Documents(bool(kwargs)))


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_trainer_resumes_to_the_same_weights_and_reloads(tmp_path: Path) -> None:
    whole = converted()
    trainer(whole, tmp_path / "whole", 10).train()
    resumed = converted()
    trainer(resumed, tmp_path / "whole", 10).train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-5"))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole/checkpoint-10")
    assert type(again) is type(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


def test_trainer_keeps_the_global_mask_when_asked(tmp_path: Path) -> None:
    seen: list[bool] = []
    model = converted("longformer", window_size=4)
    variant = model.bert.encoder.layer[0].attention.self.linear_attn
    forward = variant.forward

    def spy(inputs, state=None):  # type: ignore[no-untyped-def]
        seen.append(inputs.global_mask is not None)
        return forward(inputs, state)

    variant.forward = spy
    trainer(model, tmp_path, 2, remove_unused_columns=False).train()
    assert seen == [True, True]
