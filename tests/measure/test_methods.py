"""Variants with options: how they are named, and what is written down of those that cannot be measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from hf_linear_attn import get_variant, list_variants
from hf_linear_attn.measure.methods import (
    Method,
    RefusedError,
    converted_copy,
    failures,
    not_measured,
    parse_methods,
)


def test_a_method_has_a_name_and_what_the_registry_says() -> None:
    method = Method("longformer", {"window_size": 8, "num_global_tokens": 0})
    assert method.name == "longformer window_size=8,num_global_tokens=0"
    assert method.config().window_size == 8
    assert method.spec is get_variant("longformer")
    assert Method("linformer").serves(False)
    assert not Method("linformer").serves(True)
    assert Method("entmax").quadratic()
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        Method("lineer")
    with pytest.raises(ValueError, match="Allowed:"):
        Method("linear", {"featuremap": "elu"})


def test_methods_are_read_in_every_form() -> None:
    options = {"window_size": 8}
    expected = [Method("linear"), Method("longformer", options)]
    for entry in ({"longformer": options}, ("longformer", options), ["longformer", options]):
        assert parse_methods(["linear", entry]) == expected
    assert parse_methods([{"linear": None}]) == [Method("linear")]
    everything = parse_methods([{"longformer": options}], rest=True)
    assert everything[0] == expected[1]
    assert sorted(method.key for method in everything) == list_variants()
    assert parse_methods([{"longformer": options}], rest=True, only=["longformer", "linear"]) == expected[::-1]
    for bad in (3, {"linear": {}, "rfa": {}}, ("linear",)):
        with pytest.raises(ValueError, match="A variant is 'key'"):
            parse_methods([bad])
    with pytest.raises(ValueError, match="named twice: linear"):
        parse_methods(["linear", {"linear": {}}])
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        parse_methods([], rest=True, only=["lineer"])


def test_a_hybrid_is_read_where_it_is_understood_and_refused_elsewhere() -> None:
    entry = {"longformer": {"window_size": 8}, "keep_softmax": 2}
    (method,) = parse_methods([entry], hybrids=True)
    assert method == Method("longformer", {"window_size": 8}, 2)
    assert method.name == "longformer window_size=8,keep_softmax=2"
    with pytest.raises(ValueError, match="of comparisons of language models"):
        parse_methods([entry])
    for bad in (0, -1, 1.5, True, "8"):
        with pytest.raises(ValueError, match="at least 1"):
            parse_methods([{"linear": {}, "keep_softmax": bad}], hybrids=True)
    for other in ({"keep_softmax": 2}, {"linear": {}, "rfa": {}, "keep_softmax": 2}):
        with pytest.raises(ValueError, match="A variant is 'key'"):
            parse_methods([other], hybrids=True)


def test_a_converted_copy_shares_its_weights_or_is_refused(past_only: str) -> None:
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertModel(config)
    copy = converted_copy(model, Method("linear"))
    own = {id(parameter) for name, parameter in copy.named_parameters() if "linear_attn" not in name}
    assert own == {id(parameter) for parameter in model.parameters()}
    assert not hasattr(model.encoder.layer[0].attention.self, "linear_attn")
    with pytest.raises(RefusedError, match="past_only"):
        converted_copy(model, Method(past_only))


@pytest.mark.parametrize(
    ("error", "row", "text"),
    [
        (RefusedError("too long"), {"refused": "too long"}, "refused: too long"),
        (KeyError("a\nb"), {"failure": r"KeyError: 'a\nb'"}, r"failed: KeyError: 'a\nb'"),
        (RuntimeError("first\nsecond"), {"failure": "RuntimeError: first"}, "failed: RuntimeError: first"),
        (torch.OutOfMemoryError("far too much"), {"failure": "out of memory"}, "failed: out of memory"),
        (RuntimeError("[x] can't allocate memory: 9"), {"failure": "out of memory"}, "failed: out of memory"),
    ],
)
def test_what_goes_wrong_stands_in_the_row(error: Exception, row: dict[str, Any], text: str) -> None:
    found: dict[str, Any] = {}
    with failures(found):
        raise error
    assert found == row
    assert not_measured(found) == text


def test_what_was_left_out_says_so() -> None:
    assert not_measured({"left_out": "quadratic"}) == "left out: quadratic"
    assert not_measured({"seconds": 1.0}) is None
