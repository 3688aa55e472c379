"""Tables of a `hf-linear-attn retrieval` run, in Markdown, and what they show in a few sentences.

Imports nothing heavy: the documentation is generated with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_linear_attn.measure.markdown import markdown_table

__all__ = [
    "about",
    "at",
    "chunked",
    "failed",
    "measured_lengths",
    "references",
    "render_headline",
    "render_overview",
    "render_retrieval",
    "verdict",
]

Row = Mapping[str, Any]


def at(results: Mapping[str, Any], kind: str, length: int) -> dict[str, Row]:
    """Rows of one part at one length: system -> row, in the order of the recipe."""
    return {row["system"]: row for row in results["rows"] if (row["kind"], row["length"]) == (kind, length)}


def references(results: Mapping[str, Any]) -> list[str]:
    """Systems that the others are compared with, in the order of the recipe."""
    return [system["name"] for system in results["systems"] if system["reference"]]


def chunked(results: Mapping[str, Any]) -> str | None:
    """The checkpoint in chunks, which costs are held against."""
    found = (s["name"] for s in results["systems"] if s["reference"] and s["reads"] == "chunks" and not s["saved"])
    return next(found, None)


def measured_lengths(results: Mapping[str, Any]) -> list[int]:
    """Lengths at which a system was measured that reads them; the first measured one if only its limit was read."""
    reads = {system["name"]: system["reads"] for system in results["systems"]}
    found = {
        length: {reads[name] for name, row in at(results, "long", length).items() if "top1" in row}
        for length in results["recipe"]["lengths"]
    }
    long = [length for length, kinds in found.items() if kinds & {"whole", "chunks"}]
    return long or [length for length, kinds in found.items() if kinds][:1]


def failed(results: Mapping[str, Any]) -> list[Row]:
    """Rows of systems that raised."""
    return [row for row in results["rows"] if "failure" in row]


def verdict(results: Mapping[str, Any], length: int) -> str:
    """What the top-1 rates of systems that read a length at a time show, in sentences that the intervals carry."""
    rows, costs = at(results, "long", length), at(results, "cost", length)
    systems = [system["name"] for system in results["systems"] if system["reads"] == "whole"]
    whole = {name: rows[name] for name in systems if "top1" in rows.get(name, {})}
    chunks = chunked(results)
    sentences = [
        f"*{name}* finds {rows[name]['top1']['mean']:.3f}; {_sides(whole, name, length)}."
        for name in references(results)
        if whole and "top1" in rows.get(name, {})
    ]
    times = {name: costs[name]["seconds"] for name in whole if "seconds" in costs.get(name, {})}
    if chunks is not None and times and "seconds" in costs.get(chunks, {}):
        ends = [f"{times[name]:.2f} s (`{name}`)" for name in (min(times, key=times.get), max(times, key=times.get))]  # type: ignore[arg-type]
        sentences.append(
            f"*{chunks}* converts nothing and takes {costs[chunks]['seconds']:.2f} s a document; those take "
            f"{' to '.join(ends)}."
        )
    return " ".join(sentences)


def _sides(whole: Mapping[str, Row], reference: str, length: int) -> str:
    """Which systems are above a reference, which below, and which are not told apart from it."""
    less = {name: row["top1_less"][reference] for name, row in whole.items()}
    sides = {
        "above it": [name for name in whole if less[name]["low"] > 0],
        "below it": [name for name in whole if less[name]["high"] < 0],
        "not told apart from it": [name for name in whole if less[name]["low"] <= 0 <= less[name]["high"]],
    }
    everyone = f"all {len(whole)} that read {length:,} tokens at a time"
    named = {side: everyone if len(names) == len(whole) > 2 else _names(names) for side, names in sides.items()}
    return "; ".join(f"{side} {names}" for side, names in named.items() if names)


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _interval(value: Mapping[str, float] | None, sign: str = "") -> str:
    """`.710 [.662, .760]`; with a sign in bold where the interval excludes zero."""
    if value is None:
        return "-"
    text = f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"
    return f"**{text}**" if sign and not value["low"] <= 0 <= value["high"] else text


def _missing(row: Row | None) -> str:
    """What stands in place of a number that was not measured."""
    found = row or {}
    return "refused" if "refused" in found else "failed" if "failure" in found else "n²" if "left_out" in found else "-"


def render_headline(results: Mapping[str, Any], length: int) -> str:
    """A narrow table of one length: top-1 and cost, the best system first."""
    rows, costs = at(results, "long", length), at(results, "cost", length)
    measured = sorted((row for row in rows.values() if "top1" in row), key=lambda row: -row["top1"]["mean"])
    lines = []
    for row in measured:
        cost = costs.get(row["system"], {})
        numbers = [f"{cost['seconds']:.2f}", f"{cost['peak_mb']:,.0f}"] if "seconds" in cost else [_missing(cost)] * 2
        lines.append([f"`{row['system']}`", f"{row['tokens_read']:,}", _interval(row["top1"]), *numbers])
    return markdown_table(["system", "tokens read", "top-1 [95% interval]", "s / document", "peak MB"], lines)


def render_overview(results: Mapping[str, Any], length: int) -> str:
    """One table: every system at one length, its cost there, and how near it is to the checkpoint on short texts."""
    rows, costs = at(results, "long", length), at(results, "cost", length)
    shorts = [n for n in sorted(results["recipe"]["short_lengths"]) if at(results, "short", n)]
    short = at(results, "short", shorts[-1]) if shorts else {}
    others = references(results)
    header = ["system", "tokens read", "top-1 [95% interval]", "mean reciprocal rank", "cosine gap"]
    header += [f"top-1 less {name}" for name in others]
    header += ["s / document", "peak MB"] * bool(costs) + [f"cosine to the checkpoint at {n:,}" for n in shorts[-1:]]
    lines = []
    for name in (system["name"] for system in results["systems"]):
        row, cost = rows.get(name), costs.get(name)
        if row is None and cost is None:  # of an unfinished run
            continue
        line = [f"`{name}`", *([_missing(row)] * 4 if row is None or "top1" not in row else _quality(row))]
        line += [_interval((row or {}).get("top1_less", {}).get(other), "+") for other in others]
        if costs:
            timed = cost is not None and "seconds" in cost
            line += [f"{cost['seconds']:.2f}", f"{cost['peak_mb']:,.0f}"] if timed else [_missing(cost)] * 2  # type: ignore[index]
        if shorts:
            near = short.get(name, {})
            line.append(f"{near['cosine']:.3f}" if "cosine" in near else "-")
        lines.append(line)
    return markdown_table(header, lines)


def _quality(row: Row) -> list[str]:
    return [
        f"{row['tokens_read']:,}",
        _interval(row["top1"]),
        f"{row['mrr']['mean']:.3f}",
        f"{row['gap']['mean']:+.3f}",
    ]


def about(results: Mapping[str, Any]) -> str:
    """What was searched with what, and on which machine."""
    corpus, recipe, meta = results["corpus"], results["recipe"], results["meta"]
    passages, calibration = recipe["passages"], recipe["calibration"]
    drawn = f" from its first {passages['within']:,} tokens" if passages["within"] is not None else ""
    chosen = f"{calibration['documents']} documents of {calibration['tokens']:,} tokens"
    saved = [system["name"] for system in results["systems"] if system["saved"]]
    trained = (
        f"Measured as they were saved: {_names(saved)}; nothing else is trained;" if saved else "Nothing is trained;"
    )
    return (
        f"{corpus['queries']:,} passages of {passages['tokens']} tokens, {passages['count']} of each of "
        f"{corpus['documents']} documents ({corpus['source']}; {corpus['groups']} groups, median "
        f"{corpus['median_tokens']:,} tokens){drawn}, search the rest of their documents: a passage and "
        f"{passages['margin']} tokens on both sides are in no document. Queries are read by the system that reads the "
        f"documents. {trained} calibrated starts are chosen on {chosen}, of groups that are not searched. "
        "Intervals are 95% bootstrap intervals over groups, differences are "
        f"paired, bold where they exclude zero. Checkpoint: {recipe['model']}, which reads {corpus['limit']:,} tokens. "
        f"Left out: {corpus['too_short']} documents below {recipe['documents']['min_tokens']:,} tokens, "
        f"{corpus['duplicates']} duplicates. {corpus['note'] + ' ' if corpus['note'] else ''}Made by "
        f"`{meta['command']}` on {meta['machine']}, {meta['threads']} thread(s), torch {meta['torch']}, transformers "
        f"{meta['transformers']}."
    )


def render_retrieval(results: Mapping[str, Any]) -> str:
    """All tables of a run as one Markdown text."""
    recipe = results["recipe"]
    parts = ["# A passage finds the rest of its document", about(results)]
    if results["meta"]["unfinished"]:
        parts.append("Not all is measured yet: the same command goes on.")
    for length in measured_lengths(results):
        parts += [f"## {length:,} tokens", verdict(results, length), render_overview(results, length)]
    for length in recipe["short_lengths"]:
        rows = at(results, "short", length)
        if rows:
            parts += [f"## {length:,} tokens, which the checkpoint reads as well", _short_table(rows)]
    lines = [f"- {r['system']} ({r['kind']}, {r['length']:,} tokens): {r['failure']}" for r in failed(results)]
    lines += [f"- {r['system']} ({r['length']:,} tokens): {r['refused']}" for r in results["rows"] if "refused" in r]
    if lines:
        parts += ["## Not measured", "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _short_table(rows: Mapping[str, Row]) -> str:
    lines = []
    for name, row in rows.items():
        difference = next(iter(row.get("top1_less", {}).values()), None)
        cosine = f"{row['cosine']:.4f}" if "cosine" in row else _missing(row)
        lines.append([f"`{name}`", cosine, _interval(row.get("top1")), _interval(difference, "+")])
    header = ["system", "cosine to the checkpoint's vector", "top-1 [95% interval]", "top-1 less the checkpoint's"]
    return markdown_table(header, lines)
