"""Writing files so that a reader finds the old ones or the new ones, and never some of both.

A checkpoint is several files. They are written into a folder beside the old ones; then the old `config.json`, without
which nothing loads the folder, is taken away, the new files take their places, and the new `config.json` comes last.
A process killed before that leaves the old checkpoint, one killed after it the new one; in between, loading says that
there is no `config.json`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

__all__ = ["saved_at", "stale_weights", "to_json", "whole_folder", "write_json"]

# Loading starts with one of these: taken away first, put back last.
_ENTRIES = ("config.json", "adapter_config.json")
_STAGE = ".saving-"
# model.safetensors, model-00001-of-00002.safetensors, model.safetensors.index.json, and the same with a variant's name
_WEIGHTS = re.compile(
    r"(?P<stem>[^.]+?)(?P<variant>\..+?)?(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(?P<index_variant>\..+)?\.json)?"
)


@contextmanager
def whole_folder(folder: str | os.PathLike[str], replaces: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """A new folder to write into, whose files take their places in `folder` when the block ends without an error.

    Other files of `folder` stay, apart from weights of an earlier save (a single file where the new ones are shards,
    more shards than now) that would be read with the new ones or instead of them.

    Args:
        folder: made if it is not there.
        replaces: told the path of a file of `folder`, relative to it; True if it goes when something is written.

    Raises:
        FileExistsError: if `folder` is a file.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{str(folder)!r} is a file; a folder is needed to save to.")
    fresh = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    stage = Path(tempfile.mkdtemp(prefix=f"{_STAGE}{_processes()}-{os.getpid()}-", dir=target))
    try:
        yield stage
        _take_places(stage, target, replaces)
    finally:
        shutil.rmtree(stage)
        if fresh and not any(target.iterdir()):
            target.rmdir()


def _take_places(stage: Path, target: Path, replaces: Callable[[str], bool] | None) -> None:
    new = sorted(str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file())
    entries = [name for name in new if name in _ENTRIES]
    stale = stale_weights(_files(target), new)
    if replaces is not None and new:
        stale += [name for name in _files(target) if name not in new and name not in stale and replaces(name)]
    for name in new:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
    for name in entries:
        (target / name).unlink(missing_ok=True)
    for name in stale:
        (target / name).unlink(missing_ok=True)
    for name in [*(name for name in new if name not in entries), *entries]:
        os.replace(stage / name, target / name)
    for folder in {(target / name).parent for name in stale} - {target}:
        if not any(folder.iterdir()):
            folder.rmdir()


def stale_weights(present: Iterable[str], new: Iterable[str]) -> list[str]:
    """Which of the present files are weights that would be read with new ones, or instead of them.

    Args:
        present: names of files in a checkpoint, relative to it.
        new: names of the files that are written into it.
    """
    new = set(new)
    weights = {key for key in map(_weights_key, new) if key is not None}
    return [name for name in present if name not in new and _weights_key(name) in weights]


def _files(folder: Path) -> list[str]:
    """Files of a folder and of the folders in it, relative to it; nothing of what is being saved."""
    found = [path for path in folder.iterdir() if not path.name.startswith(_STAGE)]
    found += [inner for path in found if path.is_dir() and not path.is_symlink() for inner in path.iterdir()]
    return sorted(str(path.relative_to(folder)) for path in found if path.is_file())


def _weights_key(name: str) -> tuple[str, str] | None:
    """What the weights in a file are called ("model", and their variant's name); None for another file."""
    match = _WEIGHTS.fullmatch(name)
    if match is None:
        return None
    return match["stem"], match["variant"] or match["index_variant"] or ""


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes of this machine were writing."""
    if os.name != "posix":  # elsewhere signal 0 is not a question
        return
    for path in folder.glob(f"{_STAGE}*"):
        where, _, process = path.name.removeprefix(_STAGE).rpartition("-")[0].rpartition("-")
        pid = process if where == _processes() else ""  # names of machines have dashes and digits too
        if not pid.isdigit():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(path)
        except PermissionError:  # it lives, and is someone else's
            continue


def _processes() -> str:
    """What tells apart processes of the same number: their machine, and on Linux the container that counts them."""
    try:
        return f"{platform.node()}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node()


def saved_at(name: str) -> str | None:
    """When the newest file of weights in a folder was written, UTC; None of what lies elsewhere."""
    files = [path for path in Path(name).glob("*") if path.suffix in (".safetensors", ".bin", ".gguf")]
    if not files:
        return None
    return datetime.fromtimestamp(max(path.stat().st_mtime for path in files), timezone.utc).isoformat()


def to_json(data: Any, indent: int | None = None) -> str:
    """`data` as JSON that every reader takes: numbers that are not finite, which JSON does not have, become null."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_json(path: Path, data: Any) -> None:
    """Write `to_json(data)` to a file, whole: a reader finds the old content or the new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(to_json(data, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
