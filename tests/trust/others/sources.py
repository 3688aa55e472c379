"""Test files that source distributions carry, as modules. Nothing here knows the plugin."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

__all__ = ["NOT_CARRIED", "import_tests", "stand_in", "tests_folder", "without_diffusers"]

# What Transformers' common tests import and its source distribution lacks: empty mixins.
NOT_CARRIED = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def tests_folder(package: str) -> Path:
    """The tests of the installed release of `package`, which `make test-trust` downloads.

    Raises:
        FileNotFoundError: if they are not in $TRUST_SOURCES.
    """
    name = f"{package}-{version(package)}"
    folder = (Path(os.environ.get("TRUST_SOURCES", ".venv/sources")) / name / "tests").resolve()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not there: unpack the source distribution of {name} into the folder that TRUST_SOURCES "
            "names, as make test-trust does."
        )
    return folder


def import_tests(package: str, module: str) -> ModuleType:
    """`module` of the tests of `package`, under a name that does not meet this repository's `tests`."""
    parent = f"{package}_tests"
    if parent not in sys.modules:
        sys.modules[parent] = ModuleType(parent)
        sys.modules[parent].__path__ = [str(tests_folder(package))]
    return importlib.import_module(f"{parent}.{module}")


def stand_in(package: str) -> None:
    """Put an empty class in the place of each module of `NOT_CARRIED`: those that are carried import them."""
    for name, mixin in NOT_CARRIED.items():
        folder = f"{package}_tests.{name.partition('.')[0]}"
        for path in (folder, f"{package}_tests.{name}"):
            sys.modules[path] = ModuleType(path)
        sys.modules[f"{package}_tests.{name}"].__dict__[mixin] = type(mixin, (), {})


@contextmanager
def without_diffusers() -> Iterator[None]:
    """PEFT's common tester imports a class of diffusers to ask whether a model is one: an empty one in its place."""
    sys.modules["diffusers"] = ModuleType("diffusers")
    sys.modules["diffusers"].__dict__["StableDiffusionPipeline"] = type("StableDiffusionPipeline", (), {})
    try:
        yield
    finally:
        del sys.modules["diffusers"]
