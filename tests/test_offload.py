"""Models whose weights lie elsewhere until a module runs: on disk by `device_map`, or off by accelerate's hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from hf_linear_attn import convert_model, list_variants
from tests.tiny import base_model, main_family, small_options, token_batch

ENCODERS, DECODERS = list_variants(encoder=True), list_variants(decoder=True)
SIDES = [pytest.param(variant, False, id=f"{variant}-encoder") for variant in ENCODERS]
SIDES += [  # its parameters are those of the encoder
    pytest.param(variant, True, id=f"{variant}-decoder", marks=[pytest.mark.slow] if variant in ENCODERS else [])
    for variant in DECODERS
]


def converted(variant: str, causal: bool = False) -> Any:
    torch.manual_seed(0)
    model = base_model(main_family(causal))
    convert_model(model, variant, **small_options(variant, main_family(causal)))
    return model


@torch.no_grad()
def outputs(model: Any, **given: torch.Tensor) -> torch.Tensor:
    return model(**token_batch(), **given)[0]


@pytest.mark.parametrize(("variant", "causal"), SIDES)
def test_weights_that_come_when_a_module_runs_give_the_same(variant: str, causal: bool) -> None:
    model = converted(variant, causal)
    expected = outputs(model)
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert all(x.is_meta for x in model.parameters())
    torch.testing.assert_close(outputs(model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 12], ids=["few", "more than channels of a head"])
def test_global_tokens_of_a_call(count: int) -> None:
    model = converted("longformer")
    marks = (torch.arange(token_batch()["input_ids"].shape[1]) < count).long().expand_as(token_batch()["input_ids"])
    expected = outputs(model, global_attention_mask=marks)
    cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(outputs(model, global_attention_mask=marks), expected, atol=1e-5, rtol=0)
