"""What SECURITY.md promises: no pickle is read, no code comes out of a file, no connection that nobody asked for."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

import hf_linear_attn
from hf_linear_attn import convert_model
from hf_linear_attn.bench.speed.recipe import BenchRecipe
from hf_linear_attn.measure.strict import read_yaml
from hf_linear_attn.training.recipe import Recipe
from tests.tiny import base_model

ROOT = Path(__file__).parents[1]
PACKAGE = Path(hf_linear_attn.__file__).parent
READERS_OF_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


class Planted:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def calls_and_imports(path: Path) -> set[str]:
    """What a file calls, `torch.load(weights_only)`, and imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            keywords = sorted(keyword.arg or "**" for keyword in node.keywords)
            found.add(f"{ast.unparse(node.func)}({', '.join(keywords)})")
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_no_file_of_the_package_reads_pickles_or_runs_text() -> None:
    forbidden = re.compile(
        r"(eval|exec|compile|__import__)\(|(np|numpy)\.load\(.*allow_pickle|torch\.load\((?!.*weights_only)"
        r"|yaml\.(load|load_all|full_load|unsafe_load)\(|os\.(system|popen)\("
    )
    found = {
        (path.relative_to(PACKAGE).as_posix(), what)
        for path in PACKAGE.rglob("*.py")
        for what in calls_and_imports(path)
        if what in READERS_OF_CODE or forbidden.match(what)
    }
    assert found == set()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_in_the_place_of_weights_is_not_run(name: str, tmp_path: Path) -> None:
    convert_model(base_model("bert"), "linear").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"weight": Planted(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(Exception, match=r"(?i)weights_only|header|safetensors"):
        AutoModel.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("read", [read_yaml, Recipe.from_yaml, BenchRecipe.from_yaml])
def test_a_recipe_names_no_code(read: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml.*python/object"):
        read(recipe)
    assert not (tmp_path / "ran").exists()


def test_a_config_names_no_code(tmp_path: Path) -> None:
    """A loader beside the weights, which the config names, is not imported where the package is."""
    convert_model(base_model("bert"), "linear").save_pretrained(tmp_path)
    (tmp_path / "loader.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = tmp_path / "config.json"
    held = config.read_text().replace("{", '{"auto_map": {"AutoModel": "loader.Model"},', 1)
    config.write_text(held)
    AutoModel.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_nothing_connects_that_nobody_named(tmp_path: Path) -> None:
    """A process in which a look-up of any host ends it: import, convert, save, load, list, doctor's versions."""
    script = """
import os, socket, sys
def refuse(*args, **kwargs):
    os._exit(99)
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from transformers import AutoModel, BertConfig, BertModel
from typer.testing import CliRunner
from hf_linear_attn import convert_model
from hf_linear_attn.cli import app
config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
convert_model(BertModel(config), "linear").save_pretrained(sys.argv[1])
AutoModel.from_pretrained(sys.argv[1])
result = CliRunner().invoke(app, ["list"])
assert result.exit_code == 0, result.output
"""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"


def test_every_promise_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    promises = re.findall(r"^- \*\*.*?(?=^- |^#|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    assert promises
    for promise in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", promise)
        assert named, f"no test: {promise}"
        for path, test in named:
            assert f"def {test}" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{test}"
