"""Analysis on small models: matrices against direct evaluation, spectra, error against size, pictures."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_linear_attn import convert_model, get_variant, list_variants
from hf_linear_attn.analysis import pictures
from hf_linear_attn.analysis import spectrum as analysis
from hf_linear_attn.analysis.recordings import build_layers, document_batches, passage_batches, record_layers
from hf_linear_attn.calibration import Recording, output_errors
from hf_linear_attn.report import OutputErrors
from hf_linear_attn.variants.base import AttentionInputs
from tests.tiny import base_model, token_batch

ENCODER = "bert"
DECODER = "llama"


def inputs(length: int = 12, *, is_causal: bool = False, padding: bool = False) -> AttentionInputs:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, length, 8)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, -3:] = False
    return AttentionInputs(q, k, v, token_mask=mask if padding else None, is_causal=is_causal, scaling=8**-0.5)


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
def test_softmax_weights_mix_values_as_softmax_attention_does(is_causal: bool, padding: bool) -> None:
    call = inputs(is_causal=is_causal, padding=padding)
    weights = analysis.softmax_weights(call)
    allowed = torch.ones(12, 12).tril().bool() if is_causal else torch.ones(12, 12).bool()
    allowed = allowed if call.token_mask is None else allowed & call.token_mask[:, None, None, :]
    expected = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, allowed)
    torch.testing.assert_close(weights @ call.value, expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))


def with_value(call: AttentionInputs, value: torch.Tensor) -> AttentionInputs:
    return replace(call, value=value)


@torch.no_grad()
def small_variants(model: Any, key: str, call: AttentionInputs) -> Iterator[Any]:
    """Layer 0's variant under every option set that the model's side takes and that is linear in the values."""
    for options in (*get_variant(key).test_options, {}):
        with contextlib.suppress(ValueError):  # options for the other side
            variant = build_layers(model, key, options, [0])[0]
            constant, once, twice = (variant(with_value(call, x * call.value))[0] for x in (0.0, 1.0, 2.0))
            if torch.allclose(twice - constant, 2 * (once - constant), atol=1e-3):  # a norm of the values is not
                yield variant


@pytest.mark.parametrize("family", [ENCODER, DECODER])
def test_effective_attention_reproduces_the_output_of_every_variant(family: str) -> None:
    model = base_model(family)
    call = record_layers(model, [token_batch(1, 21)], [0])[0].inputs[0]
    wrong, checked = {}, set()
    for key in list_variants(decoder=True) if family == DECODER else list_variants(encoder=True):
        variant = next(small_variants(model, key, call))
        with torch.no_grad():
            output, constant = (variant(with_value(call, x * call.value))[0] for x in (1.0, 0.0))
        matrix = analysis.effective_attention(variant, call)
        assert matrix.shape == (1, 4, 21, 21)
        difference = (matrix @ call.value + constant - output).abs().max().item()
        if difference > 1e-4 * max(1.0, output.abs().max().item()):
            wrong[key] = difference
        checked.add(key)
    assert wrong == {}
    assert {"linear", "longformer", "performer"} <= checked


def test_effective_attention_of_an_exact_limit_is_the_softmax_matrix() -> None:
    model = base_model(ENCODER)
    call = record_layers(model, [token_batch(1, 20)], [1])[1].inputs[0]
    variant = build_layers(model, "linformer", {"k": 20, "projection": "mean_pool"}, [1])[1]
    torch.testing.assert_close(
        analysis.effective_attention(variant, call), analysis.softmax_weights(call), atol=1e-5, rtol=1e-5
    )


def test_spectrum_of_known_matrices() -> None:
    call = inputs()
    uniform = AttentionInputs(call.query * 0, call.key, call.value, scaling=1.0)
    curve = analysis.attention_spectrum(Recording([uniform], [call.value]))
    torch.testing.assert_close(curve, torch.ones(4, 12), atol=1e-5, rtol=0)  # rank one
    sharp = AttentionInputs(100 * torch.eye(12)[None, None], torch.eye(12)[None, None], torch.eye(12)[None, None])
    curve = analysis.attention_spectrum(Recording([sharp], [sharp.value]))
    torch.testing.assert_close(curve[0], torch.arange(1, 13) / 12)  # the identity: full rank, all equal


def test_spectrum_refuses_documents_of_several_lengths() -> None:
    short, long = inputs(8), inputs(12)
    with pytest.raises(ValueError, match=r"lengths \[8, 12\]"):
        analysis.attention_spectrum(Recording([short, long], [short.value, long.value]))


class LetterTokenizer:
    """A token a letter, one special token at each end, cut into pieces of at most `max_length`."""

    def __call__(self, text: str, *, max_length: int, **kwargs: Any) -> dict[str, list[list[int]]]:
        assert kwargs == {"truncation": True, "return_overflowing_tokens": True}
        letters = [ord(letter) - ord("a") + 5 for letter in text]
        room = max_length - 2
        pieces = [letters[start : start + room] for start in range(0, len(letters), room)]
        return {"input_ids": [[2, *piece, 3] for piece in pieces]}


def test_passages_cover_the_texts_once() -> None:
    batches = list(passage_batches(["abcdefgh", "ijk", "lmno"], LetterTokenizer(), 5, 4, size=3))
    assert [batch["input_ids"].shape for batch in batches] == [(3, 5), (1, 5)]
    pieces = {"".join(chr(i - 5 + ord("a")) for i in row[1:-1]) for batch in batches for row in batch["input_ids"]}
    assert pieces == {"abc", "def", "ijk", "lmn"}  # "gh" and "o" are shorter
    with pytest.raises(ValueError, match="have 4 passages of 5 tokens; 5 are needed"):
        list(passage_batches(["abcdefgh", "ijk", "lmno"], LetterTokenizer(), 5, 5))


def test_the_spectrum_over_passages_is_the_mean_of_theirs() -> None:
    model, batch, told = base_model(ENCODER), token_batch(3, 16), []
    parts = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 2), slice(2, 3))]
    found = analysis.passage_spectrum(model, parts, told.append)
    assert told == [2, 3]
    for layer, recording in record_layers(model, [batch]).items():
        values = torch.linalg.svdvals(analysis.softmax_weights(recording.inputs[0]).double())
        expected = (values.cumsum(-1) / values.sum(-1, keepdim=True)).mean(0)
        torch.testing.assert_close(found[layer], expected, atol=1e-5, rtol=0)


def test_recording_leaves_a_checkpoint_as_it_was() -> None:
    model = base_model(ENCODER)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    batch = token_batch()
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        recordings = record_layers(model, [batch], [1])
        assert list(recordings) == [1]
        built = build_layers(model, "linformer", {"k": 4}, [0], max_length=37)
        assert built[0].context.max_length == 37
        assert torch.equal(model(**batch).last_hidden_state, expected)
    assert [type(module) for module in model.modules()] == classes
    assert before.keys() == model.state_dict().keys()
    assert model.config.max_position_embeddings == 160
    softmax = analysis.softmax_weights(recordings[1].inputs[0]) @ recordings[1].inputs[0].value
    torch.testing.assert_close(softmax, recordings[1].outputs[0], atol=1e-5, rtol=1e-4)


def test_recording_of_a_converted_model_is_that_of_its_checkpoint() -> None:
    batch = token_batch()
    checkpoint = record_layers(base_model(ENCODER), [batch], [0, 1])
    converted = record_layers(convert_model(base_model(ENCODER), "linear", layers=[1]), [batch])
    assert list(converted) == [1]
    assert torch.equal(checkpoint[1].outputs[0], converted[1].outputs[0])


def test_a_refused_variant_leaves_the_models_limit() -> None:
    model = base_model(DECODER)
    with pytest.raises(ValueError, match="linformer"):
        build_layers(model, "linformer", {}, [0], max_length=8)
    assert model.config.max_position_embeddings == 160


def test_documents_that_are_too_short_are_an_error() -> None:
    def tokenizer(text: str, *, max_length: int, **kwargs: Any) -> dict[str, torch.Tensor]:
        ids = torch.ones(1, min(len(text.split()), max_length), dtype=torch.long)
        return {"input_ids": ids, "attention_mask": ids}

    texts = ["a b c d e", "a b", "a b c d"]
    assert [b["input_ids"].shape for b in document_batches(texts, tokenizer, 4, 2)] == [(1, 4), (1, 4)]
    with pytest.raises(ValueError, match="Only 2 of 3 documents have 4 tokens; 3 are needed"):
        document_batches(texts, tokenizer, 4, 3)


def test_size_options_are_found_by_name() -> None:
    assert analysis.size_option("linformer") == "k"
    assert analysis.size_option("longformer") == "window_size"
    assert analysis.size_option("cosformer") is None
    assert analysis.small_size("longformer", 40) == {"window_size": 32}
    assert analysis.small_size("cosformer", 40) == {}
    assert analysis.linformer_bound(64) == pytest.approx(64 * math.log(64))


def test_error_falls_with_the_size_and_is_the_layers_mean() -> None:
    model = base_model(ENCODER)
    test = {length: record_layers(model, [token_batch(1, length)], [0, 1]) for length in (24, 48)}
    rows = analysis.error_against_size(model, "longformer", "window_size", (4, 16, 32), test)
    assert [(row.length, row.size) for row in rows] == [(24, 4), (24, 16), (48, 4), (48, 16), (48, 32)]
    odd = analysis.error_against_size(model, "longformer", "window_size", (4, 5), test)  # windows are even
    assert [row.size for row in odd] == []  # one size shows nothing
    odd = analysis.error_against_size(model, "longformer", "window_size", (4, 5, 16), test)
    assert [row.size for row in odd] == [4, 16, 4, 16]
    assert rows[0].error > rows[1].error
    assert rows[2].error > rows[3].error > rows[4].error
    built = build_layers(model, "longformer", {"window_size": 4}, [0, 1])
    expected = sum(output_errors(built[layer], test[24][layer]).error for layer in (0, 1)) / 2
    assert rows[0].error == pytest.approx(expected)
    assert analysis.error_against_size(model, "linear", "num_features", (4, 8), test) == []  # elu has no such size


def test_size_for_error_interpolates_by_the_logarithm() -> None:
    rows = [analysis.SizeError(64, size, error, 0.9) for size, error in ((8, 0.8), (16, 0.6), (32, 0.2))]
    assert analysis.size_for_error(rows, 64, 0.6) == pytest.approx(16)
    assert analysis.size_for_error(rows, 64, 0.4) == pytest.approx(2**4.5)
    assert analysis.size_for_error(rows, 64, 0.1) is None


def test_pictures_are_written(tmp_path: Path) -> None:
    errors = OutputErrors(0.5, 0.9, [0.2, 1.7, 0.4, 0.6], [0.9] * 4)
    pictures.draw_heads({"as published": {0: errors, 3: errors}}, tmp_path / "heads.png", title="a", subtitle="b")
    curve = torch.linspace(0.1, 1, 16).expand(4, 16)
    pictures.draw_spectrum({0: curve, 1: curve}, tmp_path / "spectrum.png", title="a")
    rows = [{"length": n, "size": k, "error": k / n} for n in (16, 32) for k in (4, 8)]
    methods = [{"method": "linformer", "option": "k", "rows": rows}]
    pictures.draw_sizes(methods, tmp_path / "sizes.png", bound=6.0, title="a")
    pictures.draw_patterns({"softmax": torch.eye(8), "other": -torch.eye(8)}, tmp_path / "patterns.png", title="a")
    for name in ("heads", "spectrum", "sizes", "patterns"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
