"""How every picture of the package looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["COLORS", "FAINT", "GREY", "INK", "MARKERS", "new_figure", "save_figure", "style"]

# Okabe and Ito's palette, told apart with any common colour blindness, without its black and yellow (which
# vanish on a dark or a light page). Softmax rows are grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*")
INK, FAINT = "#1f2328", "#d0d7de"
GREY = "#6e7781"


def style(ink: str = INK, faint: str = FAINT) -> Any:
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
        "ytick.minor.size": 0,
        "grid.color": faint,
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "text.parse_math": False,  # names are the user's
        "svg.fonttype": "path",
        "svg.hashsalt": "hf_linear_attn",
    }


def new_figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine(
        "constrained", w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.03, rect=(0, 0, 1, 1 - 0.75 / height)
    )
    figure.text(0.12 / width, 1 - 0.16 / height, title, fontsize=14, fontweight="bold", va="top")
    figure.text(0.12 / width, 1 - 0.47 / height, subtitle, fontsize=9.5, color=GREY, va="top")
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure).print_figure(str(path), dpi=150, facecolor="white", format="png")
