"""Tables of a `hf-linear-attn bench` run, in Markdown. Imports nothing heavy: the README is generated with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hf_linear_attn.measure.crossover import over_floor, spell_crossover
from hf_linear_attn.measure.markdown import markdown_table
from hf_linear_attn.measure.methods import not_measured

__all__ = ["about_run", "describe_shape", "reasons", "render_bench", "render_performance"]

_KINDS = {"model": "Whole models", "layer": "Single layers", "peer": "Beside other implementations"}
_MODES = {"forward": "forward", "training": "forward and backward"}
_SHOWN = 2048  # tokens at which the README shows how fast a model is, or the nearest length
_LINEAR = 1.10  # exponents of time above it are named

Row = Mapping[str, Any]


def about_run(results: Mapping[str, Any]) -> str:
    """Where and how a run was made, in a few sentences."""
    meta, recipe = results["meta"], results["recipe"]
    where = meta["machine"] if meta["device"] == "cpu" else f"{meta['device_name']} ({meta['machine']})"
    cut = f" Its {recipe['minutes']:g} minutes were over before all was measured." if meta.get("unfinished") else ""
    in_turns = any(recipe[kind] for kind in ("models", "layers", "peers", "decode"))
    how = (
        f" Contenders take turns; medians of up to {recipe['repeats']} rounds (3 at least). x: SDPA's time in the same "
        "turns over the contender's, above 1 the contender is faster (median over rounds)."
    )
    return (
        f"{where}, {meta['threads']} thread(s), {meta['dtype']}, torch {meta['torch']}, transformers "
        f"{meta['transformers']}. Made by `{meta['command']}`.{how if in_turns else ''} Random weights, no dropout, no "
        f"padding.{cut}"
    )


def render_bench(results: Mapping[str, Any]) -> str:
    """Everything that a run measured."""
    meta = results["meta"]
    parts = [f"# {meta['title']}", about_run(results)]
    if meta["bandwidth"]:
        parts.append(
            f"A copy inside the device's memory reads and writes {meta['bandwidth'] / 1e9:,.0f} GB/s; *floor*: time "
            "over the time that an attention's inputs and outputs, moved once, take at that speed."
        )
    for views in _parts(results):
        for view in views:
            parts += [f"## {_KINDS[view.kind]}: {view.part['name']}, {_MODES[view.mode]}", describe_shape(view.part)]
            parts.append(_peer_table(view) if view.kind == "peer" else _curve_table(view))
    for part in results["recipe"]["decode"]:
        parts += [f"## Generation: {part['name']}", describe_shape(part), _decode_table(results, part)]
    for view in _long(results):
        parts += [f"## Very long inputs: {view.part['name']}", describe_shape(view.part), _long_table(view)]
    if lines := reasons(results["rows"]):
        parts += ["## Not measured", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def render_performance(results: Mapping[str, Any]) -> str:
    """What the README shows of a run: how fast models are, and the rest in a line each."""
    parts = [view for part in _parts(results) for view in part]
    blocks = [about_run(results)]
    if models := [view for view in parts if view.kind == "model"]:
        shapes = {view.part["name"]: describe_shape(view.part).rstrip(".") for view in models}
        shape = ". ".join(f"*{name[:1].upper()}{name[1:]}*: {text}" for name, text in shapes.items())
        blocks.append(f"**{_KINDS['model']}.** {shape}.\n\n{_models_in_short(models)}")
    lines = [_layer_in_short(view) for view in parts if view.kind == "layer" and view.fits()]
    lines += [_peers_in_short(view) for view in parts if view.kind == "peer"]
    lines += [_decode_in_short(results, part) for part in results["recipe"]["decode"]]
    if lines:
        blocks.append("\n".join(f"- {line}" for line in lines))
    for view in _long(results):
        blocks.append(f"**{view.part['name']}.** {describe_shape(view.part)}\n\n{_long_table(view)}")
        blocks += [f"Not measured: {'; '.join(missing)}."] if (missing := reasons(view.rows)) else []
    return "\n\n".join(blocks)


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why contenders were not measured: one line for each reason, with the places."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if text := not_measured(row):
            found.setdefault((row["contender"], text), []).append(f"{row['part']} {row['mode']} {row['length']:,}")
    return [
        f"`{contender}`, {text.rstrip('.')} ({', '.join(places[:4])}{', ...' if len(places) > 4 else ''})"
        for (contender, text), places in found.items()
    ]


def describe_shape(part: Row) -> str:
    """A part of the recipe in a sentence."""
    batch = "" if part.get("batch_size", 1) == 1 else f", batch of {part['batch_size']}"
    if "hidden_size" in part:
        what = "Projections and attention" if part["projections"] else "Attention alone, without projections"
        side = {True: ", causal", False: ", bidirectional"}.get(part.get("is_causal"), "")  # type: ignore[arg-type]
        return f"{what}: {part['hidden_size']} wide, {part['num_heads']} heads{side}{batch}."
    shape = f"the shape of `{part['checkpoint']}`" if part["checkpoint"] else part["config"]["model_type"]
    changes = {key: value for key, value in part["config"].items() if key != "model_type"}
    spelled = ", ".join(f"{key} {value}" for key, value in changes.items())
    tokens = f", {part['tokens']} tokens one at a time" if "tokens" in part else ""
    layers = f"{part['layers']} layer" + ("s" if part["layers"] > 1 else "")
    return f"{layers} of {shape}{f' ({spelled})' if spelled else ''}{batch}{tokens}."


class _View:
    """The rows of one part of the recipe in one mode."""

    def __init__(self, results: Mapping[str, Any], kind: str, part: Row, mode: str) -> None:
        self.kind, self.part, self.mode = kind, part, mode
        self.rows = [r for r in results["rows"] if (r["kind"], r["part"], r["mode"]) == (kind, part["name"], mode)]
        self.lengths = sorted({row["length"] for row in self.rows})
        self.bandwidth: float | None = results["meta"]["bandwidth"]
        self.floors = self.bandwidth is not None and any("floor_bytes" in row for row in self.rows)
        self._at = {(row["contender"], row["length"]): row for row in self.rows}
        self._curves = {
            curve["contender"]: curve
            for curve in results["summary"]["curves"]
            if (curve["kind"], curve["part"], curve["mode"]) == (kind, part["name"], mode)
        }

    def names(self) -> list[str]:
        """Contenders that were measured at some length, or were to be: not those that are refused."""
        return list(dict.fromkeys(row["contender"] for row in self.rows if "refused" not in row))

    def cell(self, name: str, length: int, show: Callable[[Row], str]) -> str:
        """What `show` makes of a measured row, or why there is none."""
        return _cell(self._at.get((name, length)), show)

    def exponents(self, name: str) -> list[str]:
        """Of time and of memory."""
        curve = self._curves.get(name, {})
        return [_number(curve.get("time_exponent")), _number(curve.get("memory_exponent"))]

    def crossover(self, name: str) -> str:
        """From which length on it is as fast as SDPA."""
        return "-" if name == "sdpa" else spell_crossover(self._curves.get(name, {}).get("crossover"))

    def floor(self, row: Row) -> str:
        """Its time over that of its unavoidable bytes."""
        return _number(over_floor(row, self.bandwidth)) + "x"

    def fits(self) -> list[str]:
        """The lengths that exponents were fitted at."""
        fitted = dict.fromkeys(tuple(curve["fitted"]) for curve in self._curves.values() if curve["fitted"])
        return [", ".join(f"{n:,}" for n in fit) for fit in fitted]


def _parts(results: Mapping[str, Any]) -> list[list[_View]]:
    """Models, layers and peers that have rows, each as its modes."""
    found = []
    for kind, name in (("model", "models"), ("layer", "layers"), ("peer", "peers")):
        for part in results["recipe"][name]:
            views = [_View(results, kind, part, mode) for mode in _MODES]
            if views := [view for view in views if view.rows]:
                found.append(views)
    return found


def _long(results: Mapping[str, Any]) -> list[_View]:
    """The parts of very long inputs that have rows; results from before there were any have none."""
    views = [_View(results, "long", part, "forward") for part in results["recipe"].get("long", ())]
    return [view for view in views if view.rows]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.3g} ms"


def _cell(row: Row | None, show: Callable[[Row], str]) -> str:
    if row is None:
        return "-"
    if "seconds" in row:
        return show(row)
    words = (("failure", "failed"), ("refused", "refused"), ("missing", "missing"))
    for kind, word in words:
        if kind in row:
            return "out of memory" if row[kind] == "out of memory" else word
    return "-"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _time_and_ratio(row: Row) -> str:
    return _milliseconds(row["seconds"]) + (f" ({row['ratio']:.2f}x)" if "ratio" in row else "")


def _speedup(row: Row) -> str:
    return f"{row['ratio']:.2f}x" if "ratio" in row else "-"


def _peak(row: Row) -> str:
    return f"{row['peak_mb']:,.0f}"


def _cache_megabytes(row: Row) -> str:
    return f"{row['cache_bytes'] / 1e6:,.2f}"


def _all_names(views: Iterable[_View]) -> list[str]:
    return list(dict.fromkeys(name for view in views for name in view.names()))


def _curve_table(view: _View) -> str:
    longest = view.lengths[-1]
    header = ["contender", *(f"{n:,}" for n in view.lengths), f"peak MB at {longest:,}"]
    header += ["exponent of time", "of memory", "as fast as SDPA from", *(["floor at the longest"] * view.floors)]
    lines = []
    for name in view.names():
        cells = [view.cell(name, n, _time_and_ratio) for n in view.lengths]
        cells += [view.cell(name, longest, _peak), *view.exponents(name), view.crossover(name)]
        cells += [view.cell(name, longest, view.floor)] * view.floors
        lines.append([f"`{name}`", *cells])
    return f"{markdown_table(header, lines)}\n\n{_about_fits([view])}"


def _about_fits(views: Sequence[_View]) -> str:
    fits = " or ".join(dict.fromkeys(fit for view in views for fit in view.fits()))
    return f"Exponents: slopes of log time and log peak memory over log length at {fits or 'no'} tokens."


def _peer_table(view: _View) -> str:
    def cell(row: Row) -> str:
        if "ours_ratio" not in row:
            return _milliseconds(row["seconds"])
        text = f"{row['ours_ratio']:.2f}x ({_milliseconds(row['seconds'])}, {_milliseconds(row['ours_seconds'])})"
        return f"{text}, floor {view.floor({**row, 'seconds': row['ours_seconds']})}" if view.floors else text

    first = {row["contender"]: row for row in reversed(view.rows)}
    lines = []
    for name in dict.fromkeys(row["contender"] for row in view.rows):
        options = ", ".join(f"{key}={value}" for key, value in first[name]["options"].items())
        cells = [view.cell(name, n, cell) for n in view.lengths]
        lines.append([name, f"`{first[name]['key']}` {options}".strip(), *cells, first[name]["note"] or "-"])
    header = ["peer", "ours", *(f"{n:,}" for n in view.lengths), "differences"]
    note = "x: the peer's time over ours, above 1 ours is faster; in brackets the peer's time and ours."
    return f"{markdown_table(header, lines)}\n\n{note}"


def _decode_table(results: Mapping[str, Any], part: Row) -> str:
    view = _View(results, "decode", part, "decode")
    flat = {entry["contender"]: entry for entry in results["summary"]["decode"] if entry["part"] == part["name"]}
    first = {row["contender"]: row for row in reversed(view.rows)}
    header = ["contender", "keeps", *(f"tokens/s after {n:,}" for n in view.lengths)]
    header += [*(f"cache MB after {n:,}" for n in view.lengths), "slowest / fastest"]
    lines = []
    for name in view.names():
        speeds = [view.cell(name, n, lambda row: f"{row['tokens_per_second']:,.0f}") for n in view.lengths]
        sizes = [view.cell(name, n, _cache_megabytes) for n in view.lengths]
        slowdown = _number(flat.get(name, {}).get("slowdown"))
        lines.append([f"`{name}`", first[name].get("state", "kv"), *speeds, *sizes, slowdown])
    return markdown_table(header, lines)


def _long_table(view: _View) -> str:
    """Time and memory of one forward, and what a decoder keeps of it."""

    def taken(row: Row) -> str:
        cores = f" ({row['core_seconds']:,.1f})" if "core_seconds" in row else ""
        return f"{row['seconds']:,.1f} s{cores}"

    columns = [("", taken), ("peak MB at ", _peak)]
    if any("cache_bytes" in row for row in view.rows):
        columns.append(("keeps MB after ", _cache_megabytes))
    header = ["contender", *(f"{what}{n:,}" for what, _ in columns for n in view.lengths)]
    lines = [
        [f"`{name}`", *(view.cell(name, n, show) for _, show in columns for n in view.lengths)] for name in view.names()
    ]
    note = "One forward each, one at a time; in parentheses the seconds of all cores, which other work hardly changes."
    return f"{markdown_table(header, lines)}\n\n{note}"


# ---------------------------------------------------------------------------------------------------------------
# In short, for the README
# ---------------------------------------------------------------------------------------------------------------


def _models_in_short(views: Sequence[_View]) -> str:
    """How much faster than SDPA at one length, and from which length on."""
    shown = [min(view.lengths, key=lambda n: abs(n - _SHOWN)) for view in views]
    header = ["contender", *(f"{v.part['name']}, {_MODES[v.mode]}, {n:,}" for v, n in zip(views, shown, strict=True))]
    lines = []
    for name in _all_names(views):
        cells = []
        for view, length in zip(views, shown, strict=True):
            ratio, start = view.cell(name, length, _speedup), view.crossover(name)
            cells.append(ratio if start == "-" else f"{ratio} ({start})")
        if name != "sdpa":
            lines.append([f"`{name}`", *cells])
    legend = "In parentheses: the length from which on it is as fast as SDPA; ≤: at or below the shortest one tried."
    return f"{markdown_table(header, lines)}\n\n{legend}"


def _layer_in_short(view: _View) -> str:
    """Exponents of time over the longest inputs, and of whom they are high."""
    longest = [name for name in view.names() if view.cell(name, view.lengths[-1], lambda row: "timed") == "timed"]
    found = {name: float(view.exponents(name)[0]) for name in longest if view.exponents(name)[0] != "-"}
    where = f"*{view.part['name']}*, {_MODES[view.mode]}, to {view.lengths[-1]:,} tokens"
    if not found:
        return f"{where}: no exponent."
    text = f"{where}: time grows as n^{min(found.values()):.2f} to n^{max(found.values()):.2f}"
    high = sorted((name for name in found if found[name] > _LINEAR), key=lambda name: -found[name])
    return f"{text}, above n^{_LINEAR:.2f}: {', '.join(f'`{x}` {found[x]:.2f}' for x in high) or 'none'}."


def _peers_in_short(view: _View) -> str:
    """At how many places ours is as fast as a peer, and where it is not."""
    rows = [row for row in view.rows if "ours_ratio" in row]
    slow = sorted((row for row in rows if row["ours_ratio"] < 1), key=lambda row: row["ours_ratio"])
    places = ", ".join(f"{row['contender']} at {row['length']:,} {row['ours_ratio']:.2f}" for row in slow)
    return (
        f"*{view.part['name']}*, {_MODES[view.mode]}: ours is as fast or faster at {len(rows) - len(slow)} of "
        f"{len(rows)} places; their time over ours elsewhere: {places or '-'}."
    )


def _decode_in_short(results: Mapping[str, Any], part: Row) -> str:
    """How much generation slows down as the context grows, for states that do not."""
    flat = {entry["contender"]: entry for entry in results["summary"]["decode"] if entry["part"] == part["name"]}
    first = {row["contender"]: row for row in results["rows"] if row["part"] == part["name"]}
    constant = [name for name in flat if first[name].get("state") in ("constant", "window")]
    constant.sort(key=lambda name: flat[name]["slowdown"])
    contexts = " to ".join(f"{n:,}" for n in (min(part["contexts"]), max(part["contexts"])))
    shown = ", ".join(f"`{name}` {flat[name]['slowdown']:.2f}" for name in (*constant, "sdpa") if name in flat)
    what = "lowest over highest tokens a second (1: no length costs more)"
    return f"*{part['name']}* after {contexts} tokens, {what}: {shown}."
