"""What users run into at the edges: too many tokens, the pooling layer, quantized models, warnings of calibration."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertModel, RobertaModel

from hf_linear_attn import convert_model
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam import limits
from tests.test_convert import assert_unchanged, snapshot
from tests.tiny import (
    FAMILIES,
    PAD,
    assert_bit_equal,
    base_model,
    causal_lm,
    is_causal,
    outputs_of,
    small_options,
    tiny_config,
    token_batch,
    variants_for,
)

WITH_TABLE = [family for family in FAMILIES if not get_patcher(family).rotary]


@pytest.mark.parametrize("family", WITH_TABLE)
def test_too_many_tokens_name_the_limit_and_the_option(family: str) -> None:
    model = convert_model(base_model(family), "linear")
    limit = get_patcher(family).max_length(model.config)
    model(**token_batch(length=limit))
    with pytest.raises(ValueError, match=rf"reaches token {limit + 1}, .* at most {limit}.*max_length={limit + 1}\)"):
        model(**token_batch(length=limit + 1))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=f"at most {limit}"):
        model(inputs_embeds=torch.zeros(1, limit + 1, model.get_input_embeddings().embedding_dim))


@pytest.mark.parametrize("reason", ["exported", "traced"])
def test_a_program_for_any_length_is_not_asked_for_its_length(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert_model(base_model("bert"), "linear")
    batch = token_batch(length=get_patcher("bert").max_length(model.config) + 1)
    with pytest.raises(ValueError, match="at most"):
        limits.check_length(model, (), batch)
    if reason == "exported":
        monkeypatch.setattr(limits, "is_exported", lambda: True)
    else:
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    limits.check_length(model, (), batch)


def test_too_many_tokens_while_generating() -> None:
    model = convert_model(causal_lm("gpt2"), "linear")
    for cached in (True, False):
        with pytest.raises(ValueError, match="reaches token 161, and this model reads at most 160"):
            model.generate(**token_batch(length=150), max_new_tokens=20, min_new_tokens=20, use_cache=cached)


@pytest.mark.parametrize("family", WITH_TABLE)
def test_no_method_reads_past_the_table(family: str) -> None:
    """Whatever the method: the sentence is the model's, and comes before a layer runs."""
    for key in variants_for(family):
        options = small_options(key, family)
        model = convert_model(causal_lm(family) if is_causal(family) else base_model(family), key, **options)
        limit = get_patcher(family).max_length(model.config)
        with pytest.raises(ValueError, match=f"reaches token {limit + 1}, and this model reads at most {limit}: its"):
            model(torch.full((1, limit + 1), 7))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("key", ["cosformer", "synthesizer"])
def test_methods_with_positions_of_their_own_say_where_they_end(key: str, cached: bool) -> None:
    """Rotary models have no table, but such a method is built for so many tokens; padding is none of them."""
    model = convert_model(causal_lm("llama"), key)
    batch = {name: x[:1] for name, x in token_batch(length=158).items()}
    generate = partial(model.generate, use_cache=cached, do_sample=False)
    assert generate(**batch, max_new_tokens=2, min_new_tokens=2).shape[1] == 160
    with pytest.raises(ValueError, match=r"160.* 161.*max_length=161|161.* 160.*max_length=161"):
        generate(**batch, max_new_tokens=4, min_new_tokens=4)


def test_padding_is_no_token_of_a_method_either() -> None:
    model = convert_model(causal_lm("llama"), "cosformer")
    ids, mask = torch.full((2, 158), 7), torch.ones(2, 158, dtype=torch.long)
    mask[:, :10] = 0  # so many more fit
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12)
    assert padded.shape[1] == 170
    with pytest.raises(ValueError, match="reaches token 161, and cosformer was built for at most 160"):
        model.generate(ids, attention_mask=mask, max_new_tokens=14, min_new_tokens=14)


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_a_compiled_model_says_so_too(family: str) -> None:
    model = convert_model(base_model(family, num_hidden_layers=1).eval(), "linear")
    limit = get_patcher(family).max_length(model.config)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(*(m(torch.full((1, 40), 7)).last_hidden_state for m in (compiled, model)))
        with pytest.raises(ValueError, match=f"reaches token {limit + 1}, and this model reads at most {limit}"):
            compiled(torch.full((1, limit + 1), 7))


@pytest.mark.parametrize("family", WITH_TABLE)
def test_positions_below_0_are_named(family: str) -> None:
    model = convert_model(base_model(family), "linear")
    with pytest.raises(ValueError, match="position_ids has -3; allowed: 0 and above"):
        model(torch.full((1, 8), 7), position_ids=torch.arange(-3, 5)[None])


def test_positions_count_and_not_the_length() -> None:
    model = convert_model(base_model("bert"), "linear")
    batch = token_batch(length=320)
    states = model(**batch, position_ids=torch.arange(320)[None] % 160, token_type_ids=torch.zeros(2, 320).long())
    assert torch.isfinite(states.last_hidden_state).all()
    with pytest.raises(ValueError, match="reaches token 161"):
        model(**token_batch(length=8), position_ids=torch.arange(153, 161)[None])
    # RoBERTa numbers its real tokens, so that padding may go beyond the limit.
    roberta = base_model("roberta")
    wide = token_batch(length=200)
    wide["input_ids"][:, 150:], wide["attention_mask"][:, 150:] = PAD, 0
    assert torch.isfinite(outputs_of(roberta, wide)[0]).all()
    convert_model(roberta, "linear")
    narrow = {name: tensor[:, :150] for name, tensor in wide.items()}
    torch.testing.assert_close(outputs_of(roberta, wide)[0][:, :150], outputs_of(roberta, narrow)[0])


@pytest.mark.parametrize("cls", [BertModel, RobertaModel])
@pytest.mark.parametrize("saved", [True, False])
def test_the_pooling_layer_is_optional_at_load(cls: Any, saved: bool, tmp_path: Path) -> None:
    model = convert_model(cls(tiny_config(cls.config_class.model_type), add_pooling_layer=saved).eval(), "linear")
    model.save_pretrained(tmp_path)
    for wanted in (True, False):
        again = AutoModel.from_pretrained(tmp_path, add_pooling_layer=wanted)
        assert (again.pooler is not None) == wanted
        assert_bit_equal(outputs_of(again, token_batch())[:1], outputs_of(model, token_batch())[:1])


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama"])
def test_quantized_models_are_refused_with_the_order_that_works(family: str) -> None:
    class Packed(nn.Module):
        """A layer as quantizers leave it: integers for a weight."""

        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
            self.bias = layer.bias

    class Called(Packed):
        """As torch.ao leaves it: a method that unpacks."""

        weight = lambda self: None  # noqa: E731

        def __init__(self, layer: Any) -> None:
            nn.Module.__init__(self)

    name = get_patcher(family).projection_names[0]
    for packed in (Packed, Called):
        model = base_model(family)
        attention = get_patcher(family).self_attentions(model)[1].module
        setattr(attention, name, packed(getattr(attention, name)))
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"quantized.*Convert it first.*quantization_config="):
            convert_model(model, "linear")
        assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per")
def test_dynamic_quantization_goes_after_the_conversion() -> None:
    def quantized(model: Any) -> Any:
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    with pytest.raises(ValueError, match="quantized"):
        convert_model(quantized(base_model("bert")), "linear")
    model = convert_model(base_model("bert"), "linear")
    exact = outputs_of(model, token_batch())[0]
    assert (outputs_of(quantized(model), token_batch())[0] - exact).abs().mean() < 0.3 * exact.abs().mean()


def test_calibration_warns_once_and_at_the_callers_line() -> None:
    model = base_model("bert")
    for attention in get_patcher("bert").self_attentions(model):
        attention.module.query.weight.data.mul_(30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert_model(model, "performer", calibration=[token_batch()])
    mine = [entry for entry in caught if "performer, layer" in str(entry.message)]
    assert [entry.filename for entry in mine] == [__file__]
    assert "layer 0:" in str(mine[0].message)
    assert "layer 1:" in str(mine[0].message)
