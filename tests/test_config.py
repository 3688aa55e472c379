"""Options and configs: a bad value is one sentence that names it, whatever type it has; nothing is drawn for it."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
import torch

import tests.tiny as tiny
from hf_linear_attn import convert_model, get_variant, list_variants, revert_model
from hf_linear_attn.config import LinearAttentionConfig, PositionsConfig

ODD_VALUES: list[Any] = [
    *(None, True, False, -1, 0, 10**9, 10**30, -(10**30), 0.5, 1.0, 1e300, math.nan, math.inf, -math.inf),
    *("", "x", "5", [], [1], [None], [[1]], [{}], ["x"], [True], [math.nan], [10**30], {}, {"a": 1}),
]
OPTIONS = [(key, field.name) for key in list_variants() for field in fields(get_variant(key).config_class)]


@pytest.mark.parametrize(("variant", "option"), OPTIONS, ids=["-".join(pair) for pair in OPTIONS])
def test_an_odd_value_is_a_sentence(variant: str, option: str) -> None:
    """Either the option may be that, and what is stored is JSON with the same value, or the sentence names both."""
    config_class: Any = get_variant(variant).config_class
    default = getattr(config_class(), option)
    for value in ODD_VALUES:
        try:
            config = config_class.from_dict({option: value})
        except ValueError as error:
            sentence = str(error)
            assert option in sentence, value
            assert "allowed" in sentence.lower(), (value, sentence)
            continue
        stored = json.loads(json.dumps(config.to_dict(), allow_nan=False))[option]
        assert stored == value
        assert isinstance(stored, bool) == isinstance(value, bool) == isinstance(default, bool)
        assert not isinstance(value, float) or isinstance(default, float) or option == "norm_gate"


WIDTHS = ("num_features", "gate_rank", "num_landmarks", "rank", "num_hashes", "num_buckets", "projection_size")
BOUNDED = [pair for pair in OPTIONS if pair[1] in WIDTHS]


@pytest.mark.parametrize(("variant", "option"), BOUNDED, ids=["-".join(pair) for pair in BOUNDED])
def test_widths_have_a_bound(variant: str, option: str) -> None:
    """A billion features, slots or ranks: refused before a layer is made, in a sentence that names the bound."""
    with pytest.raises(ValueError, match=rf"{option}=1000000000; allowed: an integer from [0-9]+ to 65536"):
        get_variant(variant).config_class.from_dict({option: 10**9})  # type: ignore[attr-defined]


def test_more_memory_than_there_is_is_a_sentence() -> None:
    """Nothing is allocated: the sizes are known from the meta device."""
    model = tiny.base_model("bert")
    model.config.max_position_embeddings = 2**28
    with pytest.raises(ValueError, match=r"The variants need [0-9,]+ bytes with these options; cpu has [0-9,]+\."):
        convert_model(model, "synthesizer", form="random")
    assert not hasattr(model.encoder.layer[0].attention.self, "linear_attn")


LAYER = {"variant": "performer", "options": {}}
GOOD = {"version": 1, "layers": [LAYER, None], "positions": {"original_max_length": 24, "mode": "tile"}}


def test_a_config_does_not_change_once_it_was_checked() -> None:
    config = LinearAttentionConfig.from_dict(GOOD)
    for held in (config, config.layers[0], config.positions):
        for field in fields(held):  # type: ignore[arg-type]
            with pytest.raises(FrozenInstanceError):
                setattr(held, field.name, None)
    assert config == LinearAttentionConfig.from_dict(GOOD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": True}, "linear_attn.version=True; allowed: format versions 1 to 1."),
        ({"version": "1"}, "linear_attn.version='1'; allowed: format versions 1 to 1."),
        ({"version": 2}, "linear_attn.version=2; allowed: format versions 1 to 1. Upgrade hf-linear-attn."),
        ({"layers": {}}, "linear_attn.layers={}; allowed: a list with one entry per layer of the model."),
        ({"layers": "ab"}, "linear_attn.layers='ab'; allowed: a list with one entry per layer of the model."),
        ({"layers": [7]}, "linear_attn.layers[0]=7; allowed: a mapping with the keys variant, options, built_for."),
        ({"layers": [{}]}, "linear_attn.layers[0] lacks variant. Its keys: variant, options, built_for."),
        (
            {"layers": [{**LAYER, "x": 1}]},
            "Unknown key(s) ['x'] in linear_attn.layers[0]. Allowed: variant, options, built_for.",
        ),
        (
            {"layers": [LAYER, {**LAYER, "options": [1]}]},
            "linear_attn.layers[1]: options=[1]; allowed: a mapping with the keys num_features, kernel, orthogonal, "
            "seed, variance_reducer.",
        ),
        (
            {"layers": [None, {**LAYER, "options": {"seed": -1}}]},
            "linear_attn.layers[1]: seed=-1; allowed: an integer of at least 0.",
        ),
        ({"positions": 7}, "linear_attn.positions=7; allowed: a mapping with the keys original_max_length, mode."),
        ({"positions": {"mode": "tile"}}, "linear_attn.positions lacks original_max_length. Its keys: "),
        (
            {"positions": {"original_max_length": True, "mode": "tile"}},
            "linear_attn.positions: original_max_length=True; allowed: an integer of at least 1.",
        ),
        (
            {"positions": {"original_max_length": 24, "mode": ["tile"]}},
            "linear_attn.positions: mode=['tile']; allowed: tile, interpolate, rotary.",
        ),
        ({"x": 1}, "Unknown key(s) ['x'] in linear_attn. Allowed: version, layers, positions."),
    ],
)
def test_a_damaged_section_is_a_sentence(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        LinearAttentionConfig.from_dict({**GOOD, **change})


@pytest.mark.parametrize("section", [None, 7, "x", [], [1], math.nan])
def test_a_section_of_another_type_is_a_sentence(section: Any) -> None:
    with pytest.raises(ValueError, match=r"linear_attn=.*; allowed: a mapping with the keys version, layers"):
        LinearAttentionConfig.from_dict(section)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("bert", {"layers": [LAYER] * 3}, "linear_attn.layers has 3 entries for num_hidden_layers=2"),
        ("bert", {"layers": [LAYER]}, "linear_attn.layers has 1 entries for num_hidden_layers=2"),
        ("bert", {"positions": PositionsConfig(161, "tile")}, "original_max_length=161; allowed: at most 160"),
        ("roberta", {"positions": PositionsConfig(160, "tile")}, "original_max_length=160; allowed: at most 159"),
        ("bert", {"positions": PositionsConfig(24, "rotary")}, "mode='rotary', but the model has a position table"),
        ("llama", {"positions": PositionsConfig(24, "tile")}, "mode='tile', but the model has rotary embeddings"),
    ],
)
def test_a_section_must_fit_the_model(family: str, change: dict[str, Any], message: str) -> None:
    model = convert_model(tiny.base_model(family), "performer", num_features=8)
    if "positions" in change:
        change = {"positions": vars(change["positions"])}
    fields = {**model.config.to_dict(), "linear_attn": {**model.config.linear_attn, **change}}
    with pytest.raises(ValueError, match=re.escape(message)):
        type(model.config)(**fields)


def global_states() -> tuple[Any, ...]:
    state = np.random.get_state()
    return torch.get_rng_state().tolist(), (state[0], state[1].tolist(), *state[2:]), random.getstate()


SIDES = [(v, tiny.main_family(causal)) for causal in (False, True) for v in tiny.variants_for(tiny.main_family(causal))]


@tiny.over(SIDES)
def test_nothing_draws_from_the_global_generators(variant: str, family: str, tmp_path: Any) -> None:
    """Conversion, calibration, saving and reversion; a reload leaves them as upstream's own reload does."""
    model = tiny.base_model(family, **tiny.without_dropout(family))
    model.save_pretrained(tmp_path / "upstream")
    batches, options = [tiny.token_batch()], tiny.small_options(variant, family)
    before = global_states()
    convert_model(model, variant, calibration=batches, calibration_steps=2, **options)
    model.save_pretrained(tmp_path / "converted")
    revert_model(model)
    convert_model(model, variant)
    assert global_states() == before
    upstream_class = type(revert_model(model))
    torch.manual_seed(5)
    upstream_class.from_pretrained(tmp_path / "upstream")
    expected = global_states()
    torch.manual_seed(5)
    type(convert_model(model, variant)).from_pretrained(tmp_path / "converted")
    assert global_states() == expected
