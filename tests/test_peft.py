"""PEFT on converted models: default target modules, and adapters that come back through AutoPeftModel."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import constants
from transformers import AutoModel

from hf_linear_attn import auto_config, convert_model
from tests.tiny import (
    FAMILIES,
    assert_bit_equal,
    base_model,
    causal_families,
    causal_lm,
    outputs_of,
    representative_variants,
    token_batch,
)

METHODS = {
    "LORA": peft.LoraConfig,
    "IA3": peft.IA3Config,
    "VERA": peft.VeraConfig,
    "FOURIERFT": partial(peft.FourierFTConfig, n_frequency=20),
}


def known(family: str) -> list[str]:
    """Methods for which PEFT has default targets in the family."""
    tables = {
        method: getattr(constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING") for method in METHODS
    }
    return [method for method, table in tables.items() if family in table]


def adapted(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "base_layer")]


@pytest.mark.parametrize(("family", "method"), [(family, method) for family in FAMILIES for method in known(family)])
def test_default_targets_are_those_of_the_family(family: str, method: str) -> None:
    expected = adapted(peft.get_peft_model(base_model(family), METHODS[method]()))
    for variant in representative_variants(family):
        model = peft.get_peft_model(convert_model(base_model(family), variant), METHODS[method]())
        assert adapted(model) == expected != []


def test_a_family_without_defaults_is_refused_as_upstream() -> None:
    family = next(family for family in FAMILIES if "LORA" not in known(family))
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(convert_model(base_model(family), "linear"), peft.LoraConfig())


@pytest.mark.parametrize("family", [family for family in FAMILIES if "LORA" in known(family)])
@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", None])
def test_an_adapter_reloads_merges_saves_and_reloads(family: str, task: str | None, tmp_path: Path) -> None:
    model = convert_model(base_model(family), representative_variants(family)[1])
    model.save_pretrained(tmp_path / "converted")
    # Names the checkpoint in the adapter's config.
    wrapped = peft.get_peft_model(
        AutoModel.from_pretrained(tmp_path / "converted"), peft.LoraConfig(r=2, task_type=task)
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    wrapped.save_pretrained(tmp_path / "adapter")
    if task is None:  # PEFT then asks for leave to import the package that has the model's class
        again = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["hf_linear_attn.auto"])
    else:
        again = peft.AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter")
    again.eval()
    batch = token_batch()
    assert_bit_equal(outputs_of(again, batch), outputs_of(wrapped.eval(), batch))
    assert (outputs_of(again, batch)[0] - outputs_of(model, batch)[0]).abs().max() > 1e-3
    merged = again.merge_and_unload()
    assert type(merged) is type(model)
    merged.save_pretrained(tmp_path / "merged")
    assert_bit_equal(outputs_of(AutoModel.from_pretrained(tmp_path / "merged"), batch), outputs_of(merged, batch))


@pytest.mark.parametrize("options", [{}, {"save_embedding_layers": True}])
def test_an_adapter_of_a_model_that_was_converted_in_memory_says_what_its_base_lacks(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT reads the config of the checkpoint that the model came from, which is not converted."""
    base_model("bert").save_pretrained(tmp_path / "checkpoint")
    said: list[str] = []
    monkeypatch.setattr(auto_config.logger, "warning_once", said.append)

    def new() -> Any:
        return convert_model(AutoModel.from_pretrained(tmp_path / "checkpoint"), "hedgehog")

    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["linear_attn"])
    wrapped = peft.get_peft_model(new(), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    wrapped.save_pretrained(tmp_path / "adapter", **options)
    assert said == ([] if options else [auto_config.UNCONVERTED_BASE])
    again, batch = peft.PeftModel.from_pretrained(new(), tmp_path / "adapter").eval(), token_batch()
    assert_bit_equal(outputs_of(again, batch), outputs_of(wrapped.eval(), batch))
    assert (outputs_of(again, batch)[0] - outputs_of(new(), batch)[0]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT 0.21 says so still
@pytest.mark.parametrize("family", causal_families())
def test_prefix_tuning_is_refused_and_never_left_out_without_a_word(family: str) -> None:
    """Given the empty cache of generation and a prefix, heads of Transformers 5.24 would run without the prefix."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(convert_model(causal_lm(family), representative_variants(family)[0]), config)
    batch = token_batch(length=5)
    with pytest.raises(ValueError, match=r"holds 3 tokens|with 3"):
        model(**batch)
    with pytest.raises(ValueError, match=r"holds 3 tokens|with 3"):
        model.generate(**batch, max_new_tokens=2)


@pytest.mark.slow
def test_peft_may_be_imported_after_the_conversion_and_is_never_imported_by_it() -> None:
    code = """
import sys
from transformers import BertConfig, BertModel
from hf_linear_attn import auto_config, convert_model
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = convert_model(BertModel(config), "linear")
model.config.to_dict()
assert "peft" not in sys.modules
from peft import LoraConfig, get_peft_model
assert get_peft_model(model, LoraConfig()).peft_config["default"].target_modules == {"query", "value"}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
