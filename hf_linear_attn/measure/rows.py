"""Rows of a long measurement on disk, so that a run that is cut off goes on where it stopped, and where it was made."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_linear_attn.saving import to_json

__all__ = ["RowFile", "about_machine", "differences"]


def about_machine(command: str) -> dict[str, Any]:
    """What a run writes down of itself: the command, the machine and the versions that ran it."""
    return {
        "command": command,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class RowFile:
    """Rows on disk, one JSON object a line, the first line being the setting they were measured under.

    Args:
        path: of the file.
        setting: of this run.
        retry: rows of an earlier run that have one of these keys are dropped, so that they are measured again.
        writes: False in all but one of several processes.

    Raises:
        ValueError: for a file that was measured under another setting.
    """

    def __init__(
        self, path: Path, setting: dict[str, Any], retry: tuple[str, ...] = ("failure",), *, writes: bool = True
    ) -> None:
        self._path, self._writes = path, writes
        self.rows: list[dict[str, Any]] = []
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        whole = [line for line in lines if line.endswith("}")]  # an interrupted write leaves half a line
        if whole:
            found = json.loads(whole[0])
            if changed := differences(found, json.loads(to_json(setting))):
                raise ValueError(
                    f"{path} was measured under another setting: {'; '.join(changed)}. Write to another folder, or "
                    "delete the file."
                )
            self.rows = [row for row in map(json.loads, whole[1:]) if not any(key in row for key in retry)]
        self._head = to_json(setting) + "\n"
        if whole:
            self._write()
        elif writes:
            path.unlink(missing_ok=True)  # made by the first row: a run that cannot start leaves nothing

    def _write(self) -> None:
        if self._writes:
            rows = "".join(to_json(row) + "\n" for row in self.rows)
            self._path.write_text(self._head + rows, encoding="utf-8")

    def has(self, **identity: Any) -> bool:
        """Whether a row with these values is there."""
        return self.find(**identity) is not None

    def find(self, **identity: Any) -> dict[str, Any] | None:
        """The first row with these values, or None."""
        return next((row for row in self.rows if all(row.get(n) == value for n, value in identity.items())), None)

    def drop(self, **identity: Any) -> int:
        """Forget the rows with these values, so that they are measured again; how many there were."""
        kept = [row for row in self.rows if any(row.get(n) != value for n, value in identity.items())]
        dropped, self.rows = len(self.rows) - len(kept), kept
        if dropped:
            self._write()
        return dropped

    def append(self, row: dict[str, Any]) -> None:
        """Keep a row and write it; numbers that are not finite, which JSON does not have, are a failure."""
        try:
            json.dumps(row, allow_nan=False)
        except ValueError:
            row = {**json.loads(to_json(row)), "failure": "gave numbers that are not finite"}
        self.rows.append(row)
        if not self._writes:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(self._head if file.tell() == 0 else "")
            file.write(to_json(row) + "\n")


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """What differs between two settings in JSON types, by dotted names; a key that one lacks is unset there."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = {**there, **here}
        return [x for key in keys for x in differences(there.get(key), here.get(key), f"{name}.{key}".strip("."))]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here, strict=True))
        return [x for place, pair in pairs for x in differences(*pair, f"{name}.{place}")]
    return [] if there == here else [f"{name}={there!r} there and {here!r} here"]
