"""Transformers' common model tests on tiny models of four families: `ModelTesterMixin` and `TrainingTesterMixin`.

Knows nothing of the plugin unless TRUST_METHOD names a method: then the models are converted to it.
"""

from __future__ import annotations

import copy
import os
import unittest
from typing import Any

import torch
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel, RobertaConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping

from tests.trust.others.excluded import CONVERTED, EVERYWHERE, WITHOUT_ATTENTIONS
from tests.trust.others.sources import import_tests, stand_in

stand_in("transformers")
common = import_tests("transformers", "test_modeling_common")
training = import_tests("transformers", "test_training_mixin")

METHOD = os.environ.get("TRUST_METHOD")
if METHOD:
    from tests.trust.others import converted

    converted.know_names(common)

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SIZES, type_vocab_size=4),
    "roberta": RobertaConfig(**SIZES, type_vocab_size=4),
    "gpt2": GPT2Config(**{name: size for name, size in SIZES.items() if name != "intermediate_size"}),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
}


def classes_of(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """Every class that an Auto class knows for a config."""
    found: dict[str, type[PreTrainedModel]] = {}
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and isinstance(mapping, _LazyAutoMapping) and type(config) in mapping:
            entry = mapping[type(config)]
            classes = entry if isinstance(entry, list | tuple) else (entry,)
            found |= {cls.__name__: cls for cls in classes if cls.config_class is type(config)}
    return tuple(found[name] for name in sorted(found))


class ModelTester:
    """What the mixins ask of a model's tester."""

    batch_size = 13
    seq_length = 7
    num_choices = 4
    is_training = True

    def __init__(self, config: PreTrainedConfig, classes: tuple[type[PreTrainedModel], ...]) -> None:
        vars(self).update(SIZES)
        self.config = config
        for cls in classes:
            if cls.__name__.endswith(("ForCausalLM", "LMHeadModel")):
                self.causal_lm_class = cls

    def get_config(self) -> PreTrainedConfig:
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        shape, first = [self.batch_size, self.seq_length], 3  # after the special tokens
        ids = common.ids_tensor(shape, SIZES["vocab_size"] - first) + first
        mask = common.random_attention_mask(shape)
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


def add_suite(namespace: dict[str, Any], family: str, config: PreTrainedConfig) -> None:
    """Put the test case of a family into a module."""
    is_causal = family in ("gpt2", "llama")
    mixins = (common.ModelTesterMixin, *([training.TrainingTesterMixin] if is_causal else []))

    def set_up(self: Any) -> None:
        self.model_tester = ModelTester(config, self.all_model_classes)

    body = {"all_model_classes": classes_of(config), "model_tester": None, "setUp": set_up, "__module__": __name__}
    excluded = dict(EVERYWHERE)
    if METHOD:
        body["all_model_classes"] = converted.converted_classes(classes_of(config))
        config = converted.converted_config(config, METHOD)
        excluded |= CONVERTED
        body["has_attentions"] = property(lambda self: self._testMethodName not in WITHOUT_ATTENTIONS)

    def prepare(self: Any, inputs: dict[str, Any], model_class: type, return_labels: bool = False) -> dict[str, Any]:
        inputs = super(namespace[name], self)._prepare_for_class(inputs, model_class, return_labels)
        if return_labels and "ForPreTraining" in model_class.__name__:
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
            inputs["next_sentence_label"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
        return inputs

    body["_prepare_for_class"] = prepare
    name = f"{family.capitalize()}Test"
    for test, reason in excluded.items():
        body[test] = unittest.skip(reason)(getattr(common.ModelTesterMixin, test))
    namespace[name] = type(name, (*mixins, unittest.TestCase), body)


for family, config in CONFIGS.items():
    add_suite(globals(), family, config)
