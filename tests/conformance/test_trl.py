"""TRL's trainers on a folder that holds a converted model, with and without PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_linear_attn import convert_model
from tests.tiny import VOCAB, causal_families, causal_lm, is_causal, token_batch

pytestmark = pytest.mark.conformance

DECODERS = [family for family in causal_families() if is_causal(family)]
TEXTS = {"text": ["5 6 7 8 9 10"] * 4}
PREFERENCES = {"prompt": ["5 6 "] * 4, "chosen": ["7 8"] * 4, "rejected": ["9 10"] * 4}
STAGES = {"sft": (SFTTrainer, SFTConfig, TEXTS), "dpo": (DPOTrainer, DPOConfig, PREFERENCES)}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A converted model of the family, with a tokenizer of numbers."""
    convert_model(causal_lm(request.param), "hedgehog").save_pretrained(tmp_path / "model")
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "0", "bos_token": "1", "eos_token": "2", "unk_token": "3"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def train(stage: str, folder: Path, **kwargs: Any) -> Any:
    trainer_class, config_class, rows = STAGES[stage]
    arguments = config_class(
        output_dir=str(folder.parent / stage),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        warmup_steps=0,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    trainer = trainer_class(str(folder), args=arguments, train_dataset=datasets.Dataset.from_dict(rows), **kwargs)
    trainer.train()
    trainer.save_model()
    return trainer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**token_batch()).logits


@pytest.mark.parametrize("folder", DECODERS, indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_trains_and_reloads(stage: str, folder: Path) -> None:
    trained = train(stage, folder).model
    assert type(trained).__name__.startswith("LinearAttn")
    again = AutoModelForCausalLM.from_pretrained(folder.parent / stage)
    assert torch.equal(logits(again), logits(trained))
    assert not torch.equal(logits(again), logits(AutoModelForCausalLM.from_pretrained(folder)))


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_reloads_merges_saves_and_reloads(stage: str, folder: Path) -> None:
    trained = train(stage, folder, peft_config=LoraConfig(task_type="CAUSAL_LM", r=2)).model
    again = AutoPeftModelForCausalLM.from_pretrained(folder.parent / stage)
    torch.testing.assert_close(logits(again), logits(trained))
    merged = again.merge_and_unload()
    merged.save_pretrained(folder.parent / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder.parent / "merged")), logits(merged))
