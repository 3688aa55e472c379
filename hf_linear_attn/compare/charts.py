"""The picture of a comparison: quality with intervals, forward time against length, cost of training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from hf_linear_attn.measure.style import COLORS, MARKERS, style

__all__ = ["draw_results", "results_png", "results_svg"]

_GREYS = ("#8A8A8A", "#5F6B7A", "#A9A9A9")
# Colours that the SVG's reader replaces by the page's own.
_SVG_INK, _SVG_FAINT = "#010203", "#010204"


def results_png(results: Mapping[str, Any], path: str | Path, dpi: int = 160) -> None:
    """Draw the picture into a PNG file on a white ground."""
    with matplotlib.rc_context(style()):
        figure = draw_results(results)
        FigureCanvasAgg(figure).print_figure(str(path), dpi=dpi, facecolor="white", format="png")


def results_svg(results: Mapping[str, Any]) -> str:
    """The picture as an SVG element on no ground: ink in `currentColor`, grid in `var(--grid)`."""
    with matplotlib.rc_context(style(_SVG_INK, _SVG_FAINT)):
        figure = draw_results(results)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return svg.replace(_SVG_INK, "currentColor").replace(_SVG_FAINT, "var(--grid)")


def draw_results(results: Mapping[str, Any]) -> Figure:
    """The figure: panels that have nothing measured are left out."""
    rows: Sequence[Mapping[str, Any]] = results["rows"]
    colors = _row_colors(rows)
    timed = any(row["forward"] for row in rows)
    costs = [
        (key, title)
        for key, title in (
            ("seconds_per_step", "Time of a training step (s)"),
            ("peak_memory_mb", "Peak memory in training (MB)"),
        )
        if any(row[key] is not None for row in rows)
    ]
    bar_height = 0.42 * len(rows) + 0.9
    heights = [max(3.4, bar_height + 0.6)] + ([bar_height] if costs else [])
    figure = Figure(figsize=(12.5, sum(heights) + 1.1))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12, wspace=0.05, hspace=0.06)
    figure.suptitle(results["meta"]["title"], fontsize=14, fontweight="bold", x=0.012, ha="left")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)

    _quality(figure.add_subplot(grid[0, 0] if timed else grid[0, :]), results, colors)
    if timed:
        _forward(figure.add_subplot(grid[0, 1]), rows, colors)
    for column, (key, title) in enumerate(costs):
        axes = figure.add_subplot(grid[1, column] if len(costs) == 2 else grid[1, :])
        _bars(axes, rows, key, title, colors)
        if column:  # the rows are those of the panel to the left
            axes.set_yticklabels([])
    return figure


def _row_colors(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    colors, greys, hues = [], 0, 0
    for row in rows:
        if row["variant"] == "softmax":
            colors.append(_GREYS[greys % len(_GREYS)])
            greys += 1
        else:
            colors.append(COLORS[hues % len(COLORS)])
            hues += 1
    return colors


def _row_labels(axes: Axes, rows: Sequence[Mapping[str, Any]], with_length: bool) -> None:
    labels = [f"{row['name']}\n{row['max_length']:,} tokens" if with_length else row["name"] for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _quality(axes: Axes, results: Mapping[str, Any], colors: Sequence[str]) -> None:
    rows, metric = results["rows"], results["primary_metric"]
    label = metric.replace("_", " ").replace("f1", "F1")
    axes.set_title(f"Quality: {label} on {rows[0]['eval_documents']:,} test documents", loc="left", fontsize=11)
    values = [row["quality"][metric] for row in rows]
    lines = [
        (other["value"], f"{other['name']} {other['value']:.2f}")
        for other in results["baselines"]
        if other["metric"] == metric
    ]
    for position, (row, value, color) in enumerate(zip(rows, values, colors, strict=True)):
        axes.plot([value["low"], value["high"]], [position] * 2, color=color, linewidth=2.2, solid_capstyle="round")
        for end in (value["low"], value["high"]):
            axes.plot([end] * 2, [position - 0.13, position + 0.13], color=color, linewidth=2.2)
        marker = MARKERS[position % len(MARKERS)]
        axes.plot(value["mean"], position, marker=marker, color=color, markersize=8, zorder=4)
        axes.annotate(
            f"{value['mean']:.3f}",
            (1.0, position),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold" if row["name"] == results["baseline"] else "normal",
        )
    baseline = next(v["mean"] for row, v in zip(rows, values, strict=True) if row["name"] == results["baseline"])
    axes.axvline(
        baseline,
        color=matplotlib.rcParams["text.color"],
        linewidth=1.1,
        linestyle=(0, (5, 3)),
        zorder=1,
        label=f"{results['baseline']} {baseline:.2f}",
    )
    styles = ((0, (1, 2)), (0, (3, 2, 1, 2)), (0, (1, 4)), (0, (6, 2, 1, 2, 1, 2)))
    for index, (value, text) in enumerate(lines):
        axes.axvline(value, color=_GREYS[1], linewidth=1.1, linestyle=styles[index % len(styles)], zorder=1, label=text)
    ends = [v["low"] for v in values] + [v["high"] for v in values] + [value for value, _ in lines]
    margin = max(0.03, 0.08 * (max(ends) - min(ends)))
    axes.set_xlim(min(ends) - margin, max(ends) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    _row_labels(axes, rows, with_length=True)
    axes.set_xlabel(f"{label}, bars: 95% bootstrap interval")
    _legend_below(axes)


def _forward(axes: Axes, rows: Sequence[Mapping[str, Any]], colors: Sequence[str]) -> None:
    axes.set_title("Forward time against length (lower is better)", loc="left", fontsize=11)
    lengths: set[int] = set()
    for position, (row, color) in enumerate(zip(rows, colors, strict=True)):
        points = sorted(row["forward"], key=lambda point: point["length"])
        if not points:
            continue
        lengths.update(point["length"] for point in points)
        axes.plot(
            [point["length"] for point in points],
            [point["seconds"] for point in points],
            color=color,
            marker=MARKERS[position % len(MARKERS)],
            markersize=5.5,
            linewidth=1.8,
            linestyle="--" if row["variant"] == "softmax" else "-",
            label=row["name"],
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(lengths), [f"{length:,}" for length in sorted(lengths)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _seconds(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens of one sequence (log scale)")
    axes.set_ylabel("seconds (log scale)")
    _legend_below(axes)
    axes.grid(axis="both")


def _legend_below(axes: Axes) -> None:
    """A legend under the axis label, where it covers no data; placed in inches."""
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0.0, 0.0),
        bbox_transform=axes.transAxes + ScaledTranslation(-0.1, -0.55, axes.figure.dpi_scale_trans),
        frameon=False,
        fontsize=8.5,
        ncols=2 if max(len(text) for text in axes.get_legend_handles_labels()[1]) <= 30 else 1,
        handlelength=3.0,
        columnspacing=1.4,
        borderaxespad=0.0,
    )


def _seconds(value: float) -> str:
    return f"{value:g}"


def _bars(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, title: str, colors: Sequence[str]) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    values = [row[key] for row in rows]
    highest = max(value for value in values if value is not None)
    for position, (value, color) in enumerate(zip(values, colors, strict=True)):
        if value is not None:
            axes.barh(position, value, height=0.6, color=color, zorder=2)
        text = "not measured" if value is None else (f"{value:,.0f}" if value >= 100 else f"{value:.3g}")
        axes.annotate(
            text, (value or 0.0, position), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_xlim(0, highest * 1.15 if highest > 0 else 1)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    _row_labels(axes, rows, with_length=False)
