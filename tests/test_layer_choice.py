"""Layers that keep softmax: what their conversion costs is measured as a user would, by converting them alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_linear_attn import convert_model, revert_model
from hf_linear_attn.layer_choice import layers_to_keep
from hf_linear_attn.seam.sharing import variants_of
from tests.test_calibration import padded_batches
from tests.test_real_weights import batches as documents
from tests.test_real_weights import minilm
from tests.tiny import base_model, build, inputs_for, outputs_of, tiny_config, token_batch


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
    assert f"where converting hurt the final hidden states most on the batches: {worst[0]}, {worst[1]}" in str(report)
    assert report.to_dict()["kept_softmax"] == worst
    assert report.to_dict()["kept_softmax_by"] == "states"
    same = convert_model(
        base_model(family, num_hidden_layers=4),
        {layer: None if layer in worst else ("longformer", {"window_size": 2}) for layer in range(4)},
        calibration=batches,
    )
    for a, b in zip(outputs_of(model, batches[0]), outputs_of(same, batches[0]), strict=True):
        assert torch.equal(a, b)


# ---- by the output of the head -----------------------------------------------------------------------------------

HEADS: dict[str, tuple[type[PreTrainedModel], str, dict[str, Any]]] = {
    "gpt2": (GPT2LMHeadModel, "gpt2", {}),
    "llama": (LlamaForCausalLM, "llama", {}),
    "masked": (BertForMaskedLM, "bert", {}),
    "classes": (BertForSequenceClassification, "bert", {"num_labels": 3}),
    "labels": (BertForSequenceClassification, "bert", {"problem_type": "multi_label_classification"}),
    "spans": (BertForQuestionAnswering, "bert", {}),
}
OPTIONS = {"variant": "longformer", "window_size": 2, "num_global_tokens": 0}


def head_model(name: str) -> PreTrainedModel:
    cls, family, overrides = HEADS[name]
    return build(cls, tiny_config(family, num_hidden_layers=4, initializer_range=0.5, **overrides))


def distributions(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Each distribution that the model gives for real tokens, one by one, in float64: `[classes]`."""
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        out = model(**batch)
    if "start_logits" in out:
        logits = [x[row][real[row]] for x in (out.start_logits, out.end_logits) for row in range(len(real))]
        return [x.double().softmax(-1) for x in logits]
    if model.config.problem_type == "multi_label_classification":
        yes = out.logits.double().sigmoid().flatten()
        return [torch.stack([p, 1 - p]) for p in yes]
    rows = out.logits[real] if out.logits.ndim == 3 else out.logits
    return list(rows.double().softmax(-1))


def divergence(name: str, layer: int, batches: list[dict[str, torch.Tensor]]) -> float:
    """KL of what the model gives once `layer` alone is converted from what the checkpoint gives, summed."""
    exact, found = (head_model(name) for _ in range(2))
    convert_model(found, layers=[layer], **OPTIONS)
    total = 0.0
    for batch in batches:
        for p, q in zip(distributions(exact, batch), distributions(found, batch), strict=True):
            total += (p * (p.log() - q.log())).sum().item()
    return total


@pytest.mark.parametrize("name", HEADS)
def test_layers_are_ranked_by_the_divergence_of_what_the_head_gives(name: str) -> None:
    batches = padded_batches()
    cost = [divergence(name, layer, batches) for layer in range(4)]
    ranking = sorted(range(4), key=lambda layer: -cost[layer])
    model = convert_model(head_model(name), **OPTIONS)
    for count in (1, 2, 3):
        assert layers_to_keep(model, batches, count) == (sorted(ranking[:count]), "output")


def test_the_choice_is_by_what_the_user_says() -> None:
    """The last layer moves states that the head does not look at."""
    batches, chosen = padded_batches(), {}
    for by in ("output", "states", None):
        model = head_model("gpt2")
        with torch.no_grad():
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
            model.lm_head.weight[:, 4:] = 0  # the head reads four channels, and the last layer does not write there
            last = model.transformer.h[3]
            for projection in (last.attn.c_proj, last.mlp.c_proj):
                projection.weight[:, :4] = 0
            last.attn.c_proj.weight *= 10
            model.transformer.ln_f = torch.nn.Identity()
        convert_model(model, layers="auto", keep_softmax=3, keep_softmax_by=by, calibration=batches, **OPTIONS)
        chosen[by] = model.conversion_report.kept_softmax
        assert model.conversion_report.kept_softmax_by == (by or "output")
    assert 3 in chosen["states"]
    assert chosen["output"] == chosen[None] == [0, 1, 2]


@pytest.mark.parametrize("overrides", [{"num_labels": 1}, {"problem_type": "regression"}, {"return_dict": False}])
def test_a_head_that_gives_scores_is_left_out_of_it(overrides: dict[str, Any]) -> None:
    batches = padded_batches(1)

    def model() -> PreTrainedModel:
        return build(BertForSequenceClassification, tiny_config("bert", num_hidden_layers=3, **overrides))

    converted = convert_model(model(), "linear", layers="auto", keep_softmax=1, calibration=batches)
    assert converted.conversion_report.kept_softmax_by == "states"
    scores = model()
    with pytest.raises(ValueError, match="BertForSequenceClassification gives no distribution; allowed: 'states'"):
        convert_model(scores, "linear", layers="auto", keep_softmax=1, keep_softmax_by="output", calibration=batches)
    assert type(scores) is BertForSequenceClassification
    assert not variants_of(scores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_softmax_by": "logits"}, "keep_softmax_by='logits'; allowed: 'output', 'states' or None"),
        ({"keep_softmax_by": ["output"]}, r"keep_softmax_by=\['output'\]; allowed"),
        ({"keep_softmax_by": "output"}, "BertModel has no head; allowed: 'states' or None"),
        ({"keep_softmax_by": "states", "layers": None, "keep_softmax": None}, "goes with layers='auto'"),
    ],
)
def test_a_wrong_criterion_is_named(arguments: dict[str, Any], message: str) -> None:
    model = base_model("bert")
    given = {"layers": "auto", "keep_softmax": 1, "calibration": padded_batches(1), **arguments}
    with pytest.raises(ValueError, match=message):
        convert_model(model, "linear", **given)
    assert not variants_of(model)


def test_what_comes_before_the_layer_is_not_computed_again_and_nothing_is_left_behind() -> None:
    model, batches = head_model("llama"), [token_batch()]
    ran: list[int] = []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    wrapped = model.model.layers[0].forward
    model.model.layers[0].forward = wrapped  # as Accelerate's hooks have it
    convert_model(model, **OPTIONS)
    before = [dict(vars(module)) for module in model.modules()]
    layers_to_keep(model, batches, 1, "states")
    assert ran == [0, 1, 2, 3, 0, 1, 2, 3, 1, 2, 3, 2, 3, 3]
    assert [dict(vars(module)) for module in model.modules()] == before


# ---- together with the rest of a conversion -----------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("variant", "options"),
    [pytest.param("hedgehog", {}, marks=pytest.mark.slow), ("longformer", {"window_size": 32})],
)
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
