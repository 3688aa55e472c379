"""The command line: every example in the help runs, and mistakes get one clear line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from hf_linear_attn import convert_model, get_variant, list_variants
from hf_linear_attn.cli import app, arguments
from hf_linear_attn.cli.listing import option_notes, spell_defaults
from hf_linear_attn.registry import KINDS
from tests.small_runs import save_checkpoint, save_documents

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "list",
    "convert",
    "train",
    "compare",
    "demo",
    "export-kernels",
    "report",
    "analyze",
    "methods",
    "bench",
    "retrieval",
    "advise",
    "evaluate",
]
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
        "finetune.max_length": 96,
        "training.bf16": "false",
        "training.save_strategy": "'no'",
        "training.output_dir": tmp_path / "output",
        "evaluation.forward_lengths": "[16]",
        "evaluation.num_resamples": 20,
        "evaluation.bag_of_words": "false",
    }
    return [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]


def save_letters(tmp_path: Path) -> None:
    """What the examples of `evaluate` name: a classifier, and tables of short documents."""
    save_checkpoint(tmp_path / "outputs" / "letters", id2label={0: "fruit", 1: "metal"})
    for name, column in (("letters", "body"), ("new", "text")):
        lines = [f"w{index} apple pear,fruit\nw{index} iron zinc,metal\n" for index in range(6)]
        (tmp_path / f"{name}.csv").write_text(f"{column},label\n" + "".join(lines))


def small_embedders(tmp_path: Path) -> str:
    """A recipe of `retrieval` that takes a second."""
    recipe = tmp_path / "embedders.yaml"
    recipe.write_text(
        f"model: {save_checkpoint(tmp_path / 'checkpoint')}\n"
        f"documents: {{source: {save_documents(tmp_path / 'texts', words=(90, 120))}, min_tokens: 80}}\n"
        "passages: {tokens: 8, count: 2, margin: 1}\nlengths: [96]\nshort_lengths: [32]\n"
        "calibration: {documents: 1, tokens: 48}\ncost_repeats: 1\n"
        "systems: [{reads: truncated}, {reads: chunks}, {variant: linear}]\n"
    )
    return str(recipe)


def small_measurement(tmp_path: Path, command: str, arguments: list[str]) -> list[str]:
    """The arguments of a measuring command with a tiny checkpoint and short documents in place of its own."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    documents = save_documents(tmp_path / "documents", words=(40, 90))
    output = ["--output", str(tmp_path / "output")]
    if command == "bench":
        recipe = tmp_path / "small.yaml"
        recipe.write_text(
            "title: t\nrepeats: 1\nlayers: [{name: layer, lengths: [8, 16], hidden_size: 16, num_heads: 2, "
            "softmax: [sdpa], variants: [linear]}]\n"
        )
        return [arguments[0], str(recipe), *output]
    if command == "advise":
        texts = str(documents / "train" / "fruit")
        small = {"2048": "32", "4096": "64", "minilm": str(checkpoint), "my_texts": texts}
        arguments = [small.get(word, word) for word in arguments]
        return [
            *arguments,
            *([] if "--data" in arguments else ["--data", texts]),
            "--overwrite",
            "--variants",
            "linear",
            "--seconds",
            "1",
            "--output",
            str(tmp_path / "output" / "advice.json"),
        ]
    if command == "retrieval":
        return [arguments[0], small_embedders(tmp_path), *output]
    if command == "methods":
        recipe = tmp_path / "small.yaml"
        recipe.write_text(
            f"models: [{{name: {checkpoint}, lengths: [24]}}]\n"
            f"documents: {{source: {documents}, calibration_tokens: 24, test_tokens: 24}}\n"
            "seeds: [0]\ncosts: {lengths: [16], repeats: 1}\nmethods: [{longformer: {window_size: 4}}]\n"
        )
        return [arguments[0], str(recipe), *arguments[2:], *output]
    arguments[arguments.index("minilm")] = str(checkpoint)
    if "--passages" in arguments:
        arguments = [*arguments, "--passages", "3", "--overwrite"]
        output = ["--output", str(tmp_path / "output" / "passages")]
    return [*arguments, "--documents", str(documents), "--length", "32", "--test", "1", "--calibration", "1", *output]


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=pytest.mark.slow if name in ("advise", "retrieval") else ()) for name in COMMANDS],
)
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
        if command == "train" and "--resume" not in arguments:  # all write to one folder
            arguments.append("--overwrite")
        if command == "demo":
            arguments += ["--embedders", small_embedders(tmp_path)]
        if command in ("report", "analyze", "methods", "bench", "retrieval", "advise"):
            arguments = small_measurement(tmp_path, command, arguments)
        if command == "evaluate":
            save_letters(tmp_path)
        if command == "convert":
            arguments[arguments.index("minilm")] = str(save_checkpoint(tmp_path / "checkpoint"))
            arguments += ["--calibration", str(save_documents(tmp_path / "documents") / "train" / "fruit")]
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output + caplog.text
    if command in ("compare", "demo"):
        assert (tmp_path / "output" / "report.png").is_file()
        assert str(tmp_path / "output" / "report.png") in result.output
    written = {path.relative_to(tmp_path / "output").as_posix() for path in (tmp_path / "output").rglob("*")}
    assert written >= {
        "demo": {"embedders/retrieval.png", "embedders/retrieval.md"},
        "report": {"report.json", "report.png"},
        "analyze": {
            "analysis.json",
            "spectrum.png",
            "sizes.png",
            "patterns_layer_0.png",
            "patterns_layer_1.png",
            "passages/analysis.json",
            "passages/spectrum.png",
        },
        "methods": {"rows.jsonl", "methods.json", "methods.md", "methods.png"},
        "retrieval": {"rows.jsonl", "retrieval.json", "retrieval.md", "retrieval.png"},
        "bench": {"cpu.rows.jsonl", "cpu.json", "cpu.md", "cpu.png"},
        "advise": {"advice.json"},
    }.get(command, set())


def test_list_tells_everything_about_one_variant() -> None:
    everything = runner.invoke(app, ["list"], env={"COLUMNS": "80"}).output
    lines = everything.splitlines()
    assert max(map(len, lines)) <= 80
    places = [next(i for i, line in enumerate(lines) if line.startswith(f"{kind}: ")) for kind in KINDS]
    assert places == sorted(places)
    for key in list_variants():
        (row,) = [i for i, line in enumerate(lines) if line.startswith(f"  {key} ")]
        kind = list(KINDS)[sum(place < row for place in places) - 1]
        assert get_variant(key).guide == (kind, get_variant(key).guide[1])  # type: ignore[index]
    result = runner.invoke(app, ["list", "linformer"])
    assert result.exit_code == 0
    for fact in (
        "2006.04768",
        "low-rank",
        "encoders only",
        "n k d",
        "k=128, projection='mean_pool' (encoder)",
        "sharing='headwise': ",
    ):
        assert fact in result.output
    for key in list_variants():
        spec = get_variant(key)
        shown = " ".join(runner.invoke(app, ["list", key], env={"COLUMNS": "80"}).output.split())
        for field, default in zip(dataclasses.fields(spec.config_class), spell_defaults(spec), strict=True):
            note = option_notes(spec)[field.name]
            assert len(note) > 2
            assert f"{default}: {note}" in shown, f"{key} says not what {field.name} is"
    assert "Did you mean 'linear'" in runner.invoke(app, ["list", "lineer"]).output


@pytest.mark.usefixtures("past_only")
def test_report_measures_a_saved_conversion_and_one_in_memory_alike(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    documents = save_documents(tmp_path / "documents", words=(40, 90))
    model = AutoModel.from_pretrained(checkpoint)
    convert_model(model, "longformer", window_size=4, layers=[1]).save_pretrained(tmp_path / "converted")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "converted")
    common = ["--documents", str(documents), "--length", "32", "--calibration", "0"]
    own = ["--variant", "longformer", "--option", "window_size=4", "--layers", "1"]
    rows = {}
    for name, extra in (("checkpoint", own), ("converted", [])):
        output = tmp_path / f"report_{name}"
        result = runner.invoke(app, ["report", str(tmp_path / name), *extra, *common, "--output", str(output)])
        assert result.exit_code == 0, result.output
        (stage,) = json.loads((output / "report.json").read_text())["reports"].items()
        rows[stage[0]] = stage[1]["rows"]
    assert list(rows) == ["as published", "as it is"]
    assert rows["as published"][0]["output_error"] is None
    assert rows["as published"][1]["head_errors"] == pytest.approx(rows["as it is"][1]["head_errors"], rel=1e-5)
    assert rows["as it is"][1]["output_error"] > 0.01
    assert rows["as it is"][1]["zeros"] is None  # a window leaves keys out, and learns nothing of it
    mistakes = {
        ("checkpoint",): "name what to convert it to, --variant KEY",
        ("converted", "--variant", "linear"): "is a converted model: leave --variant",
        ("checkpoint", "--variant", "linear", "--layers", "1;2"): "--layers takes integers with commas",
        ("checkpoint", "--variant", "past_only"): "serves decoders only",
    }
    for (name, *extra), message in mistakes.items():
        result = runner.invoke(app, ["report", str(tmp_path / name), *extra, *common, "--output", str(tmp_path / "x")])
        assert result.exit_code == 1
        assert message in result.output


@pytest.mark.usefixtures("past_only")
def test_analyze_names_what_it_refuses(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    arguments = ["analyze", str(checkpoint), "--methods", "past_only", "--output", str(tmp_path / "x")]
    result = runner.invoke(app, [*arguments, "--documents", str(save_documents(tmp_path / "d"))])
    assert result.exit_code == 1
    assert "'past_only' does not serve encoders" in result.output
    alone = [*arguments, "--passages", "3", "--documents", str(tmp_path / "d")]
    assert "no --methods and no --layers" in runner.invoke(app, alone).output


def test_convert_writes_a_model_that_reads_longer_documents(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint")
    arguments = ["convert", str(checkpoint), "longformer", "--option", "window_size=8", "--max-length", "256"]
    arguments += ["--calibration", "none"]
    result = runner.invoke(app, [*arguments, "--layers", "1", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    layers = model.config.linear_attn["layers"]
    assert layers[0] is None
    assert layers[1]["options"]["window_size"] == 8
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 256
    assert model.config.max_position_embeddings == 256


@pytest.mark.usefixtures("past_only")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "CHECKPOINT", "lineer", "--output", "x"], "Did you mean 'linear'"),
        (["convert", "CHECKPOINT", "linear", "--option", "window=3", "--output", "x"], "Allowed:"),
        (["convert", "CHECKPOINT", "linear", "--option", "window", "--output", "x"], "KEY=VALUE"),
        (["train", "nothing.yaml"], "There is no recipe 'nothing.yaml'"),
        (["train", "RECIPE", "--set", "training.epoch=1"], "Did you mean"),
        (["train", "RECIPE", "--set", "conversion=linear"], "SECTION.KEY=VALUE"),
        (["compare", "RECIPE", "--variants", "linear,long"], "Unknown attention variant 'long'"),
        (["bench", "nothing.yaml"], "There is no recipe 'nothing.yaml'"),
        (["bench", "--device", "tpu"], "--device takes cpu or cuda, got 'tpu'"),
        (["bench", "RECIPE"], "Allowed: title, device, dtype"),
        (["bench", "SMOKE", "--variants", "lineer", "--output", "OUTPUT"], "Did you mean 'linear'"),
        (["bench", "SMOKE", "--threads", "0"], "threads has 0; allowed: positive integers"),
        (["advise", "CHECKPOINT", "--length", "0"], "length=0; allowed: an integer of at least 1"),
        (["advise", "CHECKPOINT", "--length", "64", "--device", "tpu"], "--device takes cpu or cuda, got 'tpu'"),
        (["advise", "CHECKPOINT", "--length", "64", "--variants", "past_only"], "'past_only' does not serve"),
        (["advise", "CHECKPOINT", "--length", "64", "--lengths", "16;32"], "--lengths takes integers with commas"),
    ],
)
def test_mistakes_end_with_one_clear_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    names = {
        "CHECKPOINT": str(save_checkpoint(tmp_path / "c")),
        "RECIPE": str(ROOT / "recipes/minilm/matching.yaml"),
        "SMOKE": str(ROOT / "recipes/bench/smoke.yaml"),
        "OUTPUT": str(tmp_path / "output"),
    }
    result = runner.invoke(app, [names.get(word, word) for word in arguments])
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_bench_goes_on_and_ends_with_a_failure_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = small_measurement(tmp_path, "bench", ["bench", "recipe"])

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(get_variant("linear").module_class, "forward", broken)
        result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert "Failed: linear (layer, forward, n = 8): RuntimeError: out of order" in result.output
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0
    assert "linear" in result.output
    assert "layer forward      8 sdpa" not in result.output  # was measured already
    results = json.loads((tmp_path / "output" / "cpu.json").read_text())
    assert len(results["rows"]) == 8
    assert not [row for row in results["rows"] if "failure" in row]


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = arguments.importlib.util.find_spec
    monkeypatch.setattr(
        arguments.importlib.util, "find_spec", lambda name, *rest: None if name == "accelerate" else find(name, *rest)
    )
    commands = (["train", "r.yaml"], ["compare", "r.yaml"], ["demo"], ["report", "m"], ["analyze", "m"])
    for command in (*commands, ["methods", "r.yaml"], ["retrieval", "r.yaml"], ["evaluate", "m", "--data", "d"]):
        result = runner.invoke(app, command)
        assert result.exit_code == 1
        assert "[train]" in result.output
        assert "accelerate" in result.output


def test_bench_names_its_own_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = arguments.importlib.util.find_spec
    monkeypatch.setattr(
        arguments.importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    result = runner.invoke(app, ["bench", "r.yaml"])
    assert result.exit_code == 1
    assert "needs the extra [bench], and matplotlib cannot be found" in result.output


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
