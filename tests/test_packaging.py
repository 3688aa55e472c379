"""What a user gets from `pip install` and `import`: a light import, one version, all of its files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import hf_linear_attn

ROOT = Path(__file__).parents[1]

# Transformers puts off importing torch until a class is used, and ours is a config class. Every user of a
# model imports torch: it is not on the package's bill.
IMPORT = """
import json, sys, time
import torch, transformers
before = set(sys.modules)
start = time.process_time()
import hf_linear_attn
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""


def import_in_a_new_process() -> dict:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_import_costs_less_than_a_second_more_than_transformers() -> None:
    # Processor time, and the best of three: a busy machine is not the package's fault.
    assert min(import_in_a_new_process()["seconds"] for _ in range(3)) < 1.0


def test_import_does_not_pull_in_what_only_some_users_need() -> None:
    loaded = {name.split(".")[0] for name in import_in_a_new_process()["modules"]}
    optional = {
        "accelerate",
        "datasets",
        "evaluate",
        "matplotlib",
        "peft",
        "rich",
        "tensorboard",
        "triton",
        "typer",
    }
    assert loaded & optional == set()


def test_the_version_is_the_one_the_changelog_opens_with() -> None:
    headings = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert hf_linear_attn.__version__ == headings[0]


def test_the_installed_metadata_agrees_with_the_source() -> None:
    assert metadata.version("hf-linear-attn") == hf_linear_attn.__version__


def test_public_names_are_there_and_an_unknown_one_is_an_attribute_error() -> None:
    for name in hf_linear_attn.__all__:
        assert getattr(hf_linear_attn, name) is not None, name
    with pytest.raises(AttributeError, match="convert_models"):
        _ = hf_linear_attn.convert_models


def test_the_typed_marker_and_the_templates_are_package_data() -> None:
    """An editable install hides a missing pattern; the built package would lack the file."""
    package = ROOT / "hf_linear_attn"
    data = {p.relative_to(package) for p in package.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}}
    patterns = re.search(
        r"\[tool\.setuptools\.package-data\]\nhf_linear_attn = (\[.*\])",
        (ROOT / "pyproject.toml").read_text(),
    )
    assert patterns is not None
    declared = {path.relative_to(package) for pattern in json.loads(patterns[1]) for path in package.glob(pattern)}
    assert data == declared
