"""What `bench` and `retrieval` call: read the recipe, measure or count, draw, save. No terminal here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_linear_attn.cli.arguments import shipped_recipe
from hf_linear_attn.saving import to_json

if TYPE_CHECKING:
    from hf_linear_attn.bench.retrieval.recipe import RetrievalRecipe
    from hf_linear_attn.bench.speed.recipe import BenchRecipe

__all__ = ["count_kernels", "load_bench_recipe", "run_bench", "run_retrieval", "show_retrieval"]

_SHIPPED = {"cpu": "cpu.yaml", "cuda": "gpu.yaml"}


def load_bench_recipe(path: Path | None, device: str | None, threads: int | None) -> BenchRecipe:
    """The recipe at `path`, or the repository's for the device, with these settings changed.

    Raises:
        FileNotFoundError: for a recipe that is not there.
        ValueError: for a bad recipe.
    """
    import torch

    from hf_linear_attn.bench.speed.recipe import BenchRecipe

    if path is None:
        path = shipped_recipe(f"bench/{_SHIPPED[device or ('cuda' if torch.cuda.is_available() else 'cpu')]}")
    recipe = BenchRecipe.from_yaml(path)
    changes: dict[str, Any] = {"device": device, "threads": threads}
    return dataclasses.replace(recipe, **{name: value for name, value in changes.items() if value is not None})


def run_bench(
    recipe: BenchRecipe, output: Path, only: list[str] | None, fresh: bool, command: str, say: Any
) -> tuple[dict[str, Any], Path, list[Path]]:
    """Measure what is missing; write <device>.json, .md and pictures beside the rows.

    Returns:
        the results, the table and the pictures.
    """
    from hf_linear_attn.bench.speed.pictures import draw_bench
    from hf_linear_attn.bench.speed.run import measure_bench
    from hf_linear_attn.bench.speed.tables import render_bench

    results = measure_bench(recipe, output, only=only, fresh=fresh, command=command, say=say)
    slug = results["meta"]["device"]
    (output / f"{slug}.json").write_text(_lines_of_rows(results), encoding="utf-8")
    (output / f"{slug}.md").write_text(render_bench(results), encoding="utf-8")
    measured = any("seconds" in row for row in results["rows"])
    return results, output / f"{slug}.md", draw_bench(results, output / f"{slug}.png") if measured else []


def count_kernels(output: Path, only: list[str] | None, command: str, say: Any) -> Path:
    """Count what layers make a GPU do and compile it; write kernels.json and .md.

    Returns:
        the tables.
    """
    from hf_linear_attn.bench.kernels.run import measure_kernels
    from hf_linear_attn.bench.kernels.tables import render_kernels

    results = measure_kernels(only, command, say)
    output.mkdir(parents=True, exist_ok=True)
    (output / "kernels.json").write_text(_lines_of_rows(results), encoding="utf-8")
    (output / "kernels.md").write_text(render_kernels(results), encoding="utf-8")
    return output / "kernels.md"


def run_retrieval(recipe: RetrievalRecipe, output: Path, fresh: bool, command: str, say: Any) -> dict[str, Any]:
    """Measure what is missing; write retrieval.json, .md and .png beside the rows.

    Returns:
        the results.
    """
    from hf_linear_attn.bench.retrieval.pictures import draw_retrieval
    from hf_linear_attn.bench.retrieval.run import measure_retrieval
    from hf_linear_attn.bench.retrieval.tables import render_retrieval

    results = measure_retrieval(recipe, output, fresh=fresh, command=command, say=say)
    output.mkdir(parents=True, exist_ok=True)
    (output / "retrieval.json").write_text(_lines_of_rows(results), encoding="utf-8")
    (output / "retrieval.md").write_text(render_retrieval(results), encoding="utf-8")
    if any(row["kind"] == "long" and "top1" in row for row in results["rows"]):
        draw_retrieval(results, output / "retrieval.png")
    return results


def show_retrieval(results: dict[str, Any]) -> str:
    """What a terminal shows of a run, in Markdown: the first length's table and what it says."""
    from hf_linear_attn.bench.retrieval.tables import render_headline, verdict

    length = results["recipe"]["lengths"][0]
    return f"{render_headline(results, length)}\n\n{verdict(results, length)}"


def _lines_of_rows(results: dict[str, Any]) -> str:
    """JSON with one line for each row, so that a difference between two runs can be read."""
    lists = [name for name in ("kernels", "rows") if name in results]
    text = to_json({name: value for name, value in results.items() if name not in lists}, indent=1)[:-2]
    for name in lists:
        rows = ",\n".join(f"  {to_json(row)}" for row in results[name])
        text += f',\n "{name}": [\n{rows}\n ]'
    return text + "\n}\n"
