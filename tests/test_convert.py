"""The verb: what it changes, what it refuses, and that nothing is changed when it refuses."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from hf_linear_attn import convert_model, extend_positions, get_variant, list_variants, revert_model
from hf_linear_attn.auto import attach
from hf_linear_attn.registry import get_patcher
from tests.tiny import (
    FAMILIES,
    assert_bit_equal,
    base_model,
    build,
    causal_lm,
    head_classes,
    inputs_for,
    is_causal,
    outputs_of,
    over,
    pairs,
    representative_variants,
    small_options,
    thorough_pairs,
    tiny_config,
    token_batch,
)

HEADS = [(family, cls) for family in FAMILIES for cls in head_classes(family)]
HEAD_IDS = [cls.__name__ for _, cls in HEADS]
TABLE_HEADS = [(family, cls) for family, cls in HEADS if not get_patcher(family).rotary]


def snapshot(model: nn.Module) -> tuple[type, dict[str, torch.Tensor], dict, list[type]]:
    return (
        type(model),
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        copy.deepcopy(model.config.to_dict()),
        [type(module) for module in model.modules()],
        {name for name in vars(model) if not name.startswith("_output_capturing")},
    )


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    after = snapshot(model)
    assert after[0] is before[0]
    assert after[2] == before[2]
    assert after[3:] == before[3:]
    assert after[1].keys() == before[1].keys()
    assert all(torch.equal(after[1][name], before[1][name]) for name in before[1])


@pytest.mark.parametrize(("family", "cls"), HEADS, ids=HEAD_IDS)
def test_every_head_converts_runs_and_reverts_bit_exactly(family: str, cls: type) -> None:
    model = build(cls, tiny_config(family))
    batch = token_batch()
    softmax = outputs_of(model, batch)
    before = snapshot(model)
    for variant in representative_variants(family):
        assert convert_model(model, variant, **small_options(variant, family)) is model
        converted = outputs_of(model, batch)
        assert all(torch.isfinite(tensor).all() for tensor in converted)
        assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(softmax, converted, strict=True)), variant
        assert revert_model(model) is model
        assert_unchanged(model, before)
        assert_bit_equal(outputs_of(model, batch), softmax)


@over(pairs())
def test_every_variant_converts_and_reverts_bit_exactly(variant: str, family: str) -> None:
    model = base_model(family)
    batch = token_batch()
    softmax, before = outputs_of(model, batch), snapshot(model)
    attributes = [set(vars(module)) for module in model.modules()]
    convert_model(model, variant, max_length=200, **small_options(variant, family))
    assert all(torch.isfinite(tensor).all() for tensor in outputs_of(model, batch))
    revert_model(model)
    assert_unchanged(model, before)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert_bit_equal(outputs_of(model, batch), softmax)


@over(pairs())
def test_report_counts_what_was_added(variant: str, family: str) -> None:
    model = base_model(family)
    before = sum(p.numel() for p in model.parameters())
    convert_model(model, variant, **small_options(variant, family))
    report = model.conversion_report
    assert report.new_parameters == sum(p.numel() for p in model.parameters()) - before
    assert [row.variant for row in report.rows] == [variant] * 2
    assert all(row.state == get_variant(variant).state for row in report.rows)
    assert all(row.output_error is None for row in report.rows)
    assert variant in str(report)
    assert report.to_dict()["rows"][0]["variant"] == variant


@over(pairs())
def test_new_parameters_live_in_one_submodule(variant: str, family: str) -> None:
    model = base_model(family)
    names = set(model.state_dict())
    convert_model(model, variant, **small_options(variant, family))
    assert all(".linear_attn." in name for name in set(model.state_dict()) - names)


@over(thorough_pairs())
def test_calibration_measures_the_error_against_softmax(variant: str, family: str) -> None:
    model = base_model(family)
    batch = token_batch()
    batch["attention_mask"][1, 20:] = 0
    captured: list[torch.Tensor] = []
    convert_model(model, variant, calibration=[batch], **small_options(variant, family))
    report = model.conversion_report
    assert all(0.0 <= row.output_error < 10.0 and -1.0 <= row.output_cosine <= 1.0 for row in report.rows)

    # An independent measurement of layer 0, whose input does not depend on the conversion: what the module hands
    # to its output projection, which stands inside the module or (BERT) behind it.
    first = next(module for module in model.modules() if hasattr(module, "linear_attn"))
    inside = [child for name, child in first.named_children() if name in ("c_proj", "o_proj", "out_lin")]
    if inside:
        handle = inside[0].register_forward_pre_hook(lambda _m, args: captured.append(args[0]))
    else:
        handle = first.register_forward_hook(lambda _m, _args, output: captured.append(output[0]))
    outputs_of(model, batch)
    model.set_attn_implementation("eager")
    outputs_of(model, batch)
    handle.remove()
    ours, softmax = captured
    real = batch["attention_mask"].bool()
    error = ((ours - softmax)[real].norm() / softmax[real].norm()).item()
    assert report.rows[0].output_error == pytest.approx(error, rel=1e-3, abs=1e-5)


def test_a_dict_chooses_per_layer_and_leaves_the_rest_softmax() -> None:
    model = base_model("bert", num_hidden_layers=4)
    convert_model(model, {0: None, 1: "linear", 2: ("longformer", {"window_size": 8})})
    assert [row.variant for row in model.conversion_report.rows] == ["softmax", "linear", "longformer", "softmax"]
    assert model.encoder.layer[2].attention.self.linear_attn.config.window_size == 8


def test_layers_limits_the_conversion() -> None:
    model = convert_model(base_model("bert", num_hidden_layers=4), "performer", layers=range(1, 3))
    assert [row.variant for row in model.conversion_report.rows] == ["softmax", "performer", "performer", "softmax"]


def test_softmax_layers_of_a_hybrid_compute_what_upstream_computes() -> None:
    """The one converted layer comes last, so everything below it must be upstream's own softmax."""
    for family in FAMILIES:
        model = base_model(family, num_hidden_layers=3)
        batch = token_batch()
        batch["attention_mask"][0, :9] = 0
        with torch.no_grad():
            expected = model(**batch, output_hidden_states=True).hidden_states[2]
            convert_model(model, "linear", layers=[2])
            got = model(**batch, output_hidden_states=True).hidden_states[2]
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)


def test_softmax_is_one_switch_away() -> None:
    model = base_model("bert")
    batch = token_batch()
    softmax = outputs_of(model, batch)
    convert_model(model, "linear")
    converted = outputs_of(model, batch)
    model.set_attn_implementation("sdpa")
    assert_bit_equal(outputs_of(model, batch), softmax)
    model.set_attn_implementation("linear_attn")
    assert_bit_equal(outputs_of(model, batch), converted)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_recorded_after_conversion(family: str) -> None:
    model = base_model(family)
    convert_model(model, "linear")
    with torch.no_grad():
        out = model(**token_batch(), output_hidden_states=True)
    assert len(out.hidden_states) == 3


def test_a_shared_config_object_is_not_corrupted() -> None:
    config = tiny_config("bert")
    left, right = build(BertModel, config), build(BertModel, config, seed=1)
    batch = token_batch()
    before = outputs_of(right, batch)
    convert_model(left, "linear")
    assert right.config is config
    assert type(config) is BertConfig
    assert_bit_equal(outputs_of(right, batch), before)


def test_reverting_restores_the_implementation_that_was_chosen() -> None:
    model = base_model("bert")
    model.set_attn_implementation("eager")
    eager = outputs_of(model, token_batch())
    revert_model(convert_model(model, "linear"))
    assert model.config._attn_implementation == "eager"
    assert_bit_equal(outputs_of(model, token_batch()), eager)


def test_train_mode_and_requires_grad_survive() -> None:
    model = base_model("bert").train()
    model.embeddings.requires_grad_(False)
    convert_model(model, "longformer", window_size=8, max_length=300)
    assert all(module.training for module in model.modules())
    assert not model.embeddings.position_embeddings.weight.requires_grad


def test_dtype_follows_the_layer() -> None:
    model = base_model("bert").to(torch.bfloat16)
    convert_model(model, "longformer", window_size=8)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert outputs_of(model, token_batch())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("family", [family for family in FAMILIES if not get_patcher(family).rotary])
def test_longformer_globals_start_as_copies_of_the_checkpoint(family: str) -> None:
    model = base_model(family)
    hidden = torch.randn(2, 5, 32)
    convert_model(model, "longformer", window_size=8, num_global_tokens=2)
    attention = next(m for m in model.modules() if hasattr(m, "linear_attn"))
    query, key, value = (getattr(attention, name)(hidden) for name in get_patcher(family).projection_names)
    if query.shape[-1] > 32:  # GPT-2 has them side by side
        query, key, value = query.split(32, dim=-1)
    variant = attention.linear_attn
    got = (variant.query_global(hidden), variant.key_global(hidden), variant.value_global(hidden))
    for a, b in zip(got, (query, key, value), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# --- positions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in FAMILIES if not get_patcher(family).rotary])
def test_max_length_extends_everything_together(family: str) -> None:
    model = base_model(family)
    limit = get_patcher(family).max_length(model.config)
    short = token_batch(length=50)
    convert_model(model, "linear")
    expected = outputs_of(model, short)
    revert_model(model)
    convert_model(model, "linear", max_length=400)
    assert model.conversion_report.tokenizer_max_length == 400
    assert_bit_equal(outputs_of(model, short), expected)
    long = token_batch(length=400)
    assert outputs_of(model, long)[0].shape[1] == 400
    revert_model(model)
    assert model.config.max_position_embeddings == 160
    with pytest.raises((IndexError, RuntimeError)):
        outputs_of(model, token_batch(length=limit + 1))


def test_tiling_repeats_the_usable_rows_and_keeps_the_offset() -> None:
    model = base_model("roberta", pad_token_id=1)
    table = model.embeddings.position_embeddings.weight.detach().clone()
    convert_model(model, "linear", max_length=400)
    new = model.embeddings.position_embeddings.weight
    assert new.shape[0] == 402
    assert torch.equal(new[:160], table)
    assert torch.equal(new[160:318], table[2:])
    assert torch.equal(new[318:], table[2:86])
    assert model.config.max_position_embeddings == 402


def test_interpolation_keeps_the_ends_and_reverts() -> None:
    model = base_model("bert")
    table = model.embeddings.position_embeddings.weight.detach().clone()
    convert_model(model, "linear", max_length=319, extend="interpolate")
    new = model.embeddings.position_embeddings.weight
    torch.testing.assert_close(new[0], table[0])
    torch.testing.assert_close(new[-1], table[-1])
    torch.testing.assert_close(new[1], (table[0] + table[1]) / 2)
    revert_model(model)
    assert torch.equal(model.embeddings.position_embeddings.weight, table)


def test_extend_positions_serves_softmax_models_too() -> None:
    model = base_model("gpt2")
    before = outputs_of(model, token_batch(length=100))
    assert extend_positions(model, 400) is model
    assert_bit_equal(outputs_of(model, token_batch(length=100)), before)
    assert outputs_of(model, token_batch(length=400))[0].shape[1] == 400
    assert model.config.max_position_embeddings == 400


def test_keep_positions_keeps_them() -> None:
    model = convert_model(base_model("bert"), "linear", max_length=400)
    revert_model(model, keep_positions=True)
    assert model.config.max_position_embeddings == 400
    assert outputs_of(model, token_batch(length=400))[0].shape[1] == 400


# --- refusals --------------------------------------------------------------------------------------------------

REFUSALS = {
    "typo": (("performr",), {}, "Did you mean 'performer'"),
    "unknown": (("zzz",), {}, f"Available: {', '.join(list_variants())}"),
    "option": (("performer",), {"num_feature": 3}, "Allowed: .*num_features"),
    "value": (("longformer",), {"window_size": 7}, "window_size"),
    "layer": (("linear",), {"layers": [0, 9]}, r"\[9\].*layers 0 to 1"),
    "no layer": (({0: None},), {}, "No layer is converted"),
    "both": (({0: "linear"},), {"layers": [0]}, "not both"),
    "shorter": (("linear",), {"max_length": 10}, "at least 160"),
    "extend": (("linear",), {"max_length": 300, "extend": "repeat"}, "'tile', 'interpolate'"),
    "calibration empty": (("linear",), {"calibration": []}, "no batch"),
    "calibration one batch": (("linear",), {"calibration": {"input_ids": 1}}, r"\[batch\]"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_calls_say_what_is_allowed_and_change_nothing(case: str) -> None:
    args, kwargs, message = REFUSALS[case]
    model = base_model("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        convert_model(model, *args, **kwargs)
    assert_unchanged(model, before)


def test_a_calibration_that_fails_leaves_the_model_as_it_was() -> None:
    model = base_model("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match="input_ids"):
        convert_model(model, "linear", max_length=300, calibration=[token_batch(), {"no_such_argument": torch.ones(1)}])
    assert_unchanged(model, before)
    convert_model(model, "linear")


def test_an_interrupt_while_variants_are_attached_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_model("bert")
    before = snapshot(model)

    def interrupted(*args: object) -> None:
        attach(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_linear_attn.convert.attach", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_model(model, "linear", max_length=300, extend="interpolate")
    assert_unchanged(model, before)


def test_an_encoder_only_variant_is_refused_on_a_decoder() -> None:
    for model in (base_model("gpt2"), causal_lm("bert")):
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"serves encoders only.*longformer|serves encoders only.*performer"):
            convert_model(model, "linformer")
        assert_unchanged(model, before)


class OtherConfig(BertConfig):
    model_type = "other"


class OtherModel(BertModel):
    config_class = OtherConfig


def test_unknown_family_lists_the_known_ones() -> None:
    model = OtherModel(OtherConfig(**tiny_config("bert").to_dict() | {"model_type": "other"}))
    with pytest.raises(ValueError, match=rf"'other'.*{', '.join(FAMILIES)}"):
        convert_model(model, "linear")


def test_double_conversion_is_refused() -> None:
    model = convert_model(base_model("bert"), "linear")
    with pytest.raises(ValueError, match="already converted"):
        convert_model(model, "performer")
    with pytest.raises(ValueError, match="was not converted"):
        revert_model(base_model("bert"))


def test_compiled_meta_wrapped_and_foreign_models_are_refused() -> None:
    with pytest.raises(ValueError, match="compiled"):
        convert_model(torch.compile(base_model("bert")), "linear")
    inplace = base_model("bert")
    inplace.compile()
    with pytest.raises(ValueError, match="compiled"):
        convert_model(inplace, "linear")
    with torch.device("meta"):
        meta = BertModel(tiny_config("bert"))
    with pytest.raises(ValueError, match="meta"):
        convert_model(meta, "linear")
    with pytest.raises(TypeError, match="Linear"):
        convert_model(nn.Linear(3, 3), "linear")

    class Custom(BertForSequenceClassification):
        pass

    with pytest.raises(ValueError, match="Custom"):
        convert_model(Custom(tiny_config("bert")), "linear")


def test_four_dimensional_masks_are_refused() -> None:
    for family in FAMILIES:
        model = convert_model(base_model(family), "linear")
        batch = token_batch()
        batch["attention_mask"] = torch.ones(2, 1, 37, 37, dtype=torch.bool)
        with pytest.raises(ValueError, match="4-D mask"):
            model(**batch)


@pytest.mark.parametrize(("family", "cls"), HEADS, ids=HEAD_IDS)
def test_output_attentions_is_refused(family: str, cls: type) -> None:
    model = convert_model(build(cls, tiny_config(family)), "linear")
    with pytest.raises(ValueError, match="output_attentions"):
        model(**inputs_for(model, token_batch()), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    model.set_attn_implementation("eager")
    out = model(**inputs_for(model, token_batch()), output_attentions=True)
    assert len(out.attentions) == 2


def test_global_attention_mask_needs_a_variant_that_honors_it() -> None:
    batch = token_batch()
    mask = torch.zeros_like(batch["input_ids"])
    mask[:, 3] = 1
    with pytest.raises(ValueError, match="global_attention_mask"):
        convert_model(base_model("bert"), "linear")(**batch, global_attention_mask=mask)
    model = convert_model(base_model("bert"), "longformer", window_size=4)
    with torch.no_grad():
        default, chosen = model(**batch)[0], model(**batch, global_attention_mask=mask)[0]
    assert not torch.allclose(default, chosen, atol=1e-4)
    with pytest.raises(ValueError, match="shape"):
        model(**batch, global_attention_mask=mask[:, :5])


def test_a_decoder_flag_changed_after_building_is_refused() -> None:
    model = convert_model(base_model("bert"), "linear")
    model.config.is_decoder = True
    with pytest.raises(ValueError, match="is_decoder"):
        model(**token_batch())


def test_the_function_refuses_models_that_were_not_converted() -> None:
    model = base_model("bert")
    model.set_attn_implementation("linear_attn")
    with pytest.raises(ValueError, match="was not converted"):
        model(**token_batch())


def test_dropout_is_announced_once() -> None:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_linear_attn.attention")
    logger.addHandler(handler)
    try:
        model = convert_model(base_model("bert", attention_probs_dropout_prob=0.37), "linear").train()
        model(**token_batch())
        model(**token_batch())
    finally:
        logger.removeHandler(handler)
    assert [message for message in messages if "dropout (0.37)" in message] == messages[:1] != []


@pytest.mark.parametrize(("family", "cls"), TABLE_HEADS, ids=[cls.__name__ for _, cls in TABLE_HEADS])
def test_calibration_and_global_tokens_reach_the_layers_of_every_head(family: str, cls: type) -> None:
    model = build(cls, tiny_config(family))
    batch = inputs_for(model, token_batch())
    labeled = {**batch, "labels": torch.zeros(2, dtype=torch.long)}
    convert_model(model, "longformer", window_size=4, num_global_tokens=1, calibration=[labeled])
    assert all(row.output_error is not None for row in model.conversion_report.rows)
    chosen = torch.zeros_like(batch["input_ids"])
    chosen[..., 3] = 1
    extra = {"use_cache": False} if is_causal(family) else {}
    with torch.no_grad():
        default, moved = model(**batch, **extra)[0], model(**batch, **extra, global_attention_mask=chosen)[0]
    assert not torch.allclose(default, moved, atol=1e-5)
