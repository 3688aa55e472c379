"""Documents to token ids, and batches of documents of different lengths."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

__all__ = ["LongDocumentCollator", "encode_leading", "special_frame", "tokenize_documents"]


def encode_leading(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """Token ids of each text, cut at `max_length` (None: whole), as the tokenizer itself gives them.

    A tokenizer reads a whole document before it cuts it; here little more is read than is kept.
    """
    options: dict[str, Any] = {
        "add_special_tokens": add_special_tokens,
        "return_attention_mask": False,
        "verbose": False,
    }
    if max_length is None:
        return tokenizer(list(texts), **options)["input_ids"]
    options |= {"truncation": True, "max_length": max_length}
    if tokenizer.truncation_side != "right":
        return tokenizer(list(texts), **options)["input_ids"]
    # A word is at least one token, apart from a few that a normalizer deletes.
    heads = [_first_words(text, 2 * max_length) for text in texts]
    encoded: list[list[int]] = tokenizer(heads, **options)["input_ids"]
    for index, (text, head) in enumerate(zip(texts, heads, strict=True)):
        if len(head) < len(text) and len(encoded[index]) < max_length:
            encoded[index] = tokenizer(text, **options)["input_ids"]
    return encoded


def _first_words(text: str, count: int) -> str:
    word = next(itertools.islice(re.finditer(r"\S+", text), count - 1, None), None)
    return text if word is None else text[: word.end()]


def special_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids of the special tokens in front of a text, and of those behind it."""
    word = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    place = next(i for i in range(len(whole)) if whole[i : i + len(word)] == word)
    return whole[:place], whole[place + len(word) :]


def tokenize_documents(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, num_proc: int | None = None
) -> Dataset:
    """Tokenize the `text` column, cut at `max_length` tokens and not padded.

    Args:
        dataset: columns `text` and `label`; other columns are dropped.
        tokenizer: any Transformers tokenizer; its own length limit is not applied.
        max_length: most tokens of a document, special tokens included.
        num_proc: processes to use.

    Returns:
        columns `input_ids`, `attention_mask`, `label`, `length` (tokens of the document after cutting).

    Raises:
        ValueError: for a missing column or a `max_length` below 1.
    """
    missing = sorted({"text", "label"} - set(dataset.column_names))
    if missing:
        raise ValueError(f"The dataset has no column {missing}. Available: {', '.join(dataset.column_names)}.")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, given {max_length}.")

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = encode_leading(batch["text"], tokenizer, max_length)
        return {
            "input_ids": encoded,
            "attention_mask": [[1] * len(ids) for ids in encoded],
            "label": batch["label"],
            "length": [len(ids) for ids in encoded],
        }

    return dataset.map(encode, batched=True, num_proc=num_proc, remove_columns=dataset.column_names)


class LongDocumentCollator:
    """Pad a list of tokenized documents to the longest of them.

    Args:
        tokenizer: says the padding side and token.
        pad_to_multiple_of: round the padded length up to a multiple of this.
        global_tokens: mark the first so many tokens of each document as global (1 = the classification
            token). A `global_attention_mask` that the documents carry already is kept and padded with 0
            instead.

    Returns, when called: long tensors `input_ids`, `attention_mask` `[B, T]`, `labels` `[B]` where the
    documents have labels, and `global_attention_mask` `[B, T]` where it was asked for or given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pad_to_multiple_of: int | None = None,
        global_tokens: int = 0,
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no padding token: set tokenizer.pad_token first.")
        if global_tokens < 0:
            raise ValueError(f"global_tokens must not be negative, given {global_tokens}.")
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of
        self.global_tokens = global_tokens

    def __call__(self, documents: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(document["input_ids"]) for document in documents)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        masks = [list(document.get("attention_mask") or [1] * len(document["input_ids"])) for document in documents]
        batch = {
            "input_ids": self._pad([list(d["input_ids"]) for d in documents], length, self.tokenizer.pad_token_id),
            "attention_mask": self._pad(masks, length, 0),
        }
        global_masks = [document.get("global_attention_mask") for document in documents]
        if all(mask is not None for mask in global_masks):
            batch["global_attention_mask"] = self._pad([list(mask) for mask in global_masks if mask], length, 0)
        elif any(mask is not None for mask in global_masks):
            raise ValueError("Some documents of the batch have a global_attention_mask and some have none.")
        elif self.global_tokens:
            marks = [[int(i < self.global_tokens) for i in range(len(mask))] for mask in masks]
            batch["global_attention_mask"] = self._pad(marks, length, 0)
        for key in ("label", "labels"):
            if key in documents[0]:
                batch["labels"] = torch.tensor([document[key] for document in documents])
        return batch

    def _pad(self, rows: list[list[int]], length: int, value: int) -> torch.Tensor:
        fill = [[value] * (length - len(row)) for row in rows]
        left = self.tokenizer.padding_side == "left"
        return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, fill, strict=True)])
