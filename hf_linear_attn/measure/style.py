"""How every picture of the package looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

__all__ = [
    "COLORS",
    "FAINT",
    "GRAY",
    "INK",
    "MARKERS",
    "label_ends",
    "new_figure",
    "plain_numbers",
    "save_figure",
    "style",
]

# Okabe and Ito's palette, told apart with any common color blindness, without its black and yellow (which
# vanish on a dark or a light page). Softmax rows are gray.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*")
INK, FAINT = "#1f2328", "#d0d7de"
GRAY = "#6e7781"


def style(ink: str = INK, faint: str = FAINT, ground: str = "white") -> Any:
    """What every picture of the package shares, for `matplotlib.rc_context`."""
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": faint,
        "xtick.color": ink,
        "ytick.color": ink,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "grid.color": faint,
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": ground,
        "text.parse_math": False,  # names are the user's
        "svg.fonttype": "path",
        "svg.hashsalt": "hf_linear_attn",
    }


def new_figure(width: float, height: float, title: str, subtitle: str = "") -> Figure:
    """A figure of so many inches, with room for what is written above its panels."""
    figure = Figure(figsize=(width, height))
    top = 0.5 + 0.19 * len(subtitle.splitlines()) + 0.06 * bool(subtitle)
    figure.set_layout_engine(
        "constrained", w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.03, rect=(0, 0, 1, 1 - top / height)
    )
    figure.text(0.12 / width, 1 - 0.16 / height, title, fontsize=14, fontweight="bold", va="top")
    figure.text(0.12 / width, 1 - 0.47 / height, subtitle, fontsize=9.5, color=GRAY, va="top")
    return figure


def label_ends(axes: Axes, ends: Sequence[tuple[str, float, float, str]], size: float = 9.0) -> None:
    """Name each curve where it ends, `(name, x, y, color)`; names that would meet are pushed apart.

    To be called when everything else is drawn: what is above what depends on the scales.
    """
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    points = 72 / axes.figure.dpi
    for place in sorted({x for _, x, _, _ in ends}):
        here = [(name, y, color) for name, x, y, color in ends if x == place]
        column = sorted((axes.transData.transform((place, y))[1] * points, name, y, color) for name, y, color in here)
        heights = [height for height, *_ in column]
        for _ in range(200):
            for below in range(len(heights) - 1):
                lack = 1.25 * size - (heights[below + 1] - heights[below])
                if lack > 0:
                    heights[below] -= lack / 2
                    heights[below + 1] += lack / 2
        for (height, name, y, color), moved in zip(column, heights, strict=True):
            text = axes.annotate(
                name, (place, y), xytext=(16, moved - height), textcoords="offset points", va="center", fontsize=size,
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 1.0, "shrinkA": 1.0, "shrinkB": 4.0},
            )  # fmt: skip
            ground = matplotlib.rcParams["savefig.facecolor"]
            text.set_path_effects([withStroke(linewidth=3.0, foreground=ground)])  # above another's line


def plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10, ... on a logarithmic axis, or more of them on a short one."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high > 20 * low else (1, 2, 3, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,g}"))
    axis.set_minor_formatter(NullFormatter())


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG on a white ground."""
    FigureCanvasAgg(figure).print_figure(str(path), dpi=150, format="png")
