"""Reports of a comparison: `results.json`, one HTML page, one picture, one table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hf_linear_attn.compare.charts import results_png, results_svg
from hf_linear_attn.compare.schema import agreements, check_results, summarize

__all__ = ["ReportPaths", "check_results", "render_html", "render_table", "summarize", "write_report"]


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report."""

    json: Path
    html: Path
    png: Path


def write_report(results: Mapping[str, Any], output_dir: str | Path) -> ReportPaths:
    """Write `results.json`, `report.html` (self-contained) and `report.png` into `output_dir`, which is made.

    Args:
        results: see `hf_linear_attn.compare.schema`.
        output_dir: folder; files of those names in it are replaced.

    Raises:
        ValueError: see `check_results`.
    """
    check_results(results)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    paths = ReportPaths(folder / "results.json", folder / "report.html", folder / "report.png")
    paths.json.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    paths.html.write_text(render_html(results), encoding="utf-8")
    results_png(results, paths.png)
    return paths


def render_html(results: Mapping[str, Any]) -> str:
    """The HTML page, with the picture inside it; every text from `results` is escaped."""
    check_results(results)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_linear_attn.compare", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, count=_count, duration=_duration, words=_words)
    lengths = sorted({point["length"] for row in results["rows"] for point in row["forward"]})
    return environment.get_template("report.html.jinja").render(
        results=results,
        summary=summarize(results),
        agreements=agreements(results),
        metrics=_metric_names(results),
        lengths=lengths,
        forward={row["name"]: {point["length"]: point for point in row["forward"]} for row in results["rows"]},
        chart=results_svg(results),
    )


def render_table(results: Mapping[str, Any]) -> Table:
    """The comparison as a table for the terminal (80 columns do); print it with `rich`."""
    check_results(results)
    table = Table(
        title=escape(results["meta"]["title"]),
        title_justify="left",
        caption=escape(summarize(results)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    metric = results["primary_metric"]
    longest = max((point["length"] for row in results["rows"] for point in row["forward"]), default=None)
    table.add_column("model\nreads", overflow="fold", min_width=17)
    for header in (
        f"{_words(metric)}\n95% interval",
        "difference\nto baseline",
        "new par.\npeak MB",
        "step s\ntokens/s",
        "forward" if longest is None else f"forward\n{longest:,}",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for row in results["rows"]:
        difference = row["difference_to_baseline"]
        table.add_row(
            Text.assemble((row["name"], "bold"), f"\n{row['max_length']:,} tokens"),
            Text(_short_interval(row["quality"][metric])),
            Text("baseline")
            if row["name"] == results["baseline"]
            else Text(_short_interval(difference, "+"), style=_verdict_style(difference)),
            f"{_count(row['parameters_added'])}\n{_number(row['peak_memory_mb'])}",
            f"{_number(row['seconds_per_step'])}\n{_number(row['tokens_per_second'])}",
            _forward_at(row, longest),
        )
    return table


def _short_interval(value: Mapping[str, float] | None, sign: str = "") -> str:
    """Mean over its interval, in two narrow lines."""
    if value is None:
        return "-"
    return f"{value['mean']:{sign}.3f}\n[{value['low']:{sign}.2f}, {value['high']:{sign}.2f}]"


def _verdict_style(difference: Mapping[str, float] | None) -> str:
    if difference is None:
        return ""
    if difference["low"] > 0:
        return "green"
    return "red" if difference["high"] < 0 else ""


def _forward_at(row: Mapping[str, Any], length: int | None) -> str:
    """Time at `length` over its share of the reference model's time; a dash where the row has none."""
    for point in row["forward"]:
        if point["length"] == length:
            ratio = "" if point["ratio"] is None else f"\n{point['ratio']:.2f}x"
            return f"{_number(point['seconds'])} s{ratio}"
    return "-"


def _metric_names(results: Mapping[str, Any]) -> list[str]:
    """The primary metric, then the others in the order they come."""
    names = dict.fromkeys([results["primary_metric"]])
    for row in results["rows"]:
        names.update(dict.fromkeys(row["quality"]))
    return list(names)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _count(value: int | None) -> str:
    if value is None:
        return "-"
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _words(name: str) -> str:
    return name.replace("_", " ").replace("f1", "F1")
