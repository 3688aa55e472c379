"""`hf-linear-attn evaluate`: what it prints and writes of a saved model, and that its numbers are those of `train`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hf_linear_attn.cli import app
from tests.hub_server import run_hub_server
from tests.small_runs import save_checkpoint, save_documents, small_recipe, small_tokenizer
from tests.small_stages import masked_lm, texts
from tests.test_hub import client
from tests.tiny import causal_lm

runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def _allocator_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_linear_attn.training.setup.reuse_freed_memory", lambda: None)


def evaluate(*arguments: object, code: int = 0) -> str:
    result = runner.invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_a_model_that_train_wrote_is_measured_alike_and_the_files_say_what_was_measured(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, conversion={"variant": "linear", "calibration_documents": 0})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert runner.invoke(app, ["train", str(tmp_path / "recipe.yaml")]).exit_code == 0
    run = json.loads((tmp_path / "run" / "train_result.json").read_text())
    numbers, lines = tmp_path / "new" / "numbers.json", tmp_path / "new" / "lines.jsonl"
    files = ("--output", numbers, "--predictions", lines)
    printed = evaluate(tmp_path / "run", "--data", tmp_path / "documents", "--data", "seed=3", *files)
    assert f"accuracy: {run['metrics']['accuracy']:.4f}" in printed
    assert "LinearAttnBertForSequenceClassification, sequence_classification: 8 documents of" in printed
    found = json.loads(numbers.read_text())
    assert found["metrics"] == pytest.approx(run["metrics"], rel=1e-5)
    assert found["model"] == str(tmp_path / "run")
    assert found["data"]["source"] == str(tmp_path / "documents")
    assert (found["data"]["seed"], found["data"]["part"], found["documents"]) == (3, "test", 8)
    assert found["meta"].keys() >= {"command", "machine", "torch", "transformers"}
    assert (found["max_length"], found["label_names"]) == (64, ["fruit", "metal"])
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["group"] for row in rows] == run["groups"]
    names = ["fruit", "metal"]
    assert [row["prediction"] for row in rows] == [names[label] for label in run["predictions"]]
    assert [row["reference"] for row in rows] == [names[label] for label in run["references"]]
    assert "exists: name another file, or pass --overwrite" in evaluate(
        tmp_path / "run", "--data", tmp_path / "documents", *files, code=1
    )
    evaluate(tmp_path / "run", "--data", tmp_path / "documents", *files, "--overwrite")


def test_metrics_length_and_columns_are_chosen(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", id2label={0: "fruit", 1: "metal"})
    rows = [{"body": f"w{index} apple", "kind": ("fruit", "metal")[index % 2]} for index in range(12)]
    source = tmp_path / "a=b.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--data", f"source={source}", "--data", "fields={text: body, label: kind}")
    printed = evaluate(folder, *data, "--part", "all", "--metrics", "macro_f1", "--max-length", 5, "--batch-size", 5)
    assert "12 documents of local file(s) a=b, part all, max_length 5" in printed
    assert "macro_f1: " in printed
    assert "accuracy" not in printed
    assert "12 documents" in evaluate(folder, "--data", source, *data[2:], "--part", "all")


def test_language_models_are_measured(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(texts(6)))
    data = ("--data", tmp_path / "texts.txt", "--data", "options={sample_by: paragraph}", "--part", "all")
    for name, model in (("causal", causal_lm("llama")), ("masked", masked_lm())):
        model.save_pretrained(tmp_path / name)
        small_tokenizer().save_pretrained(tmp_path / name)
    lines = tmp_path / "lines.jsonl"
    assert "perplexity: " in evaluate(tmp_path / "causal", *data, "--predictions", lines)
    first = json.loads(lines.read_text().splitlines()[0])
    assert (first["group"], first["tokens"], first["nats"] > 0) == ("texts.txt:1", 21, True)
    assert "masked_perplexity: " in evaluate(tmp_path / "masked", *data, "--metrics", "masked_perplexity")
    refused = evaluate(tmp_path / "masked", *data, "--predictions", tmp_path / "other", code=1)
    assert "is a masked language model, which has no prediction for a document" in refused
    assert "whose measure is masked_perplexity" in evaluate(
        tmp_path / "masked", *data, "--metrics", "perplexity", code=1
    )


def test_a_source_of_two_parts_is_measured_on_its_test_part(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", id2label={0: "fruit", 1: "metal"})
    documents = save_documents(tmp_path / "documents", train=2, test=1)
    files = {}
    for part in ("train", "test"):
        rows = [{"text": path.read_text(), "label": path.parent.name} for path in sorted(documents.glob(f"{part}/*/*"))]
        files[part] = tmp_path / f"{part}.jsonl"
        files[part].write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"{{train: {files['train']}, test: {files['test']}}}"
    assert ": 2 documents of" in evaluate(folder, "--data", source)
    assert ": 6 documents of" in evaluate(folder, "--data", source, "--part", "all")


HUB = """
import sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from hf_linear_attn import convert_model
from hf_linear_attn.cli import app
folder, documents = sys.argv[1:]
convert_model(AutoModelForSequenceClassification.from_pretrained(folder), "linear").push_to_hub("tester/letters")
AutoTokenizer.from_pretrained(folder).push_to_hub("tester/letters")
app(["evaluate", "tester/letters", "--data", documents])
"""


@pytest.mark.slow
def test_a_model_of_the_hub_is_measured(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", id2label={0: "fruit", 1: "metal"})
    with run_hub_server() as hub:
        arguments = (str(folder), str(save_documents(tmp_path / "documents")))
        printed = client(hub, tmp_path / "home", HUB, *arguments, token="hf_tester").stdout
    assert "LinearAttnBertForSequenceClassification, sequence_classification: 8 documents of" in printed
    assert "accuracy: " in printed
