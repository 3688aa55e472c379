"""Weights and starts stay: no model around a converted one initializes anything of it again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, EncoderDecoderModel, PreTrainedConfig, PreTrainedModel

from hf_linear_attn import convert_model, list_variants
from tests.tiny import base_model, causal_lm, main_family, small_options, token_batch

SIDES = [(variant, False) for variant in list_variants(encoder=True)]
SIDES += [(variant, True) for variant in list_variants(decoder=True)]
IDS = [f"{variant}-{'decoder' if causal else 'encoder'}" for variant, causal in SIDES]


class Wrapper(PreTrainedModel):
    """A user's own model around a converted one."""

    config_class = PreTrainedConfig

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(PreTrainedConfig())
        self.inner = inner
        self.head = nn.Linear(32, 2)
        self.post_init()


class DrawingWrapper(Wrapper):
    """One whose `_init_weights` draws every tensor it is given."""

    def _init_weights(self, module: nn.Module) -> None:
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if tensor.is_floating_point():
                nn.init.constant_(tensor, 7.0)


class ApplyingWrapper(Wrapper):
    """One that asks for every module as models did before Transformers 5."""

    def init_weights(self) -> None:
        with torch.no_grad():
            self.apply(self._init_weights)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_kept(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert not changed


def trained(variant: str, causal: bool) -> PreTrainedModel:
    """A calibrated conversion whose every parameter, old and new, was trained."""
    family = main_family(causal)
    model = base_model(family)
    options = small_options(variant, family)
    convert_model(model, variant, calibration=[token_batch()], calibration_steps=1, max_length=200, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.linspace(0.1, 0.2, parameter.numel()).view_as(parameter))
    return model


WRAPS: dict[str, Callable[[Any], Any]] = {
    "post_init": Wrapper,
    "drawing": DrawingWrapper,
    "post_init of copy": lambda model: Wrapper(copy.deepcopy(model)).inner,
    "again": lambda model: model.init_weights(),
    "own post_init": lambda model: model.post_init(),
    "layer": lambda model: Wrapper(next(m for m in model.modules() if isinstance(m, nn.ModuleList))),
}


@pytest.mark.parametrize(("variant", "causal"), SIDES, ids=IDS)
def test_nothing_of_a_conversion_is_initialized_again(variant: str, causal: bool, tmp_path: Path) -> None:
    model = trained(variant, causal)
    before = tensors_of(model)
    for name, wrap in WRAPS.items():
        wrapped = wrap(model)
        if name == "post_init of copy":
            assert_kept(wrapped, before)
        assert_kept(model, before)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert_kept(again, before)
    for wrap in WRAPS.values():
        wrap(again)
        assert_kept(again, before)


@pytest.mark.parametrize(("variant", "causal"), SIDES, ids=IDS)
def test_new_weights_are_kept_where_the_checkpoints_are(variant: str, causal: bool, tmp_path: Path) -> None:
    """A wrapper that initializes the old way keeps what Transformers loaded, so it must keep what we added."""
    base_model(main_family(causal)).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    convert_model(model, variant, max_length=200, **small_options(variant, main_family(causal)))
    before = tensors_of(model)
    ApplyingWrapper(model)
    assert_kept(model, before)


@pytest.mark.parametrize(("variant", "causal"), SIDES, ids=IDS)
def test_encoder_decoders_keep_their_parts(variant: str, causal: bool) -> None:
    encoder, decoder = base_model("bert"), causal_lm("bert", add_cross_attention=True)
    part = decoder if causal else encoder
    convert_model(part, variant, **small_options(variant, "bert", causal))
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.125)
    parts = [(model, tensors_of(model)) for model in (encoder, decoder)]
    composite = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    composite.init_weights()
    for model, before in parts:
        assert_kept(model, before)


@pytest.mark.parametrize(("variant", "causal"), SIDES, ids=IDS)
def test_a_model_built_from_its_config_keeps_its_start(variant: str, causal: bool) -> None:
    family = main_family(causal)
    config = convert_model(base_model(family), variant, **small_options(variant, family)).config
    model = AutoModel.from_config(config)
    before = tensors_of(model)
    Wrapper(model)
    model.init_weights()
    assert_kept(model, before)
