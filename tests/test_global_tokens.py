"""The global tokens that a converted model chooses by its head or by their ids, in calls that name none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from hf_linear_attn import convert_model
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.heads import task_of
from tests.tiny import FAMILIES, PAD, base_model, build, head_classes, inputs_for, is_causal, tiny_config

SEP = 2
ROWS = [[1, 5, 6, 7, SEP, SEP, 8, 9, 10, 11, 12, 13, 14, SEP], [1, 5, SEP, SEP, 8, 9, 10, 11, 12, SEP]]
QUESTIONS = [4, 2]  # tokens up to the first separator
HEADS = [(family, cls) for family in FAMILIES for cls in head_classes(family) if task_of(cls) is not None]
ENCODERS = [pair for pair in HEADS if not is_causal(pair[0])]
DECODERS = [pair for pair in HEADS if is_causal(pair[0])]


def ids_of(*names: Any) -> list[str]:
    return [cls.__name__ for _, cls in names]


def batch_of() -> dict[str, torch.Tensor]:
    """Both rows, padded on the right."""
    length = max(map(len, ROWS))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ROWS])
    return {"input_ids": ids, "attention_mask": mask}


def marks(second: bool) -> torch.Tensor:
    place = torch.arange(max(map(len, ROWS)))
    rows = [
        (place > end + 1) & (place < len(row)) if second else place < end
        for row, end in zip(ROWS, QUESTIONS, strict=True)
    ]
    return torch.stack(rows).long()


def converted(cls: type, family: str, **options: Any) -> Any:
    config = tiny_config(family)
    config.sep_token_id = SEP
    model: PreTrainedModel = build(cls, config)  # type: ignore[arg-type]
    return convert_model(model.eval(), "longformer", **{"window_size": 2, **options})


def question_model(family: str = "roberta", **options: Any) -> Any:
    cls = next(cls for name, cls in ENCODERS if name == family and task_of(cls) == "question-answering")
    return converted(cls, family, **options)


@torch.no_grad()
def run(model: Any, batch: dict[str, torch.Tensor], **extra: torch.Tensor) -> torch.Tensor:
    return model(**inputs_for(model, {**batch, **extra}))[0]


@pytest.mark.parametrize(("family", "cls"), ENCODERS, ids=ids_of(*ENCODERS))
def test_a_head_chooses_its_tokens_and_a_mask_of_the_call_wins(family: str, cls: type) -> None:
    model, batch = converted(cls, family), batch_of()
    task = task_of(cls)
    second = task == "multiple-choice"
    chosen, first = marks(second), torch.zeros_like(batch["input_ids"])
    first[:, 0] = 1
    out = run(model, batch)
    torch.testing.assert_close(out, run(model, batch, global_attention_mask=chosen))
    by_first = run(model, batch, global_attention_mask=first)
    assert (out - by_first).abs().max() > 1e-3
    torch.testing.assert_close(run(converted(cls, family, num_global_tokens=1), batch), by_first)  # as one may ask for
    assert model.conversion_report.global_tokens == ("the second text" if second else "the question")
    assert "global tokens" in str(model.conversion_report)


@pytest.mark.parametrize(("family", "cls"), DECODERS, ids=ids_of(*DECODERS))
def test_decoders_stay_as_they_were(family: str, cls: type) -> None:
    model, batch = converted(cls, family), batch_of()
    assert model.conversion_report.global_tokens is None
    same = converted(cls, family, num_global_tokens=int(get_patcher(family).rotary))
    torch.testing.assert_close(run(model, batch), run(same, batch))


@pytest.mark.parametrize("family", [name for name in FAMILIES if not is_causal(name)])
def test_other_heads_and_none_keep_the_first_token(family: str) -> None:
    batch = batch_of()
    classes = [type(base_model(family))] + [
        cls for cls in head_classes(family) if cls.__name__.endswith(("MaskedLM", "ForSequenceClassification"))
    ]
    assert len(classes) == 3
    for cls in classes:
        model = converted(cls, family)
        first = torch.zeros_like(batch["input_ids"])
        first[:, 0] = 1
        torch.testing.assert_close(run(model, batch), run(model, batch, global_attention_mask=first))
        assert model.conversion_report.global_tokens is None


def test_token_types_come_before_separators() -> None:
    model, batch = question_model("bert"), batch_of()
    types = torch.zeros_like(batch["input_ids"])
    types[0, 8:14] = types[1, 6:10] = 1  # a question of two parts
    chosen = (types.cumsum(-1) == 0).long() * batch["attention_mask"]
    expected = run(model, batch, token_type_ids=types, global_attention_mask=chosen)
    torch.testing.assert_close(run(model, batch, token_type_ids=types), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    model = question_model()
    for row in ROWS:
        alone = run(model, {"input_ids": torch.tensor([row])})
        pads = [PAD] * 9
        ids = torch.tensor([pads + row if side == "left" else row + pads])
        out = run(model, {"input_ids": ids, "attention_mask": (ids != PAD).long()})
        torch.testing.assert_close(out[:, 9:] if side == "left" else out[:, : len(row)], alone)


def test_batches_that_are_mostly_padding_are_regrouped_and_give_the_same() -> None:
    model = question_model()
    rows = [ROWS[0][:-1] + [9] * 80 + [SEP], *ROWS[1:] * 5]
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    out = run(model, {"input_ids": ids, "attention_mask": (ids != PAD).long()})
    for own, row in zip(out, rows, strict=True):
        torch.testing.assert_close(own[: len(row)], run(model, {"input_ids": torch.tensor([row])})[0])


def test_packed_questions_stay_in_their_document() -> None:
    model = question_model("bert")
    lengths = torch.tensor([0, *map(len, ROWS)]).cumsum(0).int()
    ids = torch.tensor([[x for row in ROWS for x in row]])
    positions = torch.cat([torch.arange(len(row)) for row in ROWS])[None]
    out = run(model, {"input_ids": ids}, position_ids=positions, cu_seq_lens_q=lengths)
    for own, row in zip(out.split([*map(len, ROWS)], 1), ROWS, strict=True):
        torch.testing.assert_close(own, run(model, {"input_ids": torch.tensor([row])}))


def test_ids_are_global_under_any_head_and_survive_a_reload(tmp_path: Path) -> None:
    batch = batch_of()
    for model in (converted(type(base_model("roberta")), "roberta", global_token_ids=[9, 5]), question_model()):
        chosen = marks(False) if model.linear_attn_task else torch.isin(batch["input_ids"], torch.tensor([9, 5])).long()
        out = run(model, batch)
        torch.testing.assert_close(out, run(model, batch, global_attention_mask=chosen))
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(run(again, batch), out)
        assert again.conversion_report.global_tokens == model.conversion_report.global_tokens != ""
    assert AutoModelForQuestionAnswering.from_pretrained(tmp_path).linear_attn_task == "question-answering"


def test_layers_may_choose_apart_and_hybrids_have_softmax_beside() -> None:
    model: Any = build(type(base_model("roberta")), tiny_config("roberta")).eval()
    options = {"window_size": 2, "global_token_ids": 9}
    convert_model(model, {1: ("longformer", options)})
    batch, same = batch_of(), build(type(model).__bases__[1], tiny_config("roberta")).eval()
    chosen = (batch["input_ids"] == 9).long()
    out = run(model, batch)
    torch.testing.assert_close(out, run(model, batch, global_attention_mask=chosen))
    convert_model(same, {0: ("longformer", {"window_size": 2}), 1: ("longformer", options)})
    assert same.conversion_report.global_tokens == "ids 9"


def test_gradients_and_checkpointing_see_the_same_tokens() -> None:
    model, batch = question_model().train(), batch_of()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch)[0].square().sum().backward()
        found.append(model.base_model.encoder.layer[0].attention.self.linear_attn.query_global.weight.grad.clone())
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)


def test_a_head_that_cannot_tell_the_question_says_so() -> None:
    model, batch = question_model("distilbert"), batch_of()
    model.config.sep_token_id = model.config.eos_token_id = None
    first = torch.zeros_like(batch["input_ids"])
    first[:, 0] = 1
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_linear_attn.seam.heads")
    logger.addHandler(handler)
    try:
        run(model, batch, global_attention_mask=first)
        assert messages == []  # this call tells which
        out = run(model, batch)
        run(model, batch)
    finally:
        logger.removeHandler(handler)
    assert len(messages) == 1
    assert "model.config.sep_token_id = tokenizer.sep_token_id" in messages[0]
    torch.testing.assert_close(out, run(model, batch, global_attention_mask=first))


def test_ids_need_input_ids_and_an_export_a_count() -> None:
    model = converted(type(base_model("roberta")), "roberta", global_token_ids=5)
    embeds = model.get_input_embeddings()(batch_of()["input_ids"])
    with pytest.raises(ValueError, match=r"global_token_ids=\[5\].*inputs_embeds"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"num_global_tokens=1"):
        torch.export.export(question_model(), (), kwargs=batch_of(), strict=False)
    torch.export.export(question_model(num_global_tokens=1), (), kwargs=batch_of(), strict=False)
