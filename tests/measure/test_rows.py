"""Rows on disk: kept under one setting, refused under another with the difference alone."""

import json
from pathlib import Path

import pytest

from hf_linear_attn.measure.rows import RowFile, differences


def test_rows_go_on_and_half_a_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "out" / "rows.jsonl"
    rows = RowFile(path, {"lengths": (1, 2)})
    assert not path.exists()  # nothing is left of a run that measures nothing
    rows.append({"system": "a", "value": 1.0})
    rows.append({"system": "b", "failure": "no room"})
    with path.open("a") as file:
        file.write('{"system": "c", "val')
    again = RowFile(path, {"lengths": [1, 2]})
    assert again.rows == [{"system": "a", "value": 1.0}]
    assert again.find(system="a") == again.rows[0]
    assert not again.has(system="b")


def test_another_setting_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    RowFile(path, {"data": {"seed": 0, "source": "sotu"}, "steps": 5}).append({"system": "a"})
    with pytest.raises(ValueError, match=r"data\.seed=0 there and 1 here") as caught:
        RowFile(path, {"data": {"seed": 1, "source": "sotu"}, "steps": 5})
    assert "sotu" not in str(caught.value)
    # A key that came with a later version, unset, is no other setting.
    assert RowFile(path, {"data": {"seed": 0, "source": "sotu", "buffer": None}, "steps": 5}).rows == [{"system": "a"}]


def test_lists_are_compared_entry_by_entry() -> None:
    there = [{"stage": "transfer"}, {"stage": "distill", "lora": {"r": 8}}]
    assert differences(there, [{"stage": "transfer", "redraw_every": None}, there[1]]) == []
    assert differences({"stages": there}, {"stages": [there[0], {"stage": "distill", "lora": {"r": 4}}]}) == [
        "stages.1.lora.r=8 there and 4 here"
    ]
    assert len(differences({"stages": there}, {"stages": there[:1]})) == 1


def test_numbers_that_json_does_not_have_are_a_failure(tmp_path: Path) -> None:
    rows = RowFile(tmp_path / "rows.jsonl", {})
    rows.append({"system": "a", "value": float("nan")})
    assert rows.rows[0]["failure"] == "gave numbers that are not finite"
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[-1]) == rows.rows[0]
