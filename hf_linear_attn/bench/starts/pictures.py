"""The picture of a run of `hf-linear-attn methods`, as a PNG file on a white ground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from hf_linear_attn.bench.starts.recipe import UNIFORM
from hf_linear_attn.bench.starts.tables import summarise_starts, why_missing
from hf_linear_attn.measure.style import COLORS, FAINT, GREY, new_figure, save_figure, style

__all__ = ["draw_starts"]

_STAGES: dict[str, tuple[dict[str, Any], str]] = {  # stage -> how it is drawn, what it is called
    "published": ({"marker": "o", "mfc": "white", "color": GREY}, "as published"),
    "calibrated": ({"marker": "o", "color": COLORS[0]}, "calibrated"),
    "regressed": ({"marker": "D", "color": COLORS[1], "markersize": 4.5}, "fitted layer by layer"),
}


def draw_starts(results: Mapping[str, Any], path: str | Path) -> None:
    """Errors of every method's starts: one panel for each model and length, the best start on top.

    Args:
        results: what `measure_methods` returns.
        path: of the PNG.
    """
    summary = summarise_starts(results["rows"])
    places = list(dict.fromkeys((model, length) for model, length, _ in summary))
    names = dict.fromkeys(method for _, _, method in summary if method != UNIFORM)
    best = {
        name: min(s["error"] for (_, _, m), st in summary.items() if m == name for s in st.values()) for name in names
    }
    order = sorted(names, key=lambda name: _first(summary, places, name, best))
    right = 1.35  # errors beyond it are written at the edge
    with matplotlib.rc_context(style()):
        seeds = ", ".join(map(str, results["recipe"]["seeds"]))
        figure = new_figure(
            3.0 + 3.1 * len(places),
            0.25 * len(order) + 2.3,
            "How far each method starts from softmax attention",
            f"relative output error on test documents, mean over seeds {seeds}; left is better",
        )
        panels = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
        for axes, (model, length) in zip(panels, places, strict=True):
            for line, name in enumerate(order):
                stages = summary.get((model, length, name), {})
                errors = [entry["error"] for entry in stages.values()]
                if not stages:
                    reason = why_missing(results["rows"], model, length, name)
                    axes.text(0.02, line, reason, va="center", fontsize=7.5, color=GREY)
                    continue
                axes.plot(
                    [min(min(errors), right), min(max(errors), right)], [line] * 2, color=FAINT, linewidth=2.5, zorder=1
                )
                for stage, entry in stages.items():
                    look = {"linestyle": "none", "markersize": 6.0, "zorder": 3, **_STAGES[stage][0]}
                    axes.plot(min(entry["error"], right), line, clip_on=False, **look)
                    if entry["error"] > right:
                        axes.annotate(
                            f"{entry['error']:.1f}", (right, line), xytext=(-6, 0), textcoords="offset points",
                            ha="right", va="center", fontsize=7.5, color=GREY,
                        )  # fmt: skip
            uniform = summary.get((model, length, UNIFORM))
            if uniform:
                axes.axvline(uniform["published"]["error"], color=GREY, linewidth=1.1, linestyle=(0, (4, 3)), zorder=0)
            axes.set_title(f"{model}, n = {length:,}", loc="left", fontsize=10.5)
            axes.set_xlim(-0.03, right)
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)
        panels[0].set_yticks(range(len(order)), order, fontsize=8.5)
        panels[0].set_ylim(len(order) - 0.4, -0.6)
        used = [stage for stage in _STAGES if any(stage in stages for stages in summary.values())]
        handles: list[Any] = [
            panels[0].plot([], [], linestyle="none", label=_STAGES[stage][1], **_STAGES[stage][0])[0] for stage in used
        ]
        handles.append(panels[0].plot([], [], color=GREY, linewidth=1.1, linestyle=(0, (4, 3)), label=UNIFORM)[0])
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        save_figure(figure, path)


def _first(
    summary: Mapping[Any, Any], places: Sequence[tuple[str, int]], name: str, best: Mapping[str, float]
) -> float:
    """What a method is ordered by: its best start at the first place that it serves."""
    for model, length in places:
        if stages := summary.get((model, length, name)):
            return min(stage["error"] for stage in stages.values())
    return best[name]
