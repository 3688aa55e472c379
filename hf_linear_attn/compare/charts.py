"""The pictures of a comparison: quality with intervals, forward time against length, cost of training.

Of language models: perplexity against the time of a forward, stage by stage.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from hf_linear_attn.measure.style import (
    COLORS,
    GRAY,
    INK,
    MARKERS,
    label_ends,
    new_figure,
    plain_numbers,
    save_figure,
    style,
)

__all__ = ["draw_language", "draw_results", "language_png", "results_png", "results_svg"]

_GRAYS = ("#8A8A8A", "#5F6B7A", "#A9A9A9")
# Colors that the SVG's reader replaces by the page's own.
_SVG_INK, _SVG_FAINT = "#010203", "#010204"


def results_png(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw the picture into a PNG file on a white ground."""
    with matplotlib.rc_context(style()):
        save_figure(draw_results(results), path)


def results_svg(results: Mapping[str, Any]) -> str:
    """The picture as an SVG element on no ground: ink in `currentColor`, grid in `var(--grid)`."""
    with matplotlib.rc_context(style(_SVG_INK, _SVG_FAINT, ground="none")):
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
    others = [other for other in results["baselines"] if other["metric"] == results["primary_metric"]]
    heights = [max(2.8, 0.42 * (len(rows) + len(others)) + 0.9)] + [0.32 * len(rows) + 0.7] * bool(costs)
    figure = new_figure(10.5, sum(heights) + 0.7, results["meta"]["title"])
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    _quality(figure.add_subplot(grid[0, 0] if timed else grid[0, :]), results, others, colors)
    forward = figure.add_subplot(grid[0, 1]) if timed else None
    for column, (key, title) in enumerate(costs):
        axes = figure.add_subplot(grid[1, column] if len(costs) == 2 else grid[1, :])
        _bars(axes, rows, key, title, colors)
        if column:  # the rows are those of the panel to the left
            axes.set_yticklabels([])
    if forward is not None:
        _forward(forward, rows, colors)
    return figure


def _row_colors(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    colors, grays, hues = [], 0, 0
    for row in rows:
        if row["variant"] == "softmax":
            colors.append(_GRAYS[grays % len(_GRAYS)])
            grays += 1
        else:
            colors.append(COLORS[hues % len(COLORS)])
            hues += 1
    return colors


def _row_labels(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first row on top
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _quality(
    axes: Axes, results: Mapping[str, Any], others: Sequence[Mapping[str, Any]], colors: Sequence[str]
) -> None:
    """A row for each system, with its interval, and one for each other baseline, without."""
    rows, metric = results["rows"], results["primary_metric"]
    label = metric.replace("_", " ").replace("f1", "F1")
    axes.set_title(f"Quality: {label} on {rows[0]['eval_documents']:,} test documents", loc="left", fontsize=11)
    values = [row["quality"][metric] for row in rows]
    for position, (value, color) in enumerate(zip(values, colors, strict=True)):
        axes.plot([value["low"], value["high"]], [position] * 2, color=color, linewidth=2.2, solid_capstyle="round")
        for end in (value["low"], value["high"]):
            axes.plot([end] * 2, [position - 0.13, position + 0.13], color=color, linewidth=2.2)
        axes.plot(value["mean"], position, marker=MARKERS[position % len(MARKERS)], color=color, markersize=8, zorder=4)
    for position, other in enumerate(others, start=len(rows)):
        axes.plot(other["value"], position, marker="D", mfc="none", color=_GRAYS[1], markersize=6, zorder=4)
    means = [value["mean"] for value in values] + [other["value"] for other in others]
    for position, mean in enumerate(means):
        axes.annotate(
            f"{mean:.3f}", (1.0, position), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip
    baseline = next(v["mean"] for row, v in zip(rows, values, strict=True) if row["name"] == results["baseline"])
    axes.axvline(baseline, color=_GRAYS[1], linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)
    ends = [v["low"] for v in values] + [v["high"] for v in values] + means
    margin = max(0.03, 0.08 * (max(ends) - min(ends)))
    axes.set_xlim(min(ends) - margin, max(ends) + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    names = [f"{row['name']}\n{row['max_length']:,} tokens" for row in rows]
    _row_labels(axes, [*names, *(other["name"].replace(", ", "\n", 1) for other in others)])
    axes.set_xlabel(f"bars: 95% intervals; dashed: {results['baseline']}")


def _forward(axes: Axes, rows: Sequence[Mapping[str, Any]], colors: Sequence[str]) -> None:
    axes.set_title("Forward time against length (s)", loc="left", fontsize=11)
    lengths: set[int] = set()
    ends = []
    least = min(2, max(len(row["forward"]) for row in rows))  # one point is no curve
    for position, (row, color) in enumerate(zip(rows, colors, strict=True)):
        points = sorted((point["length"], point["seconds"]) for point in row["forward"])
        if len(points) < least:
            continue
        lengths.update(length for length, _ in points)
        axes.plot(
            *zip(*points, strict=True), color=color, marker=MARKERS[position % len(MARKERS)], markersize=5.5,
            linewidth=1.8, linestyle="--" if row["variant"] == "softmax" else "-",
        )  # fmt: skip
        ends.append((row["name"], *points[-1], color))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(lengths), [f"{length:,}" for length in sorted(lengths)])
    axes.xaxis.set_minor_locator(NullLocator())
    plain_numbers(axes.yaxis)
    axes.set_xlabel("tokens of one sequence")
    axes.grid(axis="both")
    label_ends(axes, ends)


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
    _row_labels(axes, [row["name"] for row in rows])


# Language models --------------------------------------------------------------------------------------------------

_Points = list[tuple[str, float]]
"""A stage, and the perplexity after it over that of the baseline."""

# Ticks. Most ratios lie a few hundredths above 1 in the end, and some a hundredfold to begin with.
_RATIOS = (1, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 30, 100, 300, 1000, 0.98, 0.95, 0.9, 0.8, 0.5)
_FINE = 0.05  # nats around a ratio of 1 where the scale is still linear
_GAP = 0.05  # between two names, as a share of the panel's height


def language_png(results: Mapping[str, Any], path: str | Path) -> bool:
    """Draw quality against cost into a PNG file on a white ground.

    Returns:
        whether there was a length of which both are known, and so a picture.
    """
    if not _tradeoffs(results):
        return False
    with matplotlib.rc_context(style()):
        save_figure(draw_language(results), path)
    return True


def draw_language(results: Mapping[str, Any]) -> Figure:
    """Perplexity over the baseline's against the seconds of a forward, a panel for each length that has both.

    A system is a line of points, one for each stage, the last of them filled.

    Args:
        results: what `hf_linear_attn.compare.language.compare_language` returns.
    """
    panels = _tradeoffs(results)
    systems = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    stages = dict.fromkeys(stage for panel in panels.values() for _, points in panel.values() for stage, _ in points)
    markers = dict(zip(stages, MARKERS, strict=False))
    controls = {row["system"] for row in results["rows"] if row.get("control")}
    colors, hues = {}, 0
    for name in systems:
        softmax = name in (results["checkpoint"], results["baseline"])
        colors[name] = INK if softmax else GRAY if name in controls else COLORS[hues % len(COLORS)]
        hues += not softmax and name not in controls
    meta = results["meta"]
    about = f"{results['recipe']['model']['name']} on {results['documents']['source']}; gray: controls"
    subtitle = f"{about}.\n{meta['machine']}, {meta['threads']} threads, torch {meta['torch']}"
    figure = new_figure(6.6 * len(panels), max(5.2, 0.22 * len(systems) + 2.6), "Quality against cost", subtitle)
    for column, (axes, (length, panel)) in enumerate(
        zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True)
    ):
        _tradeoff(axes, panel, colors, markers)
        axes.set_title(f"{length:,} tokens", loc="left", fontsize=11)
        axes.set_xlabel("seconds for 1,000 tokens, forward")
        if not column:
            axes.set_ylabel(f"perplexity, over that of {results['baseline']}")
    handles: list[Any] = [
        axes.plot([], [], color=GRAY, linestyle="none", marker=marker, label=stage)[0]
        for stage, marker in markers.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _tradeoffs(results: Mapping[str, Any]) -> dict[int, dict[str, tuple[float, _Points]]]:
    """Length -> system -> seconds for 1,000 tokens, and its points.

    Every system was timed in turns with the checkpoint, at an hour of its own: its ratio is what counts, and the
    seconds are the ratio times what the checkpoint took in its own row.
    """
    rows = results["rows"]
    timed = {(row["system"], row["forward_length"]): row for row in rows if "forward_seconds" in row}
    found: dict[int, dict[str, tuple[float, _Points]]] = {}
    for row in rows:
        length, name = row.get("length"), row["system"]
        if "ratio" not in row or (name, length) not in timed:
            continue
        own = timed[name, length]
        seconds = timed.get((results["checkpoint"], length), own)["softmax_seconds"]
        cost = 1000 * own["forward_ratio"] * seconds / length
        found.setdefault(length, {}).setdefault(name, (cost, []))[1].append((row["stage"], row["ratio"]["mean"]))
    return dict(sorted(found.items()))


def _tradeoff(
    axes: Axes, panel: Mapping[str, tuple[float, _Points]], colors: Mapping[str, str], markers: Mapping[str, str]
) -> None:
    right = 1.08 * max(cost for cost, _ in panel.values())
    for name, (cost, points) in panel.items():
        color, ratios = colors[name], [ratio for _, ratio in points]
        axes.plot([cost] * len(ratios), ratios, color=color, linewidth=1.6)
        axes.plot([cost, right], [ratios[-1]] * 2, color=color, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        for place, (stage, ratio) in enumerate(points, 1):
            inside = color if place == len(points) else "white"
            axes.plot(cost, ratio, color=color, marker=markers[stage], markerfacecolor=inside, markersize=6.5, zorder=4)
    axes.axhline(1.0, color=GRAY, linewidth=1.1, linestyle=(0, (5, 3)), zorder=0)
    axes.set_xlim(0, right)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_yscale("function", functions=(_spread, _ratio_at))
    ratios = [ratio for _, points in panel.values() for _, ratio in points]
    low, high = _spread(np.array([min(*ratios, 1.0), max(*ratios, 1.0)]))
    margin = 0.05 * (high - low) + 0.1
    low, high = low - margin, high + margin
    axes.set_ylim(*_ratio_at(np.array([low, high])))
    ticks = _apart([(_spread(np.array(tick)), tick) for tick in _RATIOS], (high - low) / 12)
    axes.set_yticks([tick for place, tick in ticks if low <= place <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="both")
    ends = {name: float(_spread(np.array(points[-1][1])) - low) / (high - low) for name, (_, points) in panel.items()}
    _label_right(axes, ends, colors)


def _spread(ratio: np.ndarray) -> np.ndarray:
    """Linear in the nats near a ratio of 1, logarithmic in them far off."""
    return np.arcsinh(np.log(np.maximum(ratio, 1e-9)) / _FINE)


def _ratio_at(place: np.ndarray) -> np.ndarray:
    return np.exp(_FINE * np.sinh(place))


def _apart(ticks: Sequence[tuple[Any, float]], least: float) -> list[tuple[float, float]]:
    """The places and ticks of which none is closer than `least` to an earlier one."""
    kept: list[tuple[float, float]] = []
    for place, tick in ticks:
        if all(abs(place - other) >= least for other, _ in kept):
            kept.append((float(place), tick))
    return kept


def _label_right(axes: Axes, ends: Mapping[str, float], colors: Mapping[str, str]) -> None:
    """Names to the right of where lines end, at these shares of the panel's height, moved so that none meet.

    Shares stay what they are when the layout is settled, with which the panel's size changes.
    """
    names = sorted(ends, key=lambda name: ends[name])
    heights = [ends[name] for name in names]
    for _ in range(200):
        for below in range(len(heights) - 1):
            if (lack := _GAP - (heights[below + 1] - heights[below])) > 0:
                heights[below] -= lack / 2
                heights[below + 1] += lack / 2
    for name, height in zip(names, heights, strict=True):
        line = {"arrowstyle": "-", "color": colors[name], "shrinkA": 1.0, "shrinkB": 0.0, "relpos": (0, 0.5)}
        axes.annotate(
            name, (1.0, ends[name]), xycoords="axes fraction", xytext=(1.06, height), textcoords="axes fraction",
            va="center", fontsize=8.0, annotation_clip=False, arrowprops=line,
        )  # fmt: skip
