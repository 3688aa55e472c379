"""The pictures of a `hf-linear-attn bench` run: speed and memory against length, peers, generation, a file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ticker import NullLocator

from hf_linear_attn.bench.speed.recipe import SDPA, SOFTMAX
from hf_linear_attn.measure.style import (
    COLORS,
    FAINT,
    GRAY,
    INK,
    MARKERS,
    label_ends,
    new_figure,
    plain_numbers,
    save_figure,
    style,
)

__all__ = ["draw_bench"]

_SHOWN = 5  # methods in a picture of curves
_MODES = {"training": "forward and backward", "forward": "forward"}

Row = Mapping[str, Any]
Panel = tuple[str, Callable[[Row], float]]
"""Title, and what is drawn of a row."""


def draw_bench(results: Mapping[str, Any], path: Path) -> list[Path]:
    """Draw what was measured, a PNG each: `<path>`, and beside it `<stem>_peers.png` and so on.

    Args:
        results: what `measure_bench` returns.
        path: of the picture of speed and memory.

    Returns:
        The files. A part that was measured at one length only is in the tables alone.

    Raises:
        ValueError: if nothing was measured.
    """
    rows = [row for row in results["rows"] if "seconds" in row]
    if not rows:
        raise ValueError("Nothing was measured: there is nothing to draw.")
    drawn = []
    with matplotlib.rc_context(style()):
        for draw, name in ((_costs, ""), (_peers, "_peers"), (_generation, "_generation"), *_LONG):
            target = path.with_name(f"{path.stem}{name}.png")
            if draw(results, rows, target):
                drawn.append(target)
    return drawn


def _costs(results: Mapping[str, Any], rows: Sequence[Row], path: Path) -> bool:
    """Time and memory for each token of the first part that has curves, layers before whole models."""
    parts = [(kind, part["name"]) for kind in ("layer", "model") for part in results["recipe"][f"{kind}s"]]
    for (kind, part), mode in ((place, mode) for place in parts for mode in _MODES):
        found = [row for row in rows if (row["kind"], row["part"], row["mode"]) == (kind, part, mode)]
        if _is_curve(found):
            panels: list[Panel] = [
                ("Microseconds for each token", lambda row: 1e6 * row["seconds"] / row["length"]),
                ("Peak memory, kB for each token", lambda row: 1e3 * row["peak_mb"] / row["length"]),
            ]
            title = f"What a token costs: {part}, {_MODES[mode]}"
            _curves(results, found, path, title, "A flat line: cost in proportion to the length.", panels)
            return True
    return False


def _generation(results: Mapping[str, Any], rows: Sequence[Row], path: Path) -> bool:
    """Tokens a second and bytes of the cache of the first part that has curves."""
    for part in results["recipe"]["decode"]:
        found = [row for row in rows if (row["kind"], row["part"]) == ("decode", part["name"])]
        if _is_curve(found):
            panels: list[Panel] = [
                ("Tokens a second", lambda row: row["tokens_per_second"]),
                ("Cache, MB", lambda row: row["cache_bytes"] / 1e6),
            ]
            _curves(results, found, path, "Generation: speed and cache against the tokens read before", "", panels)
            return True
    return False


def _long(results: Mapping[str, Any], rows: Sequence[Row], path: Path, *, keeps: bool) -> bool:
    """Time of a forward, and its memory or what the cache holds after it, of the first such part that has curves."""
    for part in results["recipe"].get("long", ()):
        found = [row for row in rows if (row["kind"], row["part"]) == ("long", part["name"])]
        if _is_curve(found) and keeps == ("cache_bytes" in found[0]):
            memory: Panel = ("Peak memory, MB", lambda row: row["peak_mb"])
            if keeps:
                memory = ("What generation keeps, MB", lambda row: row["cache_bytes"] / 1e6)
            cores = "core_seconds" in found[0]
            time: Panel = ("Seconds", lambda row: row.get("core_seconds", row["seconds"]))
            remark = "Seconds of all cores together." if cores else ""
            _curves(results, found, path, f"One forward of very long inputs: {part['name']}", remark, [time, memory])
            return True
    return False


_LONG = ((partial(_long, keeps=False), "_long"), (partial(_long, keeps=True), "_long_state"))


def _is_curve(rows: Sequence[Row]) -> bool:
    return len({row["length"] for row in rows}) > 1


def _chosen(rows: Sequence[Row]) -> tuple[list[str], str]:
    """SDPA and a few methods, evenly spread from the fastest to the slowest at the longest length; and in words."""
    longest = max(row["length"] for row in rows)
    last = sorted((row for row in rows if row["length"] == longest), key=lambda row: row["seconds"])
    names = [row["contender"] for row in last if row["contender"] not in SOFTMAX]
    if len(names) <= _SHOWN:
        return [SDPA, *names], "SDPA and all methods measured"
    shown = [names[round(place * (len(names) - 1) / (_SHOWN - 1))] for place in range(_SHOWN)]
    about = f"SDPA and {_SHOWN} of {len(names)} methods, from the fastest to the slowest at {longest:,} tokens"
    return [SDPA, *shown], about


def _curves(
    results: Mapping[str, Any], rows: Sequence[Row], path: Path, title: str, remark: str, panels: Sequence[Panel]
) -> None:
    """Panels side by side, a curve for each contender, named at its end."""
    names, about = _chosen(rows)
    meta = results["meta"]
    where = meta["machine"] if meta["device"] == "cpu" else meta["device_name"]
    where = f"{where}, {meta['threads']} threads, {meta['dtype']}, torch {meta['torch']}"
    figure = new_figure(10.0, 4.5, title, f"{about}. {remark}\n{where}")
    lengths = sorted({row["length"] for row in rows})
    for axes, (label, value) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        ends = []
        for number, name in enumerate(names):
            color = INK if name == SDPA else COLORS[number - 1]
            points = sorted((row["length"], value(row)) for row in rows if row["contender"] == name)
            points = [(x, y) for x, y in points if y > 0]  # less than a page of memory is measured as none
            if points:
                look: dict[str, Any] = {"linestyle": (0, (5, 2))} if name == SDPA else {}
                marker = "." if name == SDPA else MARKERS[number - 1]
                axes.plot(*zip(*points, strict=True), color=color, linewidth=2.0, marker=marker, markersize=5.5, **look)
                ends.append((name, *points[-1], color))
        axes.set_title(label, loc="left", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [_tokens(length) for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        axes.set_xlabel("tokens read before" if rows[0]["kind"] == "decode" else "tokens of a sequence")
        axes.grid()
        label_ends(axes, ends)
    save_figure(figure, path)


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def _peers(results: Mapping[str, Any], rows: Sequence[Row], path: Path) -> bool:
    """A line for each peer: how many times as fast ours is, a dot for each length; forward and training apart."""
    found = [row for row in rows if row["kind"] == "peer" and "ours_ratio" in row]
    if not found:
        return False
    names = list(dict.fromkeys(row["contender"] for row in found))
    lengths = sorted({row["length"] for row in found})
    modes = [mode for mode in reversed(_MODES) if any(row["mode"] == mode for row in found)]
    blues = matplotlib.colormaps["Blues"]([0.35 + 0.65 * n / max(1, len(lengths) - 1) for n in range(len(lengths))])
    shade = dict(zip(lengths, blues, strict=True))
    title = "Beside other implementations of the same methods"
    subtitle = "The peer's time over ours: right of 1, ours is faster. In parentheses: our variant."
    figure = new_figure(10.0, 0.27 * len(names) + 1.9, title, subtitle)
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        for line, name in enumerate(names):
            mine = [row for row in found if (row["contender"], row["mode"]) == (name, mode)]
            ratios = [row["ours_ratio"] for row in mine]
            if ratios:
                axes.plot([min(ratios), max(ratios)], [line] * 2, color=FAINT, linewidth=2.5, zorder=1)
            for row in mine:
                axes.plot(row["ours_ratio"], line, "o", color=shade[row["length"]], markersize=6.0, zorder=3)
        axes.axvline(1.0, color=GRAY, linewidth=1.2, zorder=0)
        axes.set_title(_MODES[mode], loc="left", fontsize=11)
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
    low, high = (pick(row["ours_ratio"] for row in found) for pick in (min, max))
    for axes in panels:
        axes.set_xlim(min(0.8 * low, 0.7), max(1.25 * high, 2.2))
    keys = {row["contender"]: row["key"] for row in found}
    panels[0].set_yticks(range(len(names)), [f"{name} ({keys[name]})" for name in names], fontsize=9)
    panels[0].set_ylim(len(names) - 0.4, -0.6)  # the first peer on top
    dots: list[Any] = [panels[0].plot([], [], "o", color=shade[n], label=f"{n:,} tokens")[0] for n in lengths]
    figure.legend(handles=dots, loc="outside lower center", ncols=len(dots), frameon=False)
    save_figure(figure, path)
    return True
