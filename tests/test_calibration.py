"""Calibration: errors per layer and head, per-layer regression, and the choice of layers that keep softmax."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertForMultipleChoice, PreTrainedModel

from hf_linear_attn import convert_model, revert_model
from hf_linear_attn.calibration import output_errors, record, regress
from hf_linear_attn.seam.sharing import variants_of
from hf_linear_attn.variants.linformer import LinformerAttention
from tests.test_real_weights import batches as documents
from tests.test_real_weights import minilm
from tests.tiny import base_model, build, causal_lm, inputs_for, outputs_of, tiny_config, token_batch

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
    monkeypatch.setattr("hf_linear_attn.calibration.output_errors", lambda *a: (_ for _ in ()).throw(RuntimeError))
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


# ---- layers that keep softmax -------------------------------------------------------------------------------------


def moved_by(model: PreTrainedModel, layer: int, batches: list[dict[str, torch.Tensor]], **options: Any) -> float:
    """How far the final hidden states move when only `layer` is converted."""

    def states() -> list[torch.Tensor]:
        return [outputs_of(model, batch)[0][batch["attention_mask"].bool()] for batch in batches]

    softmax = states()
    convert_model(model, layers=[layer], calibration=batches, **options)
    moved = sum((a - b).square().sum().item() for a, b in zip(states(), softmax, strict=True))
    revert_model(model)
    return moved


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_auto_keeps_softmax_where_converting_hurts_most(family: str) -> None:
    model, batches = base_model(family, num_hidden_layers=4), padded_batches()
    options = {"variant": "longformer", "window_size": 2}
    moved = [moved_by(model, layer, batches, **options) for layer in range(4)]
    worst = sorted(sorted(range(4), key=lambda layer: -moved[layer])[:2])
    convert_model(model, layers="auto", keep_softmax=2, calibration=batches, **options)
    report = model.conversion_report
    assert report.kept_softmax == worst
    assert [row.layer for row in report.rows if row.variant == "softmax"] == worst
    assert [row.output_error is None for row in report.rows] == [layer in worst for layer in range(4)]
    assert f"keep softmax, chosen where converting hurt most on the batches: {worst[0]}, {worst[1]}" in str(report)
    assert report.to_dict()["kept_softmax"] == worst
    same = convert_model(
        base_model(family, num_hidden_layers=4),
        {layer: None if layer in worst else ("longformer", {"window_size": 2}) for layer in range(4)},
        calibration=batches,
    )
    for a, b in zip(outputs_of(model, batches[0]), outputs_of(same, batches[0]), strict=True):
        assert torch.equal(a, b)


def test_auto_with_shared_parameters_a_longer_table_and_steps_reloads(tmp_path: Any) -> None:
    model, batches = base_model("bert", num_hidden_layers=4), padded_batches(1)
    softmax = outputs_of(model, batches[0])
    convert_model(
        model,
        "linformer",
        layers="auto",
        keep_softmax=1,
        calibration=batches,
        calibration_steps=2,
        max_length=200,
        k=4,
        sharing="layerwise",
    )
    assert model.config.max_position_embeddings == 200
    assert len(variants_of(model)) == 3
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    for a, b in zip(outputs_of(model, batches[0]), outputs_of(again, batches[0]), strict=True):
        assert torch.equal(a, b)
    revert_model(model)
    for a, b in zip(outputs_of(model, batches[0]), softmax, strict=True):
        assert torch.equal(a, b)


def test_auto_on_a_head_whose_batches_have_choices() -> None:
    model = build(BertForMultipleChoice, tiny_config("bert", num_hidden_layers=3))
    batches = [inputs_for(model, batch) for batch in padded_batches(1)]
    convert_model(model, "linear", layers="auto", keep_softmax=1, calibration=batches)
    assert len(model.conversion_report.kept_softmax) == 1


def test_what_no_layer_receives_is_not_computed() -> None:
    """A head, and what comes after the last converted layer."""
    model, batches = causal_lm("llama", num_hidden_layers=3), [token_batch()]
    ran: list[str] = []
    for name in ("lm_head", "model.layers.1.mlp", "model.layers.2.self_attn"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    convert_model(model, "linear", layers=[0, 1], calibration=batches)
    assert ran == []
    revert_model(model)
    convert_model(model, "linear", layers="auto", keep_softmax=1, calibration=batches)
    assert "model.layers.2.self_attn" in ran
    assert "lm_head" not in ran


def test_an_exception_in_the_choice_undoes_the_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> list[int]:
        raise RuntimeError("no choice")

    monkeypatch.setattr("hf_linear_attn.convert.layers_to_keep", fails)
    model, batches = base_model("bert"), padded_batches(1)
    cls, config = type(model), model.config
    with pytest.raises(RuntimeError, match="no choice"):
        convert_model(model, "linear", layers="auto", keep_softmax=1, calibration=batches)
    assert type(model) is cls
    assert model.config is config
    assert not variants_of(model)


# ---- real weights -------------------------------------------------------------------------------------------------


def short_documents() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return tuple({name: x[:, :256] for name, x in batch.items()} for batch in documents())


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "options"), [("hedgehog", {}), ("longformer", {"window_size": 32})])
def test_auto_is_better_than_chance_on_other_documents(variant: str, options: dict[str, Any]) -> None:
    """Final hidden states of MiniLM with two layers on softmax, against every other pair."""
    calibration, held_out = short_documents()
    model = convert_model(minilm(), variant, calibration=[calibration], **options)
    running: set[int] = set()

    def run(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        return module.linear_attn(inputs)[0] if module.layer_idx in running else None

    def states(kept: set[int]) -> torch.Tensor:
        running.clear()
        running.update(set(range(6)) - kept)
        with torch.no_grad():
            states = model(**held_out, linear_attn_recorder=run).last_hidden_state
        return states[held_out["attention_mask"].bool()]

    exact = states(set(range(6)))
    errors = {kept: (states(set(kept)) - exact).norm().item() for kept in itertools.combinations(range(6), 2)}
    auto = convert_model(
        minilm(), variant, layers="auto", keep_softmax=2, calibration=[calibration], **options
    ).conversion_report.kept_softmax
    chosen = errors[(auto[0], auto[1])]
    assert chosen <= 1.02 * errors[(0, 1)]  # the first layers; for some methods they are the ones to keep
    assert chosen < 0.97 * sum(errors.values()) / len(errors)
    assert sorted(errors.values()).index(chosen) < 5


@pytest.mark.slow
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
