"""Models whose weights lie elsewhere until a module runs: on disk by `device_map`, or off by accelerate's hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from transformers import AutoModel, EncoderDecoderModel

from hf_linear_attn import convert_model, list_variants
from tests.tiny import base_model, causal_lm, main_family, small_options, token_batch

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


def layers_on_disk(model: Any, prefix: str = "") -> dict[str, str]:
    """A device map with the stack of layers on disk and the rest on the CPU."""
    return {prefix + name: "disk" if name in ("encoder", "h") else "cpu" for name, _ in model.named_children()}


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


@pytest.mark.parametrize(("variant", "causal"), SIDES)
def test_layers_on_disk_give_the_same(variant: str, causal: bool, tmp_path: Path) -> None:
    model = converted(variant, causal)
    model.save_pretrained(tmp_path)
    where = {"device_map": layers_on_disk(model), "offload_folder": str(tmp_path / "offload")}
    again = AutoModel.from_pretrained(tmp_path, **where)
    assert all(x.is_meta for name, x in again.named_parameters() if ".linear_attn." in name or ".query." in name)
    torch.testing.assert_close(outputs(again), outputs(model), atol=1e-5, rtol=0)


def test_a_weight_that_is_on_no_disk_is_refused(tmp_path: Path) -> None:
    """The load of a composite reports it and draws it anew, so that only the part can tell."""
    encoder = converted("hedgehog")
    model = EncoderDecoderModel(encoder=encoder, decoder=causal_lm("bert", is_decoder=True, add_cross_attention=True))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    del held["encoder.encoder.layer.1.attention.self.linear_attn.query_weight"]
    save_file(held, file, metadata={"format": "pt"})
    places = {**layers_on_disk(encoder, "encoder."), "decoder": "cpu"}
    with pytest.raises(ValueError, match=r"LinearAttnBertModel: missing keys: encoder\.layer\.1\S+query_weight\."):
        EncoderDecoderModel.from_pretrained(tmp_path, device_map=places, offload_folder=str(tmp_path / "offload"))
