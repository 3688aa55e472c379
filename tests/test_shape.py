"""The shape of the repository: its top level, how long a file may be, its spelling. Imports nothing of the package."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    ".ci",
    ".github",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "constraints.txt",
    "docs",
    "hf_linear_attn",
    "mkdocs.yml",
    "model_cards",
    "notebooks",
    "noxfile.py",
    "pyproject.toml",
    "recipes",
    "tests",
}
CODE = {".py", ".jinja", ".yaml", ".yml", ".toml", ".md", ".sh", ""}
# Most lines a file may have; an extension that is not in CODE marks data. A base.py is no method, no family.
LIMITS = {"hf_linear_attn/variants": 200, "hf_linear_attn/patchers": 80, "": 500}

# American spelling: words of these forms are British, unless they end in -ise in America as well.
BRITISH = re.compile(
    r"(?P<stem>\w+)is(e|ed|es|er|ers|ing|ation|ations)|(ana|cata|para)lys(e|ed|er|ing)|cent(re|red|res|ring)|greys?|spelt"
    r"|\w*(behavi|col|endeav|fav|harb|hon|hum|lab|neighb)our\w*|\w*(cancel|channel|label|level|model|signal|travel)l(ed|er|ing)"
    r"|(ageing|artefact|burnt|defence|fibre|fulfil|judgement|learnt|licence|metre|offence|programme|whilst)s?"
)
ISE = re.compile(r".*(adv|ar|compr|comprom|conc|cr|dev|exerc|no|prec|prem|prom|ra|rev|superv|surpr|w)|r")


def repository_files() -> Iterator[Path]:
    """Files of the repository, relative to its root, without what `.gitignore` names."""
    lines = [line.strip() for line in (ROOT / ".gitignore").read_text().splitlines()]
    ignored = [".git", *(line.rstrip("/") for line in lines if line and not line.startswith("#"))]

    def walk(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
                continue
            if path.is_dir():
                yield from walk(path)
            else:
                yield path.relative_to(ROOT)

    yield from walk(ROOT)


def test_what_is_checked_is_all_that_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone")
    assert {path for path in listed.stdout.splitlines() if (ROOT / path).is_file()} <= {
        path.as_posix() for path in repository_files()
    }


def test_top_level_keeps_its_shape() -> None:
    assert {path.parts[0] for path in repository_files()} == TOP_LEVEL


@pytest.mark.parametrize("folder", LIMITS, ids=lambda folder: folder or "everything")
def test_files_are_short(folder: str) -> None:
    long = {
        str(path): lines
        for path in repository_files()
        if path.as_posix().startswith(folder)
        and path.suffix in CODE
        and path.name != "LICENSE"
        and not (folder and path.name == "base.py")
        and (lines := len((ROOT / path).read_text(encoding="utf-8").splitlines())) > LIMITS[folder]
    }
    assert long == {}, f"more than {LIMITS[folder]} lines"


def test_every_folder_of_code_is_a_package() -> None:
    """Setuptools leaves out a folder without `__init__.py`, and the installed package lacks it silently."""
    folders = {path.parent for path in repository_files() if path.suffix == ".py" and path.parts[0] == "hf_linear_attn"}
    assert {str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()} == set()


def test_nightly_jobs_run_sessions_that_exist() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())["jobs"]
    text = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    sessions = re.findall(r"^@nox[^@]*?^def (\w+)", (ROOT / "noxfile.py").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert set(re.findall(r'nox -s "(\w+)', text)) == set(sessions) == {"suite", "nightly", "without_triton"}


def test_spelling_is_american() -> None:
    found = {}
    for path in repository_files():
        if path.suffix not in CODE or path.name in ("LICENSE", Path(__file__).name) or "results" in path.parts:
            continue
        text = (ROOT / path).read_text(encoding="utf-8")
        words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", text)}
        matches = {match for word in words if (match := BRITISH.fullmatch(word))}
        british = sorted(match[0] for match in matches if not ISE.fullmatch(match["stem"] or ""))
        if british:
            found[path.as_posix()] = british
    assert found == {}
