"""Saved models that are measured: as their training measured them, by their own labels, or refused with what fits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForPreTraining, BertForSequenceClassification, BertForTokenClassification

from hf_linear_attn import convert_model
from hf_linear_attn.training.recipe import DataRecipe
from hf_linear_attn.training.run import train
from hf_linear_attn.training.saved import Evaluation, SavedModel, evaluate_model, read_saved
from hf_linear_attn.training.tasks import TASKS
from tests.small_runs import save_checkpoint, save_documents, small_recipe, small_tokenizer
from tests.small_stages import texts
from tests.tiny import base_model, build, causal_lm, tiny_config, without_dropout
from tests.training.test_run import staged_recipe
from tests.training.test_tasks import MAX_LENGTH, documents, independent, model_of, rows_of, word_tokenizer

NAMES = {0: "fruit", 1: "metal"}


def measured(folder: Any, source: Any, **options: Any) -> Evaluation:
    return evaluate_model(read_saved(str(folder)), DataRecipe(str(source)), **options)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(folder: Path, **changes: Any) -> Path:
    """The folder with entries of its config changed, in the order given; None takes one away."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({name: x for name, x in config.items() if x is not None}))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that nothing has trained, with names for its labels, and its tokenizer."""
    folder = tmp_path_factory.mktemp("classifier")
    return save_checkpoint(folder, id2label=NAMES, label2id={name: index for index, name in NAMES.items()})


@pytest.fixture(scope="module")
def texts_by_label(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_documents(tmp_path_factory.mktemp("documents"))


# As training measured it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversion", [None, {"variant": "linear", "calibration_documents": 0}])
def test_a_trained_classifier_is_measured_as_its_run_measured_it(tmp_path: Path, conversion: Any) -> None:
    recipe = small_recipe(tmp_path, finetune={"max_length": 48}, conversion=conversion)
    result = train(recipe)
    found = measured(result.output_dir, recipe.data.source, batch_size=4)
    assert found.max_length == 48  # as it was saved
    assert (found.predictions, found.references, found.groups) == (result.predictions, result.references, result.groups)
    assert found.metrics == pytest.approx(result.metrics, rel=1e-5)
    assert (found.parameters_total, found.parameters_added) == (result.parameters_total, result.parameters_added)
    assert found.architecture.startswith("LinearAttn") == (conversion is not None)
    assert next(found.rows()) == {
        "group": "fruit/0.txt",
        "prediction": NAMES[result.predictions[0]],
        "reference": "fruit",
    }
    assert not list(tmp_path.glob("**/tmp*"))


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_of_finetune_is_measured(kind: str, tmp_path: Path) -> None:
    tokenizer, task = word_tokenizer(), documents(kind, tmp_path / "documents")
    model = model_of("bert", kind, task, tokenizer)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.model_max_length = MAX_LENGTH
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = read_saved(str(tmp_path / "saved"))
    assert (saved.task, saved.reads()) == (kind, MAX_LENGTH)
    files = {part: str(tmp_path / "documents" / f"{kind}-{part}.jsonl") for part in ("train", "test")}
    found = evaluate_model(saved, DataRecipe(files), batch_size=5)
    assert found.documents == len(task.test) == len(found.predictions)
    trainer: Any = SimpleNamespace(predictions=found.predictions, references=found.references)
    for name, value in independent(kind, trainer, task).items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-5), name
    assert math.isfinite(found.metrics["loss"])
    rows = list(found.rows())
    assert [row["group"] for row in rows] == list(task.test["group"])
    if kind == "multi_label_classification":
        written = rows_of(kind, len(rows), seed=1)
        assert [sorted(row["reference"]) for row in rows] == [sorted(row["label"]) for row in written]


@pytest.mark.parametrize("variant", [None, "linear"])
def test_a_causal_language_model_is_measured_by_its_own_loss(variant: str | None, tmp_path: Path) -> None:
    model: Any = causal_lm("gpt2", **without_dropout("gpt2"))
    if variant is not None:
        convert_model(model, variant)
    model.save_pretrained(tmp_path / "saved")
    small_tokenizer().save_pretrained(tmp_path / "saved")
    for index, text in enumerate(texts(4, words=40)):
        (tmp_path / f"{index}.txt").write_text(" ".join(text.split()[: 40 - 9 * index]))
    found = evaluate_model(
        read_saved(str(tmp_path / "saved")),
        DataRecipe([str(tmp_path / f"{index}.txt") for index in range(4)]),
        part="all",
        max_length=30,
    )
    nats: dict[str, float] = {}
    for index in range(4):
        text = (tmp_path / f"{index}.txt").read_text()
        ids = small_tokenizer()(text, truncation=True, max_length=30)["input_ids"]
        with torch.no_grad():
            loss = float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss)
        nats[f"{index}.txt"] = loss * (len(ids) - 1)
    rows = {row["group"]: row for row in found.rows()}
    assert {group: row["nats"] for group, row in rows.items()} == pytest.approx(nats, rel=1e-4)
    assert rows["0.txt"]["tokens"] == 29 > rows["3.txt"]["tokens"]
    tokens = sum(row["tokens"] for row in rows.values())
    assert found.metrics == {"perplexity": pytest.approx(math.exp(sum(nats.values()) / tokens), rel=1e-4)}


def test_a_masked_language_model_is_measured_as_its_uptraining_measured_it(tmp_path: Path) -> None:
    recipe = staged_recipe(tmp_path, stages=[{"stage": "uptrain", "max_length": 48}], conversion=None)
    result = train(recipe)
    found = measured(result.output_dir, recipe.data.source, batch_size=2)
    assert found.metrics["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)
    assert found.metrics["masked_perplexity"] == pytest.approx(math.exp(result.metrics["loss"]), rel=1e-5)
    assert (found.predictions, found.groups, found.documents) == ([], [], 4)


def test_the_part_that_is_measured_is_chosen(classifier: Path, texts_by_label: Path) -> None:
    counts = {part: measured(classifier, texts_by_label, part=part).groups for part in ("test", "train", "all")}
    assert [len(groups) for groups in counts.values()] == [8, 16, 24]
    assert counts["all"] == counts["train"] + counts["test"]


# Labels --------------------------------------------------------------------------------------------------------------


def test_labels_go_by_name_whatever_their_numbers(classifier: Path, texts_by_label: Path, tmp_path: Path) -> None:
    weights = load_file(classifier / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):  # the same model with its outputs in another order
        weights[name] = torch.cat([weights[name].flip(0), weights[name][:1] - 9])
    small_tokenizer().save_pretrained(tmp_path)
    config = {**json.loads((classifier / "config.json").read_text()), "id2label": {0: "metal", 1: "fruit", 2: "wood"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "label2id": {"metal": 0, "fruit": 1, "wood": 2}}))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    one, other = measured(classifier, texts_by_label), measured(tmp_path, texts_by_label)
    assert list(one.rows()) == list(other.rows())
    assert one.predictions == [1 - label for label in other.predictions]
    assert {"fruit", "metal"} == {row["reference"] for row in one.rows()}
    for name in ("accuracy", "macro_f1"):
        assert one.metrics[name] == other.metrics[name]


def test_marks_of_several_labels_go_by_name(tmp_path: Path) -> None:
    kind, tokenizer = "multi_label_classification", word_tokenizer()
    task = documents(kind, tmp_path / "documents")
    model = model_of("bert", kind, task, tokenizer)
    files = {part: str(tmp_path / "documents" / f"{kind}-{part}.jsonl") for part in ("train", "test")}
    rows = []
    for order in ([0, 1, 2], [2, 0, 1]):
        folder = tmp_path / "".join(map(str, order))
        model.config.id2label = {place: task.label_names[label] for place, label in enumerate(order)}
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        for name in ("classifier.weight", "classifier.bias"):
            weights[name] = weights[name][order].contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        found = list(evaluate_model(read_saved(str(folder)), DataRecipe(files)).rows())
        rows.append([(row["group"], set(row["prediction"]), set(row["reference"])) for row in found])
    assert rows[0] == rows[1]
    assert len({len(reference) for _, _, reference in rows[0]}) > 1


def test_labels_without_names_are_numbers(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "saved", num_labels=3)
    rows = [{"text": f"w{index} apple", "label": index % 2 + 1} for index in range(12)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    found = measured(tmp_path / "saved", source, part="all")
    assert found.label_names == ["0", "1", "2"]
    assert sorted(row["reference"] for row in found.rows()) == ["1"] * 6 + ["2"] * 6
    with pytest.raises(ValueError, match=r"does not know the label\(s\) 3 of 'rows'; it knows 0, 1, 2"):
        measured(tmp_path / "saved", write_rows(source, [*rows, *[{"text": "w1", "label": 3}] * 4]))


def test_documents_of_one_label_or_of_a_label_each_are_measured(classifier: Path, tmp_path: Path) -> None:
    for labels in (["metal"] * 3, ["metal", "metal", "fruit"]):
        rows = [{"text": f"some words {index} again", "label": label} for index, label in enumerate(labels)]
        found = measured(classifier, write_rows(tmp_path / "rows.jsonl", rows), part="all")
        assert sorted(found.references) == sorted(int(label == "metal") for label in labels)
    parts = {
        part: str(write_rows(tmp_path / f"{part}.jsonl", [{"text": "some words again", "label": label}]))
        for part, label in (("train", "fruit"), ("test", "metal"))  # the test part has a label of its own
    }
    assert evaluate_model(read_saved(str(classifier)), DataRecipe(parts)).references == [1]


def test_bf16_computes_in_bf16_and_counts_in_full(classifier: Path, texts_by_label: Path, tmp_path: Path) -> None:
    causal_lm("llama").save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    for folder, name in ((classifier, "loss"), (tmp_path, "perplexity")):
        full, half = (measured(folder, texts_by_label, bf16=bf16).metrics[name] for bf16 in (False, True))
        assert half != full
        assert half == pytest.approx(full, rel=0.02)


def test_labels_that_the_model_does_not_know_are_named(classifier: Path, tmp_path: Path) -> None:
    words = [("fruit", "apple"), ("wood", "w1"), ("stone", "w2")]
    rows = [{"text": f"{text} w{index}", "label": label} for label, text in words for index in range(4)]
    with pytest.raises(ValueError, match=r"does not know the label\(s\) stone, wood .* it knows fruit, metal"):
        measured(classifier, write_rows(tmp_path / "rows.jsonl", rows))


def test_many_labels_stand_in_the_order_of_the_logits(tmp_path: Path) -> None:
    names = {str(index): f"B-{index}" for index in range(12)}
    config = tiny_config("bert", num_labels=12)
    build(BertForTokenClassification, config).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    write_config(tmp_path, id2label={index: names[index] for index in sorted(names)}, label2id=None)
    saved = read_saved(str(tmp_path))
    assert saved.label_names == [f"B-{index}" for index in range(12)]
    assert list(saved.load().config.id2label.values()) == saved.label_names


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_model_without_a_measured_head_is_refused_with_what_is_possible(tmp_path: Path) -> None:
    for name, model in (
        ("BertModel", base_model("bert")),
        ("LinearAttnBertModel", convert_model(base_model("bert"), "linear")),
        ("BertForPreTraining", build(BertForPreTraining, tiny_config("bert"))),
    ):
        model.save_pretrained(tmp_path / name)
        small_tokenizer().save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"is {name}, which has no head that is measured here; allowed: a head"):
            read_saved(str(tmp_path / name))
    write_config(tmp_path / "BertModel", architectures=None)
    with pytest.raises(ValueError, match=r"is of no class, .* or a causal or masked language model"):
        read_saved(str(tmp_path / "BertModel"))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    build(BertForSequenceClassification, tiny_config("bert")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer"):
        read_saved(str(tmp_path))


@pytest.mark.parametrize("converted", [False, True])
def test_weights_that_lack_the_head_are_refused(classifier: Path, tmp_path: Path, converted: bool) -> None:
    save_checkpoint(tmp_path)
    if converted:
        convert_model(BertForSequenceClassification.from_pretrained(tmp_path), "linear").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"classifier\.(bias|weight)"):
        read_saved(str(tmp_path)).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 65}, r"max_length=65, but .* reads 64 tokens at most"),
        ({"metrics": ["mse"]}, "not sequence_classification"),
        ({"metrics": ["acuracy"]}, "Did you mean 'accuracy'"),
        ({"part": "rest"}, "part='rest'; allowed: test, train, all"),
    ],
)
def test_what_does_not_fit_a_classifier_is_refused(
    classifier: Path, texts_by_label: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measured(classifier, texts_by_label, **options)


def test_folds_and_parts_of_streams_are_refused(classifier: Path, texts_by_label: Path) -> None:
    saved = read_saved(str(classifier))
    with pytest.raises(ValueError, match=r"data\.folds=3"):
        evaluate_model(saved, DataRecipe(str(texts_by_label), folds=3))
    with pytest.raises(ValueError, match="part='all'; of documents that stream"):
        evaluate_model(saved, DataRecipe(str(texts_by_label), streaming=True), part="all")
    with pytest.raises(ValueError, match="streaming=True serves task='text' only"):
        evaluate_model(saved, DataRecipe(str(texts_by_label), streaming=True))


def test_what_does_not_fit_a_language_model_is_refused(tmp_path: Path) -> None:
    causal_lm("gpt2").save_pretrained(tmp_path / "saved")
    small_tokenizer().save_pretrained(tmp_path / "saved")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts(4)])
    saved: SavedModel = read_saved(str(tmp_path / "saved"))
    for options, message in (
        ({"metrics": ["accuracy"]}, "is a language model, whose measure is perplexity; got accuracy"),
        ({"batch_size": 2}, "reads one document a forward"),
        ({"max_length": 1}, "a likelihood needs 2"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_model(saved, DataRecipe(str(rows)), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"1": "fruit", "2": "metal"}}, r"numbers its labels \[1, 2\]"),
        ({"problem_type": "regression"}, "predicts 2 numbers; allowed: one"),
        ({"problem_type": "ranking"}, "problem_type.*ranking.*single_label_classification"),
        ({"model_type": "t5", "architectures": ["T5ForSequenceClassification"]}, "Unknown model family 't5'"),
    ],
)
def test_damaged_configs_are_refused(classifier: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = save_checkpoint(tmp_path, id2label=NAMES, label2id={name: index for index, name in NAMES.items()})
    with pytest.raises(ValueError, match=message):
        read_saved(str(write_config(folder, **changes)))
