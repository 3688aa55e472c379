"""The picture of language models: every measured system stands where its cost and its stages say."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.image import imread

from hf_linear_attn.compare.charts import draw_language, language_png
from hf_linear_attn.measure.style import style

STAGES = ("converted", "transfer", "distill")
# System -> (seconds of softmax in its hour, seconds of its own, perplexity over the baseline's stage by stage).
SYSTEMS: dict[str, tuple[float, float, tuple[float, ...]]] = {
    "lolcats window_size=64": (2.0, 3.0, (1.16, 1.09, 1.03)),
    "lolcats window_size=64, linear branch off": (2.0, 2.2, (1.31,)),
    "longformer window_size=128": (1.6, 1.2, (1.10, 1.05)),
    "hedgehog": (2.4, 3.6, (267.0, 31.0, 4.4)),
    "taylor": (2.0, 9.0, (40.0, 12.0, 3.1)),
}


def perplexity(system: str, stage: str, length: int, ratio: float) -> dict[str, Any]:
    interval = {"mean": ratio, "low": 0.97 * ratio, "high": 1.03 * ratio}
    return {"system": system, "stage": stage, "length": length, "perplexity": 20 * ratio, "ratio": interval}


def forward(system: str, stage: str, length: int, softmax: float, own: float) -> dict[str, Any]:
    times = {"forward_seconds": own, "softmax_seconds": softmax, "forward_ratio": own / softmax}
    return {"system": system, "stage": stage, "forward_length": length, **times}


@pytest.fixture
def results() -> dict[str, Any]:
    rows = []
    for length in (512, 2048):
        rows += [perplexity("softmax", "checkpoint", length, 1.06), perplexity("softmax, same", "uptrain", length, 1.0)]
        rows += [forward("softmax", "checkpoint", length, 2.0, 2.0), forward("softmax, same", "uptrain", length, 2, 2)]
        for system, (softmax, own, ratios) in SYSTEMS.items():
            off = {"control": True} if "off" in system else {}
            stages = STAGES[-len(ratios) :]
            rows += [
                perplexity(system, stage, length, ratio) | off for stage, ratio in zip(stages, ratios, strict=True)
            ]
            rows.append(forward(system, stages[-1], length, softmax, own) | off)
    return {
        "meta": {"machine": "Linux x86_64, 2 cores", "threads": 2, "torch": "2.11"},
        "recipe": {"model": {"name": "smollm2"}},
        "checkpoint": "softmax",
        "baseline": "softmax, same",
        "documents": {"source": "addresses $x_1$"},
        "rows": rows,
    }


def drawn(results: dict[str, Any]) -> Any:
    with matplotlib.rc_context(style()):
        return draw_language(results)


def test_a_system_is_a_line_through_its_stages_at_its_cost(results: dict[str, Any]) -> None:
    figure = drawn(results)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["512 tokens", "2,048 tokens"]
    axes = figure.axes[0]
    lines = {(round(float(line.get_xdata()[0]), 3), *map(float, line.get_ydata())) for line in axes.lines}
    for softmax, own, ratios in SYSTEMS.values():
        cost = round(1000 / 512 * 2.0 * own / softmax, 3)  # in seconds of the checkpoint's own row
        assert (cost, *ratios) in lines
    assert {text.get_text() for text in axes.texts} == {"softmax", "softmax, same", *SYSTEMS}


def test_names_stand_in_the_order_of_the_last_stages_and_none_meet(results: dict[str, Any]) -> None:
    results["rows"].append(perplexity("memory", "distill", 512, 0.9))
    results["rows"].append(forward("memory", "distill", 512, 2.0, 2.5))
    axes = drawn(results).axes[0]
    last = {name: ratios[-1] for name, (_, _, ratios) in SYSTEMS.items()}
    last |= {"softmax": 1.06, "softmax, same": 1.0, "memory": 0.9}
    texts = sorted(axes.texts, key=lambda text: text.get_position()[1])
    assert [text.get_text() for text in texts] == sorted(last, key=lambda name: last[name])
    heights = [text.get_position()[1] for text in texts]
    assert min(above - below for below, above in itertools.pairwise(heights)) > 0.045
    low, high = axes.get_ylim()
    assert 0.5 < low < 0.9
    assert high > 267
    near = [tick for tick in axes.get_yticks() if 1 <= tick <= 1.5]
    assert len(near) > 2, "hundredths are told apart beside a hundredfold"


def test_the_file_is_there_if_something_was_measured(results: dict[str, Any], tmp_path: Path) -> None:
    assert language_png(results, tmp_path / "a.png")
    height, width = imread(tmp_path / "a.png").shape[:2]
    assert width > 1500
    assert height > 600
    for lacking in ("ratio", "forward_seconds"):
        partial = copy.deepcopy(results)
        partial["rows"] = [row for row in partial["rows"] if lacking not in row]
        assert not language_png(partial, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_a_length_and_a_system_that_were_not_timed_are_left_out(results: dict[str, Any]) -> None:
    results["rows"] = [row for row in results["rows"] if row.get("forward_length") != 2048]
    results["rows"].append({"system": "linear", "stage": "distill", "length": 512, "failure": "RuntimeError: no"})
    results["rows"].append(perplexity("t2r", "distill", 512, 3.0))
    figure = drawn(results)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["512 tokens"]
    assert {"linear", "t2r"}.isdisjoint(text.get_text() for text in figure.axes[0].texts)
