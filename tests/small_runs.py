"""A tiny BERT with a tokenizer, and folders of short documents: what training and comparison tests run on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from hf_linear_attn.training.recipe import Recipe
from tests.tiny import tiny_config

WORDS = {"fruit": ["apple", "pear", "plum"], "metal": ["iron", "zinc", "lead"]}
FILLER = [f"w{index}" for index in range(20)]


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that frames a text as BERT's does."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *WORDS["fruit"], *WORDS["metal"], "[MASK]"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {
        name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_checkpoint(folder: Path, **overrides: Any) -> Path:
    """A random two-layer BERT (32 wide, 64 positions) and a word-level tokenizer."""
    small_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    BertForSequenceClassification(tiny_config("bert", max_position_embeddings=64, **overrides)).save_pretrained(folder)
    return folder


def save_documents(folder: Path, train: int = 8, test: int = 4, words: tuple[int, int] = (20, 90)) -> Path:
    """`train` and `test` documents of each of two labels, told apart by rare words."""
    draw = random.Random(0)
    for split, count in (("train", train), ("test", test)):
        for label, marks in WORDS.items():
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                text = [draw.choice(marks if draw.random() < 0.3 else FILLER) for _ in range(draw.randint(*words))]
                (folder / split / label / f"{index}.txt").write_text(" ".join(text))
    return folder


def small_recipe(folder: Path, **sections: Any) -> Recipe:
    """One epoch of full training on the CPU; `sections` change keys of sections."""
    checkpoint, documents = folder / "checkpoint", folder / "documents"
    if not checkpoint.exists():
        save_checkpoint(checkpoint)
        save_documents(documents)
    recipe = Recipe.from_dict(
        {
            "model": {"name": str(checkpoint)},
            "data": {"source": str(documents)},
            "training": {
                "num_train_epochs": 1,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "output_dir": str(folder / "run"),
            },
            "stages": [{"stage": "finetune", "max_length": 64}],
            "evaluation": {"forward_lengths": [], "num_resamples": 50},
        }
    )
    return recipe.replace(**sections)
