"""`hf-linear-attn convert` calibrates unless it is told not to, and says on what and what that brought."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from hf_linear_attn import convert_model
from hf_linear_attn.cli import app, arguments
from hf_linear_attn.data.documents import load_documents
from tests.small_runs import save_checkpoint, save_documents

runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "checkpoint", num_hidden_layers=3)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of eight .txt files."""
    return save_documents(tmp_path / "documents") / "train" / "fruit"


def convert(checkpoint: Path, out: Path, *words: Any, variant: str = "hedgehog") -> tuple[Any, str]:
    """The converted model, and what the command says."""
    result = runner.invoke(app, ["convert", str(checkpoint), variant, "--output", str(out), *map(str, words)])
    assert result.exit_code == 0, result.output
    return AutoModelForSequenceClassification.from_pretrained(out), result.output


def by_hand(checkpoint: Path, files: list[Path], length: int, **options: Any) -> Any:
    """The same conversion in Python."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    cut = {"truncation": True, "max_length": length, "return_tensors": "pt"}
    batches = [dict(tokenizer(file.read_text(), **cut)) for file in files]
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    return convert_model(model, "hedgehog", calibration=batches, **options)


def assert_same(left: Any, right: Any) -> None:
    assert left.config.linear_attn == right.config.linear_attn
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_files_choose_the_starts_that_they_choose_in_python(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    files = sorted(texts.iterdir())[:2]
    model, said = convert(checkpoint, tmp_path / "out", *(word for f in files for word in ("--calibration", f)))
    same = by_hand(checkpoint, files, 64)
    assert_same(model, same)
    tokens = sum(min(len(file.read_text().split()) + 2, 64) for file in files)
    assert f"Calibrated on 2 documents of your own, {tokens} tokens in all: {files[0]}, {files[1]}" in said
    rows = same.conversion_report.rows
    before, after = (sum(x) / 3 for x in zip(*((row.published_error, row.output_error) for row in rows), strict=True))
    assert f"Error of the layers against softmax, on average: {after:.3f} ({before:.3f} as published)" in said
    assert "Not calibrated" not in said


def test_a_folder_gives_four_documents_evenly_spread_or_as_many_as_asked(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    (texts / "notes.md").write_text("not a text file")
    (texts / "deeper").mkdir()
    (texts / "deeper" / "0.txt").write_text("not in the folder itself")
    found = sorted(texts.glob("*.txt"))
    model, said = convert(checkpoint, tmp_path / "four", "--calibration", texts)
    assert_same(model, by_hand(checkpoint, found[::2], 64))
    assert f"4 documents of the folder {texts}" in said
    words = ["--calibration-documents", 8, "--calibration-length", 16, "--calibration-steps", 3]
    model, said = convert(checkpoint, tmp_path / "eight", "--calibration", texts, *words)
    assert_same(model, by_hand(checkpoint, found, 16, calibration_steps=3))
    assert "8 documents of the folder" in said
    assert "128 tokens in all" in said


@pytest.mark.parametrize(
    ("by", "what"), [(None, "the output"), ("output", "the output"), ("states", "the final hidden states")]
)
def test_layers_that_keep_softmax(by: str | None, what: str, checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    words = ["--layers", "auto", "--keep-softmax", 1, *(["--keep-softmax-by", by] if by else [])]
    model, said = convert(checkpoint, tmp_path / "out", *words, "--calibration", texts)
    options = {"layers": "auto", "keep_softmax": 1, "keep_softmax_by": by}
    assert_same(model, by_hand(checkpoint, sorted(texts.glob("*.txt"))[::2], 64, **options))
    assert [layer is None for layer in model.config.linear_attn["layers"]].count(True) == 1
    assert f"layers that keep softmax, where converting hurt {what} most" in said


def test_bundled_documents_are_the_default(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With documents of our own in their place: the test opens no connection."""
    task = load_documents(str(save_documents(tmp_path / "documents", words=(70, 90))))
    asked: list[str] = []

    def bundled(source: str) -> Any:
        asked.append(source)
        return task

    monkeypatch.setattr("hf_linear_attn.data.documents.load_documents", bundled)
    default, said = convert(checkpoint, tmp_path / "default")
    assert asked == ["auto"]
    assert f"Calibrated on 4 documents of {task.source}, 256 tokens in all: fruit/0.txt (fruit), " in said
    assert re.search(r"metal/\d.txt \(metal\)", said)  # from all of them, and they are sorted
    auto, _ = convert(checkpoint, tmp_path / "auto", "--calibration", "auto")
    assert_same(default, auto)  # the same documents each time
    plain, said = convert(checkpoint, tmp_path / "none", "--calibration", "none")
    assert asked == ["auto", "auto"]
    assert "Not calibrated: the start is the method as published" in said
    assert "Calibrated on" not in said
    left, right = default.state_dict(), plain.state_dict()
    assert any(not torch.equal(left[name], right[name]) for name in left)


def test_what_replaced_the_bundled_documents_is_said(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_linear_attn.data.npm.default_cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr("hf_linear_attn.data.npm.shutil.which", lambda name: None)
    _, said = convert(checkpoint, tmp_path / "out", "--calibration-length", 24)
    assert "Calibrated on 4 documents of source files of the installed packages" in said
    assert "Fallback: the State of the Union addresses could not be had" in said


@pytest.mark.usefixtures("past_only")
def test_nothing_is_read_before_everything_else_is_right(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(source: str) -> Any:
        raise AssertionError("documents were fetched for a call that cannot succeed")

    monkeypatch.setattr("hf_linear_attn.data.documents.load_documents", fetched)
    for words in (["linear", "--layers", "7"], ["linear", "--max-length", "8"], ["past_only"]):
        result = runner.invoke(app, ["convert", str(checkpoint), *words, "--output", str(tmp_path / "out")])
        assert result.exit_code == 1
        assert result.output.splitlines()[-1].startswith("Error: ")


def test_without_datasets_the_default_says_what_to_do(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = arguments.importlib.util.find_spec
    monkeypatch.setattr(
        arguments.importlib.util, "find_spec", lambda name, *rest: None if name == "datasets" else find(name, *rest)
    )
    result = runner.invoke(app, ["convert", str(checkpoint), "linear", "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    for part in ("datasets cannot be found", "hf-linear-attn[train]", "--calibration FILE", "--calibration none"):
        assert part in result.output
    convert(checkpoint, tmp_path / "out", "--calibration", texts / "0.txt")


def test_a_method_that_chooses_nothing_says_so(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    _, said = convert(checkpoint, tmp_path / "out", "--calibration", texts, variant="longformer")
    assert "(the method chooses nothing from documents)" in said
