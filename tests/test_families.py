"""What sets model families apart: names, grouped keys, rotary embeddings, sliding windows, narrow embeddings."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    DistilBertModel,
    DynamicCache,
    ElectraModel,
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicLayer
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping

from hf_linear_attn import convert_model, extend_positions, revert_model
from hf_linear_attn.auto_config import config_class_for
from hf_linear_attn.convert import logger
from hf_linear_attn.model_card import model_card
from hf_linear_attn.registry import get_patcher
from tests.test_auto import tiny_tokenizer
from tests.test_convert import assert_unchanged, snapshot
from tests.tiny import (
    FAMILIES,
    PAD,
    assert_bit_equal,
    base_model,
    build,
    cached,
    causal_families,
    causal_lm,
    head_classes,
    is_causal,
    outputs_of,
    representative_variants,
    small_options,
    tiny_config,
    token_batch,
)

DECODERS = [family for family in FAMILIES if is_causal(family)]
OFFSET = [family for family in FAMILIES if get_patcher(family).position_offset(tiny_config(family)) > 0]
ROTARY = [family for family in FAMILIES if get_patcher(family).rotary]
# Families that may give a sliding window to some layers only, and a config that does.
WINDOWS: dict[str, dict[str, Any]] = {
    family: {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    for family in ROTARY
    if "use_sliding_window" in {field.name for field in dataclasses.fields(get_patcher(family).config_class)}
}
for fields in WINDOWS.values():
    fields.update(use_sliding_window=True, num_hidden_layers=3)


def recorded(model: Any, batch: dict[str, torch.Tensor]) -> list[Any]:
    """(module, inputs) of every converted layer in one forward."""
    calls: list[Any] = []
    with torch.no_grad():
        model(**batch, linear_attn_recorder=lambda module, inputs, _out: calls.append((module, inputs)))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patcher_names_what_is_there(family: str) -> None:
    patcher = get_patcher(family)
    assert patcher.config_class.model_type == family
    model = base_model(family)
    found = patcher.self_attentions(model)
    assert [attention.layer_idx for attention in found] == [0, 1]
    assert all(model.get_submodule(name) is module for _, name, module in found)
    assert (patcher.position_table(model) is None) == patcher.rotary
    convert_model(model, "linear")
    assert model.config.model_type == f"linear_attn_{family}"
    assert type(AutoConfig.for_model(model.config.model_type)) is type(model.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_give_what_the_attention_function_receives(family: str) -> None:
    """For every query head; only values are as projected in families that rotate (or normalize) queries and keys."""
    patcher = get_patcher(family)
    model = convert_model(base_model(family), "linear")
    for module, inputs in recorded(model, token_batch()):
        given = (inputs.query, inputs.key, inputs.value)
        heads, width = model.config.num_attention_heads, patcher.head_dim(model.config)
        assert all(tensor.shape == (2, heads, 37, width) for tensor in given)
        for index, (tensor, projection) in enumerate(zip(given, patcher.projections(module), strict=True)):
            assert projection.weight.shape == (heads * width, model.config.hidden_size)
            expected = F.linear(inputs.hidden_states, *projection).unflatten(-1, (heads, width)).transpose(1, 2)
            if not patcher.rotary or index == 2:
                torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_familys_own_classes_are_registered(family: str) -> None:
    """Auto classes may know a config through models of other families that take this one as their inner part."""
    config_class = config_class_for(family)
    convert_model(base_model(family), "linear")
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and isinstance(mapping, _LazyAutoMapping) and config_class in mapping:
            found = mapping[config_class]
            for cls in found if isinstance(found, (list, tuple)) else (found,):
                assert cls.__bases__[1] in head_classes(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_load_as_they_do_for_the_checkpoint(family: str, tmp_path: Path) -> None:
    model = base_model(family)
    model.save_pretrained(tmp_path / "softmax")
    convert_model(model, "linear").save_pretrained(tmp_path / "converted")
    tiny_tokenizer(tmp_path / "softmax")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "softmax")
    tokenizer.save_pretrained(tmp_path / "converted")
    again = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert type(again) is type(tokenizer)
    assert again("w1 w2")["input_ids"] == tokenizer("w1 w2")["input_ids"]


# --- encoders ---------------------------------------------------------------------------------------------------


def test_distilbert_modules_are_numbered_only_while_converted() -> None:
    model = base_model("distilbert", num_hidden_layers=3)
    attentions = [layer.attention for layer in model.transformer.layer]
    convert_model(model, "linear", layers=[0, 2])
    assert [row.variant for row in model.conversion_report.rows] == ["linear", "softmax", "linear"]
    assert [attention.layer_idx for attention in attentions] == [0, 1, 2]
    revert_model(model)
    assert not any(hasattr(attention, "layer_idx") for attention in attentions)


def test_distilbert_with_sinusoidal_positions_extends_and_reloads(tmp_path: Path) -> None:
    model = DistilBertModel(tiny_config("distilbert", sinusoidal_pos_embds=True)).eval()
    table = model.embeddings.position_embeddings.weight.detach().clone()
    convert_model(model, "linear", max_length=250)
    assert torch.equal(model.embeddings.position_embeddings.weight, torch.cat([table, table[:90]]))
    batch = token_batch(length=250)
    expected = outputs_of(model, batch)
    model.save_pretrained(tmp_path)
    assert_bit_equal(outputs_of(AutoModel.from_pretrained(tmp_path), batch), expected)


def test_electra_extends_a_table_that_is_narrower_than_its_layers() -> None:
    model = ElectraModel(tiny_config("electra")).eval()
    assert model.embeddings.position_embeddings.weight.shape == (160, 16)
    convert_model(model, "longformer", window_size=8, max_length=250)
    assert model.embeddings.position_embeddings.weight.shape == (250, 16)
    assert outputs_of(model, token_batch(length=250))[0].shape == (2, 250, 32)


@pytest.mark.parametrize("family", OFFSET)
def test_positions_after_the_padding_index_are_kept(family: str) -> None:
    model = base_model(family, pad_token_id=1)
    patcher = get_patcher(family)
    assert (patcher.position_offset(model.config), patcher.max_length(model.config)) == (2, 158)
    convert_model(model, "linear", max_length=200)
    assert model.embeddings.position_embeddings.weight.shape[0] == model.config.max_position_embeddings == 202
    assert outputs_of(model, token_batch(length=200))[0].shape[1] == 200


# --- grouped keys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ROTARY)
def test_grouped_keys_equal_keys_written_out_for_every_head(family: str) -> None:
    grouped = base_model(family)
    written_out = build(type(grouped), tiny_config(family, num_key_value_heads=4))
    state = grouped.state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = tensor.unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
    written_out.load_state_dict(state)
    batch = token_batch()
    for variant in representative_variants(family):
        outputs = []
        for model in (grouped, written_out):
            convert_model(model, variant, calibration=[batch], **small_options(variant, family))
            outputs.append(outputs_of(model, batch)[0])
            revert_model(model)
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


def test_one_key_for_all_heads() -> None:
    model = causal_lm("llama", num_key_value_heads=1)
    convert_model(model, "linear")
    batch = token_batch(length=12)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(model.generate(**batch, **kwargs), model.generate(**batch, use_cache=False, **kwargs))


# --- decoders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", causal_families())
def test_logits_may_be_asked_for_the_last_tokens_only(family: str) -> None:
    model = convert_model(causal_lm(family), "linear")
    batch = token_batch()
    with torch.no_grad():
        all_logits = model(**batch).logits
        torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, all_logits[:, -2:])


# --- rotary embeddings: no position table -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ROTARY)
def test_a_new_limit_of_a_rotary_family_changes_the_config_only(family: str, tmp_path: Path) -> None:
    model = base_model(family)
    short, long = token_batch(length=50), token_batch(length=300)
    parameters = {name: tensor.shape for name, tensor in model.named_parameters()}
    convert_model(model, "linear")
    expected = [outputs_of(model, batch) for batch in (short, long)]  # rotary embeddings have no end of their own
    revert_model(model)
    convert_model(model, "linear", max_length=300)
    assert model.config.max_position_embeddings == model.conversion_report.tokenizer_max_length == 300
    assert model.config.linear_attn["positions"] == {"original_max_length": 160, "mode": "rotary"}
    assert "the base model read 160; extended without a change to its rotary embeddings" in str(model_card(model))
    for batch, outputs in zip((short, long), expected, strict=True):
        assert_bit_equal(outputs_of(model, batch), outputs)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert_bit_equal(outputs_of(again, long), expected[1])
    for converted in (model, again):
        revert_model(converted)
        assert converted.config.max_position_embeddings == 160
        assert {name: tensor.shape for name, tensor in converted.named_parameters()} == parameters
    assert extend_positions(model, 300).config.max_position_embeddings == 300


def test_interpolating_what_is_not_there_is_refused() -> None:
    model = base_model("llama")
    before = snapshot(model)
    for kwargs in ({"max_length": 300}, {}):
        with pytest.raises(ValueError, match="rotary embeddings"):
            convert_model(model, "linear", extend="interpolate", **kwargs)
    assert_unchanged(model, before)


def test_rotary_frequencies_that_depend_on_the_limit_keep_it() -> None:
    def llama(**rope: Any) -> Any:
        return base_model("llama", rope_parameters={"rope_theta": 10000.0, **rope})

    dynamic = llama(rope_type="dynamic", factor=2.0)
    before = snapshot(dynamic)
    with pytest.raises(ValueError, match="rope_type='dynamic'"):
        convert_model(dynamic, "linear", max_length=300)
    assert_unchanged(dynamic, before)
    convert_model(dynamic, "linear")
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    long = {"rope_type": "longrope", "original_max_position_embeddings": 80, **factors}
    with pytest.raises(ValueError, match="rope_type='longrope'"):
        convert_model(llama(**long), "linear", max_length=300)
    model = llama(**long, factor=2.0)
    frequencies = model.rotary_emb.inv_freq.clone()
    config = convert_model(model, "linear", max_length=300).config
    assert torch.equal(type(model)(copy.deepcopy(config)).rotary_emb.inv_freq, frequencies)


# --- sliding windows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WINDOWS)
def test_softmax_layers_of_a_hybrid_keep_their_sliding_window(family: str) -> None:
    for pads in (0, 9):  # the last layer is converted, so everything below it must be upstream's own softmax
        model = base_model(family, **WINDOWS[family])
        batch = token_batch()
        batch["attention_mask"][0, :pads] = 0
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            expected = model(**batch, output_hidden_states=True).hidden_states[2]
            convert_model(model, "linear", layers=[2])
            got = model(**batch, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)


EVERYWHERE: dict[str, dict[str, Any]] = {
    **WINDOWS,
    **{
        family: {"sliding_window": 8}
        for family in ROTARY
        if get_patcher(family).sliding_window(tiny_config(family, sliding_window=8), 0) == 8
    },
}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", EVERYWHERE)
def test_hybrids_with_a_sliding_window_generate_as_without_a_cache(family: str, layer: int) -> None:
    model = convert_model(causal_lm(family, **EVERYWHERE[family]), "linear", layers=[layer])
    batch = token_batch(batch=2, length=21)
    batch["attention_mask"][1, :6] = 0
    kwargs = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": PAD}
    cached = model.generate(**batch, **kwargs)
    assert torch.equal(cached, model.generate(**batch, use_cache=False, **kwargs))
    assert torch.equal(cached, model.generate(**batch, prefill_chunk_size=5, **kwargs))


def _keeps_zeros() -> bool:
    """Whether a reset of this Transformers leaves zeros in place of keys: they are attended to, converted or not."""
    layer = DynamicLayer()
    layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    layer.reset()
    return layer.get_seq_length() > 0


@pytest.mark.skipif(_keeps_zeros(), reason="a cache of this Transformers cannot be used again after reset()")
@pytest.mark.parametrize("family", EVERYWHERE)
def test_a_cache_that_was_reset_has_the_windows_of_softmax_again(family: str) -> None:
    model = convert_model(causal_lm(family, **EVERYWHERE[family]), "linear", layers=[0])
    ids, cache = token_batch(length=21)["input_ids"], DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, **cached(model, cache))
        cache.reset()
        model.set_attn_implementation("sdpa")
        pieces = [model(input_ids=piece, **cached(model, cache)).logits for piece in ids.split(5, dim=1)]
        expected = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", EVERYWHERE)
def test_a_window_method_takes_the_window_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    """Its window alone is upstream's attention, so an exact copy of the checkpoint; a wider one is refused."""
    assert "mistral" in EVERYWHERE
    model = base_model(family, **EVERYWHERE[family])
    batch = token_batch()
    before, expected = snapshot(model), outputs_of(model, batch)[0]
    with pytest.raises(ValueError, match=r"Layer 0: window_size=9, .* sliding window of 8 tokens.*at most 8"):
        convert_model(model, "longformer", layers=[0], num_global_tokens=0, window_size=9)
    assert_unchanged(model, before)
    convert_model(model, "longformer", layers=[0], num_global_tokens=0)
    assert model.config.linear_attn["layers"][0]["options"]["window_size"] == 8
    torch.testing.assert_close(outputs_of(model, batch)[0], expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    assert_bit_equal(outputs_of(AutoModel.from_pretrained(tmp_path), batch), outputs_of(model, batch))


@pytest.mark.parametrize("family", EVERYWHERE)
def test_other_methods_see_what_they_see_and_say_so(family: str, caplog: pytest.LogCaptureFixture) -> None:
    logger.warning_once.cache_clear()
    logger.addHandler(caplog.handler)
    model = convert_model(causal_lm(family, **EVERYWHERE[family]), "linear")
    logger.removeHandler(caplog.handler)
    assert "sliding window of 8 tokens in layer(s) 0" in caplog.text
    batch = token_batch(length=21)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 0] = 5 + (other["input_ids"][:, 0] - 4) % 60
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits[:, -1], model(**other).logits[:, -1])
    kwargs = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(model.generate(**batch, **kwargs), model.generate(**batch, use_cache=False, **kwargs))


def test_the_base_model_of_a_generic_head_is_converted_once(tmp_path: Path) -> None:
    """Llama's classifiers build their base model through AutoModel, which on reload is a converted model already."""
    for cls in head_classes("llama"):
        model = convert_model(build(cls, tiny_config("llama")), "linear", calibration=[token_batch()])
        model.save_pretrained(tmp_path / cls.__name__)
        again = type(model).from_pretrained(tmp_path / cls.__name__)
        inner = [type(module).__name__ for module in again.modules() if "Attention" in type(module).__name__]
        assert inner[0] == "LinearAttnLlamaAttention"
        assert len({id(module.config) for module in again.modules() if hasattr(module, "layer_idx")}) == 1
        assert_bit_equal(outputs_of(revert_model(again), token_batch()), outputs_of(revert_model(model), token_batch()))
        assert type(again) is cls
    assert LlamaForCausalLM in head_classes("llama")
