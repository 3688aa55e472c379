"""The documents that `convert` and `advise` calibrate on: text files, a folder of them, or the bundled ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_linear_attn.cli.arguments import need_extra

__all__ = ["AUTO", "NONE", "CalibrationTexts"]

AUTO, NONE = "auto", "none"
_ALLOWED = f"text files, one folder of .txt files, {AUTO} or {NONE}"
_INSTEAD = "{flag} FILE reads text without it, {flag} none does without documents"
_DOCUMENTS = 4  # of a source that has more: a few thousand tokens tell starts apart
_LENGTH = 512


@dataclass
class CalibrationTexts:
    """What was asked for, checked; read by `batches`, once everything else was found right.

    Attributes:
        given: the words after `--calibration`: files, one folder, `auto` or `none`.
        documents: how many of a folder's or the bundled documents, evenly spread over them; None means 4, or all
            where there are fewer.
        length: most tokens of a document; None means 512, or the model's limit where that is less.
        command: that was called.
        flag: what names them on its line; those of their number and length begin with it.
        source: where the documents are from, in words, once they were read.
        used: name and tokens of each.

    Raises:
        ValueError: for words that do not go together, no file of that name, or a number of documents beside files.
        ModuleNotFoundError: where the bundled documents need an extra that is not installed.
    """

    given: Sequence[str]
    documents: int | None = None
    length: int | None = None
    command: str = "convert"
    flag: str = "--calibration"
    source: str = ""
    used: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        files = [word for word in self.given if word not in (AUTO, NONE)]
        if missing := [word for word in files if not word or not Path(word).exists()]:
            raise ValueError(f"{self.flag}: there is no file or folder {missing[0]!r}; allowed: {_ALLOWED}.")
        single = [word for word in self.given if word not in files or Path(word).is_dir()]
        if single and len(self.given) > 1:
            raise ValueError(f"{self.flag} {single[0]} goes with no other; allowed: {_ALLOWED}.")
        places = [Path(word).resolve() for word in files]
        if repeated := [word for word, place in zip(files, places, strict=True) if places.count(place) > 1]:
            raise ValueError(f"{self.flag} {repeated[-1]} is given twice.")
        if self.documents is not None and not single:
            raise ValueError(f"{self.flag}-documents goes with a folder or auto: of files all that are named serve.")
        if self.given[0] == NONE and (self.documents, self.length) != (None, None):
            raise ValueError(f"{self.flag} none leaves no documents to be numbered or cut.")
        if self.given[0] == AUTO:
            need_extra(self.command, "train", ("datasets",), _INSTEAD.format(flag=self.flag))

    @property
    def wanted(self) -> bool:
        """Whether there is anything to calibrate on."""
        return self.given[0] != NONE

    def __str__(self) -> str:
        names, total = ", ".join(name for name, _ in self.used), sum(tokens for _, tokens in self.used)
        count = f"{len(self.used)} document" + ("" if len(self.used) == 1 else "s")
        return f"{count} of {self.source}, {total:,} tokens in all: {names}"

    def batches(self, tokenizer: Any, limit: int) -> Iterator[dict[str, Any]]:
        """One batch for each document, cut to `length` tokens; fills `used` and `source`.

        Args:
            tokenizer: the model's.
            limit: longest document the converted model reads, in tokens.

        Raises:
            ValueError: for a length beyond the limit, fewer documents than asked for, or a document without tokens.
            ModuleNotFoundError: where the bundled documents need an extra that is not installed.
        """
        if self.length is not None and self.length > limit:
            raise ValueError(f"{self.flag}-length {self.length}: converted, the model reads {limit} tokens.")
        cut = {"truncation": True, "max_length": min(_LENGTH, limit) if self.length is None else self.length}
        for name, text in self._texts():
            encoded = tokenizer(text, **cut, return_tensors="pt")
            if not text.strip() or not encoded["input_ids"].numel():
                raise ValueError(f"{self.flag}: {name} holds no text.")
            self.used.append((name, encoded["input_ids"].shape[1]))
            yield {key: encoded[key] for key in ("input_ids", "attention_mask")}

    def _texts(self) -> Iterator[tuple[str, str]]:
        """Names and texts; says where they are from."""
        if self.given[0] == AUTO:
            from hf_linear_attn.data import load_documents

            task = load_documents("auto")
            self.source = task.source + (f" ({task.note})" if task.note else "")
            for row in task.train.select(self._spread(len(task.train))):
                yield f"{row['group']} ({task.label_names[row['label']]})", row["text"]
            return
        paths = [Path(word) for word in self.given]
        self.source = "your own"
        if paths[0].is_dir():
            self.source = f"the folder {paths[0]}"
            found = sorted(path for path in paths[0].glob("*.txt") if path.is_file())
            if not found:
                raise ValueError(f"{self.flag}: there is no .txt file in the folder {str(paths[0])!r} itself.")
            paths = [found[place] for place in self._spread(len(found))]
        for path in paths:
            try:
                yield str(path), path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.flag}: {path} is not UTF-8 text: {error}.") from error

    def _spread(self, available: int) -> list[int]:
        """Places of the documents wanted, evenly spread: they are often sorted by subject or by date."""
        count = self.documents or min(_DOCUMENTS, available)
        if count > available:
            raise ValueError(f"{self.flag}-documents {count}: there are {available}.")
        return [place * available // count for place in range(count)]
