"""Random features drawn anew in a whole model: what changes, what stays, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import EncoderDecoderModel

from hf_linear_attn import convert_model, redraw_features
from hf_linear_attn.calibration import variants_by_layer
from tests.small_stages import masked_lm, peaked, weights
from tests.tiny import base_model, causal_lm, token_batch

DIRECTIONS = {"omega", "width"}
DRAWING: list[tuple[str, dict[str, Any]]] = [
    ("performer", {"num_features": 16}),
    ("rfa", {"num_features": 16}),
    ("linear", {"feature_map": "rbf", "num_features": 16}),
    ("linear", {"feature_map": "laplace", "num_features": 16}),
    ("linear", {"feature_map": "laplace", "num_features": 16, "random_features": "fourier"}),
]
METHODS = pytest.mark.parametrize(("variant", "options"), DRAWING)
FITTING = "ignore:(performer|rfa|linear), layer"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**token_batch()).logits


@METHODS
@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
@pytest.mark.filterwarnings(FITTING)
def test_gives_what_a_conversion_with_this_seed_would(variant: str, options: dict[str, Any], decoder: bool) -> None:
    softmax = causal_lm("gpt2") if decoder else masked_lm()
    model, other = (convert_model(copy.deepcopy(softmax), variant, **options, seed=seed) for seed in (0, 7))
    before = logits(model)
    assert redraw_features(model, seed=7) == 7
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), logits(other))
    redraw_features(model, seed=0)
    assert torch.equal(logits(model), before)


@METHODS
@pytest.mark.filterwarnings(FITTING)
def test_what_calibration_chose_stays_and_is_worth_as_much(variant: str, options: dict[str, Any]) -> None:
    """Averaged over draws, a calibrated start stays closer to softmax than the published one."""
    softmax, batch = peaked(masked_lm()), token_batch()
    published = convert_model(copy.deepcopy(softmax), variant, **{**options, "num_features": 64})
    model = convert_model(copy.deepcopy(softmax), variant, calibration=[batch], **{**options, "num_features": 64})
    before, exact = weights(model), logits(softmax)
    errors: dict[str, list[torch.Tensor]] = {"published": [], "calibrated": []}
    for seed in range(1, 9):
        for name, tried in {"published": published, "calibrated": model}.items():
            redraw_features(tried, seed)
            errors[name].append((logits(tried) - exact).norm())
    changed = {name.rpartition(".")[2] for name, x in weights(model).items() if not torch.equal(x, before[name])}
    assert changed <= DIRECTIONS
    assert "omega" in changed
    assert torch.stack(errors["calibrated"]).mean() < torch.stack(errors["published"]).mean()


def test_without_a_seed_torch_decides_and_the_seed_is_told() -> None:
    model = convert_model(masked_lm(), "performer", num_features=16)
    torch.manual_seed(3)
    first, second = redraw_features(model), redraw_features(model)
    drawn = weights(model)
    torch.manual_seed(3)
    assert redraw_features(model) == first != second
    redraw_features(model, second)
    assert all(torch.equal(x, drawn[name]) for name, x in weights(model).items())


def test_layers_without_random_features_stay() -> None:
    model = convert_model(masked_lm(), {0: "hedgehog", 1: ("performer", {"num_features": 16})})
    before = weights(variants_by_layer(model)[0])
    redraw_features(model, 5)
    assert all(torch.equal(x, before[name]) for name, x in weights(variants_by_layer(model)[0]).items())
    other = convert_model(masked_lm(), "performer", num_features=16, seed=5)
    drawn = [variants_by_layer(x)[1].get_buffer("omega") for x in (model, other)]
    assert torch.equal(*drawn)


def test_a_saved_model_has_the_new_directions(tmp_path: Any) -> None:
    model = convert_model(masked_lm(), "performer", num_features=16).half()
    redraw_features(model, 5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float16)
    assert torch.equal(variants_by_layer(again)[1].get_buffer("omega"), variants_by_layer(model)[1].get_buffer("omega"))
    assert variants_by_layer(model)[1].get_buffer("omega").dtype == torch.float16


def test_a_part_of_a_composite_is_found() -> None:
    composite = EncoderDecoderModel(encoder=base_model("bert"), decoder=causal_lm("gpt2", add_cross_attention=True))
    composite.config.encoder = convert_model(composite.encoder, "performer", num_features=16).config
    before = weights(composite)
    redraw_features(composite, 1)
    moved = [name for name, x in weights(composite).items() if not torch.equal(x, before[name])]
    assert moved
    assert all(name.startswith("encoder.") and name.endswith("omega") for name in moved)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_follows(in_place: bool) -> None:
    model = convert_model(masked_lm(), "performer", num_features=16)
    other = convert_model(masked_lm(), "performer", num_features=16, seed=7)
    compiled = model
    if in_place:
        model.compile(backend="aot_eager")
    else:
        compiled = torch.compile(model, backend="aot_eager")
    before = logits(compiled)
    redraw_features(compiled, 7)
    torch.testing.assert_close(logits(compiled), logits(other))
    assert not torch.allclose(logits(compiled), before)
    torch._dynamo.reset()


@pytest.mark.parametrize("seed", [-1, 2**31, True, 0.5, "0"])
def test_a_bad_seed_is_named(seed: Any) -> None:
    model = convert_model(masked_lm(), "performer", num_features=16)
    before = weights(model)
    with pytest.raises(ValueError, match=r"seed=.*; allowed: an integer from 0 to 2147483647, or None"):
        redraw_features(model, seed)
    assert all(torch.equal(x, before[name]) for name, x in weights(model).items())


@pytest.mark.parametrize("model", [masked_lm(), torch.nn.Linear(2, 2), "bert"], ids=["softmax", "layer", "name"])
def test_what_is_not_converted_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=f"{type(model).__name__} was not converted"):
        redraw_features(model)


def test_a_model_without_random_features_is_refused_with_what_it_runs() -> None:
    model = convert_model(masked_lm(), "linear", feature_map="exp")
    with pytest.raises(ValueError, match=r"No layer of .* has random features.* linear \(feature_map='exp'"):
        redraw_features(model)


def test_weights_that_are_not_here_are_refused() -> None:
    model = convert_model(masked_lm(), "performer", num_features=16)
    empty = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match=r"Layer 0: omega.* of performer hold no data here"):
        redraw_features(empty, 1)
    offloaded = cpu_offload(copy.deepcopy(model), torch.device("cpu"), offload_buffers=True)
    with pytest.raises(ValueError, match="offloaded"):
        redraw_features(offloaded, 1)
    redraw_features(cpu_offload(model, torch.device("cpu")), 1)  # its buffers are here
