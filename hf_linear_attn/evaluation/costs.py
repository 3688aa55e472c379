"""What a converted encoder costs to run on this machine, beside softmax: `python -m hf_linear_attn.evaluation.costs`.

Two measurements, each side by side in one process: the forward time of a checkpoint against length, and the peak
memory of one forward of a base-size encoder (random weights: memory does not depend on them).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModel, BertConfig, BertModel

from hf_linear_attn.convert import convert_model, extend_positions
from hf_linear_attn.data import resolve_model
from hf_linear_attn.evaluation.profile import forward_time_against_length, peak_memory

__all__ = ["measure_costs"]

Variant = tuple[str, dict[str, Any]]


def measure_costs(
    model: str, variants: Sequence[Variant], lengths: Sequence[int], memory_lengths: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Forward times of `model` and peak memory of a base-size encoder, for SDPA and each variant.

    Args:
        model: Hub id, folder or bundled name of an encoder.
        variants: (key, options) pairs.
        lengths: tokens of a sequence, for the times.
        memory_lengths: tokens of a sequence, for the memory.
        repeats: timed rounds; medians are kept.

    Returns:
        `{"machine", "threads", "torch", "model", "forward": [...], "memory": [...]}` with seconds and 10^6 bytes;
        `ratio` is SDPA's time over the variant's: above 1 the variant is faster.
    """
    sdpa = AutoModel.from_pretrained(resolve_model(model))
    limit = max(*lengths, sdpa.config.max_position_embeddings)
    models = {"sdpa": extend_positions(sdpa, limit)}
    for key, options in variants:
        models[_name(key, options)] = convert_model(
            AutoModel.from_pretrained(resolve_model(model)), key, max_length=limit, **options
        )
    rows = forward_time_against_length(models, lengths, repeats=repeats)
    forward = [
        {"name": r.name, "length": r.length, "seconds": round(r.seconds, 4), "ratio": round(1 / r.ratio, 3)}
        for r in rows
        if r.ratio is not None
    ]
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": model,
        "forward": forward,
        "memory": [row for key, options in variants for row in _memory(key, options, memory_lengths)],
    }


def _memory(key: str, options: dict[str, Any], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Peak of one forward of a base-size encoder (12 layers, 768 wide) beyond its weights, at each length."""
    torch.manual_seed(0)
    config = BertConfig(max_position_embeddings=max(lengths))
    encoder = convert_model(BertModel(config).eval(), key, **options)
    rows = []
    for length in lengths:
        ids = torch.randint(1000, 20000, (1, length))
        with torch.no_grad():
            encoder(input_ids=ids[:, :64])
            peak = peak_memory(partial(encoder, input_ids=ids))
        rows.append({"name": _name(key, options), "length": length, "peak_mb": round(peak.megabytes, 1)})
    return rows


def _name(key: str, options: dict[str, Any]) -> str:
    return key + "".join(f" {name}={value}" for name, value in options.items())


def _parse(text: str) -> Variant:
    """`longformer` or `longformer:window_size=128,dilation=2`."""
    key, _, rest = text.partition(":")
    pairs = (item.split("=", 1) for item in rest.split(",") if item)
    return key, {name: yaml.safe_load(value) for name, value in pairs}


def main() -> None:
    """Measure, print, and write a results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--variants", nargs="+", type=_parse, required=True)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--memory-lengths", nargs="+", type=int, default=[8192, 16384])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    costs = measure_costs(
        arguments.model, arguments.variants, arguments.lengths, arguments.memory_lengths, arguments.repeats
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(costs, indent=1))


if __name__ == "__main__":
    main()
