"""`.ci/mutants.py` on a repository of one function: what its tests notice counts, what they do not is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
__all__ = ["halves"]

def halves(n: int, both: bool = True) -> list[int]:
    if n < 0:
        raise ValueError("at least 0, not " + str(n))
    rest = n // 2
    return [rest, n - rest] if both else [rest]
"""
TEST = """
from hf_linear_attn.convert import halves

def test_halves():
    assert halves(5) == [2, 3]
"""
MORE = (
    TEST
    + """
    assert halves(0) == [0, 0]
    assert halves(5, both=False) == [2]
"""
)
RUN = """
import sys
sys.path.insert(0, ".ci")
import mutants
mutants.IMPORTED, mutants.BROADER, mutants.TESTS = (), ["tests/test_convert.py"], {}
mutants.main()
"""


def run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    environment = {**os.environ, "TRUST_MUTANTS": "20", "TRUST_SEED": "0", "WORKERS": "1"}
    subprocess.run(
        [sys.executable, "-c", RUN, "out/mutants.json"], cwd=folder, env=environment, check=True, capture_output=True
    )
    rows = (folder / "out" / "mutants.rows.jsonl").read_text().splitlines()
    return json.loads((folder / "out" / "mutants.json").read_text()), [json.loads(row) for row in rows]


@pytest.mark.slow
def test_what_tests_do_not_notice_is_named(tmp_path: Path) -> None:
    for name, text in {"hf_linear_attn/convert.py": CODE, "tests/test_convert.py": TEST}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "mutants.py", tmp_path / ".ci")

    found, rows = run(tmp_path)
    assert {row["line"] for row in rows} == {4, 5, 7, 8}  # of each line one; nothing of what is said or exported
    assert found["changes"] == 4 == found["killed"] + found["survived"] + found["timed out"]
    assert all("before" in row and row["before"] != row["after"] for row in found["alive"])
    killers = {row["by"] for row in rows if row["outcome"] == "killed"}
    assert killers == {"tests/test_convert.py::test_halves"}
    assert found["survived"] >= 1
    assert run(tmp_path) == (found, rows)  # nothing is tried twice

    (tmp_path / "tests" / "test_convert.py").write_text(MORE)
    better, more_rows = run(tmp_path)
    assert len(more_rows) == 8  # the tests read otherwise
    assert better["survived"] < found["survived"]
    assert (tmp_path / "hf_linear_attn" / "convert.py").read_text() == CODE
