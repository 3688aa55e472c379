"""What a newcomer types, from the built wheel to a model on the Hub, and from a table of their own to a classifier."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_linear_attn.cli import app
from tests.hub_server import HubServer, run_hub_server

ROOT = Path(__file__).parents[1]
START = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
MOST_SECONDS = 180  # of processor time, of everything that is typed

pytestmark = pytest.mark.slow


def typed(heading: str) -> list[str]:
    """The commands under a heading of docs/start.md, as they stand there."""
    section = START.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)).splitlines()


@dataclass
class Shell:
    """A shell in an empty folder, in whose environment the wheel is the one installation of the package."""

    folder: Path
    environment: dict[str, str]

    def run(self, line: str) -> str:
        """What a command says; it must succeed."""
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what a clone has, in a folder of its own: setuptools leaves its traces beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_linear_attn", source / "hf_linear_attn", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(source / "dist"), str(source))
    return next((source / "dist").iterdir())


def pip(*arguments: str, python: str = sys.executable) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "-qq", "--disable-pip-version-check", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with run_hub_server({"hf_you": "you"}) as server:
        yield server


@pytest.fixture(scope="module")
def installed(wheel: Path, hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A new environment with the wheel in it; what the wheel needs is that of the environment of the tests."""
    place = tmp_path_factory.mktemp("newcomer")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "env")], check=True)
    python = place / "env" / "bin" / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    packages = [path for path in sys.path if path.endswith("-packages")]
    (site / "needed.pth").write_text("\n".join(packages) + "\n")  # their own .pth files, of editable packages, stay out
    pip("install", "--no-deps", "--no-index", "--ignore-installed", str(wheel), python=str(python))
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    environment = {**kept, **hub.environment(place / "home", "hf_you"), "PATH": path, "OMP_NUM_THREADS": "1"}
    (place / "work").mkdir()
    return Shell(place / "work", environment)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.stat().st_size < 2_000_000
    names = zipfile.ZipFile(wheel).namelist()
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_linear_attn").rglob("*") if path.is_file()}
    info = {name for name in names if ".dist-info/" in name}
    assert {*names} - info == {name for name in package if "__pycache__" not in name}
    assert {"hf_linear_attn/py.typed", "hf_linear_attn/model_card.md.jinja"} <= {*names}
    assert {name.partition(".dist-info/")[2] for name in info} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"),
    }


def test_what_is_installed_is_the_wheel(installed: Shell) -> None:
    find = "import importlib.util as u; print(u.find_spec('hf_linear_attn').origin)"
    command, module = installed.run(f'command -v hf-linear-attn; python -c "{find}"').split()
    assert Path(command).parents[1] in Path(module).parents


def test_from_the_wheel_to_a_model_on_the_hub(installed: Shell, hub: HubServer) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = [
        installed.run(line) for line in typed("From nothing to the Hub") if not line.startswith(("pip ", "hf auth"))
    ]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert said[-1].split() == ["LinearAttnBertModel", "4096"]
    assert "model.safetensors" in hub.head("you/long-minilm").files
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MOST_SECONDS


def test_from_a_table_of_ones_own_to_a_long_classifier(installed: Shell) -> None:
    lines = typed("Your documents, a long classifier")
    command = next(line for line in lines if line.startswith("hf-linear-attn train"))
    assert f"{len(command) + 1} keystrokes" in START  # the line and Enter
    with open(installed.folder / "letters.jsonl", "w") as rows:
        for number in range(16):
            words = ("rain and wind and cold", "sun and heat and light")[number % 2]
            rows.write(json.dumps({"text": f"{words} " * 40, "label": ("winter", "summer")[number % 2]}) + "\n")
    for line in lines:
        said = installed.run(line) if not line.startswith("pip ") else ""
    assert said.strip() == "summer"
    result = json.loads((installed.folder / "outputs" / "letters" / "train_result.json").read_text())
    assert result["conversion"]["max_length"] == 4096


@pytest.mark.parametrize("name", ["letters.jsonl", "letters.yaml"])
def test_what_is_not_there_is_said_to_be_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", name])
    assert result.exit_code == 1
    assert result.output.count("Error: ") == 1
    assert name in result.output
    assert list(tmp_path.iterdir()) == []
