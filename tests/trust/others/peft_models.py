"""PEFT's own tests of decoders, encoders and classifiers, on tiny models of families that both packages know.

Knows nothing of the plugin unless TRUST_METHOD names a method: then the models are converted to it. Each is saved under
the name that PEFT's tests know it by, in the folder that they run in: their `from_pretrained` loads it from there.

Also a plugin of pytest, which chooses among the tests, each of which PEFT runs with each of its tuners: every test with
LoRA, IA3, prefix and prompt tuning (those that change weights, activations, the cache and the inputs); of what is there
for another tuner, one in TRUST_SHARE, by a checksum of the name. TRUST_SHARE=1 runs all.
"""

from __future__ import annotations

import copy
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from tests.trust.others.excluded import PEFT_EVERYWHERE, PEFT_REFUSED
from tests.trust.others.sources import import_tests, without_diffusers

METHOD = os.environ.get("TRUST_METHOD")
if METHOD:
    from tests.trust.others import converted

SHARE = int(os.environ.get("TRUST_SHARE", "8"))
WITH_EVERY_TEST = (LoraConfig, IA3Config, PrefixTuningConfig, PromptTuningConfig)

with without_diffusers():
    utils = import_tests("peft", "testing_utils")
    decoders = import_tests("peft", "test_decoder_models")
    encoders = import_tests("peft", "test_feature_extraction_models")
    classifiers = import_tests("peft", "test_seq_classifier")
    heads = import_tests("peft", "test_token_classification_qa")

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = GPT2Config(**SIZES)
SIZES["intermediate_size"] = 64
BERT, ROBERTA, LLAMA = BertConfig(**SIZES), RobertaConfig(**SIZES), LlamaConfig(**SIZES)
SIZES["num_key_value_heads"] = 2
# By the names that PEFT's tests load, all of them or a single one: an Auto class, a config.
MODELS = {
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (AutoModelForCausalLM, GPT2),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (AutoModelForCausalLM, LLAMA),
    "peft-internal-testing/tiny-random-BertModel": (AutoModel, BERT),
    "peft-internal-testing/tiny-random-RobertaModel": (AutoModel, ROBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (AutoModelForSequenceClassification, BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (AutoModelForSequenceClassification, ROBERTA),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (AutoModelForSequenceClassification, LLAMA),
}
FURTHER = {
    "hf-internal-testing/tiny-random-gpt2": (AutoModelForCausalLM, GPT2),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (AutoModelForCausalLM, MistralConfig(**SIZES)),
    "peft-internal-testing/tiny-dummy-qwen2": (AutoModelForCausalLM, Qwen2Config(**SIZES)),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": (AutoModelForCausalLM, Qwen3Config(**SIZES, head_dim=16)),
}
LISTS = (
    decoders.PEFT_DECODER_MODELS_TO_TEST,
    encoders.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST,
    classifiers.PEFT_SEQ_CLS_MODELS_TO_TEST,
    heads.PEFT_TOKEN_CLS_MODELS_TO_TEST,
)
for listed in LISTS:
    listed[:] = [name for name in listed if name in MODELS]  # the lists that the tests are parametrized with
decoders.SMALL_GRID_MODELS[:] = [name for name in decoders.SMALL_GRID_MODELS if name in MODELS | FURTHER]
utils._HUB_MODEL_ACCESSES.update(dict.fromkeys(MODELS | FURTHER, 0))  # as if they had been fetched: stay offline
QUOTES = DatasetDict(train=Dataset.from_dict({"quote": ["7 8 9 10 11 12", "13 14 15"] * 10}))
decoders.load_dataset_english_quotes = lambda: QUOTES

TestDecoders = decoders.TestDecoderModels
TestEncoders = encoders.TestPeftFeatureExtractionModel
TestSequenceClassifiers = classifiers.TestSequenceClassificationModels
TestTokenClassifiers = heads.TestTokenClassificationModels
TestQuestionAnswering = heads.TestQuestionAnsweringModels


def tokenizer() -> PreTrainedTokenizerFast:
    """Words are numbers, a word is its own id, and what else there is has the id of padding."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(number): number for number in range(3, SIZES["vocab_size"])}}
    split = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    split.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=split, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not chosen; mark what is excluded; give every test keyword arguments of its own to change."""
    left: dict[bool, list[Any]] = {True: [], False: []}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        every = params.get("config_cls", LoraConfig) in WITH_EVERY_TEST
        left[every or zlib.crc32(item.name.encode()) % SHARE == 0].append(item)
        if "config_kwargs" in params:
            params["config_kwargs"] = copy.deepcopy(params["config_kwargs"])
        if item.originalname in PEFT_EVERYWHERE:
            item.add_marker(pytest.mark.skip(reason=PEFT_EVERYWHERE[item.originalname]))
    config.hook.pytest_deselected(items=left[False])
    items[:] = left[True]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """On a converted model a test may end in one of the refusals of `PEFT_REFUSED`; any other end is the test's own."""
    try:
        return (yield)
    except ValueError as error:
        why = next((why for message, why in PEFT_REFUSED.items() if METHOD and message in str(error)), None)
        if why is None:
            raise
        pytest.skip(why)


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, (auto, config) in {**MODELS, **FURTHER}.items():
        torch.manual_seed(0)
        model: PreTrainedModel = auto.from_config(copy.deepcopy(config))
        if METHOD:
            model = converted.convert(model, METHOD)
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def beside_models(saved_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved_models)
    torch.manual_seed(0)
