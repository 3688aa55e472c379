"""Quantized models: conversion first, then a load with torchao's `quantization_config`."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModel, TorchAoConfig

from hf_linear_attn import convert_model
from tests.tiny import base_model, outputs_of, over, representative_variants, small_options, token_batch, variants_for

pytestmark = pytest.mark.conformance

PAIRS = [(v, "bert") for v in variants_for("bert")] + [(v, "llama") for v in representative_variants("llama")]


@over(PAIRS)
def test_a_converted_checkpoint_loads_quantized(variant: str, family: str, tmp_path: Path) -> None:
    model = convert_model(base_model(family), variant, **small_options(variant, family))
    model.save_pretrained(tmp_path)
    quantized = AutoModel.from_pretrained(tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    assert any("Int8" in type(p).__name__ or "Int8" in type(p.data).__name__ for p in quantized.parameters())
    exact, got = (outputs_of(m, token_batch())[0] for m in (model, quantized))
    assert (got - exact).norm() < 0.05 * exact.norm()


def test_a_quantized_model_is_refused_with_the_order_that_works(tmp_path: Path) -> None:
    base_model("bert").save_pretrained(tmp_path)
    quantized = AutoModel.from_pretrained(tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    with pytest.raises(ValueError, match=r"quantized.*Convert it first.*quantization_config="):
        convert_model(quantized, "linear")
