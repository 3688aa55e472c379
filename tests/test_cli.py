"""The command line: every example in the help runs, and mistakes get one clear line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from hf_linear_attn.cli import app, commands
from tests.small_runs import save_checkpoint, save_documents

ROOT = Path(__file__).parents[1]
COMMANDS = ["list", "convert", "train", "compare", "demo"]
runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def _allocator_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line tunes malloc for its whole process; here that is the process of other tests as well."""
    monkeypatch.setattr("hf_linear_attn.training.setup.reuse_freed_memory", lambda: None)


def examples(command: str) -> list[str]:
    help_text = runner.invoke(app, [command, "--help"]).output
    return re.findall(r"^\W*(hf-linear-attn [a-z].*?)\s*│?$", help_text, flags=re.MULTILINE)


def small_settings(tmp_path: Path) -> list[str]:
    """What makes a recipe's run take seconds: a tiny checkpoint, few short documents, one step."""
    save_checkpoint(tmp_path / "checkpoint")
    save_documents(tmp_path / "documents", train=4, test=2)
    changes = {
        "model.name": tmp_path / "checkpoint",
        "data.source": tmp_path / "documents",
        "data.options": "{}",
        "data.max_train_documents": "null",
        "data.max_test_documents": "null",
        "data.folds": 0,
        "training.max_steps": 1,
        "training.max_length": 96,
        "training.mixed_precision": "no",
        "training.save_every": 0,
        "training.output_dir": tmp_path / "output",
        "evaluation.forward_lengths": "[16]",
        "evaluation.num_resamples": 20,
        "evaluation.bag_of_words": "false",
    }
    return [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_in_the_help_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = examples(command)
    assert found, f"{command} --help shows no example"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for example in found:
        arguments = shlex.split(example)[1:]
        assert arguments[0] == command
        if command in ("train", "compare", "demo"):
            arguments += small_settings(tmp_path)
        if command == "convert":
            arguments[arguments.index("minilm")] = str(save_checkpoint(tmp_path / "checkpoint"))
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output + caplog.text
    if command in ("compare", "demo"):
        assert (tmp_path / "output" / "report.png").is_file()
        assert str(tmp_path / "output" / "report.png") in result.output


def test_convert_writes_a_model_that_reads_longer_documents(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    arguments = ["convert", str(checkpoint), "longformer", "--option", "window_size=8", "--max-length", "256"]
    result = runner.invoke(app, [*arguments, "--layers", "1", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    layers = model.config.linear_attn["layers"]
    assert layers[0] is None
    assert layers[1]["options"]["window_size"] == 8
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 256
    assert model.config.max_position_embeddings == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "CHECKPOINT", "lineer", "--output", "x"], "Did you mean 'linear'"),
        (["convert", "CHECKPOINT", "linear", "--option", "window=3", "--output", "x"], "Allowed:"),
        (["convert", "CHECKPOINT", "linear", "--option", "window", "--output", "x"], "KEY=VALUE"),
        (["train", "nothing.yaml"], "There is no recipe 'nothing.yaml'"),
        (["train", "RECIPE", "--set", "training.epoch=1"], "Allowed: task, epochs"),
        (["train", "RECIPE", "--set", "conversion=linear"], "SECTION.KEY=VALUE"),
        (["compare", "RECIPE", "--variants", "linear,long"], "Unknown attention variant 'long'"),
    ],
)
def test_mistakes_end_with_one_clear_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    names = {"CHECKPOINT": str(save_checkpoint(tmp_path / "c")), "RECIPE": str(ROOT / "recipes/minilm/matching.yaml")}
    result = runner.invoke(app, [names.get(word, word) for word in arguments])
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = commands.importlib.util.find_spec
    monkeypatch.setattr(
        commands.importlib.util, "find_spec", lambda name, *rest: None if name == "accelerate" else find(name, *rest)
    )
    for command in (["train", "r.yaml"], ["compare", "r.yaml"], ["demo"]):
        result = runner.invoke(app, command)
        assert result.exit_code == 1
        assert "[train]" in result.output
        assert "accelerate" in result.output


def test_module_form_and_light_help() -> None:
    code = (
        "import runpy, sys; sys.argv = ['hf-linear-attn', 'train', '--help']\n"
        "try:\n    runpy.run_module('hf_linear_attn', run_name='__main__')\n"
        "except SystemExit as error:\n    assert not error.code\n"
        "heavy = {'accelerate', 'datasets', 'matplotlib', 'sklearn', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "recipes/minilm/matching.yaml" in done.stdout
