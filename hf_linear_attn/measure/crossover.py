"""What the rows of a `hf-linear-attn bench` run say: exponents, crossovers, flatness. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Place", "crossover", "exponent", "fitted_lengths", "over_floor", "series", "spell_crossover", "summarize"]

Rows = Sequence[Mapping[str, Any]]
Place = tuple[str, str, str, str]
"""(kind, part, mode, contender)."""

# Exponents are fitted over the longest three octaves: shorter inputs measure fixed costs.
_OCTAVES = 3


def series(rows: Rows) -> dict[Place, list[Mapping[str, Any]]]:
    """Rows of models and layers by place, those that were timed, lengths ascending."""
    found: dict[Place, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] in ("model", "layer"):
            points = found.setdefault((row["kind"], row["part"], row["mode"], row["contender"]), [])
            if "seconds" in row:
                points.append(row)
    return {place: sorted(points, key=lambda row: row["length"]) for place, points in found.items()}


def fitted_lengths(lengths: Sequence[int]) -> list[int]:
    """The lengths of the longest three octaves; none if they are fewer than two."""
    kept = [length for length in lengths if length * 2**_OCTAVES >= max(lengths)]
    return kept if len(kept) > 1 else []


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """Slope of the least-squares line through (log length, log value); None for fewer than two positive values."""
    points = [(math.log(n), math.log(value)) for n, value in zip(lengths, values, strict=True) if value > 0]
    if len(points) < 2:
        return None
    x_mean = sum(x for x, _ in points) / len(points)
    y_mean = sum(y for _, y in points) / len(points)
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else None


def crossover(lengths: Sequence[int], ratios: Sequence[float]) -> dict[str, Any]:
    """From which length on a contender is as fast as SDPA, and stays so.

    Args:
        lengths: ascending.
        ratios: SDPA's time over the contender's at each; above 1 the contender is faster.

    Returns:
        `{"tokens": n, "how": "interpolated"}` (on a line through (log length, log ratio)), `{"tokens": first length,
        "how": "at or below"}` if it is as fast at every length, `{"tokens": last length, "how": "none up to"}` if it
        is slower at the last one.
    """
    slower = [index for index, ratio in enumerate(ratios) if ratio < 1]
    if not slower:
        return {"tokens": lengths[0], "how": "at or below"}
    last = slower[-1]
    if last == len(lengths) - 1:
        return {"tokens": lengths[-1], "how": "none up to"}
    below, above = math.log(ratios[last]), math.log(ratios[last + 1])
    step = -below / (above - below)
    tokens = math.exp(math.log(lengths[last]) * (1 - step) + math.log(lengths[last + 1]) * step)
    return {"tokens": round(tokens), "how": "interpolated"}


def spell_crossover(found: Mapping[str, Any] | None) -> str:
    """A crossover in a table."""
    if found is None:
        return "-"
    words = {"interpolated": "", "at or below": "≤ ", "none up to": "none up to "}
    return f"{words[found['how']]}{found['tokens']:,}"


def over_floor(row: Mapping[str, Any], bandwidth: float | None) -> float | None:
    """Time over the time that its unavoidable bytes take at the device's bandwidth (bytes a second)."""
    if bandwidth is None or "floor_bytes" not in row or "seconds" not in row:
        return None
    return row["seconds"] * bandwidth / row["floor_bytes"]


def summarize(results: Mapping[str, Any]) -> dict[str, Any]:
    """Exponents and crossovers of models and layers, and how flat generation is.

    Returns:
        `{"curves": [{"kind", "part", "mode", "contender", "time_exponent", "memory_exponent", "fitted", "crossover"}],
        "decode": [{"part", "contender", "slowdown", "growth", "contexts"}]}`; `fitted` are the lengths of the fit,
        `slowdown` is the least speed over the greatest, less than one, `growth` the largest cache over the smallest.
    """
    curves = []
    for (kind, part, mode, contender), points in series(results["rows"]).items():
        lengths = fitted_lengths([row["length"] for row in points]) if points else []
        fitted = [row for row in points if row["length"] in lengths]
        compared = [row for row in points if "ratio" in row]
        curves.append(
            {
                "kind": kind,
                "part": part,
                "mode": mode,
                "contender": contender,
                "time_exponent": exponent(lengths, [row["seconds"] for row in fitted]),
                "memory_exponent": exponent(lengths, [row["peak_mb"] for row in fitted]),
                "fitted": lengths,
                "crossover": crossover([r["length"] for r in compared], [r["ratio"] for r in compared])
                if compared
                else None,
            }
        )
    return {"curves": curves, "decode": _decode(results["rows"])}


def _decode(rows: Rows) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "decode" and "seconds" in row:
            found.setdefault((row["part"], row["contender"]), []).append(row)
    return [
        {
            "part": part,
            "contender": contender,
            "slowdown": min(r["tokens_per_second"] for r in points) / max(r["tokens_per_second"] for r in points),
            "growth": max(r["cache_bytes"] for r in points) / max(1, min(r["cache_bytes"] for r in points)),
            "contexts": sorted(row["length"] for row in points),
        }
        for (part, contender), points in found.items()
    ]
