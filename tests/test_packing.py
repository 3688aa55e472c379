"""Packed sequences and rows of padding: what runs bucket by bucket equals each sequence alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_linear_attn import convert_model
from hf_linear_attn.attention import with_sequence_plan
from hf_linear_attn.ops.base import packing
from hf_linear_attn.ops.exact.softmax import softmax_attention
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.checkpointing import enable_checkpointing
from tests.tiny import (
    FAMILIES,
    PAD,
    VOCAB,
    base_model,
    build,
    causal_lm,
    is_causal,
    main_family,
    over,
    representative_variants,
    small_options,
    tiny_config,
    token_batch,
    variants_for,
    without_dropout,
)

LENGTHS = (1, 40, 17, 5, 15)  # those of 17 and 15 share a bucket
DECODERS = [family for family in FAMILIES if is_causal(family)]
MAIN = {main_family(False), main_family(True)}
# Every variant on one family of each side, and two on a family with rotary embeddings and grouped keys.
PAIRS = [
    *((variant, family) for family in sorted(MAIN) for variant in variants_for(family)),
    *((variant, "llama") for variant in representative_variants("llama")),
]


@pytest.fixture(autouse=True)
def _many_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences as short as these would share one bucket."""
    monkeypatch.setattr(packing, "CALL_TOKENS", {"cpu": 1})


def converted(variant: str, family: str, seed: int = 0, **kwargs: Any) -> Any:
    model = base_model(family, **without_dropout(family))
    convert_model(model, variant, calibration=[token_batch()], **small_options(variant, family), **kwargs)
    torch.manual_seed(seed)
    with torch.no_grad():  # where training goes: nothing that starts at 0 may hide
        for name, parameter in model.named_parameters():
            if ".linear_attn." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def no_cache(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if get_patcher(model.config.base_model_type).is_causal(model.config) else {}


def run(model: Any, **kwargs: Any) -> torch.Tensor:
    """Hidden states `[B, T, C]`; the plan is made for all layers at once."""
    kwargs = with_sequence_plan(model, (), {**no_cache(model), **kwargs})
    return model(**kwargs).last_hidden_state


def first_position(model: Any) -> int:
    return get_patcher(model.config.base_model_type).position_offset(model.config)


def positions(model: Any, *lengths: int, start: int = 0) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None] + first_position(model) + start


def packed(model: Any, *lengths: int, start: int = 0) -> dict[str, torch.Tensor]:
    """What says that a row holds documents of these lengths: a decoder's positions do, an encoder's do not."""
    given = {"position_ids": positions(model, *lengths, start=start)}
    if not get_patcher(model.config.base_model_type).is_causal(model.config):
        given["cu_seq_lens_q"] = torch.tensor([0, *lengths]).cumsum(0).int()
    return given


def documents(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    return [token_batch(1, n, seed=seed + i)["input_ids"] for i, n in enumerate(lengths)]


def alone(model: Any, docs: list[torch.Tensor], start: int = 0, **kwargs: Any) -> list[torch.Tensor]:
    return [run(model, input_ids=x, position_ids=positions(model, x.shape[1], start=start), **kwargs)[0] for x in docs]


def assert_same(left: list[torch.Tensor] | tuple[torch.Tensor, ...], right: list[torch.Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


# --- packed rows ------------------------------------------------------------------------------------------------


@over(PAIRS)
def test_packed_equals_each_alone(variant: str, family: str) -> None:
    model = converted(variant, family)
    docs = documents(*LENGTHS)
    row = {"input_ids": torch.cat(docs, 1), **packed(model, *LENGTHS)}
    out = run(model, **row)[0].split(LENGTHS)
    weight = [torch.randn(n, 32) for n in LENGTHS]

    def gradients(outputs: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        sum((x * w).sum() for x, w in zip(outputs, weight, strict=True)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients(out)
    separate = alone(model, docs)
    theirs = gradients(separate)
    assert_same(out, separate)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(ours[name] / scale, expected / scale, atol=5e-5, rtol=1e-3, msg=name)

    # Other tokens in the second document: nothing else may move, not by a bit.
    docs[1] = documents(LENGTHS[1], seed=99)[0]
    with torch.no_grad():
        before, after = (run(model, **{**row, "input_ids": x}) for x in (row["input_ids"], torch.cat(docs, 1)))
    parts = list(zip(before[0].split(LENGTHS), after[0].split(LENGTHS), strict=True))
    assert not torch.equal(*parts.pop(1))
    assert all(torch.equal(a, b) for a, b in parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_find_packed_rows_without_a_common_plan(family: str) -> None:
    model = converted("linear", family)
    docs = documents(*LENGTHS)
    with torch.no_grad():
        out = model.forward(input_ids=torch.cat(docs, 1), **packed(model, *LENGTHS), **no_cache(model))
        assert_same(out.last_hidden_state[0].split(LENGTHS), alone(model, docs))


@pytest.mark.parametrize("family", sorted(MAIN))
@pytest.mark.parametrize("lengths", [(1,) * 9, (3, 4), (2, 1, 1, 30), (16, 16, 16)], ids=str)
@pytest.mark.parametrize("start", [0, 7])
@torch.no_grad()
def test_lengths_and_offsets(family: str, lengths: tuple[int, ...], start: int) -> None:
    model = converted("performer", family)
    docs = documents(*lengths)
    out = run(model, input_ids=torch.cat(docs, 1), **packed(model, *lengths, start=start))
    assert_same(out[0].split(lengths), alone(model, docs, start))


@pytest.mark.parametrize("family", sorted(MAIN))
@pytest.mark.parametrize("form", ["cu_seq_lens_q", "seq_idx", "both"])
@torch.no_grad()
def test_other_signs_of_packing(family: str, form: str) -> None:
    """Each sign alone is enough, whatever the positions say."""
    model = converted("linear", family)
    docs = documents(*LENGTHS)
    signs = {
        "cu_seq_lens_q": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        "seq_idx": torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))[None].int(),
    }
    given = {name: sign for name, sign in signs.items() if form in (name, "both")}
    at = positions(model, *LENGTHS)
    out = run(model, input_ids=torch.cat(docs, 1), position_ids=at, **given)[0].split(LENGTHS)
    assert_same(out, alone(model, docs))
    continued = positions(model, sum(LENGTHS))
    out = run(model, input_ids=torch.cat(docs, 1), position_ids=continued, **given)[0].split(LENGTHS)
    for begin, x, doc in zip((0, 1, 41, 58, 63), out, docs, strict=True):
        assert_same([x], alone(model, [doc], begin))


@pytest.mark.parametrize("family", sorted(MAIN))
@torch.no_grad()
def test_packed_rows_that_are_padded(family: str) -> None:
    """Several rows, documents with padding before, between and after."""
    model = converted("hedgehog", family)
    docs = documents(6, 11, 9)
    ids, mask = torch.full((2, 24), 7), torch.zeros(2, 24, dtype=torch.long)
    at = torch.zeros(2, 24, dtype=torch.long) + first_position(model)
    number = torch.zeros(2, 24, dtype=torch.long)
    places = [(0, range(2, 8)), (0, range(12, 23)), (1, range(9))]
    for (row, span), doc in zip(places, docs, strict=True):
        ids[row, span], mask[row, span], number[row, span] = doc[0], 1, len(doc[0])
        at[row, span] = positions(model, doc.shape[1])[0]
    out = run(model, input_ids=ids, attention_mask=mask, position_ids=at, seq_idx=number)
    assert_same([out[row, span] for row, span in places], alone(model, docs))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("family", [*sorted(MAIN), "mistral"])
@pytest.mark.parametrize("kept", [0, 1])
def test_hybrids(family: str, kept: int) -> None:
    """Layers that keep softmax, one of them with a sliding window where the family has them."""
    model = converted("performer", family, layers=[1 - kept])
    if family == "mistral":
        model.config.sliding_window = 6
    docs = documents(*LENGTHS)
    out = run(model, input_ids=torch.cat(docs, 1), **packed(model, *LENGTHS))[0].split(LENGTHS)
    assert_same(out, alone(model, docs))


@torch.no_grad()
def test_global_tokens_stay_in_their_document() -> None:
    family = main_family(False)
    model = converted("longformer", family)
    docs = documents(*LENGTHS)
    marks = [(x % 5 == 0).long() for x in docs]
    given = {"input_ids": torch.cat(docs, 1), **packed(model, *LENGTHS)}
    out = run(model, **given, global_attention_mask=torch.cat(marks, 1))[0].split(LENGTHS)
    for x, doc, mark in zip(out, docs, marks, strict=True):
        assert_same([x], alone(model, [doc], global_attention_mask=mark))


@torch.no_grad()
def test_cross_attention_sees_all_of_the_encoder() -> None:
    config = tiny_config("bert", is_decoder=True, add_cross_attention=True)
    model: Any = build(type(base_model("bert")), config)
    convert_model(model, "linear")
    states = torch.randn(1, 9, 32)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    docs = documents(*LENGTHS)
    extra = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    signs = {
        **packed(model, *LENGTHS),
        "seq_idx": torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))[None],
    }
    out = run(model, input_ids=torch.cat(docs, 1), **signs, **extra)
    assert_same(out[0].split(LENGTHS), alone(model, docs, **extra))


@pytest.mark.parametrize("family", DECODERS)
def test_packed_rows_with_a_cache_are_refused(family: str) -> None:
    model = converted("linear", family)
    given = {"input_ids": torch.cat(documents(4, 4), 1), "cu_seq_lens_q": torch.tensor([0, 4, 8])}
    for kwargs in (given, with_sequence_plan(model, (), given)):
        with pytest.raises(ValueError, match=r"Packed.*use_cache=False"):
            model(**kwargs, use_cache=True)


def test_calibration_refuses_packed_rows() -> None:
    model = base_model("gpt2")
    batch = {"input_ids": torch.cat(documents(4, 4), 1), "position_ids": torch.tensor([[0, 1, 2, 3] * 2])}
    with pytest.raises(ValueError, match="Packed"):
        convert_model(model, "performer", calibration=[batch])


@pytest.mark.parametrize("bad", [torch.zeros(3, 8, dtype=torch.long), torch.zeros(1, 7, dtype=torch.long)], ids=str)
def test_ids_of_another_shape_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"seq_idx has shape.*expected \(2, 8\)"):
        packing.plan_call(2, 8, seq_idx=bad)
    with pytest.raises(ValueError, match="among the 16 tokens"):
        packing.plan_call(2, 8, cu_seq_lens=torch.tensor([0, 17]))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_compiled_model_takes_contiguous_rows_only(family: str) -> None:
    """In one graph, which asserts it."""
    config = tiny_config(family, num_hidden_layers=1, **without_dropout(family))
    model: Any = convert_model(build(type(base_model(family)), config), "linear")
    ids = torch.cat(documents(4, 4), 1)
    torch._dynamo.reset()
    compiled = torch.compile(lambda at: run(model, input_ids=ids, position_ids=at), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(positions(model, 8)), run(model, input_ids=ids))
        with pytest.raises(RuntimeError, match="Packed"):
            compiled(positions(model, 4, 4))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = converted("longformer", "llama").train()
    docs = documents(*LENGTHS)
    given = {"input_ids": torch.cat(docs, 1), "position_ids": positions(model, *LENGTHS)}
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model, use_reentrant=reentrant)
        model.zero_grad()
        run(model, **given).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("flash", [False, True])
def test_trainer_with_the_flattening_collator(tmp_path: Any, flash: bool) -> None:
    """A step on a flattened batch is the step on the padded batch of the same documents."""
    docs = [{"input_ids": x[0].tolist()} for x in documents(9, 30, 14, 3)]
    after = []
    for flat in (True, False):
        model = causal_lm("gpt2", **without_dropout("gpt2"))
        convert_model(model, "performer")

        def pad(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            longest = max(len(x["input_ids"]) for x in features)
            rows = [x["input_ids"] + [PAD] * (longest - len(x["input_ids"])) for x in features]
            ids = torch.tensor(rows)
            return {"input_ids": ids, "attention_mask": ids.ne(PAD).long(), "labels": ids.masked_fill(ids == PAD, -100)}

        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_seq_idx=flash) if flat else pad
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(flat)),
            per_device_train_batch_size=4,
            max_steps=2,
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            optim="sgd",
        )
        Trainer(model=model, args=arguments, data_collator=collator, train_dataset=docs).train()
        after.append({name: p.detach() for name, p in model.named_parameters()})
    start = dict(causal_lm("gpt2").named_parameters())
    assert any((after[0][name] - p).abs().max() > 1e-5 for name, p in start.items())
    for name, p in after[0].items():
        torch.testing.assert_close(p, after[1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_work_grows_with_the_tokens_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long packed row costs what its documents do: tokens in a converted layer, pairs in one that keeps softmax."""
    monkeypatch.undo()  # the cost of calls as measured
    tokens, pairs = [], []

    def counting(q: torch.Tensor, k: torch.Tensor, *args: Any) -> torch.Tensor:
        pairs.append(q.shape[0] * q.shape[2] * k.shape[2])
        return softmax_attention(q, k, *args)

    monkeypatch.setattr("hf_linear_attn.attention.softmax_attention", counting)
    model: Any = base_model("gpt2", max_position_embeddings=2048)
    convert_model(model, "linear", layers=[1])
    model.h[1].attn.linear_attn.register_forward_pre_hook(
        lambda _, args: tokens.append(args[0].query.shape[0] * args[0].query.shape[2])
    )
    lengths = torch.randint(10, 90, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.randint(5, VOCAB, (1, sum(lengths)))
    with torch.no_grad():
        run(model, input_ids=ids, position_ids=positions(model, *lengths))
    assert sum(lengths) <= sum(tokens) < 1.3 * sum(lengths)
    assert sum(pairs) < 1.5 * sum(n * n for n in lengths) < 0.1 * sum(lengths) ** 2
    assert len(tokens) == len(pairs) < 8, "a bucket is worth its calls"


# --- padded batches ---------------------------------------------------------------------------------------------


def ragged(side: str) -> dict[str, torch.Tensor]:
    batch = token_batch(4, 40)
    lengths, places = torch.tensor([[40], [9], [4], [8]]), torch.arange(40)
    if side == "holes":
        batch["attention_mask"] = (torch.rand(4, 40, generator=torch.Generator().manual_seed(5)) < lengths / 40).long()
    else:
        batch["attention_mask"] = (places < lengths if side == "right" else places >= 40 - lengths).long()
    return batch


@over([(variant, family) for family in sorted(MAIN) for variant in representative_variants(family)])
def test_regrouped_padding_changes_nothing(variant: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(variant, family)
    for side in ("right", "left", "holes"):
        batch = ragged(side)
        real = batch["attention_mask"].bool()
        outputs, grads, used = [], [], []
        for share in (0.0, 10.0):
            monkeypatch.setattr(packing, "PAYING_SHARE", share)
            plan = with_sequence_plan(model, (), {**batch})["linear_attn_plan"]
            used.append(len(plan.buckets))
            model.zero_grad()
            out = run(model, **batch)
            assert torch.isfinite(out).all()
            out[real].square().sum().backward()
            outputs.append([out[real].detach()])
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert used[0] == 0 < 1 < used[1]
        assert_same(outputs[1], outputs[0])
        for a, b in zip(*grads, strict=True):
            scale = max(1.0, b.abs().max().item())
            torch.testing.assert_close(a / scale, b / scale, atol=5e-5, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_sliding_window_of_softmax_counts_places_as_upstream(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PAYING_SHARE", 10.0)
    used = {"use_sliding_window": True, "max_window_layers": 0} if family == "qwen2" else {}
    model: Any = base_model(family, sliding_window=5, **used)
    upstream = copy.deepcopy(model)
    convert_model(model, "memory", layers=[1])
    for side in ("right", "left", "holes"):
        batch = ragged(side)
        real = batch["attention_mask"].bool()
        assert with_sequence_plan(model, (), batch)["linear_attn_plan"].buckets
        given = {**batch, "position_ids": (real.cumsum(-1) - 1).clamp(min=0), "use_cache": False}
        found, expected = (m(**given, output_hidden_states=True).hidden_states[1][real] for m in (model, upstream))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_poison_at_padding_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PAYING_SHARE", 10.0)
    for family in sorted(MAIN):
        model = converted("hedgehog", family)
        batch = ragged("right")
        real = batch["attention_mask"].bool()
        clean = model.get_input_embeddings()(batch.pop("input_ids"))
        dirty = clean.masked_fill(~real[..., None], 1e9)
        a, b = (run(model, inputs_embeds=x, **batch)[real] for x in (clean, dirty))
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", representative_variants(main_family(True)))
def test_generation_is_what_it_was(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache nothing is regrouped; without one the same tokens come out of a left-padded batch."""
    monkeypatch.setattr(packing, "PAYING_SHARE", 10.0)
    regrouped: list[int] = []
    original = packing.attend_by_bucket
    monkeypatch.setattr(
        "hf_linear_attn.attention.attend_by_bucket", lambda *args: regrouped.append(1) or original(*args)
    )
    model = causal_lm("gpt2")
    convert_model(model, variant, **small_options(variant, "gpt2"))
    batch, kwargs = ragged("left"), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    cached = model.generate(**batch, **kwargs)
    assert not regrouped
    assert torch.equal(model.generate(**batch, **kwargs, use_cache=False), cached)
    assert regrouped
    for row, mask in enumerate(batch["attention_mask"].bool()):
        single = model.generate(input_ids=batch["input_ids"][row, mask][None], **kwargs)
        assert torch.equal(single[0, -6:], cached[row, -6:])


@torch.no_grad()
def test_losses_of_a_padded_batch() -> None:
    model = causal_lm("gpt2")
    convert_model(model, "linear")
    batch = ragged("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels, use_cache=False).loss
    rows = [model(x[m.bool()][None], use_cache=False).logits[0] for x, m in zip(*batch.values(), strict=True)]
    losses = [F.cross_entropy(x[:-1], y[1 : len(x)], reduction="sum") for x, y in zip(rows, labels, strict=True)]
    torch.testing.assert_close(loss, sum(losses) / (labels[:, 1:] != -100).sum())
