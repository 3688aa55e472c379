"""The folder that Hugging Face's `kernels` library loads: a build for each backend, its metadata, a card, the license.

All builds hold the same files, which run Triton kernels on GPUs and plain PyTorch elsewhere. Layout and metadata are
those of the library's "Kernel requirements". The name that a build is loaded under, and that PyTorch registers its
operators in, holds a digest of its files: several versions, and this package, can be loaded by one process.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import logging
import os
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_linear_attn import __version__
from hf_linear_attn.hub_kernel import layers, surface
from hf_linear_attn.hub_kernel.sources import standalone_sources
from hf_linear_attn.saving import whole_folder

__all__ = ["BACKENDS", "GENERATED_MARKER", "export_kernels"]

BACKENDS = ("cpu", "cuda", "rocm")
GENERATED_MARKER = "<!-- Written by hf-linear-attn export-kernels, which rewrites it unless you remove this line. -->"

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
_MODULES = {"hub_kernel.surface": "", "hub_kernel.layers": "layers"}
_NAME = "hf-linear-attn"
_LICENSE = "Apache-2.0"
_METADATA = "metadata.json"
_LICENSE_FILE = "LICENSE"


def export_kernels(folder: str | Path, version: int | None = None) -> list[Path]:
    """Write the package's ops as a kernel of the Hub, without what they do not need.

    A build that an earlier export wrote is replaced as a whole; every other file of the folder stays, and so do a card
    that was written by hand and a LICENSE that is there.

    Args:
        folder: made if it is not there.
        version: the kernel's, which is also that of its branch on the Hub; by default the package's major version.

    Returns:
        The folders of the builds, one for each of `BACKENDS`.

    Raises:
        ValueError: for a negative version, a build in `folder` that holds anything but what an export wrote, or a
            module of the package that cannot stand without it. Nothing is written then.
        FileExistsError: if `folder` is a file.
        FileNotFoundError: if the installed package has lost its license, which a copy of its code must go with.
    """
    version = int(__version__.partition(".")[0]) if version is None else version
    if version < 0:
        raise ValueError(f"version={version}; allowed: an integer of at least 0.")
    folder = Path(folder)
    builds = {backend: folder / "build" / f"torch-{backend}" for backend in BACKENDS}
    for build in builds.values():
        _check_replaceable(build)
    sources, license_text = standalone_sources(_PACKAGE, _MODULES), _license_text()
    with whole_folder(folder) as stage, tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as replaced:
        for backend in BACKENDS:
            _write_build(stage / backend, sources, backend, version)
        if _card_is_ours(folder / "README.md"):
            _card(version).save(stage / "README.md")
        if not (folder / _LICENSE_FILE).exists():
            (stage / _LICENSE_FILE).write_text(license_text, encoding="utf-8", newline="\n")
        (folder / "build").mkdir(exist_ok=True)
        for backend, build in builds.items():
            if build.exists():
                os.rename(build, Path(replaced) / backend)
            os.rename(stage / backend, build)
    return list(builds.values())


def _license_text() -> str:
    """The package's license, as its wheel carries it beside the metadata, or a clone beside the package."""
    installed = (found.read_text(f"licenses/{_LICENSE_FILE}") for found in metadata.distributions(name=_NAME))
    text = next(filter(None, installed), None)
    if text is not None:
        return text
    beside = _PACKAGE.parent / _LICENSE_FILE
    if not (_PACKAGE.parent / "pyproject.toml").is_file() or not beside.is_file():
        raise FileNotFoundError(f"The installed {_NAME} has no licenses/{_LICENSE_FILE} in its metadata: reinstall it.")
    return beside.read_text(encoding="utf-8")


def _write_build(build: Path, sources: dict[str, str], backend: str, version: int) -> None:
    for name, text in sources.items():
        (build / name).parent.mkdir(parents=True, exist_ok=True)
        (build / name).write_text(text, encoding="utf-8", newline="\n")
    digests = _digests(build)
    code = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:12]
    metadata = {
        "id": f"_{_NAME.replace('-', '_')}_{backend}_{code}",  # a module's name
        "name": _NAME,
        "version": version,
        "license": _LICENSE,
        "python-depends": [],  # PyTorch and Triton are taken for granted
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (build / _METADATA).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _digests(build: Path) -> dict[str, str]:
    """Base64 of the SHA-256 of each file of a build, as the library has them: without metadata and bytecode."""
    files = {path.relative_to(build).as_posix(): path for path in sorted(build.rglob("*")) if path.is_file()}
    return {
        name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for name, path in files.items()
        if name != _METADATA and path.parent.name != "__pycache__"
    }


def _check_replaceable(build: Path) -> None:
    """Raise `ValueError` if a build holds anything but what an earlier export wrote."""
    if not build.exists():
        return
    try:
        metadata = json.loads((build / _METADATA).read_text(encoding="utf-8"))
        written = dict(metadata["digest"]["files"]) if metadata["name"] == _NAME else {}
    except (OSError, ValueError, TypeError, KeyError):
        written = {}
    present = _digests(build)
    others = sorted(name for name, digest in present.items() if written.get(name) != digest)
    if others or not written:
        found = f"{others[0]!r}" if others else "no metadata of one"
        raise ValueError(
            f"{str(build)!r} is not what an earlier export wrote, it holds {found}: move it away, or name another "
            "folder."
        )


def _card_is_ours(path: Path) -> bool:
    """Whether a card may be written over; says so if not."""
    if not path.exists() or GENERATED_MARKER in path.read_text(encoding="utf-8", errors="replace"):
        return True
    logger.warning("%s was written by hand and stays as it is.", path)
    return False


def _card(version: int) -> ModelCard:
    offered = {name: getattr(surface, name) for name in surface.__all__ if name != "layers"}
    modules = {name: getattr(layers, name) for name in layers.__all__}
    return ModelCard.from_template(
        ModelCardData(library_name="kernels", license=_LICENSE.lower(), tags=["kernel", "linear-attention", _NAME]),
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        marker=GENERATED_MARKER,
        about=inspect.getdoc(surface),
        version=version,
        package_version=__version__,
        offered={name: _first_line(value) for name, value in offered.items()},
        layers={name: (_parameters(value.forward), _first_line(value)) for name, value in modules.items()},
    )


def _first_line(value: Any) -> str:
    return (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")


def _parameters(function: Any) -> str:
    """`query, key, is_causal=False`."""
    own = list(inspect.signature(function).parameters.values())[1:]
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in own)
