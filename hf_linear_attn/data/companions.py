"""The files of a checkpoint's folder that are neither its weights nor written by `save_pretrained`.

What says how the model is used still holds once its attention is converted: the vocabulary, a sentence encoder's
pooling and normalization, prompts, the license. Weights in any format do not, nor what describes the old model: its
card, measured results, the state of its training.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hf_linear_attn.saving import whole_folder

__all__ = ["checkpoint_folder", "find_companions", "find_pooling"]

_MODULES = "modules.json"  # of sentence-transformers: the parts of the model, each with its folder
_SETTINGS = "sentence_*_config.json"  # of its first module: the limit in tokens
_POOLING_FLAGS = {  # as older folders write it
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index*.json",
    "*.bin",
    "*.bin.index*.json",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.msgpack.index.json",
    "*.onnx",
    "*.onnx_data",
    "*.ot",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.tflite",
)
_OF_THE_OLD_MODEL = (
    ".*",  # of a repository, or of a run that writes to the folder
    "README.md",
    "*.py",  # of a package that carries it, and code that the converted config does not name
    "*results*.json",
    "special_tokens_map.json",  # the tokenizer is saved with its own: an old one would win over them
    "added_tokens.json",
    "stage.json",
    "stages.json",
    "train_result.json",
    "trainer_state.json",
    "adapter_config.json",
    "quantize_config.json",
)
# By their full names, not by their endings: someone's data may lie in a folder that is written over.
_READ_ON_LOADING = (
    "model*.safetensors",
    "model*.safetensors.index*.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index*.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "adapter_model.*",
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "adapter_config.json",
    _MODULES,
    _SETTINGS,
    "config_sentence_transformers.json",
)


def find_companions(source: str) -> Path:
    """The folder that `checkpoint_folder` copies from: the checkpoint's own, or where its Hub id lies once fetched.

    Args:
        source: the checkpoint's folder or Hub id.

    Raises:
        ValueError: for modules or settings of a sentence encoder that cannot be read.
        OSError: where the Hub cannot be reached, and nothing of the id is cached.
    """
    root = Path(source)
    if not root.is_dir():
        from huggingface_hub import snapshot_download

        root = Path(snapshot_download(source, ignore_patterns=["*/*", *_WEIGHTS, *_OF_THE_OLD_MODEL]))
        if folders := _module_folders(root):
            snapshot_download(source, allow_patterns=[f"{name}/*" for name in folders])
    _module_folders(root)
    for path in root.glob(_SETTINGS):
        _read_settings(path)
    return root


def find_pooling(root: Path) -> str:
    """What a sentence encoder makes its vector of, in sentence-transformers' word; `mean` where nothing says.

    Args:
        root: what `find_companions` gave.

    Raises:
        ValueError: for modules behind the pooling that change its direction, or several poolings at once.
    """
    if not (root / _MODULES).is_file():
        return "mean"
    modules = {entry["type"].rpartition(".")[2]: entry["path"] for entry in _read_json(root / _MODULES)}
    if others := sorted(set(modules) - {"Transformer", "Pooling", "Normalize"}):
        raise ValueError(f"{root / _MODULES} has {', '.join(others)}; known: Transformer, Pooling, Normalize")
    if "Pooling" not in modules:
        return "mean"
    settings = _read_settings(root / modules["Pooling"] / "config.json")
    found = settings.get("pooling_mode", [mode for flag, mode in _POOLING_FLAGS.items() if settings.get(flag)])
    modes = [found] if isinstance(found, str) else list(found)
    if len(modes) != 1:
        raise ValueError(f"{root / modules['Pooling']} pools by {', '.join(modes) or 'nothing'}; known: one way")
    return modes[0]


@contextmanager
def checkpoint_folder(folder: Path, companions: Path | None, max_length: int | None) -> Iterator[Path]:
    """A new folder to save a model and its tokenizer in, which takes the place of the checkpoint in `folder`.

    What still holds of the checkpoint that the model was made from lies in it already. Of an old checkpoint in `folder`
    nothing that loading reads is left; other files stay.

    Args:
        folder: made if it is not there.
        companions: what `find_companions` gave; None where nothing of the checkpoint's use still holds.
        max_length: new limit (tokens) of a sentence encoder; None leaves its own.

    Raises:
        FileExistsError: if `folder` is a file.
    """
    with whole_folder(folder, replaces=partial(_is_part_of_checkpoint, folder)) as stage:
        if companions is not None:
            _copy(companions, stage, max_length)
        yield stage


def _copy(root: Path, folder: Path, max_length: int | None) -> None:
    for path in sorted(root.iterdir()):
        if path.is_file() and not _matches(path.name, (*_WEIGHTS, *_OF_THE_OLD_MODEL)):
            shutil.copyfile(path, folder / path.name)
    for name in _module_folders(root):
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, dirs_exist_ok=True)
    if max_length is not None:
        for path in folder.glob(_SETTINGS):
            settings = {**_read_settings(path), "max_seq_length": max_length}
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _is_part_of_checkpoint(folder: Path, name: str) -> bool:
    """Whether a file of a saved checkpoint, relative to its folder, takes part in loading it."""
    first, *rest = Path(name).parts
    if rest:
        return first == "additional_chat_templates" or first in _module_folders(folder)
    return _matches(name, _READ_ON_LOADING)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _module_folders(root: Path) -> list[str]:
    """Folders of the modules after the Transformers model, which lies in the root."""
    if not (root / _MODULES).is_file():
        return []
    modules = _read_json(root / _MODULES)
    paths = [x.get("path") if isinstance(x, dict) else None for x in modules] if isinstance(modules, list) else [None]
    if not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{root / _MODULES} must hold a list of modules, each with the path of its folder.")
    return [path for path in paths if path and Path(path).name == path and path not in (".", "..")]


def _read_settings(path: Path) -> dict[str, Any]:
    settings = _read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a mapping, given {settings!r}.")
    return settings


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON in UTF-8: {error}.") from error
