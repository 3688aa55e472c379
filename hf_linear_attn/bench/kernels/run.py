"""`hf-linear-attn bench --kernels`: what layers launch, and what that compiles to, as one result. Needs no GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from hf_linear_attn.bench.kernels.trace import Trace, trace_layer
from hf_linear_attn.bench.peers.layers import LayerShape
from hf_linear_attn.registry import get_variant, list_variants

__all__ = ["CASES", "LENGTHS", "MODEL", "SHAPE", "count_passes", "measure_kernels", "served", "spell_constants"]

SHAPE = {"batch": 8, "hidden_size": 768, "num_heads": 12}
LENGTHS = (1024, 4096, 16384)
# What is counted beside the layer as it is: with weights of keys, and with keys that four heads share (of decoders).
CASES: dict[str, dict[str, Any]] = {"": {}, ", calibrated": {"calibrated": True}, ", 4 heads a key": {"group": 4}}
# Of time, per launch or operator: assumptions about an H200 and a CPU beside it, none of them measured here.
MODEL = {"bytes_per_second": 4.0e12, "least_seconds": 2e-6, "host_seconds_launch": 4e-5, "host_seconds_op": 5e-6}
_TARGET = "sm_90"


def served(only: Sequence[str] | None = None) -> list[tuple[str, bool]]:
    """(variant, whether in a decoder) of all that kernels serve.

    Raises:
        ValueError: for a name in `only` that no kernel serves.
    """
    found = [
        (key, causal) for key in list_variants() for causal in (True, False) if get_variant(key).has_kernel(causal)
    ]
    names = list(dict.fromkeys(key for key, _ in found))
    if unknown := [key for key in only or () if key not in names]:
        raise ValueError(f"No kernel serves {', '.join(map(repr, unknown))}; allowed: {', '.join(map(repr, names))}.")
    return [pair for pair in found if only is None or pair[0] in only]


def count_passes(key: str, is_causal: bool, length: int, case: str = "") -> list[tuple[dict[str, Any], Trace]]:
    """A row of the result for each pass of a layer with the default options in bfloat16, and its trace.

    With `calibrated` those that weights of keys change alone; encoders have no keys that heads share.

    Bytes and their floor are of a token and head; of a decode step, of a head. The floor of a forward pass is query,
    key and value read once and the output written; of a backward pass these three and the output's gradient read and
    three gradients written; of a decode step the state read, and written where it has one size.
    """
    shape = LayerShape(**SHAPE, length=length, is_causal=is_causal)
    rows: list[tuple[dict[str, Any], Trace]] = []
    group = CASES[case].get("group", 1)
    if group > 1 and not is_causal:
        return rows
    traces = trace_layer(key, shape, **CASES[case])
    others = trace_layer(key, shape) if case else {}
    for name, (trace, state_bytes) in traces.items():
        if case and group == 1 and [step.name for step in trace.steps] == [step.name for step in others[name][0].steps]:
            continue
        per = shape.batch * shape.num_heads * (1 if name == "decode" else length)
        times = 2 if get_variant(key).state == "constant" else 1
        token = shape.head_dim * 2
        passed = {"forward": 2 + 2 / group, "backward": 3 + 4 / group}
        floor = passed[name] * token if name in passed else times * state_bytes / per
        row = {
            "method": key + case,
            "side": "decoder" if is_causal else "encoder",
            "pass": name,
            "length": length,
            "launches": dict(Counter(step.name for step in trace.launches)),
            "ops": dict(sorted(trace.ops.items())),
            "bytes": round(trace.bytes / per, 1),
            "floor": round(floor, 1),
            "gpu_us": round(_gpu_seconds(trace) * 1e6, 1),
            "host_us": round(_host_seconds(trace) * 1e6, 1),
        }
        rows.append((row | ({"waits_in": trace.reads} if trace.reads else {}), trace))
    return rows


def _gpu_seconds(trace: Trace) -> float:
    return sum(max(MODEL["least_seconds"], step.bytes / MODEL["bytes_per_second"]) for step in trace.steps)


def _host_seconds(trace: Trace) -> float:
    launches, ops = len(trace.launches), trace.ops.total()
    return MODEL["host_seconds_launch"] * launches + MODEL["host_seconds_op"] * ops


def measure_kernels(only: Sequence[str] | None, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Count all passes at `LENGTHS`, and compile for one target what they launch.

    Returns:
        `{"meta": .., "rows": [..], "kernels": [..]}`; a kernel says which methods launch it.

    Raises:
        ValueError: for a variant that no kernel serves.
        RuntimeError: where Triton's interpreter is on.
    """
    import triton

    from hf_linear_attn.kernels.inspection import inspect_launch, launch_as_called, sources

    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, str, int, int], tuple[Any, set[str]]] = {}
    for key, is_causal in served(only):
        say(f"{key}, {'decoder' if is_causal else 'encoder'}")
        for length, case in product(LENGTHS, CASES):
            for row, trace in count_passes(key, is_causal, length, case):
                rows.append(row)
                for step in trace.launches:
                    assert step.launch is not None
                    launch = launch_as_called(*step.launch, spell_constants(step.launch[1]))
                    same = (step.name, launch.name, launch.num_warps, launch.num_stages)
                    found.setdefault(same, (launch, set()))[1].add(key)
    kernels = []
    for number, ((name, config, *_), (launch, users)) in enumerate(sorted(found.items(), key=lambda item: item[0])):
        say(f"{number + 1} of {len(found)}: {name} {config}")
        inspected = asdict(inspect_launch(launch, _TARGET))
        kernels.append({key: x for key, x in inspected.items() if key != "is_default"} | {"methods": sorted(users)})
    meta = {
        "title": "Kernels and operators of a layer",
        "command": command,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "target": _TARGET,
        "sources": sources(),
        "dtype": "bfloat16",
        **SHAPE,
        "lengths": list(LENGTHS),
        "model": MODEL,
    }
    return {"meta": meta, "rows": rows, "kernels": kernels}


def spell_constants(arguments: dict[str, Any]) -> str:
    """The constants of a launch: sizes with their values, flags that are on."""
    named = {name: x for name, x in arguments.items() if name.isupper() and x}
    return " ".join(name if x is True else f"{name}={x}" for name, x in named.items() if isinstance(x, int))
