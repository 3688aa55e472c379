"""Tables of a `hf-linear-attn methods` run, in Markdown: every start at every length, and one table of all methods.

Imports nothing heavy: the README is generated with it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_linear_attn.measure.markdown import markdown_table

__all__ = [
    "failed",
    "leading_numbers",
    "render_methods",
    "render_overview",
    "render_starts",
    "summarize_starts",
    "why_missing",
    "worse_starts",
]

STAGES = ("published", "calibrated", "regressed")
_TOLERANCE = 0.005  # a start is called worse than the published one above this difference of mean errors

Rows = Sequence[Mapping[str, Any]]


def summarize_starts(rows: Rows) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Means over seeds: (model, length, method) -> stage -> `{"error", "cosine", "spread", "seeds"}`.

    `spread` is half the range of the error over seeds. A stage that was not measured is absent, except that a method
    without anything to calibrate has its published start there.
    """
    found: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "start" and row.get("published"):
            found.setdefault((row["model"], row["length"], row["method"]), []).append(row)
    summary = {}
    for place, group in found.items():
        stages: dict[str, Any] = {}
        for stage in STAGES:
            measured = [row[stage] for row in group if row.get(stage)]
            if measured:
                errors = [entry["error"] for entry in measured]
                stages[stage] = {
                    "error": statistics.fmean(errors),
                    "cosine": statistics.fmean(entry["cosine"] for entry in measured),
                    "spread": (max(errors) - min(errors)) / 2,
                    "seeds": len(errors),
                }
        summary[place] = stages
    return summary


def worse_starts(rows: Rows) -> list[str]:
    """Places where the calibrated start is worse than the published one on the test documents."""
    return [
        f"{method} ({model}, n = {length:,}): {stages['calibrated']['error']:.3f} after calibration, "
        f"{stages['published']['error']:.3f} as published"
        for (model, length, method), stages in summarize_starts(rows).items()
        if "calibrated" in stages and stages["calibrated"]["error"] > stages["published"]["error"] + _TOLERANCE
    ]


def _value(stage: Mapping[str, Any] | None, spread: bool = True) -> str:
    """`.54 ± .01 / .87`: error, half its range over seeds, cosine."""
    if stage is None:
        return "-"
    around = f" ± {stage['spread']:.2f}" if spread and stage["seeds"] > 1 else ""
    return f"{stage['error']:.3f}{around} / {stage['cosine']:.2f}"


def render_methods(results: Mapping[str, Any]) -> str:
    """All tables of a run as one Markdown text."""
    recipe, rows = results["recipe"], results["rows"]
    documents, regression = recipe["documents"], recipe["regression"]
    parts = [
        "# Every method on real layers",
        _about(results),
        "Relative error of the attention output against softmax / mean cosine (error: mean over layers and seeds, ± "
        f"half its range over seeds). {documents['calibration_tokens']:,} calibration and "
        f"{documents['test_tokens']:,} test tokens (at least one document each) of `{documents['source']}` for each "
        "seed, from different groups (presidents, say). *calibrated*: the start that `calibration=` chooses; a dash "
        "means that the method has none, and starts as published."
        + (f" *fitted*: after {regression['steps']} steps of per-layer regression." if regression else ""),
    ]
    for model, length in dict.fromkeys((place[0], place[1]) for place in summarize_starts(rows)):
        layers = next((m["layers"] for m in recipe["models"] if m["name"] == model), None)
        which = "all layers" if layers is None else "layers " + ", ".join(map(str, layers))
        parts += [f"## {model}, n = {length:,} ({which})", render_starts(results, model, length)]
    parts += ["## All methods: error and cost", render_overview(results)]
    if worse := worse_starts(rows):
        parts += ["## Starts that calibration made worse", "\n".join(f"- {line}" for line in worse)]
    failures = [f"- {row['method']} ({row['model']}, n = {row['length']:,}): {row['failure']}" for row in failed(rows)]
    if failures:
        parts += ["## Failed", "\n".join(failures)]
    return "\n\n".join(parts) + "\n"


def render_starts(results: Mapping[str, Any], model: str, length: int) -> str:
    """One table: every start of a run on a model at a length, with the parameters it adds where that was counted."""
    summary = summarize_starts(results["rows"])
    names = [e["name"] for e in results["methods"] if (model, length, e["name"]) in summary]
    found = [row for row in results["rows"] if (row["kind"], row["model"], row["length"]) == ("start", model, length)]
    counts = {
        name: statistics.fmean(numbers)
        for name in names
        if (numbers := [row["parameters"] for row in found if row["method"] == name and "parameters" in row])
    }
    header = ["method", *(["new parameters"] if counts else []), "as published", "calibrated", "fitted"]
    rows = []
    for name in names:
        count = [f"{counts[name]:,.0f}" if name in counts else "-"] if counts else []
        rows.append([f"`{name}`", *count, *(_value(summary[model, length, name].get(stage)) for stage in STAGES)])
    return markdown_table(header, rows)


def failed(rows: Rows) -> list[Mapping[str, Any]]:
    """Rows of methods that raised."""
    return [row for row in rows if "failure" in row]


def _about(results: Mapping[str, Any]) -> str:
    meta, recipe = results["meta"], results["recipe"]
    return (
        f"Made by `{meta['command']}` on {meta['machine']}, {meta['threads']} thread(s), torch {meta['torch']}, "
        f"transformers {meta['transformers']}; seeds {', '.join(map(str, recipe['seeds']))}."
    )


def render_overview(results: Mapping[str, Any]) -> str:
    """One table: the leading options of every method, errors at each model's shortest length, costs at every length."""
    recipe, rows = results["recipe"], results["rows"]
    summary = summarize_starts(rows)
    costs = {(row["model"], row["length"], row["method"]): row for row in rows if row["kind"] == "cost"}
    shortest = {model["name"]: min(model["lengths"]) for model in recipe["models"]}
    lengths = sorted({length for _, length, _ in costs})
    header = ["method"]
    columns: list[Callable[[str], str]] = []
    for model, length in shortest.items():
        header.append(f"{model}, n = {length:,}: error before → after calibration")
        columns.append(_error_column(rows, summary, model, length))
    for model in shortest:
        for length in lengths:
            header.append(f"{model}: speed at {length:,}")
            columns.append(_speed_column(costs, model, length))
        if lengths:
            header.append(f"{model}: peak MB at {lengths[-1]:,}")
            columns.append(_memory_column(costs, model, lengths[-1]))
    names = [entry["name"] for entry in results["methods"] if entry["leading"]]
    table = markdown_table(header, [[f"`{name}`", *(column(name) for column in columns)] for name in names])
    if not lengths:
        return table
    baselines = []
    for model in shortest:
        cells = [row for (m, _, _), row in costs.items() if m == model and "sdpa_seconds" in row]
        parts = []
        for length in lengths:
            times = [row["sdpa_seconds"] for row in cells if row["length"] == length]
            if times:
                parts.append(f"{statistics.median(times):.3g} s at {length:,}")
        if parts:
            peaks = [row["sdpa_peak_mb"] for row in cells if row["length"] == lengths[-1]]
            memory = f", {statistics.median(peaks):,.0f} MB at {lengths[-1]:,}" if peaks else ""
            baselines.append(f"{model}: {', '.join(parts)}{memory}")
    kept, limit = recipe["costs"]["layers"], recipe["costs"]["quadratic_up_to"]
    note = (
        f"Speed: SDPA's time over the method's for a forward of one sequence through the first {kept} layer(s), the "
        f"models taking turns; above 1 the method is faster. Peak: memory of that forward. SDPA itself: "
        f"{'; '.join(baselines)}. n²: holds a matrix of length by length, not run beyond {limit:,} tokens; refused: "
        "the method serves the other side only."
    )
    return f"{table}\n\n{note}"


def leading_numbers(results: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float, dict[int, float]]]:
    """(key, model) -> error of the calibrated start at the model's shortest length, and length -> speed over SDPA.

    Of every method with its leading options; a method that the model's side does not serve is absent.
    """
    summary = summarize_starts(results["rows"])
    found: dict[tuple[str, str], tuple[float, dict[int, float]]] = {}
    for model in results["recipe"]["models"]:
        name, length = model["name"], min(model["lengths"])
        for entry in results["methods"]:
            stages = summary.get((name, length, entry["name"]))
            if not entry["leading"] or stages is None:
                continue
            error = stages.get("calibrated", stages["published"])["error"]
            costs = [
                r for r in results["rows"] if (r["kind"], r["model"], r["method"]) == ("cost", name, entry["name"])
            ]
            found[entry["key"], name] = error, {r["length"]: r["ratio"] for r in costs if "ratio" in r}
    return found


def why_missing(rows: Rows, model: str, length: int, method: str) -> str:
    """What stands in place of a start: refused, left out for its quadratic memory, or not measured."""
    found = [row for row in rows if (row["kind"], row["model"], row["length"]) == ("start", model, length)]
    mine = [row for row in found if row["method"] == method]
    if any("refused" in row for row in mine):
        return "refused"
    return "n²" if any("left_out" in row for row in mine) else "-"


def _error_column(
    rows: Rows, summary: Mapping[tuple[str, int, str], Mapping[str, Any]], model: str, length: int
) -> Callable[[str], str]:
    def cell(method: str) -> str:
        stages = summary.get((model, length, method))
        if stages is None:
            return why_missing(rows, model, length, method)
        before, after = stages["published"]["error"], stages.get("calibrated", {}).get("error")
        fitted = stages.get("regressed", {}).get("error")
        text = f"{before:.3f}" if after is None else f"{before:.3f} → {after:.3f}"
        return text if fitted is None else f"{text} (fitted {fitted:.3f})"

    return cell


def _speed_column(
    costs: Mapping[tuple[str, int, str], Mapping[str, Any]], model: str, length: int
) -> Callable[[str], str]:
    def cell(method: str) -> str:
        row = costs.get((model, length, method), {})
        if "ratio" in row:
            return f"{row['ratio']:.2f}x"
        return "refused" if "refused" in row else "n²" if row.get("left_out") else "-"

    return cell


def _memory_column(
    costs: Mapping[tuple[str, int, str], Mapping[str, Any]], model: str, length: int
) -> Callable[[str], str]:
    def cell(method: str) -> str:
        peak = costs.get((model, length, method), {}).get("peak_mb")
        return "-" if peak is None else f"{peak:,.0f}"

    return cell
