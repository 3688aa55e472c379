"""The picture of a `hf-linear-attn bench` run: speed and memory against length, peers, generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from hf_linear_attn.bench.speed.recipe import SOFTMAX
from hf_linear_attn.measure.style import COLORS, FAINT, MARKERS, style

__all__ = ["draw_bench"]

_GREY = "#6e7781"
_LEGEND_COLUMNS = 6
_LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
_MODES = {"forward": "forward", "training": "forward and backward"}

Row = Mapping[str, Any]
Panel = tuple[str, str, Callable[[Row], float], list[Row]]
"""Title, label of the y axis, what is drawn of a row, rows."""


def draw_bench(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw a PNG: one line of panels for each part of the recipe that was measured at more than one length.

    Args:
        results: what `measure_bench` returns.
        path: of the picture.

    Raises:
        ValueError: if nothing was measured.
    """
    rows = [row for row in results["rows"] if "seconds" in row]
    if not rows:
        raise ValueError("Nothing was measured: there is nothing to draw.")
    lines = [line for kind in (_model_panels, _layer_panels) for line in kind(results, rows)]
    peers = [found for part in results["recipe"]["peers"] if (found := _peer_rows(rows, part["name"]))]
    decode = _decode_panels(results, rows)
    looks = _looks([row for panels in [*lines, *decode] for _, _, _, drawn in panels for row in drawn])
    # A line of the picture: its height in inches, and what draws it into a sub-figure of its own.
    parts: list[tuple[float, Callable[[Any], None]]] = [(0.75, partial(_title, results["meta"]))]
    parts += [(3.3, partial(_line_of_panels, panels, looks)) for panels in lines]
    parts += [(0.3 * len(found) + 1.3, partial(_draw_peers, found)) for found in peers]
    parts += [(3.3, partial(_line_of_panels, panels, looks)) for panels in decode]
    parts.append((0.21 * -(-len(looks) // _LEGEND_COLUMNS) + 0.3, partial(_legend, looks)))
    with matplotlib.rc_context(style()):
        heights = [height for height, _ in parts]
        figure = Figure(figsize=(13.5, sum(heights)))
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.0)
        places: Any = figure.subfigures(len(parts), 1, height_ratios=heights)
        for (_, draw), place in zip(parts, places, strict=True):
            draw(place)
        FigureCanvasAgg(figure).print_figure(str(path), dpi=130, facecolor="white", format="png")


def _title(meta: Mapping[str, Any], place: Any) -> None:
    where = meta["machine"] if meta["device"] == "cpu" else meta["device_name"]
    about = f"{where}, {meta['threads']} threads, {meta['dtype']}, torch {meta['torch']}; medians, all taking turns"
    place.text(0.01, 0.86, meta["title"], fontsize=14, fontweight="bold", va="top")
    place.text(0.01, 0.38, about, fontsize=9.5, color=_GREY, va="top")


def _legend(looks: Mapping[str, Any], place: Any) -> None:
    handles = [Line2D([], [], label=name, **look) for name, look in looks.items()]
    place.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=_LEGEND_COLUMNS, frameon=False,
        fontsize=8.5, handlelength=3.2, columnspacing=1.6, labelspacing=0.3,
    )  # fmt: skip


def _looks(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Contender -> how its lines look, softmax first and in grey."""
    names = dict.fromkeys(row["contender"] for row in rows)
    greys = dict(zip(SOFTMAX, ("#2f363d", "#8A8A8A", "#b08d57"), strict=True))
    looks: dict[str, dict[str, Any]] = {
        name: {"color": grey, "linewidth": 2.4, "linestyle": (0, (6, 2)), "marker": ""}
        for name, grey in greys.items()
        if name in names
    }
    for number, name in enumerate(sorted(name for name in names if name not in greys)):
        looks[name] = {
            "color": COLORS[number % len(COLORS)],
            "linewidth": 1.3,
            "linestyle": _LINES[number // len(COLORS) % len(_LINES)],
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 4.2,
        }
    return looks


def _part_rows(rows: Sequence[Row], kind: str, part: str, mode: str) -> list[Row]:
    return [row for row in rows if (row["kind"], row["part"], row["mode"]) == (kind, part, mode)]


def _is_curve(rows: Sequence[Row]) -> bool:
    return len({row["length"] for row in rows}) > 1


def _model_panels(results: Mapping[str, Any], rows: Sequence[Row]) -> list[list[Panel]]:
    """Speed over SDPA's, forward and training."""
    lines = []
    for part in results["recipe"]["models"]:
        panels: list[Panel] = []
        for mode, words in _MODES.items():
            found = [row for row in _part_rows(rows, "model", part["name"], mode) if "ratio" in row]
            if _is_curve(found):
                panels.append((f"{part['name']}, {words}", "speed over SDPA's", _ratio, found))
        if panels:
            lines.append(panels)
    return lines


def _layer_panels(results: Mapping[str, Any], rows: Sequence[Row]) -> list[list[Panel]]:
    """Time and memory for each token: a flat line is cost in proportion to the length."""
    lines = []
    for part in results["recipe"]["layers"]:
        panels: list[Panel] = []
        memory: list[Row] = []
        for mode, words in _MODES.items():
            found = _part_rows(rows, "layer", part["name"], mode)
            if _is_curve(found):
                memory = found
                panels.append((f"{part['name']}, {words}", "microseconds per token", _time_per_token, found))
        if memory:
            words = _MODES[memory[0]["mode"]]
            panels.append((f"{part['name']}, {words}", "peak memory, kB per token", _memory_per_token, memory))
            lines.append(panels)
    return lines


def _decode_panels(results: Mapping[str, Any], rows: Sequence[Row]) -> list[list[Panel]]:
    lines = []
    for part in results["recipe"]["decode"]:
        found = _part_rows(rows, "decode", part["name"], "decode")
        if _is_curve(found):
            speed: Panel = (f"{part['name']}: speed", "tokens per second", _tokens_per_second, found)
            lines.append([speed, (f"{part['name']}: cache", "MB", _cache_megabytes, found)])
    return lines


def _ratio(row: Row) -> float:
    return row["ratio"]


def _time_per_token(row: Row) -> float:
    return 1e6 * row["seconds"] / row["length"]


def _memory_per_token(row: Row) -> float:
    return 1e3 * row["peak_mb"] / row["length"]


def _tokens_per_second(row: Row) -> float:
    return row["tokens_per_second"]


def _cache_megabytes(row: Row) -> float:
    return row["cache_bytes"] / 1e6


def _line_of_panels(panels: Sequence[Panel], looks: Mapping[str, Any], place: Any) -> None:
    all_axes = place.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, label, value, rows) in zip(all_axes, panels, strict=True):
        lengths = sorted({row["length"] for row in rows})
        for name, look in looks.items():
            points = sorted((row["length"], value(row)) for row in rows if row["contender"] == name)
            points = [(x, y) for x, y in points if y > 0]  # less than a page of memory is measured as none
            if points:
                axes.plot([x for x, _ in points], [y for _, y in points], **look)
        if value is _ratio:
            axes.axhline(1.0, color=_GREY, linewidth=1.1, zorder=1)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [_tokens(length) for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("tokens read before" if rows[0]["kind"] == "decode" else "tokens of a sequence")
        axes.set_ylabel(label)
        axes.grid()


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def _peer_rows(rows: Sequence[Row], part: str) -> dict[str, dict[str, list[Row]]]:
    """Peer -> mode -> rows."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["kind"] == "peer" and row["part"] == part and "ours_ratio" in row:
            found.setdefault(row["contender"], {}).setdefault(row["mode"], []).append(row)
    return found


def _draw_peers(found: Mapping[str, Mapping[str, Sequence[Row]]], place: Any) -> None:
    """Two lines of dots for each peer, forward and training: how many times as fast ours is, a dot for each length."""
    axes: Axes = place.subplots()
    lengths = sorted({row["length"] for modes in found.values() for rows in modes.values() for row in rows})
    shades = matplotlib.colormaps["viridis"]([0.9 * index / max(1, len(lengths) - 1) for index in range(len(lengths))])
    shade = dict(zip(lengths, shades, strict=True))
    for line, modes in enumerate(found.values()):
        for mode, rows in modes.items():
            height = line + (-0.17 if mode == "forward" else 0.17)
            ratios = [row["ours_ratio"] for row in rows]
            axes.plot([min(ratios), max(ratios)], [height] * 2, color=FAINT, linewidth=2.2, zorder=1)
            for row in rows:
                color = shade[row["length"]]
                face = color if mode == "forward" else "white"
                axes.plot(row["ours_ratio"], height, "o", color=color, mfc=face, markersize=5.5, zorder=3)
    axes.axvline(1.0, color=_GREY, linewidth=1.2, zorder=0)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.45), max(high, 2.2))
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    labels = [f"{name} ({next(iter(modes.values()))[0]['key']})" for name, modes in found.items()]
    axes.set_yticks(range(len(found)), labels, fontsize=8.5)
    axes.set_ylim(len(found) - 0.4, -0.6)  # the first peer on top
    axes.set_xlabel("the peer's time over ours: right of 1, ours is faster")
    axes.set_title("Beside other implementations", loc="left", fontsize=10)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    dots: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 5.5}
    handles = [Line2D([], [], color=color, label=f"n = {length:,}", **dots) for length, color in shade.items()]
    handles.append(Line2D([], [], color=_GREY, label=_MODES["forward"], **dots))
    handles.append(Line2D([], [], color=_GREY, mfc="white", label=_MODES["training"], **dots))
    axes.legend(handles=handles, frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
