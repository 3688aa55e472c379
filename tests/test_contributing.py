"""What CONTRIBUTING says of the code, against the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_linear_attn
from hf_linear_attn import convert_model
from tests.tiny import base_model, small_options, token_batch

ROOT = Path(__file__).parents[1]
WALKS = re.findall(r"```(\w+)\n((?:\S+\.py +\w+.*\n)+)```", (ROOT / "CONTRIBUTING.md").read_text())


def calls_of(variant: str) -> list[tuple[str, str]]:
    """(file, function) of this package in the order in which a converted BERT calls them, on a padded batch."""
    model = convert_model(base_model("bert"), variant, **small_options(variant, "bert")).eval()
    batch = token_batch(length=24)
    batch["attention_mask"][0, 20:] = 0
    package, calls = str(Path(hf_linear_attn.__file__).parent), []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls.append((Path(frame.f_code.co_filename).relative_to(package).as_posix(), frame.f_code.co_name))

    before = sys.getprofile()
    with torch.no_grad():
        model(**batch)  # what is made once is made
        sys.setprofile(note)
        try:
            model(**batch)
        finally:
            sys.setprofile(before)
    return calls


@pytest.mark.parametrize(("variant", "walk"), WALKS, ids=[variant for variant, _ in WALKS])
def test_a_call_goes_the_way_that_is_described(variant: str, walk: str) -> None:
    described = [tuple(line.split()[:2]) for line in walk.splitlines()]
    calls = iter(calls_of(variant))
    missing = next((step for step in described if step not in calls), None)  # each after the one before
    assert missing is None, f"{missing} is not called, or not there"


def test_two_calls_are_described() -> None:
    assert [variant for variant, _ in WALKS] == ["performer", "longformer"]
