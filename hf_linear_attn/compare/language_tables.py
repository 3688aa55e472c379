"""Tables of a comparison of language models, in Markdown; imports nothing heavy: the documentation is made with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_linear_attn.measure.curve import PowerLaw
from hf_linear_attn.measure.markdown import markdown_table
from hf_linear_attn.measure.methods import not_measured

__all__ = ["language_table"]

_TIMES = (10, 100)  # as many tokens, for which a curve is read
_GOAL = 1.03  # of the teacher's perplexity: what a conversion may cost


def language_table(results: Mapping[str, Any]) -> str:
    """Markdown tables, a line for every system and stage in each.

    Perplexity over the budgeted checkpoint's at every length; what was written and which pass keys were found, and what
    a forward costs, where that was measured; and what a power law through the divergence from the teacher, as it fell
    in the last distillation, says of more tokens (e^divergence is about the ratio of the perplexities).
    """
    rows, budgeted = results["rows"], results["baseline"]
    lengths, costs, keys = (
        sorted({row[name] for row in rows if name in row}) for name in ("length", "forward_length", "passkey_length")
    )
    perplexity = {("length", n): f"perplexity at {n:,} (over {budgeted})" for n in lengths}
    written: dict[Any, str] = {}
    if any("generation" in row for row in rows):
        written["repeated"] = f"repeated 4-grams (less those of {budgeted})"
        written["likely"] = f"perplexity of the text by the checkpoint (over {budgeted})"
    written |= {("passkey_length", n): f"pass key found in {n:,} tokens" for n in keys}
    cost = {("forward_length", n): f"seconds for {n:,} tokens (over softmax's)" for n in costs}
    tables = [_table(rows, columns) for columns in (perplexity, written, cost) if columns]
    return "\n\n".join([*tables, *([_curve_table(results["curves"])] if results["curves"] else [])])


def _curve_table(curves: Sequence[Mapping[str, Any]]) -> str:
    """What the fall of the divergence from the teacher promises of more tokens."""
    header = ["system", "tokens distilled", "divergence falls as", "e^divergence by then"]
    header += [f"with {times} times the tokens" for times in _TIMES]
    body = []
    for curve in curves:
        law, seen = PowerLaw(curve["factor"], curve["exponent"], curve["error"]), curve["tokens_seen"]
        goal = law.tokens_for(math.log(_GOAL))
        body.append(
            [
                curve["system"],
                f"{seen:,}",
                f"tokens^-{law.exponent:.2f} (± {law.error:.2f})",
                *(f"{math.exp(law.at(seen * times)):.3f}" for times in (1, *_TIMES)),
                "never" if math.isinf(goal) else f"{float(f'{goal:.2g}'):,.0f}",
            ]
        )
    return markdown_table([*header, f"tokens to {_GOAL}"], body)


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[Any, str]) -> str:
    lines: dict[tuple[str, str], dict[Any, str]] = {}
    for row in rows:
        if cells := {place: text for place, text in _cells(row).items() if place in columns}:
            name = row["system"] + (" (control)" if row.get("control") else "")
            lines.setdefault((name, row["stage"]), {}).update(cells)
    body = [[*key, *(cells.get(place, "-") for place in columns)] for key, cells in lines.items()]
    return markdown_table(["system", "after", *columns.values()], body)


def _cells(row: Mapping[str, Any]) -> dict[Any, str]:
    """What a row says, by column."""
    missing = not_measured(row)
    if "generation" in row:
        if missing:
            return {"repeated": missing, "likely": missing}
        repeated, likely = f"{row['repeated_share']:.1%}", f"{row['written_perplexity']:.2f}"
        if "repeated_difference" in row:
            repeated += _interval(row["repeated_difference"], "+.1%")
            likely += _interval(row["written_ratio"], ".3f")
        return {"repeated": repeated, "likely": likely}
    (kind,) = {"length", "forward_length", "passkey_length"} & row.keys()
    if missing:
        text = missing
    elif kind == "length":
        text = f"{row['perplexity']:.2f}" + (_interval(row["ratio"], ".3f") if "ratio" in row else "")
    elif kind == "passkey_length":
        low, high = (row["found_interval"][end] for end in ("low", "high"))
        text = f"{row['found_share']:.0%} [{low:.0%}, {high:.0%}]"
    else:
        text = f"{row['forward_seconds']:.3g} ({row['forward_ratio']:.2f})"
    return {(kind, row[kind]): text}


def _interval(value: Mapping[str, float], form: str) -> str:
    """A mean and the ends of its interval, behind what it is of."""
    mean, low, high = (format(value[name], form) for name in ("mean", "low", "high"))
    return f" ({mean} [{low}, {high}])"
