"""The picture of a run of `hf-linear-attn methods`, as a PNG file on a white ground."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from hf_linear_attn.bench.starts.recipe import UNIFORM
from hf_linear_attn.bench.starts.tables import summarize_starts, why_missing
from hf_linear_attn.measure.style import COLORS, FAINT, GRAY, new_figure, save_figure, style

__all__ = ["draw_starts"]

_STAGES: dict[str, tuple[dict[str, Any], str]] = {  # stage -> how it is drawn, what it is called
    "published": ({"marker": "o", "mfc": "white", "color": GRAY}, "as published"),
    "calibrated": ({"marker": "o", "color": COLORS[0]}, "calibrated"),
    "regressed": ({"marker": "D", "color": COLORS[1], "markersize": 5.0}, "fitted layer by layer"),
}
_YARDSTICK: dict[str, Any] = {"color": GRAY, "linewidth": 1.1, "linestyle": (0, (4, 3))}
_RIGHT = 1.35  # errors beyond it are written at the edge


def draw_starts(results: Mapping[str, Any], path: str | Path) -> None:
    """Errors of the starts: one row for each method with its leading options, one panel for each model and length.

    Args:
        results: what `measure_methods` returns.
        path: of the PNG.
    """
    rows = results["rows"]
    summary = summarize_starts(rows)
    leading = [entry["name"] for entry in results["methods"] if entry["leading"] and entry["name"] != UNIFORM]
    places = list(dict.fromkeys((model, length) for model, length, _ in summary))
    order = sorted(leading, key=lambda name: [_best(summary.get((*place, name))) for place in places])
    seeds = ", ".join(map(str, results["recipe"]["seeds"]))
    title = "How far each method starts from softmax attention"
    subtitle = (
        f"Relative error of the output on test documents, mean over seeds {seeds}; left is better.\n"
        "n²: holds a matrix of length by length, not run here; refused: the method serves the other side only."
    )
    with matplotlib.rc_context(style()):
        figure = new_figure(10.0, 0.25 * len(order) + 2.0, title, subtitle)
        panels = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
        for axes, (model, length) in zip(panels, places, strict=True):
            for line, name in enumerate(order):
                stages = summary.get((model, length, name), {})
                if not stages:
                    axes.text(0.02, line, why_missing(rows, model, length, name), va="center", fontsize=8, color=GRAY)
                _row(axes, line, stages)
            uniform = summary.get((model, length, UNIFORM))
            if uniform:
                axes.axvline(uniform["published"]["error"], zorder=0, **_YARDSTICK)
            axes.set_title(f"{model}, n = {length:,}", loc="left", fontsize=10.5)
            axes.set_xlim(-0.03, _RIGHT)
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)
        panels[0].set_yticks(range(len(order)), order, fontsize=8.5)
        panels[0].set_ylim(len(order) - 0.4, -0.6)
        used = [stage for stage in _STAGES if any(stage in stages for stages in summary.values())]
        handles: list[Any] = [
            panels[0].plot([], [], linestyle="none", label=_STAGES[stage][1], **_STAGES[stage][0])[0] for stage in used
        ]
        handles.append(panels[0].plot([], [], label=f"{UNIFORM}, the yardstick", **_YARDSTICK)[0])
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        save_figure(figure, path)


def _row(axes: Axes, line: int, stages: Mapping[str, Any]) -> None:
    """The errors of one method; what lies beyond the edge is written there."""
    shown = [min(entry["error"], _RIGHT) for entry in stages.values()]
    if shown:
        axes.plot([min(shown), max(shown)], [line] * 2, color=FAINT, linewidth=2.5, zorder=1)
    for stage, entry in stages.items():
        look = {"linestyle": "none", "markersize": 6.5, "zorder": 3, **_STAGES[stage][0]}
        axes.plot(min(entry["error"], _RIGHT), line, clip_on=False, **look)
        if entry["error"] > _RIGHT:
            axes.annotate(
                f"{entry['error']:.1f}", (_RIGHT, line), xytext=(-6, 0), textcoords="offset points", ha="right",
                va="center", fontsize=8, color=GRAY,
            )  # fmt: skip


def _best(stages: Mapping[str, Any] | None) -> float:
    """The least error of a method's starts; one that has none comes last."""
    return min((stage["error"] for stage in (stages or {}).values()), default=math.inf)
