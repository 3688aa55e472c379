"""Long documents that any installation has: source files of the installed packages, labeled by package."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_linear_attn.data.task import DocumentTask, documents_to_dataset, group_split

__all__ = ["clean_source", "installed_sources_task"]

# Preferred packages; the first six that are installed and large enough are taken. The first four come with
# the dependencies of this package, so that every installation has enough of them.
_CANDIDATES = (
    "torch", "transformers", "sympy", "networkx", "scipy", "sklearn", "numpy", "pandas", "matplotlib",
    "datasets", "accelerate", "peft", "huggingface_hub", "fsspec", "jinja2", "rich",
)  # fmt: skip
_MAX_PACKAGES = 6
_MIN_FILES = 20
_MAX_BYTES = 300_000

_IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+\S+[ \t]+import\b|import[ \t]).*", re.MULTILINE)
# A parenthesized or backslashed import goes on over the next lines.
_LONG_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+\S+[ \t]+import[ \t]*\([^)]*\)|(?:from|import)[ \t][^\n]*\\\n[^\n]*)", re.MULTILINE
)
_LEADING_COMMENTS = re.compile(r"\A(?:[ \t]*#[^\n]*\n|\s*\n)+")


def clean_source(source: str, package_names: Sequence[str]) -> str:
    """Python source without what names its package: leading comments (licenses), imports, and the names
    themselves.

    The names of all candidate packages become the word `package`, so that none gives a label away.
    """
    text = _LEADING_COMMENTS.sub("", source)
    text = _IMPORT.sub("", _LONG_IMPORT.sub("", text))
    names = "|".join(re.escape(name) for name in sorted(package_names, key=len, reverse=True))
    text = re.sub(rf"(?i)(?<![a-z0-9])(?:{names})(?![a-z0-9])", "package", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def installed_sources_task(
    *,
    seed: int = 0,
    packages: Sequence[str] | None = None,
    files_per_package: int = 80,
    min_words: int = 600,
    test_fraction: float = 0.3,
) -> DocumentTask:
    """Predict which installed package a source file belongs to; no folder of a package is in both parts.

    Args:
        seed: seed of the choice of files and of the split.
        packages: import names; by default the first six of a fixed list that are installed and large enough.
        files_per_package: at most so many files of each.
        min_words: shortest file, in words, after cleaning.
        test_fraction: wanted share of test documents.

    Raises:
        ValueError: if fewer than two packages can serve, or a named one cannot.
    """
    wanted = tuple(packages) if packages is not None else _CANDIDATES
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    labels: list[int] = []
    groups: list[str] = []
    used: list[str] = []
    for name in wanted:
        if packages is None and len(used) == _MAX_PACKAGES:
            break
        documents = _long_files(name, wanted, files_per_package, min_words, rng)
        enough = len(documents) >= (2 if packages is not None else _MIN_FILES)
        # A package whose files lie in one folder cannot be split by folder: each file is its own group then.
        if not enough:
            if packages is not None:
                raise ValueError(
                    f"The package {name!r} has {len(documents)} installed source files of at least "
                    f"{min_words} words; at least 2 are needed."
                )
            continue
        folders = {folder for folder, _, _ in documents}
        for folder, file, text in documents:
            texts.append(text)
            labels.append(len(used))
            groups.append(f"{name}/{folder}" if len(folders) > 3 else f"{name}/{folder}/{file}")
        used.append(name)
    if len(used) < 2:
        raise ValueError(f"Fewer than two of the packages {', '.join(wanted)} are installed with long sources.")
    data = documents_to_dataset(texts, labels, groups)
    train, test = group_split(labels, groups, test_fraction, seed)
    return DocumentTask(
        name="installed-sources",
        train=data.select(train),
        test=data.select(test),
        label_names=used,
        description="The installed Python package a source file comes from; import lines, license headers "
        "and the packages' own names are removed, and folders in the test part are not in the training part.",
        generated=False,
        source="source files of the installed packages " + ", ".join(used),
    )


def _long_files(
    name: str, all_names: Sequence[str], limit: int, min_words: int, rng: np.random.Generator
) -> list[tuple[str, str, str]]:
    """(folder, file, cleaned text) of at most `limit` long source files of a package, in seeded order."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(next(iter(spec.submodule_search_locations)))
    # Four characters a word at least: shorter files need not be read.
    files = sorted(path for path in root.rglob("*.py") if 4 * min_words <= path.stat().st_size <= _MAX_BYTES)
    found: list[tuple[str, str, str]] = []
    for index in rng.permutation(len(files)):
        if len(found) == limit:
            break
        path = files[index]
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        text = clean_source(source, all_names)
        if len(text.split()) >= min_words:
            relative = path.relative_to(root)
            found.append(("/".join(relative.parts[:-1][:2]) or ".", relative.name, text))
    return found
