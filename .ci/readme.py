"""Write the generated sections of README.md and docs/ from the registry, the results under recipes/ and .ci/times.json.

`python .ci/readme.py` rewrites the files; `--check` only says whether they are up to date (exit status 1 if not);
`--pictures` draws the pictures beside the results anew as well, from the same numbers.
A section lies between `<!-- name:begin ... -->` and `<!-- name:end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_linear_attn.bench.kernels.tables import render_overview as render_kernels_overview
from hf_linear_attn.bench.retrieval.tables import about, measured_lengths, render_headline, verdict
from hf_linear_attn.bench.retrieval.tables import render_overview as render_overview_of_retrieval
from hf_linear_attn.bench.speed.recipe import BenchRecipe
from hf_linear_attn.bench.speed.tables import render_performance
from hf_linear_attn.bench.starts.tables import leading_numbers, render_overview, render_starts
from hf_linear_attn.cli.listing import KEEPS, by_kind, exact_limit, spell_defaults
from hf_linear_attn.compare.language_tables import language_table
from hf_linear_attn.compare.schema import agreements
from hf_linear_attn.measure.markdown import markdown_table as table
from hf_linear_attn.registry import KINDS, PATCHERS, VARIANTS, VariantSpec

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))
import trust_page  # noqa: E402

PAGES = (
    "README.md",
    "docs/variants.md",
    "docs/methods.md",
    "docs/results.md",
    "docs/performance.md",
    "docs/when_not.md",
    "docs/trust.md",
)
RESULTS = ROOT / "recipes" / "results"
HEADLINE = RESULTS / "minilm_sotu_long.json"
LONGER = RESULTS / "minilm_sotu_truncated.json"
BENCH = ROOT / "recipes" / "bench"
METHODS = ROOT / "recipes" / "methods" / "results"
SHARINGS = METHODS / "sharing" / "methods.json"
SPECTRUM = ROOT / "recipes" / "minilm" / "results" / "spectrum" / "analysis.json"
EMBEDDERS = ROOT / "recipes" / "minilm" / "results"
LANGUAGE = ROOT / "recipes" / "smollm2" / "results"
TRUST = ROOT / "recipes" / "trust" / "results.json"
TIMES = ROOT / ".ci" / "times.json"
PICTURES = {
    "": "cost of a token", "_peers": "other implementations", "_generation": "generation",
    "_long": "time and memory", "_long_state": "what generation keeps",
}  # fmt: skip
LIMIT_LENGTH = 128  # the length at which the table writes out an exact limit


def link_arxiv(paper: str) -> str:
    """`arXiv:2009.14794` in the name of a paper becomes a link."""
    return re.sub(r"arXiv:\s?(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def limit(spec: VariantSpec) -> str:
    """The options under which the variant equals softmax attention."""
    limits = exact_limit(spec, LIMIT_LENGTH).items()
    return ", ".join(f"`{options}` ({', '.join(sides)})" for options, sides in limits) or "-"


def variants() -> str:
    """One row per registered variant."""
    rows = [
        [
            f"`{spec.key}`",
            f"{spec.title}: *{link_arxiv(spec.paper)}*",
            "yes" if spec.encoder else "refused",
            "yes" if spec.decoder else "refused",
            spec.cost,
            KEEPS[spec.state],
            limit(spec),
            spec.quadratic or "-",
        ]
        for spec in map(VARIANTS.get, VARIANTS.names())
    ]
    header = [
        "variant", "method", "encoder", "decoder", "cost of attention", "generation keeps",
        f"equals softmax (n = {LIMIT_LENGTH})", "quadratic in n",
    ]  # fmt: skip
    return table(header, rows)


def short() -> str:
    """What of each variant fits into four columns."""
    rows = []
    for spec in map(VARIANTS.get, VARIANTS.names()):
        paper = re.search(r"arXiv:(\d{4}\.\d{4,5})", spec.paper)
        title = f"[{spec.title}](https://arxiv.org/abs/{paper[1]})" if paper else spec.title
        sides = ["encoders"] * spec.encoder + ["decoders"] * spec.decoder
        rows.append([f"`{spec.key}`", title, " and ".join(sides), spec.cost])
    return table(["variant", "method", "serves", "cost of attention"], rows)


def options() -> str:
    """The options of every variant with their defaults."""
    specs = map(VARIANTS.get, VARIANTS.names())
    rows = [[f"`{spec.key}`", ", ".join(f"`{option}`" for option in spell_defaults(spec))] for spec in specs]
    return table(["variant", "options and defaults"], rows)


def families() -> str:
    """One row per patcher, with the first line of its file."""
    rows = []
    for key in PATCHERS.names():
        doc = sys.modules[type(PATCHERS.get(key)).__module__].__doc__ or ""
        name, _, what = doc.strip().splitlines()[0].partition(": ")
        rows.append([f"`{key}`", name, what.rstrip(".")])
    return table(["model type", "family", "what it is"], rows)


def number(value: float | None, digits: int, scale: float = 1.0) -> str:
    """A measured number, or a dash where it was not measured."""
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def interval(value: dict[str, float] | None, sign: str = "") -> str:
    """`.71 [.66, .76]`."""
    return "-" if value is None else f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def result(path: Path) -> str:
    """One committed results file (format: hf_linear_attn/compare/report.py) as text and a table."""
    data = json.loads(path.read_text(encoding="utf-8"))
    meta, task, metric = data["meta"], data["task"], data["primary_metric"]
    header = [
        "model", "tokens read", f"{metric} [95% interval]", f"against {data['baseline']}", "agrees with it",
        "parameters added", "s / step", "tokens / s", "peak MB", "forward time, longest",
    ]  # fmt: skip
    rows, agreed = [], agreements(data)
    for row in data["rows"]:
        longest = row["forward"][-1] if row["forward"] else None
        ratio = "" if longest is None or longest["ratio"] is None else f" ({longest['ratio']:.2f}x)"
        rows.append(
            [
                row["name"],
                f"{row['max_length']:,}",
                interval(row["quality"][metric]),
                interval(row["difference_to_baseline"], sign="+"),
                f"{agreed[row['name']]:.1%}" if row["name"] in agreed else "-",
                number(row["parameters_added"], 0),
                number(row["seconds_per_step"], 2),
                number(row["tokens_per_second"], 0),
                number(row["peak_memory_mb"], 0),
                "-" if longest is None else f"{longest['seconds']:.2f} s at {longest['length']:,}{ratio}",
            ]
        )
    about = (
        f"**{meta['title']}**. {task['description'].rstrip('.')}. {task['train_documents']} training and "
        f"{task['test_documents']} test documents"
        + (f", median {task['median_tokens']:,.0f} tokens" if task["median_tokens"] else "")
        + f". Budget: {data['budget']['description'].rstrip('.')}. Device: {meta['device']}, "
        f"{meta['threads']} threads, seed {meta['seed']}. Made by `{meta['command']}`."
    )
    parts = [about, table(header, rows)]
    if (picture := path.with_suffix(".png")).is_file():
        parts.append(f"![{meta['title']}]({picture.relative_to(ROOT).as_posix()})")
    remarks = [f"{b['name']}: {b['metric']} {b['value']:.3f} ({b['detail']})" for b in data["baselines"]]
    remarks += [note for note in [task["note"], *data["notes"]] if note]
    if remarks:
        parts.append("\n".join(f"- {remark}" for remark in remarks))
    return "\n\n".join(parts)


def headline() -> str:
    """The picture that makes the case, and its numbers."""
    data = json.loads(HEADLINE.read_text(encoding="utf-8"))
    title, task, metric = data["meta"]["title"], data["task"], data["primary_metric"]
    longer = json.loads(LONGER.read_text(encoding="utf-8"))
    times = longer["budget"]["steps"] // data["budget"]["steps"]

    def cells(row: dict[str, Any], more: str = "") -> list[str]:
        quality, minutes = interval(row["quality"][metric]), f"{row['train_seconds'] / 60:.0f} minutes"
        forward = f"{row['forward'][-1]['seconds']:.2f} s" if row["forward"] else "-"
        return [f"`{row['name']}`{more}", f"{row['max_length']:,}", quality, minutes, forward]

    rows = [cells(row) for row in data["rows"]]
    rows.insert(1, cells(longer["rows"][0], f", {times} times the steps"))
    rows += [[*line["name"].split(", ", 1), number(line["value"], 3), "-", "-"] for line in data["baselines"]]
    picture = HEADLINE.with_suffix(".png").relative_to(ROOT).as_posix()
    parts = [
        f"**{title}.** {task['description'].rstrip('.')}. {task['test_documents']} test documents.",
        table(
            ["model", "tokens read", f"{metric} [95% interval]", "training, all folds", "a forward of as many"], rows
        ),
        f"{data['budget']['description'].split('; learning rate')[0]}; one row says that it had {times} times as many. "
        f"Measured on {data['meta']['device']}.",
        f"![{title}]({picture})",
    ]
    return "\n\n".join(parts)


def results() -> str:
    """Every committed results file, or how to make one."""
    paths = sorted(RESULTS.glob("*.json"))
    return "\n\n".join(map(result, paths)) if paths else "`make demo` measures them on your machine."


def language() -> str:
    """What is left of a language model after each stage, in every committed comparison."""
    parts = []
    for path in sorted(LANGUAGE.glob("**/language.json"), key=lambda path: len(path.parts)):
        data = json.loads(path.read_text(encoding="utf-8"))
        meta, documents = data["meta"], data["documents"]
        counts = ", ".join(f"{count} of {int(n):,} tokens" for n, count in documents["counts"].items())
        parts += [
            f"Held-out documents of {documents['source']}: {counts}. An interval is a 95% bootstrap over groups of "
            f"them, paired with {data['baseline']}. {meta['machine']}, {meta['threads']} thread(s), torch "
            f"{meta['torch']}, transformers {meta['transformers']}. Made by `{meta['command']}`.",
            language_table(data),
        ]
        if (picture := path.with_suffix(".png")).is_file():
            parts.append(f"![Perplexity against the time of a forward]({picture.relative_to(ROOT).as_posix()})")
    return "\n\n".join(parts)


def embedders() -> str:
    """Every committed run of `hf-linear-attn retrieval`: what it found at each length, and its picture."""
    parts = []
    for path in sorted(EMBEDDERS.glob("*/retrieval.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        parts.append(about(data))
        for length in measured_lengths(data):
            parts += [f"**{length:,} tokens.** {verdict(data, length)}", render_overview_of_retrieval(data, length)]
        picture, tables = (path.with_suffix(kind).relative_to(ROOT).as_posix() for kind in (".png", ".md"))
        parts.append(f"![How often a passage finds the rest of its document]({picture})")
        parts.append(f"All tables: [{tables}]({tables}).")
    return "\n\n".join(parts)


def benches() -> dict[Path, dict[str, Any]]:
    """What `hf-linear-attn bench` measured, by file."""
    measured = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(BENCH.glob("results/**/*.json"))}
    return {path: data for path, data in measured.items() if "summary" in data}  # other tools write there too


def performance() -> str:
    """What `hf-linear-attn bench` measured, one part for each device, and what waits for one."""
    measured = benches()
    parts = [device_results(path, data) for path, data in measured.items()]
    kinds = {data["recipe"]["device"] for data in measured.values()}
    waiting = [("cpu", "cpu.yaml", "make bench"), ("cuda", "gpu.yaml", "make bench-gpu")]
    parts += [not_measured(BENCH / name, command) for kind, name, command in waiting if kind not in kinds]
    return "\n\n".join(parts)


def kernels() -> str:
    """What `hf-linear-attn bench --kernels` counted: launches, operators and bytes of each pass at one length."""
    path = BENCH / "results" / "kernels.json"
    overview = render_kernels_overview(json.loads(path.read_text(encoding="utf-8")))
    tables = path.with_suffix(".md").relative_to(ROOT).as_posix()
    return f"{overview}\n\nOther lengths, and what each kernel compiles to: [{tables}]({tables})."


def pays() -> str:
    """How many methods are as fast as SDPA at a length, and the fastest: whole models of the bench on a CPU."""
    data = json.loads((BENCH / "results" / "cpu.json").read_text(encoding="utf-8"))
    timed = [row for row in data["rows"] if row["kind"] == "model" and "key" in row and "ratio" in row]
    lengths = sorted({row["length"] for row in timed})
    lines = []
    for part, mode in dict.fromkeys((row["part"], row["mode"]) for row in timed):
        cells = []
        for length in lengths:
            rows = [row for row in timed if (row["part"], row["mode"], row["length"]) == (part, mode, length)]
            best = max(rows, key=lambda row: row["ratio"], default=None)
            fast = sum(row["ratio"] >= 1 for row in rows)
            cells.append(f"{fast} of {len(rows)}; `{best['contender']}` {best['ratio']:.2f}x" if best else "-")
        lines.append([f"{part}, {'forward' if mode == 'forward' else 'forward and backward'}", *cells])
    about = f"{data['meta']['machine']}, {data['meta']['threads']} thread(s). Made by `{data['meta']['command']}`."
    return f"{table(['', *(f'{length:,} tokens' for length in lengths)], lines)}\n\n{about}"


def chunks() -> str:
    """Documents as vectors, nothing trained: methods beside the checkpoint in chunks, at the recipe's first length."""
    data = json.loads((EMBEDDERS / "embedder" / "retrieval.json").read_text(encoding="utf-8"))
    return f"{render_headline(data, measured_lengths(data)[0])}\n\nMade by `{data['meta']['command']}`."


def device_results(path: Path, data: dict[str, Any]) -> str:
    """The tables of one device, its pictures, and where the rest is."""
    title = f"**{data['meta']['title']}**"
    parts = [f"{title}. {render_performance(data)}"]
    for name, what in PICTURES.items():
        if (picture := path.with_name(f"{path.stem}{name}.png")).is_file():
            parts.append(f"![{data['meta']['title']}: {what}]({picture.relative_to(ROOT).as_posix()})")
    tables = path.with_suffix(".md").relative_to(ROOT).as_posix()
    return "\n\n".join([*parts, f"Times, memory and exponents of every contender: [{tables}]({tables})."])


def not_measured(path: Path, command: str) -> str:
    """What a recipe would measure, said plainly to be missing."""
    recipe = BenchRecipe.from_yaml(path)
    device = "GPU" if recipe.device == "cuda" else "CPU"
    names = ", ".join(f"*{part.name}*" for part in recipe.parts())
    file = path.relative_to(ROOT).as_posix()
    return (
        f"**Rows that wait for a {device}.** None of [{file}]({file}) is measured yet: {names}. `{command}` measures "
        "them and writes them here."
    )


def methods() -> str:
    """What `hf-linear-attn methods` measured: all methods, their errors and costs."""
    path = METHODS / "methods.json"
    if not path.is_file():
        return "`hf-linear-attn methods recipes/methods/all.yaml` measures them on your machine."
    data = json.loads(path.read_text(encoding="utf-8"))
    meta, documents = data["meta"], data["recipe"]["documents"]
    about = (
        f"{meta['machine']}, {meta['threads']} thread(s), torch {meta['torch']}. Made by `{meta['command']}`. Errors "
        "are relative errors of attention outputs on real queries, keys and values: means over layers and "
        f"{len(data['recipe']['seeds'])} seeds, with {documents['calibration_tokens']:,} calibration and "
        f"{documents['test_tokens']:,} test tokens a seed, of different groups of documents."
    )
    tables = (METHODS / "methods.md").relative_to(ROOT).as_posix()
    picture = (METHODS / "methods.png").relative_to(ROOT).as_posix()
    more = f"Every start at every length, with cosines and spread: [{tables}]({tables})."
    return "\n\n".join([about, render_overview(data), f"![How far each method starts from softmax]({picture})", more])


def sharings() -> str:
    """Linformer's four sharings, slots that calibration chose, and pooling: errors and parameters."""
    data = json.loads(SHARINGS.read_text(encoding="utf-8"))
    meta, documents, regression = data["meta"], data["recipe"]["documents"], data["recipe"]["regression"]
    seeds = len(data["recipe"]["seeds"])
    about = (
        f"{meta['machine']}, {meta['threads']} thread(s), torch {meta['torch']}. Made by `{meta['command']}`. Relative "
        f"error / mean cosine of all layers' outputs, means over {seeds} seeds (± half the range), "
        f"with {documents['calibration_tokens']:,} calibration and {documents['test_tokens']:,} test tokens a seed; "
        f"fitted: after {regression['steps']} steps of the new parameters alone, on the calibration tokens."
    )
    tables = [render_starts(data, m["name"], n) for m in data["recipe"]["models"] for n in m["lengths"]]
    chosen = [row for row in data["rows"] if any("k" in layer for layer in row.get("chosen", {}).values())]
    lines = []
    for name in dict.fromkeys(row["method"] for row in chosen):
        layers = [layer["k"] for row in chosen if row["method"] == name for layer in row["chosen"].values()]
        sizes = [size for layer in layers for size in (layer if isinstance(layer, list) else [layer])]
        lines.append(f"`{name}`: {min(sizes)} to {max(sizes)}, mean {sum(sizes) / len(sizes):.0f}")
    return "\n\n".join([about, *tables, f'Slots that `k="auto"` came to: {"; ".join(lines)}.'])


def spectrum() -> str:
    """Linformer's figure: how much of softmax attention its largest singular values hold, layer by layer."""
    data = json.loads(SPECTRUM.read_text(encoding="utf-8"))
    meta, length = data["meta"], data["documents"]["length"]
    about = (
        f"{meta['machine']}, {meta['threads']} thread(s), torch {meta['torch']}. Made by `{meta['command']}`: the mean "
        f"over {data['passages']:,} passages of {length} tokens of `{data['documents']['source']}`. d ln d = "
        f"{data['d_ln_d']:.0f}."
    )
    rows = []
    for layer, heads in data["spectrum"].items():
        shares = [sum(head[length // part - 1] for head in heads) / len(heads) for part in (8, 4, 2)]
        sizes = sorted(sum(share < 0.9 for share in head) + 1 for head in heads)
        need = f"{sizes[0]} to {sizes[-1]}, mean {sum(sizes) / len(sizes):.0f}"
        rows.append([layer, *(number(share, 0, 100) + "%" for share in shares), need])
    parts = [f"largest {length // part} = n / {part}" for part in (8, 4, 2)]
    picture = SPECTRUM.with_name("spectrum.png").relative_to(ROOT).as_posix()
    header = ["layer", *parts, "singular values for 90%, over heads"]
    return "\n\n".join([about, table(header, rows), f"![Spectrum of softmax attention]({picture})"])


def guide() -> str:
    """When to use what: what the registry says of each kind of method, beside what was measured."""
    data = json.loads(METHODS.joinpath("methods.json").read_text(encoding="utf-8"))
    models = [model["name"] for model in data["recipe"]["models"]]
    measured = leading_numbers(data)
    header = ["method", "for", "generation keeps", "equals softmax"]
    for model in models:
        header += [f"{model}: error, calibrated", f"{model}: speed at 2,048 and 8,192"]
    parts = []
    for kind, specs in by_kind(map(VARIANTS.get, VARIANTS.names())).items():
        rows = []
        for spec in specs:
            says = [spec.guide[1] if spec.guide else spec.title, KEEPS[spec.state]]
            row = [f"`{spec.key}`", *says, "as a limit" if spec.exact_limit else "never"]
            for model in models:
                if (spec.key, model) not in measured:  # by the run whose results these are
                    row += ["not measured" if spec.encoder and spec.decoder else "refused"] * 2
                    continue
                error, speeds = measured[spec.key, model]
                row += [number(error, 3), ", ".join(f"{speeds[n]:.2f}x" if n in speeds else "n²" for n in (2048, 8192))]
            rows.append(row)
        parts.append(f"**{kind}**: a token reads {KINDS[kind]}.\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def times() -> str:
    """What .ci/time.py measured."""
    measured = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.is_file() else {}
    each = [f"`make {t}` {e['seconds'] / 60:.0f} minutes ({e['machine']})" for t, e in sorted(measured.items())]
    return f"Installation included: {', '.join(each)}." if each else ""


def trust() -> str:
    """What `make test-trust` found."""
    if not TRUST.is_file():
        return "`make test-trust` finds it on your machine."
    return trust_page.render(json.loads(TRUST.read_text(encoding="utf-8")))


def pictures() -> None:
    """Draw every committed picture anew from the results file beside it; nothing is measured."""
    from hf_linear_attn.bench.speed.pictures import draw_bench
    from hf_linear_attn.bench.starts.pictures import draw_starts
    from hf_linear_attn.compare.charts import results_png

    draw_starts(json.loads((METHODS / "methods.json").read_text(encoding="utf-8")), METHODS / "methods.png")
    for picture in sorted(RESULTS.glob("*.png")):
        if (path := picture.with_suffix(".json")).is_file():
            results_png(json.loads(path.read_text(encoding="utf-8")), picture)
    for path, data in benches().items():
        draw_bench(data, path.with_suffix(".png"))


SECTIONS: dict[str, Callable[[], str]] = {
    section.__name__: section
    for section in (
        *(headline, short, variants, options, families, results, language, embedders, methods, sharings, spectrum),
        *(guide, performance, kernels, pays, chunks, times, trust),
    )
}


def render(page: str, text: str) -> str:
    """The `text` of a page with every generated section written anew.

    Raises:
        ValueError: for a section that has no generator or no end.
    """
    for name in re.findall(r"<!-- (\w+):begin", text):
        if name not in SECTIONS:
            raise ValueError(f"{page}: section {name!r} is not generated. Allowed: {', '.join(SECTIONS)}.")
        content = SECTIONS[name]()
        if page.startswith("docs/"):
            content = content.replace("](recipes/", "](../recipes/")
        body = f"\n{content}\n\n" if content else ""
        pattern = rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(pattern, lambda m, body=body: m[1] + body + m[2], text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page}: section {name!r} has no end, or stands there {count} times.")
    return text


def main() -> int:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if out of date")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures anew as well")
    arguments = parser.parse_args()
    if arguments.pictures:
        pictures()
    check = arguments.check
    old = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    begun = [name for text in old.values() for name in re.findall(r"<!-- (\w+):begin", text)]
    if sorted(begun) != sorted(SECTIONS):
        raise ValueError(f"The pages have the generated sections {sorted(begun)}, expected {sorted(SECTIONS)}.")
    changed = {page: new for page, text in old.items() if (new := render(page, text)) != text}
    if check and changed:
        print(f"{', '.join(changed)}: out of date. make readme")
        return 1
    for page, text in changed.items():
        (ROOT / page).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
