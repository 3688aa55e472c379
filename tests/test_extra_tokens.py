"""Tokens that travel through an encoder's layers in front of the sequence, hidden from the caller: BigBird's ETC."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertForSequenceClassification

from hf_linear_attn import convert_model, revert_model
from hf_linear_attn.calibration import variants_by_layer
from hf_linear_attn.seam.checkpointing import enable_checkpointing
from hf_linear_attn.seam.extra_tokens import WithExtraTokens, extra_tokens_of
from hf_linear_attn.training.prefix import FrozenPrefix
from tests.exporting import LastHiddenState, export, largest_error
from tests.tiny import (
    FAMILIES,
    base_model,
    build,
    causal_lm,
    head_classes,
    is_causal,
    tiny_config,
    token_batch,
    without_dropout,
)

BLOCK, COUNT, SHIFT = 4, 3, 0.7
OPTIONS: dict[str, Any] = {"block_size": BLOCK, "form": "etc_traveling", "num_global_tokens": COUNT}
TRAVELING = ("bigbird", OPTIONS)
ENCODERS = [family for family in FAMILIES if not is_causal(family)]


def converted(family: str = "bert", variant: Any = "bigbird", shift: float | None = SHIFT, **overrides: Any) -> Any:
    options = OPTIONS if isinstance(variant, str) else {}
    model = convert_model(base_model(family, **overrides), variant, **options)
    for module in model.modules():
        if shift is not None and getattr(module, "num_extra_tokens", 0):
            module.global_shift.fill_(shift)
    return model


def masks(length: int) -> dict[str, torch.Tensor]:
    place = torch.arange(length)
    of_rows = {
        "none": [place >= 0, place >= 0],
        "left": [place >= 9, place >= 1],
        "right": [place < length - 9, place < length - 2],
        "interior": [place % 5 != 1, place % 7 != 3],
    }
    return {name: torch.stack(rows).long() for name, rows in of_rows.items()}


def text_weights(logits: torch.Tensor, traveling: bool) -> torch.Tensor:
    """Weights of the real tokens of one sequence `[H, T, G + T]` over the tokens that travel and over themselves."""
    length = logits.shape[1]
    allowed = torch.zeros(length, COUNT + length, dtype=torch.bool)
    for i in range(length):
        allowed[i, :COUNT] = traveling
        for j in range(length):
            mine, its, last = i // BLOCK, j // BLOCK, (length - 1) // BLOCK
            allowed[i, COUNT + j] = not traveling or abs(mine - its) <= 1 or not {0, last}.isdisjoint({mine, its})
    shifted = torch.cat([logits[..., :COUNT] + SHIFT, logits[..., COUNT:]], -1)
    return shifted.masked_fill(~allowed, -math.inf).softmax(-1)


@torch.no_grad()
def dense(model: Any, real: torch.Tensor, embedded: torch.Tensor, traveling: tuple[bool, bool]) -> list[torch.Tensor]:
    """BERT in fp64, one sequence without its padding at a time: the states of the real tokens after each layer."""
    model = copy.deepcopy(model).double()
    states = [embedded[real].double()]
    tokens = extra_tokens_of(model).tokens  # type: ignore[union-attr]
    for layer, travels in zip(model.encoder.layer, traveling, strict=True):
        x = torch.cat([tokens, states[-1]])
        own = layer.attention.self
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(0, 1) for f in (own.query, own.key, own.value))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        weights = torch.cat([logits[:, :COUNT].softmax(-1), text_weights(logits[:, COUNT:], travels)], 1)
        attended = layer.attention.output((weights @ v).transpose(0, 1).flatten(1), x)
        after = layer.output(layer.intermediate(attended), attended)
        tokens, text = after[:COUNT], after[COUNT:]
        states.append(text)
    return states


MAPS = [
    ("bigbird", (True, True)),
    ({0: TRAVELING, 1: None}, (True, False)),
    ({0: None, 1: TRAVELING}, (False, True)),
]


@pytest.mark.parametrize("where", ["none", "left", "right", "interior"])
@pytest.mark.parametrize(("variant", "traveling"), MAPS, ids=["all", "first", "second"])
def test_equals_a_dense_model_in_float64(variant: Any, traveling: tuple[bool, bool], where: str) -> None:
    """Hidden states too; layers that keep softmax read the text alone, while the tokens that travel read all."""
    model = converted(variant=variant)
    for length in (11, 45):
        batch = token_batch(length=length)
        mask = batch["attention_mask"] = masks(length)[where]
        with torch.no_grad():
            found = model(**batch, output_hidden_states=True)
            embedded = model.embeddings(batch["input_ids"])
        assert [x.shape for x in found.hidden_states] == [(2, length, 32)] * 3
        assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
        for row in range(2):
            real = mask[row].bool()
            for got, want in zip(found.hidden_states, dense(model, real, embedded[row], traveling), strict=True):
                torch.testing.assert_close(got[row][real].double(), want, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.pooler_output, model.pooler(found.last_hidden_state))


@pytest.mark.parametrize("other", [None, "linear", ("longformer", {"window_size": 4}), "linformer"], ids=str)
def test_where_nobody_reads_them_the_text_is_what_it_is_without(other: Any) -> None:
    """Whatever the other layer runs, its positions, its first token and its mask are those of the text."""
    itc = "bigbird", {"block_size": BLOCK, "num_random_blocks": 0}
    batch = token_batch(length=45)
    batch["attention_mask"][0, 30:] = 0
    for order in (1, -1):
        model = converted(variant=dict(enumerate([TRAVELING, other][::order])), shift=-1e9)
        without = convert_model(base_model("bert"), dict(enumerate([itc, other][::order])))
        torch.testing.assert_close(model(**batch)[0], without(**batch)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ENCODERS)
def test_every_family_and_head(family: str, tmp_path: Path) -> None:
    """Nothing of what a head returns is longer, and a reload and a copy give the same."""
    heads = head_classes(family)
    for cls in heads if family == "bert" else heads[-1:]:
        if "LMHead" in cls.__name__ or "CausalLM" in cls.__name__:
            continue
        model: Any = build(cls, tiny_config(family))
        batch = token_batch(length=20)
        if "MultipleChoice" in cls.__name__:
            batch = {name: x[:, None].repeat(1, 2, 1) for name, x in batch.items()}
        before = {k: v.shape for k, v in model(**batch, output_hidden_states=True).items() if k != "hidden_states"}
        torch.manual_seed(0)
        convert_model(model, "bigbird", **OPTIONS)
        assert {k: v.shape for k, v in model(**batch).items()} == before, cls.__name__
        alike = copy.deepcopy(model)
        found = model(**batch, output_hidden_states=True)
        assert {x.shape[1] for x in found.hidden_states} == {20}
        plain = model(**batch, output_hidden_states=True, return_dict=False)
        assert {x.shape[1] for x in next(part for part in plain if isinstance(part, tuple))} == {20}
        model.save_pretrained(tmp_path / cls.__name__)
        again: Any = type(model).from_pretrained(tmp_path / cls.__name__).eval()
        for other in (again, alike, pickle.loads(pickle.dumps(again))):
            assert torch.equal(other(**batch)[0], found[0])


@pytest.mark.parametrize("family", ENCODERS)
def test_softmax_is_one_switch_away_and_a_revert_is_exact(family: str) -> None:
    original = base_model(family)
    expected, batch = copy.deepcopy(original), token_batch(length=30)
    model = convert_model(original, "bigbird", **OPTIONS)
    found = model(**batch)[0]
    model.set_attn_implementation("sdpa")
    expected.set_attn_implementation("sdpa")
    assert torch.equal(model(**batch)[0], expected(**batch)[0])
    model.set_attn_implementation("linear_attn")
    assert torch.equal(model(**batch)[0], found)
    revert_model(model)
    assert [type(x) for x in model.modules()] == [type(x) for x in expected.modules()]
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert torch.equal(model(**batch)[0], expected(**batch)[0])


def test_embeddings_in_place_of_ids_and_batch_mates() -> None:
    model, batch = converted(), token_batch(batch=3, length=37)
    batch["attention_mask"][1, 12:] = 0
    found = model(**batch)[0]
    embeds = model.get_input_embeddings()(batch["input_ids"])
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0], found)
    alone = model(batch["input_ids"][1:2, :12])[0]
    torch.testing.assert_close(found[1:2, :12], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_them_and_checkpointing_changes_none(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = converted(**without_dropout("bert")).train()
        if checkpointing:
            enable_checkpointing(model, use_reentrant=reentrant)
        ids = token_batch(length=37)["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        model(inputs_embeds=embeds)[0].square().sum().backward()
        return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain["encoder.linear_attn.tokens"].abs().min() > 0
    torch.testing.assert_close(again, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, batch = converted(), token_batch(length=37)
    with torch.no_grad():
        expected = model(**batch)[0]
        found = model.to(dtype)(**batch)[0]
    assert found.dtype == dtype
    softmax = base_model("bert")
    with torch.no_grad():
        usual = (softmax(**batch)[0] - copy.deepcopy(softmax).to(dtype)(**batch)[0].float()).norm()
    assert (found.float() - expected).norm() < 2 * usual


def test_what_does_not_go_is_refused_before_anything_changes() -> None:
    with pytest.raises(ValueError, match=r"form='etc_traveling' is for encoders.*Allowed here: form='itc'"):
        convert_model(causal_lm("bert"), "bigbird", **OPTIONS)
    model = base_model("bert")
    kinds = [type(x) for x in model.modules()]
    with pytest.raises(ValueError, match="the same in all of them; asked for: layer 0: 3, layer 1: 5"):
        convert_model(model, {0: TRAVELING, 1: ("bigbird", {**OPTIONS, "num_global_tokens": 5})})
    assert [type(x) for x in model.modules()] == kinds
    model, ids = converted(), token_batch(batch=1, length=20)["input_ids"]
    with pytest.raises(ValueError, match=r"Packed sequences .* tokens that travel in front of their row"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 8, 20]))
    with pytest.raises(ValueError, match="cache_frozen_layers=False"):
        FrozenPrefix().check(model, 1)


def test_calibration_chooses_their_weight_and_worsens_no_layer() -> None:
    batches = [{"input_ids": token_batch(length=60, seed=seed)["input_ids"]} for seed in range(2)]
    model = convert_model(base_model("bert"), "bigbird", **OPTIONS, calibration=batches)
    rows = model.conversion_report.rows
    assert all(row.output_error <= row.published_error for row in rows)
    assert any(row.output_error < row.published_error for row in rows)
    assert model.conversion_report.new_parameters == COUNT * 32
    auto = convert_model(base_model("bert"), "bigbird", **OPTIONS, layers="auto", keep_softmax=1, calibration=batches)
    assert torch.equal(extra_tokens_of(auto).tokens, extra_tokens_of(model).tokens)  # type: ignore[union-attr]


def test_layers_that_ask_no_more_take_them_away(tmp_path: Path) -> None:
    model = converted(variant={0: TRAVELING, 1: None})
    del model.encoder.layer[0]
    model.config.num_hidden_layers = 1
    batch = token_batch(length=20)
    found = model(**batch)[0]
    assert extra_tokens_of(model) is None
    assert not isinstance(model.encoder, WithExtraTokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(**batch)[0], found)


def test_peft_trains_and_saves_them(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = convert_model(build(BertForSequenceClassification, tiny_config("bert")), "bigbird", **OPTIONS)
    base = copy.deepcopy(model)
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, modules_to_save=["linear_attn", "classifier"]))
    batch = token_batch(length=20)
    wrapped(**batch, labels=torch.tensor([0, 1])).loss.backward()
    grown = {name for name, x in wrapped.named_parameters() if x.grad is not None and "linear_attn" in name}
    assert grown == {"base_model.model.bert.encoder.linear_attn.modules_to_save.default.tokens"}
    with torch.no_grad():
        wrapped.get_parameter(*grown).add_(1.0)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(again(**batch)[0], wrapped.eval()(**batch)[0])


def test_a_checkpoint_without_them_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    converted().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.linear_attn.tokens"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: encoder\.linear_attn\.tokens"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [OPTIONS, {}], ids=["traveling", "none"])
def test_a_forward_hook_may_put_the_outputs_beside_something_else(options: dict[str, Any]) -> None:
    model = convert_model(base_model("bert"), "bigbird", **options).eval()
    ids = torch.arange(1, 21)[None]
    expected = model(ids, output_hidden_states=True).hidden_states
    with model.register_forward_hook(lambda *given: (torch.zeros(()), given[-1])):
        _, outputs = model(ids, output_hidden_states=True)
    assert {x.shape for x in outputs.hidden_states} == {(1, 20, 32)}
    assert all(torch.equal(got, want) for got, want in zip(outputs.hidden_states, expected, strict=True))


@pytest.mark.parametrize(
    ("options", "number"),
    [({}, 3), ({"form": "etc"}, 3), (OPTIONS, 0), ({**OPTIONS, "num_random_blocks": 2}, 2)],
)
def test_random_blocks_are_off_where_tokens_travel_and_stay_elsewhere(options: dict[str, Any], number: int) -> None:
    model = convert_model(base_model("bert"), "bigbird", **options)
    assert [variant.num_random_blocks for variant in variants_by_layer(model).values()] == [number, number]
    stored = model.config.linear_attn["layers"][0]["options"]["num_random_blocks"]
    assert stored == options.get("num_random_blocks")


@pytest.mark.parametrize("masked", [pytest.param(True, marks=pytest.mark.slow), False])
def test_one_exported_program_serves_all_lengths(masked: bool) -> None:
    model = LastHiddenState(converted()).eval()
    assert largest_error(model, export(model, masked=masked).module(), masked=masked) < 1e-4
