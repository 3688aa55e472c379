"""What commands write: a converted checkpoint is whole, and nobody's files are lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)
from typer.testing import CliRunner

from hf_linear_attn.cli import app
from hf_linear_attn.data.models import load_checkpoint
from hf_linear_attn.measure.rows import RowFile
from tests.hub_server import run_hub_server
from tests.small_runs import save_checkpoint, save_documents, small_recipe
from tests.tiny import tiny_config

runner = CliRunner(env={"COLUMNS": "200"})
POOLING = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]


@pytest.fixture(autouse=True)
def _allocator_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_linear_attn.training.setup.reuse_freed_memory", lambda: None)


def sentence_encoder(folder: Path) -> Path:
    """A checkpoint as sentence-transformers saves it, with what else lies in such repositories."""
    save_checkpoint(folder)
    for name, data in {
        "modules.json": MODULES,
        "1_Pooling/config.json": POOLING,
        "2_Dense/config.json": {"in_features": 32},
        "sentence_bert_config.json": {"max_seq_length": 48, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "query: "}},
        "eval_results.json": {"accuracy": 0.9},
        "trainer_state.json": {"epoch": 3},
        "pytorch_model.bin.index.json": {"weight_map": {}},
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(data))
    for name in (
        "2_Dense/model.safetensors",
        "LICENSE",
        "README.md",
        "pytorch_model.bin",
        "tf_model.h5",
        "model.gguf",
        "onnx/model.onnx",
        "openvino/openvino_model.xml",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


def convert(*arguments: Any) -> str:
    result = runner.invoke(app, ["convert", *map(str, arguments), "--calibration", "none"])
    assert result.exit_code == 0, result.output
    return result.output


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("extension", "limit"), [([], 48), (["--max-length", "128"], 128)])
def test_convert_keeps_what_still_holds_of_a_sentence_encoder(tmp_path: Path, extension: list[str], limit: int) -> None:
    source = sentence_encoder(tmp_path / "source")
    convert(source, "linear", *extension, "--output", tmp_path / "out")
    out = tmp_path / "out"
    for name in (
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "LICENSE",
    ):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "config_sentence_transformers.json").read_text())["prompts"] == {"query": "query: "}
    expected = {"max_seq_length": limit, "do_lower_case": False}
    assert json.loads((out / "sentence_bert_config.json").read_text()) == expected
    gone = {"README.md", "pytorch_model.bin", "tf_model.h5", "model.gguf", "onnx/model.onnx", "eval_results.json"}
    gone |= {"openvino/openvino_model.xml", "trainer_state.json", "pytorch_model.bin.index.json"}
    assert not gone & files(out)
    assert not list(out.glob(".*"))
    assert type(AutoModelForSequenceClassification.from_pretrained(out)).__name__.startswith("LinearAttn")


def test_convert_over_a_folder_leaves_nothing_of_its_checkpoint_and_keeps_other_files(tmp_path: Path) -> None:
    """A plain checkpoint over a sentence encoder: its pooling would be read with the new weights."""
    plain, out = save_checkpoint(tmp_path / "plain"), tmp_path / "out"
    convert(sentence_encoder(tmp_path / "source"), "linear", "--output", out)
    for name in ("notes.txt", "data.pkl", "results/table.json", "models/x.safetensors", "vocab.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    before = {name: (out / name).read_bytes() for name in files(out)}
    result = runner.invoke(app, ["convert", str(plain), "longformer", "--output", str(out)])
    assert result.exit_code == 1
    assert "pass --overwrite" in result.output
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    convert(plain, "longformer", "--output", out, "--overwrite")
    kept = files(out) - files(plain)
    assert kept == {"notes.txt", "data.pkl", "results/table.json", "models/x.safetensors", "LICENSE"}
    assert not (out / "1_Pooling").exists()
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert {layer["variant"] for layer in model.config.linear_attn["layers"]} == {"longformer"}


def test_convert_may_write_over_its_own_source(tmp_path: Path) -> None:
    source = sentence_encoder(tmp_path / "source")
    convert(source, "linear", "--output", source, "--overwrite")
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors", "modules.json"} <= files(source)
    assert not {"pytorch_model.bin", "tf_model.h5"} & files(source)
    model = AutoModelForSequenceClassification.from_pretrained(source)
    assert model.config.linear_attn["layers"][0]["variant"] == "linear"


def test_convert_that_fails_while_it_saves_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert(save_checkpoint(tmp_path / "plain"), "linear", "--output", out)
    before = {name: (out / name).read_bytes() for name in files(out)}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    arguments = ["convert", str(tmp_path / "plain"), "longformer", "--output", str(out), "--overwrite"]
    arguments += ["--calibration", "none"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert "No space left on device" in result.output
    assert {name: (out / name).read_bytes() for name in files(out)} == before


def test_a_checkpoint_that_names_no_class_does_not_lose_its_head_silently(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, model in {
        "base": BertModel(tiny_config("bert")),
        "head": GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=32)),
    }.items():
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        del config["architectures"]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert type(load_checkpoint(str(tmp_path / "base"))) is BertModel
    classifier = save_checkpoint(tmp_path / "classifier")
    config = json.loads((classifier / "config.json").read_text())
    del config["architectures"]
    (classifier / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"names no class .*classifier\.bias"):
        load_checkpoint(str(classifier))


def test_a_converted_checkpoint_is_not_converted_again(tmp_path: Path) -> None:
    convert(save_checkpoint(tmp_path / "plain"), "linear", "--output", tmp_path / "out")
    result = runner.invoke(app, ["convert", str(tmp_path / "out"), "linear", "--output", str(tmp_path / "again")])
    assert result.exit_code == 1
    assert "is converted already" in result.output


def test_train_refuses_a_folder_in_use_and_goes_on_in_one(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    text = json.dumps(recipe.replace(training=saves).to_dict())
    (tmp_path / "recipe.yaml").write_text(text)  # JSON is YAML
    train = ["train", str(tmp_path / "recipe.yaml")]
    done = runner.invoke(app, train)
    assert done.exit_code == 0, done.output
    assert "Stages: finetune; the model goes to" in done.output
    assert "trains all parameters" in done.output
    folder = tmp_path / "run"
    refused = runner.invoke(app, train)
    assert refused.exit_code == 1
    assert "pass --overwrite" in refused.output
    shutil.rmtree(folder / "checkpoint-2")
    before = (folder / "model.safetensors").read_bytes()
    resumed = runner.invoke(app, [*train, "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert (folder / "model.safetensors").read_bytes() == before
    assert runner.invoke(app, [*train, "--overwrite"]).exit_code == 0
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_rows_that_are_not_finite_are_failures_in_valid_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    file = RowFile(tmp_path / "rows.jsonl", {"setting": 1})
    file.append({"method": "a", "error": float("nan")})
    file.append({"method": "b", "error": 0.5})
    rows = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[1:] == file.rows
    assert rows[1] == {"method": "a", "error": None, "failure": "gave numbers that are not finite"}
    assert RowFile(tmp_path / "rows.jsonl", {"setting": 1}).rows == [{"method": "b", "error": 0.5}]


@pytest.mark.slow
def test_a_gguf_checkpoint_is_converted_as_the_language_model_it_is(tmp_path: Path) -> None:
    convert("smollm2", "longformer", "--output", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LinearAttnLlamaForCausalLM"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LinearAttnLlamaForCausalLM"]
    assert "generation_config.json" in files(tmp_path / "out")
    assert "__init__.py" not in files(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    new = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(new[0])


@pytest.mark.slow
@pytest.mark.parametrize("conversion", ["{variant: longformer, layers: [0], calibration_documents: 0}", "null"])
def test_a_gguf_checkpoint_can_be_trained(tmp_path: Path, conversion: str) -> None:
    """What `train` and each row of `compare` do, the softmax baseline among them."""
    save_documents(tmp_path / "documents", train=2, test=1, words=(8, 12))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name: smollm2}}\ndata: {{source: {tmp_path / 'documents'}}}\nconversion: {conversion}\n"
        f"training: {{max_steps: 1, per_device_train_batch_size: 2, output_dir: {tmp_path / 'out'}}}\n"
        "stages: [{stage: finetune, trainable: head, max_length: 16}]\n"
    )
    result = runner.invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(model).__name__.startswith("LinearAttn") == (conversion != "null")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("apple")["input_ids"]
    specials = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert specials == ("<|im_start|>", "<|im_end|>", "<|im_end|>"), "the file's"


@pytest.mark.slow
def test_a_hub_id_gives_what_its_folder_gives(tmp_path: Path) -> None:
    source = sentence_encoder(tmp_path / "source")
    convert(source, "linear", "--output", tmp_path / "from_folder")
    recipe = {
        "model": {"name": "tester/encoder"},
        "data": {"source": str(save_documents(tmp_path / "documents", train=2, test=1))},
        "conversion": {"variant": "linear", "calibration_documents": 0},
        "training": {"max_steps": 1, "output_dir": str(tmp_path / "trained")},
        "stages": [{"stage": "distill", "max_length": 32}],
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code = (
        "import sys; from huggingface_hub import HfApi; from hf_linear_attn.cli import app\n"
        "api = HfApi(); api.create_repo('tester/encoder')\n"
        "api.upload_folder(repo_id='tester/encoder', folder_path=sys.argv[1])\n"
        "app(['train', sys.argv[3]], standalone_mode=False)\n"
        "app(['convert', 'tester/encoder', 'linear', '--calibration', 'none', '--output', sys.argv[2]])\n"
    )
    with run_hub_server({"hf_tester": "tester"}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", code, str(source), str(tmp_path / "from_hub"), str(tmp_path / "recipe.yaml")],
            env={**os.environ, **hub.environment(tmp_path / "home", "hf_tester"), "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    assert files(tmp_path / "from_hub") == files(tmp_path / "from_folder")
    assert files(tmp_path / "trained") - files(tmp_path / "from_hub") == {"stages.json", "train_result.json"}
    for name in ("2_Dense/model.safetensors", "1_Pooling/config.json", "modules.json"):
        for folder in ("from_hub", "trained"):
            assert (tmp_path / folder / name).read_bytes() == (source / name).read_bytes()
