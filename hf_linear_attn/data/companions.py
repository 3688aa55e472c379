"""The files of a checkpoint's folder that are neither its weights nor written by `save_pretrained`.

What says how the model is used still holds once its attention is converted: the vocabulary, a sentence encoder's
pooling and normalization, prompts, the license. Weights in any format do not, nor what describes the old model: its
card, measured results, the state of its training.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

__all__ = ["copy_companions", "is_part_of_checkpoint"]

_MODULES = "modules.json"  # of sentence-transformers: the parts of the model, each with its folder
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
    "README.md",
    "*.py",  # of a package that carries it, and code that the converted config does not name
    "*results*.json",
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
    "sentence_*_config.json",
    "config_sentence_transformers.json",
)


def copy_companions(source: str, folder: Path, max_length: int | None) -> None:
    """Copy what still holds from a checkpoint into `folder`.

    Args:
        source: the checkpoint's folder or Hub id.
        folder: of the converted checkpoint; files that it holds are replaced.
        max_length: new limit (tokens) of a sentence encoder; None leaves its own.
    """
    root = Path(source)
    if not root.is_dir():
        from huggingface_hub import snapshot_download

        root = Path(snapshot_download(source, ignore_patterns=["*/*", *_WEIGHTS, *_OF_THE_OLD_MODEL]))
        if folders := _module_folders(root):
            snapshot_download(source, allow_patterns=[f"{name}/*" for name in folders])
    for path in sorted(root.iterdir()):
        if path.is_file() and not _matches(path.name, (*_WEIGHTS, *_OF_THE_OLD_MODEL)):
            shutil.copyfile(path, folder / path.name)
    for name in _module_folders(root):
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, dirs_exist_ok=True)
    if max_length is not None:
        for path in folder.glob("sentence_*_config.json"):
            settings = _read_json(path)
            settings["max_seq_length"] = max_length
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def is_part_of_checkpoint(folder: Path, name: str) -> bool:
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
    found = [str(module["path"]) for module in _read_json(root / _MODULES)]
    return [path for path in found if path and Path(path).name == path and path not in (".", "..")]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON in UTF-8: {error}.") from error
