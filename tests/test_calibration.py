"""Calibration: errors per layer and head, per-layer regression, and what is told of it meanwhile."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from hf_linear_attn import convert_model, revert_model
from hf_linear_attn.calibration import calibrate, output_errors, progress_bars, record, regress
from hf_linear_attn.layer_choice import layers_to_keep
from hf_linear_attn.seam.sharing import variants_of
from hf_linear_attn.variants.linformer import LinformerAttention
from tests.test_real_weights import batches as documents
from tests.test_real_weights import minilm
from tests.tiny import assert_bit_equal, base_model, causal_lm, outputs_of, token_batch

TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("linformer", {"k": 4}),
    "roberta": ("hedgehog", {}),
    "gpt2": ("lolcats", {"window_size": 4}),
}


def padded_batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    batches = [token_batch(seed=seed) for seed in range(count)]
    for batch in batches:
        batch["attention_mask"][1, 20:] = 0
    return batches


def errors_of(model: PreTrainedModel) -> list[float | None]:
    return [row.output_error for row in model.conversion_report.rows]


def parameters_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- errors ------------------------------------------------------------------------------------------------------


def test_the_report_has_the_error_of_every_head() -> None:
    model, batches = base_model("bert"), padded_batches()
    convert_model(model, "linear", calibration=batches)
    row = model.conversion_report.rows[0]
    recording = record(model, batches)[0]
    variant = next(iter(variants_of(model).values()))
    squared, norm, cosines = torch.zeros(4), torch.zeros(4), []
    for inputs, want in zip(recording.inputs, recording.outputs, strict=True):
        with torch.no_grad():
            got = variant(inputs)[0]
        real = torch.ones(2, 37, dtype=torch.bool) if inputs.token_mask is None else inputs.token_mask
        for b, t in real.nonzero().tolist():
            squared += (got - want)[b, :, t].square().sum(-1)
            norm += want[b, :, t].square().sum(-1)
            cosines.append(torch.cosine_similarity(got[b, :, t], want[b, :, t], dim=-1))
    torch.testing.assert_close(torch.tensor(row.head_errors), (squared / norm).sqrt())
    torch.testing.assert_close(torch.tensor(row.head_cosines), torch.stack(cosines).mean(0))
    assert row.output_error == pytest.approx((squared.sum() / norm.sum()).sqrt().item(), rel=1e-4)
    assert model.conversion_report.to_dict()["rows"][0]["head_errors"] == row.head_errors
    assert len(str(model.conversion_report).splitlines()) == 4  # one line per layer, none per head


def test_without_calibration_there_are_no_errors() -> None:
    row = convert_model(base_model("bert"), "linear").conversion_report.rows[0]
    assert row.head_errors is None
    assert row.head_cosines is None
    assert row.published_error is None


@pytest.mark.parametrize(("variant", "steps"), [("hedgehog", 0), ("hedgehog", 3), ("longformer", 0)])
def test_the_report_says_what_the_start_was_before(variant: str, steps: int) -> None:
    batches, options = padded_batches(), {} if variant == "hedgehog" else {"window_size": 4}
    plain = convert_model(base_model("bert"), variant, **options)
    variants = list(variants_of(plain).values())
    published = [output_errors(variants[layer], found).error for layer, found in record(plain, batches).items()]
    model = convert_model(base_model("bert"), variant, calibration=batches, calibration_steps=steps, **options)
    rows = model.conversion_report.rows
    assert [row.published_error for row in rows] == pytest.approx(published, rel=1e-5)
    if variant == "hedgehog":
        assert all(row.output_error < row.published_error for row in rows)
    else:  # it chooses nothing
        assert [row.output_error for row in rows] == published
    assert "as published" in str(model.conversion_report)
    assert model.conversion_report.errors_of(0).published_error == rows[0].published_error


# ---- options that calibration settles ----------------------------------------------------------------------------


AUTO: dict[str, dict[str, Any]] = {
    "headwise": {},
    "key_value": {"sharing": "key_value", "init": "random"},
    "none": {"sharing": "none"},
    "conv": {"sharing": "none", "projection": "conv"},
    "pool": {"projection": "max_pool"},
}


@pytest.mark.parametrize("case", AUTO)
def test_slots_that_calibration_chose_are_reported_saved_and_loaded(case: str, tmp_path: Path) -> None:
    batches = padded_batches()
    options = {"k": "auto", "energy": 0.5, **AUTO[case]}
    model = convert_model(base_model("bert"), "linformer", calibration=batches, **options)
    chosen = [row.chosen for row in model.conversion_report.rows]
    assert all(k == int(k) and 1 <= k < 16 for row in chosen for k in torch.tensor(row["k"]).flatten().tolist())
    assert [layer["options"]["head_k"] for layer in model.config.linear_attn["layers"]] == [row["k"] for row in chosen]
    assert [row["chosen"] for row in model.conversion_report.to_dict()["rows"]] == chosen
    assert "chosen in layer" in str(model.conversion_report)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.linear_attn == model.config.linear_attn
    assert [row.chosen for row in again.conversion_report.rows] == chosen
    for batch in batches:
        assert_bit_equal(outputs_of(again, batch), outputs_of(model, batch))
    plain = outputs_of(base_model("bert"), batches[0])
    assert_bit_equal(outputs_of(revert_model(model), batches[0]), plain)


def test_slots_without_calibration_are_the_bound_and_the_report_says_so() -> None:
    model = convert_model(base_model("bert"), {1: ("linformer", {"k": "auto", "sharing": "none"})})
    assert [row.chosen for row in model.conversion_report.rows] == [{}, {"k": [16] * 4}]  # floor(8 ln 8)
    assert "chosen in layer 1: k=16\n" in str(model.conversion_report)


def test_chosen_slots_stay_where_layers_keep_softmax_by_measurement() -> None:
    options: dict[str, Any] = {"k": "auto", "energy": 0.5, "layers": "auto", "keep_softmax": 1}
    model = convert_model(base_model("bert"), "linformer", calibration=padded_batches(), **options)
    [kept] = model.conversion_report.kept_softmax
    layers = model.config.linear_attn["layers"]
    assert layers[kept] is None
    assert layers[1 - kept]["options"]["head_k"] == model.conversion_report.rows[1 - kept].chosen["k"] < 16


def test_regression_trains_the_chosen_slots() -> None:
    batches, options = padded_batches(), {"k": "auto", "energy": 0.4, "sharing": "none"}
    start = errors_of(convert_model(base_model("bert"), "linformer", calibration=batches, **options))
    model = convert_model(base_model("bert"), "linformer", calibration=batches, calibration_steps=10, **options)
    assert all(after < error for after, error in zip(errors_of(model), start, strict=True))
    for variant in variants_of(model).values():
        for head, k in enumerate(variant.config.head_k):
            assert not variant.key_projection[head, k:].any()


def test_the_report_says_how_many_weights_a_layer_learns_to_make_zero() -> None:
    model, batches = base_model("bert"), padded_batches()
    convert_model(
        model, {0: ("entmax", {"alpha": "sparsemax", "initial_lambda": 1.0}), 1: "linear"}, calibration=batches
    )
    row, other = model.conversion_report.rows
    zeros, weights = torch.zeros(2, 4)
    for inputs in record(model, batches)[0].inputs:
        (B, H, T, _), real = inputs.key.shape, inputs.token_mask
        real = torch.ones(B, T, dtype=torch.bool) if real is None else real
        one_hot = torch.eye(T).expand(B, H, -1, -1)  # as values: outputs are the weights
        with torch.no_grad():
            found = next(iter(variants_of(model).values()))(dataclasses.replace(inputs, value=one_hot))[0]
        pairs = (real[:, :, None] & real[:, None, :])[:, None].expand_as(found)
        zeros += ((found == 0) & pairs).sum((0, 2, 3))
        weights += pairs.sum((0, 2, 3))
    torch.testing.assert_close(torch.tensor(row.head_zeros), zeros / weights)
    assert row.zeros == pytest.approx((zeros.sum() / weights.sum()).item())
    assert 0 < row.zeros < 1
    assert other.zeros is other.head_zeros is None  # it has no weight of 0
    report = model.conversion_report
    assert report.errors_of(0).head_zeros == report.to_dict()["rows"][0]["head_zeros"] == row.head_zeros
    header, first, second, _ = str(report).splitlines()
    assert header.endswith("weights of 0")
    assert first.endswith(f"{row.zeros:.1%}")
    assert second.endswith("-")
    assert "weights of 0" not in str(convert_model(base_model("bert"), "linear", calibration=batches).conversion_report)


# ---- regression --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TRAINED)
def test_regression_lowers_every_layers_error_and_leaves_the_rest_alone(family: str) -> None:
    variant, options = TRAINED[family]
    batches = padded_batches()
    models = [base_model(family).train() for _ in range(3)]
    models[1].requires_grad_(False)
    before = parameters_of(models[1])
    models[1].dropout_of_a_friend = torch.nn.Dropout().eval()  # a module whose mode is not the model's
    for model, steps in zip(models, (0, 20, 20), strict=True):
        convert_model(model, variant, calibration=batches, calibration_steps=steps, **options)
    start, trained = errors_of(models[0]), errors_of(models[1])
    assert all(after < 0.99 * error for after, error in zip(trained, start, strict=True))
    assert trained == errors_of(models[2])  # deterministic
    after = parameters_of(models[1])
    assert all(torch.equal(after[name], before[name]) for name in before)
    new = {name: p for name, p in models[1].named_parameters() if name not in before}
    assert new
    assert all(p.requires_grad and p.grad is None for p in new.values())
    assert all(p.grad is None for p in models[1].parameters())
    assert models[1].training
    assert not models[1].dropout_of_a_friend.training


def test_regression_is_never_worse_however_it_is_set() -> None:
    batches = padded_batches(1)
    start = errors_of(convert_model(base_model("bert"), "hedgehog", calibration=batches))
    for lr in (1e-6, 30.0):
        model = convert_model(
            base_model("bert"), "hedgehog", calibration=batches, calibration_steps=3, calibration_lr=lr
        )
        assert all(after <= error for after, error in zip(errors_of(model), start, strict=True))


def test_regression_passes_over_texts_that_a_window_covers_and_refuses_nothing_but_such() -> None:
    short, long = token_batch(length=8), token_batch(length=30)
    options: dict[str, Any] = {"window_size": 16, "calibration_steps": 4}
    for batches in ([short, long], [long, short]):
        before = errors_of(convert_model(base_model("gpt2"), "lolcats", window_size=16, calibration=batches))
        after = errors_of(convert_model(base_model("gpt2"), "lolcats", calibration=batches, **options))
        assert all(trained <= start for trained, start in zip(after, before, strict=True))
    model = base_model("gpt2")
    expected = outputs_of(model, long)
    with pytest.raises(ValueError, match="a window covers every text that is read"):
        convert_model(model, "lolcats", calibration=[short, short], **options)
    assert not variants_of(model)
    assert_bit_equal(outputs_of(model, long), expected)


def test_regression_in_half_precision_keeps_the_dtype() -> None:
    batches = padded_batches(1)
    start = errors_of(convert_model(base_model("bert").bfloat16(), "hedgehog", calibration=batches))
    model = convert_model(base_model("bert").bfloat16(), "hedgehog", calibration=batches, calibration_steps=20)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(after <= error for after, error in zip(errors_of(model), start, strict=True))
    assert errors_of(model)[0] < start[0]


def test_shared_parameters_are_trained_together() -> None:
    batches = padded_batches()
    options = {"k": 4, "sharing": "layerwise"}
    start = errors_of(convert_model(base_model("bert"), "linformer", calibration=batches, **options))
    model = convert_model(base_model("bert"), "linformer", calibration=batches, calibration_steps=30, **options)
    assert sum(e**2 for e in errors_of(model)) < sum(e**2 for e in start)
    first, second = variants_of(model).values()
    shared = first.shared_parameters()
    assert shared
    assert all(first.get_parameter(name) is second.get_parameter(name) for name in shared)


def test_a_variant_without_parameters_keeps_its_start() -> None:
    batches = padded_batches(1)
    start = errors_of(convert_model(base_model("bert"), "linear", calibration=batches))
    model = convert_model(base_model("bert"), "linear", calibration=batches, calibration_steps=5)
    assert errors_of(model) == start


def test_an_exception_in_the_regression_undoes_the_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = base_model("bert"), padded_batches(1)[0]
    softmax, before, cls = outputs_of(model, batch), parameters_of(model), type(model)
    calls = itertools.count()

    def fails(self: Any, inputs: Any, target: Any) -> torch.Tensor:
        if next(calls) == 12:  # in the second layer
            raise KeyboardInterrupt
        return type(self).__mro__[1].regression_loss(self, inputs, target)

    monkeypatch.setattr(LinformerAttention, "regression_loss", fails)
    with pytest.raises(KeyboardInterrupt):
        convert_model(model, "linformer", calibration=[batch], calibration_steps=10, k=4)
    assert type(model) is cls
    assert parameters_of(model).keys() == before.keys()
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(model, batch), softmax, strict=True))


def test_an_exception_leaves_a_single_variant_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = base_model("bert"), padded_batches(1)
    convert_model(model, "hedgehog")
    variant, recording = next(iter(variants_of(model).values())), record(model, batches)[0]
    before = {name: x.clone() for name, x in variant.state_dict().items()}
    monkeypatch.setattr("hf_linear_attn.calibration._output_error", lambda *a: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
        regress(variant, recording, 5)
    assert all(torch.equal(variant.state_dict()[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration_steps": 5}, "calibration_steps=5 needs calibration"),
        ({"calibration_steps": -1}, "calibration_steps=-1; allowed: an integer of at least 0"),
        ({"calibration_steps": 2.5}, "calibration_steps=2.5"),
        ({"calibration_lr": 0}, "calibration_lr=0; allowed: a number above 0"),
        ({"layers": "auto", "keep_softmax": 1}, "layers='auto' needs calibration"),
        ({"layers": "auto", "calibration": 1}, "needs keep_softmax from 1 to 1, got None"),
        ({"layers": "auto", "keep_softmax": 2, "calibration": 1}, "needs keep_softmax from 1 to 1, got 2"),
        ({"layers": "some"}, "layers='some'; allowed: None, layer indices or 'auto'"),
        ({"keep_softmax": 1}, "keep_softmax=1 goes with layers='auto'"),
        ({"progress": "yes"}, "progress='yes'; allowed: True or False"),
        ({"variant": {0: "linear"}, "layers": "auto", "keep_softmax": 1, "calibration": 1}, "single variant by name"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    model = base_model("bert")
    given = {"variant": "linear", **arguments}
    if "calibration" in given:
        given["calibration"] = padded_batches(1)
    with pytest.raises(ValueError, match=message):
        convert_model(model, **given)
    assert not variants_of(model)


# ---- what is computed, and what is told --------------------------------------------------------------------------


def test_labels_of_any_kind_are_left_out() -> None:
    model = base_model("bert")
    convert_model(model, "linear", calibration=[{**token_batch(), "labels": [0, 1]}])
    assert model.conversion_report.rows[0].output_error is not None


def test_what_no_layer_receives_is_not_computed() -> None:
    """A head, and what comes after the last converted layer."""
    model, batches = causal_lm("llama", num_hidden_layers=3), [token_batch()]
    ran: list[str] = []
    for name in ("lm_head", "model.layers.1.mlp", "model.layers.2.self_attn"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    convert_model(model, "linear", layers=[0, 1], calibration=batches)
    assert ran == []
    revert_model(model)
    arguments = {"layers": "auto", "keep_softmax": 1, "keep_softmax_by": "states", "calibration": batches}
    convert_model(model, "linear", **arguments)
    assert "model.layers.2.self_attn" in ran
    assert "lm_head" not in ran


def test_progress_is_told_from_0_to_the_end() -> None:
    model, batches = convert_model(base_model("bert"), "hedgehog"), padded_batches(3)
    told: list[tuple[str, int, int]] = []
    calibrate(model, batches, steps=4, on_progress=lambda *what: told.append(what))
    expected = [("recording softmax", done, 3) for done in range(4)]
    expected += [("choosing starts", done, 2) for done in range(3)]
    expected += [("training new parameters", done, 8) for done in range(9)]
    expected += [("measuring errors", done, 2) for done in range(3)]
    assert list(dict.fromkeys(told)) == expected
    told.clear()
    layers_to_keep(model, batches, 1, on_progress=lambda *what: told.append(what))
    assert told == [("choosing layers", done, 9) for done in range(10)]  # softmax, and each layer, on each batch


def test_progress_reaches_the_end_where_there_is_nothing_to_train() -> None:
    model, told = convert_model(base_model("bert"), "linear"), []
    calibrate(model, padded_batches(1), steps=4, on_progress=lambda *what: told.append(what))
    assert ("training new parameters", 8, 8) in told


def test_the_library_is_quiet_unless_it_is_asked_for_bars(capfd: pytest.CaptureFixture[str]) -> None:
    given = {"calibration": padded_batches(2), "calibration_steps": 2, "layers": "auto", "keep_softmax": 1}
    logging.enable_progress_bar()
    try:
        convert_model(base_model("bert"), "hedgehog", **given)
        assert capfd.readouterr() == ("", "")
        convert_model(base_model("bert"), "hedgehog", progress=True, **given)
        shown = capfd.readouterr().err
        for what in (
            "recording softmax: 100%",
            "choosing starts: 100%",
            "training new parameters: 100%",
            "choosing layers",
        ):
            assert what in shown
        logging.disable_progress_bar()
        convert_model(base_model("bert"), "hedgehog", progress=True, **given)
        assert capfd.readouterr() == ("", "")
    finally:
        logging.enable_progress_bar()


def test_a_bar_that_is_cut_off_is_closed(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as show:
        show("choosing starts", 1, 3)
    assert capfd.readouterr().err.endswith("\n")


# ---- real weights -------------------------------------------------------------------------------------------------


def test_regression_helps_on_other_documents() -> None:
    calibration, held_out = documents()
    model = convert_model(minilm(), "lolcats", layers=[3], window_size=32, calibration=[calibration])
    variant = next(iter(variants_of(model).values()))
    test = record(model, [held_out])[3]
    before = output_errors(variant, test)
    regress(variant, record(model, [calibration])[3], 10)
    after = output_errors(variant, test)
    assert after.error < 0.99 * before.error
    assert after.cosine > before.cosine


COMPLETED = {
    # the method, its options, and how what stands beside the window is switched off
    "taylor": ("lolcats", {"window_size": 32}, lambda layer: layer.window_log_factor.add_(60)),
    "hedgehog": (
        "lolcats",
        {"window_size": 32, "tail": "hedgehog"},
        lambda layer: layer.window_log_factor.add_(60),
    ),
    "landmarks": ("long_short", {"window_size": 32}, lambda layer: layer.landmark_bias.sub_(60)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPLETED)
def test_what_completes_a_window_learns(case: str) -> None:
    """On other documents: it closes more of the gap that the window alone leaves than it did at its start."""
    key, options, switch_off = COMPLETED[case]
    calibration, held_out = documents()
    model = convert_model(minilm(), key, layers=[3], calibration=[calibration], **options)
    variant, test = next(iter(variants_of(model).values())), record(model, [held_out])[3]

    def errors() -> tuple[float, float]:
        """With it, and without it."""
        without = copy.deepcopy(variant)
        with torch.no_grad():
            switch_off(without)
        return output_errors(variant, test).error, output_errors(without, test).error

    before, window_before = errors()
    regress(variant, record(model, [calibration])[3], 20)
    after, window_after = errors()
    assert after < 0.97 * before
    assert after < 0.9 * window_after
    assert window_after == pytest.approx(window_before, rel=0.03)  # the window is not what became better


@pytest.mark.parametrize("tail", ["taylor", pytest.param("hedgehog", marks=pytest.mark.slow)])
def test_the_tail_of_a_window_learns_what_it_stands_for(tail: str) -> None:
    """On other documents, alone: nearer to softmax over the keys outside the window."""
    calibration, held_out = documents()
    options = {"window_size": 32, "tail": tail}
    model = convert_model(minilm(), "lolcats", layers=[3], calibration=[calibration], **options)
    variant, test = next(iter(variants_of(model).values())), record(model, [held_out])[3].inputs[0]
    place = torch.arange(test.query.shape[2])
    outside = (place - place[:, None]).abs() > 16
    if test.token_mask is not None:
        outside = outside & test.token_mask[:, None, None, :]
    logits = (test.query @ test.key.mT * test.scaling).masked_fill(~outside, -torch.inf)
    expected = logits.softmax(-1) @ test.value
    real = torch.ones(test.query.shape[0], len(place), dtype=torch.bool)
    real = (real if test.token_mask is None else test.token_mask)[:, None, :, None].expand_as(expected)

    def error() -> float:
        alone = copy.deepcopy(variant)
        with torch.no_grad():
            alone.window_log_factor.sub_(60)
            got = alone(test)[0]
        return ((got - expected)[real].norm() / expected[real].norm()).item()

    before = error()
    regress(variant, record(model, [calibration])[3], 20)
    assert error() < 0.97 * before
