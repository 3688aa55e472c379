"""Tables of a `hf-linear-attn bench --kernels` run, in Markdown. Imports nothing heavy: docs are generated with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hf_linear_attn.measure.markdown import markdown_table

__all__ = ["render_kernels", "render_overview"]

_SHOWN = 4096
_PASSES = ("forward", "backward", "decode")


def _about(results: Mapping[str, Any]) -> str:
    """What was counted, and what the model of time assumes, in a few sentences."""
    meta, model = results["meta"], results["meta"]["model"]
    return (
        f"One layer between its projections, batch {meta['batch']}, {meta['num_heads']} heads of "
        f"{meta['hidden_size'] // meta['num_heads']}, {meta['dtype']}, default options, no mask, without "
        "calibration but where a row says so; *4 heads a key*: as in models with grouped keys; "
        f"torch {meta['torch']}, triton {meta['triton']}. Made by `{meta['command']}`, on a CPU: counted, not "
        "measured. A launch or operator moves each of its tensors once. *x floor*: bytes over those of an attention's "
        "inputs and outputs (and gradients) moved once; of a decode step, over those of its state. *Model*: the larger "
        f"of two times, the GPU's at {model['bytes_per_second'] / 1e12:g} TB/s and at least "
        f"{model['least_seconds'] * 1e6:g} us a launch or operator, and the CPU's at "
        f"{model['host_seconds_launch'] * 1e6:g} us a launch and {model['host_seconds_op'] * 1e6:g} us an operator. "
        "These are assumptions about an H200; arithmetic and waits inside a kernel come on top."
    )


def _passes(results: Mapping[str, Any], length: int) -> str:
    """A row for each method and side at one length: what each pass launches, moves and might take."""
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in results["rows"]:
        if row["length"] == length:
            found.setdefault((row["method"], row["side"]), {})[row["pass"]] = row
    header = [
        "method",
        "side",
        *(f"{name}: {what}" for name in _PASSES for what in ("launches + ops", "x floor, model")),
    ]
    rows = []
    for (method, side), passes in found.items():
        cells = [cell for name in _PASSES for cell in _cells(passes.get(name))]
        rows.append([f"`{method}`", side, *cells])
    return markdown_table(header, rows)


def _cells(row: Mapping[str, Any] | None) -> tuple[str, str]:
    if row is None:
        return "-", "-"
    launches, ops = (sum(row[kind].values()) for kind in ("launches", "ops"))
    micros = max(row["gpu_us"], row["host_us"])
    bound = "CPU" if row["host_us"] > row["gpu_us"] else "GPU"
    return f"{launches} + {ops}", f"{row['bytes'] / row['floor']:.2f}x, {micros:,.0f} us ({bound})"


def render_overview(results: Mapping[str, Any]) -> str:
    """The passes at one length, and the kernels in a sentence."""
    kernels, target = results["kernels"], results["meta"]["target"]
    spilling = [row["kernel"] for row in kernels if row["spills"] or row["stack_bytes"]]
    waiting = sum(0 in row["load_waits"] for row in kernels)
    compiled = (
        f"{len(kernels)} configurations compile for {target}, {len(spilling) or 'none'} with spilled registers; at "
        f"most {max(row['registers'] for row in kernels)} registers and "
        f"{max(row['shared_bytes'] for row in kernels):,} bytes of shared memory. In {waiting} a loop waits for all of "
        "its loads."
    )
    return "\n\n".join([_about(results), f"{_SHOWN:,} tokens:", _passes(results, _SHOWN), compiled])


def render_kernels(results: Mapping[str, Any]) -> str:
    """Everything that a run counted and compiled."""
    meta = results["meta"]
    parts = [f"# {meta['title']}", _about(results)]
    for length in meta["lengths"]:
        parts += [f"## {length:,} tokens", _passes(results, length)]
    parts += [f"## Compiled for {meta['target']}", _compiled(results["kernels"])]
    return "\n\n".join(parts) + "\n"


def _compiled(kernels: Iterable[Mapping[str, Any]]) -> str:
    header = [
        "kernel", "constants", "warps", "stages", "instructions", "registers", "shared memory", "spills",
        "copies under way after a wait", "waits for products", "methods",
    ]  # fmt: skip
    rows = []
    for row in kernels:
        numbers = (row[x] for x in ("num_warps", "num_stages", "instructions", "registers", "shared_bytes", "spills"))
        waits = ", ".join(map(str, row["load_waits"])) or "-"
        methods = ", ".join(f"`{method}`" for method in row["methods"])
        cells = ["-" if x is None else f"{x:,}" for x in numbers]
        rows.append([row["kernel"], row["config"], *cells, waits, str(row["dot_waits"]), methods])
    return markdown_table(header, rows)
