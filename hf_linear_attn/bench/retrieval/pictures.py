"""The picture of a run of `hf-linear-attn retrieval`, as a PNG file on a white ground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from hf_linear_attn.bench.retrieval.tables import at, measured_lengths, references
from hf_linear_attn.measure.style import COLORS, GRAY, INK, new_figure, save_figure, style

__all__ = ["draw_retrieval"]

_DASHED: dict[str, Any] = {"linewidth": 1.2, "linestyle": (0, (4, 3)), "zorder": 1}
_LINES = COLORS[1:]  # of systems that the others are compared with


def draw_retrieval(results: Mapping[str, Any], path: str | Path) -> None:
    """One row for each system: top-1 with its interval at every length, and seconds a document at the first one.

    Args:
        results: what `measure_retrieval` returns, with at least one row of the long part.
        path: of the PNG.
    """
    quality = {n: at(results, "long", n) for n in results["recipe"]["lengths"]}
    measured = measured_lengths(results)
    lengths, first = sorted(measured), quality[measured[0]]
    costs = at(results, "cost", measured[0])
    timed = any("seconds" in row for row in costs.values())
    systems = [
        s for s in results["systems"] if any("top1" in at(results, "long", n).get(s["name"], {}) for n in lengths)
    ]
    systems.sort(key=lambda system: -first.get(system["name"], {}).get("top1", {"mean": -1.0})["mean"])
    names = [system["name"] for system in systems]
    corpus, passages = results["corpus"], results["recipe"]["passages"]
    saved = any(system["saved"] for system in systems)
    title = f"Long documents as vectors{'' if saved else ', nothing trained'}: a passage finds the rest of its document"
    subtitle = (
        f"{corpus['queries']:,} passages of {passages['tokens']} tokens, cut out of {corpus['documents']} documents; "
        f"share of passages whose document comes first, with 95% intervals over {corpus['groups']} groups.\n"
        f"Gray: {corpus['limit']:,} tokens at a time, as the checkpoint. Blue: reads all of them at a time; hollow as "
        "published, filled calibrated on other documents, or nothing to calibrate."
        + "\nSquares: saved models, measured as they are; all else is untrained."
        * saved
    )
    with matplotlib.rc_context(style()):
        figure = new_figure(max(11.5, 3.4 + 2.7 * (len(lengths) + timed)), 0.27 * len(names) + 2.3, title, subtitle)
        panels: Sequence[Axes] = figure.subplots(1, len(lengths) + timed, sharey=True, squeeze=False)[0]
        for axes, length in zip(panels, lengths, strict=False):
            _quality(axes, results, systems, length)
            if axes is not panels[0]:
                axes.sharex(panels[0])
        if timed:
            _seconds(panels[-1], systems, costs, measured[0])
        for axes in panels:
            axes.grid(axis="x")
            axes.spines["left"].set_visible(False)
        panels[0].set_yticks(range(len(names)), names, fontsize=9)
        panels[0].set_ylim(len(names) - 0.4, -0.6)
        handles = [
            panels[0].plot([], [], color=color, label=name, **_DASHED)[0]
            for name, color in zip(references(results), _LINES, strict=False)
        ]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        save_figure(figure, path)


def _quality(axes: Axes, results: Mapping[str, Any], systems: Sequence[Mapping[str, Any]], length: int) -> None:
    rows = at(results, "long", length)
    for name, color in zip(references(results), _LINES, strict=False):
        reference = rows.get(name, {})
        if "top1" in reference:
            axes.axvline(reference["top1"]["mean"], color=color, **_DASHED)
    for line, system in enumerate(systems):
        top1 = rows.get(system["name"], {}).get("top1")
        if top1 is None:
            axes.text(0.02, line, "-", color=GRAY, va="center", transform=axes.get_yaxis_transform())
            continue
        color = _color(system)
        axes.plot([top1["low"], top1["high"]], [line] * 2, color=color, linewidth=2.0, solid_capstyle="round")
        axes.plot(top1["mean"], line, markersize=6.5, zorder=3, **_marker(system))
    axes.set_title(f"read to {length:,} tokens", loc="left", fontsize=10.5)
    axes.set_xlabel("top-1")


def _seconds(axes: Axes, systems: Sequence[Mapping[str, Any]], costs: Mapping[str, Any], length: int) -> None:
    """Seconds a document, as bars from 0 with their numbers."""
    highest = max(row["seconds"] for row in costs.values() if "seconds" in row)
    for line, system in enumerate(systems):
        seconds = costs.get(system["name"], {}).get("seconds")
        if seconds is not None:
            axes.barh(line, seconds, height=0.55, color=_color(system), alpha=0.55)
            axes.text(seconds + 0.02 * highest, line, f"{seconds:.2f}", va="center", fontsize=8.5, color=INK)
    axes.set_xlim(0, 1.22 * highest)
    axes.set_title(f"s / document, {length:,} tokens", loc="left", fontsize=10.5)
    axes.set_xlabel("seconds")


def _color(system: Mapping[str, Any]) -> str:
    return COLORS[0] if system["reads"] == "whole" else GRAY


def _marker(system: Mapping[str, Any]) -> dict[str, Any]:
    shape = {"marker": "s" if system["saved"] else "o", "linestyle": "none", "color": _color(system)}
    return shape | {"mfc": "white" if system["start"] == "published" else _color(system)}
