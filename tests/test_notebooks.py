"""The notebooks as they are committed: pairs that agree, with outputs that anybody may see. `make test` runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.test_readme import import_file

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def outputs(path: Path) -> list[Any]:
    return [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]


def test_each_notebook_is_the_one_of_its_source() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(path.stem for path in (ROOT / "notebooks").glob("*.py"))
    done = subprocess.run([sys.executable, ".ci/notebooks.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    script = import_file(ROOT / ".ci" / "notebooks.py")
    text = "# %% [markdown]\n# # Title\n#\n# Words.\n\n# %%\nx = 1\n\n\n# %% [markdown]\n# End.\n"
    assert script.cells(text) == [("markdown", "# Title\n\nWords."), ("code", "x = 1"), ("markdown", "End.")]
    (tmp_path / "a.py").write_text(text)
    assert script.differ(tmp_path / "a.py")
    nbformat.write(script.executed(tmp_path / "a.py"), tmp_path / "a.ipynb")
    assert not script.differ(tmp_path / "a.py")
    (tmp_path / "a.py").write_text(text.replace("x = 1", "x = 2"))
    assert script.differ(tmp_path / "a.py")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_hold_no_path_of_a_machine(path: Path) -> None:
    found = outputs(path)
    assert any("image/png" in output.get("data", {}) for output in found) or path.stem.startswith("07")
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in found)
    said = "".join(output.get("text", "") + output.get("data", {}).get("text/markdown", "") for output in found)
    assert len(said) > 100
    assert re.search(r"(?<![\w.:/])/(tmp|home|root|usr|work|Users|opt)/", said) is None
    assert path.stat().st_size < 1_500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    assert [target for target in targets if not (path.parent / target).exists()] == []
    assert f"notebooks/{path.name}" in (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
