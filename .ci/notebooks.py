"""The notebooks. notebooks/*.py are written by hand, in the percent format that editors and jupytext read; this runs
them and writes each .ipynb beside, with what its cells print and draw.

`python .ci/notebooks.py [NAME ...]` runs those whose names begin so, all by default; `--check` runs nothing and only
says whether each pair says the same (exit status 1 if not).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
TIMEOUT = 600  # seconds of a cell


def cells(text: str) -> list[tuple[str, str]]:
    """(kind, source) of each cell: code as it stands, Markdown without its comment signs."""
    found = []
    for mark, body in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", text, flags=re.MULTILINE):
        if mark.strip() == "[markdown]":
            found.append(("markdown", "\n".join(re.sub(r"^# ?", "", line) for line in body.strip().splitlines())))
        else:
            found.append(("code", body.strip()))
    return found


def executed(path: Path) -> Any:
    """The notebook of a .py, run from its first cell to its last; of what it prints, no warnings and progress bars.

    Raises:
        nbclient.exceptions.CellExecutionError: for a cell that fails.
    """
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(metadata=METADATA)
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    for number, (kind, source) in enumerate(cells(path.read_text(encoding="utf-8"))):
        notebook.cells.append(make[kind](source, id=f"cell-{number:02}"))
    NotebookClient(
        notebook, timeout=TIMEOUT, record_timing=False, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def differ(path: Path) -> bool:
    """Whether the .ipynb of a .py is not there, or has other cells."""
    twin = path.with_suffix(".ipynb")
    if not twin.is_file():
        return True
    kept = [(cell.cell_type, cell.source) for cell in nbformat.read(twin, as_version=4).cells]
    return kept != cells(path.read_text(encoding="utf-8"))


def main() -> int:
    """Run the notebooks and write them, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of names, as 01 (default: all)")
    parser.add_argument("--check", action="store_true", help="run nothing; exit status 1 where a pair differs")
    arguments = parser.parse_args()
    paths = [path for path in sorted(NOTEBOOKS.glob("*.py")) if path.name.startswith(tuple(arguments.names or [""]))]
    if arguments.check:
        if changed := [path.stem for path in paths if differ(path)]:
            print(f"{', '.join(changed)}: the .ipynb is not that of the .py. make notebooks")
        return int(bool(changed))
    for path in paths:
        print(path.name, flush=True)
        nbformat.write(executed(path), path.with_suffix(".ipynb"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
