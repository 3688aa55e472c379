"""Layers that were dropped, reordered or stacked: a layer is the place it stands in."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedModel

from hf_linear_attn import convert_model, list_variants, revert_model
from tests.tiny import (
    FAMILIES,
    assert_bit_equal,
    base_model,
    cached,
    causal_families,
    causal_lm,
    main_family,
    outputs_of,
    representative_variants,
    small_options,
    token_batch,
)

LAYERS = 4
Surgery = Callable[[list[nn.Module]], list[nn.Module]]
SURGERIES: dict[str, Surgery] = {
    "first three": lambda layers: layers[:3],
    "last two": lambda layers: layers[2:],
    "every second": lambda layers: layers[::2],
    "reversed": lambda layers: layers[::-1],
    "stacked": lambda layers: [*layers, *copy.deepcopy(layers[1:])],
}


def layers_of(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that holds the list of layers, and the list's name in it."""
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def operate(model: PreTrainedModel, surgery: Surgery, tell_config: bool = True) -> PreTrainedModel:
    """Apply `surgery` to the layers in memory, as people do."""
    owner, name = layers_of(model)
    layers = surgery(list(getattr(owner, name)))
    setattr(owner, name, nn.ModuleList(layers))
    if tell_config:
        model.config.num_hidden_layers = len(layers)
        if getattr(model.config, "layer_types", None) is not None:
            model.config.layer_types = ["full_attention"] * len(layers)
    return model


def model_of(family: str, **overrides: Any) -> PreTrainedModel:
    return base_model(family, num_hidden_layers=LAYERS, **overrides)


def built_with(family: str, surgery: Surgery) -> PreTrainedModel:
    """The same weights in a model that Transformers built with this many layers."""
    donor = operate(model_of(family), surgery, tell_config=False)
    count = len(getattr(*layers_of(donor)))
    model = base_model(family, num_hidden_layers=count)
    model.load_state_dict(donor.state_dict())
    return model


def choice(family: str, layer: int) -> tuple[str, dict[str, Any]] | None:
    """What layer `layer` runs in a mixed conversion: three kinds in turn."""
    kinds: list[tuple[str, dict[str, Any]] | None] = [
        (v, small_options(v, family)) for v in representative_variants(family)
    ]
    return [*kinds, None][layer % 3]


def running(model: PreTrainedModel) -> list[str]:
    """What each place runs, read off the modules."""
    found = []
    for layer in getattr(*layers_of(model)):
        variants = [m.linear_attn.spec.key for m in layer.modules() if hasattr(m, "linear_attn")]
        found.append(variants[0] if variants else "softmax")
    return found


def reported(model: PreTrainedModel) -> list[str]:
    rows = model.conversion_report.rows
    assert [row.layer for row in rows] == list(range(len(rows)))
    return [row.variant for row in rows]


MAIN = (main_family(False), main_family(True))
EACH = [pytest.param(family, marks=() if family in MAIN else pytest.mark.slow) for family in FAMILIES]


def told(config: Any) -> list[str]:
    assert config.num_hidden_layers == len(config.linear_attn["layers"])
    return ["softmax" if layer is None else layer["variant"] for layer in config.linear_attn["layers"]]


def assert_settled(model: PreTrainedModel, expected: list[str], folder: Path) -> None:
    """`model` runs, reports and saves `expected`, and comes back as it was."""
    outputs = outputs_of(model, token_batch())
    model.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder)
    for one in (model, again):
        assert running(one) == reported(one) == told(one.config) == expected
    assert_bit_equal(outputs_of(again, token_batch()), outputs)


@pytest.mark.parametrize("name", SURGERIES)
@pytest.mark.parametrize("family", EACH)
def test_conversion_after_surgery_goes_by_place(family: str, name: str, tmp_path: Path) -> None:
    reference = built_with(family, SURGERIES[name])
    count = reference.config.num_hidden_layers
    mapping = {place: choice(family, place) for place in range(count)}
    expected = outputs_of(convert_model(reference, mapping), token_batch())
    for tell_config in (True, False) if name != "stacked" else (True,):
        model = convert_model(operate(model_of(family), SURGERIES[name], tell_config), mapping)
        assert running(model) == running(reference)
        assert_bit_equal(outputs_of(model, token_batch()), expected)
        assert_settled(model, running(reference), tmp_path / str(tell_config))
        before = built_with(family, SURGERIES[name])
        assert_bit_equal(outputs_of(revert_model(model), token_batch()), outputs_of(before, token_batch()))
        assert model.config.num_hidden_layers == count


@pytest.mark.parametrize("name", SURGERIES)
@pytest.mark.parametrize("family", EACH)
def test_surgery_after_conversion_is_saved_as_it_stands(family: str, name: str, tmp_path: Path) -> None:
    mapping = {place: choice(family, place) for place in range(LAYERS)}
    for tell_config in (True, False) if name != "stacked" else (True,):
        model = convert_model(model_of(family), mapping)
        names = SURGERIES[name]([nn.Identity() for _ in range(LAYERS)])  # only how many
        operate(model, SURGERIES[name], tell_config)
        assert len(running(model)) == len(names)
        model.save_pretrained(tmp_path / "unused")  # before any forward
        assert told(AutoConfig.from_pretrained(tmp_path / "unused")) == running(model)
        assert_settled(model, running(model), tmp_path / str(tell_config))


@pytest.mark.parametrize("variant", list_variants(encoder=True))
def test_a_moved_layer_keeps_what_it_was_built_with(variant: str, tmp_path: Path) -> None:
    """Starts drawn per layer, and patterns that go by it, follow the layer into the checkpoint."""
    family = main_family(causal=False)
    model = convert_model(model_of(family), variant, **small_options(variant, family))
    operate(model, lambda layers: [layers[3], layers[1]])
    assert_settled(model, [variant] * 2, tmp_path)
    again = operate(AutoModel.from_pretrained(tmp_path), lambda layers: layers[::-1])
    assert_settled(again, [variant] * 2, tmp_path / "twice")


def test_options_with_one_value_per_layer_follow_their_layer(tmp_path: Path) -> None:
    model = convert_model(model_of("bert"), "longformer", window_size=[4, 8, 16, 32])
    operate(model, lambda layers: [layers[3], layers[1]])
    assert_settled(model, ["longformer"] * 2, tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert [m.linear_attn.window_size for m in again.modules() if hasattr(m, "linear_attn")] == [32, 8]


def test_measured_errors_follow_their_layer() -> None:
    model = convert_model(model_of("bert"), "linear", calibration=[token_batch()])
    errors = [row.output_error for row in model.conversion_report.rows]
    operate(model, lambda layers: [layers[3], layers[1]])
    assert [row.output_error for row in model.conversion_report.rows] == [errors[3], errors[1]]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", causal_families())
def test_decoders_decode_after_surgery(family: str, when: str) -> None:
    for surgery in SURGERIES.values():
        model = causal_lm(family, num_hidden_layers=LAYERS)
        mapping = {place: choice(main_family(causal=True), place) for place in range(2)}
        if when == "before":
            model = convert_model(operate(model, surgery), mapping)
        else:
            model = operate(convert_model(model, mapping), surgery)
        ids = token_batch(length=11)["input_ids"]
        with torch.no_grad():
            cache = DynamicCache()
            model(input_ids=ids[:, :7], **cached(model, cache))
            step = model(input_ids=ids[:, 7:], **cached(model, cache)).logits
            full = model(input_ids=ids, use_cache=False).logits[:, 7:]
        torch.testing.assert_close(step, full, rtol=1e-4, atol=1e-4)


def test_calibration_goes_by_place() -> None:
    reference = convert_model(built_with("bert", SURGERIES["reversed"]), "linear", calibration=[token_batch()])
    model = convert_model(operate(model_of("bert"), SURGERIES["reversed"]), "linear", calibration=[token_batch()])
    assert model.conversion_report.to_dict() == reference.conversion_report.to_dict()
    assert_bit_equal(outputs_of(model, token_batch()), outputs_of(reference, token_batch()))


def test_a_failed_conversion_leaves_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = operate(model_of("llama"), SURGERIES["reversed"])
    numbers = [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")]

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_linear_attn.convert.calibrate", fail)
    with pytest.raises(KeyboardInterrupt):
        convert_model(model, "linear", calibration=[token_batch()])
    assert [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")] == numbers
    assert model.config.num_hidden_layers == LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_one_module_in_two_places_is_refused(family: str, tmp_path: Path) -> None:
    def twice(layers: list[nn.Module]) -> list[nn.Module]:
        return [layers[0], layers[1], layers[0]]

    with pytest.raises(ValueError, match=r"Layers 0 and 2 are one and the same module.*deepcopy"):
        convert_model(operate(model_of(family), twice), {1: "linear"})
    model = operate(convert_model(model_of(family), "linear"), twice)
    for use in (lambda: outputs_of(model, token_batch()), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="Layers 0 and 2 are one and the same module"):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_more_layers_than_the_config_runs_are_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 7 layers.*num_hidden_layers=4"):
        convert_model(operate(model_of(family), SURGERIES["stacked"], tell_config=False), "linear")
    model = operate(convert_model(model_of(family), "linear"), SURGERIES["stacked"], tell_config=False)
    for use in (lambda: outputs_of(model, token_batch()), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"holds 7 layers.*num_hidden_layers=4"):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_load_alone(family: str, tmp_path: Path) -> None:
    model = convert_model(model_of(family), {place: choice(family, place) for place in range(LAYERS)})
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.num_hidden_layers = 2
    expected = outputs_of(operate(model, lambda layers: layers[:2]), token_batch())
    for options in ({"num_hidden_layers": 2}, {"config": config}):
        again = AutoModel.from_pretrained(tmp_path, **options)
        assert_bit_equal(outputs_of(again, token_batch()), expected)
        assert_settled(again, running(model), tmp_path / "again")
    with pytest.raises(ValueError, match=r"missing keys|layers has 4 entries for num_hidden_layers=6"):
        AutoModel.from_pretrained(tmp_path, num_hidden_layers=6)


def test_a_config_names_each_layer_once(tmp_path: Path) -> None:
    model = convert_model(model_of("bert"), "linear")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 6
    with pytest.raises(ValueError, match=r"layers has 4 entries for num_hidden_layers=6"):
        AutoModel.from_config(config)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    layers = stored["linear_attn"]["layers"]
    for wrong in (layers[:2], [*layers, None]):
        stored["linear_attn"]["layers"] = wrong
        (tmp_path / "config.json").write_text(json.dumps(stored))
        with pytest.raises(ValueError, match=rf"layers has {len(wrong)} entries for num_hidden_layers=4"):
            AutoConfig.from_pretrained(tmp_path)
    stored["linear_attn"]["layers"] = [{**layers[0], "built_for": [5, 4]}, *layers[1:]]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"built_for=\[5, 4\]"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_softmax_layer_in_the_place_of_a_converted_one_runs_as_softmax_does() -> None:
    """It came with a config of its own, and with ours it must not lose causality behind a padding mask."""
    softmax = causal_lm("llama")
    model = convert_model(copy.deepcopy(softmax), "memory")
    model.model.layers[1] = copy.deepcopy(softmax.model.layers[1])
    batch = token_batch()
    batch["attention_mask"][0, :9] = 0
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[real], softmax(**batch).logits[real], atol=1e-4, rtol=1e-4)
    assert [row.variant for row in model.conversion_report.rows] == ["memory", "softmax"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_whose_layers_were_dropped_generates(family: str) -> None:
    model = convert_model(causal_lm(family, num_hidden_layers=LAYERS), "linear")
    operate(model, lambda layers: layers[:2])
    batch, kwargs = token_batch(), {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    tokens = [model.generate(**batch, **kwargs, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*tokens)


def test_a_model_with_a_copy_of_its_config_still_switches_to_softmax() -> None:
    softmax = base_model("bert")
    model = convert_model(copy.deepcopy(softmax), "linear")
    model.config = copy.deepcopy(model.config)
    model.set_attn_implementation("sdpa")
    assert_bit_equal(outputs_of(model, token_batch()), outputs_of(softmax, token_batch()))


def test_a_model_whose_base_is_converted_already_is_refused_with_the_way_out() -> None:
    model = causal_lm("llama")
    convert_model(model.model, "linear")
    with pytest.raises(ValueError, match=r"already converted\. Revert it"):
        convert_model(model, "linear")
    revert_model(model.model)
    convert_model(model, "linear")


def test_no_layers_at_all_is_a_sentence(tmp_path: Path) -> None:
    convert_model(base_model("bert"), "linear").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_hidden_layers=0; allowed"):
        AutoModel.from_pretrained(tmp_path, num_hidden_layers=0)
