"""Tokenized documents, padded batches and the bag-of-words yardstick."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import BertTokenizer, DataCollatorWithPadding

from hf_linear_attn.data import DocumentTask, LongDocumentCollator, bag_of_words_baseline, tokenize_documents
from hf_linear_attn.data.task import documents_to_dataset
from hf_linear_attn.data.tokenization import encode_leading

WORDS = [f"w{index}" for index in range(50)]


@pytest.fixture
def tokenizer(tmp_path):
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*specials, *WORDS]))
    return BertTokenizer(str(tmp_path / "vocab.txt"), model_max_length=16)


@pytest.fixture
def documents():
    texts = [" ".join(WORDS[:count]) for count in (3, 40, 20)]
    return documents_to_dataset(texts, [0, 1, 2], ["x", "y", "z"])


def test_documents_are_cut_at_max_length_beyond_the_tokenizers_own_limit(documents, tokenizer):
    tokenized = tokenize_documents(documents, tokenizer, max_length=24)
    assert list(tokenized["length"]) == [5, 24, 22]
    assert [len(ids) for ids in tokenized["input_ids"]] == [5, 24, 22]
    assert set(tokenized.column_names) == {"input_ids", "attention_mask", "label", "length"}
    assert all(ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id for ids in tokenized["input_ids"])


@pytest.mark.parametrize("max_length", [3, 7, 24, 300])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_leading_tokens_are_the_tokenizers_own(tokenizer, max_length, special, side):
    # BERT's normalizer deletes control characters: such words give no token.
    deleted = "\u200b " * 700 + " ".join(WORDS)
    texts = ["", "  w1\n\n w2  ", " ".join(WORDS * 20), deleted, "w1w2 unknown, words!" * 90]
    tokenizer.truncation_side = side
    found = encode_leading(texts, tokenizer, max_length, add_special_tokens=special)
    plain = tokenizer(texts, add_special_tokens=special, truncation=True, max_length=max_length)
    assert found == plain["input_ids"]
    assert len(found[3]) > 2


def test_tokenizing_refuses_what_it_cannot_do(documents, tokenizer):
    with pytest.raises(ValueError, match=r"no column \['label'\]. Available: text, group"):
        tokenize_documents(documents.remove_columns("label"), tokenizer, 8)
    with pytest.raises(ValueError, match="max_length must be at least 1, given 0"):
        tokenize_documents(documents, tokenizer, 0)


def test_collator_pads_as_transformers_does(documents, tokenizer):
    tokenized = tokenize_documents(documents, tokenizer, max_length=32)
    rows = [tokenized[index] for index in range(3)]
    ours = LongDocumentCollator(tokenizer, pad_to_multiple_of=16)(rows)
    names = ("input_ids", "attention_mask", "label")
    theirs = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=16)([{k: row[k] for k in names} for row in rows])
    assert set(ours) == {"input_ids", "attention_mask", "labels"}
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("side", ["left", "right"])
def test_global_tokens_are_the_first_of_each_document(documents, tokenizer, side):
    tokenizer.padding_side = side
    tokenized = tokenize_documents(documents, tokenizer, max_length=32)
    batch = LongDocumentCollator(tokenizer, global_tokens=1)([tokenized[index] for index in range(3)])
    mask = batch["global_attention_mask"].bool()
    assert mask.sum(1).tolist() == [1, 1, 1]
    assert (batch["input_ids"][mask] == tokenizer.cls_token_id).all()
    assert batch["attention_mask"][mask].all()


def test_own_global_mask_is_kept_and_padded(tokenizer):
    rows = [
        {"input_ids": [2, 5, 3], "global_attention_mask": [0, 1, 0]},
        {"input_ids": [2, 5, 6, 7, 3], "global_attention_mask": [1, 0, 0, 0, 1]},
    ]
    batch = LongDocumentCollator(tokenizer, global_tokens=1)(rows)
    assert batch["global_attention_mask"].tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="some have none"):
        LongDocumentCollator(tokenizer)([rows[0], {"input_ids": [2, 3]}])


def test_collator_refuses_a_tokenizer_without_padding_token(tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        LongDocumentCollator(tokenizer)


def telling_word_late(count: int, offset: int) -> Dataset:
    """The word that tells the label is the 20th."""
    texts = [" ".join([*WORDS[:19], WORDS[30 + index % 2], *WORDS[5:9]]) for index in range(count)]
    return documents_to_dataset(texts, [i % 2 for i in range(count)], [str(offset + i) for i in range(count)])


@pytest.mark.parametrize("cross_validated", [False, True])
def test_bag_of_words_sees_only_the_first_tokens(tokenizer, cross_validated):
    task = DocumentTask("late", telling_word_late(40, 0), telling_word_late(20, 40), ["a", "b"], "", True, "test")
    assert bag_of_words_baseline(task, tokenizer, 19, cross_validated=cross_validated) == 0.5
    assert bag_of_words_baseline(task, tokenizer, 20, cross_validated=cross_validated) == 1.0
    assert bag_of_words_baseline(task, tokenizer, None, cross_validated=cross_validated) == 1.0
