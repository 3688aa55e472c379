"""A part of a package as files that stand by themselves: which files, and what they import then."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_linear_attn.hub_kernel.sources import standalone_sources

FILES = {
    "__init__.py": "import transformers  # the whole package needs it, its parts do not\n",
    "front/__init__.py": "raise ImportError('never copied')\n",
    "front/surface.py": '"""The front."""\n\nfrom planted.front import layers\nfrom planted.deep.math import twice\n',
    "front/layers.py": "import planted.deep.math as math\n\n\ndef four(x):\n    return math.twice(math.twice(x))\n",
    "deep/__init__.py": "NAME = __name__\n",
    "deep/math.py": """from __future__ import annotations

from typing import TYPE_CHECKING

from planted.deep import NAME
from planted.deep.inner import (  # why
    one,  # and which
    two as deux,
)

if TYPE_CHECKING:
    from planted.types import Number


def twice(x: Number) -> Number:
    from planted.late import later; text = "from planted.deep import NAME"
    return later(x) * deux * one, text, NAME


def twice(x):
    from planted.late import later

    return later(x) * deux * one
""",
    "deep/inner/__init__.py": "from planted.deep.inner.numbers import one\nfrom ..far import two\n",
    "deep/inner/numbers.py": "one = 1\n",
    "deep/far.py": "two = 2\n",
    "late.py": "from planted import deep\n\n\ndef later(x):\n    assert deep.NAME.endswith('.deep')\n    return x\n",
    "types.py": "Number = float\n",
    "unused.py": "import numpy\n",
}
MOVED = {"front.surface": "", "front.layers": "layers"}


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A package of many ways to import."""
    for name, text in FILES.items():
        (tmp_path / "planted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "planted" / name).write_text(text)
    return tmp_path / "planted"


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that imports look into; what was imported from there is forgotten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("planted", "copied")]:
        del sys.modules[name]


def test_the_files_are_those_that_are_imported(planted: Path) -> None:
    assert sorted(standalone_sources(planted, MOVED)) == [
        "__init__.py",
        "deep/__init__.py",
        "deep/far.py",
        "deep/inner/__init__.py",
        "deep/inner/numbers.py",
        "deep/math.py",
        "late.py",
        "layers.py",
        "types.py",
    ]


def test_a_copy_runs_where_the_package_is_not(planted: Path, on_path: Path) -> None:
    for name, text in standalone_sources(planted, MOVED).items():
        (on_path / "copied" / name).parent.mkdir(parents=True, exist_ok=True)
        (on_path / "copied" / name).write_text(text)
    shutil.rmtree(planted)
    copied = importlib.import_module("copied")
    assert copied.layers.four(3) == 12
    assert copied.twice(5) == 10


def test_nothing_but_the_source_of_an_import_changes(planted: Path) -> None:
    text = standalone_sources(planted, MOVED)["deep/math.py"]
    expected = FILES["deep/math.py"]
    for given, wanted in {
        "from planted.deep import NAME\nfrom": "from . import NAME\nfrom",
        "from planted.deep.inner import (": "from .inner import (",
        "from planted.types import": "from ..types import",
        "from planted.late import": "from ..late import",
    }.items():
        expected = expected.replace(given, wanted)
    assert text == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import numpy", "imports 'numpy'; allowed: the standard library, torch, triton and the package"),
        ("from transformers.utils import logging", "imports 'transformers.utils'; allowed: the standard library"),
        ("import planted.deep", "says 'import planted.deep'; allowed: from ... import ..."),
        ("import os, planted.deep as deep", "says 'import os, planted.deep as deep'; allowed: from"),
        ("import importlib\nx = importlib.import_module('planted.deep')", "imports by name, importlib.import_module("),
        ("from planted import convert_model", "imports 'convert_model' from 'planted', which a copy has not"),
        ("from planted.front import surface", "imports 'surface' from 'planted.front', which a copy has not"),
        ("from planted.missing import x", "imports 'x' from 'planted.missing', which a copy has not"),
        (
            "from planted.front import layers, LATER",
            "says 'from planted.front import layers, LATER'; allowed: names that lie together in a copy",
        ),
    ],
)
def test_what_cannot_stand_alone_is_refused(planted: Path, line: str, said: str) -> None:
    (planted / "late.py").write_text(f'"""Late."""\n\n{line}\n\n\ndef later(x):\n    return x\n')
    row = 2 + len(line.splitlines())
    with pytest.raises(ValueError, match=r"late\.py") as caught:
        standalone_sources(planted, MOVED)
    assert str(caught.value).startswith(f"{Path('planted', 'late.py')}, line {row}, {said}")


def test_the_relative_import_of_a_source_is_understood(planted: Path) -> None:
    assert "from ..far import two\n" in standalone_sources(planted, MOVED)["deep/inner/__init__.py"]
