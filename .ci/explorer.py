"""What the results explorer of the documentation shows: quality and cost of every method, from committed results.

`explorer_data` brings the files of `hf-linear-attn methods` (starts, and what a layer of a checkpoint costs) and of
`hf-linear-attn bench` (random weights, more lengths, backward passes, generation) into one form. It changes no number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from hf_linear_attn.bench.speed.tables import describe_shape
from hf_linear_attn.bench.starts.tables import summarize_starts
from hf_linear_attn.measure.methods import Method
from hf_linear_attn.registry import KINDS, VARIANTS, get_patcher

MODES = {"forward": "forward", "training": "forward + backward", "decode": "one new token"}
MB = 1e6


def explorer_data(methods: dict[str, Any], benches: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Kinds, methods, checkpoints with their starts, and measurements of cost with their rows.

    Args:
        methods: what `hf-linear-attn methods` wrote.
        benches: what runs of `hf-linear-attn bench` wrote.
    """
    specs = {key: VARIANTS.get(key) for key in VARIANTS.names()}
    checkpoints = [checkpoint(methods, model) for model in methods["recipe"]["models"]]
    measurements = [of_checkpoint(methods, model) for model in checkpoints]
    for results in benches:
        measurements += of_bench(results, methods["methods"])
    return {
        "kinds": KINDS,
        "modes": MODES,
        "methods": {
            key: {"title": spec.title, "kind": spec.guide[0] if spec.guide else "other"} for key, spec in specs.items()
        },
        "checkpoints": checkpoints,
        "measurements": [each for each in measurements if len({row["key"] for row in each["rows"]}) > 1],
    }


def checkpoint(results: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint and the mean errors of every start on it; a length or stage that was not measured is absent."""
    entries = {entry["name"]: entry for entry in results["methods"]}
    rows = [row for row in results["rows"] if row["kind"] == "start" and row["model"] == model["name"]]
    encoders_alone = [key for key in VARIANTS.names() if not VARIANTS.get(key).decoder]
    starts: dict[str, dict[str, Any]] = {}
    for (name, length, method), stages in summarize_starts(rows).items():
        assert name == model["name"]
        start = starts.setdefault(method, {key: entries[method][key] for key in ("key", "leading")} | {"errors": {}})
        start["errors"][length] = {stage: measured["error"] for stage, measured in stages.items()}
        start["errors"][length]["spread"] = stages.get("calibrated", stages["published"])["spread"]
    refused = {row["key"] for row in rows if "refused" in row}
    side = "decoder" if refused.intersection(encoders_alone) else "encoder"
    return {"name": model["name"], "side": side, "lengths": model["lengths"], "starts": starts}


def of_checkpoint(results: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """What the first layers of a checkpoint cost, with its own weights: the options whose starts lead."""
    meta, layers = results["meta"], results["recipe"]["costs"]["layers"]
    rows = [row for row in results["rows"] if row["kind"] == "cost" and row["model"] == model["name"]]
    return {
        "name": f"{'its first layer' if layers == 1 else f'its first {layers} layers'}, own weights",
        "checkpoint": model["name"],
        "side": model["side"],
        "device": "cpu",
        "about": f"{meta['machine']}, {meta['threads']} thread(s), torch {meta['torch']}",
        "command": meta["command"],
        "rows": [cost(row, row["method"], row["method"], model["side"]) | {"mode": "forward"} for row in rows],
    }


def of_bench(results: dict[str, Any], entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Measurements of a bench: one for each part that is a layer, a model or generation."""
    meta, recipe = results["meta"], results["recipe"]
    where = meta["machine"] if meta["device"] == "cpu" else meta["device_name"]
    names = VARIANTS.names()
    starts = {e["name"]: Method(e["key"], e["options"]).config() for e in entries if e["key"] in names}
    for kind, parts in (("layer", "layers"), ("model", "models"), ("decode", "decode")):
        for part in recipe.get(parts, []):
            side = "decoder" if is_causal(part) else "encoder"
            rows = []
            for row in results["rows"]:
                if (row["kind"], row["part"]) == (kind, part["name"]) and row.get("key") in names:
                    config = Method(row["key"], row["options"]).config()
                    start = next((name for name, same in starts.items() if same == config), None)
                    rows.append(cost(row, row["contender"], start, side) | {"mode": row["mode"]})
            yield {
                "name": f"{part['name']}, random weights",
                "checkpoint": None,
                "side": side,
                "device": recipe["device"],
                "about": f"{describe_shape(part)} {where}, {meta['threads']} thread(s), {meta['dtype']}, "
                f"torch {meta['torch']}",
                "command": meta["command"],
                "rows": rows,
            }


def cost(row: dict[str, Any], method: str, start: str | None, side: str) -> dict[str, Any]:
    """One method at one length: its cost beside SDPA's, or why there is none.

    `start` is the start that was measured with the same options, None where there is none; `megabytes` the peak of a
    pass, or what generation keeps.
    """
    found = {"length": row["length"], "method": method, "key": row["key"], "start": start}
    if "seconds" not in row:
        serves = getattr(VARIANTS.get(row["key"]), side)
        why = "of n² cost, not run at this length" if "left_out" in row else "not measured" if serves else "refused"
        return found | {"why": why}
    found["megabytes"] = row["cache_bytes"] / MB if "cache_bytes" in row else row["peak_mb"]
    beside = ("ratio", "seconds", "sdpa_seconds", "sdpa_peak_mb")  # SDPA is not run at the greatest lengths
    return found | {name: row[name] for name in beside if name in row}


def is_causal(part: dict[str, Any]) -> bool:
    """Whether a part of a bench measures a decoder."""
    if "hidden_size" in part:
        return part["is_causal"]
    patcher = get_patcher(part["config"]["model_type"])
    return patcher.is_causal(patcher.config_class())
