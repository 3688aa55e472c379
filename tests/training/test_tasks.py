"""The six tasks of fine-tuning, from documents to metrics, on tiny converted models that learn a planted rule."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, TrainingArguments

from hf_linear_attn import convert_model
from hf_linear_attn.data import load_documents
from hf_linear_attn.data.kinds import KINDS
from hf_linear_attn.measure.metrics import check_metrics
from hf_linear_attn.training import FinetuneTrainer
from hf_linear_attn.training.recipe import ModelRecipe
from hf_linear_attn.training.setup import build_tokenizer
from hf_linear_attn.training.tasks import TASKS, _best_span, get_task
from tests.tiny import build, tiny_config, without_dropout

FILLER = [f"w{index}" for index in range(12)]
MARKS = ["iron", "zinc", "plum", "pear"]
MAX_LENGTH = 40


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words as pieces of at most two: `iron` is `ir` and `##on`; pairs as BERT frames them."""
    pieces = ["ir", "zi", "pl", "pe", "##on", "##nc", "##um", "##ar"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *pieces, "who", "first", "second"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(draw: random.Random, count: int) -> list[str]:
    return [draw.choice(FILLER) for _ in range(count)]


def rows_of(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Documents whose label is a rule that a tiny model can learn."""
    draw, rows = random.Random(seed), []
    for index in range(count):
        body, mark = words(draw, draw.randint(8, 16)), MARKS[index % 2]
        place = draw.randrange(len(body))
        marked = [*body[:place], mark, *body[place:]]
        row: dict[str, Any]
        if kind == "sequence_classification":
            row = {"text": " ".join([*marked, mark, mark]), "label": mark}
        elif kind == "multi_label_classification":
            chosen = [name for name in MARKS[:3] if draw.random() < 0.5]
            row = {"text": " ".join([*body[:6], *chosen * 3]), "label": chosen}
        elif kind == "regression":
            often = draw.randint(0, 4)
            row = {"text": " ".join([*body[:8], *["iron"] * often, *["zinc"] * (4 - often)]), "label": float(often)}
        elif kind == "token_classification":
            tags = ["METAL" if word in MARKS else "O" for word in marked]
            row = {"tokens": marked, "label": tags}
        elif kind == "question_answering":
            context = " ".join(marked)
            answers = {"text": [mark], "answer_start": [context.index(mark)]}
            row = {"question": "who first", "context": context, "answers": answers}
        else:
            other = MARKS[1 - index % 2]
            choices = [mark, other] if draw.random() < 0.5 else [other, mark]
            label = choices.index("iron")
            row = {"context": " ".join(body), "question": "who", "choices": choices, "label": label}
        rows.append(row)
    return rows


def documents(kind: str, folder: Path, count: int = 48) -> Any:
    folder.mkdir(exist_ok=True)
    source = {}
    for seed, split in enumerate(("train", "test")):
        path = folder / f"{kind}-{split}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows_of(kind, count // (seed * 2 + 1), seed)) + "\n")
        source[split] = str(path)
    return load_documents(source, task=kind)


def model_of(family: str, kind: str, task: Any, tokenizer: Any) -> Any:
    head = {
        "bert": "Bert", "roberta": "Roberta", "gpt2": "GPT2", "llama": "Llama",
    }[family] + get_task(kind).auto_class.removeprefix("AutoModel")  # fmt: skip
    labels = {"num_labels": task.num_labels} if task.label_names else {}
    torch.manual_seed(0)
    config = tiny_config(
        family,
        **without_dropout(family),
        **labels,
        problem_type=get_task(kind).problem_type,
        pad_token_id=tokenizer.pad_token_id,  # RoBERTa counts positions from the one after it
    )
    if task.label_names:
        config.id2label = dict(enumerate(task.label_names))
    return convert_model(build(getattr(transformers, head), config), "linear")


def finetune(family: str, kind: str, folder: Path, steps: int = 100, **changes: Any) -> tuple[FinetuneTrainer, Any]:
    tokenizer, task = word_tokenizer(), documents(kind, folder / "documents")
    args = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=5,  # the last batch is another size
        learning_rate=4e-3,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    given: dict[str, Any] = {"max_length": MAX_LENGTH, "task": kind, **changes}
    model = model_of(family, kind, task, tokenizer)
    trainer = FinetuneTrainer(
        model, args, train_dataset=task.train, eval_dataset=task.test, processing_class=tokenizer, **given
    )
    return trainer, task


def independent(kind: str, trainer: FinetuneTrainer, task: Any) -> dict[str, float]:
    """The task's metrics, by other people's code or by hand."""
    found, real = trainer.predictions, trainer.references
    if kind in ("sequence_classification", "multiple_choice"):
        assert real == task.test["label"]
        own = {"accuracy": accuracy_score(real, found)}
        return own if kind == "multiple_choice" else {**own, "macro_f1": f1_score(real, found, average="macro")}
    if kind == "multi_label_classification":
        return {"micro_f1": f1_score(task.test["label"], found, average="micro", zero_division=0)}
    if kind == "regression":
        np.testing.assert_allclose(real, np.asarray(task.test["label"]).reshape(-1), rtol=1e-6)
        return {"pearson": np.corrcoef(real, found)[0, 1], "mse": np.square(np.subtract(real, found)).mean()}
    if kind == "token_classification":
        assert real == [[task.label_names[label] for label in row] for row in task.test["label"]]
        flat = [list(itertools.chain(*side)) for side in (real, found)]
        return {"token_accuracy": accuracy_score(*flat)}
    answers = [answer["text"][0] for answer in task.test["answers"]]
    assert real == [[answer] for answer in answers]
    assert all(text in context for text, context in zip(found, task.test["context"], strict=True))
    return {"exact_match": float(np.mean([one == other for one, other in zip(found, answers, strict=True)]))}


CASES = [
    *itertools.product(("bert", "roberta"), TASKS),
    *itertools.product(("gpt2",), ("sequence_classification", "multi_label_classification", "regression")),
    ("gpt2", "token_classification"),
    ("llama", "sequence_classification"),
    ("llama", "token_classification"),
]
ONCE = [("bert", kind) for kind in TASKS] + [("llama", "sequence_classification")]


@pytest.mark.parametrize(
    ("family", "kind"),
    [pytest.param(*case, marks=() if case in ONCE else pytest.mark.slow, id="-".join(case)) for case in CASES],
)
def test_a_converted_model_learns_the_task_and_its_metrics_are_right(family: str, kind: str, tmp_path: Path) -> None:
    trainer, task = finetune(family, kind, tmp_path)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    measured = trainer.evaluate()
    assert measured["eval_loss"] < 0.8 * before
    assert len(trainer.predictions) == len(task.test)
    for name, value in independent(kind, trainer, task).items():
        given = measured[f"eval_{name}"]
        assert given in (pytest.approx(value, abs=1e-5), pytest.approx(100 * value, abs=1e-3)), name
    check_metrics(trainer.metrics, kind)


def test_every_task_has_documents_a_head_and_metrics() -> None:
    assert set(TASKS) == set(KINDS) - {"text"}
    for task in TASKS.values():
        assert hasattr(transformers, task.auto_class)
        check_metrics(task.metrics, task.name)
    with pytest.raises(ValueError, match="allowed: sequence_classification, "):
        get_task("summarization")


@pytest.mark.parametrize("kind", TASKS)
def test_metrics_of_another_task_are_refused_before_the_run(kind: str, tmp_path: Path) -> None:
    wrong = "mse" if kind != "regression" else "accuracy"
    with pytest.raises(ValueError, match=f"not {kind}"):
        finetune("bert", kind, tmp_path, metrics=[wrong])
    with pytest.raises(ValueError, match="is not bundled"):
        finetune("bert", kind, tmp_path, metrics=["acuracy"])


# Words --------------------------------------------------------------------------------------------------------------


def test_labels_of_words_stand_at_their_first_pieces() -> None:
    rows = {"tokens": [["w0", "iron", "w1"], ["zinc"]], "label": [[5, 6, 7], [8]]}
    encoded = get_task("token_classification").encode(rows, word_tokenizer(), 40)
    assert encoded["labels"] == [[-100, 5, 6, -100, 7, -100], [-100, 8, -100, -100]]
    assert encoded["length"] == [3, 1]


@pytest.mark.parametrize(("limit", "kept"), [(3, [5]), (4, [5, 6]), (5, [5, 6]), (6, [5, 6, 7])])
def test_words_that_are_cut_off_are_not_counted(limit: int, kept: list[int]) -> None:
    rows = {"tokens": [["w0", "iron", "w1"]], "label": [[5, 6, 7]]}
    encoded = get_task("token_classification").encode(rows, word_tokenizer(), limit)
    assert len(encoded["input_ids"][0]) == limit
    assert [label for label in encoded["labels"][0] if label != -100] == kept


def test_words_are_named_in_the_order_of_the_logits(tmp_path: Path) -> None:
    trainer, task = finetune("bert", "token_classification", tmp_path)
    names = trainer.model.config.id2label  # a saved config of eleven labels lists 10 after 1
    trainer.model.config.id2label = dict(reversed(list(names.items())))
    trainer.evaluate()
    assert trainer.references == [[task.label_names[label] for label in row] for row in task.test["label"]]


def test_predictions_of_words_are_names_document_by_document() -> None:
    logits = np.array([[[9, 0], [0, 9], [9, 0], [0, 9]], [[0, 9], [0, 9], [9, 0], [9, 0]]])
    labels = np.array([[-100, 1, 0, -100], [-100, 0, -100, -100]])
    found, real = get_task("token_classification").predict(logits, labels, None, ["O", "METAL"])  # type: ignore[arg-type]
    assert found == [["METAL", "O"], ["METAL"]]
    assert real == [["METAL", "O"], ["O"]]


# Answers ------------------------------------------------------------------------------------------------------------

CONTEXT = "iron w0 w1 zinc w2 w3 plum"


@pytest.mark.parametrize(
    ("answer", "start", "limit", "found"),
    [
        ("iron", 0, 40, "iron"),
        ("w1 zinc", 8, 40, "w1 zinc"),
        ("plum", 22, 40, "plum"),
        (CONTEXT, 0, 40, CONTEXT),
        ("iro", 0, 40, "iron"),  # ends within a piece: the pieces that hold it
        ("plum", 22, 12, None),  # cut off
        ("w3 plum", 19, 14, None),  # its end is cut off
    ],
)
def test_spans_of_answers(answer: str, start: int, limit: int, found: str | None) -> None:
    rows = {
        "question": ["who first"],
        "context": [CONTEXT],
        "answers": [{"text": [answer], "answer_start": [start]}],
    }
    encoded = get_task("question_answering").encode(rows, word_tokenizer(), limit)
    first, last = encoded["start_positions"][0], encoded["end_positions"][0]
    assert len(encoded["input_ids"][0]) <= limit
    if found is None:
        assert (first, last) == (0, 0)
        return
    offsets = encoded["offsets"][0]
    assert CONTEXT[offsets[first][0] : offsets[last][1]] == found
    assert encoded["references"] == [[answer]]


def test_a_question_without_an_answer_points_at_the_first_token() -> None:
    rows = {"question": ["who"], "context": [CONTEXT], "answers": [{"text": [], "answer_start": []}]}
    encoded = get_task("question_answering").encode(rows, word_tokenizer(), 40)
    assert (encoded["start_positions"], encoded["end_positions"], encoded["references"]) == ([0], [0], [[]])
    assert encoded["offsets"][0][0] == [-1, -1]  # no token of the question is one of the context


def test_the_best_span_is_the_one_that_trying_all_finds() -> None:
    draw = np.random.default_rng(0)
    for length in (1, 2, 7, 45):
        starts, ends = draw.normal(size=(2, length))
        inside = draw.random(length) < 0.8
        spans = [
            (starts[a] + ends[b], a, b)
            for a in range(length)
            for b in range(a, min(a + 30, length))
            if inside[a] and inside[b]
        ]
        best = _best_span(starts, ends, inside)
        if not spans:
            assert best is None
            continue
        assert best == pytest.approx(max(spans))


def test_answers_are_text_of_the_context_or_nothing() -> None:
    task, tokenizer = get_task("question_answering"), word_tokenizer()
    rows = {
        "question": ["who", "who first", "who"],
        "context": [CONTEXT, "w0 zinc", CONTEXT],
        "answers": [{"text": ["zinc"], "answer_start": [11]}, {"text": ["zinc"], "answer_start": [3]}] * 1
        + [{"text": [], "answer_start": []}],
    }
    encoded = Dataset.from_dict(task.encode(rows, tokenizer, 40))
    width = max(map(len, encoded["input_ids"]))
    starts, ends = np.zeros((2, 3, width))
    for row, (first, last) in enumerate(zip(encoded["start_positions"], encoded["end_positions"], strict=True)):
        starts[row, first] = ends[row, last] = 5
    starts[1, -1] = ends[1, -1] = 99  # padding, which is no part of any answer
    found, references = task.predict((starts, ends), None, encoded, [])
    assert found == ["zinc", "zinc", ""]
    assert references == [["zinc"], ["zinc"], []]


def test_questions_that_leave_no_room_for_the_context_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"max_length=4 leaves no room .* a question of 2 tokens and 3 special ones",
    ):
        finetune("bert", "question_answering", tmp_path, max_length=4)


# Families -----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_padding_gets_its_end_of_text(tmp_path: Path, caplog: Any) -> None:
    from types import SimpleNamespace

    bare = word_tokenizer()
    bare.pad_token, bare.eos_token = None, "[SEP]"
    bare.save_pretrained(tmp_path)
    recipe: Any = SimpleNamespace(model=ModelRecipe(str(tmp_path)))
    assert build_tokenizer(recipe).pad_token == "[SEP]"
    recipe = SimpleNamespace(model=ModelRecipe(str(tmp_path), pad_token="w0"))
    assert build_tokenizer(recipe).pad_token_id == 4
    recipe = SimpleNamespace(model=ModelRecipe(str(tmp_path), pad_token="nowhere"))
    with pytest.raises(ValueError, match="'nowhere' is no token"):
        build_tokenizer(recipe)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_padding_changes_no_prediction(family: str, tmp_path: Path) -> None:
    trainer, _ = finetune(family, "sequence_classification", tmp_path, steps=1)
    together = trainer.predict(trainer.eval_dataset).predictions
    trainer.args.per_device_eval_batch_size = 1
    alone = trainer.predict(trainer.eval_dataset).predictions
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert len({len(ids) for ids in trainer.eval_dataset["input_ids"]}) > 1
