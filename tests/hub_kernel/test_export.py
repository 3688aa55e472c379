"""What `export-kernels` writes, and what it does to a folder in which something lies already."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from hf_linear_attn.cli import app
from hf_linear_attn.hub_kernel import export
from hf_linear_attn.hub_kernel.export import BACKENDS, GENERATED_MARKER, export_kernels

runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def sources(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two small files in place of the package's fifty, where a test is about folders."""
    small = {"__init__.py": "from . import layers\n", "ops/window.py": "x = 1\n"}
    if "package" not in request.node.name:
        monkeypatch.setattr(export, "standalone_sources", lambda package, moved: dict(small))
    return small


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metadata_of(build: Path) -> dict:
    return json.loads((build / "metadata.json").read_text())


def test_the_package_is_exported_without_what_a_kernel_may_not_import(tmp_path: Path) -> None:
    result = runner.invoke(app, ["export-kernels", str(tmp_path / "kernel"), "--version", "3"])
    assert result.exit_code == 0, result.output
    builds = [tmp_path / "kernel" / "build" / f"torch-{backend}" for backend in BACKENDS]
    assert result.output == f"Wrote {', '.join(map(str, builds))}\n"
    files = content(builds[0])
    assert {"__init__.py", "layers.py", "metadata.json", "kernels/linear/op.py", "ops/window/attention.py"} <= {*files}
    for name, text in files.items():
        assert name.endswith(".py") or name == "metadata.json"
        for node in ast.walk(ast.parse(text)) if name.endswith(".py") else ():
            tops = [alias.name.partition(".")[0] for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                tops = [(node.module or "").partition(".")[0]]
            assert {*tops} <= {*sys.stdlib_module_names, "torch", "triton"}, name


def test_builds_hold_the_same_under_names_of_their_own(tmp_path: Path, sources: dict[str, str]) -> None:
    builds = export_kernels(tmp_path, version=7)
    for backend, build in zip(BACKENDS, builds, strict=True):
        assert build == tmp_path / "build" / f"torch-{backend}"
        metadata, files = metadata_of(build), content(build)
        del files["metadata.json"]
        assert files == {name: text.encode() for name, text in sources.items()}
        digests = metadata.pop("digest")
        assert digests["algorithm"] == "sha256"
        assert digests["files"] == {
            name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in files.items()
        }
        assert metadata.pop("id").isidentifier()
        assert metadata == {
            "name": "hf-linear-attn",
            "version": 7,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
    assert len({metadata_of(build)["id"] for build in builds}) == 3


def test_other_code_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = metadata_of(export_kernels(tmp_path / "first")[0])
    assert metadata_of(export_kernels(tmp_path / "again")[0]) == first
    monkeypatch.setattr(export, "standalone_sources", lambda package, moved: {"__init__.py": "y = 2\n"})
    assert metadata_of(export_kernels(tmp_path / "other")[0])["id"] != first["id"]


def test_the_card_names_what_is_offered(tmp_path: Path) -> None:
    export_kernels(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() | {"tags": None} == {"library_name": "kernels", "license": "apache-2.0", "tags": None}
    assert GENERATED_MARKER in card.content
    for name in ("linear_attention", "sliding_window_attention", "DecayAttention", "`query, key, value, log_decay, "):
        assert name in card.text


def test_a_folder_with_files_is_written_to_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "torch-xpu").mkdir()
    (tmp_path / "build" / "torch-xpu" / "__init__.py").write_text("mine too")
    before = content(tmp_path)
    refused = runner.invoke(app, ["export-kernels", str(tmp_path)])
    assert refused.exit_code == 1
    assert "is not empty: name another one, or pass --overwrite" in refused.output
    assert content(tmp_path) == before
    assert runner.invoke(app, ["export-kernels", str(tmp_path), "--overwrite"]).exit_code == 0
    assert before.items() <= content(tmp_path).items()


def test_an_earlier_export_goes_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = export_kernels(tmp_path)[0]
    (old / "__pycache__").mkdir()
    (old / "__pycache__" / "layers.cpython-311.pyc").write_text("of the old files")
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(export, "standalone_sources", lambda package, moved: {"__init__.py": "y = 2\n"})
    export_kernels(tmp_path)
    builds = {f"build/torch-{backend}/{name}" for backend in BACKENDS for name in ("__init__.py", "metadata.json")}
    assert {*content(tmp_path)} == {*builds, "LICENSE", "README.md", "notes.txt"}


@pytest.mark.parametrize("mine", ["ops/mine.py", "__init__.py"], ids=["added", "changed"])
def test_a_build_that_someone_worked_on_is_not_replaced(tmp_path: Path, mine: str) -> None:
    build = export_kernels(tmp_path)[-1]
    (build / mine).write_text("mine")
    before = content(tmp_path)
    result = runner.invoke(app, ["export-kernels", str(tmp_path), "--overwrite", "--version", "5"])
    assert result.exit_code == 1
    assert f"torch-rocm' is not what an earlier export wrote, it holds '{mine}': move it away" in result.output
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        "{}",
        "[1]",
        "not JSON",
        '{"name": "relu", "digest": {"files": {}}}',
        '{"name": "hf-linear-attn", "digest": {"files": [1]}}',
    ],
)
def test_another_kernel_is_not_replaced(tmp_path: Path, metadata: str | None) -> None:
    (tmp_path / "build" / "torch-cuda").mkdir(parents=True)
    if metadata is not None:
        (tmp_path / "build" / "torch-cuda" / "metadata.json").write_text(metadata)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"torch-cuda' is not what an earlier export wrote, .* no metadata of one"):
        export_kernels(tmp_path)
    assert content(tmp_path) == before


def test_a_card_of_ones_own_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export_kernels(tmp_path, version=1)
    card = tmp_path / "README.md"
    export_kernels(tmp_path, version=2)
    assert "version=2" in card.read_text()
    assert not caplog.records
    own = card.read_text().replace(GENERATED_MARKER, "Benchmarks of mine.")
    card.write_text(own)
    export_kernels(tmp_path, version=3)
    assert card.read_text() == own
    assert f"{card} was written by hand and stays as it is." in caplog.text


def test_the_license_goes_along_and_another_one_stays(tmp_path: Path) -> None:
    export_kernels(tmp_path / "fresh")
    assert content(tmp_path / "fresh")["LICENSE"] == (Path(__file__).parents[2] / "LICENSE").read_bytes()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "LICENSE").write_text("their own terms")
    export_kernels(tmp_path / "theirs")
    assert content(tmp_path / "theirs")["LICENSE"] == b"their own terms"


def test_a_package_without_its_license_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata.PathDistribution, "read_text", lambda self, name: None)
    (tmp_path / "kernel_of_a_clone").mkdir()
    export_kernels(tmp_path / "kernel_of_a_clone")
    installed = tmp_path / "site-packages" / export._PACKAGE.name
    shutil.copytree(export._PACKAGE, installed, ignore=shutil.ignore_patterns("__pycache__"))
    (installed.parent / "LICENSE").write_text("of another package")
    monkeypatch.setattr(export, "_PACKAGE", installed)
    with pytest.raises(FileNotFoundError, match="has no licenses/LICENSE in its metadata"):
        export_kernels(tmp_path / "kernel")
    assert not (tmp_path / "kernel").exists()


def test_an_error_leaves_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_kernels(tmp_path / "old")
    before = content(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "_card", full)
    for folder in ("old", "new"):
        with pytest.raises(OSError, match="No space left"):
            export_kernels(tmp_path / folder, version=4)
    assert content(tmp_path) == before
    assert os.listdir(tmp_path) == ["old"]


def test_bad_arguments_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"version=-1; allowed: an integer of at least 0"):
        export_kernels(tmp_path / "kernel", version=-1)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file; a folder is needed"):
        export_kernels(tmp_path / "file")
    assert content(tmp_path) == {"file": b"mine"}
