"""A feature map of the user's own in converted models: it trains, decodes, reloads by name, exports and compiles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM

from hf_linear_attn import convert_model, register_feature_map, unregister_feature_map
from hf_linear_attn.registry import get_variant
from hf_linear_attn.testing import Subject, applicable_laws
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from tests.exporting import LastHiddenState, export, largest_error
from tests.tiny import base_model, causal_lm, token_batch

NAME = "both_sides"
TAKERS = ["linear", "kernel_linformer", "retention", "gated"]


def both_sides(x: torch.Tensor) -> torch.Tensor:
    """Twice as many features as a head is wide."""
    return torch.cat([F.softplus(x), F.softplus(-x)], -1)


def softplus(x: torch.Tensor) -> torch.Tensor:
    return F.softplus(x)


def far_exponential(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    peak = x.amax(-1)
    return (x - peak[..., None]).exp(), peak


@pytest.fixture
def registered() -> Iterator[str]:
    register_feature_map(NAME, both_sides)
    yield NAME
    unregister_feature_map(NAME)


def layer(key: str, causal: bool, **options: Any) -> Any:
    spec = get_variant(key)
    context = LayerContext(0, 2, 24, 3, 8, 64, causal)
    return spec.module_class(spec.config_class.from_dict(options), context)


def draw(length: int = 40) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 3, length, 8, generator=generator, dtype=torch.float64).unbind(0)


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_attention_is_the_dense_formula(registered: str, causal: bool) -> None:
    q, k, v = draw()
    module = layer("linear", causal, feature_map=registered).double()
    scores = both_sides(q * 0.3**0.5) @ both_sides(k * 0.3**0.5).mT
    scores = scores.tril() if causal else scores
    output = module(AttentionInputs(q, k, v, None, causal, 0.3))[0]
    torch.testing.assert_close(output, scores @ v / scores.sum(-1, keepdim=True))


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_a_log_scale_keeps_large_exponentials_finite(causal: bool) -> None:
    q, k, v = draw()
    inputs = AttentionInputs(q, 300 * k, v, None, causal, 0.3)
    output = layer("linear", causal, feature_map=far_exponential).double()(inputs)[0]
    assert output.isfinite().all()
    torch.testing.assert_close(output, layer("linear", causal, feature_map="exp").double()(inputs)[0])


@pytest.mark.parametrize(
    ("law", "subject"),
    [
        pytest.param(law, subject, id=f"{law.name}-{'decoder' if subject.is_causal else 'encoder'}")
        for causal in (False, True)
        for subject in [Subject(get_variant("linear"), causal, {"feature_map": both_sides})]
        for law in applicable_laws(subject)
    ],
)
def test_contract(law: Any, subject: Subject) -> None:
    law(subject)


@pytest.mark.parametrize("key", TAKERS)
def test_every_method_that_takes_a_map_by_name_takes_it(key: str) -> None:
    spec = get_variant(key)
    model = causal_lm() if spec.decoder else base_model("bert")
    own = convert_model(model, key, feature_map=softplus).eval()
    batch = token_batch(batch=2, length=20)
    with torch.no_grad():
        output = own(**batch)[0]
    assert output.isfinite().all()
    model = causal_lm() if spec.decoder else base_model("bert")
    with torch.no_grad():
        other = convert_model(model, key, feature_map="elu").eval()(**batch)[0]
    assert not torch.allclose(output, other), "the map is not used"


def test_gates_of_a_feature_each_take_no_other_width(registered: str) -> None:
    assert layer("retention", True, feature_map=registered).num_features == 16
    with pytest.raises(ValueError, match="feature_map='both_sides' makes 16 features; allowed: 8"):
        layer("gated", True, feature_map=registered)


def test_a_model_trains_and_reloads_by_name(registered: str, tmp_path: Path) -> None:
    model = convert_model(base_model("bert"), "linear", feature_map=registered)
    batch = token_batch(batch=2, length=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(**batch).last_hidden_state[:, 0].sub(1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["linear_attn"]["layers"][0]["options"]["feature_map"] == NAME
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(**batch)[0], model(**batch)[0])


def test_a_reload_without_the_map_says_what_to_register(tmp_path: Path) -> None:
    register_feature_map(NAME, both_sides)
    try:
        convert_model(base_model("bert"), "linear", feature_map=NAME).save_pretrained(tmp_path)
    finally:
        unregister_feature_map(NAME)
    with pytest.raises(ValueError, match=rf"feature_map='{NAME}'.*register_feature_map\(name, function\)"):
        AutoModel.from_pretrained(tmp_path)


def test_generation_with_a_state_equals_generation_without(registered: str) -> None:
    model = convert_model(causal_lm(), "linear", feature_map=registered)
    batch = token_batch(batch=2, length=12)
    kwargs = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(**batch, use_cache=True, **kwargs), model.generate(**batch, use_cache=False, **kwargs)
    )


def test_a_function_works_but_is_not_saved(tmp_path: Path) -> None:
    def own(x: torch.Tensor) -> torch.Tensor:
        return x.square()

    model = convert_model(causal_lm(), "linear", feature_map=own).eval()
    batch = token_batch(batch=2, length=12)
    with torch.no_grad():
        expected = model(**batch).logits
    assert "own" in repr(model.config)  # a config is JSON, whatever it was made with
    with pytest.raises(ValueError, match=r"layers\[0\]: feature_map is a function .*own.*register_feature_map"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists(), "a refused save left files"
    with pytest.raises(ValueError, match="given in Python"):
        model.config.save_pretrained(tmp_path / "config")

    register_feature_map("own", own)  # nothing that was trained is lost
    try:
        model.save_pretrained(tmp_path / "model")
        with torch.no_grad():
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(**batch).logits
        assert torch.equal(again, expected)
    finally:
        unregister_feature_map("own")


def test_what_is_no_feature_map_changes_no_model() -> None:
    model = base_model("bert")
    for given, error, message in (
        (lambda x: x.softmax(-2), ValueError, "depend on other tokens"),
        (torch.nn.Softplus(), TypeError, "module Softplus"),
        ("softplus", ValueError, "feature_map='softplus'; allowed: elu, exp, relu, softmax, squared_relu"),
    ):
        with pytest.raises(error, match=message):
            convert_model(model, "linear", feature_map=given)
        assert type(model) is type(base_model("bert"))


@pytest.mark.parametrize("masked", [True, False])
def test_an_exported_encoder_is_right_at_other_shapes(registered: str, masked: bool) -> None:
    model = LastHiddenState(convert_model(base_model("bert"), "linear", feature_map=registered)).eval()
    assert largest_error(model, export(model, masked=masked).module(), masked=masked) < 1e-4
