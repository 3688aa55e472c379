"""Pictures of a conversion report and of an analysis, as PNG files on a white ground."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from hf_linear_attn.analysis.spectrum import LOW_RANK_OPTIONS
from hf_linear_attn.measure.style import COLORS, GRAY, INK, MARKERS, new_figure, save_figure, style
from hf_linear_attn.report import OutputErrors

__all__ = ["draw_heads", "draw_patterns", "draw_sizes", "draw_spectrum"]

# From the page's white through one hue to ink: dark is far from softmax in every picture of this module.
_DEPTH = LinearSegmentedColormap.from_list("depth", ["#f7fafc", "#b9d7ea", "#5fa3cf", "#1f6aa5", "#0b2f52"])
_WARM = LinearSegmentedColormap.from_list("warm", ["#fdf6ee", "#f6c795", "#e58a3c", "#a8500f"])


def draw_heads(
    panels: Mapping[str, Mapping[int, OutputErrors]], path: str | Path, *, title: str, subtitle: str = ""
) -> None:
    """Error of every head against softmax: one heatmap of layers by heads for each panel.

    Args:
        panels: name -> layer -> its errors against softmax.
        path: of the PNG.
        title: of the picture.
        subtitle: what was measured on what.
    """
    layers = sorted({layer for rows in panels.values() for layer in rows})
    heads = max(len(row.head_errors) for rows in panels.values() for row in rows.values())
    highest = max(max(row.head_errors) for rows in panels.values() for row in rows.values())
    norm = Normalize(0.0, max(1.0, min(highest, 2.0)))
    with matplotlib.rc_context(style()):
        width = len(panels) * (0.52 * (heads + 3) + 0.6) + 0.8
        figure = new_figure(max(width, 6.0), 0.36 * len(layers) + 2.1, title, subtitle)
        axes_row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (name, rows) in zip(axes_row, panels.items(), strict=True):
            table = np.full((len(layers), heads), np.nan)
            for line, layer in enumerate(layers):
                table[line, : len(rows[layer].head_errors)] = rows[layer].head_errors
            axes.imshow(table, cmap=_DEPTH, norm=norm, aspect="auto")
            for (line, head), value in np.ndenumerate(table):
                if not math.isnan(value):
                    _cell(axes, head, line, f"{value:.2f}", bool(norm(value) > 0.55))
            for line, layer in enumerate(layers):  # the layer as a whole, beside its heads
                row = rows[layer]
                axes.text(heads - 0.2, line, f"{row.error:.2f} / {row.cosine:.2f}", va="center", fontsize=8.5)
            axes.text(heads - 0.2, -0.75, "layer:\nerror / cosine", fontsize=8, color=GRAY, va="bottom")
            mean = sum(rows[layer].error for layer in layers) / len(layers)
            axes.set_title(f"{name}: mean error {mean:.3f}", loc="left", fontsize=11)
            axes.set_xticks(range(heads), [str(head) for head in range(heads)])
            axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            axes.set_xlim(-0.5, heads + 1.9)
            axes.set_xlabel("head", x=heads / 2 / (heads + 2.4))
            _frameless(axes)
        axes_row[0].set_ylabel("layer")
        bar = figure.colorbar(ScalarMappable(norm, _DEPTH), ax=list(axes_row), fraction=0.025, pad=0.01, extend="max")
        bar.set_label("relative output error of a head")
        bar.outline.set_visible(False)  # type: ignore[operator]
        save_figure(figure, path)


def _cell(axes: Axes, x: float, y: float, text: str, dark: bool) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)


def _frameless(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_spectrum(curves: Mapping[int, Any], path: str | Path, *, title: str, subtitle: str = "") -> None:
    """Linformer's figure: cumulative singular values, as curves, and as a heatmap of layers by heads at T / 4.

    Args:
        curves: layer -> `[H, T]`, see `attention_spectrum`.
        path: of the PNG.
        title: of the picture.
        subtitle: what was measured on what.
    """
    arrays = {layer: np.asarray(curve) for layer, curve in sorted(curves.items())}
    heads, length = next(iter(arrays.values())).shape
    index = max(1, length // 4)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, len(arrays)))
    with matplotlib.rc_context(style()):
        figure = new_figure(5.6 + 0.52 * heads + 1.6, max(4.6, 0.36 * len(arrays) + 2.4), title, subtitle)
        left, right = figure.subplots(1, 2, width_ratios=[5.0, 0.52 * heads + 1.2])
        x = np.arange(1, length + 1)
        for (layer, curve), shade in zip(arrays.items(), shades, strict=True):
            for head in curve:
                left.plot(x, head, color=shade, linewidth=0.5, alpha=0.25)
            few = len(arrays) <= 12 or layer in (min(arrays), max(arrays))
            left.plot(x, curve.mean(0), color=shade, linewidth=2.0, label=f"layer {layer}" if few else None)
        left.axvline(index, color=GRAY, linewidth=1.0, linestyle=(0, (4, 3)))
        left.annotate(f"{index} = n / 4", (index, 0.03), xytext=(5, 0), textcoords="offset points", color=GRAY)
        left.plot([0, length], [0, 1], color=GRAY, linewidth=1.0, linestyle=":", label="full rank, all equal")
        left.set_xlim(0, length)
        left.set_ylim(0, 1.01)
        left.yaxis.set_major_formatter(PercentFormatter(1.0))
        left.set_title("Bold: mean over heads; thin: each head", loc="left", fontsize=10.5)
        left.set_xlabel(f"largest singular values kept, of {length}")
        left.set_ylabel("share of the sum of singular values")
        left.grid()
        left.legend(frameon=False, loc="lower right", fontsize=8.5)

        table = np.stack([curve[:, index - 1] for curve in arrays.values()])
        norm = Normalize(min(0.5, float(table.min())), 1.0)
        right.imshow(table, cmap=_DEPTH, norm=norm, aspect="auto")
        for (line, head), value in np.ndenumerate(table):
            _cell(right, head, line, f"{100 * value:.0f}", bool(norm(value) > 0.55))
        right.set_xticks(range(heads))
        right.set_yticks(range(len(arrays)), [str(layer) for layer in arrays])
        right.set_xlabel("head")
        right.set_ylabel("layer")
        right.set_title(f"Share (%) of the largest {index} = n / 4", loc="left", fontsize=10.5)
        _frameless(right)
        save_figure(figure, path)


def draw_sizes(
    methods: Sequence[Mapping[str, Any]], path: str | Path, *, bound: float, title: str, subtitle: str = ""
) -> None:
    """Error against size at several lengths, twice for each method: over the size, and over size / length.

    Where the curves of all lengths coincide, that quantity decides the error.

    Args:
        methods: `{"method", "option", "rows": [{"length", "size", "error"}]}`, see `error_against_size`.
        path: of the PNG.
        bound: d ln d, marked in the panels of the methods it is about.
        title: of the picture.
        subtitle: what was measured on what.
    """
    lengths = sorted({row["length"] for method in methods for row in method["rows"]})
    highest = max(row["error"] for method in methods for row in method["rows"])
    shades = dict(zip(lengths, matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, len(lengths))), strict=True))
    columns = 1 if len(methods) == 1 else 2
    lines = math.ceil(len(methods) / columns)
    with matplotlib.rc_context(style()):
        figure = new_figure(7.4 * columns, 2.5 * lines + 1.6, title, subtitle)
        grid = figure.subplots(lines, 2 * columns, squeeze=False)
        for axes in grid.flat[2 * len(methods) :]:
            axes.set_visible(False)
        for number, method in enumerate(methods):
            line, column = divmod(number, columns)
            over_size, over_share = grid[line, 2 * column : 2 * column + 2]
            option = method["option"]
            for length, marker in zip(lengths, MARKERS, strict=False):
                points = sorted((r["size"], r["error"]) for r in method["rows"] if r["length"] == length)
                look: dict[str, Any] = {"color": shades[length], "marker": marker, "markersize": 4.5, "linewidth": 1.6}
                sizes, errors = [p[0] for p in points], [p[1] for p in points]
                over_size.plot(sizes, errors, label=f"n = {length:,}", **look)
                over_share.plot([size / length for size in sizes], errors, **look)
            over_size.set_title(f"{method['method']}: error over {option}", loc="left", fontsize=10.5)
            over_share.set_title(f"over {option} / n", loc="left", fontsize=10.5)
            for axes in (over_size, over_share):
                axes.set_xscale("log", base=2)
                axes.xaxis.set_minor_locator(NullLocator())
                axes.set_ylim(0, min(1.6, max(1.0, 1.05 * highest)))
                axes.grid()
            over_size.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            over_share.xaxis.set_major_formatter(lambda value, _: f"1/{1 / value:g}" if value < 1 else f"{value:g}")
            over_share.set_yticklabels([])
            if option in LOW_RANK_OPTIONS:
                over_size.axvline(bound, color=COLORS[1], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
                over_size.annotate(
                    f"d ln d = {bound:.0f}", (bound, 1.0), xycoords=("data", "axes fraction"), xytext=(-4, -4),
                    textcoords="offset points", ha="right", va="top", fontsize=8.5, color=COLORS[1],
                )  # fmt: skip
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        save_figure(figure, path)


def draw_patterns(matrices: Mapping[str, Any], path: str | Path, *, title: str, subtitle: str = "") -> None:
    """Attention matrices of one head as pictures, softmax beside the methods.

    Args:
        matrices: method -> `[Tq, Tk]`.
        path: of the PNG.
        title: of the picture.
        subtitle: what was measured on what.
    """
    columns = min(len(matrices), 6)
    lines = math.ceil(len(matrices) / columns)
    norm = PowerNorm(0.5, 0.0, 0.25)  # weights spread over orders of magnitude
    with matplotlib.rc_context(style()):
        figure = new_figure(max(2.15 * columns, 7.5), 2.3 * lines + 1.8, title, subtitle)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(matrices) :]:
            axes.set_visible(False)
        for axes, (name, matrix) in zip(grid.flat, matrices.items(), strict=False):
            _pattern(axes, np.asarray(matrix), norm)
            axes.set_title(name, loc="left", fontsize=9.5)
        bar = figure.colorbar(
            ScalarMappable(norm, _DEPTH),
            ax=grid,
            orientation="horizontal",
            fraction=0.06 / lines,
            aspect=60,
            pad=0.01,
            extend="max",
        )
        bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25], labels=["0", ".01", ".05", ".1", ".25"])
        bar.set_label("weight of a key (column) for a query (row); negative weights are orange")
        bar.outline.set_visible(False)  # type: ignore[operator]
        save_figure(figure, path)


def _pattern(axes: Axes, matrix: Any, norm: PowerNorm) -> None:
    picture = _DEPTH(norm(np.clip(matrix, 0.0, norm.vmax)))
    below = matrix < -1e-6
    picture[below] = _WARM(norm(np.clip(-matrix[below], 0.0, norm.vmax)))
    axes.imshow(picture, interpolation="nearest")
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=7)
